// SPDX-License-Identifier: Apache-2.0
//
// The CPU backend against the oracle, and the laws that hold whatever the numbers are.
//   SPARLINE_CASES=n   random cases on the best SIMD target (default 512)
//   SPARLINE_SEED=s    only the case of this seed
#include "cpu/targets.h"
// Targets first: it chooses what Highway compiles.
#include <gtest/gtest.h>
#include <hwy/highway.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>

#include "case.h"

namespace sparline::testing {
namespace {

using oracle::Array;
using oracle::Inputs;
using oracle::Outputs;

/// Makes the library use one SIMD target for as long as it lives.
class OnTarget {
 public:
  explicit OnTarget(int64_t target) { hwy::SetSupportedTargetsForTest(target); }
  ~OnTarget() { hwy::SetSupportedTargetsForTest(0); }
};

int64_t from_environment(const char* name, int64_t fallback) {
  const char* value = std::getenv(name);
  return value != nullptr ? std::atoll(value) : fallback;
}

void check_case(const Case& c, double slack = 1.0) {
  const Inputs inputs = random_inputs(c);
  std::string misuse;
  const Outputs got = run(c, inputs, &misuse);
  EXPECT_EQ(misuse, "") << describe(c);
  EXPECT_EQ(compare(c, got, oracle::attend(c.problem, inputs), slack), "") << describe(c);
}

Case plain_case() {
  Case c{.seed = 1};
  c.problem = {.batch = 2,
               .num_heads = 4,
               .num_kv_heads = 2,
               .num_queries = 90,
               .num_keys = 100,
               .head_dim = 16,
               .block_q = 32,
               .block_k = 16,
               .combine = Combine::kProjection,
               .has_block_map = true,
               .feature_map = FeatureMap::kSoftmax,
               .linear_scope = LinearScope::kMarginal};
  return c;
}

bool is_same_bits(const Array& a, const Array& b) {
  return a.shape == b.shape &&
         std::equal(a.data.begin(), a.data.end(), b.data.begin(), [](double x, double y) {
           return x == y ? std::signbit(x) == std::signbit(y) : std::isnan(x) && std::isnan(y);
         });
}

void expect_same_bits(const Outputs& a, const Outputs& b, const std::string& what) {
  EXPECT_TRUE(is_same_bits(a.o, b.o)) << what << ": o";
  EXPECT_TRUE(is_same_bits(a.lse, b.lse)) << what << ": lse";
  EXPECT_TRUE(is_same_bits(a.d_q, b.d_q)) << what << ": d_q";
  EXPECT_TRUE(is_same_bits(a.d_k, b.d_k)) << what << ": d_k";
  EXPECT_TRUE(is_same_bits(a.d_v, b.d_v)) << what << ": d_v";
  const auto& g = a.d_weights;
  const auto& w = b.d_weights;
  EXPECT_TRUE(is_same_bits(g.proj_weight, w.proj_weight)) << what << ": d_proj_weight";
  EXPECT_TRUE(is_same_bits(g.proj_bias, w.proj_bias)) << what << ": d_proj_bias";
  EXPECT_TRUE(is_same_bits(g.feature_weight_q, w.feature_weight_q))
      << what << ": d_feature_weight_q";
  EXPECT_TRUE(is_same_bits(g.feature_bias_q, w.feature_bias_q)) << what << ": d_feature_bias_q";
  EXPECT_TRUE(is_same_bits(g.feature_weight_k, w.feature_weight_k))
      << what << ": d_feature_weight_k";
  EXPECT_TRUE(is_same_bits(g.feature_bias_k, w.feature_bias_k)) << what << ": d_feature_bias_k";
}

// Against the oracle -----------------------------------------------------------------------------

TEST(Oracle, RandomCases) {
  const int64_t seed = from_environment("SPARLINE_SEED", -1);
  if (seed >= 0) return check_case(random_case(static_cast<uint64_t>(seed)));
  const int64_t cases = from_environment("SPARLINE_CASES", 512);
  for (int64_t n = 0; n < cases; ++n) check_case(random_case(static_cast<uint64_t>(n)));
}

TEST(Oracle, RandomCasesOnEveryTarget) {
  for (const int64_t target : hwy::SupportedAndGeneratedTargets()) {
    SCOPED_TRACE(hwy::TargetName(target));
    const OnTarget on_target(target);
    EXPECT_NE(compiled_backends()[0].find(hwy::TargetName(target)), std::string::npos)
        << compiled_backends()[0] << " should name " << hwy::TargetName(target);
    for (uint64_t seed = 1000; seed < 1040; ++seed) check_case(random_case(seed));
  }
}

TEST(Oracle, EveryFeatureMapScopeAndCombination) {
  for (int map = 0; map < 6; ++map) {
    for (int scope = 0; scope < 3; ++scope) {
      for (int combine = 0; combine < 4; ++combine) {
        Case c = plain_case();
        c.seed = static_cast<uint64_t>(100 * map + 10 * scope + combine);
        c.problem.num_queries = 50;
        c.problem.num_keys = 60;
        c.problem.feature_map = static_cast<FeatureMap>(map);
        c.problem.linear_scope = static_cast<LinearScope>(scope);
        c.problem.combine = static_cast<Combine>(combine);
        check_case(c);
      }
    }
  }
}

TEST(Oracle, EveryHeadDimension) {
  for (int64_t dim = 4; dim <= 256; dim += dim < 40 ? 2 : 22) {
    Case c = plain_case();
    c.seed = static_cast<uint64_t>(dim);
    c.problem.batch = 1;
    c.problem.num_heads = 2;
    c.problem.num_kv_heads = 1;
    c.problem.num_queries = 37;
    c.problem.num_keys = 45;
    c.problem.head_dim = dim;
    check_case(c);
  }
}

TEST(Oracle, EveryBlockSize) {
  for (int block = 16; block <= 128; block += block < 32 ? 1 : 7) {
    Case c = plain_case();
    c.seed = static_cast<uint64_t>(block);
    c.problem.batch = 1;
    c.problem.num_heads = c.problem.num_kv_heads = 1;
    c.problem.num_queries = c.problem.num_keys = 140;
    c.problem.block_q = block;
    c.problem.block_k = 16 + (block * 37) % 113;
    check_case(c);
  }
}

TEST(Oracle, EveryShortLength) {
  for (int64_t length = 1; length <= 34; ++length) {
    Case c = plain_case();
    c.seed = static_cast<uint64_t>(length);
    c.problem.num_queries = length;
    c.problem.num_keys = 35 - length;
    c.problem.block_q = 16;
    check_case(c);
  }
}

TEST(Oracle, LongSequences) {
  for (const LinearScope scope : {LinearScope::kMarginal, LinearScope::kComplement}) {
    Case c = plain_case();
    c.problem.batch = 1;
    c.problem.num_heads = 2;
    c.problem.num_kv_heads = 1;
    c.problem.num_queries = 900;
    c.problem.num_keys = 1500;
    c.problem.head_dim = 64;
    c.problem.block_q = 64;
    c.problem.linear_scope = scope;
    check_case(c);
  }
}

// Routing ----------------------------------------------------------------------------------------

/// Small integers in blocks of a power of two: pooled scores are exact, so ties are real ties.
TEST(Route, MatchesTheOracleExactlyWhereScoresAreExact) {
  for (uint64_t seed = 0; seed < 60; ++seed) {
    Case c = random_case(seed);
    Problem& p = c.problem;
    p.block_q = p.block_k = 16;
    p.num_queries = (p.num_queries + 15) / 16 * 16;
    p.num_keys = (p.num_keys + 15) / 16 * 16;
    p.query_segments.clear();
    p.key_segments.clear();
    c.rule.smooth_k = false;
    Inputs in = random_inputs(c);
    for (Array* array : {&in.q, &in.k}) {
      for (double& value : array->data) value = std::clamp(std::round(value), -2.0, 2.0);
    }
    std::string misuse;
    EXPECT_EQ(run_route(c, in.q, in.k, &misuse),
              oracle::classify(p, c.rule, oracle::route_scores(p, in.q, in.k)))
        << describe(c);
    EXPECT_EQ(misuse, "") << describe(c);
  }
}

/// Elsewhere rounding may swap near ties: counts are exact, and no class contradicts the scores by
/// more than rounding.
TEST(Route, AgreesWithTheScoresUpToRounding) {
  for (uint64_t seed = 0; seed < 150; ++seed) {
    const Case c = random_case(seed);
    const Problem& p = c.problem;
    const Inputs in = random_inputs(c);
    std::string misuse;
    const std::vector<int8_t> got = run_route(c, in.q, in.k, &misuse);
    EXPECT_EQ(misuse, "") << describe(c);
    const std::vector<double> scores = oracle::route_scores(p, in.q, in.k);
    const std::vector<int8_t> want = oracle::classify(p, c.rule, scores);
    const auto key_rows = oracle::rows_of(p.key_segments, p.num_keys, p.block_k);
    const int64_t columns = oracle::num_blocks(key_rows);
    ASSERT_EQ(got.size(), want.size()) << describe(c);
    for (size_t at = 0; at < want.size(); at += columns) {
      double lowest[3] = {1e30, 1e30, 1e30};  // of each class, and the highest
      double highest[3] = {-1e30, -1e30, -1e30};
      int64_t surplus[3] = {};
      for (int64_t j = 0; j < columns; ++j) {
        const int8_t block_class = got[at + j];
        ASSERT_TRUE(block_class >= -1 && block_class <= 1) << describe(c);
        ++surplus[block_class + 1];
        --surplus[want[at + j] + 1];
        if (block_class == want[at + j]) continue;
        lowest[block_class + 1] = std::min(lowest[block_class + 1], scores[at + j]);
        highest[want[at + j] + 1] = std::max(highest[want[at + j] + 1], scores[at + j]);
      }
      for (int n = 0; n < 3; ++n) {
        EXPECT_EQ(surplus[n], 0) << "count of class " << n - 1 << " in row " << at / columns
                                 << " of " << describe(c);
        if (lowest[n] < 1e30) {
          EXPECT_NEAR(lowest[n], highest[n], 1e-4)
              << "row " << at / columns << " of " << describe(c);
        }
      }
    }
  }
}

TEST(Route, NanRanksLast) {
  Case c = plain_case();
  c.problem.block_k = 16;
  c.problem.num_keys = 96;  // 6 blocks
  c.rule = {.critical_ratio = 0.5, .negligible_ratio = 0.17, .smooth_k = false};
  Inputs in = random_inputs(c);
  for (int64_t b = 0; b < 2; ++b) {
    for (int64_t g = 0; g < 2; ++g) in.k.row(b, g, 5)[3] = std::nan("");
  }
  std::string misuse;
  const auto classes = run_route(c, in.q, in.k, &misuse);
  for (size_t at = 0; at < classes.size(); at += 6) EXPECT_EQ(classes[at], -1);
}

TEST(Route, EqualScoresKeepTheOrderOfTheBlocks) {
  for (const bool smooth_k : {false, true}) {
    Case c = plain_case();
    c.problem.num_keys = 160;  // 10 blocks
    c.rule = {.critical_ratio = 0.3, .negligible_ratio = 0.2, .smooth_k = smooth_k};
    Inputs in = random_inputs(c);
    in.k = Array(in.k.shape, 1.0);
    std::string misuse;
    const auto classes = run_route(c, in.q, in.k, &misuse);
    const std::vector<int8_t> row{1, 1, 1, 0, 0, 0, 0, 0, -1, -1};
    for (size_t at = 0; at < classes.size(); at += 10) {
      EXPECT_EQ(std::vector<int8_t>(classes.begin() + at, classes.begin() + at + 10), row);
    }
  }
}

// Laws -------------------------------------------------------------------------------------------

TEST(Law, ResultsDoNotDependOnTheNumberOfThreads) {
  for (uint64_t seed = 2000; seed < 2030; ++seed) {
    const Case c = random_case(seed);
    const Inputs inputs = random_inputs(c);
    std::string misuse;
    const Outputs one = run(c, inputs, &misuse, default_executor(1));
    const auto route_one = run_route(c, inputs.q, inputs.k, &misuse, default_executor(1));
    for (const int num_threads : {2, 3, 5}) {
      const Executor executor = default_executor(num_threads);
      expect_same_bits(run(c, inputs, &misuse, executor), one,
                       std::to_string(num_threads) + " threads, " + describe(c));
      EXPECT_EQ(run_route(c, inputs.q, inputs.k, &misuse, executor), route_one) << describe(c);
    }
    EXPECT_EQ(misuse, "") << describe(c);
  }
}

/// Backwards and on one thread: an executor may take any order.
void backwards(int, int64_t count, void (*body)(void*, int64_t), void* context) {
  for (int64_t idx = count - 1; idx >= 0; --idx) body(context, idx);
}

TEST(Law, ResultsDoNotDependOnTheOrderOfTheLoop) {
  const Executor reversed{.num_threads = 4, .parallel_for = backwards};
  for (uint64_t seed = 2100; seed < 2120; ++seed) {
    const Case c = random_case(seed);
    const Inputs inputs = random_inputs(c);
    std::string misuse;
    expect_same_bits(run(c, inputs, &misuse, reversed), run(c, inputs, &misuse), describe(c));
    EXPECT_EQ(misuse, "") << describe(c);
  }
}

TEST(Law, LayoutsGiveTheSameBits) {
  for (uint64_t seed = 2200; seed < 2220; ++seed) {
    Case c = random_case(seed);
    const Inputs inputs = random_inputs(c);
    std::string misuse;
    c.layout = Layout::kBHND;
    const Outputs packed = run(c, inputs, &misuse);
    for (const Layout layout : {Layout::kBNHD, Layout::kPadded}) {
      c.layout = layout;
      expect_same_bits(run(c, inputs, &misuse), packed, describe(c));
    }
  }
}

TEST(Law, AllCriticalIsDenseAttention) {
  Case c = plain_case();
  c.problem.combine = Combine::kSparse;
  Inputs inputs = random_inputs(c);
  std::fill(inputs.block_class.begin(), inputs.block_class.end(), int8_t{1});
  std::string misuse;
  const Outputs mapped = run(c, inputs, &misuse);
  c.problem.has_block_map = false;
  inputs.block_class.clear();
  expect_same_bits(run(c, inputs, &misuse), mapped, "dense");
}

TEST(Law, BatchItemsDoNotSeeEachOther) {
  Case c = plain_case();
  const Inputs both = random_inputs(c);
  std::string misuse;
  const Outputs together = run(c, both, &misuse);
  const auto half = [](const auto& data, size_t n) {
    using Data = std::decay_t<decltype(data)>;
    return Data(data.begin() + n * (data.size() / 2), data.begin() + (n + 1) * (data.size() / 2));
  };
  c.problem.batch = 1;
  for (size_t n = 0; n < 2; ++n) {
    Inputs one;
    const std::pair<Array*, const Array*> parts[] = {
        {&one.q, &both.q}, {&one.k, &both.k}, {&one.v, &both.v}, {&one.d_o, &both.d_o}};
    for (const auto& [to, from] : parts) {
      to->shape = from->shape;
      to->shape[0] = 1;
      to->data = half(from->data, n);
    }
    one.block_class = half(both.block_class, n);
    one.weights = both.weights;
    const Outputs alone = run(c, one, &misuse);
    EXPECT_EQ(alone.o.data, half(together.o.data, n));
    EXPECT_EQ(alone.d_q.data, half(together.d_q.data, n));
    EXPECT_EQ(alone.d_k.data, half(together.d_k.data, n));
    EXPECT_EQ(alone.d_v.data, half(together.d_v.data, n));
  }
}

// Hard numbers -----------------------------------------------------------------------------------

TEST(Numbers, HugeScores) {
  for (const Combine combine : {Combine::kSparse, Combine::kProjection}) {
    Case c = plain_case();
    c.problem.combine = combine;
    c.problem.softmax_scale = 1.0;
    c.magnitude = 50.0;              // scores of +-1e4
    check_case(c, /*slack=*/100.0);  // a score of 1e4 is itself rounded by 5e-4
  }
}

TEST(Numbers, ConstantRows) {
  for (const FeatureMap map : {FeatureMap::kSoftmax, FeatureMap::kElu1, FeatureMap::kHedgehog}) {
    Case c = plain_case();
    c.problem.feature_map = map;
    Inputs inputs = random_inputs(c);
    std::fill(inputs.q.data.begin(), inputs.q.data.end(), 1.0);
    std::fill(inputs.k.data.begin(), inputs.k.data.end(), 1.0);
    std::string misuse;
    EXPECT_EQ(compare(c, run(c, inputs, &misuse), oracle::attend(c.problem, inputs)), "");
  }
}

TEST(Numbers, TinyDenominators) {
  // elu1 of very negative rows: every weight is near e^-60, and their sum still divides.
  Case c = plain_case();
  c.problem.combine = Combine::kLinear;
  c.problem.feature_map = FeatureMap::kElu1;
  Inputs inputs = random_inputs(c);
  for (double& value : inputs.q.data) value -= 30.0;
  for (double& value : inputs.k.data) value -= 30.0;
  std::string misuse;
  const Outputs want = oracle::attend(c.problem, inputs);
  const Outputs got = run(c, inputs, &misuse);
  EXPECT_LT(error(got.o, want.o), 1e-4);
  EXPECT_LT(error(got.d_v, want.d_v), 1e-4);
}

TEST(Numbers, ARowWithoutCriticalKeysIsZeroWithMinusInfinity) {
  Case c = plain_case();
  c.problem.combine = Combine::kSparse;
  Inputs inputs = random_inputs(c);
  std::fill(inputs.block_class.begin(), inputs.block_class.end(), int8_t{-1});
  std::string misuse;
  const Outputs got = run(c, inputs, &misuse);
  EXPECT_TRUE(std::ranges::all_of(got.o.data, [](double x) { return x == 0.0; }));
  EXPECT_TRUE(std::ranges::all_of(got.lse.data, [](double x) { return x == -HUGE_VAL; }));
  for (const Array* gradient : {&got.d_q, &got.d_k, &got.d_v}) {
    EXPECT_TRUE(std::ranges::all_of(gradient->data, [](double x) { return x == 0.0; }));
  }
}

TEST(Numbers, AnEmptyLinearSetLeavesTheBias) {
  Case c = plain_case();
  Inputs inputs = random_inputs(c);
  std::fill(inputs.block_class.begin(), inputs.block_class.end(), int8_t{-1});
  std::string misuse;
  const Outputs got = run(c, inputs, &misuse);
  for (size_t n = 0; n < got.o.data.size(); ++n) {
    EXPECT_EQ(got.o.data[n], inputs.weights.proj_bias.data[n % 16]);
  }
}

/// A NaN or infinity in one head reaches no other head and no other batch item.
TEST(Numbers, NanStaysInItsHead) {
  for (const Combine combine : {Combine::kSparse, Combine::kLinear, Combine::kSum}) {
    for (const char* where : {"q", "k", "v", "d_o"}) {
      for (const double poison : {std::nan(""), HUGE_VAL, -HUGE_VAL}) {
        Case c = plain_case();
        c.problem.combine = combine;
        c.problem.linear_scope = LinearScope::kAll;
        c.problem.num_kv_heads = 4;
        const Inputs clean = random_inputs(c);
        Inputs inputs = clean;
        Array& target = where[0] == 'q'   ? inputs.q
                        : where[0] == 'k' ? inputs.k
                        : where[0] == 'v' ? inputs.v
                                          : inputs.d_o;
        target.row(0, 1, 20)[3] = poison;
        std::string misuse;
        Outputs got = run(c, inputs, &misuse);
        Outputs want = run(c, clean, &misuse);
        EXPECT_EQ(misuse, "");
        for (Outputs* out : {&got, &want}) {  // what batch item 0, head 1 holds is free
          for (Array* array : {&out->o, &out->d_q, &out->d_k, &out->d_v}) {
            double* const begin = array->row(0, 1, 0);
            std::fill(begin, begin + array->shape[2] * array->shape[3], 0.0);
          }
          std::fill(out->lse.row(0, 0, 1), out->lse.row(0, 0, 1) + out->lse.shape[3], 0.0);
        }
        expect_same_bits(got, want, std::string(where) + " with " + std::to_string(poison));
      }
    }
  }
}

}  // namespace
}  // namespace sparline::testing
