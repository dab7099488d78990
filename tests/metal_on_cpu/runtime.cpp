// Runs the threads of a Metal grid as fibers and checks every memory access.
//
// Kernels are compiled with -fsanitize=thread, which makes the compiler announce
// every load and store by a call; this file answers those calls in place of the
// sanitizer's own library. README.md beside it explains the rules that are checked.

#include <sys/mman.h>

#include "memory.h"
#include "scheduler.h"

namespace {

void* map(void* at, uint64_t bytes, int protection, int flags) {
  void* result = mmap(at, bytes, protection, MAP_PRIVATE | MAP_ANON | flags, -1, 0);
  if (result == MAP_FAILED) {
    perror("metal_on_cpu: mmap");
    abort();
  }
  return result;
}

uint64_t pages(uint64_t bytes) {
  return (bytes + kPage - 1) / kPage * kPage + kPage;
}

void reserve() {
  if (arena) {
    return;
  }
  arena = static_cast<unsigned char*>(map(nullptr, kArenaBytes, PROT_NONE, MAP_NORESERVE));
  map(arena + kMaxBuffers * kRangeBytes + kRangeBytes / 2,
      pages(kThreadgroupBytes),
      PROT_READ | PROT_WRITE,
      MAP_FIXED);
  // Every second block of the stacks stays closed: an overflow stops the process.
  const uint64_t bytes = kMaxThreads * 2 * kStackBytes;
  stacks = static_cast<unsigned char*>(map(nullptr, bytes, PROT_NONE, MAP_NORESERVE));
  for (uint32_t i = 0; i < kMaxThreads; ++i) {
    mprotect(
        stacks + (2 * i + 1) * kStackBytes, kStackBytes, PROT_READ | PROT_WRITE);
  }
}

void open_buffer(uint32_t slot) {
  Buffer& buffer = launch->buffers[slot];
  bases[slot] = arena + slot * kRangeBytes + kRangeBytes / 2;
  map(bases[slot], pages(buffer.bytes), PROT_READ | PROT_WRITE, MAP_FIXED);
  memcpy(bases[slot], buffer.data, buffer.bytes);
  written[slot] = nullptr;
  if (buffer.is_output) {
    written[slot] = static_cast<uint8_t*>(malloc(buffer.bytes + 1));
    memset(written[slot], buffer.is_initialised, buffer.bytes);
  }
  line_uses[slot] =
      static_cast<LineUse*>(calloc(buffer.bytes / kLine + 2, sizeof(LineUse)));
}

void close_buffer(uint32_t slot) {
  Buffer& buffer = launch->buffers[slot];
  if (buffer.is_output) {
    memcpy(buffer.data, bases[slot], buffer.bytes);
    for (uint64_t i = 0; i < buffer.bytes; ++i) {
      buffer.bytes_unwritten += !written[slot][i];
    }
  }
  ++threadgroup_serial;
  for (uint64_t line = 0; line * kLine < buffer.bytes; ++line) {
    if (line_uses[slot][line].threadgroup) {
      count_line(buffer, line_uses[slot][line], 0, 0);
      --buffer.lines_read; // counted when it was opened
    }
  }
  free(written[slot]);
  free(line_uses[slot]);
  map(bases[slot], pages(buffer.bytes), PROT_NONE, MAP_FIXED | MAP_NORESERVE);
}

} // namespace

extern "C" {

int metal_on_cpu_run(Launch* request) {
  launch = request;
  failed = false;
  num_sites = 0;
  threadgroup_used = 0;
  memset(threadgroup_state, 0, sizeof(threadgroup_state));
  random_state = request->seed * 2 + 0x9E3779B97F4A7C15ull;
  reserve();
  for (uint32_t i = 0; i < request->num_buffers; ++i) {
    open_buffer(i);
  }
  run_grid();
  request->threadgroup_bytes = 0;
  for (uint32_t i = 0; i < num_sites; ++i) {
    request->threadgroup_bytes += sites[i].bytes;
  }
  for (uint32_t i = 0; i < request->num_buffers; ++i) {
    close_buffer(i);
  }
  return failed;
}

void metal_on_cpu_fail(const char* message, int line) {
  report("%s in line %d", message, line);
  stop_fiber();
}

void metal_on_cpu_barrier(int line) {
  fibers[current].line = line;
  fibers[current].state = State::at_barrier;
  to_scheduler();
}

Lanes metal_on_cpu_exchange(const void* value, uint32_t bytes, int line) {
  Fiber& fiber = fibers[current];
  const uint32_t lane = current % kSimdWidth;
  Simdgroup& simd = simdgroups[current / kSimdWidth];
  // Two sets of slots in turn: a lane can be one operation ahead, never two.
  fiber.parity ^= 1;
  auto values = simd.values[fiber.parity];
  memcpy(values[lane], value, bytes);
  fiber.line = line;
  fiber.state = State::at_simd;
  to_scheduler();
  return {values[0], simd.active, lane};
}

void* metal_on_cpu_threadgroup(const void* site, uint64_t bytes) {
  unsigned char* memory = arena + kMaxBuffers * kRangeBytes + kRangeBytes / 2;
  for (uint32_t i = 0; i < num_sites; ++i) {
    if (sites[i].key == site) {
      return memory + sites[i].offset;
    }
  }
  // 64 closed bytes between two arrays catch a step over the end of the first.
  const uint64_t offset = threadgroup_used + 64;
  if (num_sites == kMaxSites || offset + bytes > kThreadgroupBytes) {
    report("more than 32 KB of threadgroup memory");
    stop_fiber();
  }
  sites[num_sites++] = {site, offset, bytes};
  memset(threadgroup_state + offset, 1, bytes);
  threadgroup_used = (offset + bytes + 15) / 16 * 16;
  return memory + offset;
}

void metal_on_cpu_access(const void* address, uint64_t bytes, bool is_write) {
  access(address, bytes, is_write, true, __builtin_return_address(0));
}

// The calls that -fsanitize=thread makes.
void __tsan_init() {}
#define ANSWER(name, bytes, is_write, must_align)                                 \
  void __tsan_##name(void* p) {                                                   \
    access(p, bytes, is_write, must_align, __builtin_return_address(0));          \
  }
#define ANSWER_ALL(n)                      \
  ANSWER(read##n, n, false, true)          \
  ANSWER(write##n, n, true, true)          \
  ANSWER(unaligned_read##n, n, false, false) \
  ANSWER(unaligned_write##n, n, true, false)
ANSWER_ALL(1) ANSWER_ALL(2) ANSWER_ALL(4) ANSWER_ALL(8) ANSWER_ALL(16)

void __tsan_read_range(void* p, uint64_t n) {
  access(p, n, false, false, __builtin_return_address(0));
}
void __tsan_write_range(void* p, uint64_t n) {
  access(p, n, true, false, __builtin_return_address(0));
}
void* __tsan_memcpy(void* to, const void* from, uint64_t n) {
  __tsan_read_range(const_cast<void*>(from), n);
  __tsan_write_range(to, n);
  return memcpy(to, from, n);
}
void* __tsan_memset(void* to, int value, uint64_t n) {
  __tsan_write_range(to, n);
  return memset(to, value, n);
}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
