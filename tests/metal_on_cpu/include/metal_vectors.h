// vec<T, N>: as many operators as the kernels use. A whole vector is one access.
#pragma once

template <typename T, int N>
struct vec_storage;
template <typename T>
struct vec_storage<T, 2> { T x, y; };
template <typename T>
struct vec_storage<T, 3> { T x, y, z, padding_; };
template <typename T>
struct vec_storage<T, 4> { T x, y, z, w; };

template <typename T, int N>
struct alignas(sizeof(vec_storage<T, N>)) vec : vec_storage<T, N> {
  vec() = default;
  constexpr explicit vec(T all) {
    for (int i = 0; i < N; ++i) (*this)[i] = all;
  }
  constexpr vec(T x, T y) requires(N == 2) : vec_storage<T, N>{x, y} {}
  constexpr vec(T x, T y, T z) requires(N == 3) : vec_storage<T, N>{x, y, z, T()} {}
  constexpr vec(T x, T y, T z, T w) requires(N == 4) : vec_storage<T, N>{x, y, z, w} {}
  template <typename U>
  constexpr explicit vec(const vec<U, N>& other) {
    for (int i = 0; i < N; ++i) (*this)[i] = T(other[i]);
  }
  constexpr T& operator[](int i) { return (&this->x)[i]; }
  constexpr const T& operator[](int i) const { return (&this->x)[i]; }
};

#define VECTOR_OPERATOR(op)                                               \
  template <typename T, int N>                                            \
  constexpr vec<T, N> operator op(vec<T, N> a, const vec<T, N>& b) {      \
    for (int i = 0; i < N; ++i) a[i] = a[i] op b[i];                      \
    return a;                                                             \
  }                                                                       \
  template <typename T, int N>                                            \
  constexpr vec<T, N> operator op(vec<T, N> a, T b) {                     \
    for (int i = 0; i < N; ++i) a[i] = a[i] op b;                         \
    return a;                                                             \
  }
VECTOR_OPERATOR(+)
VECTOR_OPERATOR(-)
VECTOR_OPERATOR(*)
#undef VECTOR_OPERATOR

#define VECTOR_TYPES(name, T) \
  typedef vec<T, 2> name##2;  \
  typedef vec<T, 3> name##3;  \
  typedef vec<T, 4> name##4;
VECTOR_TYPES(float, float)
VECTOR_TYPES(half, half)
VECTOR_TYPES(bfloat, bfloat)
VECTOR_TYPES(uint, uint)
VECTOR_TYPES(ulong, ulong)
VECTOR_TYPES(int, int)
VECTOR_TYPES(ushort, ushort)
VECTOR_TYPES(short, short)
VECTOR_TYPES(uchar, uchar)
#undef VECTOR_TYPES
