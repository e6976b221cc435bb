// Two-sided log-sum-exp. Reads x and y twice from memory, once for their norms, and again where a row was lost; a
// multiple of that from L2.
#include "arguments.h"
#include "kernel.cuh"
#include "launch.h"
#include "statistics.cuh"

namespace betaclip {
namespace {

template <class Element>
int forward(const betaclip_operands &o, const Grid &grid, float *lse_x, float *lse_y, void *workspace,
            cudaStream_t stream) {
  const LogSumExpWorkspace places(grid, o.n, o.m);
  float *norms = places.norms(workspace), *reference = places.reference(workspace);
  int32_t *any_lost = places.any_lost(workspace);
  TileBits *lost_rows = places.lost_rows(workspace), *lost_cols = places.lost_cols(workspace);
  const Job job = job_of(whole_matrix(o), grid, places.row_sums(workspace), places.col_sums(workspace),
                         {any_lost, lost_rows, lost_cols});
  const Side x = side_of_x(o), y = side_of_y(o);
  const SideStatistics of_x = {x.group, job.sums.rows, kConsumers * grid.ranges,
                               reinterpret_cast<uint32_t *>(lost_rows), lse_x};
  const SideStatistics of_y = {y.group, job.sums.cols, kConsumers * grid.strips,
                               reinterpret_cast<uint32_t *>(lost_cols), lse_y};
  const dim3 tiles(grid.row_tiles > grid.col_tiles ? grid.row_tiles : grid.col_tiles, 2);
  if (const int error = cudaMemsetAsync(job.sums.rows, 0, places.sum_bytes(), stream)) return error;
  if (const int error = launch(largest_norms_kernel<Element>, dim3(kNormBlocks, 2), kWarpgroup, stream, x, y, norms)) {
    return error;
  }
  if (const int error = launch(reference_kernel, dim3(1), 32, stream, norms, o.scale, reference, any_lost)) {
    return error;
  }
  if (const int error = launch_similarity<LogSumExpTerms, Element>(o, {x.group, y.group, o.scale, reference}, job,
                                                                   stream)) {
    return error;
  }
  if (const int error = launch(merge_first_kernel, tiles, kTile, stream, of_x, of_y, reference, any_lost)) {
    return error;
  }
  // Where nothing is lost it returns at once: the host need not know.
  if (const int error = launch_similarity<ExactLogSumExpTerms, Element>(o, {x.group, y.group, o.scale}, job, stream)) {
    return error;
  }
  return launch(merge_second_kernel, tiles, kTile, stream, of_x, of_y);
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
