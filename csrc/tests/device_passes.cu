// Both passes of the log-sum-exp and that of softplus as nvcc compiles them for the device, but for the products, which
// are given: the PTX runs on the CPU (tests/csrc/test_device_code.py).
#include "../consumer.h"
#include "../statistics.cuh"
#include "../warpgroup.cuh"

namespace betaclip {

// Products from memory, (rows, cols) of whole tiles as the cluster walks them, in a thread's accumulators.
template <class Terms>
class GivenProducts {
 public:
  struct Accumulators {
    float registers[kSlots * kLines];
    __device__ float operator()(int i) const { return registers[i]; }
  };

  __device__ GivenProducts(const float *products, const Job &job, int program, int which)
      : products_(products), cols_(job.grid.col_tiles * kTile),
        walk_(walk_of<Terms>(job, place_of(job.grid, program))) {
    walk_.skip(which);
  }
  __device__ Accumulators accumulators() const { return {}; }
  __device__ void operator()(Accumulators &accumulators) {
    BETACLIP_UNROLL
    for (int slot = 0; slot < kSlots; ++slot) {
      const int row = walk_.row() * kTile + accumulator_row(threadIdx.x, slot);
      const float *products = products_ + row * cols_ + walk_.col() * kTile;
      BETACLIP_UNROLL
      for (int line = 0; line < kLines; ++line) {
        accumulators.registers[accumulator_register(slot, line)] = products[accumulator_col(threadIdx.x, line)];
      }
    }
    walk_.skip(kConsumers);
  }

 private:
  const float *products_;
  int cols_;
  TileWalk<typename Terms::Tiles> walk_;
};

template <class Terms>
__device__ void consume(const typename Terms::Params &params, const Job &job, const float *products, int program,
                        int which) {
  extern __shared__ char shared[];
  const Terms terms(params);
  DeviceWarpgroup threads(0);
  GivenProducts<Terms> given(products, job, program, which);
  Consumer<Terms, __half, DeviceWarpgroup>(terms, job, program, which, threads,
                                           *reinterpret_cast<ConsumerStorage<Terms> *>(shared))
      .run(given);
}

}  // namespace betaclip

extern "C" {

using namespace betaclip;

__global__ void __launch_bounds__(kWarpgroup)
    first_pass(const __grid_constant__ LogSumExpTerms::Params params, const __grid_constant__ Job job,
               const float *products, int program, int which) {
  consume<LogSumExpTerms>(params, job, products, program, which);
}

__global__ void __launch_bounds__(kWarpgroup)
    second_pass(const __grid_constant__ ExactLogSumExpTerms::Params params, const __grid_constant__ Job job,
                const float *products, int program, int which) {
  consume<ExactLogSumExpTerms>(params, job, products, program, which);
}

__global__ void __launch_bounds__(kWarpgroup)
    softplus_pass(const __grid_constant__ SoftplusTerms<false>::Params params, const __grid_constant__ Job job,
                  const float *products, int program, int which) {
  consume<SoftplusTerms<false>>(params, job, products, program, which);
}

// Static kernels are compiled only where something refers to them.
void merges(const void *(&kernels)[2]) {
  kernels[0] = reinterpret_cast<const void *>(merge_first_kernel);
  kernels[1] = reinterpret_cast<const void *>(merge_second_kernel);
}
}
