// The kernels' own code on the CPU (emulation.h) against dense float64, at sizes with every kind of tail.
#include "emulation.h"

#include <cinttypes>
#include <limits>
#include <string>
#include <type_traits>

namespace {

using namespace emulation;

constexpr double kInf = std::numeric_limits<double>::infinity();

enum class Data { kUnit, kAntipodal, kClustered };
enum class Grouping { kNone, kSome, kPadded, kOneGroup };

struct Case {
  int64_t n, m, d;
  int programs;
  float scale, bias;
  Data data;
  Grouping grouping;
};

// Operands, their exact logits and which pairs take part.
template <class Element>
struct Problem {
  std::vector<Element> x, y;
  std::vector<int32_t> x_group, y_group;
  std::vector<double> logits;  // (n, m), -inf for pairs that take no part; without the bias
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
          square += row[k] * row[k];
        }
        for (int64_t k = 0; k < c.d; ++k) rows[i * stride + k] = Element(row[k] / std::sqrt(square));
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
    for (int64_t i = 0; i < c.n; ++i) {
      for (int64_t j = 0; j < c.m; ++j) {
        double product = 0.0;
        for (int64_t k = 0; k < c.d; ++k) {
          product += double(float(x[i * x_stride + k])) * double(float(y[j * y_stride + k]));
        }
        const bool out = grouped && (x_group[i] == y_group[j] || x_group[i] < 0 || y_group[j] < 0);
        logits.push_back(out ? -kInf : product * scale);
      }
    }
    operands = {x.data(), y.data(), grouped ? x_group.data() : nullptr, grouped ? y_group.data() : nullptr, &scale,
                x_stride, y_stride, c.n, c.m, c.d,
                std::is_same_v<Element, __half> ? BETACLIP_FLOAT16 : BETACLIP_BFLOAT16};
  }
};

std::string current_case;

void check(const char *what, int64_t i, int64_t j, double actual, double expected, double tolerance) {
  if (actual == expected || std::fabs(actual - expected) <= tolerance) return;
  std::fprintf(stderr, "FAILED: %s[%" PRId64 ", %" PRId64 "] = %.9g, expected %.9g +- %.1g; %s\n", what, i, j, actual,
               expected, tolerance, current_case.c_str());
  std::exit(1);
}

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

template <class Element>
int check_logsumexp(const Case &c, const Problem<Element> &p, std::mt19937 &random) {
  const betaclip_operands &o = p.operands;
  std::vector<float> lse_x(c.n, NAN), lse_y(c.m, NAN);
  const int lost = logsumexp_forward<Element>(o, lse_x.data(), lse_y.data(), c.programs, random());
  // float32 rounds a logit of s to s 2^-24, and its product to a few times that.
  const double tolerance = 2e-6 + 4e-7 * std::fabs(c.scale);
  for (int64_t i = 0; i < c.n; ++i) check("lse_x", i, 0, lse_x[i], logsumexp(p.logits, i * c.m, c.m, 1), tolerance);
  for (int64_t j = 0; j < c.m; ++j) check("lse_y", 0, j, lse_y[j], logsumexp(p.logits, j, c.n, c.m), tolerance);

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
          const double s = p.logits[i * c.m + j];
          const double left = s == -kInf ? 0.0 : weight_x[i] * std::exp(s - stat_x[i]);
          const double right = s == -kInf ? 0.0 : weight_y[j] * std::exp(s - stat_y[j]);
          const double share = kRounding<Element> + 10 * tolerance;
          check(narrow ? "dS from one exponential" : "dS", i, j, buffer.at(i, j), left + right,
                share * (std::fabs(left) + std::fabs(right)) + 1e-7);
        }
      }
    });
  }
  return lost;
}

double softplus_of(double s) { return std::max(s, 0.0) + std::log1p(std::exp(-std::fabs(s))); }
double sigmoid_of(double s) { return 1.0 / (1.0 + std::exp(-s)); }

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
  const double tolerance = 2e-6 + 4e-7 * std::fabs(c.scale);
  for_each_chunk(c, [&](int64_t row, int64_t row_end, int64_t col, int64_t col_end) {
    ChunkBuffer<Element> buffer(row, row_end, col, col_end);
    softplus<betaclip::SoftplusTerms<true>, Element>(o, bias, weight.data(), buffer.chunk,
                                                     {softplus_sums.data(), sigmoid_sums.data()}, c.programs, random());
    buffer.check_frame();
    for (int64_t i = row; i < row_end; ++i) {
      for (int64_t j = col; j < col_end; ++j) {
        const double sigmoid = sigmoid_of(p.logits[i * c.m + j] + c.bias);
        const double expected = sigmoid == 0.0 ? 0.0 : weight[i] * sigmoid;
        const double share = kRounding<Element> + 10 * tolerance;
        check("dS of softplus", i, j, buffer.at(i, j), expected, share * std::fabs(expected) + 1e-7);
      }
    }
  });
  for (int64_t i = 0; i < c.n; ++i) {
    double softplus_sum = 0.0, sigmoid_sum = 0.0;
    for (int64_t j = 0; j < c.m; ++j) {
      softplus_sum += softplus_of(p.logits[i * c.m + j] + c.bias);
      sigmoid_sum += sigmoid_of(p.logits[i * c.m + j] + c.bias);
    }
    check("softplus", i, 0, forward[i], softplus_sum, 10 * tolerance * softplus_sum);
    check("softplus beside dS", i, 0, softplus_sums[i], softplus_sum, 10 * tolerance * softplus_sum);
    check("sigmoid", i, 0, sigmoid_sums[i], sigmoid_sum, 10 * tolerance * sigmoid_sum);
  }
}

template <class Element>
void check_case(const Case &c, unsigned seed) {
  char text[200];
  std::snprintf(text, sizeof text,
                "n=%" PRId64 " m=%" PRId64 " d=%" PRId64 " programs=%d scale=%g bias=%g data=%d groups=%d %s", c.n,
                c.m, c.d, c.programs, c.scale, c.bias, int(c.data), int(c.grouping),
                std::is_same_v<Element, __half> ? "float16" : "bfloat16");
  current_case = text;
  std::mt19937 random(seed);
  const Problem<Element> problem(c, random);
  const int lost = check_logsumexp<Element>(c, problem, random);
  // Each row of a cluster has others beside it, near the bound: the reference has to be right for none to be lost.
  if (c.data == Data::kClustered && lost > 0) fail("statistics were lost that the reference should serve");
  check_softplus<Element>(c, problem, random);
  std::printf("ok %s, %d statistics from true maxima\n", text, lost);
}

// NaN or infinity in a row that takes part reaches its own statistic and those of the columns it meets, and no other.
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
          TileWalk walk(rectangle(grid, place)), first_walk(rectangle(grid, first));
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

}  // namespace

int main() {
  check_tiles();
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
  std::printf("all passed\n");
}
