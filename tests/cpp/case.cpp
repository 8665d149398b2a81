// SPDX-License-Identifier: Apache-2.0
#include "case.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <sstream>

namespace sparline::testing {
namespace {

using oracle::Array;
using oracle::Inputs;
using oracle::Outputs;

class Dice {
 public:
  explicit Dice(uint64_t seed) : engine_(seed * 0x9E3779B97F4A7C15ULL + 1) {}

  int64_t between(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(engine_() % static_cast<uint64_t>(high - low + 1));
  }
  bool chance(double probability) { return uniform() < probability; }
  double uniform() { return static_cast<double>(engine_() >> 11) * 0x1p-53; }
  double normal() {  // Box-Muller: the same on every standard library
    return std::sqrt(-2.0 * std::log(1.0 - uniform())) * std::cos(2.0 * M_PI * uniform());
  }
  template <class T>
  T pick(std::initializer_list<T> choices) {
    return choices.begin()[between(0, static_cast<int64_t>(choices.size()) - 1)];
  }

 private:
  std::mt19937_64 engine_;
};

/// Cuts [0, length) into sequences, and each into up to three spans, some protected, some empty.
std::vector<Segment> random_segments(Dice& dice, int64_t length, int num_sequences,
                                     bool has_protected) {
  std::vector<int64_t> cuts{0, length};
  for (int n = 1; n < num_sequences; ++n) cuts.push_back(dice.between(0, length));
  std::sort(cuts.begin(), cuts.end());
  std::vector<Segment> segments;
  for (int sequence = 0; sequence < num_sequences; ++sequence) {
    int64_t begin = cuts[sequence];
    const int64_t end = cuts[sequence + 1];
    const int spans = has_protected ? static_cast<int>(dice.between(1, 3)) : 1;
    for (int n = 0; n < spans; ++n) {
      const int64_t stop = n + 1 == spans ? end : dice.between(begin, end);
      segments.push_back({begin, stop, sequence, has_protected && dice.chance(0.4)});
      begin = stop;
    }
  }
  return segments;
}

Array random_array(Dice& dice, std::array<int64_t, 4> shape, double deviation) {
  Array array(shape);
  for (double& value : array.data) value = deviation * dice.normal();
  return array;
}

/// The identity plus noise: near where a hedgehog map starts.
Array random_maps(Dice& dice, int64_t heads, int64_t dim) {
  Array array = random_array(dice, {1, heads, dim, dim}, 0.3 / std::sqrt(double(dim)));
  for (int64_t h = 0; h < heads; ++h) {
    for (int64_t a = 0; a < dim; ++a) array.row(0, h, a)[a] += 1.0;
  }
  return array;
}

const char* name(Combine combine) {
  static constexpr const char* kNames[] = {"sparse", "linear", "sum", "projection"};
  return kNames[static_cast<int>(combine)];
}
const char* name(FeatureMap map) {
  static constexpr const char* kNames[] = {"softmax",  "elu1",     "relu",
                                           "identity", "hedgehog", "hedgehog_exp"};
  return kNames[static_cast<int>(map)];
}
const char* name(LinearScope scope) {
  static constexpr const char* kNames[] = {"marginal", "complement", "all"};
  return kNames[static_cast<int>(scope)];
}

std::string text(const std::vector<Segment>& segments) {
  std::ostringstream out;
  out << "{";
  for (const Segment& s : segments) {
    out << "{" << s.begin << "," << s.end << "," << s.sequence << "," << s.is_protected << "}";
  }
  return out.str() + "}";
}

struct WeightTensors {
  WeightTensors(const oracle::WeightArrays& arrays, bool is_output) {
    const auto add = [&](TensorView& slot, GuardedTensor& memory, const Array& values) {
      if (values.empty()) return;
      memory =
          is_output ? GuardedTensor(DType::kF32, values.shape) : GuardedTensor(DType::kF32, values);
      slot = memory.view();
    };
    add(views.proj_weight, memory[0], arrays.proj_weight);
    add(views.proj_bias, memory[1], arrays.proj_bias);
    add(views.feature_weight_q, memory[2], arrays.feature_weight_q);
    add(views.feature_bias_q, memory[3], arrays.feature_bias_q);
    add(views.feature_weight_k, memory[4], arrays.feature_weight_k);
    add(views.feature_bias_k, memory[5], arrays.feature_bias_k);
  }
  GuardedTensor memory[6];
  Weights views;
};

void report(std::string* misuse, const std::string& what, const std::string& problem) {
  if (!problem.empty()) *misuse += what + ": " + problem + "\n";
}

}  // namespace

Case random_case(uint64_t seed) {
  Dice dice(seed);
  Case c{.seed = seed};
  Problem& p = c.problem;
  p.batch = dice.between(1, 2);
  p.num_kv_heads = dice.between(1, 2);
  p.num_heads = p.num_kv_heads * dice.between(1, 3);
  const bool is_tiny = dice.chance(0.2);
  p.num_queries = dice.between(1, is_tiny ? 12 : 150);
  p.num_keys = dice.chance(0.4) ? p.num_queries : dice.between(1, is_tiny ? 12 : 200);
  p.head_dim = dice.pick<int64_t>({4, 6, 8, 10, 12, 16, 24, 32, 40, 64, 64, 80, 128});
  if (dice.chance(0.03)) p.head_dim = 256;
  p.dtype = dice.pick({DType::kF32, DType::kF32, DType::kBF16, DType::kF16});
  p.block_q = dice.pick({16, 16, 24, 32, 33, 64, 128});
  p.block_k = dice.pick({16, 16, 24, 32, 33, 64, 128});
  p.softmax_scale = dice.chance(0.7) ? 0.0 : 0.2;
  p.combine = dice.pick({Combine::kSparse, Combine::kLinear, Combine::kSum, Combine::kProjection,
                         Combine::kProjection});
  p.has_block_map = dice.chance(0.85);
  p.feature_map =
      dice.pick({FeatureMap::kSoftmax, FeatureMap::kSoftmax, FeatureMap::kElu1, FeatureMap::kRelu,
                 FeatureMap::kIdentity, FeatureMap::kHedgehog, FeatureMap::kHedgehogExp});
  p.linear_scope = dice.pick({LinearScope::kMarginal, LinearScope::kComplement, LinearScope::kAll});
  p.epsilon = dice.pick({0.0, 0.0, 1e-5, 0.5});
  if (dice.chance(0.5)) {
    const int sequences = static_cast<int>(dice.between(1, 3));
    const bool has_protected = dice.chance(0.6);
    p.query_segments = random_segments(dice, p.num_queries, sequences, has_protected);
    p.key_segments = random_segments(dice, p.num_keys, sequences, has_protected);
  }
  c.rule = {
      .critical_ratio = dice.pick({0.0, 0.05, 0.3, 0.5, 1.0}),
      .negligible_ratio = dice.pick({0.0, 0.1, 0.4, 1.0}),
      .rounding = dice.pick({CountRounding::kFloor, CountRounding::kRound, CountRounding::kCeil}),
      .smooth_k = dice.chance(0.5)};
  c.layout = dice.pick({Layout::kBHND, Layout::kBNHD, Layout::kPadded});
  c.magnitude = dice.pick({1.0, 1.0, 0.2, 2.0});
  c.has_proj_bias = dice.chance(0.7);
  c.shares_block_map = dice.chance(0.15);
  return c;
}

std::string describe(const Case& c) {
  const Problem& p = c.problem;
  std::ostringstream out;
  out << "random_case(" << c.seed << ")  // B " << p.batch << " H " << p.num_heads << " H_kv "
      << p.num_kv_heads << " N_q " << p.num_queries << " N_k " << p.num_keys << " D " << p.head_dim
      << " " << name(p.dtype) << " blocks " << p.block_q << "x" << p.block_k << " scale "
      << p.softmax_scale << " " << name(p.combine) << " map " << p.has_block_map
      << (c.shares_block_map ? " shared" : "") << " " << name(p.feature_map) << " "
      << name(p.linear_scope) << " eps " << p.epsilon << " bias " << c.has_proj_bias << " "
      << name(c.layout) << " magnitude " << c.magnitude << " queries " << text(p.query_segments)
      << " keys " << text(p.key_segments);
  return out.str();
}

Inputs random_inputs(const Case& c) {
  Dice dice(c.seed ^ 0xABCDEF);
  const Problem& p = c.problem;
  const int64_t dim = p.head_dim;
  Inputs in;
  in.q = random_array(dice, {p.batch, p.num_heads, p.num_queries, dim}, c.magnitude);
  in.k = random_array(dice, {p.batch, p.num_kv_heads, p.num_keys, dim}, c.magnitude);
  in.v = random_array(dice, {p.batch, p.num_kv_heads, p.num_keys, dim}, 1.0);
  in.d_o = random_array(dice, in.q.shape, 1.0);
  if (p.feature_map == FeatureMap::kIdentity) {  // keeps the denominator away from 0
    for (double& value : in.q.data) value = std::abs(value) + 0.1;
    for (double& value : in.k.data) value = std::abs(value) + 0.1;
  }
  for (Array* array : {&in.q, &in.k, &in.v, &in.d_o}) *array = rounded(*array, p.dtype);

  if (p.has_block_map) {
    const int64_t rows =
        oracle::num_blocks(oracle::rows_of(p.query_segments, p.num_queries, p.block_q));
    const int64_t columns =
        oracle::num_blocks(oracle::rows_of(p.key_segments, p.num_keys, p.block_k));
    const int64_t maps = p.batch * p.num_heads;
    const double critical = dice.pick({0.1, 0.4, 0.8});
    const double negligible = dice.pick({0.0, 0.3, 1.0});
    for (int64_t row = 0; row < maps * rows; ++row) {
      const double kind = dice.uniform();  // a tenth each: no critical, no linear, nothing at all
      for (int64_t j = 0; j < columns; ++j) {
        int8_t block_class =
            dice.chance(critical) ? 1 : static_cast<int8_t>(dice.chance(negligible) ? -1 : 0);
        if (kind < 0.1 && block_class == 1) block_class = 0;
        if (kind >= 0.1 && kind < 0.2) block_class = 1;
        if (kind >= 0.2 && kind < 0.3) block_class = -1;
        in.block_class.push_back(block_class);
      }
    }
    if (c.shares_block_map) {
      for (int64_t map = 1; map < maps; ++map) {
        std::copy_n(in.block_class.begin(), rows * columns,
                    in.block_class.begin() + map * rows * columns);
      }
    }
  }
  if (p.combine == Combine::kProjection) {
    in.weights.proj_weight = random_array(dice, {1, 1, dim, dim}, 1.0 / std::sqrt(double(dim)));
    if (c.has_proj_bias) in.weights.proj_bias = random_array(dice, {1, 1, 1, dim}, 0.5);
  }
  if (has_feature_weights(p)) {
    in.weights.feature_weight_q = random_maps(dice, p.num_heads, dim);
    in.weights.feature_bias_q = random_array(dice, {1, 1, p.num_heads, dim}, 0.2);
    in.weights.feature_weight_k = random_maps(dice, p.num_kv_heads, dim);
    in.weights.feature_bias_k = random_array(dice, {1, 1, p.num_kv_heads, dim}, 0.2);
  }
  for (Array* array :
       {&in.weights.proj_weight, &in.weights.proj_bias, &in.weights.feature_weight_q,
        &in.weights.feature_bias_q, &in.weights.feature_weight_k, &in.weights.feature_bias_k}) {
    *array = rounded(*array, DType::kF32);
  }
  return in;
}

Outputs run(const Case& c, const Inputs& in, std::string* misuse, const Executor& executor) {
  const Problem& p = c.problem;
  const Plan plan = sparline::plan(p, {.num_threads = executor.num_threads});
  const Stream stream{.executor = &executor};
  const GuardedTensor q(p.dtype, in.q, c.layout);
  const GuardedTensor k(p.dtype, in.k, c.layout);
  const GuardedTensor v(p.dtype, in.v, c.layout);
  const GuardedTensor d_o(p.dtype, in.d_o, c.layout);
  std::vector<int8_t> classes = in.block_class;
  TensorView block_class;
  if (p.has_block_map) {
    block_class = contiguous_view(
        classes.data(), DType::kI8,
        {p.batch, p.num_heads, int64_t(plan.query_blocks.size()), int64_t(plan.key_blocks.size())});
    if (c.shares_block_map) block_class.stride[0] = block_class.stride[1] = 0;
  }
  const WeightTensors weights(in.weights, /*is_output=*/false);

  const GuardedTensor o(p.dtype, in.q.shape, c.layout);
  const GuardedTensor lse(DType::kF32, {1, p.batch, p.num_heads, p.num_queries});
  GuardedWorkspace forward_space(plan.forward_workspace_bytes);
  const std::vector<std::byte> q_before = q.bytes(), k_before = k.bytes(), v_before = v.bytes();
  forward(plan,
          {.q = q.view(),
           .k = k.view(),
           .v = v.view(),
           .block_class = block_class,
           .weights = weights.views,
           .o = o.view(),
           .lse = lse.view()},
          forward_space.span(), stream);
  report(misuse, "forward o", o.misuse());
  report(misuse, "forward lse", lse.misuse());
  report(misuse, "forward", forward_space.misuse());

  const GuardedTensor d_q(p.dtype, in.q.shape, c.layout);
  const GuardedTensor d_k(p.dtype, in.k.shape, c.layout);
  const GuardedTensor d_v(p.dtype, in.v.shape, c.layout);
  const WeightTensors d_weights(in.weights, /*is_output=*/true);
  GuardedWorkspace backward_space(plan.backward_workspace_bytes);
  const std::vector<std::byte> o_before = o.bytes();
  backward(plan,
           {.d_o = d_o.view(),
            .q = q.view(),
            .k = k.view(),
            .v = v.view(),
            .o = o.view(),
            .lse = lse.view(),
            .block_class = block_class,
            .weights = weights.views,
            .d_q = d_q.view(),
            .d_k = d_k.view(),
            .d_v = d_v.view(),
            .d_weights = d_weights.views},
           backward_space.span(), stream);
  report(misuse, "backward d_q", d_q.misuse());
  report(misuse, "backward d_k", d_k.misuse());
  report(misuse, "backward d_v", d_v.misuse());
  report(misuse, "backward", backward_space.misuse());
  const bool is_untouched = q.bytes() == q_before && k.bytes() == k_before &&
                            v.bytes() == v_before && o.bytes() == o_before &&
                            classes == in.block_class;
  if (!is_untouched) *misuse += "an input was written\n";

  Outputs out{.o = o.load(),
              .lse = lse.load(),
              .d_q = d_q.load(),
              .d_k = d_k.load(),
              .d_v = d_v.load(),
              .d_weights = {}};
  Array* gradients[] = {&out.d_weights.proj_weight,      &out.d_weights.proj_bias,
                        &out.d_weights.feature_weight_q, &out.d_weights.feature_bias_q,
                        &out.d_weights.feature_weight_k, &out.d_weights.feature_bias_k};
  for (int n = 0; n < 6; ++n) {
    if (!d_weights.memory[n].view()) continue;
    report(misuse, "backward d_weights[" + std::to_string(n) + "]", d_weights.memory[n].misuse());
    *gradients[n] = d_weights.memory[n].load();
  }
  return out;
}

std::vector<int8_t> run_route(const Case& c, const Array& q_values, const Array& k_values,
                              std::string* misuse, const Executor& executor) {
  const Problem& p = c.problem;
  const Plan plan = sparline::plan(p, {.num_threads = executor.num_threads});
  const GuardedTensor q(p.dtype, q_values, c.layout);
  const GuardedTensor k(p.dtype, k_values, c.layout);
  const GuardedTensor block_class(
      DType::kI8,
      {p.batch, p.num_heads, int64_t(plan.query_blocks.size()), int64_t(plan.key_blocks.size())});
  GuardedWorkspace space(plan.route_workspace_bytes);
  route(plan, {.q = q.view(), .k = k.view(), .rule = c.rule, .block_class = block_class.view()},
        space.span(), {.executor = &executor});
  report(misuse, "route", block_class.misuse());
  report(misuse, "route", space.misuse());
  std::vector<int8_t> classes;
  for (double value : block_class.load().data) classes.push_back(static_cast<int8_t>(value));
  return classes;
}

double error(const Array& got, const Array& want, double floor) {
  if (got.shape != want.shape) return std::numeric_limits<double>::infinity();
  double worst = 0.0;
  double largest = floor;
  for (size_t n = 0; n < want.data.size(); ++n) {
    if (got.data[n] == want.data[n]) continue;  // infinities too
    const double difference = std::abs(got.data[n] - want.data[n]);
    if (!std::isfinite(difference)) return std::numeric_limits<double>::infinity();
    worst = std::max(worst, difference);
    largest = std::max(largest, std::abs(want.data[n]));
  }
  return worst / largest;
}

std::string compare(const Case& c, const Outputs& got, const Outputs& want, double slack) {
  // Storage rounds o (which backward reads again) and the gradients; all else is float32.
  const bool is_wide = c.problem.dtype == DType::kF32;
  const double storage = is_wide ? 0.0 : c.problem.dtype == DType::kBF16 ? 0x1p-8 : 0x1p-11;
  const double forward_bound = slack * (2e-5 + storage);
  const double backward_bound = slack * (2e-4 + 5.0 * storage);
  // delta is taken from the rounded o. Where d_q and d_k cancel (a single key: exactly 0), that
  // error stays.
  const double scale = c.problem.softmax_scale == 0.0 ? 1.0 / std::sqrt(double(c.problem.head_dim))
                                                      : c.problem.softmax_scale;
  double largest_o = 0.0;
  for (double value : want.o.data) largest_o = std::max(largest_o, std::abs(value));
  const double cancellation =
      std::max(0.1, scale * 3.0 * c.magnitude * std::sqrt(double(c.problem.head_dim)) * largest_o *
                        storage / backward_bound);
  std::ostringstream out;
  const auto check = [&](const char* what, const Array& a, const Array& b, double bound,
                         double floor) {
    const double e = error(a, b, floor);
    if (e > bound) out << what << " is off by " << e << ", allowed " << bound << "\n";
  };
  check("o", got.o, want.o, forward_bound, 0.1);
  check("lse", got.lse, want.lse, slack * 2e-5, 1.0);
  check("d_q", got.d_q, want.d_q, backward_bound, cancellation);
  check("d_k", got.d_k, want.d_k, backward_bound, cancellation);
  check("d_v", got.d_v, want.d_v, backward_bound, 0.1);
  const auto& g = got.d_weights;
  const auto& w = want.d_weights;
  check("d_proj_weight", g.proj_weight, w.proj_weight, backward_bound, 1.0);
  check("d_proj_bias", g.proj_bias, w.proj_bias, backward_bound, 1.0);
  check("d_feature_weight_q", g.feature_weight_q, w.feature_weight_q, backward_bound, 1.0);
  check("d_feature_bias_q", g.feature_bias_q, w.feature_bias_q, backward_bound, 1.0);
  check("d_feature_weight_k", g.feature_weight_k, w.feature_weight_k, backward_bound, 1.0);
  check("d_feature_bias_k", g.feature_bias_k, w.feature_bias_k, backward_bound, 1.0);
  return out.str();
}

}  // namespace sparline::testing
