// Which thread runs next, and what may go on when.
#pragma once

#include "switch.h"

namespace {

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

} // namespace
