// Reaching the device: what it is, and queueing a kernel.
#pragma once

#include <cuda_runtime.h>

#include "betaclip.h"

namespace betaclip {

// The current device's multiprocessors; CUDA's error or BETACLIP_ERROR_ARCHITECTURE if it cannot run these kernels.
inline int device_error(int32_t *multiprocessors) {
  int device = 0, major = 0, minor = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device)) return error;
  if (major != 9 || minor != 0) return BETACLIP_ERROR_ARCHITECTURE;
  return cudaDeviceGetAttribute(multiprocessors, cudaDevAttrMultiProcessorCount, device);
}

// Queues a kernel; the error is its own, not one that another library left behind.
template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, int threads, cudaStream_t stream, Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace betaclip
