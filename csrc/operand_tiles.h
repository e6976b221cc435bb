// The operands' tiles: their layouts in shared memory and in the matrix unit's registers, and the tensor maps by which
// the TMA finds them. All of it compiles for the CPU alone, where tests/accumulator_map.cpp asks CuTe about it.
#pragma once

#include <cuda_runtime.h>

#include <cute/tensor.hpp>

#include <cstring>

#include "betaclip.h"
#include "tiles.h"

namespace betaclip {

constexpr int kStages = 6;

template <class Element>
struct OperandTiles {
  using Mma = cute::conditional_t<std::is_same_v<Element, __half>, cutlass::half_t, cutlass::bfloat16_t>;
  using Tile = cute::Int<kTile>;
  using Depth = cute::Int<kDepth>;
  using SmemLayout = decltype(cute::tile_to_shape(cute::GMMA::Layout_K_SW128_Atom<Mma>{},
                                                  cute::Shape<Tile, Depth, cute::Int<kStages>>{}));
  using TiledMma = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Mma, Mma, float, cute::Shape<Tile, Tile, Depth>>()));
  static constexpr uint32_t kStageBytes = 2 * kTile * kDepth * sizeof(Mma);

  // How tiles reach shared memory: those of y by shares, each block of a cluster to all of it.
  using Multicast = cute::conditional_t<kCluster == 1, cute::SM90_TMA_LOAD, cute::SM90_TMA_LOAD_MULTICAST>;
  template <class Copy, class Receivers>
  static auto tensor_map(Copy copy, Receivers receivers, const void *rows, int64_t count, int64_t depth,
                         int64_t stride) {
    const auto layout = cute::make_layout(cute::make_shape(int32_t(count), int32_t(depth)),
                                          cute::make_stride(stride, cute::_1{}));
    return cute::make_tma_copy(copy, cute::make_tensor(cute::make_gmem_ptr(static_cast<const Mma *>(rows)), layout),
                               SmemLayout{}(cute::_, cute::_, cute::_0{}), cute::Shape<Tile, Depth>{}, receivers);
  }
  static auto x_map(const void *rows, int64_t count, int64_t depth, int64_t stride) {
    return tensor_map(cute::SM90_TMA_LOAD{}, cute::_1{}, rows, count, depth, stride);
  }
  static auto y_map(const void *rows, int64_t count, int64_t depth, int64_t stride) {
    return tensor_map(Multicast{}, cute::Int<kCluster>{}, rows, count, depth, stride);
  }
  using XMap = decltype(x_map(nullptr, 0, 0, 0));
  using YMap = decltype(y_map(nullptr, 0, 0, 0));

  struct Arguments {
    XMap x;
    YMap y;
    int32_t n, m, d;

    static Arguments make(const betaclip_operands &o) {
      return {x_map(o.x, o.n, o.d, o.x_stride), y_map(o.y, o.m, o.d, o.y_stride), int32_t(o.n), int32_t(o.m),
              int32_t(o.d)};
    }
    // CuTe reports a descriptor that CUDA would not encode on stderr alone, and leaves it all zeros.
    bool is_encoded() const {
      const cute::TmaDescriptor empty = {};
      return std::memcmp(x.get_tma_descriptor(), &empty, sizeof empty) != 0 &&
             std::memcmp(y.get_tma_descriptor(), &empty, sizeof empty) != 0;
    }
    CUTE_HOST_DEVICE int steps() const { return (d + kDepth - 1) / kDepth; }
  };

  // Coordinates of what block `rank` of a cluster loads of the tile whose rows start at `first`: (copy, 1, 1, steps).
  template <class Map>
  static CUTE_HOST_DEVICE auto share_of_tile(const Map &map, int rank, int32_t count, int32_t depth, int32_t first) {
    using namespace cute;
    return map.get_slice(rank).partition_S(local_tile(
        domain_offset(make_coord(first, 0), map.get_tma_tensor(make_shape(count, depth))), Shape<Tile, Depth>{},
        make_coord(0, _)));
  }
};

}  // namespace betaclip
