// Declarations of Metal's library for a compiler front end that knows address spaces:
// clang's C++ for OpenCL, which like Metal is C++ with four of them. Nothing here has a
// body: front_end.py asks only whether a kernel is well-formed.

#pragma OPENCL EXTENSION cl_khr_fp16 : enable

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef uchar uint8_t;
typedef ushort uint16_t;
typedef uint uint32_t;
typedef ulong uint64_t;
typedef int int32_t;
typedef long int64_t;
typedef half float16_t;

struct bfloat {
  ushort bits;
  bfloat() = default;
  explicit bfloat(float);
  operator float() const;
  operator float() const __constant;
};
typedef bfloat bfloat16_t;

template <typename T, int N>
struct vector_of {
  typedef T type __attribute__((ext_vector_type(N)));
};
template <int N>
struct vector_of<bfloat, N> {
  struct type {
    ushort bits[N];
    bfloat operator[](int) const __private;
  };
};
template <typename T, int N>
using vec = typename vector_of<T, N>::type;
typedef vec<uint, 2> uint2;
typedef vec<uint, 3> uint3;
typedef vec<uint, 4> uint4;
typedef vec<half, 2> half2;
typedef vec<float, 2> float2;

template <typename To, typename From>
To as_type(From);
template <typename T>
T min(T, T);
bool isfinite(float);

uint simd_or(uint);
uint simd_prefix_exclusive_sum(uint);
template <typename T>
T simd_shuffle(T, ushort);
template <typename T>
T simd_shuffle_xor(T, ushort);

enum class mem_flags { mem_none, mem_device, mem_threadgroup };
void threadgroup_barrier(mem_flags);

#define atomic_uint metal_atomic_uint
struct atomic_uint {
  uint value;
};
enum memory_order { memory_order_relaxed };
void atomic_store_explicit(volatile __local atomic_uint*, uint, memory_order);
uint atomic_load_explicit(const volatile __local atomic_uint*, memory_order);
uint atomic_fetch_add_explicit(volatile __local atomic_uint*, uint, memory_order);

#define METAL_FUNC inline __attribute__((always_inline))
#define device __global
#define threadgroup __local
#define constant __constant
#define thread __private
