// The kernels' own code on the CPU (emulation.h) against dense float64, at sizes with every kind of tail.
#include "emulation.h"

#include <cinttypes>
#include <limits>
#include <string>
#include <type_traits>

namespace {

using namespace emulation;

constexpr double kInf = std::numeric_limits<double>::infinity();

// Unit rows: any, all of x opposite to all of y, in clusters, along one axis but for row 5 of the longer side, opposite
// to it. Rows of other norms: 10, 10 with a deviation of 1, 1e-3 to 1e3, one of 1e4 on each side, 1e15, 1e25 in x
// (whose square leaves float32) and 1e-5 in y, and every third row of zeros.
enum class Data {
  kUnit, kAntipodal, kClustered, kOneOpposite, kTen, kNearTen, kWide, kOneLarge, kHuge, kHugest, kZeros
};
enum class Grouping { kNone, kSome, kPadded, kOneGroup };

struct Case {
  int64_t n, m, d;
  int programs;
  float scale, bias;
  Data data;
  Grouping grouping;
  bool texts = false;  // some rows have equal texts
};

// Operands, their exact logits and which pairs take part.
template <class Element>
struct Problem {
  std::vector<Element> x, y;
  std::vector<int32_t> x_group, y_group, x_text, y_text;
  std::vector<double> logits;  // (n, m), -inf for pairs that take no part; without the bias
  std::vector<double> bounds;  // (n, m), the largest |S| that the norms allow
  betaclip_operands operands;
  float scale;

  Problem(const Case &c, std::mt19937 &random) : scale(c.scale) {
    const int64_t x_stride = c.d + 8, y_stride = c.d + 16;
    x.assign(c.n * x_stride, Element(NAN));
    y.assign(c.m * y_stride, Element(NAN));
    std::normal_distribution<float> normal;
    std::vector<float> axis(c.d);
    for (float &value : axis) value = normal(random);
    const auto fill = [&](std::vector<Element> &rows, int64_t count, int64_t stride, float sign) {
      for (int64_t i = 0; i < count; ++i) {
        std::vector<float> row(c.d);
        float square = 0.0f;
        for (int64_t k = 0; k < c.d; ++k) {
          row[k] = normal(random);
          if (c.data == Data::kAntipodal) row[k] = sign * axis[k] + 0.05f * row[k];
          if (c.data == Data::kClustered) row[k] = (i % 3 == 0 ? -1.0f : 1.0f) * axis[k] + 0.3f * row[k];
          const bool is_opposite = i == 5 && (c.n > c.m) == (sign > 0.0f);
          if (c.data == Data::kOneOpposite) row[k] = (is_opposite ? -1.0f : 1.0f) * axis[k] + 0.05f * row[k];
          square += row[k] * row[k];
        }
        const float factor = norm_of(c.data, i, sign > 0.0f, random) / std::sqrt(square);
        for (int64_t k = 0; k < c.d; ++k) rows[i * stride + k] = Element(row[k] * factor);
      }
    };
    fill(x, c.n, x_stride, 1.0f);
    fill(y, c.m, y_stride, -1.0f);
    const bool grouped = c.grouping != Grouping::kNone;
    if (grouped) {
      const auto fill_groups = [&](std::vector<int32_t> &group, std::vector<Element> &rows, int64_t count,
                                   int64_t stride) {
        for (int64_t i = 0; i < count; ++i) {
          group.push_back(c.grouping == Grouping::kOneGroup ? 7 : int32_t(random() % 5));
          if (c.grouping != Grouping::kPadded || random() % 4 != 0) continue;
          group[i] = -1 - int32_t(random() % 3);
          for (int64_t k = 0; k < c.d; ++k) rows[i * stride + k] = Element(NAN);
        }
      };
      fill_groups(x_group, x, c.n, x_stride);
      fill_groups(y_group, y, c.m, y_stride);
    }
    if (c.texts) {
      for (int64_t i = 0; i < c.n; ++i) x_text.push_back(int32_t(random() % 9) - 2);
      for (int64_t j = 0; j < c.m; ++j) y_text.push_back(int32_t(random() % 9) - 2);
    }
    for (int64_t i = 0; i < c.n; ++i) {
      for (int64_t j = 0; j < c.m; ++j) {
        double product = 0.0, x_square = 0.0, y_square = 0.0;
        for (int64_t k = 0; k < c.d; ++k) {
          const double a = double(float(x[i * x_stride + k])), b = double(float(y[j * y_stride + k]));
          product += a * b, x_square += a * a, y_square += b * b;
        }
        const bool same_text = c.texts && x_text[i] == y_text[j] && x_text[i] >= 0;
        const bool out = same_text || (grouped && (x_group[i] == y_group[j] || x_group[i] < 0 || y_group[j] < 0));
        logits.push_back(out ? -kInf : product * scale);
        bounds.push_back(out ? 0.0 : std::fabs(scale) * std::sqrt(x_square * y_square));
      }
    }
    operands = {x.data(), y.data(), grouped ? x_group.data() : nullptr, grouped ? y_group.data() : nullptr,
                c.texts ? x_text.data() : nullptr, c.texts ? y_text.data() : nullptr, &scale, x_stride,
                y_stride, c.n, c.m, c.d,
                std::is_same_v<Element, __half> ? BETACLIP_FLOAT16 : BETACLIP_BFLOAT16};
  }

  static float norm_of(Data data, int64_t i, bool of_x, std::mt19937 &random) {
    std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
    switch (data) {
      case Data::kTen: return 10.0f;
      case Data::kNearTen: return 10.0f + std::normal_distribution<float>()(random);
      case Data::kWide: return std::pow(10.0f, 3.0f * uniform(random));
      case Data::kOneLarge: return i == 7 ? 1e4f : 1.0f;
      case Data::kHuge: return 1e15f;
      case Data::kHugest: return of_x ? 1e25f : 1e-5f;
      case Data::kZeros: return i % 3 == 0 ? 0.0f : 10.0f;
      default: return 1.0f;
    }
  }
};

std::string current_case;

void check(const char *what, int64_t i, int64_t j, double actual, double expected, double tolerance) {
  if (actual == expected || std::fabs(actual - expected) <= tolerance) return;
  std::fprintf(stderr, "FAILED: %s[%" PRId64 ", %" PRId64 "] = %.9g, expected %.9g +- %.1g; %s\n", what, i, j, actual,
               expected, tolerance, current_case.c_str());
  std::exit(1);
}

// By how much a logit, and what an exponential makes of it, may be wrong: float32 rounds a product relative to its
// largest possible value.
double logit_tolerance(double bound) { return 2e-6 + 4e-7 * bound; }

double logsumexp(const std::vector<double> &logits, int64_t first, int64_t count, int64_t step) {
  double top = -kInf, sum = 0.0;
  for (int64_t i = 0; i < count; ++i) top = std::max(top, logits[first + i * step]);
  if (top == -kInf) return top;
  for (int64_t i = 0; i < count; ++i) sum += std::exp(logits[first + i * step] - top);
  return top + std::log(sum);
}

// dS in a buffer with a frame of marks that must survive; columns up to a multiple of 8 become 0.
template <class Element>
class ChunkBuffer {
 public:
  ChunkBuffer(int64_t row_begin, int64_t row_end, int64_t col_begin, int64_t col_end)
      : stride_((col_end - col_begin + 7) / 8 * 8 + 8), memory_(stride_ * (row_end - row_begin + 2) + 8, kMark) {
    auto *start = memory_.data() + stride_;
    start += (16 - reinterpret_cast<uintptr_t>(start) % 16) % 16 / sizeof(uint16_t);
    chunk = {start, stride_, row_begin, row_end, col_begin, col_end};
  }

  double at(int64_t i, int64_t j) const {
    return double(float(static_cast<const Element *>(chunk.ds)[(i - chunk.row_begin) * stride_ + j - chunk.col_begin]));
  }

  void check_frame() const {
    const auto *start = static_cast<const uint16_t *>(chunk.ds);
    for (const uint16_t &word : memory_) {
      const int64_t offset = &word - start;
      const int64_t row = offset / stride_, col = offset % stride_;
      const int64_t rows = chunk.row_end - chunk.row_begin, cols = chunk.col_end - chunk.col_begin;
      const bool inside = offset >= 0 && row < rows && col < cols;
      const bool padding = offset >= 0 && row < rows && col < (cols + 7) / 8 * 8;
      const bool zero = word == 0 || word == 0x8000;
      const bool as_it_should_be = inside || (padding ? zero : word == kMark);
      if (!as_it_should_be) check("outside of the chunk", row, col, word, padding ? 0 : kMark, 0.0);
    }
  }

  betaclip_chunk chunk;

 private:
  static constexpr uint16_t kMark = 0x5a5a;
  int64_t stride_;
  std::vector<uint16_t> memory_;
};

// Calls body(row_begin, row_end, col_begin, col_end) for chunks that start anywhere, 16 bytes or not.
template <class Body>
void for_each_chunk(const Case &c, Body body) {
  const int64_t row_cut = c.n > 2 ? c.n / 3 + 1 : c.n, col_cut = c.m > 2 ? c.m / 2 + 1 : c.m;
  for (int64_t row = 0; row < c.n; row += row_cut) {
    for (int64_t col = 0; col < c.m; col += col_cut) {
      body(row, std::min(row + row_cut, c.n), col, std::min(col + col_cut, c.m));
    }
  }
}

// Half a unit of the last place of a 16-bit type, as a share of the value at most.
template <class Element>
constexpr double kRounding = std::is_same_v<Element, __half> ? 1.0 / 2048 : 1.0 / 256;

double softplus_of(double s) { return std::max(s, 0.0) + std::log1p(std::exp(-std::fabs(s))); }
double sigmoid_of(double s) { return 1.0 / (1.0 + std::exp(-s)); }

struct Interval {
  double low, high;

  Interval operator*(double factor) const {
    return factor < 0.0 ? Interval{high * factor, low * factor} : Interval{low * factor, high * factor};
  }
  Interval operator+(const Interval &other) const { return {low + other.low, high + other.high}; }
};

void check(const char *what, int64_t i, int64_t j, double actual, const Interval &expected, double share) {
  const double low = expected.low - share * std::fabs(expected.low) - 1e-7;
  const double high = expected.high + share * std::fabs(expected.high) + 1e-7;
  if (actual >= low && actual <= high) return;
  std::fprintf(stderr, "FAILED: %s[%" PRId64 ", %" PRId64 "] = %.9g, expected %.9g to %.9g; %s\n", what, i, j, actual,
               low, high, current_case.c_str());
  std::exit(1);
}

// The softmax along rows or columns: exact log-sum-exps, by how much ours may be wrong, and where each share may lie.
class Softmax {
 public:
  Softmax(const std::vector<double> &logits, const std::vector<double> &bounds, int64_t count, int64_t step,
          int64_t others, int64_t other_step)
      : logits_(logits), bounds_(bounds) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t first = i * step;
      lse.push_back(logsumexp(logits, first, others, other_step));
      tolerance.push_back(logit_tolerance(0.0));
      double odds = kInf;
      for (int64_t j = 0; j < others; ++j) {
        const int64_t at = first + j * other_step;
        if (logits[at] < lse[i] - 40.0) continue;  // counts for nothing
        tolerance[i] = std::max(tolerance[i], logit_tolerance(bounds[at]));
        odds = std::min(odds, log_odds_against(i, at));
      }
      // A logit far above all others is the statistic, without rounding; else log(2), say, may be less than its ulp.
      const bool is_one_logit = odds + 20.0 * tolerance[i] < -20.0;
      rounding_.push_back(is_one_logit || lse[i] == -kInf ? 0.0 : std::fabs(lse[i]) * 1.2e-7);
    }
  }

  // exp(logits[at] - lse[i])
  Interval share(int64_t i, int64_t at) const {
    if (logits_[at] == -kInf) return {0.0, 0.0};
    const double odds = log_odds_against(i, at), error = 10.0 * (tolerance[i] + logit_tolerance(bounds_[at]));
    return {std::exp(-softplus_of(odds + error) - rounding_[i]), std::exp(-softplus_of(odds - error) + rounding_[i])};
  }

  std::vector<double> lse, tolerance;

 private:
  // log of the sum of the other exponentials over this one.
  double log_odds_against(int64_t i, int64_t at) const {
    const double below = std::max(lse[i] - logits_[at], 0.0);
    return below > 30.0 ? below : std::log(std::expm1(below));
  }

  const std::vector<double> &logits_, &bounds_;
  std::vector<double> rounding_;
};

template <class Element>
Effort check_logsumexp(const Case &c, const Problem<Element> &p, std::mt19937 &random) {
  const betaclip_operands &o = p.operands;
  std::vector<float> lse_x(c.n, NAN), lse_y(c.m, NAN);
  const Effort effort = logsumexp_forward<Element>(o, lse_x.data(), lse_y.data(), c.programs, random());
  const Softmax rows(p.logits, p.bounds, c.n, c.m, c.m, 1), cols(p.logits, p.bounds, c.m, 1, c.n, c.m);
  for (int64_t i = 0; i < c.n; ++i) check("lse_x", i, 0, lse_x[i], rows.lse[i], rows.tolerance[i]);
  for (int64_t j = 0; j < c.m; ++j) check("lse_y", 0, j, lse_y[j], cols.lse[j], cols.tolerance[j]);

  std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
  std::vector<float> weight_x(c.n), weight_y(c.m), factor_x(c.n), factor_y(c.m);
  for (float &w : weight_x) w = uniform(random);
  for (float &w : weight_y) w = uniform(random);
  std::vector<float> stat_x = lse_x, stat_y = lse_y;
  for (std::vector<float> *stat : {&stat_x, &stat_y}) {
    for (float &value : *stat) value = value == -kInf ? INFINITY : value;
  }
  const float least = *std::min_element(stat_y.begin(), stat_y.end());
  float most = -INFINITY;
  for (const float value : stat_x) most = value == INFINITY ? most : std::max(most, value);
  for (int64_t i = 0; i < c.n; ++i) factor_x[i] = stat_x[i] == INFINITY ? 0.0f : std::exp(stat_x[i] - least);
  for (int64_t j = 0; j < c.m; ++j) {
    factor_y[j] = stat_y[j] == INFINITY ? 0.0f : weight_y[j] * std::exp(least - stat_y[j]);
  }
  const bool may_be_narrow = most - least < 55.0f;
  const std::vector<float> unused(std::max(c.n, c.m), NAN);  // factors, where statistics are not narrow
  for (int32_t narrow = 0; narrow <= int32_t(may_be_narrow); ++narrow) {
    const betaclip_logsumexp_gradient gradient = {
        stat_x.data(), stat_y.data(), weight_x.data(), weight_y.data(), narrow ? factor_x.data() : unused.data(),
        narrow ? factor_y.data() : unused.data(), &narrow};
    for_each_chunk(c, [&](int64_t row, int64_t row_end, int64_t col, int64_t col_end) {
      ChunkBuffer<Element> buffer(row, row_end, col, col_end);
      logsumexp_ds<Element>(o, gradient, buffer.chunk, c.programs, random());
      buffer.check_frame();
      for (int64_t i = row; i < row_end; ++i) {
        for (int64_t j = col; j < col_end; ++j) {
          const int64_t at = i * c.m + j;
          const Interval expected = rows.share(i, at) * weight_x[i] + cols.share(j, at) * weight_y[j];
          check(narrow ? "dS from one exponential" : "dS", i, j, buffer.at(i, j), expected, kRounding<Element>);
        }
      }
    });
  }
  return effort;
}

template <class Element>
void check_softplus(const Case &c, const Problem<Element> &p, std::mt19937 &random) {
  const betaclip_operands &o = p.operands;
  std::vector<float> forward(c.n, 0.0f), softplus_sums(c.n, 0.0f), sigmoid_sums(c.n, 0.0f), weight(c.n);
  std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
  for (int64_t i = 0; i < c.n; ++i) {
    weight[i] = o.x_group != nullptr && o.x_group[i] < 0 ? NAN : uniform(random);  // padding may hold anything
  }
  const float *bias = c.bias == 0.0f ? nullptr : &c.bias;
  softplus<betaclip::SoftplusTerms<false>, Element>(o, bias, nullptr, betaclip::whole_matrix(o), {forward.data()},
                                                    c.programs, random());
  // Where softplus and sigmoid of a pair may lie.
  const auto around = [&](double (*function)(double), int64_t i, int64_t j) -> Interval {
    const double s = p.logits[i * c.m + j] + c.bias, error = logit_tolerance(p.bounds[i * c.m + j]);
    return Interval{function(s - error), function(s + error)};
  };
  for_each_chunk(c, [&](int64_t row, int64_t row_end, int64_t col, int64_t col_end) {
    ChunkBuffer<Element> buffer(row, row_end, col, col_end);
    softplus<betaclip::SoftplusTerms<true>, Element>(o, bias, weight.data(), buffer.chunk,
                                                     {softplus_sums.data(), sigmoid_sums.data()}, c.programs, random());
    buffer.check_frame();
    for (int64_t i = row; i < row_end; ++i) {
      for (int64_t j = col; j < col_end; ++j) {
        const Interval sigmoid = around(sigmoid_of, i, j);
        const Interval expected = sigmoid.high == 0.0 ? sigmoid : sigmoid * weight[i];
        check("dS of softplus", i, j, buffer.at(i, j), expected, kRounding<Element> + 1e-5);
      }
    }
  });
  for (int64_t i = 0; i < c.n; ++i) {
    Interval softplus_sum = {0.0, 0.0}, sigmoid_sum = {0.0, 0.0};
    for (int64_t j = 0; j < c.m; ++j) {
      softplus_sum = softplus_sum + around(softplus_of, i, j);
      sigmoid_sum = sigmoid_sum + around(sigmoid_of, i, j);
    }
    check("softplus", i, 0, forward[i], softplus_sum, 1e-5);
    check("softplus beside dS", i, 0, softplus_sums[i], softplus_sum, 1e-5);
    check("sigmoid", i, 0, sigmoid_sums[i], sigmoid_sum, 1e-5);
  }
}

// No tile is multiplied more than twice, and only those with a lost row or column twice.
void check_effort(const Case &c, const Effort &effort) {
  const auto twice = std::count(effort.tiles.begin(), effort.tiles.end(), 2);
  const auto once = std::count(effort.tiles.begin(), effort.tiles.end(), 1);
  if (once + twice != std::ptrdiff_t(effort.tiles.size())) fail("a tile is not multiplied once or twice");
  if (effort.lost == 0 && twice > 0) fail("tiles were multiplied again although nothing was lost");
  // Each row of a cluster has others beside it, near the bound: the reference has to be right for none to be lost.
  if (c.data == Data::kClustered && effort.lost > 0) fail("statistics were lost that the reference should serve");
  if (c.data == Data::kOneOpposite) {
    const int64_t row_tiles = betaclip::ceil_divide(c.n, betaclip::kTile), col_tiles = effort.tiles.size() / row_tiles;
    const int64_t least = c.n > c.m ? col_tiles : row_tiles, most = c.n > c.m ? betaclip::kCluster * least : least;
    if (effort.lost != 1 || twice < least || twice > most) fail("too few or too many tiles for one lost row or column");
  }
  if (c.data == Data::kNearTen && effort.passes() != 2) fail("rows of norm 10 were expected to be lost");
}

template <class Element>
void check_case(const Case &c, unsigned seed) {
  char text[200];
  std::snprintf(text, sizeof text,
                "n=%" PRId64 " m=%" PRId64 " d=%" PRId64 " programs=%d scale=%g bias=%g data=%d groups=%d texts=%d %s", c.n,
                c.m, c.d, c.programs, c.scale, c.bias, int(c.data), int(c.grouping), int(c.texts),
                std::is_same_v<Element, __half> ? "float16" : "bfloat16");
  current_case = text;
  std::mt19937 random(seed);
  const Problem<Element> problem(c, random);
  const Effort effort = check_logsumexp<Element>(c, problem, random);
  check_effort(c, effort);
  check_softplus<Element>(c, problem, random);
  std::printf("ok %s, %d statistics from true maxima, %d passes\n", text, effort.lost, effort.passes());
  std::fflush(stdout);
}

// NaN or infinity in a row that takes part reaches its own statistic and those of the columns it meets, and no other.
// Likewise products of finite rows that leave float32.
void check_not_finite() {
  const Case c = {130, 70, 16, 2, 10.0f, 0.0f, Data::kUnit, Grouping::kNone};
  for (const float value : {NAN, INFINITY}) {
    current_case = std::to_string(value) + " in row 3";
    std::mt19937 random(5);
    Problem<__nv_bfloat16> problem(c, random);
    problem.x[3 * problem.operands.x_stride + 1] = __nv_bfloat16(value);
    std::vector<float> lse_x(c.n), lse_y(c.m);
    logsumexp_forward<__nv_bfloat16>(problem.operands, lse_x.data(), lse_y.data(), c.programs, 1);
    for (int64_t i = 0; i < c.n; ++i) {
      if (std::isfinite(lse_x[i]) != (i != 3)) check("lse_x", i, 0, lse_x[i], i == 3 ? value : 0.0, -1.0);
    }
    for (int64_t j = 0; j < c.m; ++j) {
      if (std::isnan(value) && !std::isnan(lse_y[j])) check("lse_y", 0, j, lse_y[j], value, -1.0);
    }
  }
  current_case = "products beyond float32";
  std::mt19937 random(6);
  Problem<__nv_bfloat16> problem(c, random);
  const betaclip_operands &o = problem.operands;
  std::fill_n(problem.x.begin() + 3 * o.x_stride, c.d, __nv_bfloat16(1e25f));
  for (const int64_t j : {6, 7}) std::fill_n(problem.y.begin() + j * o.y_stride, c.d, __nv_bfloat16(1e25f));
  std::vector<float> lse_x(c.n), lse_y(c.m);
  logsumexp_forward<__nv_bfloat16>(o, lse_x.data(), lse_y.data(), c.programs, 1);
  for (int64_t i = 0; i < c.n; ++i) check("is lse_x inf", i, 0, lse_x[i] == INFINITY, i == 3, 0.0);
  for (int64_t j = 0; j < c.m; ++j) check("is lse_y inf", 0, j, lse_y[j] == INFINITY, j == 6 || j == 7, 0.0);
}

// Each tile of the matrix is in one rectangle, once in its walk; no cluster is left without any, and its blocks walk in
// step.
void check_tiles() {
  using namespace betaclip;
  for (const int programs : {2, 3, 114, 132}) {
    for (const int64_t n : {1, 128, 129, 1000, 5000, 36864}) {
      for (const int64_t m : {1, 200, 1025, 9216, 36864}) {
        const Grid grid = make_grid(n, m, programs);
        if (grid.programs() > programs || grid.programs() % kCluster != 0) fail("a number of blocks that does not fit");
        std::vector<int> visits(size_t(grid.row_tiles) * grid.col_tiles, 0);
        for (int program = 0; program < grid.programs(); ++program) {
          const Place place = place_of(grid, program), first = place_of(grid, program / kCluster * kCluster);
          if (place.range != first.range || place.strip != first.strip + program % kCluster) fail("a cluster apart");
          const EveryTile all(grid, place, {});
          TileWalk<EveryTile> walk(rectangle(grid, place), all), first_walk(rectangle(grid, first), all);
          if (walk.done() || first_walk.row() >= grid.row_tiles) fail("a cluster without a tile");
          for (; !walk.done(); walk.next(), first_walk.next()) {
            if (first_walk.done() || walk.col() != first_walk.col()) fail("a cluster out of step");
            if (walk.row() - walk.band() >= kBandTiles || walk.row() >= walk.band_end()) fail("a tile beyond its band");
            if (walk.row() < grid.row_tiles) ++visits[size_t(walk.row()) * grid.col_tiles + walk.col()];
          }
          if (!first_walk.done()) fail("a cluster out of step");
        }
        for (const int count : visits) {
          if (count != 1) fail("a tile is not visited once");
        }
      }
    }
  }
  // Memory stays O(n + m): two sums for every strip and range of up to 132 blocks.
  const size_t bytes = LogSumExpWorkspace(make_grid(589824, 589824, 132), 589824, 589824).bytes();
  if (bytes > (size_t(128) << 20)) fail("workspace at 589 824 rows and columns exceeds 128 MiB");
}

// Each tile with a lost row or column is visited once, others only for another block of their cluster, whose blocks
// walk in step; and no tile where nothing is lost.
void check_lost_tiles() {
  using namespace betaclip;
  std::mt19937 random(7);
  for (const int programs : {2, 6, 132}) {
    for (const int64_t n : {1, 129, 2600, 9000}) {
      for (const int one_in : {1, 4, 30, 0}) {
        const Grid grid = make_grid(n, 1500, programs);
        std::vector<betaclip::TileBits> rows(grid.row_tiles), cols(grid.col_tiles);
        int32_t any = 0;
        for (std::vector<betaclip::TileBits> *side : {&rows, &cols}) {
          for (betaclip::TileBits &bits : *side) {
            bits = {};
            if (one_in == 0 || random() % one_in != 0) continue;
            (&bits.x)[random() % 4] = 1u << random() % 32;
            any = 1;
          }
        }
        const auto lost = [](const betaclip::TileBits &bits) { return (bits.x | bits.y | bits.z | bits.w) != 0; };
        std::vector<int> visits(size_t(grid.row_tiles) * grid.col_tiles, 0);
        for (int program = 0; program < grid.programs(); program += kCluster) {
          const auto walk_of_block = [&](int block) {
            const Place place = place_of(grid, program + block);
            const LostTiles tiles(grid, place, {&any, rows.data(), cols.data()});
            return TileWalk<LostTiles>(rectangle(grid, place), tiles);
          };
          auto first = walk_of_block(0), second = walk_of_block(1);
          for (; !first.done() && !second.done(); first.next(), second.next()) {
            if (second.row() != first.row() + grid.strip_tiles || second.col() != first.col()) fail("a cluster apart");
            bool wanted = lost(cols[first.col()]);
            for (const int32_t row : {first.row(), second.row()}) {
              if (row >= grid.row_tiles) continue;
              ++visits[size_t(row) * grid.col_tiles + first.col()];
              wanted |= lost(rows[row]);
            }
            if (!wanted) fail("a tile is visited for nothing");
          }
          if (first.done() != second.done()) fail("a cluster out of step");
        }
        for (size_t tile = 0; tile < visits.size(); ++tile) {
          const bool needed = lost(rows[tile / grid.col_tiles]) || lost(cols[tile % grid.col_tiles]);
          if (visits[tile] > 1 || visits[tile] < needed) fail("a tile with a lost row is not visited once");
        }
      }
    }
  }
}

}  // namespace

static_assert(betaclip::kCluster == 2, "check_lost_tiles compares two blocks");

int main() {
  check_tiles();
  check_lost_tiles();
  check_not_finite();
  using B = __nv_bfloat16;
  using H = __half;
  check_case<B>({1, 1, 8, 132, 1.0f, 0.0f, Data::kUnit, Grouping::kNone}, 1);
  check_case<H>({1, 300, 16, 2, 14.0f, -10.0f, Data::kUnit, Grouping::kSome}, 2);
  check_case<B>({129, 1, 24, 3, 100.0f, 0.5f, Data::kUnit, Grouping::kSome}, 3);
  check_case<B>({130, 257, 40, 132, 50.0f, -10.0f, Data::kUnit, Grouping::kPadded}, 4);
  check_case<H>({300, 139, 72, 4, 65.0f, 0.0f, Data::kClustered, Grouping::kPadded}, 5);
  check_case<B>({261, 390, 16, 1, 100.0f, 2.0f, Data::kAntipodal, Grouping::kNone}, 6);
  check_case<H>({140, 133, 24, 2, 100.0f, -3.0f, Data::kClustered, Grouping::kSome}, 7);
  check_case<B>({150, 150, 8, 5, -30.0f, 0.0f, Data::kUnit, Grouping::kSome}, 8);
  check_case<H>({200, 131, 8, 3, 20.0f, 0.0f, Data::kUnit, Grouping::kOneGroup}, 9);
  // More row tiles than a band: columns are flushed again, the last band is short.
  check_case<B>({2100, 259, 8, 1, 30.0f, -5.0f, Data::kUnit, Grouping::kPadded}, 10);
  check_case<H>({2180, 133, 8, 2, 100.0f, 0.0f, Data::kClustered, Grouping::kPadded}, 11);
  // Norms that leave the range of one reference: every row is lost, or some, or all but those that meet a large one.
  check_case<B>({150, 261, 40, 3, 1.0f, 0.0f, Data::kTen, Grouping::kNone}, 12);
  check_case<B>({150, 261, 40, 3, 1.5f, -10.0f, Data::kNearTen, Grouping::kNone}, 13);
  check_case<H>({261, 150, 40, 4, -3.0f, 0.0f, Data::kNearTen, Grouping::kPadded}, 14);
  check_case<B>({300, 139, 24, 2, 1.0f, 0.0f, Data::kWide, Grouping::kSome}, 15);
  check_case<H>({139, 300, 24, 132, 0.01f, 0.0f, Data::kWide, Grouping::kPadded}, 16);
  check_case<B>({270, 270, 16, 3, 14.0f, 0.0f, Data::kOneLarge, Grouping::kSome}, 17);
  check_case<B>({140, 270, 16, 2, 1.0f, 0.0f, Data::kHuge, Grouping::kPadded}, 18);
  check_case<B>({140, 270, 16, 2, 1.0f, 0.0f, Data::kHugest, Grouping::kSome}, 19);
  check_case<H>({270, 140, 16, 2, 2.0f, 0.0f, Data::kZeros, Grouping::kPadded}, 20);
  check_case<B>({140, 140, 16, 2, 0.0f, 1.0f, Data::kWide, Grouping::kSome}, 21);
  check_case<B>({700, 390, 16, 4, 100.0f, 0.0f, Data::kOneOpposite, Grouping::kNone}, 22);
  check_case<H>({390, 700, 16, 4, 100.0f, 0.0f, Data::kOneOpposite, Grouping::kNone}, 25);
  // Equal texts, with groups and without, and where rows are lost.
  check_case<B>({130, 257, 40, 3, 50.0f, -10.0f, Data::kUnit, Grouping::kPadded, true}, 26);
  check_case<H>({139, 150, 24, 2, 20.0f, 0.0f, Data::kUnit, Grouping::kNone, true}, 27);
  check_case<B>({150, 139, 24, 2, 1.0f, 0.0f, Data::kWide, Grouping::kSome, true}, 28);
  // More than a band, of which some tiles are skipped.
  check_case<B>({2180, 390, 8, 2, 100.0f, 0.0f, Data::kOneOpposite, Grouping::kNone}, 23);
  check_case<B>({2180, 133, 8, 2, 2.0f, 0.0f, Data::kNearTen, Grouping::kPadded}, 24);
  std::printf("all passed\n");
}
