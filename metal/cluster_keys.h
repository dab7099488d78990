// The order of clusters at one position: higher score first, then smaller number.
// Shared by probe_threshold and cluster_logits; no two keys are equal.

// An unsigned integer that orders as the score does; -0 and 0 are one score.
METAL_FUNC uint unsigned_score(float score) {
  const uint bits = as_type<uint>(score == 0.0f ? 0.0f : score);
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

// As the twin in plain MLX has it: signed, the score in the upper half.
METAL_FUNC long full_key(uint score, uint cluster) {
  const ulong high = ulong(score ^ 0x80000000u);
  return long(high << 32 | ulong(0xffffffffu - cluster));
}

// The same order in 48 unsigned bits, for at most 65536 clusters.
METAL_FUNC ulong short_key(uint score, uint cluster) {
  return ulong(score) << 16 | ulong(0xffffu - cluster);
}
