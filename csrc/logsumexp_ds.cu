// Chunks of the gradient of the two-sided log-sum-exp.
#include "arguments.h"
#include "kernel.cuh"
#include "launch.h"

int betaclip_logsumexp_ds(const betaclip_operands *operands, const betaclip_logsumexp_gradient *gradient,
                          const betaclip_chunk *chunk, void *stream) {
  using namespace betaclip;
  if (const int error = operands_error(operands)) return error;
  if (gradient == nullptr) return BETACLIP_ERROR_NULL;
  const betaclip_logsumexp_gradient &g = *gradient;
  if (const int error = vector_error({g.stat_x, g.stat_y, g.weight_x, g.weight_y, g.factor_x, g.factor_y, g.narrow})) {
    return error;
  }
  const betaclip_operands &o = *operands;
  if (const int error = chunk_error(chunk, o)) return error;
  int32_t multiprocessors = 0;
  if (const int error = device_error(&multiprocessors)) return error;
  const LogSumExpGradientTerms::Params params = {
      x_groups(o, chunk->row_end), y_groups(o, chunk->col_end), o.scale,
      g.stat_x, g.stat_y, g.weight_x, g.weight_y, g.factor_x, g.factor_y, g.narrow};
  const auto run = o.dtype == BETACLIP_FLOAT16 ? launch_similarity<LogSumExpGradientTerms, __half>
                                               : launch_similarity<LogSumExpGradientTerms, __nv_bfloat16>;
  const Job job = job_of(*chunk, grid_of(*chunk, multiprocessors), nullptr, nullptr);
  return run(o, params, job, static_cast<cudaStream_t>(stream));
}
