// Where in a workspace everything lies: one place for sizes and addresses.
#pragma once

#include "consumer.h"

namespace betaclip {

// Blocks per side that look for the largest norm; each leaves one partial maximum. Warps read one row at a time, so it
// takes many to keep memory busy.
constexpr int kNormBlocks = 512;

// In words of 4 bytes: reference, LostRows::any, 2 unused; largest norms (2, kNormBlocks); LostRows::rows and cols, 4
// for each tile; then the partial sums of consumer.h, which are what needs zeroes.
class LogSumExpWorkspace {
 public:
  LogSumExpWorkspace(const Grid &grid, int64_t n, int64_t m)
      : row_tiles_(grid.row_tiles), col_tiles_(grid.col_tiles), row_count_(size_t(kConsumers) * grid.ranges * n),
        col_count_(size_t(kConsumers) * grid.strips * m) {}

  size_t sum_bytes() const { return (row_count_ + col_count_) * sizeof(float); }
  size_t bytes() const { return kHead * sizeof(float) + (row_tiles_ + col_tiles_) * sizeof(TileBits) + sum_bytes(); }

  float *reference(void *workspace) const { return static_cast<float *>(workspace); }
  int32_t *any_lost(void *workspace) const { return reinterpret_cast<int32_t *>(reference(workspace) + 1); }
  float *norms(void *workspace) const { return reference(workspace) + 4; }
  TileBits *lost_rows(void *workspace) const { return reinterpret_cast<TileBits *>(reference(workspace) + kHead); }
  TileBits *lost_cols(void *workspace) const { return lost_rows(workspace) + row_tiles_; }
  float *row_sums(void *workspace) const { return reinterpret_cast<float *>(lost_cols(workspace) + col_tiles_); }
  float *col_sums(void *workspace) const { return row_sums(workspace) + row_count_; }

 private:
  static constexpr size_t kHead = 4 + 2 * kNormBlocks;
  size_t row_tiles_, col_tiles_, row_count_, col_count_;
};

// Partial sums of one row sum of every row.
inline size_t row_parts_bytes(const Grid &grid, int64_t rows) {
  return size_t(kConsumers) * grid.ranges * rows * sizeof(float);
}

}  // namespace betaclip
