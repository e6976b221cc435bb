// The small kernels before and after the log-sum-exp: the reference from the largest norms, and the merge.
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

// One warp for both sides.
static __global__ void __launch_bounds__(32)
    reference_kernel(const float *maxima, const float *scale, float *reference) {
  float largest[2] = {0.0f, 0.0f};
  for (int i = threadIdx.x; i < 2 * kNormBlocks; i += 32) {
    float &side = largest[i / kNormBlocks];
    side = fmaxf(side, maxima[i]);
  }
  for (int mask = 16; mask > 0; mask /= 2) {
    for (float &side : largest) side = fmaxf(side, __shfl_xor_sync(0xffffffffu, side, mask));
  }
  if (threadIdx.x == 0) *reference = reference_for(*scale, largest[0], largest[1]);
}

// lse (rows) from parts (count, rows); then the block's lost rows once more, one after the other. A row without any pair
// is one of them, and looks at all groups; else there are none unless every logit of a row lies some 130 nats below what
// norms allow, or a sum overflowed. So most blocks leave at once.
template <class Element>
__global__ void __launch_bounds__(kWarpgroup)
    merge_kernel(Side side, const float *scale, const float *reference, const float *parts, int count, float *lse) {
  const int64_t first = int64_t(blockIdx.x) * kWarpgroup, row = first + threadIdx.x;
  const int64_t rows = side.group.end;
  bool lost = false;
  if (row < rows) {
    const float sum = sum_parts(parts, count, rows, row);
    lost = is_lost(sum, side.group(row));
    lse[row] = logf(sum) + *reference;
  }
  __shared__ bool is_row_lost[kWarpgroup];
  __shared__ RunningLogSumExp shared_parts[kWarpgroup / 32];
  is_row_lost[threadIdx.x] = lost;
  if (!__syncthreads_or(lost)) return;
  DeviceWarpgroup warpgroup(0);
  for (int i = 0; i < kWarpgroup; ++i) {
    if (!is_row_lost[i]) continue;
    const float exact = exact_logsumexp<Element>(side, first + i, *scale, warpgroup, shared_parts);
    if (threadIdx.x == 0) lse[first + i] = exact;
  }
}

}  // namespace betaclip
