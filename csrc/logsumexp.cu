// Two-sided log-sum-exp. Reads x and y twice from memory, once for their norms; a multiple of that from L2.
#include "arguments.h"
#include "kernel.cuh"
#include "launch.h"
#include "statistics.cuh"

namespace betaclip {
namespace {

template <class Element>
int merge(const Side &side, const float *scale, const float *reference, const float *parts, int count, float *lse,
          cudaStream_t stream) {
  const dim3 blocks(unsigned(ceil_divide(side.group.end, kWarpgroup)));
  return launch(merge_kernel<Element>, blocks, kWarpgroup, stream, side, scale, reference, parts, count, lse);
}

template <class Element>
int forward(const betaclip_operands &o, const Grid &grid, float *lse_x, float *lse_y, void *workspace,
            cudaStream_t stream) {
  const LogSumExpWorkspace places(grid, o.n, o.m);
  float *norms = places.norms(workspace), *reference = places.reference(workspace);
  const Job job = job_of(whole_matrix(o), grid, places.row_sums(workspace), places.col_sums(workspace));
  const Side x = side_of_x(o), y = side_of_y(o);
  const LogSumExpTerms::Params params = {x.group, y.group, o.scale, reference};
  if (const int error = cudaMemsetAsync(job.sums.rows, 0, places.sum_bytes(), stream)) return error;
  if (const int error = launch(largest_norms_kernel<Element>, dim3(kNormBlocks, 2), kWarpgroup, stream, x, y, norms)) {
    return error;
  }
  if (const int error = launch(reference_kernel, dim3(1), 32, stream, norms, o.scale, reference)) return error;
  if (const int error = launch_similarity<LogSumExpTerms, Element>(o, params, job, stream)) {
    return error;
  }
  const int row_parts = kConsumers * grid.ranges, col_parts = kConsumers * grid.strips;
  if (const int error = merge<Element>(x, o.scale, reference, job.sums.rows, row_parts, lse_x, stream)) return error;
  return merge<Element>(y, o.scale, reference, job.sums.cols, col_parts, lse_y, stream);
}

}  // namespace
}  // namespace betaclip

size_t betaclip_logsumexp_workspace_bytes(int64_t n, int64_t m, int32_t multiprocessors) {
  using namespace betaclip;
  if (!is_count(n) || !is_count(m) || multiprocessors < 1) return 0;
  return LogSumExpWorkspace(make_grid(n, m, multiprocessors), n, m).bytes();
}

int betaclip_logsumexp_forward(const betaclip_operands *operands, float *lse_x, float *lse_y, void *workspace,
                               size_t workspace_bytes, void *stream) {
  using namespace betaclip;
  if (const int error = operands_error(operands)) return error;
  if (const int error = vector_error({lse_x, lse_y})) return error;
  if (const int error = workspace_error(workspace)) return error;
  const betaclip_operands &o = *operands;
  int32_t multiprocessors = 0;
  if (const int error = device_error(&multiprocessors)) return error;
  const Grid grid = make_grid(o.n, o.m, multiprocessors);
  if (workspace_bytes < LogSumExpWorkspace(grid, o.n, o.m).bytes()) return BETACLIP_ERROR_WORKSPACE;
  const auto run = o.dtype == BETACLIP_FLOAT16 ? forward<__half> : forward<__nv_bfloat16>;
  return run(o, grid, lse_x, lse_y, workspace, static_cast<cudaStream_t>(stream));
}
