// What only CuTe knows, asked on the CPU: which element of a tile each accumulator register holds, and which rows and
// columns of the operands the producer's copies name.
#include <cstdio>

#include "../accumulator.h"
#include "../kernel.cuh"

using namespace cute;

template <class Element>
int check_accumulators() {
  using Loop = betaclip::Mainloop<Element>;
  const auto tile = make_identity_tensor(Shape<Int<betaclip::kTile>, Int<betaclip::kTile>>{});
  int wrong = 0, seen = 0;
  for (int thread = 0; thread < betaclip::kWarpgroup; ++thread) {
    const auto mine = typename Loop::TiledMma{}.get_slice(thread).partition_C(tile);
    for (int slot = 0; slot < betaclip::kSlots; ++slot) {
      for (int line = 0; line < betaclip::kLines; ++line, ++seen) {
        const auto expected = mine(betaclip::accumulator_register(slot, line));
        wrong += get<0>(expected) != betaclip::accumulator_row(thread, slot);
        wrong += get<1>(expected) != betaclip::accumulator_col(thread, line);
      }
    }
    if (size(mine) != betaclip::kSlots * betaclip::kLines) ++wrong;
  }
  std::printf("accumulators: %d of %d elements, %d wrong\n", seen, betaclip::kTile * betaclip::kTile, wrong);
  return wrong + (seen != betaclip::kTile * betaclip::kTile);
}

// TMA's first coordinate is the contiguous one.
template <class Element>
int check_coordinates() {
  using Loop = betaclip::Mainloop<Element>;
  const int32_t count = 2147483392, depth = 136;
  const typename Loop::TensorMap map{};
  int wrong = 0;
  for (const int32_t first : {0, 5, 2147483264}) {
    const auto tile = Loop::tile_coordinates(map, count, depth, first);
    if (size<2>(tile) != (depth + betaclip::kDepth - 1) / betaclip::kDepth) ++wrong;
    for (int row : {0, 1, 127}) {
      for (int k : {0, 1, 63}) {
        for (int step = 0; step < size<2>(tile); ++step) {
          const auto at = tile(row, k, step);
          wrong += get<0>(at) != step * betaclip::kDepth + k || get<1>(at) != first + row;
        }
      }
    }
  }
  std::printf("coordinates: %d wrong\n", wrong);
  return wrong;
}

template <class Element>
int check() {
  return check_accumulators<Element>() + check_coordinates<Element>();
}

int main() { return check<__nv_bfloat16>() + check<__half>() == 0 ? 0 : 1; }
