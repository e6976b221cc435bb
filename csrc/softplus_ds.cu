// Chunks of the gradient of the row sums of softplus, and those sums, which need the same logits.
#include "softplus.cuh"

int betaclip_softplus_ds(const betaclip_operands *operands, const float *bias, const float *weight,
                         const betaclip_chunk *chunk, float *softplus, float *sigmoid, void *workspace,
                         size_t workspace_bytes, void *stream) {
  using namespace betaclip;
  using Terms = SoftplusTerms<true>;
  if (const int error = operands_error(operands)) return error;
  if (const int error = vector_error({weight, softplus})) return error;
  if (!is_aligned(bias, 4) || !is_aligned(sigmoid, 4)) return BETACLIP_ERROR_ALIGNMENT;
  const betaclip_operands &o = *operands;
  if (const int error = chunk_error(chunk, o)) return error;
  if (const int error = workspace_error(workspace)) return error;
  int32_t multiprocessors = 0;
  if (const int error = device_error(&multiprocessors)) return error;
  const Grid grid = grid_of(*chunk, multiprocessors);
  const size_t needed = Terms::kRowSums * row_parts_bytes(grid, chunk->row_end - chunk->row_begin);
  if (workspace_bytes < needed) return BETACLIP_ERROR_WORKSPACE;
  const auto run = o.dtype == BETACLIP_FLOAT16 ? add_row_sums<Terms, __half> : add_row_sums<Terms, __nv_bfloat16>;
  return run(o, *chunk, bias, weight, {softplus, sigmoid}, grid, workspace, static_cast<cudaStream_t>(stream));
}
