// Runs the threads of a Metal grid as fibers and checks every memory access.
//
// Kernels are compiled with -fsanitize=thread, which makes the compiler announce
// every load and store by a call; this file answers those calls in place of the
// sanitizer's own library. README.md beside it explains the rules that are checked.

#include "runtime.h"

#include <sys/mman.h>

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

// --- switching ------------------------------------------------------------------

#if defined(__APPLE__)
#define SYMBOL(name) "_" name
#else
#define SYMBOL(name) name
#endif

#if defined(__x86_64__)
constexpr uint32_t kFrameWords = 8, kReturnWord = 6;
asm(".text\n.globl " SYMBOL("metal_on_cpu_switch") "\n" SYMBOL("metal_on_cpu_switch")
    ":\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp, (%rdi)\nmovq %rsi, %rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n");
#elif defined(__aarch64__)
constexpr uint32_t kFrameWords = 20, kReturnWord = 11;
asm(".text\n.balign 4\n.globl " SYMBOL("metal_on_cpu_switch") "\n" SYMBOL(
    "metal_on_cpu_switch") ":\n"
    "sub sp, sp, #160\n"
    "stp x19, x20, [sp]\nstp x21, x22, [sp, #16]\nstp x23, x24, [sp, #32]\n"
    "stp x25, x26, [sp, #48]\nstp x27, x28, [sp, #64]\nstp x29, x30, [sp, #80]\n"
    "stp d8, d9, [sp, #96]\nstp d10, d11, [sp, #112]\n"
    "stp d12, d13, [sp, #128]\nstp d14, d15, [sp, #144]\n"
    "mov x9, sp\nstr x9, [x0]\nmov sp, x1\n"
    "ldp x19, x20, [sp]\nldp x21, x22, [sp, #16]\nldp x23, x24, [sp, #32]\n"
    "ldp x25, x26, [sp, #48]\nldp x27, x28, [sp, #64]\nldp x29, x30, [sp, #80]\n"
    "ldp d8, d9, [sp, #96]\nldp d10, d11, [sp, #112]\n"
    "ldp d12, d13, [sp, #128]\nldp d14, d15, [sp, #144]\n"
    "add sp, sp, #160\nret\n");
#else
#error "metal_on_cpu switches fibers on x86-64 and arm64 only"
#endif

extern "C" void metal_on_cpu_switch(void** save, void* load);

void to_scheduler() {
  metal_on_cpu_switch(&fibers[current].stack_pointer, scheduler_stack_pointer);
}

void fiber_main() {
  launch->entry(reinterpret_cast<void**>(bases), &fibers[current].ids);
  fibers[current].state = State::done;
  to_scheduler();
  abort();
}

void start_fiber(uint32_t index) {
  // Stacks start at different places of a page: else they share few cache sets.
  unsigned char* end = stacks + (index + 1) * 2 * kStackBytes - index % 64 * 256;
  auto top = reinterpret_cast<uint64_t*>(end);
  uint64_t* frame = top - kFrameWords - 2; // both ABIs want 16-byte alignment here
  memset(frame, 0, kFrameWords * sizeof(uint64_t));
  frame[kReturnWord] = reinterpret_cast<uint64_t>(&fiber_main);
  fibers[index].stack_pointer = frame;
}

uint64_t random_below(uint64_t limit) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return (random_state * 0x2545F4914F6CDD1Dull >> 32) * limit >> 32;
}

// --- errors ----------------------------------------------------------------------

template <typename... Args>
void report(const char* format, Args... args) {
  if (!failed) {
    snprintf(launch->error, sizeof(launch->error), format, args...);
  }
  failed = true;
}

void stop_fiber() {
  for (;;) {
    to_scheduler(); // never resumed: the scheduler leaves on `failed`
  }
}

// --- memory ----------------------------------------------------------------------

void access_threadgroup(int64_t offset, uint64_t bytes, bool is_write, void* caller) {
  for (uint64_t i = 0; i < bytes; ++i) {
    const bool inside = offset >= 0 && offset + i < kThreadgroupBytes;
    const uint8_t state = inside ? threadgroup_state[offset + i] : 0;
    if (state == 0 || (state == 1 && !is_write)) {
      launch->error_address = reinterpret_cast<uint64_t>(caller);
      report(
          state == 0 ? "out of bounds: %s of %llu bytes at threadgroup byte %lld"
                     : "uninitialised: %s of %llu bytes at threadgroup byte %lld",
          is_write ? "write" : "read",
          (unsigned long long)bytes,
          (long long)offset);
      stop_fiber();
    }
    if (is_write) {
      threadgroup_state[offset + i] = 2;
    }
  }
}

void count_line(Buffer& buffer, LineUse& use, uint64_t bit, uint64_t bytes) {
  if (use.threadgroup != threadgroup_serial) {
    buffer.lines_read_fully += use.bytes[0] == ~0ull && use.bytes[1] == ~0ull;
    ++buffer.lines_read;
    use = {threadgroup_serial, {0, 0}};
  }
  use.bytes[bit / 64] |= ((bytes < 64 ? 1ull << bytes : 0) - 1) << bit % 64;
}

void read_device(Buffer& buffer, uint32_t slot, uint64_t offset, uint64_t bytes) {
  buffer.bytes_read += bytes;
  buffer.bytes_read_wide += bytes >= 8 ? bytes : 0;
  for (uint64_t i = offset; i < offset + bytes; ++i) {
    buffer.read_counts[i] += buffer.read_counts[i] != 255;
  }
  count_line(buffer, line_uses[slot][offset / kLine], offset % kLine, bytes);
}

void access_device(uint32_t slot, int64_t offset, uint64_t bytes, bool is_write, void* caller) {
  const bool known = slot < launch->num_buffers;
  if (!known || offset < 0 || offset + bytes > launch->buffers[slot].bytes) {
    launch->error_address = reinterpret_cast<uint64_t>(caller);
    report(
        "out of bounds: %s of %llu bytes at byte %lld of buffer %u (%llu bytes)",
        is_write ? "write" : "read",
        (unsigned long long)bytes,
        (long long)offset,
        slot,
        (unsigned long long)(known ? launch->buffers[slot].bytes : 0));
    stop_fiber();
  }
  if (bytes <= 16 && offset % bytes != 0) {
    launch->error_address = reinterpret_cast<uint64_t>(caller);
    report("misaligned: %llu bytes at byte %lld of buffer %u ",
        (unsigned long long)bytes, (long long)offset, slot);
    stop_fiber();
  }
  Buffer& buffer = launch->buffers[slot];
  const bool unwritten =
      buffer.is_output && !is_write && memchr(written[slot] + offset, 0, bytes);
  if ((is_write && !buffer.is_output) || unwritten) {
    launch->error_address = reinterpret_cast<uint64_t>(caller);
    report(
        unwritten ? "uninitialised: read of output buffer %u at byte %lld"
                  : "write to input buffer %u at byte %lld",
        slot,
        (long long)offset);
    stop_fiber();
  }
  if (is_write) {
    buffer.bytes_written += bytes;
    memset(written[slot] + offset, 1, bytes);
  } else {
    read_device(buffer, slot, offset, bytes);
  }
}

inline void access(const void* address, uint64_t bytes, bool is_write, void* caller) {
  const uint64_t offset = static_cast<const unsigned char*>(address) - arena;
  if (offset >= kArenaBytes) {
    return; // the thread's own stack
  }
  const uint32_t slot = offset / kRangeBytes;
  const int64_t within = int64_t(offset % kRangeBytes) - int64_t(kRangeBytes / 2);
  if (slot == kMaxBuffers) {
    access_threadgroup(within, bytes, is_write, caller);
  } else {
    access_device(slot, within, bytes, is_write, caller);
  }
}

// --- scheduling -------------------------------------------------------------------

void make_ready(uint32_t index) {
  fibers[index].state = State::ready;
  ready[num_ready++] = index;
}

// Lets a simdgroup go on once all of its running lanes stand at one operation.
void release_simdgroup(uint32_t group) {
  Simdgroup& simd = simdgroups[group];
  if (simd.waiting == 0 || simd.waiting != simd.live) {
    return;
  }
  const uint32_t first = group * kSimdWidth;
  const uint32_t last = first + kSimdWidth < num_threads ? first + kSimdWidth : num_threads;
  simd.active = 0;
  int line = -1;
  for (uint32_t i = first; i < last; ++i) {
    if (fibers[i].state != State::at_simd) {
      continue;
    }
    if (line != -1 && fibers[i].line != line) {
      report(
          "divergent: lanes of one simdgroup wait at lines %d and %d", line, fibers[i].line);
      return;
    }
    line = fibers[i].line;
    simd.active |= 1u << (i - first);
  }
  simd.waiting = 0;
  for (uint32_t i = first; i < last; ++i) {
    if (fibers[i].state == State::at_simd) {
      make_ready(i);
    }
  }
}

void release_barrier() {
  for (uint32_t i = 0; i < num_threads; ++i) {
    if (fibers[i].line != fibers[0].line) {
      report(
          "divergent: threads of one threadgroup wait at barriers in lines %d and %d",
          fibers[0].line,
          fibers[i].line);
      return;
    }
  }
  num_at_barrier = 0;
  for (uint32_t i = 0; i < num_threads; ++i) {
    make_ready(i);
  }
}

void report_stuck() {
  uint32_t at_barrier = 0, at_simd = 0;
  int barrier_line = -1, simd_line = -1;
  for (uint32_t i = 0; i < num_threads; ++i) {
    if (fibers[i].state == State::at_barrier) {
      ++at_barrier;
      barrier_line = fibers[i].line;
    } else if (fibers[i].state == State::at_simd) {
      ++at_simd;
      simd_line = fibers[i].line;
    }
  }
  report(
      "divergent: of %u threads, %u wait at the barrier in line %d, %u at the simdgroup "
      "operation in line %d, %u have returned",
      num_threads,
      at_barrier,
      barrier_line,
      at_simd,
      simd_line,
      num_done);
}

void run_one(uint32_t index) {
  current = index;
  metal_on_cpu_switch(&scheduler_stack_pointer, fibers[index].stack_pointer);
  Fiber& fiber = fibers[index];
  if (fiber.state == State::at_simd) {
    ++simdgroups[index / kSimdWidth].waiting;
    release_simdgroup(index / kSimdWidth);
  } else if (fiber.state == State::at_barrier) {
    if (++num_at_barrier == num_threads) {
      release_barrier();
    }
  } else if (!failed) {
    ++num_done;
    --simdgroups[index / kSimdWidth].live;
    release_simdgroup(index / kSimdWidth);
  }
}

void run_threadgroup() {
  num_ready = num_done = num_at_barrier = 0;
  memset(simdgroups, 0, sizeof(simdgroups));
  for (uint32_t i = 0; i < threadgroup_used; ++i) {
    threadgroup_state[i] = threadgroup_state[i] ? 1 : 0;
  }
  for (uint32_t i = 0; i < num_threads; ++i) {
    start_fiber(i);
    make_ready(i);
    ++simdgroups[i / kSimdWidth].live;
  }
  while (num_ready > 0 && !failed) {
    const uint32_t pick = random_below(num_ready);
    const uint32_t index = ready[pick];
    ready[pick] = ready[--num_ready];
    run_one(index);
  }
  if (!failed && num_done != num_threads) {
    report_stuck();
  }
}

void place_threads(uint64_t group, const uint64_t* groups) {
  const uint64_t at[3] = {
      group % groups[0], group / groups[0] % groups[1], group / groups[0] / groups[1]};
  Ids ids = {};
  num_threads = 1;
  for (int axis = 0; axis < 3; ++axis) {
    const uint64_t left = launch->grid[axis] - at[axis] * launch->threadgroup[axis];
    ids.group[axis] = at[axis];
    ids.full_size[axis] = launch->threadgroup[axis];
    ids.size[axis] = left < launch->threadgroup[axis] ? left : launch->threadgroup[axis];
    ids.grid[axis] = launch->grid[axis];
    num_threads *= ids.size[axis];
  }
  for (uint32_t i = 0; i < num_threads; ++i) {
    ids.index = i;
    ids.position[0] = i % ids.size[0];
    ids.position[1] = i / ids.size[0] % ids.size[1];
    ids.position[2] = i / ids.size[0] / ids.size[1];
    fibers[i].ids = ids;
    fibers[i].parity = 0;
  }
}

void run_grid() {
  uint64_t groups[3];
  for (int axis = 0; axis < 3; ++axis) {
    groups[axis] =
        (launch->grid[axis] + launch->threadgroup[axis] - 1) / launch->threadgroup[axis];
  }
  const uint64_t count = groups[0] * groups[1] * groups[2];
  auto order = static_cast<uint64_t*>(malloc(count * sizeof(uint64_t)));
  for (uint64_t i = 0; i < count; ++i) {
    const uint64_t j = random_below(i + 1);
    order[i] = order[j];
    order[j] = i;
  }
  for (uint64_t i = 0; i < count && !failed; ++i) {
    threadgroup_serial = i + 1;
    place_threads(order[i], groups);
    run_threadgroup();
  }
  free(order);
}

// --- a launch ---------------------------------------------------------------------

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
  access(address, bytes, is_write, __builtin_return_address(0));
}

// The calls that -fsanitize=thread makes.
void __tsan_init() {}
#define ANSWER(n)                                                              \
  void __tsan_read##n(void* p) { access(p, n, false, __builtin_return_address(0)); } \
  void __tsan_write##n(void* p) { access(p, n, true, __builtin_return_address(0)); } \
  void __tsan_unaligned_read##n(void* p) {                                     \
    access(p, n, false, __builtin_return_address(0));                          \
  }                                                                            \
  void __tsan_unaligned_write##n(void* p) {                                    \
    access(p, n, true, __builtin_return_address(0));                           \
  }
ANSWER(1) ANSWER(2) ANSWER(4) ANSWER(8) ANSWER(16)
#undef ANSWER

void __tsan_read_range(void* p, uint64_t n) {
  access(p, n, false, __builtin_return_address(0));
}
void __tsan_write_range(void* p, uint64_t n) {
  access(p, n, true, __builtin_return_address(0));
}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
