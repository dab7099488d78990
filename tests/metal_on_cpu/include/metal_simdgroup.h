// Barriers and simdgroup operations: each is a point where a fiber may be switched.
// The default argument `line` is the caller's line and tells two operations apart.
#pragma once

namespace metal {

#define LINE int line = __builtin_LINE()
#define UNCHECKED __attribute__((no_sanitize("thread"), noinline))

inline void threadgroup_barrier(mem_flags, LINE) { metal_on_cpu_barrier(line); }
inline void simdgroup_barrier(mem_flags, LINE) {
  metal_on_cpu_exchange(&line, sizeof(line), line);
}

namespace lanes {

using metal_on_cpu::Lanes;

template <typename T>
Lanes bring(const T& value, int line) {
  static_assert(sizeof(T) <= metal_on_cpu::kSlotBytes);
  return metal_on_cpu_exchange(&value, sizeof(T), line);
}

inline bool is_active(const Lanes& all, uint lane) { return all.active >> lane & 1; }

template <typename T>
UNCHECKED T of(const Lanes& all, uint lane, int line) {
  if (lane >= metal_on_cpu::kSimdWidth || !is_active(all, lane)) {
    metal_on_cpu_fail("a simdgroup operation reads a lane that is not there", line);
  }
  T value;
  memcpy(&value, all.values + lane * metal_on_cpu::kSlotBytes, sizeof(T));
  return value;
}

// Combines lanes 0..end-1 of `base` by halves, as a GPU does, idle lanes left out.
template <typename T, typename F>
UNCHECKED T reduce(const Lanes& all, uint base, uint end, int line, F combine) {
  T values[metal_on_cpu::kSimdWidth];
  bool present[metal_on_cpu::kSimdWidth];
  for (uint i = 0; i < end; ++i) {
    present[i] = is_active(all, base + i);
    if (present[i]) values[i] = of<T>(all, base + i, line);
  }
  for (uint step = end / 2; step > 0; step /= 2) {
    for (uint i = 0; i < step; ++i) {
      if (present[i + step]) {
        values[i] = present[i] ? combine(values[i], values[i + step]) : values[i + step];
        present[i] = true;
      }
    }
  }
  return values[0];
}

} // namespace lanes

#define REDUCE(name, expression)                                                 \
  template <typename T>                                                          \
  T simd_##name(T value, LINE) {                                                 \
    return lanes::reduce<T>(lanes::bring(value, line), 0, 32, line, [](T a, T b) { \
      return T(expression);                                                      \
    });                                                                          \
  }                                                                              \
  template <typename T>                                                          \
  T quad_##name(T value, LINE) {                                                 \
    const auto all = lanes::bring(value, line);                                  \
    return lanes::reduce<T>(all, all.lane / 4 * 4, 4, line, [](T a, T b) {       \
      return T(expression);                                                      \
    });                                                                          \
  }
REDUCE(sum, a + b)
REDUCE(product, a* b)
REDUCE(max, a < b ? b : a)
REDUCE(min, b < a ? b : a)
REDUCE(or, a | b)
#undef REDUCE

inline bool simd_any(bool value, LINE) { return simd_max(int(value), line); }
inline bool simd_all(bool value, LINE) { return simd_min(int(value), line); }

template <typename T>
T simd_shuffle(T value, ushort lane, LINE) {
  return lanes::of<T>(lanes::bring(value, line), lane, line);
}
template <typename T>
T simd_shuffle_xor(T value, ushort mask, LINE) {
  const auto all = lanes::bring(value, line);
  return lanes::of<T>(all, all.lane ^ mask, line);
}
template <typename T>
T simd_shuffle_down(T value, ushort delta, LINE) {
  const auto all = lanes::bring(value, line);
  const uint source = all.lane + delta;
  return source < 32 ? lanes::of<T>(all, source, line) : value;
}
template <typename T>
T simd_shuffle_up(T value, ushort delta, LINE) {
  const auto all = lanes::bring(value, line);
  return all.lane >= delta ? lanes::of<T>(all, all.lane - delta, line) : value;
}
template <typename T>
T simd_broadcast(T value, ushort lane, LINE) { return simd_shuffle(value, lane, line); }

template <typename T>
UNCHECKED T prefix_sum(const lanes::Lanes& all, uint end, int line) {
  T sum = T(0);
  for (uint i = 0; i < end; ++i) {
    if (lanes::is_active(all, i)) sum += lanes::of<T>(all, i, line);
  }
  return sum;
}
template <typename T>
T simd_prefix_inclusive_sum(T value, LINE) {
  const auto all = lanes::bring(value, line);
  return prefix_sum<T>(all, all.lane + 1, line);
}
template <typename T>
T simd_prefix_exclusive_sum(T value, LINE) {
  const auto all = lanes::bring(value, line);
  return prefix_sum<T>(all, all.lane, line);
}

#undef LINE
#undef UNCHECKED

} // namespace metal
