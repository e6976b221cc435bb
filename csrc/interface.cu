// What the library says about itself.
#include <cuda_runtime.h>

#include "betaclip.h"

int betaclip_version(void) { return BETACLIP_VERSION; }

const char *betaclip_architectures(void) { return "sm_90a"; }

const char *betaclip_error_string(int error) {
  switch (error) {
    case BETACLIP_SUCCESS: return "success";
    case BETACLIP_ERROR_NULL: return "a pointer that must be given is NULL";
    case BETACLIP_ERROR_DTYPE: return "dtype is neither BETACLIP_BFLOAT16 nor BETACLIP_FLOAT16";
    case BETACLIP_ERROR_SIZE: return "n or m is below 1 or above BETACLIP_MAX_ROWS";
    case BETACLIP_ERROR_DEPTH: return "d is not a multiple of 8 from 8 to 1024";
    case BETACLIP_ERROR_STRIDE: return "a row stride is shorter than a row, no multiple of 8 elements, or too large";
    case BETACLIP_ERROR_ALIGNMENT: return "x, y, ds or workspace is not aligned to 16 bytes, or another pointer to 4";
    case BETACLIP_ERROR_GROUPS: return "only one of x_group and y_group, or of x_text and y_text, is given";
    case BETACLIP_ERROR_CHUNK: return "the chunk is empty or reaches beyond the matrix";
    case BETACLIP_ERROR_WORKSPACE: return "the workspace is smaller than its size function says for this device";
    case BETACLIP_ERROR_ARCHITECTURE: return "the current device does not have compute capability 9.0";
    default: break;
  }
  return error > 0 ? cudaGetErrorString(static_cast<cudaError_t>(error)) : "unknown error";
}
