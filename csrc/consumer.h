// What a consumer warpgroup does with tiles of products: terms, sums, dS. It runs unchanged on the CPU, with threads,
// shuffles and products emulated (tests/emulation.cpp).
//
// Neither of a block's two consumers knows of the other: each has its own row and column of partial sums, so nothing
// has to be merged inside the kernel, there are no atomics, and sums have one order.
#pragma once

#include "accumulator.h"
#include "ds_store.h"
#include "terms.h"
#include "tiles.h"

namespace betaclip {

// Partial sums as sums.h stores them, those of nothing before the launch: rows (kRowSums, kConsumers * ranges,
// row_count) and cols (kConsumers * strips, col_count), counted from the origin of the launch.
struct PartialSums {
  float *rows, *cols;
  int64_t row_count, col_count;
};

// Everything but the operands: where the launch lies in the matrix, how it is cut, where results go, and for terms that
// visit only these, which rows and columns are lost.
struct Job {
  int64_t row_begin, col_begin;
  Grid grid;
  PartialSums sums;
  DsChunk ds;
  LostRows lost;
};

template <class Terms>
BETACLIP_HD TileWalk<typename Terms::Tiles> walk_of(const Job &job, const Place &place) {
  return {rectangle(job.grid, place), typename Terms::Tiles(job.grid, place, job.lost)};
}

// Shared memory of one consumer. Staged vectors have two buffers, so that one barrier per tile suffices: a thread that
// refills a buffer has passed the barrier of the tile between, which all reached after they last read it.
template <class Terms>
struct ConsumerStorage {
  static constexpr int kBand = kBandTiles * kTile;
  using Sum = typename Terms::Sum;
  typename Terms::Row rows[2][kTile];
  typename Terms::Col cols[2][kTile];
  Sum row_sums[Terms::kRowSums > 0 ? Terms::kRowSums : 1][Terms::kRowSums > 0 ? kBand : 1];  // of a band
  Sum col_sums[kWarpgroup / 32][Terms::kColSums > 0 ? kTile : 1];                            // of each warp
};

// Adds up over pairs of lanes that differ in `mask`; the lane with that bit keeps the upper half of the sums, the other
// the lower, in front.
template <int kCount, class Sum, class Warpgroup>
BETACLIP_HD void reduce_halves(Sum *values, Warpgroup &warpgroup, int mask) {
  const bool upper = (warpgroup.thread() & mask) != 0;
  BETACLIP_UNROLL
  for (int i = 0; i < kCount / 2; ++i) {
    const Sum sent = upper ? values[i] : values[i + kCount / 2];
    const Sum kept = upper ? values[i + kCount / 2] : values[i];
    values[i] = merged(kept, exchanged(sent, warpgroup, mask));
  }
}

template <class Terms, class Element, class Warpgroup>
class Consumer {
  using Sum = typename Terms::Sum;
  using Walk = TileWalk<typename Terms::Tiles>;
  static constexpr int kRowSums = Terms::kRowSums > 0 ? Terms::kRowSums : 1;  // arrays of none do not exist

 public:
  BETACLIP_HD Consumer(const Terms &terms, const Job &job, int program, int which, Warpgroup &warpgroup,
                       ConsumerStorage<Terms> &storage)
      : terms_(terms), job_(job), place_(place_of(job.grid, program)), which_(which), thread_(warpgroup.thread()),
        warpgroup_(warpgroup), storage_(storage) {}

  // products(accumulators) computes this consumer's next tile.
  template <class Products>
  BETACLIP_HD void run(Products &products) {
    auto accumulators = products.accumulators();
    Sum col_sums[kLines] = {};
    if (Terms::kRowSums > 0) clear_row_sums();
    Walk walk = walk_of<Terms>(job_, place_);
    walk.skip(which_);
    for (int buffer = 0; !walk.done(); buffer ^= 1) {
      const int64_t row = row_of(walk.row()), col = col_of(walk.col());
      // Read before the products, which take long enough to hide it.
      const typename Terms::Row own_row = terms_.row(row + thread_);
      const typename Terms::Col own_col = terms_.col(col + thread_);
      products(accumulators);
      storage_.rows[buffer][thread_] = own_row;
      storage_.cols[buffer][thread_] = own_col;
      warpgroup_.sync();
      Sum *row_sums = &storage_.row_sums[0][Terms::kRowSums > 0 ? (walk.row() - walk.band()) * kTile : 0];
      if (terms_.variant() == 0) {
        tile<0>(accumulators, buffer, row, col, row_sums, col_sums);
      } else {
        tile<1>(accumulators, buffer, row, col, row_sums, col_sums);
      }
      Walk following = walk;
      following.skip(kConsumers);
      const bool band_ends = following.done() || following.band() != walk.band();
      if (Terms::kColSums > 0 && (band_ends || following.col() != walk.col())) flush_col_sums(col_sums, walk.col());
      if (Terms::kRowSums > 0 && band_ends) flush_row_sums(walk);
      walk = following;
    }
  }

 private:
  BETACLIP_HD int64_t row_of(int32_t tile) const { return job_.row_begin + int64_t(tile) * kTile; }
  BETACLIP_HD int64_t col_of(int32_t tile) const { return job_.col_begin + int64_t(tile) * kTile; }

  // The row of a tile whose sum this thread keeps: see add_row_sums.
  BETACLIP_HD int kept_row() const { return accumulator_row(thread_, thread_ % 4); }

  // Columns of a thread at a time: what is known of them stays in registers for all rows. dS is stored by eights.
  static constexpr int kAtOnce = Terms::kStores ? 8 : 4;

  template <int kVariant, class Accumulators>
  BETACLIP_HD void tile(const Accumulators &accumulators, int buffer, int64_t row, int64_t col, Sum *row_sums,
                        Sum (&col_sums)[kLines]) {
    const DsTile ds_tile = job_.ds.tile(row, col);
    // In one dimension: of an array of arrays nvcc 13.0 gives the first alone what its class initialises itself with.
    typename Terms::RowTerms slot_terms[kSlots] = {};
    typename Terms::Row slot_rows[kSlots];
    BETACLIP_UNROLL
    for (int slot = 0; slot < kSlots; ++slot) {
      slot_rows[slot] = storage_.rows[buffer][accumulator_row(thread_, slot)];
    }
    BETACLIP_UNROLL
    for (int first = 0; first < kLines; first += kAtOnce) {
      typename Terms::Col cols[kAtOnce];
      BETACLIP_UNROLL
      for (int k = 0; k < kAtOnce; ++k) cols[k] = storage_.cols[buffer][accumulator_col(thread_, first + k)];
      BETACLIP_UNROLL
      for (int slot = 0; slot < kSlots; ++slot) {
        float ds[kAtOnce];
        BETACLIP_UNROLL
        for (int k = 0; k < kAtOnce; ++k) {
          ds[k] = terms_.template term<kVariant>(accumulators(accumulator_register(slot, first + k)), slot_rows[slot],
                                                 cols[k], &slot_terms[slot], &col_sums[first + k]);
        }
        if constexpr (Terms::kStores) {
          uint32_t words[4];
          BETACLIP_UNROLL
          for (int k = 0; k < 4; ++k) words[k] = pack<Element>(ds[2 * k], ds[2 * k + 1]);
          transpose_quad(words, warpgroup_);
          // Block number thread % 4 of the four that these 32 columns are.
          ds_tile.store(accumulator_row(thread_, slot), first * 4 + (thread_ % 4) * 8, words);
        }
      }
    }
    if (Terms::kRowSums > 0) add_row_sums(slot_terms, row_sums);
  }

  // Four lanes share four rows; lane q keeps slot q.
  BETACLIP_HD void add_row_sums(const typename Terms::RowTerms (&slot_terms)[kSlots], Sum *row_sums) {
    BETACLIP_UNROLL
    for (int s = 0; s < kRowSums; ++s) {
      Sum sums[kSlots];
      BETACLIP_UNROLL
      for (int slot = 0; slot < kSlots; ++slot) sums[slot] = slot_terms[slot].sum(s);
      reduce_halves<4>(sums, warpgroup_, 2);
      reduce_halves<2>(sums, warpgroup_, 1);
      Sum &total = row_sums[s * ConsumerStorage<Terms>::kBand + kept_row()];
      total = merged(total, sums[0]);
    }
  }

  BETACLIP_HD void clear_row_sums() {
    for (auto &sums : storage_.row_sums) {
      for (int tile = 0; tile < kBandTiles; ++tile) sums[tile * kTile + kept_row()] = Sum();
    }
  }

  // Threads touch their own rows only: no barrier.
  BETACLIP_HD void flush_row_sums(const Walk &walk) {
    const PartialSums &sums = job_.sums;
    for (int s = 0; s < Terms::kRowSums; ++s) {
      const int64_t part = int64_t(s) * kConsumers * job_.grid.ranges + kConsumers * place_.range + which_;
      BETACLIP_NO_UNROLL  // how often an unrolled loop runs would take a register from all tiles
      for (int32_t tile = walk.band(); tile < walk.band_end(); ++tile) {
        const int64_t row = int64_t(tile) * kTile + kept_row();
        if (row < sums.row_count) {
          const Sum &sum = storage_.row_sums[s][(tile - walk.band()) * kTile + kept_row()];
          sums.rows[part * sums.row_count + row] = stored(sum);
        }
      }
    }
    clear_row_sums();
  }

  // Over the eight lanes of a warp that share columns, then over the four warps, then to this consumer's own partial
  // sums, which only this thread touches. The next flush writes shared memory after another tile's barrier.
  BETACLIP_HD void flush_col_sums(Sum (&col_sums)[kLines], int32_t col_tile) {
    reduce_halves<32>(col_sums, warpgroup_, 16);
    reduce_halves<16>(col_sums, warpgroup_, 8);
    reduce_halves<8>(col_sums, warpgroup_, 4);
    const int first = (thread_ & 16 ? 16 : 0) + (thread_ & 8 ? 8 : 0) + (thread_ & 4 ? 4 : 0);
    BETACLIP_UNROLL
    for (int k = 0; k < 4; ++k) storage_.col_sums[thread_ / 32][accumulator_col(thread_, first + k)] = col_sums[k];
    warpgroup_.sync();
    Sum total = Sum();
    for (int warp = 0; warp < kWarpgroup / 32; ++warp) total = merged(total, storage_.col_sums[warp][thread_]);
    const PartialSums &sums = job_.sums;
    const int64_t col = int64_t(col_tile) * kTile + thread_;
    if (col < sums.col_count) {
      float &part = sums.cols[(int64_t(kConsumers) * place_.strip + which_) * sums.col_count + col];
      part = stored(merged(restored<Sum>(part), total));
    }
    BETACLIP_UNROLL
    for (int line = 0; line < kLines; ++line) col_sums[line] = Sum();
  }

  const Terms &terms_;
  const Job &job_;
  Place place_;
  int which_, thread_;
  Warpgroup &warpgroup_;
  ConsumerStorage<Terms> &storage_;
};

}  // namespace betaclip
