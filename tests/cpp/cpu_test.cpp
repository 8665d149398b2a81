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
#include <bit>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <limits>

#include "case.h"
#include "laws.h"

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
  Inputs inputs = random_inputs(c);
  std::string misuse;
  const Outputs got = run(c, inputs, &misuse);
  inputs.kept_bits = got.kept_bits;
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
               .block_map = BlockMap::kClass,
               .feature_map = FeatureMap::kSoftmax,
               .linear_scope = LinearScope::kMarginal};
  return c;
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
    EXPECT_NE(compiled_backends().back().find(hwy::TargetName(target)), std::string::npos)
        << compiled_backends().back() << " should name " << hwy::TargetName(target);
    for (uint64_t seed = 1000; seed < 1040; ++seed) check_case(random_case(seed));
  }
}

TEST(Oracle, EveryFeatureMapScopeAndCombination) {
  for (int map = 0; map < 6; ++map) {
    for (int scope = 0; scope < 3; ++scope) {
      for (int combine = 0; combine < 5; ++combine) {
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
    p.bit_rows = 0;
    p.skip = {};
    p.low_bit = {};
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

TEST(Route, GivesTheMeanKeys) {
  for (uint64_t seed = 0; seed < 30; ++seed) check_mean_keys(random_case(seed), seed);
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

TEST(Law, TheMeanKeysOfTheRouterGiveTheSameBits) {
  for (uint64_t seed = 2300; seed < 2300 + 40; ++seed) check_router_means(random_case(seed));
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
  c.problem.block_map = BlockMap::kNone;
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

// Features, each by a law of its own --------------------------------------------------------------

/// Sparse attention over every key, to be given one feature.
Case dense_case() {
  Case c = plain_case();
  c.problem.combine = Combine::kSparse;
  c.problem.block_map = BlockMap::kNone;
  return c;
}

constexpr double kNever = -std::numeric_limits<double>::infinity();

int64_t count_bits(const std::vector<uint8_t>& bytes) {
  int64_t count = 0;
  for (const uint8_t byte : bytes) count += std::popcount(byte);
  return count;
}

TEST(Feature, EveryOneGivesTheSameBitsForAnyNumberOfThreads) {
  const std::function<void(Case&)> features[] = {
      [](Case& c) { c.problem.combine = Combine::kBlend; },
      [](Case& c) {
        c.problem.combine = Combine::kBlend;
        c.problem.block_map = BlockMap::kSoft;
        c.problem.linear_scope = LinearScope::kComplement;
      },
      [](Case& c) { c.problem.bit_rows = 5; },
      [](Case& c) {
        c.problem.skip = {SkipReference::kRunningMax, -0.5, 16};
        c.has_tile_order = true;
      },
      [](Case& c) { c.problem.skip = {SkipReference::kKeptLse, -0.5, 0}; },
      [](Case& c) { c.has_query_order = c.has_key_order = true; },
      [](Case& c) { c.problem.smooth_k = true; },
      [](Case& c) {
        c.problem.low_bit.is_enabled = true;
        c.problem.smooth_k = true;
      },
      [](Case& c) { c.problem.smooth_k = c.brings_k_mean = true; },
  };
  for (size_t n = 0; n < std::size(features); ++n) {
    SCOPED_TRACE(n);
    Case c = plain_case();
    features[n](c);
    check_case(c);
    const Inputs inputs = random_inputs(c);
    std::string misuse;
    const Outputs one = run(c, inputs, &misuse, default_executor(1));
    for (const int num_threads : {2, 5}) {
      expect_same_bits(run(c, inputs, &misuse, default_executor(num_threads)), one, describe(c));
    }
  }
}

TEST(Feature, AnOrderIsAPermutationDoneByHand) {
  Case c = plain_case();
  c.problem.combine = Combine::kBlend;
  c.has_query_order = c.has_key_order = true;
  const Inputs ordered = random_inputs(c);
  std::string misuse;
  const Outputs got = run(c, ordered, &misuse);
  Inputs moved = ordered;
  moved.query_order.clear();
  moved.key_order.clear();
  const auto gather = [](Array& to, const Array& from, const std::vector<int32_t>& order) {
    for (int64_t b = 0; b < from.shape[0]; ++b) {
      for (int64_t h = 0; h < from.shape[1]; ++h) {
        for (size_t n = 0; n < order.size(); ++n) {
          std::copy_n(from.row(b, h, order[n]), from.shape[3], to.row(b, h, int64_t(n)));
        }
      }
    }
  };
  const auto gather_lengths = [](Array& to, const Array& from, const std::vector<int32_t>& order) {
    for (size_t at = 0; at < from.data.size(); at += order.size()) {
      for (size_t n = 0; n < order.size(); ++n) to.data[at + n] = from.data[at + order[n]];
    }
  };
  gather(moved.q, ordered.q, ordered.query_order);
  gather(moved.d_o, ordered.d_o, ordered.query_order);
  gather(moved.k, ordered.k, ordered.key_order);
  gather(moved.v, ordered.v, ordered.key_order);
  gather_lengths(moved.weights.alpha_logit, ordered.weights.alpha_logit, ordered.query_order);
  Outputs want = got;
  gather(want.o, got.o, ordered.query_order);
  gather(want.d_q, got.d_q, ordered.query_order);
  gather(want.d_k, got.d_k, ordered.key_order);
  gather(want.d_v, got.d_v, ordered.key_order);
  gather_lengths(want.lse, got.lse, ordered.query_order);
  gather_lengths(want.d_weights.alpha_logit, got.d_weights.alpha_logit, ordered.query_order);
  c.has_query_order = c.has_key_order = false;
  expect_same_bits(run(c, moved, &misuse), want, "moved by hand");
  EXPECT_EQ(misuse, "");
}

TEST(Feature, ABlendWithoutLinearKeysIsItsSparseBranch) {
  for (const double epsilon : {0.0, 1e-5}) {
    Case c = plain_case();
    c.problem.combine = Combine::kBlend;
    c.problem.epsilon = epsilon;
    Inputs inputs = random_inputs(c);
    for (int8_t& block_class : inputs.block_class) block_class = block_class == 1 ? 1 : -1;
    std::string misuse;
    Outputs got = run(c, inputs, &misuse);
    for (const double value : got.d_weights.alpha_logit.data) EXPECT_EQ(value, 0.0);
    got.d_weights = {};
    c.problem.combine = Combine::kSparse;
    inputs.weights = {};
    expect_same_bits(got, run(c, inputs, &misuse), "blend");
  }
}

TEST(Feature, ASoftMapOfZerosAndOnesIsAMapOfClasses) {
  for (const Combine combine : {Combine::kSparse, Combine::kLinear, Combine::kBlend}) {
    Case c = plain_case();
    c.problem.combine = combine;
    c.problem.linear_scope = LinearScope::kComplement;
    Inputs inputs = random_inputs(c);
    std::string misuse;
    const Outputs want = run(c, inputs, &misuse);
    c.problem.block_map = BlockMap::kSoft;
    inputs.soft_map = Array({2, 4, 3, 7});
    for (size_t n = 0; n < inputs.block_class.size(); ++n) {
      inputs.soft_map.data[n] = inputs.block_class[n] == 1 ? 1.0 : 0.0;
    }
    inputs.block_class.clear();
    Outputs got = run(c, inputs, &misuse);
    got.d_soft_map = {};
    expect_same_bits(got, want, "soft");
    EXPECT_EQ(misuse, "");
  }
}

TEST(Feature, BitsOfAWholeBlockAreClasses) {
  Case c = plain_case();
  c.problem.combine = Combine::kSparse;
  Inputs inputs = random_inputs(c);
  std::string misuse;
  const Outputs want = run(c, inputs, &misuse);
  c.problem.block_map = BlockMap::kNone;
  c.problem.bit_rows = 32;
  inputs.tile_bits.assign(2 * 4 * 3, 0);
  for (size_t n = 0; n < inputs.block_class.size(); ++n) {
    if (inputs.block_class[n] == 1) inputs.tile_bits[n / 7] |= static_cast<uint8_t>(1 << n % 7);
  }
  inputs.block_class.clear();
  expect_same_bits(run(c, inputs, &misuse), want, "bits");
}

TEST(Feature, ARowWithoutABitIsZeroWithMinusInfinity) {
  Case c = dense_case();
  c.problem.bit_rows = 1;
  Inputs inputs = random_inputs(c);
  std::fill(inputs.tile_bits.begin(), inputs.tile_bits.end(), uint8_t{0xFF});
  inputs.tile_bits[5] = 0;  // query 5 of the first head: 7 key blocks fit one byte
  std::string misuse;
  const Outputs got = run(c, inputs, &misuse);
  EXPECT_EQ(got.lse.row(0, 0, 0)[5], -HUGE_VAL);
  for (int64_t d = 0; d < 16; ++d) {
    EXPECT_EQ(got.o.row(0, 0, 5)[d], 0.0);
    EXPECT_EQ(got.d_q.row(0, 0, 5)[d], 0.0);
  }
  EXPECT_TRUE(std::isfinite(got.lse.row(0, 0, 0)[4]));
  EXPECT_EQ(compare(c, got, oracle::attend(c.problem, inputs)), "");
}

TEST(Feature, AThresholdOfMinusInfinitySkipsNothing) {
  Case c = dense_case();
  const Inputs inputs = random_inputs(c);
  std::string misuse;
  const Outputs want = run(c, inputs, &misuse);
  for (const SkipReference reference : {SkipReference::kRunningMax, SkipReference::kKeptLse}) {
    for (const int rows : {0, 16}) {
      c.problem.skip = {reference, kNever, rows};
      Outputs got = run(c, inputs, &misuse);
      // 90 queries are 3 blocks, the last of 26 rows: 6 groups of 16 rows; 7 key blocks.
      EXPECT_EQ(count_bits(got.kept_bits), 2 * 4 * 7 * (rows == 0 ? 3 : 6));
      EXPECT_TRUE(std::ranges::all_of(got.row_votes.data, [](double x) { return x == 0.0; }));
      got.kept_bits.clear();
      got.row_votes = {};
      expect_same_bits(got, want, "dense");
    }
  }
}

TEST(Feature, TheFirstTileIsNeverSkipped) {
  for (const SkipReference reference : {SkipReference::kRunningMax, SkipReference::kKeptLse}) {
    Case c = dense_case();
    c.problem.skip = {reference, -1e-6, 0};
    c.has_tile_order = true;
    c.magnitude = 0.01;  // flat scores: little beats what is there
    const Inputs inputs = random_inputs(c);
    std::string misuse;
    const Outputs got = run(c, inputs, &misuse);
    for (size_t row = 0; row < got.kept_bits.size(); ++row) {  // 7 key blocks: a byte for each row
      EXPECT_TRUE(got.kept_bits[row] >> inputs.tile_order[row % 3 * 7] & 1);
    }
    EXPECT_LT(count_bits(got.kept_bits), 2 * 4 * 3 * 7);
    EXPECT_TRUE(std::ranges::all_of(got.lse.data, [](double x) { return std::isfinite(x); }));
  }
}

TEST(Feature, DynSparseLosesNoMoreThanItsBound) {
  for (const double threshold : {-1.0, -2.0, -4.0}) {
    Case c = dense_case();
    c.problem.num_queries = c.problem.num_keys = 256;
    c.magnitude = 0.3;  // flat rows, where keys add up
    const Inputs inputs = random_inputs(c);
    std::string misuse;
    const Outputs full = run(c, inputs, &misuse);
    c.problem.skip = {SkipReference::kKeptLse, threshold, 0};
    const Outputs kept = run(c, inputs, &misuse);
    EXPECT_LT(count_bits(kept.kept_bits), 2 * 4 * 8 * 16);
    for (int64_t row = 0; row < 2 * 4 * 256; ++row) {
      const auto* bytes = kept.kept_bits.data() + row / 32 * 2;
      const double skipped = 16 - count_bits({bytes, bytes + 2});
      const double recall = std::exp(kept.lse.data[row] - full.lse.data[row]);
      // A skipped tile holds less than block_k e^threshold of the kept energy.
      EXPECT_GE(recall, 1.0 / (1.0 + skipped * 16 * std::exp(threshold)) - 1e-5);
    }
  }
}

/// With v of one key, P = 1 and a step of 1, o is the e4m3 rounding of v and nothing else.
TEST(Feature, ValuesRoundToE4m3) {
  for (const int64_t target : hwy::SupportedAndGeneratedTargets()) {
    SCOPED_TRACE(hwy::TargetName(target));
    const OnTarget on_target(target);
    Case c{.seed = 1};
    c.problem = {.num_queries = 1,
                 .num_keys = 17,
                 .head_dim = 256,
                 .block_q = 16,
                 .block_k = 16,
                 .block_map = BlockMap::kClass,
                 .low_bit = {.is_enabled = true, .p_range = 256.0}};
    Inputs inputs = random_inputs(c);
    inputs.block_class = {-1, 1};  // only key 16 counts; the others set the step
    std::fill(inputs.v.data.begin(), inputs.v.data.end(), 448.0);
    const auto rounded_by_kernel = [&](const std::vector<double>& values) {
      std::copy(values.begin(), values.end(), inputs.v.row(0, 0, 16));
      std::string misuse;
      return run(c, inputs, &misuse).o.data;
    };
    std::vector<double> codes(256), ties(256), wants(256), noise(256), noise_wants(256);
    for (int code = 0; code < 256; ++code) {
      const int exponent = code >> 3 & 15, mantissa = code & 7;
      const double magnitude =
          exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
      const double sign = code < 128 ? 1.0 : -1.0;
      codes[code] = (code & 127) == 127 ? 448.0 : sign * magnitude;  // 127 is NaN
    }
    for (int code = 0; code < 256; ++code) {  // half way to the next code, which the even one gets
      const int magnitude = code & 127;
      if (magnitude >= 126) continue;
      ties[code] = (codes[code] + codes[code + 1]) / 2.0;
      wants[code] = magnitude % 2 == 0 ? codes[code] : codes[code + 1];
    }
    for (int n = 0; n < 256; ++n) {
      noise[n] = rounded(std::ldexp(std::sin(n + 0.5), n % 20 - 11), DType::kF32);
      noise_wants[n] = oracle::e4m3(noise[n]);
    }
    EXPECT_EQ(rounded_by_kernel(codes), codes);
    EXPECT_EQ(rounded_by_kernel(ties), wants);
    EXPECT_EQ(rounded_by_kernel(noise), noise_wants);
  }
}

TEST(Feature, E4m3Saturates) {  // the definition; steps keep the kernels from getting there
  EXPECT_EQ(oracle::e4m3(464.0), 448.0);
  EXPECT_EQ(oracle::e4m3(-1e30), -448.0);
  EXPECT_EQ(oracle::e4m3(0x1p-10), 0.0);
  EXPECT_EQ(oracle::e4m3(0x1.8p-9), 0x1p-8);
}

TEST(Feature, LowBitIsNearTheUnroundedResult) {
  Case c = dense_case();
  c.problem.num_keys = 512;
  c.problem.head_dim = 64;
  const Inputs inputs = random_inputs(c);
  std::string misuse;
  const Outputs want = run(c, inputs, &misuse);
  c.problem.low_bit.is_enabled = true;
  const Outputs got = run(c, inputs, &misuse);
  double difference = 0.0, size = 0.0;
  for (size_t n = 0; n < want.o.data.size(); ++n) {
    difference += std::abs(got.o.data[n] - want.o.data[n]);
    size += std::abs(want.o.data[n]);
  }
  EXPECT_LT(difference / size, 0.06);  // published: 0.04
  EXPECT_GT(difference / size, 0.005);
}

TEST(Feature, SmoothingLeavesTheSparseBranch) {
  Case c = dense_case();
  const Inputs inputs = random_inputs(c);
  std::string misuse;
  const Outputs want = run(c, inputs, &misuse);
  c.problem.smooth_k = true;
  const Outputs got = run(c, inputs, &misuse);
  EXPECT_LT(error(got.o, want.o), 1e-5);
  EXPECT_LT(error(got.d_q, want.d_q), 1e-4);
  EXPECT_LT(error(got.d_k, want.d_k), 1e-4);
}

TEST(Feature, AMeanKeyOfZeroLeavesTheKeys) { check_zero_means(plain_case()); }

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

/// Not under low bit: there exp(S - lse) of the backward has no bound, as S and lse round apart.
TEST(Numbers, HugeScoresOfEveryFeature) {
  const std::function<void(Problem&)> features[] = {
      [](Problem& p) { p.bit_rows = 3; },
      [](Problem& p) { p.smooth_k = true; },
      [](Problem& p) { p.skip = {SkipReference::kRunningMax, -2.0, 16}; },
      [](Problem& p) { p.skip = {SkipReference::kKeptLse, -2.0, 0}; },
  };
  for (size_t n = 0; n < std::size(features); ++n) {
    SCOPED_TRACE(n);
    Case c = plain_case();
    c.problem.combine = Combine::kSparse;
    c.problem.softmax_scale = 1.0;
    c.magnitude = 50.0;
    features[n](c.problem);
    check_case(c, /*slack=*/100.0);
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
  for (const Combine combine :
       {Combine::kSparse, Combine::kLinear, Combine::kSum, Combine::kBlend}) {
    for (const char* where : {"q", "k", "v", "d_o"}) {
      for (const double poison : {std::nan(""), HUGE_VAL, -HUGE_VAL}) {
        Case c = plain_case();
        c.problem.combine = combine;
        c.problem.linear_scope = LinearScope::kAll;
        c.problem.num_kv_heads = 4;
        if (combine == Combine::kBlend) {
          c.problem.smooth_k = c.problem.low_bit.is_enabled = true;
          c.problem.skip = {SkipReference::kKeptLse, -1.0, 16};
        }
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
          std::vector<Array*> rows{&out->lse};
          if (combine == Combine::kBlend) {
            rows.insert(rows.end(), {&out->row_votes, &out->d_weights.alpha_logit});
            const size_t head_bytes = out->kept_bits.size() / 8;
            std::fill_n(out->kept_bits.begin() + head_bytes, head_bytes, uint8_t{0});
          }
          for (Array* array : rows) std::fill_n(array->row(0, 0, 1), array->shape[3], 0.0);
        }
        expect_same_bits(got, want, std::string(where) + " with " + std::to_string(poison));
      }
    }
  }
}

}  // namespace
}  // namespace sparline::testing
