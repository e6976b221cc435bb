// One persistent kernel for all four operations: a warpgroup that loads tiles of x and y through TMA, and two that take
// turns at multiplying them (wgmma) and at turning products into terms, so that one's exponentials overlap the other's
// products. README.md describes barriers and shared memory.
#pragma once

#include <cuda_runtime.h>

#include <cute/tensor.hpp>
#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/cluster_launch.hpp>
#include <cutlass/pipeline/sm90_pipeline.hpp>

#include "betaclip.h"
#include "consumer.h"
#include "operand_tiles.h"
#include "ring.h"
#include "warpgroup.cuh"

namespace betaclip {

constexpr int kBlockThreads = (1 + kConsumers) * kWarpgroup;
constexpr int kProducerRegisters = 24;
constexpr int kConsumerRegisters = 240;
static_assert((kProducerRegisters + kConsumers * kConsumerRegisters) * kWarpgroup <= 65536, "one block's registers");

template <class Element>
struct Mainloop : OperandTiles<Element> {
  using Tiles = OperandTiles<Element>;
  using typename Tiles::Arguments;
  using typename Tiles::Depth;
  using typename Tiles::Mma;
  using typename Tiles::SmemLayout;
  using typename Tiles::Tile;
  using typename Tiles::TiledMma;
  using Tiles::share_of_tile;
  using Pipeline = cutlass::PipelineTmaAsync<kStages>;
  using PipelineState = cutlass::PipelineState<kStages>;
  using Turns = cutlass::OrderedSequenceBarrier<1, kConsumers>;

  struct Storage {
    alignas(1024) cute::array_aligned<Mma, cute::cosize_v<SmemLayout>, 1024> x, y;
    typename Pipeline::SharedStorage pipeline;
    typename Turns::SharedStorage turns;
  };

  // One thread: every tile of the block, in the order of the walk. Rows, columns and depth beyond the operands arrive
  // as zeros, and count as bytes arrived. A stage of this block fills from the whole cluster, and is free when all of
  // the cluster, to which this block writes, have released theirs.
  template <class Terms>
  static CUTLASS_DEVICE void load(const Arguments &args, const Job &job, int program, Pipeline &pipeline,
                                  Storage &storage) {
    using namespace cute;
    const int rank = program % kCluster;
    const uint16_t everyone = (1 << kCluster) - 1;
    const auto to_x = args.x.get_slice(0).partition_D(make_tensor(make_smem_ptr(storage.x.data()), SmemLayout{}));
    const auto to_y = args.y.get_slice(rank).partition_D(make_tensor(make_smem_ptr(storage.y.data()), SmemLayout{}));
    const auto load_tile = [&](const auto &walk) {
      const int32_t row = int32_t(job.row_begin) + walk.row() * kTile;
      const int32_t col = int32_t(job.col_begin) + walk.col() * kTile;
      const auto from_x = share_of_tile(args.x, 0, args.n, args.d, row);
      const auto from_y = share_of_tile(args.y, rank, args.m, args.d, col);
      return [&, from_x, from_y](int step, const PipelineState &state) {
        auto *barrier = pipeline.producer_get_barrier(state);
        copy(args.x.with(*barrier), from_x(_, _, _, step), to_x(_, _, _, state.index()));
        copy(args.y.with(*barrier, everyone), from_y(_, _, _, step), to_y(_, _, _, state.index()));
      };
    };
    fill_stages(walk_of<Terms>(job, place_of(job.grid, program)), args.steps(), pipeline,
                cutlass::make_producer_start_state<Pipeline>(), load_tile);
  }

  // One consumer's products.
  class Products {
   public:
    CUTLASS_DEVICE Products(int steps, int which, Pipeline &pipeline, Turns &turns, Storage &storage)
        : reader_(PipelineState(), steps, which, pipeline, turns), storage_(storage) {}

    CUTLASS_DEVICE auto accumulators() const {
      return cute::partition_fragment_C(TiledMma{}, cute::Shape<Tile, Tile>{});
    }

    template <class Accumulators>
    CUTLASS_DEVICE void operator()(Accumulators &accumulators) {
      using namespace cute;
      TiledMma mma;
      const auto thread = mma.get_slice(threadIdx.x % kWarpgroup);
      Tensor smem_x = make_tensor(make_smem_ptr(storage_.x.data()), SmemLayout{});
      Tensor smem_y = make_tensor(make_smem_ptr(storage_.y.data()), SmemLayout{});
      Tensor x = thread.make_fragment_A(thread.partition_A(smem_x));
      Tensor y = thread.make_fragment_B(thread.partition_B(smem_y));
      mma.accumulate_ = GMMA::ScaleOut::Zero;
      const auto issue = [&](int stage) {
        warpgroup_arrive();
        CUTLASS_PRAGMA_UNROLL
        for (int k = 0; k < size<2>(x); ++k) {
          gemm(mma, x(_, _, k, stage), y(_, _, k, stage), accumulators);
          mma.accumulate_ = GMMA::ScaleOut::One;
        }
        warpgroup_commit_batch();
      };
      warpgroup_fence_operand(accumulators);
      reader_.read_tile(issue, [] { warpgroup_wait<1>(); }, [] { warpgroup_wait<0>(); });
      warpgroup_fence_operand(accumulators);
    }

   private:
    StageReader<Pipeline, PipelineState, Turns> reader_;
    Storage &storage_;
  };
};

template <class Terms, class Element>
struct SharedStorage {
  typename Mainloop<Element>::Storage mainloop;
  ConsumerStorage<Terms> consumers[kConsumers];
};

template <class Terms, class Element>
__global__ void __cluster_dims__(kCluster, 1, 1) __launch_bounds__(kBlockThreads, 1)
    similarity_kernel(const __grid_constant__ typename Mainloop<Element>::Arguments args,
                      const __grid_constant__ typename Terms::Params params, const __grid_constant__ Job job) {
  using Loop = Mainloop<Element>;
  using Pipeline = typename Loop::Pipeline;
  extern __shared__ __align__(1024) char shared[];
  auto &storage = *reinterpret_cast<SharedStorage<Terms, Element> *>(shared);
  const int warpgroup = cutlass::canonical_warp_group_idx();
  const bool produces = warpgroup == 0;
  const bool leads = threadIdx.x == 0;

  typename Pipeline::Params pipeline_params;
  pipeline_params.transaction_bytes = Loop::kStageBytes;
  pipeline_params.role = produces ? Pipeline::ThreadCategory::Producer : Pipeline::ThreadCategory::Consumer;
  pipeline_params.is_leader = leads;
  pipeline_params.num_consumers = kWarpgroup;  // a stage belongs to one of the two
  Pipeline pipeline(storage.mainloop.pipeline, pipeline_params, cute::Shape<cute::Int<kCluster>, cute::_1, cute::_1>{});
  typename Loop::Turns turns(storage.mainloop.turns, {uint32_t(warpgroup - 1), kWarpgroup});
  // Barriers are initialised, and whatever else in the cluster may arrive at them may do so.
  cutlass::pipeline_init_arrive_relaxed(kCluster);
  cutlass::pipeline_init_wait(kCluster);

  if (produces) {
    cutlass::arch::warpgroup_reg_dealloc<kProducerRegisters>();
    if (leads) Loop::template load<Terms>(args, job, blockIdx.x, pipeline, storage.mainloop);
  } else {
    cutlass::arch::warpgroup_reg_alloc<kConsumerRegisters>();
    const int which = warpgroup - 1;
    const Terms terms(params);
    DeviceWarpgroup threads(which);
    typename Loop::Products products(args.steps(), which, pipeline, turns, storage.mainloop);
    Consumer<Terms, Element, DeviceWarpgroup>(terms, job, blockIdx.x, which, threads, storage.consumers[which])
        .run(products);
  }
}

// Queues the kernel; returns 0 or CUDA's error.
template <class Terms, class Element>
int launch_similarity(const betaclip_operands &operands, const typename Terms::Params &params, const Job &job,
                      cudaStream_t stream) {
  constexpr int kBytes = sizeof(SharedStorage<Terms, Element>);
  static_assert(kBytes <= 232448, "shared memory of a block of compute capability 9.0");
  const auto kernel = similarity_kernel<Terms, Element>;
  if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes)) {
    return error;
  }
  const auto args = Mainloop<Element>::Arguments::make(operands);
  if (!args.is_encoded()) return cudaErrorInvalidValue;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(job.grid.programs());
  config.blockDim = dim3(kBlockThreads);
  config.dynamicSmemBytes = kBytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, args, params, job);
}

}  // namespace betaclip
