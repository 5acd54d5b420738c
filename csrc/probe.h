// How fast these threads can read this memory: the measure that every speed is compared with.
#pragma once

#include <cstdint>

#include "simd/isa.h"

namespace flashformer {

// GB/s (1e9 bytes) of n_threads reading equal shares of the range over and over for at least `min_seconds`.
double read_bandwidth(const char* begin, int64_t n_bytes, int n_threads, const Reading& how, double min_seconds,
                      SumOf sum);

}  // namespace flashformer
