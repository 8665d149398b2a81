// SPDX-License-Identifier: Apache-2.0
//
// The router against its definition: float64, one row, key and block at a time. Scores that differ
// by less than float32 rounding may rank either way; counts, prefixes and masses may not.
#include "cpu/targets.h"
// Targets first: it chooses what Highway compiles.
#include <gtest/gtest.h>
#include <hwy/highway.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <sstream>

#include "error_text.h"
#include "memory.h"
#include "sparline/attention.h"

namespace sparline::testing {
namespace {

using oracle::Array;
using Vector = std::vector<double>;

class Dice {
 public:
  explicit Dice(uint64_t seed) : engine_(seed * 0x9E3779B97F4A7C15ULL + 7) {}
  int64_t between(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(engine_() % static_cast<uint64_t>(high - low + 1));
  }
  double uniform() { return static_cast<double>(engine_() >> 11) * 0x1p-53; }
  bool chance(double probability) { return uniform() < probability; }
  double normal() {
    return std::sqrt(-2.0 * std::log(1.0 - uniform())) * std::cos(2.0 * M_PI * uniform());
  }
  template <class T>
  T pick(std::initializer_list<T> choices) {
    return choices.begin()[between(0, static_cast<int64_t>(choices.size()) - 1)];
  }
  Array array(std::array<int64_t, 4> shape, double deviation, DType dtype) {
    Array array(shape);
    for (double& value : array.data) value = rounded(deviation * normal(), dtype);
    return array;
  }
  std::vector<int32_t> permutation(int64_t length) {
    std::vector<int32_t> order(length);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), engine_);
    return order;
  }

 private:
  std::mt19937_64 engine_;
};

/// A call of route() with its inputs; absent ones are empty.
struct Call {
  uint64_t seed = 0;
  Problem problem{};
  RouteRule rule{};
  Layout layout = Layout::kBHND;
  Array q{}, k{}, proj_q{}, proj_k{};
  std::vector<int32_t> query_order{}, key_order{};
};

std::vector<Segment> random_segments(Dice& dice, int64_t length, int num_sequences) {
  std::vector<int64_t> cuts{0, length};
  for (int n = 1; n < num_sequences; ++n) cuts.push_back(dice.between(0, length));
  std::sort(cuts.begin(), cuts.end());
  std::vector<Segment> segments;
  for (int sequence = 0; sequence < num_sequences; ++sequence) {
    const int64_t middle = dice.between(cuts[sequence], cuts[sequence + 1]);
    segments.push_back({cuts[sequence], middle, sequence, dice.chance(0.3)});
    segments.push_back({middle, cuts[sequence + 1], sequence, dice.chance(0.3)});
  }
  return segments;
}

/// Rows that wander: neighbours resemble each other, so that blocks have similarities of all sizes.
void smooth_rows(Dice& dice, Array& x, DType dtype) {
  for (int64_t b = 0; b < x.shape[0]; ++b) {
    for (int64_t h = 0; h < x.shape[1]; ++h) {
      const double pace = dice.pick({0.05, 0.2, 0.5});
      for (int64_t n = 1; n < x.shape[2]; ++n) {
        for (int64_t d = 0; d < x.shape[3]; ++d) {
          double& value = x.row(b, h, n)[d];
          value = rounded((1.0 - pace) * x.row(b, h, n - 1)[d] + pace * value, dtype);
        }
      }
    }
  }
}

Call random_call(uint64_t seed) {
  Dice dice(seed);
  Call call{.seed = seed};
  Problem& p = call.problem;
  p.batch = dice.between(1, 2);
  p.num_kv_heads = dice.between(1, 2);
  p.num_heads = p.num_kv_heads * dice.between(1, 3);
  p.num_queries = dice.between(1, 150);
  p.num_keys = dice.chance(0.2) ? dice.between(1, 20) : dice.between(1, 400);
  p.head_dim = dice.pick<int64_t>({4, 6, 10, 16, 24, 64, 80});
  p.dtype = dice.pick({DType::kF32, DType::kF32, DType::kBF16, DType::kF16});
  p.block_q = dice.pick({16, 24, 33, 64});
  p.block_k = dice.pick({16, 16, 24, 33, 64});
  p.softmax_scale = dice.chance(0.6) ? 0.0 : dice.pick({0.02, 2.0});
  if (dice.chance(0.5)) {
    const int sequences = static_cast<int>(dice.between(1, 3));
    p.query_segments = random_segments(dice, p.num_queries, sequences);
    p.key_segments = random_segments(dice, p.num_keys, sequences);
  }
  RouteRule& rule = call.rule;
  rule.selection =
      dice.pick({Selection::kTopK, Selection::kTopP, Selection::kUnion, Selection::kIntersection});
  rule.critical_ratio = dice.pick({0.0, 0.05, 0.3, 0.5, 1.0});
  rule.critical_count = dice.chance(0.2) ? dice.pick<int64_t>({1, 3, 1000}) : 0;
  rule.critical_mass = dice.pick({0.0, 0.1, 0.5, 0.9, 0.98, 1.0});
  rule.negligible_ratio = dice.pick({0.0, 0.1, 0.4, 1.0});
  rule.rounding = dice.pick({CountRounding::kFloor, CountRounding::kRound, CountRounding::kCeil});
  rule.smooth_k = dice.chance(0.5);
  rule.is_longest_prefix = dice.chance(0.4);
  rule.min_similarity = dice.chance(0.5) ? -1.0 : dice.pick({-0.1, 0.2, 0.6, 0.9});
  call.layout = dice.pick({Layout::kBHND, Layout::kBNHD, Layout::kPadded});
  const int64_t dim = p.head_dim;
  call.q = dice.array({p.batch, p.num_heads, p.num_queries, dim}, 1.0, p.dtype);
  call.k = dice.array({p.batch, p.num_kv_heads, p.num_keys, dim}, 1.0, p.dtype);
  if (rule.min_similarity > 0.0) {
    smooth_rows(dice, call.q, p.dtype);
    smooth_rows(dice, call.k, p.dtype);
  }
  if (dice.chance(0.5)) {
    const double deviation = 1.0 / std::sqrt(static_cast<double>(dim));
    call.proj_q =
        dice.array({1, dice.chance(0.5) ? 1 : p.num_heads, dim, dim}, deviation, DType::kF32);
    call.proj_k =
        dice.array({1, dice.chance(0.5) ? 1 : p.num_heads, dim, dim}, deviation, DType::kF32);
  }
  if (dice.chance(0.4)) call.query_order = dice.permutation(p.num_queries);
  if (dice.chance(0.4)) call.key_order = dice.permutation(p.num_keys);
  return call;
}

std::string describe(const Call& call) {
  const Problem& p = call.problem;
  const RouteRule& rule = call.rule;
  std::ostringstream out;
  out << "random_call(" << call.seed << ")  // B " << p.batch << " H " << p.num_heads << " H_kv "
      << p.num_kv_heads << " N_q " << p.num_queries << " N_k " << p.num_keys << " D " << p.head_dim
      << " " << name(p.dtype) << " blocks " << p.block_q << "x" << p.block_k << " selection "
      << static_cast<int>(rule.selection) << " ratio " << rule.critical_ratio << " count "
      << rule.critical_count << " mass " << rule.critical_mass << " longest "
      << rule.is_longest_prefix << " negligible " << rule.negligible_ratio << " smooth "
      << rule.smooth_k << " similarity " << rule.min_similarity << " projections "
      << call.proj_q.shape[1] << "," << call.proj_k.shape[1] << " segments "
      << p.query_segments.size() << " orders " << !call.query_order.empty()
      << !call.key_order.empty();
  return out.str();
}

TensorView order_view(const std::vector<int32_t>& order) {
  if (order.empty()) return {};
  return contiguous_view(const_cast<int32_t*>(order.data()), DType::kI32,
                         {1, 1, 1, static_cast<int64_t>(order.size())});
}

/// The classes that the library finds, with guards around all memory.
std::vector<int8_t> run(const Call& call, int num_threads = 2) {
  const Problem& p = call.problem;
  const Plan plan = sparline::plan(p, {.num_threads = num_threads});
  const Executor executor = default_executor(num_threads);
  const GuardedTensor q(p.dtype, call.q, call.layout), k(p.dtype, call.k, call.layout);
  GuardedTensor proj_q, proj_k;
  if (!call.proj_q.empty()) proj_q = GuardedTensor(DType::kF32, call.proj_q);
  if (!call.proj_k.empty()) proj_k = GuardedTensor(DType::kF32, call.proj_k);
  const GuardedTensor block_class(
      DType::kI8,
      {p.batch, p.num_heads, int64_t(plan.query_blocks.size()), int64_t(plan.key_blocks.size())});
  GuardedWorkspace space(plan.route_workspace_bytes);
  route(plan,
        {.q = q.view(),
         .k = k.view(),
         .rule = call.rule,
         .proj_q = proj_q.view(),
         .proj_k = proj_k.view(),
         .query_order = order_view(call.query_order),
         .key_order = order_view(call.key_order),
         .block_class = block_class.view()},
        space.span(), {.executor = &executor});
  EXPECT_EQ(block_class.misuse() + space.misuse(), "") << describe(call);
  std::vector<int8_t> classes;
  for (double value : block_class.load().data) classes.push_back(static_cast<int8_t>(value));
  return classes;
}

// The definition ---------------------------------------------------------------------------------

double dot(const Vector& x, const Vector& y) {
  return std::inner_product(x.begin(), x.end(), y.begin(), 0.0);
}

/// One head of q or k: blocks of float64 rows, in the order of the positions.
struct Axis {
  std::vector<Block> blocks;
  std::vector<Vector> rows;

  Axis(const Array& x, int64_t b, int64_t h, const std::vector<int32_t>& order,
       const std::vector<Segment>& segments, int block_rows) {
    blocks = make_blocks(segments, x.shape[2], block_rows);
    for (int64_t n = 0; n < x.shape[2]; ++n) {
      const double* row = x.row(b, h, order.empty() ? n : order[n]);
      rows.emplace_back(row, row + x.shape[3]);
    }
  }

  void smooth() {
    std::vector<Vector> smoothed = rows;
    for (const Block& block : blocks) {
      Vector sum(rows[0].size());
      double count = 0.0;
      for (const Block& other : blocks) {
        if (other.sequence != block.sequence) continue;
        for (int64_t n = other.begin; n < other.begin + other.rows; ++n, ++count) {
          for (size_t d = 0; d < sum.size(); ++d) sum[d] += rows[n][d];
        }
      }
      for (int64_t n = block.begin; n < block.begin + block.rows; ++n) {
        for (size_t d = 0; d < sum.size(); ++d) smoothed[n][d] -= sum[d] / count;
      }
    }
    rows = smoothed;
  }

  Vector pooled(const Block& block) const {
    Vector mean(rows[0].size());
    for (int64_t n = block.begin; n < block.begin + block.rows; ++n) {
      for (size_t d = 0; d < mean.size(); ++d) mean[d] += rows[n][d] / block.rows;
    }
    return mean;
  }

  double similarity(const Block& block) const {
    double sum = 0.0;
    for (int64_t m = block.begin; m < block.begin + block.rows; ++m) {
      for (int64_t n = block.begin; n < block.begin + block.rows; ++n) {
        const double lengths = std::sqrt(dot(rows[m], rows[m]) * dot(rows[n], rows[n]));
        if (lengths > 0.0) sum += dot(rows[m], rows[n]) / lengths;
      }
    }
    return sum / (double(block.rows) * double(block.rows));
  }
};

Vector projected(const Vector& x, const Array& weights, int64_t h) {
  if (weights.empty()) return x;
  Vector y;
  for (size_t d = 0; d < x.size(); ++d) {
    const double* row = weights.row(0, weights.shape[1] == 1 ? 0 : h, static_cast<int64_t>(d));
    y.push_back(dot(x, Vector(row, row + x.size())));
  }
  return y;
}

int64_t count(double ratio, int64_t num, CountRounding rounding) {
  const double exact = ratio * static_cast<double>(num);
  const auto below = static_cast<int64_t>(exact);
  const double rest = exact - static_cast<double>(below);
  if (rounding == CountRounding::kRound) return below + (rest >= 0.5);
  if (rounding == CountRounding::kCeil) return below + (rest > 0.0);
  return below;
}

/// How many blocks top-p takes of probabilities in falling order, were its mass `mass`.
int64_t count_of_mass(const RouteRule& rule, const Vector& probabilities, double mass) {
  int64_t num = 0;
  double sum = 0.0;
  for (double p : probabilities) {
    if (rule.is_longest_prefix ? sum + p > mass : sum >= mass) break;
    sum += p;
    ++num;
  }
  return std::max<int64_t>(num, 1);
}

/// What is wrong with one row of classes; empty if nothing. `scores` are float64 and unscaled, and
/// off by at most `rounding`.
std::string check_ranking(const RouteRule& rule, int64_t num_free, const Vector& scores,
                          const std::vector<int8_t>& classes, double scale, double rounding) {
  std::ostringstream wrong;
  const auto num = static_cast<int64_t>(scores.size());
  const int64_t num_critical = std::count(classes.begin(), classes.end(), int8_t{1});
  const int64_t num_negligible = std::count(classes.begin(), classes.end(), int8_t{-1});

  Vector probabilities;
  const double largest = *std::max_element(scores.begin(), scores.end());
  for (double score : scores) probabilities.push_back(std::exp(scale * (score - largest)));
  const double total = std::accumulate(probabilities.begin(), probabilities.end(), 0.0);
  for (double& p : probabilities) p /= total;
  std::sort(probabilities.rbegin(), probabilities.rend());
  const double slack = 1e-6 + 2.0 * scale * rounding;
  int64_t low = count_of_mass(rule, probabilities, rule.critical_mass - slack);
  int64_t high = count_of_mass(rule, probabilities, rule.critical_mass + slack);
  if (rule.critical_mass == 1.0) low = high = num;
  const int64_t asked = rule.critical_count > 0
                            ? rule.critical_count
                            : count(rule.critical_ratio, num_free, rule.rounding);
  const int64_t top_k = std::min(num, std::max<int64_t>(asked, 1));
  if (rule.selection == Selection::kTopK) low = high = top_k;
  if (rule.selection == Selection::kUnion) low = std::max(low, top_k), high = std::max(high, top_k);
  if (rule.selection == Selection::kIntersection)
    low = std::min(low, top_k), high = std::min(high, top_k);
  if (num_critical < low || num_critical > high)
    wrong << num_critical << " critical, not " << low << ".." << high << "; ";
  const int64_t expected =
      std::min(num - num_critical, count(rule.negligible_ratio, num_free, rule.rounding));
  if (num_negligible != expected)
    wrong << num_negligible << " negligible, not " << expected << "; ";
  for (size_t x = 0; x < scores.size(); ++x) {
    for (size_t y = 0; y < scores.size(); ++y) {
      if (classes[x] > classes[y] && scores[x] < scores[y] - rounding)
        wrong << "block " << x << " of class " << int(classes[x]) << " scores below block " << y
              << " of class " << int(classes[y]) << "; ";
    }
  }
  return wrong.str();
}

/// How many rows had something to rank.
int64_t check(const Call& call) {
  const Problem& p = call.problem;
  const RouteRule& rule = call.rule;
  const std::vector<int8_t> classes = run(call);
  const double scale =
      p.softmax_scale == 0.0 ? 1.0 / std::sqrt(double(p.head_dim)) : p.softmax_scale;
  constexpr double kCosineRounding = 1e-4;
  size_t at = 0;
  int64_t num_ranked_rows = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t h = 0; h < p.num_heads; ++h) {
      const Axis q(call.q, b, h, call.query_order, p.query_segments, p.block_q);
      Axis k(call.k, b, h / (p.num_heads / p.num_kv_heads), call.key_order, p.key_segments,
             p.block_k);
      if (rule.smooth_k) k.smooth();
      const auto num_keys = static_cast<int64_t>(k.blocks.size());
      std::vector<Vector> w;
      Vector unlike;  // how far the similarity lies below the least
      for (const Block& block : k.blocks) {
        w.push_back(projected(k.pooled(block), call.proj_k, h));
        unlike.push_back(rule.min_similarity - k.similarity(block));
      }
      for (size_t i = 0; i < q.blocks.size(); ++i, at += num_keys) {
        const Block& query = q.blocks[i];
        const Vector u = projected(q.pooled(query), call.proj_q, h);
        const double query_unlike = rule.min_similarity - q.similarity(query);
        const std::string where = "row " + std::to_string(i) + " of (" + std::to_string(b) + ", " +
                                  std::to_string(h) + ") of " + describe(call);
        Vector scores;
        std::vector<int8_t> ranked;
        int64_t num_free = 0;
        double rounding = 1e-6;
        bool is_unsure = std::abs(query_unlike) < kCosineRounding;
        for (int64_t j = 0; j < num_keys; ++j) {
          const int8_t found = classes[at + j];
          if (k.blocks[j].sequence != query.sequence) {
            EXPECT_EQ(found, -1) << "key block " << j << ", " << where;
          } else if (query.is_protected || k.blocks[j].is_protected) {
            EXPECT_EQ(found, 1) << "key block " << j << ", " << where;
          } else if (!is_unsure && query_unlike > 0.0) {
            EXPECT_EQ(found, 1) << "key block " << j << ", " << where;
          } else {
            ++num_free;
            is_unsure |= std::abs(unlike[j]) < kCosineRounding;
            if (unlike[j] > 0.0) {
              if (!is_unsure) {
                EXPECT_EQ(found, 1) << "key block " << j << ", " << where;
              }
              continue;
            }
            scores.push_back(dot(u, w[j]));
            ranked.push_back(found);
            rounding = std::max(rounding, 1e-5 * std::sqrt(dot(u, u) * dot(w[j], w[j])));
          }
        }
        if (is_unsure || scores.empty()) continue;
        ++num_ranked_rows;
        EXPECT_EQ(check_ranking(rule, num_free, scores, ranked, scale, rounding), "") << where;
      }
    }
  }
  return num_ranked_rows;
}

// Against the definition -------------------------------------------------------------------------

TEST(RouteRules, RandomCalls) {
  int64_t num_ranked_rows = 0;
  for (uint64_t seed = 0; seed < 250; ++seed) num_ranked_rows += check(random_call(seed));
  EXPECT_GT(num_ranked_rows, 1000);  // and not all skipped
}

TEST(RouteRules, RandomCallsOnEveryTarget) {
  for (const int64_t target : hwy::SupportedAndGeneratedTargets()) {
    SCOPED_TRACE(hwy::TargetName(target));
    hwy::SetSupportedTargetsForTest(target);
    for (uint64_t seed = 1000; seed < 1040; ++seed) check(random_call(seed));
  }
  hwy::SetSupportedTargetsForTest(0);
}

// Rows of known scores ---------------------------------------------------------------------------

/// One query block whose score for key block j is scores[j], with a softmax scale of 1.
Call call_of_scores(const Vector& scores, const RouteRule& rule) {
  Call call;
  call.problem = {.num_queries = 16,
                  .num_keys = 16 * static_cast<int64_t>(scores.size()),
                  .head_dim = 4,
                  .block_q = 16,
                  .block_k = 16,
                  .softmax_scale = 1.0};
  call.rule = rule;
  call.rule.smooth_k = false;
  call.q = Array({1, 1, 16, 4}, 1.0);
  call.k = Array({1, 1, call.problem.num_keys, 4});
  for (int64_t n = 0; n < call.problem.num_keys; ++n) call.k.row(0, 0, n)[0] = scores[n / 16];
  return call;
}

int64_t num_critical(const Vector& scores, const RouteRule& rule) {
  const std::vector<int8_t> classes = run(call_of_scores(scores, rule));
  const int64_t num = std::count(classes.begin(), classes.end(), int8_t{1});
  return num;
}

TEST(RouteRules, MassOfEqualScoresIsACount) {
  const Vector equal(8, 1.0);
  for (int n = 0; n <= 8; ++n) {
    for (const bool is_longest_prefix : {false, true}) {
      RouteRule rule{.selection = Selection::kTopP,
                     .critical_mass = n / 8.0,
                     .negligible_ratio = 0.0,
                     .is_longest_prefix = is_longest_prefix};
      EXPECT_EQ(num_critical(equal, rule), std::max(n, 1));
      rule.critical_mass = std::min(1.0, (n + 0.5) / 8.0);  // between two sums
      EXPECT_EQ(num_critical(equal, rule), std::clamp(is_longest_prefix ? n : n + 1, 1, 8));
    }
  }
}

TEST(RouteRules, MassIsASoftmaxOfScaledScores) {
  const Vector scores{std::log(5.0), 0.0, std::log(3.0), std::log(0.5), std::log(0.5)};  // of 10
  RouteRule rule{.selection = Selection::kTopP, .negligible_ratio = 0.0};
  const std::pair<double, int64_t> expected[] = {{0.0, 1},  {0.45, 1}, {0.55, 2}, {0.75, 2},
                                                 {0.85, 3}, {0.92, 4}, {0.97, 5}, {1.0, 5}};
  for (const auto& [mass, num] : expected) {
    rule.critical_mass = mass;
    EXPECT_EQ(num_critical(scores, rule), num) << mass;
  }
  Call call = call_of_scores(scores, rule);  // a larger scale makes the best weigh more
  call.rule.critical_mass = 0.9;
  call.problem.softmax_scale = 10.0;
  EXPECT_EQ(run(call), (std::vector<int8_t>{1, 0, 0, 0, 0}));
}

TEST(RouteRules, UnionAndIntersectionArePrefixesToo) {
  const Vector scores{3.0, 0.0, 2.0, 1.0, -1.0, -2.0};
  for (const double ratio : {0.0, 0.17, 0.34, 0.5, 0.67, 1.0}) {
    for (const double mass : {0.0, 0.5, 0.8, 0.95, 1.0}) {
      RouteRule rule{.critical_ratio = ratio, .critical_mass = mass, .negligible_ratio = 0.0};
      const int64_t top_k = num_critical(scores, rule);
      rule.selection = Selection::kTopP;
      const int64_t top_p = num_critical(scores, rule);
      rule.selection = Selection::kUnion;
      EXPECT_EQ(num_critical(scores, rule), std::max(top_k, top_p));
      rule.selection = Selection::kIntersection;
      EXPECT_EQ(num_critical(scores, rule), std::min(top_k, top_p));
    }
  }
}

TEST(RouteRules, TiesAtTheCutGoToTheLowerIndex) {
  const RouteRule rule{
      .selection = Selection::kTopP, .critical_mass = 0.5, .negligible_ratio = 0.25};
  EXPECT_EQ(run(call_of_scores({0.0, -0.0, 0.0, -0.0}, rule)), (std::vector<int8_t>{1, 1, 0, -1}));
  // Products that underflow are zeros of both signs, and equal too.
  Call call = call_of_scores(Vector(4, 0.0), rule);
  for (int64_t n = 0; n < 16; ++n) call.q.row(0, 0, n)[3] = 1e-30;
  for (int64_t n = 0; n < 64; ++n) call.k.row(0, 0, n)[3] = n / 16 % 2 == 0 ? -1e-30 : 1e-30;
  EXPECT_EQ(run(call), (std::vector<int8_t>{1, 1, 0, -1}));
}

// Similarity -------------------------------------------------------------------------------------

/// Three blocks of keys: equal rows, rows of both signs, zeros.
Call call_of_similarities(double min_similarity) {
  RouteRule rule{.critical_ratio = 0.0, .negligible_ratio = 0.0};
  rule.min_similarity = min_similarity;
  Call call = call_of_scores({1.0, 5.0, 0.0, 0.5}, rule);
  for (int64_t n = 16; n < 32; n += 2) call.k.row(0, 0, n)[0] = -5.0;
  return call;
}

TEST(RouteRules, BlocksThatAreNotAlikeAreCriticalAndNotRanked) {
  EXPECT_EQ(run(call_of_similarities(-1.0)), (std::vector<int8_t>{1, 0, 0, 0}));
  // Rows of opposite signs, and zeros, have no cosine in common. The first still is the best.
  EXPECT_EQ(run(call_of_similarities(0.5)), (std::vector<int8_t>{1, 1, 1, 0}));
  Call call = call_of_similarities(0.5);  // a query block that is not alike attends everything
  for (int64_t n = 0; n < 16; n += 2) {
    for (int64_t d = 0; d < 4; ++d) call.q.row(0, 0, n)[d] = -1.0;
  }
  EXPECT_EQ(run(call), (std::vector<int8_t>{1, 1, 1, 1}));
}

TEST(RouteRules, SimilarityKnowsNoLength) {
  for (const double length : {1e-38, 1e-20, 1.0, 1e20, 1e38}) {
    Call call = call_of_similarities(0.9);
    for (int64_t n = 0; n < 16; ++n) call.k.row(0, 0, n)[0] = length * (n % 2 == 0 ? 1.0 : 1e-3);
    for (int64_t n = 48; n < 64; ++n) call.k.row(0, 0, n)[0] = length * (n % 2 == 0 ? 1.0 : -1.0);
    const std::vector<int8_t> classes = run(call);  // block 0 is alone in the ranking
    EXPECT_EQ(classes, (std::vector<int8_t>{1, 1, 1, 1})) << length;
    call.rule.selection = Selection::kTopP;
    EXPECT_EQ(run(call), classes) << length;
  }
}

// Projections and orders -------------------------------------------------------------------------

Array identity(int64_t num, int64_t dim) {
  Array array({1, num, dim, dim});
  for (int64_t h = 0; h < num; ++h) {
    for (int64_t d = 0; d < dim; ++d) array.row(0, h, d)[d] = 1.0;
  }
  return array;
}

TEST(RouteRules, IdentityProjectionsChangeNothing) {
  for (uint64_t seed = 0; seed < 30; ++seed) {
    Call call = random_call(seed);
    call.proj_q = call.proj_k = {};
    const std::vector<int8_t> plain = run(call);
    call.proj_q = identity(1, call.problem.head_dim);
    call.proj_k = identity(seed % 2 == 0 ? 1 : call.problem.num_heads, call.problem.head_dim);
    EXPECT_EQ(run(call), plain) << describe(call);
  }
}

TEST(RouteRules, OrdersStandForGatheredRows) {
  for (uint64_t seed = 0; seed < 30; ++seed) {
    Call call = random_call(seed);
    Dice dice(seed);
    const Problem& p = call.problem;
    call.query_order = dice.permutation(p.num_queries);
    call.key_order = dice.permutation(p.num_keys);
    Call gathered = call;
    gathered.query_order.clear();
    gathered.key_order.clear();
    const auto gather = [](const Array& from, const std::vector<int32_t>& order, Array& to) {
      for (int64_t b = 0; b < from.shape[0]; ++b) {
        for (int64_t h = 0; h < from.shape[1]; ++h) {
          for (int64_t n = 0; n < from.shape[2]; ++n)
            std::copy_n(from.row(b, h, order[n]), from.shape[3], to.row(b, h, n));
        }
      }
    };
    gather(call.q, call.query_order, gathered.q);
    gather(call.k, call.key_order, gathered.k);
    EXPECT_EQ(run(call), run(gathered)) << describe(call);
  }
}

TEST(RouteRules, ThreadsDoNotMatter) {
  for (uint64_t seed = 0; seed < 30; ++seed) {
    const Call call = random_call(seed);
    EXPECT_EQ(run(call, 1), run(call, 5)) << describe(call);
  }
}

// NaN --------------------------------------------------------------------------------------------

TEST(RouteRules, NanRanksLastAndLeavesAtLeastOneBlock) {
  const double nan = std::nan("");
  const double inf = std::numeric_limits<double>::infinity();
  for (const Selection selection :
       {Selection::kTopK, Selection::kTopP, Selection::kUnion, Selection::kIntersection}) {
    for (const bool is_longest_prefix : {false, true}) {
      for (const double min_similarity : {-1.0, 0.5}) {
        const RouteRule rule{.selection = selection,
                             .critical_ratio = 0.25,
                             .critical_mass = 0.6,
                             .negligible_ratio = 0.25,
                             .is_longest_prefix = is_longest_prefix,
                             .min_similarity = min_similarity};
        EXPECT_EQ(run(call_of_scores({nan, -3.0, 2.0, -4.0}, rule))[0], -1);
        for (const Vector& scores : {Vector(4, nan), Vector{inf, nan, inf, 0.0}, Vector(4, -inf),
                                     Vector{nan, -inf, nan, nan}}) {
          const std::vector<int8_t> classes = run(call_of_scores(scores, rule));
          EXPECT_GE(std::count(classes.begin(), classes.end(), int8_t{1}), 1);
        }
        Call call = call_of_scores({1.0, 2.0, 3.0, 4.0}, rule);
        call.q.row(0, 0, 3)[1] = nan;
        const std::vector<int8_t> classes = run(call);
        EXPECT_GE(std::count(classes.begin(), classes.end(), int8_t{1}), 1);
      }
    }
  }
}

// Errors -----------------------------------------------------------------------------------------

class RouteErrors : public ::testing::Test {
 protected:
  std::string error() {
    return error_text(ErrorCode::kInvalidArgument,
                      [&] { route(plan_, args_, {space_.span().data(), space_.span().size()}); });
  }
  template <class T>
  static TensorView view(std::vector<T>& data, std::array<int64_t, 4> shape,
                         DType dtype = DType::kF32) {
    return contiguous_view(data.data(), dtype, shape);
  }

  Plan plan_ = plan({.num_heads = 4,
                     .num_kv_heads = 2,
                     .num_queries = 20,
                     .num_keys = 30,
                     .head_dim = 8,
                     .block_q = 16,
                     .block_k = 16},
                    {.num_threads = 1});
  GuardedWorkspace space_{plan_.route_workspace_bytes};
  std::vector<float> q_ = std::vector<float>(640), k_ = std::vector<float>(480);
  std::vector<float> proj_q_ = std::vector<float>(256), proj_k_ = std::vector<float>(256);
  std::vector<int32_t> order_ = std::vector<int32_t>(30);
  std::vector<int8_t> classes_ = std::vector<int8_t>(16);
  RouteArgs args_{.q = view(q_, {1, 4, 20, 8}),
                  .k = view(k_, {1, 2, 30, 8}),
                  .rule = {},
                  .proj_q = view(proj_q_, {1, 4, 8, 8}),
                  .proj_k = view(proj_k_, {1, 1, 8, 8}),
                  .block_class = contiguous_view(classes_.data(), DType::kI8, {1, 4, 2, 2})};
};

TEST_F(RouteErrors, Projections) {
  EXPECT_NO_THROW(route(plan_, args_, space_.span()));
  args_.proj_k = {};
  EXPECT_CONTAINS(error(), "route: proj_k must be present, got a null pointer. ");
  args_.proj_k = view(proj_k_, {1, 2, 8, 8});
  EXPECT_CONTAINS(error(), "route: proj_k must have shape (1, 4, 8, 8), got (1, 2, 8, 8). ");
  args_.proj_k = view(proj_k_, {1, 1, 8, 8}, DType::kBF16);
  EXPECT_CONTAINS(error(), "route: proj_k must have dtype float32, got bfloat16. ");
}

TEST_F(RouteErrors, Orders) {
  args_.key_order = view(order_, {1, 1, 1, 30}, DType::kI32);
  std::iota(order_.begin(), order_.end(), 0);
  EXPECT_NO_THROW(route(plan_, args_, space_.span()));
  args_.query_order = view(order_, {1, 1, 1, 30}, DType::kI32);
  EXPECT_CONTAINS(error(), "route: query_order must have shape (1, 1, 1, 20), got (1, 1, 1, 30). ");
  args_.query_order = view(order_, {1, 1, 1, 20});
  EXPECT_CONTAINS(error(), "route: query_order must have dtype int32, got float32. ");
}

TEST_F(RouteErrors, Ranges) {
  args_.rule.critical_mass = 1.5;
  EXPECT_CONTAINS(error(), "route: critical_mass must be from 0 to 1, got 1.5. ");
  args_.rule = {.critical_count = -3};
  EXPECT_CONTAINS(error(), "route: critical_count must not be negative, got -3. ");
  args_.rule = {.min_similarity = std::nan("")};
  EXPECT_CONTAINS(error(), "route: min_similarity must be from -1 to 1, got nan. ");
}

}  // namespace
}  // namespace sparline::testing
