// SPDX-License-Identifier: Apache-2.0
//
// SoftTop-k against its definition in float64, and its gradient against finite differences of that.
#include "cpu/targets.h"
// Targets first: it chooses what Highway compiles.
#include <gtest/gtest.h>
#include <hwy/highway.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>

#include "error_text.h"
#include "memory.h"
#include "sparline/attention.h"

namespace sparline::testing {
namespace {

using oracle::Array;
using Vector = std::vector<double>;

constexpr double kInf = std::numeric_limits<double>::infinity();

double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }

/// m = sigmoid(x / tau + lambda), by bisection until float64 has no number in between.
Vector soft_top_k(const Vector& x, double kappa, double temperature) {
  const auto at = [&](double lambda) {
    Vector m;
    for (double value : x)
      m.push_back(value == -kInf ? 0.0 : sigmoid(value / temperature + lambda));
    return m;
  };
  const auto sum = [](const Vector& m) { return std::accumulate(m.begin(), m.end(), 0.0); };
  double num = 0.0, least = kInf, largest = -kInf;
  for (double value : x) {
    if (value == -kInf) continue;
    ++num;
    least = std::min(least, value / temperature);
    largest = std::max(largest, value / temperature);
  }
  if (kappa >= num) {
    Vector m;
    for (double value : x) m.push_back(value == -kInf ? 0.0 : 1.0);
    return m;
  }
  double low = -largest - 750.0, high = -least + 750.0;
  for (int halving = 0; halving < 200; ++halving) {
    const double middle = 0.5 * (low + high);
    (sum(at(middle)) < kappa ? low : high) = middle;
  }
  return at(0.5 * (low + high));
}

/// One row as a map.
Array row_array(const Vector& row) {
  Array array({1, 1, 1, static_cast<int64_t>(row.size())});
  array.data = row;
  return array;
}

/// The library's soft map, with guards around all memory.
Array run(const Array& scores, const Vector& kappa, double temperature,
          Layout layout = Layout::kBHND, int num_threads = 2) {
  const GuardedTensor x(DType::kF32, scores, layout);
  const GuardedTensor soft_map(DType::kF32, scores.shape, layout);
  std::vector<float> row_kappa(kappa.begin(), kappa.end());
  sparline::soft_top_k(
      {.num_threads = num_threads},
      {.scores = x.view(),
       .kappa = contiguous_view(row_kappa.data(), DType::kF32, {1, 1, 1, int64_t(kappa.size())}),
       .temperature = temperature,
       .soft_map = soft_map.view()});
  EXPECT_EQ(soft_map.misuse(), "");
  return soft_map.load();
}

Array run_backward(const Array& d_soft_map, const Array& soft_map, double temperature,
                   Layout layout = Layout::kBHND, int num_threads = 2) {
  const GuardedTensor d_m(DType::kF32, d_soft_map, layout);
  const GuardedTensor m(DType::kF32, soft_map, layout);
  const GuardedTensor d_x(DType::kF32, soft_map.shape, layout);
  soft_top_k_backward({.num_threads = num_threads}, {.d_soft_map = d_m.view(),
                                                     .soft_map = m.view(),
                                                     .temperature = temperature,
                                                     .d_scores = d_x.view()});
  EXPECT_EQ(d_x.misuse(), "");
  return d_x.load();
}

/// A map of scores, some of them left out, with a kappa for each row; some rows are full.
struct Case {
  Array scores;
  Vector kappa;
  double temperature = 0.1;
  Layout layout = Layout::kBHND;
};

Case random_case(uint64_t seed) {
  std::mt19937_64 engine(seed * 0x9E3779B97F4A7C15ULL + 3);
  const auto between = [&](int64_t low, int64_t high) {
    return low + static_cast<int64_t>(engine() % static_cast<uint64_t>(high - low + 1));
  };
  const auto uniform = [&] { return static_cast<double>(engine() >> 11) * 0x1p-53; };
  Case c;
  c.scores = Array({between(1, 2), between(1, 3), between(1, 20), between(1, 130)});
  c.temperature = std::pow(10.0, 2.0 * uniform() - 2.0);
  c.layout = static_cast<Layout>(between(0, 2));
  const double magnitude = std::pow(10.0, static_cast<double>(between(-1, 2)));
  const double left_out = uniform() < 0.5 ? 0.0 : 0.3;
  for (double& x : c.scores.data) {
    const double normal = std::sqrt(-2.0 * std::log(1.0 - uniform())) * std::cos(6.28 * uniform());
    x = uniform() < left_out ? -kInf : rounded(magnitude * normal, DType::kF32);
  }
  const int64_t num = c.scores.shape[3];
  for (size_t row = 0; row < c.scores.data.size() / num; ++row) {
    const double share = uniform() < 0.3 ? 0.05 : uniform();
    const double kappa = uniform() < 0.1 ? 2.0 * static_cast<double>(num) : share * num + 1e-3;
    c.kappa.push_back(rounded(kappa, DType::kF32));
  }
  return c;
}

Vector row_of(const Array& array, size_t row) {
  const auto begin = array.data.begin() + static_cast<int64_t>(row) * array.shape[3];
  return {begin, begin + array.shape[3]};
}

void check(uint64_t seed) {
  const Case c = random_case(seed);
  const Array got = run(c.scores, c.kappa, c.temperature, c.layout);
  for (size_t row = 0; row < c.kappa.size(); ++row) {
    const Vector x = row_of(c.scores, row), m = row_of(got, row);
    const Vector want = soft_top_k(x, c.kappa[row], c.temperature);
    // All errors that a wrong threshold makes have one sign, so each is at most that of the sum.
    const double slack = 2e-5 * c.kappa[row] + 1e-6;
    double sum = 0.0, wanted_sum = 0.0;
    for (size_t j = 0; j < m.size(); ++j) {
      sum += m[j];
      wanted_sum += want[j];
      ASSERT_NEAR(m[j], want[j], slack) << "row " << row << ", column " << j << ", seed " << seed;
      if (x[j] == -kInf) {
        ASSERT_EQ(m[j], 0.0) << "row " << row << ", seed " << seed;
      }
    }
    ASSERT_NEAR(sum, wanted_sum, slack) << "row " << row << ", seed " << seed;
    const double num = static_cast<double>(
        std::count_if(x.begin(), x.end(), [](double value) { return value != -kInf; }));
    if (c.kappa[row] < num) {
      ASSERT_NEAR(sum, c.kappa[row], slack) << "row " << row << ", seed " << seed;
    }
  }
}

TEST(SoftTopK, RandomMaps) {
  for (uint64_t seed = 0; seed < 200; ++seed) check(seed);
}

TEST(SoftTopK, RandomMapsOnEveryTarget) {
  for (const int64_t target : hwy::SupportedAndGeneratedTargets()) {
    SCOPED_TRACE(hwy::TargetName(target));
    hwy::SetSupportedTargetsForTest(target);
    for (uint64_t seed = 1000; seed < 1040; ++seed) check(seed);
  }
  hwy::SetSupportedTargetsForTest(0);
}

TEST(SoftTopK, BothTailsAreAccurate) {
  // By symmetry t = 0 to the last bit: m = sigmoid(x / tau).
  const Vector x{-80.0, -40.0, -20.0, -3.0, -1.0, 1.0, 3.0, 20.0, 40.0, 80.0};
  const Array m = run(row_array(x), {5.0}, 1.0);
  for (size_t j = 0; j < x.size(); ++j) EXPECT_NEAR(m.data[j] / sigmoid(x[j]), 1.0, 2e-5) << x[j];
}

TEST(SoftTopK, LargeScoresLoseNothing) {
  // One ulp of x is 0.01 tau here: lambda in float32 could not make the sum right.
  Vector x;
  for (int j = 0; j < 200; ++j) x.push_back(rounded(9000.0 + 50.0 * std::sin(j), DType::kF32));
  const Array m = run(row_array(x), {17.3}, 0.1);
  EXPECT_NEAR(std::accumulate(m.data.begin(), m.data.end(), 0.0), 17.3, 4e-4);
}

TEST(SoftTopK, EqualScoresShareKappa) {
  for (const double score : {0.0, -1e4, 1e4}) {
    const Array m = run(row_array(Vector(37, score)), {3.7}, 0.1);
    for (double value : m.data) EXPECT_NEAR(value, 0.1, 1e-5);
  }
}

TEST(SoftTopK, RowsWithNothingToChoose) {
  const Vector x{1.0, -kInf, -2.0};
  EXPECT_EQ(run(row_array(x), {2.0}, 0.1).data, (Vector{1.0, 0.0, 1.0}));
  EXPECT_EQ(run(row_array(x), {5.0}, 0.1).data, (Vector{1.0, 0.0, 1.0}));
  EXPECT_EQ(run(row_array(Vector(3, -kInf)), {0.5}, 0.1).data, Vector(3, 0.0));
  const Array full = row_array({1.0, 0.0, 1.0});
  EXPECT_EQ(run_backward(row_array({1.0, 2.0, 3.0}), full, 0.1).data, Vector(3, 0.0));
}

TEST(SoftTopK, NanStaysInItsRow) {
  Array x({1, 1, 3, 20}, 0.5);
  x.row(0, 0, 1)[4] = std::nan("");
  const Array m = run(x, Vector(3, 4.0), 0.1);
  for (int64_t j = 0; j < 20; ++j) {
    EXPECT_NEAR(m.row(0, 0, 0)[j], 0.2, 1e-5);
    EXPECT_NEAR(m.row(0, 0, 2)[j], 0.2, 1e-5);
  }
  EXPECT_TRUE(std::isnan(m.row(0, 0, 1)[4]));
}

/// d_x = sum_j d_m[j] d m[j] / d x, by central differences of the definition.
TEST(SoftTopK, GradientIsThatOfTheDefinition) {
  for (uint64_t seed = 0; seed < 60; ++seed) {
    Case c = random_case(seed);
    Array m = c.scores, d_m = c.scores;
    std::mt19937_64 engine(seed);
    std::uniform_real_distribution<double> uniform(-1.0, 1.0);
    for (double& value : d_m.data) value = rounded(uniform(engine), DType::kF32);
    const int64_t num = c.scores.shape[3];
    const size_t num_rows = std::min<size_t>(c.kappa.size(), 3);
    for (size_t row = 0; row < c.kappa.size(); ++row) {
      const Vector exact = soft_top_k(row_of(c.scores, row), c.kappa[row], c.temperature);
      std::copy(exact.begin(), exact.end(), m.data.begin() + static_cast<int64_t>(row) * num);
    }
    const Array d_x = run_backward(d_m, m, c.temperature, c.layout);
    const double step = 1e-5 * c.temperature;
    for (size_t row = 0; row < num_rows; ++row) {
      const Vector x = row_of(c.scores, row), g = row_of(d_m, row);
      for (int64_t l = 0; l < num; l += 1 + num / 8) {
        double difference = 0.0;
        if (x[l] != -kInf) {
          Vector above = x, below = x;
          above[l] += step;
          below[l] -= step;
          const Vector m_above = soft_top_k(above, c.kappa[row], c.temperature);
          const Vector m_below = soft_top_k(below, c.kappa[row], c.temperature);
          for (int64_t j = 0; j < num; ++j) difference += g[j] * (m_above[j] - m_below[j]);
          difference /= above[l] - below[l];
        }
        // s = m (1 - m) of a float32 m is off by its rounding.
        EXPECT_NEAR(row_of(d_x, row)[l], difference, 2e-6 * (1.0 + 1.0 / c.temperature))
            << "row " << row << ", column " << l << ", seed " << seed;
      }
    }
  }
}

TEST(SoftTopK, ThreadsAndLayoutsDoNotMatter) {
  for (uint64_t seed = 0; seed < 20; ++seed) {
    const Case c = random_case(seed);
    const Array m = run(c.scores, c.kappa, c.temperature, Layout::kBHND, 1);
    EXPECT_EQ(m.data, run(c.scores, c.kappa, c.temperature, Layout::kPadded, 5).data);
    Array d_m(m.shape, 1.0);
    for (size_t n = 0; n < d_m.data.size(); ++n) d_m.data[n] = static_cast<double>(n % 7);
    EXPECT_EQ(run_backward(d_m, m, c.temperature, Layout::kBHND, 1).data,
              run_backward(d_m, m, c.temperature, Layout::kPadded, 5).data);
  }
}

// Errors -----------------------------------------------------------------------------------------

TEST(SoftTopK, ErrorsNameTheRuleTheValueAndTheWayOut) {
  std::vector<float> memory(400);
  const auto view = [&](int slot, std::array<int64_t, 4> shape, DType dtype = DType::kF32) {
    return contiguous_view(memory.data() + 100 * slot, dtype, shape);
  };
  const SoftTopKArgs good{.scores = view(0, {1, 2, 3, 4}),
                          .kappa = view(1, {1, 1, 1, 6}),
                          .soft_map = view(2, {1, 2, 3, 4})};
  const auto error = [&](auto damage, Target target = {}) {
    SoftTopKArgs args = good;
    damage(args);
    return error_text(
        target.device == Device::kCPU ? ErrorCode::kInvalidArgument : ErrorCode::kUnsupported,
        [&] { sparline::soft_top_k(target, args); });
  };
  EXPECT_NO_THROW(sparline::soft_top_k({}, good));
  EXPECT_CONTAINS(error([](SoftTopKArgs& args) { args.temperature = 0.0; }),
                  "soft_top_k: temperature must be positive and finite, got 0. ");
  EXPECT_CONTAINS(error([](SoftTopKArgs& args) { args.scores = {}; }),
                  "soft_top_k: scores must be present, got a null pointer. ");
  EXPECT_CONTAINS(error([](SoftTopKArgs& args) { args.scores.shape[3] = 0; }),
                  "soft_top_k: scores must have at least one row and one column, got (1, 2, 3, 0)");
  EXPECT_CONTAINS(error([&](SoftTopKArgs& args) { args.kappa = view(1, {1, 1, 1, 5}); }),
                  "soft_top_k: kappa must have one element for each of the 6 rows of scores, got "
                  "(1, 1, 1, 5). ");
  EXPECT_CONTAINS(
      error([&](SoftTopKArgs& args) { args.scores = view(0, {1, 2, 3, 4}, DType::kF16); }),
      "soft_top_k: scores must have dtype float32, got float16. ");
  EXPECT_CONTAINS(error([&](SoftTopKArgs& args) { args.soft_map = args.scores; }),
                  "soft_top_k: soft_map is written, so it must not overlap scores");
  EXPECT_CONTAINS(error([](SoftTopKArgs&) {}, {.device = Device::kCUDA, .cuda_arch = 70}),
                  "soft_top_k: the plan must have a backend, got none: ");
  SoftTopKBackwardArgs backward{.d_soft_map = view(0, {1, 2, 3, 4}),
                                .soft_map = view(1, {1, 2, 3, 4}),
                                .d_scores = view(2, {1, 2, 3, 4})};
  EXPECT_NO_THROW(soft_top_k_backward({}, backward));
  backward.d_soft_map = view(0, {1, 2, 3, 5});
  EXPECT_CONTAINS(
      error_text(ErrorCode::kInvalidArgument, [&] { soft_top_k_backward({}, backward); }),
      "soft_top_k_backward: d_soft_map must have shape (1, 2, 3, 4), got (1, 2, 3, 5). ");
}

}  // namespace
}  // namespace sparline::testing
