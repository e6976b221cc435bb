// From partial sums to statistics: merging, noticing what was lost, and merging what was done again.
#pragma once

#include "betaclip.h"
#include "ds_store.h"
#include "host_device.h"
#include "terms.h"

namespace betaclip {

// e = exp(S - reference) with one reference for a whole launch lets partial sums merge by plain addition. It is exact
// as long as sums neither overflow nor consist of terms that fade out: float32 spans 2^-126 to 2^128, room is kept for
// 2^20 terms at the upper end, for those and 24 bits of precision at the lower.

// Nats by which a logit may exceed the reference.
constexpr float kHeadroom = 73.0f;

// exp(-57), 57 nats below the reference: sums from there on have lost nothing.
constexpr float kLeastSum = 1.7587922e-25f;

// |S| is at most |scale| times the largest norms. The reference is 0 where it can be, since an exponent's rounding
// error grows with its size.
BETACLIP_HD float reference_for(float scale, float largest_x_norm, float largest_y_norm) {
  const float bound = fminf(fabsf(scale) * largest_x_norm * largest_y_norm, FLT_MAX);
  return fmaxf(bound - kHeadroom, 0.0f);
}

// The largest norm that counts: rows that are not finite make their own statistics so, but must not move others'.
BETACLIP_HD float larger_norm(float largest, float norm) { return norm > largest && norm < kInfinity ? norm : largest; }

// NaN is not lost, it is to be seen. A row without any pair sums to 0 and is looked at once more.
BETACLIP_HD bool is_lost(float sum, int32_t group) { return group >= 0 && (sum < kLeastSum || sum == kInfinity); }

template <class Sum = float>
BETACLIP_HD Sum sum_parts(const float *parts, int64_t count, int64_t stride, int64_t row) {
  Sum sum = Sum();
  for (int64_t part = 0; part < count; ++part) sum = merged(sum, restored<Sum>(parts[part * stride + row]));
  return sum;
}

// The log-sum-exp of one side's rows, on its way from the partial sums of the first pass to those of the second.
struct SideStatistics {
  Groups group;    // `end` is how many rows there are
  float *parts;    // (count, rows)
  int64_t count;
  uint32_t *lost;  // a bit for each row, up to whole tiles
  float *lse;      // (rows)

  // lse of a row from the first pass; returns whether it is lost, and then makes its parts those of nothing for the
  // second.
  BETACLIP_HD bool merge_first(int64_t row, float reference) const {
    if (row >= group.end) return false;
    const float sum = sum_parts(parts, count, group.end, row);
    lse[row] = logf(sum) + reference;
    if (!is_lost(sum, group(row))) return false;
    for (int64_t part = 0; part < count; ++part) parts[part * group.end + row] = stored(RunningLogSumExp());
    return true;
  }

  // lse of a lost row from the second pass.
  BETACLIP_HD void merge_second(int64_t row) const {
    if (row >= group.end || (lost[row / 32] >> row % 32 & 1) == 0) return;
    lse[row] = sum_parts<RunningLogSumExp>(parts, count, group.end, row).value();
  }
};

// The rows of one side.
struct Side {
  const void *rows;
  Groups group;  // `end` is how many
  int64_t stride, depth;
};

BETACLIP_HD Side side_of_x(const betaclip_operands &o) { return {o.x, {o.x_group, o.x_text, 0, o.n}, o.x_stride, o.d}; }
BETACLIP_HD Side side_of_y(const betaclip_operands &o) { return {o.y, {o.y_group, o.y_text, 1, o.m}, o.y_stride, o.d}; }

// The share of <a, b> of one of `lanes` lanes, 16 bytes at a time.
template <class Element>
BETACLIP_HD float partial_product(const Element *a, const Element *b, int64_t depth, int lane, int lanes) {
  float sum = 0.0f;
  for (int64_t start = lane * 8; start < depth; start += lanes * 8) {
    const uint4 a_words = *reinterpret_cast<const uint4 *>(a + start);
    const uint4 b_words = *reinterpret_cast<const uint4 *>(b + start);
    Element a_values[8], b_values[8];
    memcpy(a_values, &a_words, sizeof a_words);
    memcpy(b_values, &b_words, sizeof b_words);
    BETACLIP_UNROLL
    for (int k = 0; k < 8; ++k) sum += float(a_values[k]) * float(b_values[k]);
  }
  return sum;
}

// <a, b> in every lane of a warp.
template <class Element, class Warpgroup>
BETACLIP_HD float warp_product(const Element *a, const Element *b, int64_t depth, Warpgroup &warpgroup) {
  float sum = partial_product(a, b, depth, warpgroup.thread() % 32, 32);
  for (int mask = 16; mask > 0; mask /= 2) sum += warpgroup.shuffle_xor(sum, mask);
  return sum;
}

}  // namespace betaclip
