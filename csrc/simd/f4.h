// Four floats, for what is done within a vector of 16 (vector extensions of GCC and Clang).
#pragma once

#include <array>

namespace flashformer {

using F4 = float __attribute__((vector_size(16)));
using Quarters = std::array<F4, 4>;  // lanes 0 to 3, 4 to 7, 8 to 11, 12 to 15

}  // namespace flashformer
