// The operations of betaclip.h on the CPU: the kernels' own code, with emulated threads and products one by one.
#pragma once

#include <cmath>
#include <vector>

#include "../arguments.h"
#include "../consumer.h"
#include "../statistics.h"
#include "../workspace.h"
#include "emulated_warpgroup.h"

namespace emulation {

using betaclip::Grid;
using betaclip::Job;

// The register file of one thread, filled through the map of accumulator.h. Rows beyond the operands are zeros, as TMA
// delivers them; rows beyond a chunk are not. `tiles` counts how often each tile of the launch was multiplied.
template <class Terms, class Element>
class Products {
 public:
  struct Accumulators {
    float registers[128];
    float operator()(int i) const { return registers[i]; }
  };

  Products(const betaclip_operands &o, const Job &job, int program, int which, int thread, std::vector<int> &tiles)
      : o_(o), job_(job), thread_(thread), walk_(betaclip::walk_of<Terms>(job, betaclip::place_of(job.grid, program))),
        tiles_(tiles) {
    walk_.skip(which);
  }

  Accumulators accumulators() const { return {}; }

  void operator()(Accumulators &accumulators) {
    const Grid &grid = job_.grid;  // a cluster's blocks may walk beyond the matrix
    if (thread_ == 0 && walk_.row() < grid.row_tiles) ++tiles_[size_t(walk_.row()) * grid.col_tiles + walk_.col()];
    for (int slot = 0; slot < betaclip::kSlots; ++slot) {
      for (int line = 0; line < betaclip::kLines; ++line) {
        const int64_t i = job_.row_begin + int64_t(walk_.row()) * 128 + betaclip::accumulator_row(thread_, slot);
        const int64_t j = job_.col_begin + int64_t(walk_.col()) * 128 + betaclip::accumulator_col(thread_, line);
        accumulators.registers[betaclip::accumulator_register(slot, line)] = product(i, j);
      }
    }
    walk_.skip(betaclip::kConsumers);
  }

 private:
  float product(int64_t i, int64_t j) const {
    if (i >= o_.n || j >= o_.m) return 0.0f;
    return betaclip::partial_product(static_cast<const Element *>(o_.x) + i * o_.x_stride,
                                     static_cast<const Element *>(o_.y) + j * o_.y_stride, o_.d, 0, 1);
  }

  const betaclip_operands &o_;
  const Job &job_;
  int thread_;
  betaclip::TileWalk<typename Terms::Tiles> walk_;
  std::vector<int> &tiles_;
};

// All partial sums of a launch, rows first.
template <class Terms>
std::vector<float> partial_sums(const Job &job) {
  const betaclip::PartialSums &sums = job.sums;
  const int64_t rows = Terms::kRowSums * betaclip::kConsumers * job.grid.ranges * sums.row_count;
  const int64_t cols = Terms::kColSums * betaclip::kConsumers * job.grid.strips * sums.col_count;
  std::vector<float> all(sums.rows, sums.rows + rows);
  all.insert(all.end(), sums.cols, sums.cols + cols);
  return all;
}

// Every consumer of every block, one after the other, in place of all at once: none may touch a sum that another has
// touched. Shared memory starts as NaN: nothing may be read before it was written. Returns how often each tile was
// multiplied, (row_tiles, col_tiles).
template <class Terms, class Element>
std::vector<int> launch(const betaclip_operands &o, const typename Terms::Params &params, const Job &job,
                        unsigned seed) {
  using Thread = Warpgroup::Thread;
  std::vector<int> tiles(size_t(job.grid.row_tiles) * job.grid.col_tiles, 0);
  std::vector<char> touched;
  for (int program = 0; program < job.grid.programs(); ++program) {
    for (int which = 0; which < betaclip::kConsumers; ++which) {
      const std::vector<float> before = partial_sums<Terms>(job);
      betaclip::ConsumerStorage<Terms> storage;
      std::memset(static_cast<void *>(&storage), 0xff, sizeof storage);
      Warpgroup(seed + program * betaclip::kConsumers + which).run([&](Thread &thread) {
        const Terms terms(params);
        Products<Terms, Element> products(o, job, program, which, thread.thread(), tiles);
        betaclip::Consumer<Terms, Element, Thread>(terms, job, program, which, thread, storage).run(products);
      });
      const std::vector<float> after = partial_sums<Terms>(job);
      touched.resize(after.size());
      for (size_t i = 0; i < after.size(); ++i) {
        if (std::memcmp(&before[i], &after[i], sizeof(float)) == 0) continue;
        if (touched[i]++) fail("two consumers, one sum");
      }
    }
  }
  return tiles;
}

// What a log-sum-exp took: rows and columns that the first pass lost, and how often each tile was multiplied in both.
struct Effort {
  int lost = 0;
  std::vector<int> tiles;

  int passes() const { return *std::max_element(tiles.begin(), tiles.end()); }
};

// betaclip_logsumexp_forward on a device with `programs` multiprocessors.
template <class Element>
Effort logsumexp_forward(const betaclip_operands &o, float *lse_x, float *lse_y, int programs, unsigned seed) {
  const Grid grid = betaclip::make_grid(o.n, o.m, programs);
  const betaclip::LogSumExpWorkspace places(grid, o.n, o.m);
  std::vector<float> workspace(places.bytes() / sizeof(float), NAN);
  float *reference = places.reference(workspace.data());
  int32_t *any_lost = places.any_lost(workspace.data());
  betaclip::TileBits *lost_rows = places.lost_rows(workspace.data()), *lost_cols = places.lost_cols(workspace.data());
  const Job job = betaclip::job_of(betaclip::whole_matrix(o), grid, places.row_sums(workspace.data()),
                                   places.col_sums(workspace.data()), {any_lost, lost_rows, lost_cols});
  std::memset(job.sums.rows, 0, places.sum_bytes());
  const betaclip::Side sides[2] = {betaclip::side_of_x(o), betaclip::side_of_y(o)};
  float largest[2] = {};
  for (int s = 0; s < 2; ++s) {
    for (int64_t row = 0; row < sides[s].group.end; ++row) {
      if (sides[s].group(row) < 0) continue;
      const Element *values = static_cast<const Element *>(sides[s].rows) + row * sides[s].stride;
      largest[s] = betaclip::larger_norm(largest[s], std::sqrt(betaclip::partial_product(values, values, o.d, 0, 1)));
    }
  }
  *reference = betaclip::reference_for(*o.scale, largest[0], largest[1]);
  *any_lost = 0;
  Effort effort;
  effort.tiles = launch<betaclip::LogSumExpTerms, Element>(o, {sides[0].group, sides[1].group, o.scale, reference}, job,
                                                           seed);
  const betaclip::SideStatistics merges[2] = {
      {sides[0].group, job.sums.rows, betaclip::kConsumers * grid.ranges, reinterpret_cast<uint32_t *>(lost_rows),
       lse_x},
      {sides[1].group, job.sums.cols, betaclip::kConsumers * grid.strips, reinterpret_cast<uint32_t *>(lost_cols),
       lse_y}};
  for (int s = 0; s < 2; ++s) {
    const int64_t tiles = s == 0 ? grid.row_tiles : grid.col_tiles;
    for (int64_t row = 0; row < tiles * betaclip::kTile; ++row) {
      uint32_t &bits = merges[s].lost[row / 32];
      if (row % 32 == 0) bits = 0;
      if (!merges[s].merge_first(row, *reference)) continue;
      bits |= uint32_t(1) << row % 32;
      *any_lost = 1;
      ++effort.lost;
    }
  }
  const std::vector<int> again =
      launch<betaclip::ExactLogSumExpTerms, Element>(o, {sides[0].group, sides[1].group, o.scale}, job, seed + 1);
  for (size_t tile = 0; tile < again.size(); ++tile) effort.tiles[tile] += again[tile];
  for (const betaclip::SideStatistics &side : merges) {
    for (int64_t row = 0; row < side.group.end; ++row) side.merge_second(row);
  }
  return effort;
}

template <class Element>
void logsumexp_ds(const betaclip_operands &o, const betaclip_logsumexp_gradient &g, const betaclip_chunk &chunk,
                  int programs, unsigned seed) {
  const betaclip::LogSumExpGradientTerms::Params params = {
      betaclip::x_groups(o, chunk.row_end), betaclip::y_groups(o, chunk.col_end), o.scale,
      g.stat_x, g.stat_y, g.weight_x, g.weight_y, g.factor_x, g.factor_y, g.narrow};
  const Job job = betaclip::job_of(chunk, betaclip::grid_of(chunk, programs), nullptr, nullptr);
  launch<betaclip::LogSumExpGradientTerms, Element>(o, params, job, seed);
}

// Both softplus operations, by whether Terms have a gradient.
template <class Terms, class Element>
void softplus(const betaclip_operands &o, const float *bias, const float *weight, const betaclip_chunk &chunk,
              float *const (&totals)[Terms::kRowSums], int programs, unsigned seed) {
  const Grid grid = betaclip::grid_of(chunk, programs);
  const int64_t rows = chunk.row_end - chunk.row_begin;
  const size_t count = betaclip::row_parts_bytes(grid, rows) / sizeof(float);
  std::vector<float> parts(Terms::kRowSums * count, 0.0f);
  const typename Terms::Params params = {betaclip::x_groups(o, chunk.row_end), betaclip::y_groups(o, chunk.col_end),
                                         o.scale, bias, weight};
  launch<Terms, Element>(o, params, betaclip::job_of(chunk, grid, parts.data(), nullptr), seed);
  for (int s = 0; s < Terms::kRowSums; ++s) {
    for (int64_t row = 0; row < rows; ++row) {
      totals[s][chunk.row_begin + row] +=
          betaclip::sum_parts(parts.data() + s * count, betaclip::kConsumers * grid.ranges, rows, row);
    }
  }
}

}  // namespace emulation
