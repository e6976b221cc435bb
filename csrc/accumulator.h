// Which element of a 128 x 128 tile of products a thread of a warpgroup holds in which register: two m64n128k16
// accumulators, one below the other. tests/accumulator_map.cpp compares this with CuTe's own layout.
//
// A thread has 4 rows ("slots") and 32 columns ("lines"); register i is
//   line & 1 | (slot & 1) << 1 | (line >> 1) << 2 | (slot >> 1) << 6.
#pragma once

#include "host_device.h"

namespace betaclip {

constexpr int kSlots = 4;
constexpr int kLines = 32;

BETACLIP_HD constexpr int accumulator_register(int slot, int line) {
  return (line & 1) | (slot & 1) << 1 | (line >> 1) << 2 | (slot >> 1) << 6;
}

// Row within the tile. Warps have 16 rows of each accumulator, groups of four lanes one row.
BETACLIP_HD constexpr int accumulator_row(int thread, int slot) {
  return (slot >> 1) * 64 + (thread / 32) * 16 + (slot & 1) * 8 + (thread % 32) / 4;
}

// Column within the tile: pairs of neighbours, eight columns apart.
BETACLIP_HD constexpr int accumulator_col(int thread, int line) {
  return (line >> 1) * 8 + (thread % 4) * 2 + (line & 1);
}

}  // namespace betaclip
