// How the matrix of tiles is cut into one rectangle per thread block, and in which order a block visits its tiles.
#pragma once

#include "host_device.h"

namespace betaclip {

// Row tiles whose row sums a warpgroup keeps in shared memory while it walks along a range of columns. Eight tiles of
// x are 1 MiB at d = 512: the bands of all blocks, many of them the same, stay in L2.
constexpr int kBandTiles = 8;

// Neighbouring blocks that walk in step, one strip of rows each, along the same columns: each loads a share of every
// tile of y and sends it to all of them, which saves a quarter of the reads from L2 if they are two.
constexpr int kCluster = 2;

// Warpgroups of a block that take the tiles of its walk in turns.
constexpr int kConsumers = 2;

// The rectangles: `strips` x `ranges` of them, each strip_tiles x range_tiles tiles but for the last ones.
struct Grid {
  int32_t row_tiles, col_tiles;
  int32_t strips, ranges;  // strips is a multiple of kCluster; the last may lie beyond the matrix
  int32_t strip_tiles, range_tiles;

  BETACLIP_HD int32_t programs() const { return strips * ranges; }
};

// The time is that of the largest rectangle, so its area is minimised; within 2 % of the least, the fewest strips and
// ranges win, since each column and row has a partial sum for every one of them.
inline Grid make_grid(int64_t rows, int64_t cols, int32_t multiprocessors) {
  const int64_t row_tiles = ceil_divide(rows, kTile), col_tiles = ceil_divide(cols, kTile);
  const int64_t programs = multiprocessors > kCluster ? multiprocessors : kCluster;
  const auto ranges_beside = [&](int64_t strips) {
    return col_tiles < programs / strips ? col_tiles : programs / strips;
  };
  const auto area_with = [&](int64_t strips) {
    return ceil_divide(row_tiles, strips) * ceil_divide(col_tiles, ranges_beside(strips));
  };
  const int64_t useful = ceil_divide(row_tiles, kCluster) * kCluster;
  const int64_t most_strips = useful < programs ? useful : programs;
  int64_t least_area = area_with(kCluster);
  for (int64_t strips = kCluster; strips <= most_strips; strips += kCluster) {
    least_area = area_with(strips) < least_area ? area_with(strips) : least_area;
  }
  int64_t best = 0;
  for (int64_t strips = kCluster; strips <= most_strips; strips += kCluster) {
    const bool small = area_with(strips) * 50 <= least_area * 51;
    if (small && (best == 0 || strips + ranges_beside(strips) < best + ranges_beside(best))) best = strips;
  }
  // Rounded up to whole tiles, fewer strips or ranges may be enough: no cluster is left without work.
  const int64_t strip_tiles = ceil_divide(row_tiles, best), range_tiles = ceil_divide(col_tiles, ranges_beside(best));
  const int64_t clusters = ceil_divide(row_tiles, kCluster * strip_tiles);
  return {int32_t(row_tiles), int32_t(col_tiles), int32_t(kCluster * clusters),
          int32_t(ceil_divide(col_tiles, range_tiles)), int32_t(strip_tiles), int32_t(range_tiles)};
}

// Which strip and range a block has: those of a cluster are neighbours in both numberings.
struct Place {
  int32_t strip, range;
};

BETACLIP_HD Place place_of(const Grid &grid, int32_t program) {
  const int32_t cluster = program / kCluster;
  return {cluster / grid.ranges * kCluster + program % kCluster, cluster % grid.ranges};
}

// Half-open bounds in tiles.
struct Rectangle {
  int32_t row_begin, row_end, col_begin, col_end;
};

// As many rows for every block of a cluster, since all take part in each load: where the matrix ends within a cluster,
// the later ones walk over rows that do not exist, in the time that the first one takes.
BETACLIP_HD Rectangle rectangle(const Grid &grid, const Place &place) {
  const int32_t first_row = place.strip / kCluster * kCluster * grid.strip_tiles;
  const int32_t row = place.strip * grid.strip_tiles, col = place.range * grid.range_tiles;
  const int32_t rows_left = grid.row_tiles - first_row, cols_left = grid.col_tiles - col;
  return {row, row + (grid.strip_tiles < rows_left ? grid.strip_tiles : rows_left), col,
          col + (grid.range_tiles < cols_left ? grid.range_tiles : cols_left)};
}

// A bit for each of a tile's rows or columns, read by one load.
struct alignas(16) TileBits {
  uint32_t x, y, z, w;
};

// Rows and columns of the matrix that have to be done again.
struct LostRows {
  const int32_t *any;        // () 0 if there are none
  const TileBits *rows, *cols;  // (row_tiles), (col_tiles)
};

// What a walk visits: all tiles of its rectangle.
struct EveryTile {
  BETACLIP_HD EveryTile(const Grid &, const Place &, const LostRows &) {}
  BETACLIP_HD bool any() const { return true; }
  BETACLIP_HD bool operator()(int32_t, int32_t) const { return true; }
};

// Or those tiles that hold a lost row or column. The blocks of a cluster share each tile of y, so they visit a tile
// when one of them needs it.
class LostTiles {
 public:
  BETACLIP_HD LostTiles(const Grid &grid, const Place &place, const LostRows &lost)
      : lost_(lost), rank_(place.strip % kCluster), strip_tiles_(grid.strip_tiles), row_tiles_(grid.row_tiles) {}

  BETACLIP_HD bool any() const { return *lost_.any != 0; }  // most launches find none and need not look further
  BETACLIP_HD bool operator()(int32_t row, int32_t col) const {
    bool wanted = is_any_set(lost_.cols[col]);
    for (int block = 0; block < kCluster; ++block) {
      const int32_t other = row + (block - rank_) * strip_tiles_;
      if (other < row_tiles_) wanted |= is_any_set(lost_.rows[other]);
    }
    return wanted;
  }

 private:
  BETACLIP_HD static bool is_any_set(const TileBits &bits) { return (bits.x | bits.y | bits.z | bits.w) != 0; }

  LostRows lost_;
  int32_t rank_, strip_tiles_, row_tiles_;
};

// Walks a rectangle band by band, within a band column by column, and down each column: column sums stay in registers
// along a column of a band, and consecutive tiles share their columns. The producer visits every tile, each of two
// consumers every other one, so that all three agree on the sequence without talking to each other.
template <class Tiles>
class TileWalk {
 public:
  BETACLIP_HD TileWalk(const Rectangle &rect, const Tiles &tiles)
      : rect_(rect), tiles_(tiles), band_(tiles.any() ? rect.row_begin : rect.row_end), row_(band_),
        col_(rect.col_begin) {
    if (!done() && !tiles_(row_, col_)) next();
  }

  BETACLIP_HD bool done() const { return band_ >= rect_.row_end; }
  BETACLIP_HD int32_t row() const { return row_; }
  BETACLIP_HD int32_t col() const { return col_; }
  BETACLIP_HD int32_t band() const { return band_; }
  BETACLIP_HD int32_t band_end() const {
    return band_ + kBandTiles < rect_.row_end ? band_ + kBandTiles : rect_.row_end;
  }

  // Precondition: !done().
  BETACLIP_HD void next() {
    do {
      step();
    } while (!done() && !tiles_(row_, col_));
  }

  BETACLIP_HD void skip(int count) {
    for (int i = 0; i < count && !done(); ++i) next();
  }

 private:
  BETACLIP_HD void step() {
    if (++row_ < band_end()) return;
    if (++col_ == rect_.col_end) {
      col_ = rect_.col_begin;
      band_ += kBandTiles;
    }
    row_ = band_;
  }

  Rectangle rect_;
  Tiles tiles_;
  int32_t band_, row_, col_;
};

}  // namespace betaclip
