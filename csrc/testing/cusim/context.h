// Switching stacks. swapcontext would do, but makes a system call at each switch.
#pragma once
#include <algorithm>
#include <cstddef>

// Saves the callee-saved registers and the stack pointer, and continues where to_sp was saved.
extern "C" void cusim_swap(void** from_sp, void* to_sp);

#if defined(__x86_64__)
asm(R"(.text
.globl cusim_swap
.hidden cusim_swap
.type cusim_swap,@function
cusim_swap:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size cusim_swap,.-cusim_swap
)");
inline constexpr int kFrameWords = 8;  // 6 registers, the return address, and 8 bytes as the ABI wants rsp on entry
inline constexpr int kEntryWord = 6;
#elif defined(__aarch64__)
asm(R"(.text
.globl cusim_swap
.hidden cusim_swap
.type cusim_swap,@function
cusim_swap:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size cusim_swap,.-cusim_swap
)");
inline constexpr int kFrameWords = 20;
inline constexpr int kEntryWord = 11;  // x30
#else
#error "cusim: no context switch for this processor"
#endif

namespace cusim {

// The stack pointer that makes cusim_swap enter `entry` on an unused stack, 64-byte aligned.
inline void* new_context(char* stack, size_t size, void (*entry)()) {
  void** frame = reinterpret_cast<void**>(stack + size) - kFrameWords;
  std::fill_n(frame, kFrameWords, nullptr);
  frame[kEntryWord] = reinterpret_cast<void*>(entry);
  return frame;
}

}  // namespace cusim
