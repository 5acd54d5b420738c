// What a thread asks of its core.
#pragma once

#include <immintrin.h>

namespace flashformer {

// For spin loops: the other hardware thread gets its turn, and less power is drawn.
inline void pause() { __builtin_ia32_pause(); }

// The compiler moves no load, store or prefetch past this.
inline void keep_order() { asm volatile("" ::: "memory"); }

// Floating-point control of this thread; what it was comes back at the end of the scope.
class FloatControl {
 public:
  explicit FloatControl(unsigned csr) : before_(_mm_getcsr()) { _mm_setcsr(csr); }
  ~FloatControl() { _mm_setcsr(before_); }
  FloatControl(const FloatControl&) = delete;
  FloatControl& operator=(const FloatControl&) = delete;

 private:
  unsigned before_;
};

// Round to nearest, keep denormals, mask exceptions, whatever the caller's thread is set to: its libraries must not
// decide the bits.
struct DefaultRounding : FloatControl {
  DefaultRounding() : FloatControl(0x1F80) {}
};

}  // namespace flashformer
