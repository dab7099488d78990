// Relaxed atomics. Fibers never interrupt each other, so plain operations will do.
#pragma once

namespace metal {

enum memory_order { memory_order_relaxed };

template <typename T>
struct atomic { T value; };
typedef atomic<uint> atomic_uint;
typedef atomic<int> atomic_int;

#define ATOMIC_FETCH(name, expression)                                          \
  template <typename T>                                                         \
  __attribute__((no_sanitize("thread"), noinline)) T name(                      \
      volatile atomic<T>* object, std::type_identity_t<T> operand, memory_order) { \
    metal_on_cpu_access(const_cast<atomic<T>*>(object), sizeof(T), false);      \
    metal_on_cpu_access(const_cast<atomic<T>*>(object), sizeof(T), true);       \
    const T old = object->value;                                                \
    object->value = expression;                                                 \
    return old;                                                                 \
  }
ATOMIC_FETCH(atomic_fetch_add_explicit, old + operand)
ATOMIC_FETCH(atomic_fetch_or_explicit, old | operand)
ATOMIC_FETCH(atomic_fetch_max_explicit, old < operand ? operand : old)
#undef ATOMIC_FETCH

template <typename T>
__attribute__((no_sanitize("thread"), noinline)) T atomic_load_explicit(
    const volatile atomic<T>* object, memory_order) {
  metal_on_cpu_access(const_cast<const atomic<T>*>(object), sizeof(T), false);
  return object->value;
}

template <typename T>
__attribute__((no_sanitize("thread"), noinline)) void atomic_store_explicit(
    volatile atomic<T>* object, std::type_identity_t<T> desired, memory_order) {
  metal_on_cpu_access(const_cast<atomic<T>*>(object), sizeof(T), true);
  object->value = desired;
}

} // namespace metal
