// Row sums of softplus over the whole matrix.
#include "softplus.cuh"

size_t betaclip_softplus_workspace_bytes(int64_t rows, int64_t cols, int32_t multiprocessors) {
  using namespace betaclip;
  if (!is_count(rows) || !is_count(cols) || multiprocessors < 1) return 0;
  return SoftplusTerms<true>::kRowSums * row_parts_bytes(make_grid(rows, cols, multiprocessors), rows);
}

int betaclip_softplus_forward(const betaclip_operands *operands, const float *bias, float *softplus, void *workspace,
                              size_t workspace_bytes, void *stream) {
  using namespace betaclip;
  using Terms = SoftplusTerms<false>;
  if (const int error = operands_error(operands)) return error;
  if (const int error = vector_error({softplus})) return error;
  if (!is_aligned(bias, 4)) return BETACLIP_ERROR_ALIGNMENT;
  if (const int error = workspace_error(workspace)) return error;
  const betaclip_operands &o = *operands;
  int32_t multiprocessors = 0;
  if (const int error = device_error(&multiprocessors)) return error;
  const betaclip_chunk all = whole_matrix(o);
  const Grid grid = grid_of(all, multiprocessors);
  if (workspace_bytes < Terms::kRowSums * row_parts_bytes(grid, o.n)) return BETACLIP_ERROR_WORKSPACE;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (const int error = cudaMemsetAsync(softplus, 0, o.n * sizeof(float), cuda_stream)) return error;
  const auto run = o.dtype == BETACLIP_FLOAT16 ? add_row_sums<Terms, __half> : add_row_sums<Terms, __nv_bfloat16>;
  return run(o, all, bias, nullptr, {softplus}, grid, workspace, cuda_stream);
}
