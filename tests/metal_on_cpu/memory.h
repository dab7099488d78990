// Every access of a kernel: checked, then counted.
#pragma once

#include "switch.h"

namespace {

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

void access_device(
    uint32_t slot,
    int64_t offset,
    uint64_t bytes,
    bool is_write,
    bool must_align,
    void* caller) {
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
  if (must_align && offset % bytes != 0) {
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

inline void access(
    const void* address,
    uint64_t bytes,
    bool is_write,
    bool must_align,
    void* caller) {
  const uint64_t offset = static_cast<const unsigned char*>(address) - arena;
  if (offset >= kArenaBytes) {
    return; // the thread's own stack
  }
  const uint32_t slot = offset / kRangeBytes;
  const int64_t within = int64_t(offset % kRangeBytes) - int64_t(kRangeBytes / 2);
  if (slot == kMaxBuffers) {
    access_threadgroup(within, bytes, is_write, caller);
  } else {
    access_device(slot, within, bytes, is_write, must_align, caller);
  }
}

} // namespace
