// What the kernels use of the C library. WebAssembly comes without one, but its compiler has these built in.
#pragma once

#include <stdint.h>
#if defined(__wasm__)
#define memcpy __builtin_memcpy
#define fmaf __builtin_fmaf
#define sqrt __builtin_sqrt
#define HUGE_VALF __builtin_huge_valf()
#else
#include <math.h>
#include <string.h>
#endif
