// cluster_logits: exact logits for probed clusters, centroid logits for the others.
//
//   out[n, token of slot s] = sum_d hidden[n, d] * weight[s, d]   if cluster s / C is
//                             pinned or its key reaches threshold[n],
//                             centroid_logits[n, s / C]           otherwise
//
// Inputs    hidden [N, D] T; weight [K * C, D] W or, packed, [K * C, D * Bits / 32]
//           uint32; scales, biases [K * C, D / GroupSize] (any array if GroupSize is 0);
//           cluster_tokens [K, C] uint32, VocabSize marks padding;
//           centroid_logits [N, K] float; bias [K] float; threshold [N] int64;
//           num_pinned [1] uint32
// Output    out [N, VocabSize] T
// Template  T, W, Bits, D, GroupSize, RowsPerPass, Passes as in centroid_scores;
//           VocabSize; C, a multiple of 4 and of RowsPerPass * Passes;
//           Clusters: of one threadgroup; Positions: of one threadgroup, at most 32
// Launch    threadgroups: x for Clusters clusters each, y for Positions positions each

constexpr int chunks_per_row = D / Chunk<Bits>::Values;
constexpr uint rows_per_tile = RowsPerPass * Passes;
constexpr uint num_threads = chunks_per_row * RowsPerPass;

const uint thread_index = thread_index_in_threadgroup;
const uint column = thread_index % chunks_per_row * Chunk<Bits>::Values;
const uint num_clusters = bias_shape[0];
const uint first_cluster = threadgroup_position_in_grid.x * Clusters;
const uint first_position = threadgroup_position_in_grid.y * Positions;
const uint num_positions = min(uint(Positions), hidden_shape[0] - first_position);

threadgroup uint probed_by[Clusters]; // bit n: position n probes the cluster
threadgroup float tails[Positions * Clusters];
threadgroup float partial_sums
    [Passes * num_threads / lanes_to_fold(chunks_per_row)];

for (uint i = thread_index; i < Clusters; i += num_threads) {
  const uint cluster = first_cluster + i;
  uint probing = 0;
  for (uint n = 0; n < num_positions && cluster < num_clusters; ++n) {
    const uint position = first_position + n;
    const float logit = centroid_logits[position * num_clusters + cluster];
    tails[n * Clusters + i] = logit;
    const bool is_probed = cluster < num_pinned[0] ||
        full_key(unsigned_score(logit + bias[cluster]), cluster) >=
            threshold[position];
    probing |= is_probed ? 1u << n : 0u;
  }
  probed_by[i] = probing;
}
threadgroup_barrier(mem_flags::mem_threadgroup);

// Four slots a thread: neighbouring threads read neighbouring tokens.
for (uint i = thread_index; i < Clusters * C / 4; i += num_threads) {
  const uint member = i / (C / 4);
  if (first_cluster + member >= num_clusters) {
    break;
  }
  const uint4 tokens = ((const device uint4*)cluster_tokens)[first_cluster * (C / 4) + i];
  for (uint n = 0; n < num_positions; ++n) {
    if ((probed_by[member] >> n & 1u) == 0) {
      const T tail = static_cast<T>(tails[n * Clusters + member]);
      auto logits = out + (first_position + n) * VocabSize;
      for (int j = 0; j < 4; ++j) {
        if (tokens[j] < VocabSize) {
          logits[tokens[j]] = tail;
        }
      }
    }
  }
}

// All threads take the same way through these loops: the barriers are met by all.
for (uint member = 0; member < Clusters; ++member) {
  const uint probing = probed_by[member];
  if (probing == 0) {
    continue;
  }
  for (uint tile_row = 0; tile_row < C; tile_row += rows_per_tile) {
    const uint first_row = (first_cluster + member) * C + tile_row;
    RowTile<W, Bits, GroupSize, Passes> tile;
    tile.load(
        weight,
        scales,
        biases,
        first_row * chunks_per_row + thread_index,
        num_threads,
        (first_row + rows_per_tile) * chunks_per_row,
        thread_index % 32);
    for (uint n = 0; n < num_positions; ++n) {
      if ((probing >> n & 1u) == 0) {
        continue;
      }
      HiddenChunk<Bits> piece;
      piece.load(hidden + (first_position + n) * D + column);
      write_partial_sums<chunks_per_row, RowsPerPass>(
          tile, piece, Passes, thread_index, partial_sums);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      for (uint row = thread_index; row < rows_per_tile; row += num_threads) {
        const uint token = cluster_tokens[first_row + row];
        if (token < VocabSize) {
          out[(first_position + n) * VocabSize + token] =
              static_cast<T>(row_sum<chunks_per_row>(partial_sums, row));
        }
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
  }
}
