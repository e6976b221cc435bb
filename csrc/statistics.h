// From partial sums to statistics: merging, noticing what was lost, and doing that again.
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

BETACLIP_HD float sum_parts(const float *parts, int64_t count, int64_t stride, int64_t row) {
  float sum = 0.0f;
  for (int64_t part = 0; part < count; ++part) sum += parts[part * stride + row];
  return sum;
}

// One side of the operation, seen from its own rows.
struct Side {
  const void *rows, *others;
  Groups group, other_group;  // `end` is how many
  int64_t stride, other_stride, depth;
};

BETACLIP_HD Side side_of_x(const betaclip_operands &o) {
  return {o.x, o.y, {o.x_group, 0, o.n}, {o.y_group, 1, o.m}, o.x_stride, o.y_stride, o.d};
}

BETACLIP_HD Side side_of_y(const betaclip_operands &o) {
  return {o.y, o.x, {o.y_group, 1, o.m}, {o.x_group, 0, o.n}, o.y_stride, o.x_stride, o.d};
}

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

// log of a sum of exponentials relative to the largest so far: right for any logits, at a second exponential for each.
struct RunningLogSumExp {
  float top, sum;

  BETACLIP_HD static RunningLogSumExp of_nothing() { return {-kInfinity, 0.0f}; }

  BETACLIP_HD void add(float logit, float count = 1.0f) {
    const float highest = fmaxf(top, logit);
    sum = sum * expf(top - finite(highest)) + count * expf(logit - finite(highest));
    top = highest;
  }
  BETACLIP_HD void add(const RunningLogSumExp &other) { add(other.top, other.sum); }
  BETACLIP_HD float value() const { return logf(sum) + finite(top); }

 private:
  // infinity - infinity would make NaN of -inf, no pair, and of inf.
  BETACLIP_HD static float finite(float top) { return fabsf(top) == kInfinity ? 0.0f : top; }
};

// <a, b> in every lane of a warp.
template <class Element, class Warpgroup>
BETACLIP_HD float warp_product(const Element *a, const Element *b, int64_t depth, Warpgroup &warpgroup) {
  float sum = partial_product(a, b, depth, warpgroup.thread() % 32, 32);
  for (int mask = 16; mask > 0; mask /= 2) sum += warpgroup.shuffle_xor(sum, mask);
  return sum;
}

// One row's log-sum-exp from its true maximum: warps share the columns, lanes the depth. Call it in all threads of a
// warpgroup; `parts` is shared memory of a warpgroup.
template <class Element, class Warpgroup>
BETACLIP_HD float exact_logsumexp(const Side &side, int64_t row, float scale, Warpgroup &warpgroup,
                                  RunningLogSumExp *parts) {
  constexpr int kWarps = kWarpgroup / 32;
  const int warp = warpgroup.thread() / 32;
  const Element *values = static_cast<const Element *>(side.rows) + row * side.stride;
  const int32_t group = side.group(row);
  RunningLogSumExp part = RunningLogSumExp::of_nothing();
  for (int64_t other = warp; other < side.other_group.end; other += kWarps) {
    if (!takes_part(group, side.other_group(other))) continue;
    const Element *other_values = static_cast<const Element *>(side.others) + other * side.other_stride;
    part.add(scale * warp_product(values, other_values, side.depth, warpgroup));
  }
  warpgroup.sync();  // the last row's parts have been read
  if (warpgroup.thread() % 32 == 0) parts[warp] = part;
  warpgroup.sync();
  RunningLogSumExp total = RunningLogSumExp::of_nothing();
  for (int i = 0; i < kWarps; ++i) total.add(parts[i]);
  return total.value();
}

}  // namespace betaclip
