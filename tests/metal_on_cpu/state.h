// What one launch works on; all of it belongs to one thread of one process.
#pragma once

#include "runtime.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

using namespace metal_on_cpu;

namespace {

// A buffer stands in the middle of its own reserved range of this size, so that
// any wrong 32-bit index of 16-byte elements still lands in the same range.
constexpr uint64_t kRangeBytes = 1ull << 37;
constexpr uint32_t kMaxBuffers = 32;
constexpr uint64_t kArenaBytes = kRangeBytes * (kMaxBuffers + 1);
constexpr uint64_t kPage = 16384; // a multiple of the page size everywhere
constexpr uint64_t kStackBytes = 4 * kPage;
constexpr uint64_t kThreadgroupBytes = 32768;
constexpr uint64_t kLine = 128;
constexpr uint32_t kMaxSites = 64;

struct LineUse {
  uint64_t threadgroup;
  uint64_t bytes[2];
};

// Shared with Python (runner.py), field by field.
struct Buffer {
  void* data;
  uint64_t bytes;
  uint64_t is_output;
  uint64_t is_initialised;
  uint8_t* read_counts;
  uint64_t bytes_read, bytes_read_wide, bytes_written, bytes_unwritten;
  uint64_t lines_read, lines_read_fully;
};

struct Launch {
  void (*entry)(void** buffers, const Ids* ids); // runs one thread
  uint64_t grid[3], threadgroup[3];
  uint64_t seed;
  uint64_t num_buffers;
  Buffer* buffers;
  uint64_t threadgroup_bytes;
  uint64_t error_address;
  char error[400];
};

enum class State { ready, at_simd, at_barrier, done };

struct Fiber {
  void* stack_pointer;
  State state;
  int line;
  uint32_t parity;
  Ids ids;
};

struct Simdgroup {
  uint32_t live, waiting, active;
  alignas(16) unsigned char values[2][kSimdWidth][kSlotBytes];
};

struct Site {
  const void* key;
  uint64_t offset, bytes;
};

unsigned char* arena;
unsigned char* stacks;
Launch* launch;
unsigned char* bases[kMaxBuffers];
uint8_t* written[kMaxBuffers];
LineUse* line_uses[kMaxBuffers];
uint8_t threadgroup_state[kThreadgroupBytes]; // 0 free, 1 allocated, 2 written
Site sites[kMaxSites];
uint32_t num_sites;
uint64_t threadgroup_used, threadgroup_serial, random_state;
Fiber fibers[kMaxThreads];
Simdgroup simdgroups[kMaxThreads / kSimdWidth];
uint32_t ready[kMaxThreads], num_ready, num_threads, num_done, num_at_barrier;
uint32_t current;
void* scheduler_stack_pointer;
bool failed;

template <typename... Args>
void report(const char* format, Args... args) {
  if (!failed) {
    snprintf(launch->error, sizeof(launch->error), format, args...);
  }
  failed = true;
}

} // namespace
