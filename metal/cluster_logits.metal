// cluster_logits: exact logits for probed clusters, centroid logits for the others.
//
//   out[n, token of slot s] =
//       sum_d hidden[n, d] * weight[s, d] + head_bias[token]   if the key of cluster
//                                  s / C reaches threshold[n, block of the cluster],
//       centroid_logits[n, s / C]                              otherwise
//
// Inputs    hidden [N, D] T; weight [K * C, D] W or, packed, [K * C, D * Bits / 32]
//           uint32; scales, biases [K * C, D / GroupSize] (any array if GroupSize is 0);
//           centroid_logits [N, K] float; threshold [N, blocks] int64;
//           cluster_tokens [K, C] uint32, VocabSize marks padding (any array without
//           HasMap: a slot's token is the slot); head_bias [VocabSize], any floats (any
//           array without HasBias)
// Output    out [N, VocabSize] T
// Template  T, W, Bits, D, GroupSize, RowsPerPass, Passes as in centroid_scores;
//           VocabSize; C; Clusters: of one threadgroup; Positions: of one threadgroup,
//           at most 32; HasMap; HasBias
// Launch    threadgroups: x for Clusters clusters each, y for Positions positions each

constexpr int chunks_per_row = D / Chunk<Bits>::Values;
constexpr uint rows_per_tile = RowsPerPass * Passes;
constexpr uint num_threads = chunks_per_row * RowsPerPass;

const uint thread_index = thread_index_in_threadgroup;
const uint column = thread_index % chunks_per_row;
const uint num_clusters = centroid_logits_shape[1];
const uint num_blocks = threshold_shape[1];
const uint first_slot = threadgroup_position_in_grid.x * Clusters * C;
const uint num_slots = min(uint(Clusters * C), num_clusters * C - first_slot);
const uint first_position = threadgroup_position_in_grid.y * Positions;
const uint num_positions = min(uint(Positions), hidden_shape[0] - first_position);

threadgroup atomic_uint num_listed;
threadgroup uint listed[Clusters]; // clusters that some position probes
threadgroup uint probed_by[Clusters]; // bit n: position n probes it
threadgroup float partial_sums
    [Passes * num_threads / lanes_to_fold(chunks_per_row)];

if (thread_index == 0) {
  atomic_store_explicit(&num_listed, 0u, memory_order_relaxed);
}
threadgroup_barrier(mem_flags::mem_threadgroup);

// Neighbouring threads take neighbouring slots; the threads of a cluster find the same.
for (uint i = thread_index; i < num_slots; i += num_threads) {
  const uint slot = first_slot + i;
  const uint cluster = slot / C;
  const uint block = block_of(cluster, num_blocks);
  uint token = slot;
  if (HasMap) {
    token = cluster_tokens[slot];
  }
  uint probing = 0;
  for (uint n = 0; n < num_positions; ++n) {
    const uint position = first_position + n;
    const float logit = centroid_logits[position * num_clusters + cluster];
    if (full_key(ordered_score(logit), cluster) >=
        threshold[position * num_blocks + block]) {
      probing |= 1u << n;
    } else if (token < VocabSize) {
      out[position * VocabSize + token] = static_cast<T>(logit);
    }
  }
  // The order of the list is one of chance, but no row's sum depends on it.
  if (probing != 0 && slot % C == 0) {
    const uint place =
        atomic_fetch_add_explicit(&num_listed, 1u, memory_order_relaxed);
    listed[place] = cluster;
    probed_by[place] = probing;
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);

// All threads take the same way through these loops: the barriers are met by all.
const uint num_rows = atomic_load_explicit(&num_listed, memory_order_relaxed) * C;
for (uint first_row = 0; first_row < num_rows; first_row += rows_per_tile) {
  RowTile<W, Bits, GroupSize, Passes> tile;
  uint wanted_by[Passes]; // bit n: position n probes a row of this simdgroup
#pragma clang loop unroll(full)
  for (uint pass = 0; pass < Passes; ++pass) {
    const uint row = first_row + pass * RowsPerPass + thread_index / chunks_per_row;
    const bool is_there = row < num_rows;
    const uint slot = is_there ? listed[row / C] * C + row % C : 0;
    const uint chunk = slot * chunks_per_row + column;
    tile.load(pass, weight, scales, biases, chunk, is_there);
    wanted_by[pass] = simd_or(is_there ? probed_by[row / C] : 0u);
  }
  tile.share_scales(thread_index % 32);
  for (uint n = 0; n < num_positions; ++n) {
    const uint position = first_position + n;
    HiddenChunk<Bits> piece;
    piece.load(hidden + position * D + column * Chunk<Bits>::Values);
#pragma clang loop unroll(full)
    for (uint pass = 0; pass < Passes; ++pass) {
      if ((wanted_by[pass] >> n & 1u) != 0) {
        write_partial_sum<chunks_per_row, RowsPerPass>(
            tile, piece, pass, thread_index, partial_sums);
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint i = thread_index; i < rows_per_tile; i += num_threads) {
      const uint row = first_row + i;
      if (row >= num_rows || (probed_by[row / C] >> n & 1u) == 0) {
        continue;
      }
      const uint slot = listed[row / C] * C + row % C;
      uint token = slot;
      if (HasMap) {
        token = cluster_tokens[slot];
      }
      if (token < VocabSize) {
        float logit = row_sum<chunks_per_row>(partial_sums, i);
        if (HasBias) {
          logit += float(head_bias[token]);
        }
        out[position * VocabSize + token] = static_cast<T>(logit);
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
}
