// What a thread asks of its core.
#pragma once

#include <immintrin.h>

namespace flashformer {

// For spin loops: the other hardware thread gets its turn, and less power is drawn.
inline void pause() { __builtin_ia32_pause(); }

// Round to nearest, keep denormals, mask exceptions, whatever the caller's thread is set to: its libraries must not
// decide the bits. The setting comes back at the end of the scope.
class DefaultRounding {
 public:
  DefaultRounding() : before_(_mm_getcsr()) { _mm_setcsr(0x1F80); }
  ~DefaultRounding() { _mm_setcsr(before_); }
  DefaultRounding(const DefaultRounding&) = delete;
  DefaultRounding& operator=(const DefaultRounding&) = delete;

 private:
  unsigned before_;
};

}  // namespace flashformer
