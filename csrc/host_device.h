// What code shared by the kernels and their emulation on the CPU needs: the marker of functions that run on both, and
// elementary functions that are single instructions on the device.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define BETACLIP_HD __host__ __device__ __forceinline__
#define BETACLIP_UNROLL _Pragma("unroll")
#define BETACLIP_NO_UNROLL _Pragma("unroll 1")
#else
#define BETACLIP_HD inline
#define BETACLIP_UNROLL
#define BETACLIP_NO_UNROLL
#endif

namespace betaclip {

constexpr int kWarpgroup = 128;  // threads
constexpr int kTile = 128;       // rows and columns of a tile of products; one thread of a warpgroup for each
constexpr int kDepth = 64;       // columns of x and y per stage: 128 bytes, the widest swizzle of TMA

constexpr float kInfinity = __builtin_huge_valf();

// exp(x) as 2^(x log2 e): one multiplication and one instruction of the special function unit.
BETACLIP_HD float fast_exp(float x) {
#if defined(__CUDA_ARCH__)
  return __expf(x);
#else
  return std::exp(x);
#endif
}

BETACLIP_HD float fast_divide(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdividef(a, b);
#else
  return a / b;
#endif
}

// a b rounded to float32, also where something is added to it: never part of a fused multiply-add.
BETACLIP_HD float rounded_product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

BETACLIP_HD int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace betaclip
