// What a compiled kernel and the runtime know of each other.
#pragma once

#include <cstdint>

namespace metal_on_cpu {

constexpr uint32_t kSimdWidth = 32;
constexpr uint32_t kMaxThreads = 1024;
constexpr uint32_t kSlotBytes = 16;

// Position of one thread, in the words of Metal's attributes.
struct Ids {
  uint32_t position[3];  // in the threadgroup
  uint32_t group[3];     // of the threadgroup in the grid
  uint32_t size[3];      // of this threadgroup (smaller at the grid's edge)
  uint32_t full_size[3]; // of a whole threadgroup
  uint32_t grid[3];      // threads
  uint32_t index;        // in the threadgroup
};

// The values that the lanes of a simdgroup brought to one operation.
struct Lanes {
  const unsigned char* values;
  uint32_t active;
  uint32_t lane;
};

// A buffer's address, which becomes any pointer or reference a kernel declares.
struct AnyReference {
  void* address;
  template <typename T>
  operator T&() const { return *static_cast<T*>(address); }
};
struct AnyPointer {
  void* address;
  template <typename T>
  operator T*() const { return static_cast<T*>(address); }
  AnyReference operator*() const { return {address}; }
};

} // namespace metal_on_cpu

extern "C" {
// Answered by the runtime.
void metal_on_cpu_barrier(int line);
metal_on_cpu::Lanes metal_on_cpu_exchange(const void* value, uint32_t bytes, int line);
void* metal_on_cpu_threadgroup(const void* site, uint64_t bytes);
void metal_on_cpu_access(const void* address, uint64_t bytes, bool is_write);
void metal_on_cpu_fail(const char* message, int line);
}
