// Fibers: a stack of its own for each thread of a threadgroup.
#pragma once

#include "state.h"

namespace {

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

// After an error has been reported.
void stop_fiber() {
  for (;;) {
    to_scheduler(); // never resumed: the scheduler leaves on `failed`
  }
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

} // namespace
