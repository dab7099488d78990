// The order of clusters at one position, and the blocks they are dealt to: shared by
// probe_threshold and cluster_logits. Higher score first, then smaller number; no two
// keys are equal.

enum : uint { block_chunk = 32 };

METAL_FUNC uint block_of(uint cluster, uint num_blocks) {
  return cluster / block_chunk % num_blocks;
}

// The cluster that has place `place` in a block.
METAL_FUNC uint cluster_at(uint place, uint block, uint num_blocks) {
  return (place / block_chunk * num_blocks + block) * block_chunk + place % block_chunk;
}

METAL_FUNC uint size_of_block(uint block, uint num_blocks, uint num_clusters) {
  const uint rounds = num_clusters / (num_blocks * block_chunk);
  const uint rest = num_clusters % (num_blocks * block_chunk);
  const uint before = block * block_chunk;
  return rounds * block_chunk +
      (rest > before ? min(rest - before, uint(block_chunk)) : 0u);
}

// An integer that orders as the score does; -0 and 0 are one score. Bits are compared,
// not floats: those may take the smallest ones for 0.
METAL_FUNC int ordered_score(float score) {
  const int bits = as_type<int>(score);
  return bits < 0 ? -(bits & 0x7fffffff) : bits;
}

// As the twin in plain MLX has it.
METAL_FUNC long full_key(int score, uint cluster) {
  return long(ulong(score) << 32) - long(cluster);
}

// The same order within a block, in 48 unsigned bits, for a place below 65536.
METAL_FUNC ulong short_key(uint unsigned_score, uint place) {
  return ulong(unsigned_score) << 16 | ulong(0xffffu - place);
}
