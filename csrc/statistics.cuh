// The small kernels around the two passes of the log-sum-exp: the reference from the largest norms, and merging.
#pragma once

#include <cuda_runtime.h>

#include "statistics.h"
#include "warpgroup.cuh"
#include "workspace.h"

namespace betaclip {

// maxima (2, kNormBlocks), x first: the largest norm of each block's rows, one row per warp and turn.
template <class Element>
__global__ void __launch_bounds__(kWarpgroup) largest_norms_kernel(Side x, Side y, float *maxima) {
  constexpr int kWarps = kWarpgroup / 32;
  const Side side = blockIdx.y == 0 ? x : y;
  DeviceWarpgroup warpgroup(0);
  const int warp = threadIdx.x / 32;
  float largest = 0.0f;
  for (int64_t row = int64_t(blockIdx.x) * kWarps + warp; row < side.group.end; row += int64_t(gridDim.x) * kWarps) {
    if (side.group(row) < 0) continue;
    const Element *values = static_cast<const Element *>(side.rows) + row * side.stride;
    largest = larger_norm(largest, sqrtf(warp_product(values, values, side.depth, warpgroup)));
  }
  __shared__ float warp_largest[kWarps];
  if (threadIdx.x % 32 == 0) warp_largest[warp] = largest;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (const float other : warp_largest) largest = fmaxf(largest, other);
  maxima[blockIdx.y * gridDim.x + blockIdx.x] = largest;
}

// One warp for both sides. Nothing is lost yet.
static __global__ void __launch_bounds__(32)
    reference_kernel(const float *maxima, const float *scale, float *reference, int32_t *any_lost) {
  float largest[2] = {0.0f, 0.0f};
  for (int i = threadIdx.x; i < 2 * kNormBlocks; i += 32) {
    float &side = largest[i / kNormBlocks];
    side = fmaxf(side, maxima[i]);
  }
  for (int mask = 16; mask > 0; mask /= 2) {
    for (float &side : largest) side = fmaxf(side, __shfl_xor_sync(0xffffffffu, side, mask));
  }
  if (threadIdx.x > 0) return;
  *reference = reference_for(*scale, largest[0], largest[1]);
  *any_lost = 0;
}

// Both sides' statistics from the first pass, and which rows are lost: none, unless every logit of a row lies some 130
// nats below what norms allow, or a sum overflowed, or a row has no pair at all. A block has the rows of a tile.
static __global__ void __launch_bounds__(kTile)
    merge_first_kernel(SideStatistics x, SideStatistics y, const float *reference, int32_t *any_lost) {
  const SideStatistics side = blockIdx.y == 0 ? x : y;
  const int64_t first = int64_t(blockIdx.x) * kTile;
  if (first >= side.group.end) return;
  const int64_t row = first + threadIdx.x;
  const uint32_t lost = __ballot_sync(0xffffffffu, side.merge_first(row, *reference));
  if (threadIdx.x % 32 > 0) return;
  side.lost[row / 32] = lost;
  if (lost != 0) *any_lost = 1;  // all that write it write the same
}

// And those of lost rows from the second.
static __global__ void __launch_bounds__(kTile) merge_second_kernel(SideStatistics x, SideStatistics y) {
  const SideStatistics side = blockIdx.y == 0 ? x : y;
  side.merge_second(int64_t(blockIdx.x) * kTile + threadIdx.x);
}

}  // namespace betaclip
