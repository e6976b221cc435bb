// What partial sums are: plain ones, and logarithms of sums of exponentials.
//
// A kind of sum has
//   Sum()                  that of nothing
//   merged(a, b)           that of both
//   exchanged(sum, ...)    the sum of the lane that differs in `mask`
//   stored(sum)            as a float in the workspace,
//   restored<Sum>(float)   and back
#pragma once

#include "host_device.h"

namespace betaclip {

BETACLIP_HD float merged(float a, float b) { return a + b; }

template <class Warpgroup>
BETACLIP_HD float exchanged(float sum, Warpgroup &warpgroup, int mask) {
  return warpgroup.shuffle_xor(sum, mask);
}

BETACLIP_HD float stored(float sum) { return sum; }

template <class Sum>
BETACLIP_HD Sum restored(float part) {
  return part;
}

// The sum of exponentials relative to the largest logit so far: right for any logits, at one exponential each. A logit
// of -inf adds nothing; one of +inf, beyond float32, makes the logarithm +inf, whatever it makes of the sum.
struct RunningLogSumExp {
  float top = -FLT_MAX, sum = 0.0f;  // not -inf: the difference of two would be NaN

  BETACLIP_HD void add(float logit) { add({logit, 1.0f}); }
  BETACLIP_HD void add(const RunningLogSumExp &other) {
    const float e = fast_exp(-fabsf(other.top - top));
    sum = other.top > top ? sum * e + other.sum : sum + other.sum * e;
    top = fmaxf(top, other.top);
  }
  BETACLIP_HD float value() const { return top < FLT_MAX ? top + logf(sum) : kInfinity; }
};

BETACLIP_HD RunningLogSumExp merged(RunningLogSumExp a, const RunningLogSumExp &b) {
  a.add(b);
  return a;
}

template <class Warpgroup>
BETACLIP_HD RunningLogSumExp exchanged(const RunningLogSumExp &sum, Warpgroup &warpgroup, int mask) {
  return {warpgroup.shuffle_xor(sum.top, mask), warpgroup.shuffle_xor(sum.sum, mask)};
}

BETACLIP_HD float stored(const RunningLogSumExp &sum) { return sum.value(); }

template <>
BETACLIP_HD RunningLogSumExp restored<RunningLogSumExp>(float part) {
  RunningLogSumExp sum;
  sum.add(part);
  return sum;
}

}  // namespace betaclip
