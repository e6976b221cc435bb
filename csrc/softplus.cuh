// The pass over a chunk that both softplus operations are.
#pragma once

#include "arguments.h"
#include "kernel.cuh"
#include "launch.h"
#include "statistics.h"
#include "workspace.h"

namespace betaclip {

// totals[row] += the sum of parts (count, rows) over parts.
static __global__ void __launch_bounds__(kWarpgroup)
    add_parts_kernel(const float *parts, int count, int64_t rows, float *totals) {
  const int64_t row = int64_t(blockIdx.x) * kWarpgroup + threadIdx.x;
  if (row < rows) totals[row] += sum_parts(parts, count, rows, row);
}

// totals[s] (n), if given, += the chunk's row sums number s.
template <class Terms, class Element>
int add_row_sums(const betaclip_operands &o, const betaclip_chunk &chunk, const float *bias, const float *weight,
                 float *const (&totals)[Terms::kRowSums], const Grid &grid, void *workspace, cudaStream_t stream) {
  const int64_t rows = chunk.row_end - chunk.row_begin;
  const size_t bytes = row_parts_bytes(grid, rows);
  float *parts = static_cast<float *>(workspace);
  const typename Terms::Params params = {x_groups(o, chunk.row_end), y_groups(o, chunk.col_end), o.scale, bias, weight};
  if (const int error = cudaMemsetAsync(parts, 0, Terms::kRowSums * bytes, stream)) return error;
  if (const int error = launch_similarity<Terms, Element>(o, params, job_of(chunk, grid, parts, nullptr), stream)) {
    return error;
  }
  for (int s = 0; s < Terms::kRowSums; ++s, parts += bytes / sizeof(float)) {
    if (totals[s] == nullptr) continue;
    const int error = launch(add_parts_kernel, dim3(unsigned(ceil_divide(rows, kWarpgroup))), kWarpgroup, stream, parts,
                             kConsumers * grid.ranges, rows, totals[s] + chunk.row_begin);
    if (error) return error;
  }
  return BETACLIP_SUCCESS;
}

}  // namespace betaclip
