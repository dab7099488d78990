// centroid_scores: the logit of every centroid at every position.
//
//   out[n, k] = sum_d hidden[n, d] * weight[k, d]
//
// Inputs    hidden [N, D] T; weight [K, D] W or, packed, [K, D * Bits / 32] uint32;
//           scales, biases [K, D / GroupSize] (any array if GroupSize is 0)
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
const uint num_positions = hidden_shape[0];
const uint num_rows = weight_shape[0];

threadgroup float partial_sums
    [Passes * num_threads / lanes_to_fold(chunks_per_row)];

// The tile stays in registers while the positions go by: its words are read once.
RowTile<W, Bits, GroupSize, Passes> tile;
tile.load(
    weight,
    scales,
    biases,
    first_row * chunks_per_row + thread_index,
    num_threads,
    num_rows * chunks_per_row,
    thread_index % 32);

for (uint position = 0; position < num_positions; ++position) {
  HiddenChunk<Bits> piece;
  piece.load(hidden + position * D + column);
  write_partial_sums<chunks_per_row, RowsPerPass>(
      tile, piece, Passes, thread_index, partial_sums);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint row = thread_index; row < rows_per_tile; row += num_threads) {
    if (first_row + row < num_rows) {
      out[position * num_rows + first_row + row] =
          row_sum<chunks_per_row>(partial_sums, row);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
