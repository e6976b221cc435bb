// What only CuTe knows, asked on the CPU: which element of a tile each accumulator register holds, and which rows and
// columns of the operands the producer's copies name.
#include <cstdio>

#include "../accumulator.h"
#include "../operand_tiles.h"

using namespace cute;

template <class Element>
int check_accumulators() {
  using Tiles = betaclip::OperandTiles<Element>;
  const auto tile = make_identity_tensor(Shape<Int<betaclip::kTile>, Int<betaclip::kTile>>{});
  int wrong = 0, seen = 0;
  for (int thread = 0; thread < betaclip::kWarpgroup; ++thread) {
    const auto mine = typename Tiles::TiledMma{}.get_slice(thread).partition_C(tile);
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

// TMA's first coordinate is the contiguous one. The shares of a cluster's blocks make up the tile.
template <class Tiles, class Map>
int check_coordinates(const char *name, const Map &map, int blocks) {
  const int32_t count = 1 << 30, depth = 136, share = betaclip::kTile / blocks;
  int wrong = 0;
  for (int rank = 0; rank < blocks; ++rank) {
    for (const int32_t first : {0, 5, count - 1}) {
      const auto tile = Tiles::share_of_tile(map, rank, count, depth, first);
      if (size<3>(tile) != (depth + betaclip::kDepth - 1) / betaclip::kDepth) ++wrong;
      if (size<1>(tile) != 1 || size<2>(tile) != 1) ++wrong;  // copies, for one step
      for (int step = 0; step < size<3>(tile); ++step) {
        for (int element = 0; element < share * betaclip::kDepth; ++element) {
          const auto at = tile(element, 0, 0, step);
          wrong += get<0>(at) != step * betaclip::kDepth + element % betaclip::kDepth;
          wrong += get<1>(at) != first + rank * share + element / betaclip::kDepth;
        }
      }
    }
  }
  std::printf("coordinates of %s: %d wrong\n", name, wrong);
  return wrong;
}

template <class Element>
int check() {
  using Tiles = betaclip::OperandTiles<Element>;
  return check_accumulators<Element>() + check_coordinates<Tiles>("x", typename Tiles::XMap{}, 1) +
         check_coordinates<Tiles>("y", typename Tiles::YMap{}, betaclip::kCluster);
}

int main() { return check<__nv_bfloat16>() + check<__half>() == 0 ? 0 : 1; }
