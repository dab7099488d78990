// centroid_scores: the logit of every centroid at every position.
//
//   out[n, k] = sum_d projected[n, d] * weight[k, d] + bias[k] + offset[n]
//
// Inputs    projected [N, D] T; weight [K, D] W or, packed, [K, D * Bits / 32] uint32;
//           scales, biases [K, D / GroupSize] (any array if GroupSize is 0);
//           bias [K] and offset [N], any floats
// Output    out [N, K] float
// Template  T; W: type of weight; Bits: 2 to 8, or 16 and 32 for floats; D;
//           GroupSize: 32, 64, 128, or 0 for floats; RowsPerPass, Passes
// Launch    one threadgroup for RowsPerPass * Passes centroids; each of its threads
//           holds one chunk of a row (packed_rows.h), RowsPerPass rows at once

constexpr int chunks_per_row = D / Chunk<Bits>::Values;
constexpr uint rows_per_tile = RowsPerPass * Passes;
constexpr uint num_threads = chunks_per_row * RowsPerPass;

const uint thread_index = thread_index_in_threadgroup;
const uint column = thread_index % chunks_per_row * Chunk<Bits>::Values;
const uint first_row = threadgroup_position_in_grid.x * rows_per_tile;
const uint num_positions = projected_shape[0];
const uint num_rows = weight_shape[0];

threadgroup float partial_sums
    [Passes * num_threads / lanes_to_fold(chunks_per_row)];

// The tile stays in registers while the positions go by: its words are read once.
RowTile<W, Bits, GroupSize, Passes> tile;
#pragma clang loop unroll(full)
for (uint pass = 0; pass < Passes; ++pass) {
  const uint chunk =
      first_row * chunks_per_row + pass * num_threads + thread_index;
  const bool is_there = chunk < num_rows * chunks_per_row;
  tile.load(pass, weight, scales, biases, chunk, is_there);
}
tile.share_scales(thread_index % 32);

for (uint position = 0; position < num_positions; ++position) {
  HiddenChunk<Bits> piece;
  piece.load(projected + position * D + column);
#pragma clang loop unroll(full)
  for (uint pass = 0; pass < Passes; ++pass) {
    write_partial_sum<chunks_per_row, RowsPerPass>(
        tile, piece, pass, thread_index, partial_sums);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint i = thread_index; i < rows_per_tile; i += num_threads) {
    const uint row = first_row + i;
    if (row < num_rows) {
      out[position * num_rows + row] = row_sum<chunks_per_row>(partial_sums, i) +
          float(bias[row]) + float(offset[position]);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
