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
// delivers them; rows beyond a chunk are not.
template <class Element>
class Products {
 public:
  struct Accumulators {
    float registers[128];
    float operator()(int i) const { return registers[i]; }
  };

  Products(const betaclip_operands &o, const Job &job, int program, int which, int thread)
      : o_(o), job_(job), thread_(thread), walk_(betaclip::rectangle(job.grid, betaclip::place_of(job.grid, program))) {
    walk_.skip(which);
  }

  Accumulators accumulators() const { return {}; }

  void operator()(Accumulators &accumulators) {
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
  betaclip::TileWalk walk_;
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
// touched. Shared memory starts as NaN: nothing may be read before it was written.
template <class Terms, class Element>
void launch(const betaclip_operands &o, const typename Terms::Params &params, const Job &job, unsigned seed) {
  using Thread = Warpgroup::Thread;
  for (int program = 0; program < job.grid.programs(); ++program) {
    for (int which = 0; which < betaclip::kConsumers; ++which) {
      const std::vector<float> before = partial_sums<Terms>(job);
      betaclip::ConsumerStorage<Terms> storage;
      std::memset(static_cast<void *>(&storage), 0xff, sizeof storage);
      Warpgroup(seed + program * betaclip::kConsumers + which).run([&](Thread &thread) {
        const Terms terms(params);
        Products<Element> products(o, job, program, which, thread.thread());
        betaclip::Consumer<Terms, Element, Thread>(terms, job, program, which, thread, storage).run(products);
      });
      const std::vector<float> after = partial_sums<Terms>(job);
      for (size_t i = 0; i < after.size(); ++i) {
        if (before[i] != 0.0f && std::memcmp(&before[i], &after[i], sizeof(float)) != 0) fail("two consumers, one sum");
      }
    }
  }
}


// betaclip_logsumexp_forward on a device with `programs` multiprocessors; returns how many rows and columns were lost
// to the common reference and computed once more.
template <class Element>
int logsumexp_forward(const betaclip_operands &o, float *lse_x, float *lse_y, int programs, unsigned seed) {
  const Grid grid = betaclip::make_grid(o.n, o.m, programs);
  const betaclip::LogSumExpWorkspace places(grid, o.n, o.m);
  std::vector<float> workspace(places.bytes() / sizeof(float), NAN);
  float *reference = places.reference(workspace.data());
  const Job job = betaclip::job_of(betaclip::whole_matrix(o), grid, places.row_sums(workspace.data()),
                                   places.col_sums(workspace.data()));
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
  launch<betaclip::LogSumExpTerms, Element>(o, {sides[0].group, sides[1].group, o.scale, reference}, job, seed);
  int lost = 0;
  for (int s = 0; s < 2; ++s) {
    const float *parts = s == 0 ? job.sums.rows : job.sums.cols;
    const int count = betaclip::kConsumers * (s == 0 ? grid.ranges : grid.strips);
    for (int64_t row = 0; row < sides[s].group.end; ++row) {
      const float sum = betaclip::sum_parts(parts, count, sides[s].group.end, row);
      const bool again = betaclip::is_lost(sum, sides[s].group(row));
      float &lse = (s == 0 ? lse_x : lse_y)[row];
      lse = std::log(sum) + *reference;
      if (!again) continue;
      ++lost;
      betaclip::RunningLogSumExp shared_parts[kWarps];
      Warpgroup(seed).run([&](Warpgroup::Thread &thread) {
        const float exact = betaclip::exact_logsumexp<Element>(sides[s], row, *o.scale, thread, shared_parts);
        if (thread.thread() == 0) lse = exact;
      });
    }
  }
  return lost;
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
