// 128 threads that work together; tests/emulated_warpgroup.h has the same interface on the CPU.
#pragma once

#include <cutlass/arch/barrier.h>

#include "host_device.h"

namespace betaclip {

class DeviceWarpgroup {
 public:
  // `barrier` counts from the first named barrier that CUTLASS does not keep for itself.
  __device__ explicit DeviceWarpgroup(int barrier) : barrier_(barrier) {}

  __device__ int thread() const { return threadIdx.x % kWarpgroup; }

  template <class Value>
  __device__ Value shuffle_xor(Value value, int mask) const {
    return __shfl_xor_sync(0xffffffffu, value, mask);
  }

  __device__ void sync() const { cutlass::arch::NamedBarrier::sync(kWarpgroup, barrier_); }

 private:
  int barrier_;
};

}  // namespace betaclip
