// probe_threshold: the key of the last cluster that is probed, for each block.
//
//   key(k) = order-preserving bits of centroid_logits[n, k], then smaller k;
//   out[n, b] = the limits[0]-th largest key of the clusters of block b, or the smallest
//               if it has fewer
//
// Inputs    centroid_logits [N, K] float; limits [2] uint32: rank (1 is the largest),
//           number of blocks
// Output    out [N, number of blocks] int64
// Template  PerThread: clusters held by one of the 512 threads, so that a block has at
//           most 512 * PerThread
// Launch    threadgroups of 512 threads: x for a block, y for a position
//
// A radix select from the highest digit down. Each cluster is read once and stays in a
// register; digits are counted, not sorted. A key of 48 bits is four digits of 12; most
// blocks stop after two or three, when a digit leaves one cluster.

constexpr uint num_threads = 512;
constexpr uint digit_bits = 12;
constexpr uint num_digits = 1u << digit_bits;
constexpr uint per_thread = num_digits / num_threads;

const uint thread_index = thread_index_in_threadgroup;
const uint lane = thread_index % 32;
const uint block = threadgroup_position_in_grid.x;
const uint position = threadgroup_position_in_grid.y;
const uint num_blocks = limits[1];
const uint num_clusters = centroid_logits_shape[1];
const uint block_size = size_of_block(block, num_blocks, num_clusters);

threadgroup atomic_uint counts[num_digits];
threadgroup uint totals[num_threads / 32];
threadgroup uint found[3]; // digit, rank within it, clusters within it

// Places without a cluster get 0, which is below every score.
auto logits = centroid_logits + position * num_clusters;
uint scores[PerThread];
#pragma clang loop unroll(full)
for (uint i = 0; i < PerThread; ++i) {
  const uint place = i * num_threads + thread_index;
  scores[i] = 0;
  if (place < block_size) {
    const float score = logits[cluster_at(place, block, num_blocks)];
    scores[i] = uint(ordered_score(score)) ^ 0x80000000u;
  }
}

ulong prefix = 0;
uint rank = min(limits[0], block_size);
uint num_left = 0;
uint shift = 48;
while (num_left != 1 && shift > 0) {
  shift -= digit_bits;
  for (uint i = 0; i < per_thread; ++i) {
    atomic_store_explicit(
        &counts[i * num_threads + thread_index], 0u, memory_order_relaxed);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma clang loop unroll(full)
  for (uint i = 0; i < PerThread; ++i) {
    const ulong key = short_key(scores[i], i * num_threads + thread_index);
    if (key >> (shift + digit_bits) == prefix) {
      atomic_fetch_add_explicit(
          &counts[uint(key >> shift) % num_digits], 1u, memory_order_relaxed);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  // Thread 0 has the highest digits: ranks count from the top.
  const uint top = num_digits - 1 - thread_index * per_thread;
  uint count = 0;
  for (uint i = 0; i < per_thread; ++i) {
    count += atomic_load_explicit(&counts[top - i], memory_order_relaxed);
  }
  uint above = simd_prefix_exclusive_sum(count);
  if (lane == 31) {
    totals[thread_index / 32] = above + count;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint i = 0; i < thread_index / 32; ++i) {
    above += totals[i];
  }
  if (above < rank && rank <= above + count) {
    uint digit = top;
    uint in_digit = atomic_load_explicit(&counts[digit], memory_order_relaxed);
    while (above + in_digit < rank) {
      above += in_digit;
      digit -= 1;
      in_digit = atomic_load_explicit(&counts[digit], memory_order_relaxed);
    }
    found[0] = digit;
    found[1] = rank - above;
    found[2] = in_digit;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  prefix = prefix << digit_bits | found[0];
  rank = found[1];
  num_left = found[2];
}

#pragma clang loop unroll(full)
for (uint i = 0; i < PerThread; ++i) {
  const uint place = i * num_threads + thread_index;
  if (place < block_size && short_key(scores[i], place) >> shift == prefix) {
    out[position * num_blocks + block] = full_key(
        int(scores[i] ^ 0x80000000u), cluster_at(place, block, num_blocks));
  }
}
