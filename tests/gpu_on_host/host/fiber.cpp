// The switch itself, for two processors.
#include "fiber.h"

#include <sys/mman.h>

#include <new>

#if defined(__x86_64__)
asm(R"(
.text
.globl sim_switch
.hidden sim_switch
.type sim_switch, @function
sim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size sim_switch, .-sim_switch
)");
#elif defined(__aarch64__)
asm(R"(
.text
.globl sim_switch
.hidden sim_switch
.type sim_switch, %function
sim_switch:
  sub sp, sp, #160
  stp x19, x20, [sp]
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
  ldp x19, x20, [sp]
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
.size sim_switch, .-sim_switch
)");
#else
#error "the simulator switches stacks on x86-64 and aarch64 only: add sim_switch for this processor"
#endif

namespace sim {
namespace {

constexpr size_t kGuard = 64 << 10;  // a page of any size that is in use
constexpr size_t kStride = kStackBytes + kGuard;
constexpr size_t kColours = 61;  // stacks begin at different offsets, or all tops would share a few cache sets

}  // namespace

Stacks::Stacks(size_t n) : n_(n) {
  void* memory = mmap(nullptr, n * kStride, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  memory_ = static_cast<uint8_t*>(memory);
  for (size_t i = 0; i < n; ++i)
    if (mprotect(memory_ + i * kStride + kGuard, kStackBytes, PROT_READ | PROT_WRITE)) throw std::bad_alloc();
}

Stacks::~Stacks() { munmap(memory_, n_ * kStride); }

void* Stacks::fresh(size_t i) const {
  void** top = reinterpret_cast<void**>(memory_ + (i + 1) * kStride - 64 - 64 * (i % kColours));
#if defined(__x86_64__)
  *--top = nullptr;  // the address sim_fiber_main would return to; leaves the stack aligned as after a call
  *--top = reinterpret_cast<void*>(&sim_fiber_main);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
#else
  top -= 20;
  for (int saved = 0; saved < 20; ++saved) top[saved] = nullptr;
  top[11] = reinterpret_cast<void*>(&sim_fiber_main);  // x30
#endif
  return top;
}

}  // namespace sim
