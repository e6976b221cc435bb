// The four operations, pair by pair: what becomes of the product <x_i, y_j>.
//
// Each has
//   Tiles             which tiles it visits: all, or those of lost rows and columns
//   Sum               the kind of its sums
//   Row, Col          what it needs of row i and column j; staged in shared memory, one element per thread
//   RowTerms          what the terms of a row add up in, over the columns of a tile that a thread has; sum(s) is their
//                     sum number s
//   row(i), col(j)    read them; beyond the end they belong to group -1
//   kRowSums          sums over columns that it forms
//   kColSums          sums over rows, 0 or 1
//   kStores           whether it writes dS
//   variant()         0 or 1, the same for a whole launch, chooses term<0> or term<1>
//   term<variant>()   adds to both sides' sums; returns dS_ij
//
// The log-sum-exp and its gradient round S to float32 before they subtract a statistic from it. So S is the same number
// in all of them, and S - lse is at most 0 but for the rounding of lse: fused multiply-adds would add S's own rounding
// error, which is large where S is. Differences are taken in nats, where they are nearly exact, before an exponential
// scales them to octaves. Values of excluded pairs are replaced and never multiplied away, so that NaN in padded rows
// reaches nothing.
#pragma once

#include <cstring>

#include "host_device.h"
#include "sums.h"
#include "tiles.h"

namespace betaclip {

// What tells whether a pair takes part, of one of its rows.
struct Ids {
  int32_t group, text;
};

// Groups and texts of one side. Negative groups and indices from `end` on read as -1, so that one comparison tells
// pairs that take part: equal groups have exclusive or 0, two negative ones too, and one negative makes it negative.
// Texts that equal no other read as a number that the other side does not have.
struct Groups {
  const int32_t *group;  // or null: every row is in a group of its own,
  const int32_t *text;   // or null: every text differs from all others
  int32_t absent;        // this one, which differs between the two sides
  int64_t end;

  BETACLIP_HD int32_t operator()(int64_t index) const {
    if (index >= end) return -1;
    const int32_t id = group == nullptr ? absent : group[index];
    return id < 0 ? -1 : id;
  }
  BETACLIP_HD Ids ids(int64_t index) const {
    const int32_t id = text == nullptr || index >= end ? -1 : text[index];
    return {(*this)(index), id < 0 ? -1 - absent : id};
  }
};

BETACLIP_HD bool takes_part(const Ids &x, const Ids &y) { return (x.group ^ y.group) > 0 && x.text != y.text; }

BETACLIP_HD float read_or(const float *values, int64_t index, int64_t end, float otherwise) {
  return index < end ? values[index] : otherwise;
}

// log(1 + p) for 0 <= p < 2^64, to 1e-7 of its value, also where 1 + p rounds to 1. 1 + p is 2^k (1 + r), with r from
// -1/4 to 1/2; the polynomial has the least relative error.
BETACLIP_HD float log1p_of(float p) {
  const float sum = 1.0f + p;
  uint32_t bits;
  memcpy(&bits, &sum, sizeof bits);
  const uint32_t k = (bits - 0x3f400000u) & 0xff800000u;  // where float32 has its exponent
  const uint32_t scale_bits = 0x3f800000u - k;
  float scale;  // 2^-k
  memcpy(&scale, &scale_bits, sizeof scale);
  const float r = p * scale + (scale - 1.0f);
  float q = 0.054132482f * r - 0.12067368f;
  q = q * r + 0.14983916f;
  q = q * r - 0.16822812f;
  q = q * r + 0.19977078f;
  q = q * r - 0.24993442f;
  q = q * r + 0.3333355f;
  q = q * r - 0.5000006f;
  return float(k) * 8.2629582e-8f + (q * (r * r) + r);  // log(2) / 2^23
}

// Terms of a row that need nothing but to be added up.
template <class Sum>
struct PlainTerms {
  Sum total = Sum();

  BETACLIP_HD Sum sum(int) const { return total; }
};

// Sums of exp(S - reference) in both directions.
struct LogSumExpTerms {
  using Tiles = EveryTile;
  using Sum = float;
  struct Params {
    Groups x, y;
    const float *scale, *reference;
  };
  struct Row {
    Ids ids;
  };
  using Col = Row;
  using RowTerms = PlainTerms<Sum>;
  static constexpr int kRowSums = 1, kColSums = 1;
  static constexpr bool kStores = false;

  Params params;
  float scale, reference;

  BETACLIP_HD explicit LogSumExpTerms(const Params &p) : params(p), scale(*p.scale), reference(*p.reference) {}
  BETACLIP_HD Row row(int64_t i) const { return {params.x.ids(i)}; }
  BETACLIP_HD Col col(int64_t j) const { return {params.y.ids(j)}; }
  BETACLIP_HD int variant() const { return 0; }

  template <int kVariant>
  BETACLIP_HD float term(float product, const Row &row, const Col &col, RowTerms *terms, float *col_sum) const {
    const float e = takes_part(row.ids, col.ids) ? fast_exp(rounded_product(product, scale) - reference) : 0.0f;
    terms->total += e;
    *col_sum += e;
    return 0.0f;
  }
};

// Log-sum-exps over the tiles with a lost row or column, from true maxima: an exponential for each direction.
struct ExactLogSumExpTerms {
  using Tiles = LostTiles;
  using Sum = RunningLogSumExp;
  struct Params {
    Groups x, y;
    const float *scale;
  };
  struct Row {
    Ids ids;
  };
  using Col = Row;
  using RowTerms = PlainTerms<Sum>;
  static constexpr int kRowSums = 1, kColSums = 1;
  static constexpr bool kStores = false;

  Params params;
  float scale;

  BETACLIP_HD explicit ExactLogSumExpTerms(const Params &p) : params(p), scale(*p.scale) {}
  BETACLIP_HD Row row(int64_t i) const { return {params.x.ids(i)}; }
  BETACLIP_HD Col col(int64_t j) const { return {params.y.ids(j)}; }
  BETACLIP_HD int variant() const { return 0; }

  template <int kVariant>
  BETACLIP_HD float term(float product, const Row &row, const Col &col, RowTerms *terms, Sum *col_sum) const {
    const float s = takes_part(row.ids, col.ids) ? rounded_product(product, scale) : -kInfinity;
    terms->total.add(s);
    col_sum->add(s);
    return 0.0f;
  }
};

// weight_x exp(S - stat_x) + weight_y exp(S - stat_y), with one exponential in variant 1: see betaclip.h.
struct LogSumExpGradientTerms {
  using Tiles = EveryTile;
  using Sum = float;
  struct Params {
    Groups x, y;
    const float *scale;
    const float *stat_x, *stat_y, *weight_x, *weight_y, *factor_x, *factor_y;
    const int32_t *narrow;
  };
  struct alignas(8) Row {
    Ids ids;
    float stat, weight, factor;
  };
  using Col = Row;
  using RowTerms = PlainTerms<Sum>;
  static constexpr int kRowSums = 0, kColSums = 0;
  static constexpr bool kStores = true;

  Params params;
  float scale;
  bool narrow;

  BETACLIP_HD explicit LogSumExpGradientTerms(const Params &p)
      : params(p), scale(*p.scale), narrow(*p.narrow != 0) {}
  BETACLIP_HD Row row(int64_t i) const {
    const int64_t end = params.x.end;
    return {params.x.ids(i), read_or(params.stat_x, i, end, kInfinity), read_or(params.weight_x, i, end, 0.0f),
            read_or(params.factor_x, i, end, 0.0f)};
  }
  BETACLIP_HD Col col(int64_t j) const {
    const int64_t end = params.y.end;
    return {params.y.ids(j), read_or(params.stat_y, j, end, kInfinity), read_or(params.weight_y, j, end, 0.0f),
            read_or(params.factor_y, j, end, 0.0f)};
  }
  BETACLIP_HD int variant() const { return narrow ? 1 : 0; }

  template <int kVariant>
  BETACLIP_HD float term(float product, const Row &row, const Col &col, RowTerms *, float *) const {
    const float s = rounded_product(product, scale);
    float ds;
    if (kVariant == 1) {
      ds = fast_exp(s - row.stat) * (row.weight + row.factor * col.factor);
    } else {
      ds = row.weight * fast_exp(s - row.stat) + col.weight * fast_exp(s - col.stat);
    }
    return takes_part(row.ids, col.ids) ? ds : 0.0f;
  }
};

// softplus(S) = max(S, 0) + log1p(e) and, for the gradient, sigmoid(S) = (1 or e) / (1 + e), with e = exp(-|S|). The
// factors 1 + e of a row are multiplied: a tile takes one logarithm for all pairs that a thread has of a row.
template <bool kGradient>
struct SoftplusTerms {
  using Tiles = EveryTile;
  using Sum = float;
  struct Params {
    Groups x, y;
    const float *scale, *bias, *weight;  // bias may be null
  };
  struct Row {
    Ids ids;
    float weight;
  };
  struct Col {
    Ids ids;
  };
  struct RowTerms {
    float positive = 0.0f;  // the sum of max(S, 0)
    float growth = 0.0f;    // the product of 1 + e, less 1: e may be far below 1; at most 2^32 - 1 over 32 columns
    float sigmoid = 0.0f;   // the sum of these

    BETACLIP_HD float sum(int s) const { return s == 0 ? positive + log1p_of(growth) : sigmoid; }
  };
  static constexpr int kRowSums = kGradient ? 2 : 1, kColSums = 0;
  static constexpr bool kStores = kGradient;

  Params params;
  float scale, bias;

  BETACLIP_HD explicit SoftplusTerms(const Params &p)
      : params(p), scale(*p.scale), bias(p.bias == nullptr ? 0.0f : *p.bias) {}
  BETACLIP_HD Row row(int64_t i) const {
    const Ids ids = params.x.ids(i);
    return {ids, kGradient && ids.group >= 0 ? params.weight[i] : 0.0f};  // beyond the end the group is negative
  }
  BETACLIP_HD Col col(int64_t j) const { return {params.y.ids(j)}; }
  BETACLIP_HD int variant() const { return 0; }

  template <int kVariant>
  BETACLIP_HD float term(float product, const Row &row, const Col &col, RowTerms *terms, float *) const {
    const float s = takes_part(row.ids, col.ids) ? product * scale + bias : -kInfinity;
    const float e = fast_exp(-fabsf(s));
    terms->positive += s < 0.0f ? 0.0f : s;
    terms->growth += terms->growth * e + e;
    if (!kGradient) return 0.0f;
    const float sigmoid = fast_divide(s < 0.0f ? e : 1.0f, 1.0f + e);
    terms->sigmoid += sigmoid;
    return row.weight * sigmoid;
  }
};

}  // namespace betaclip
