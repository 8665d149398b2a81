// SPDX-License-Identifier: Apache-2.0
#include "case.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
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
  std::vector<int32_t> permutation(int64_t length) {
    std::vector<int32_t> order(static_cast<size_t>(length));
    std::iota(order.begin(), order.end(), 0);
    for (int64_t n = length - 1; n > 0; --n) std::swap(order[n], order[between(0, n)]);
    return order;
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
  static constexpr const char* kNames[] = {"sparse", "linear", "sum", "projection", "blend"};
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
    add(views.alpha_logit, memory[6], arrays.alpha_logit);
  }
  static constexpr int kCount = 7;
  GuardedTensor memory[kCount];
  Weights views;
};

void report(std::string* misuse, const std::string& what, const std::string& problem) {
  if (!problem.empty()) *misuse += what + ": " + problem + "\n";
}

/// What few calls use. Soft maps go without skipping and low bit, skipping without bits.
void draw_features(Dice& dice, Case& c) {
  Problem& p = c.problem;
  // Keys around 0 would leave the identity map without positive denominators.
  p.smooth_k = p.feature_map != FeatureMap::kIdentity && dice.chance(0.3);
  c.has_query_order = dice.chance(0.25);
  c.has_key_order = dice.chance(0.25);
  const std::initializer_list<int> rows_together{0, p.block_q, p.block_q > 16 ? 16 : 0};
  if (dice.chance(0.2)) {
    p.block_map = BlockMap::kSoft;
    p.linear_scope = LinearScope::kComplement;
  } else if (dice.chance(0.2)) {
    p.skip = {
        .reference = dice.pick({SkipReference::kRunningMax, SkipReference::kKeptLse}),
        .log_threshold = dice.pick({-0.2, -1.0, -3.0, -std::numeric_limits<double>::infinity()}),
        .rows = dice.pick(rows_together)};
  }
  if (p.block_map != BlockMap::kSoft && dice.chance(0.15)) {
    p.low_bit = {.is_enabled = true,
                 .q_rows = dice.pick(rows_together),
                 .p_range = dice.pick({448.0, 224.0}),
                 .v_range = dice.pick({448.0, 4.5, 2.25})};
  }
  if (p.skip.reference == SkipReference::kNone && dice.chance(0.25)) {
    p.bit_rows = dice.pick({1, 5, 16, p.block_q / 2, p.block_q});
  }
  const bool has_visits = p.skip.reference != SkipReference::kNone || p.low_bit.is_enabled;
  c.has_tile_order = has_visits && dice.chance(0.5);
  if (p.skip.reference != SkipReference::kNone) c.wants_row_votes = dice.chance(0.5);
}

template <class T>
TensorView view_over(std::vector<T>& values, DType dtype, std::array<int64_t, 4> shape) {
  return values.empty() ? TensorView{} : contiguous_view(values.data(), dtype, shape);
}

std::vector<uint8_t> bytes_of(const Array& array) { return {array.data.begin(), array.data.end()}; }

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
                         Combine::kProjection, Combine::kBlend, Combine::kBlend});
  p.block_map = dice.chance(0.85) ? BlockMap::kClass : BlockMap::kNone;
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
  draw_features(dice, c);
  c.brings_k_mean = dice.chance(0.5);
  return c;
}

std::string describe(const Case& c) {
  const Problem& p = c.problem;
  std::ostringstream out;
  out << "random_case(" << c.seed << ")  // B " << p.batch << " H " << p.num_heads << " H_kv "
      << p.num_kv_heads << " N_q " << p.num_queries << " N_k " << p.num_keys << " D " << p.head_dim
      << " " << name(p.dtype) << " blocks " << p.block_q << "x" << p.block_k << " scale "
      << p.softmax_scale << " " << name(p.combine) << " map " << (p.block_map != BlockMap::kNone)
      << (c.shares_block_map ? " shared" : "") << " " << name(p.feature_map) << " "
      << name(p.linear_scope) << " eps " << p.epsilon << " bias " << c.has_proj_bias << " "
      << name(c.layout) << " smooth_k " << p.smooth_k << c.brings_k_mean << " order "
      << c.has_query_order << c.has_key_order << c.has_tile_order << " soft "
      << (p.block_map == BlockMap::kSoft) << " bit_rows " << p.bit_rows << " skip "
      << static_cast<int>(p.skip.reference) << " " << p.skip.log_threshold << " " << p.skip.rows
      << " low_bit " << p.low_bit.is_enabled << " " << p.low_bit.q_rows << " magnitude "
      << c.magnitude << " queries " << text(p.query_segments) << " keys " << text(p.key_segments);
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

  const int64_t rows =
      oracle::num_blocks(oracle::rows_of(p.query_segments, p.num_queries, p.block_q));
  const int64_t columns =
      oracle::num_blocks(oracle::rows_of(p.key_segments, p.num_keys, p.block_k));
  const int64_t maps = p.batch * p.num_heads;
  if (p.block_map == BlockMap::kSoft) {
    in.soft_map = Array({p.batch, p.num_heads, rows, columns});
    for (double& m : in.soft_map.data) {
      m = dice.chance(0.15) ? 0.0 : dice.chance(0.15) ? 1.0 : dice.uniform();
    }
    in.soft_map = rounded(in.soft_map, DType::kF32);
  }
  if (p.bit_rows > 0) {
    const double density = dice.pick({0.3, 0.8, 1.0});
    in.tile_bits.resize(maps * rows * bit_groups(p, p.bit_rows) * ((columns + 7) / 8));
    for (uint8_t& byte : in.tile_bits) {
      for (int n = 0; n < 8; ++n) byte |= static_cast<uint8_t>(dice.chance(density) << n);
    }
  }
  if (c.has_query_order) in.query_order = dice.permutation(p.num_queries);
  if (c.has_key_order) in.key_order = dice.permutation(p.num_keys);
  for (int64_t i = 0; c.has_tile_order && i < rows; ++i) {
    const std::vector<int32_t> visits = dice.permutation(columns);
    in.tile_order.insert(in.tile_order.end(), visits.begin(), visits.end());
  }
  if (p.block_map == BlockMap::kClass) {
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
  if (p.combine == Combine::kBlend) {
    in.weights.alpha_logit = random_array(dice, {1, p.batch, p.num_heads, p.num_queries}, 2.0);
  }
  for (Array* array : {&in.weights.alpha_logit, &in.weights.proj_weight, &in.weights.proj_bias,
                       &in.weights.feature_weight_q, &in.weights.feature_bias_q,
                       &in.weights.feature_weight_k, &in.weights.feature_bias_k}) {
    *array = rounded(*array, DType::kF32);
  }
  return in;
}

Outputs run(const Case& c, const Inputs& in, std::string* misuse, const Executor& executor) {
  const Problem& p = c.problem;
  Plan plan = sparline::plan(p, {.device = c.device, .num_threads = executor.num_threads});
  if (c.heads_per_wave > 0) plan.heads_per_wave = std::min(plan.heads_per_wave, c.heads_per_wave);
  const Stream stream{.executor = &executor};
  const GuardedTensor q(p.dtype, in.q, c.layout);
  const GuardedTensor k(p.dtype, in.k, c.layout);
  const GuardedTensor v(p.dtype, in.v, c.layout);
  const GuardedTensor d_o(p.dtype, in.d_o, c.layout);
  std::vector<int8_t> classes = in.block_class;
  std::vector<float> soft_map(in.soft_map.data.begin(), in.soft_map.data.end());
  std::vector<uint8_t> bits = in.tile_bits;
  std::vector<int32_t> query_order = in.query_order, key_order = in.key_order,
                       tile_order = in.tile_order;
  const int64_t rows = int64_t(plan.query_blocks.size()), columns = int64_t(plan.key_blocks.size());
  const std::array<int64_t, 4> map_shape{p.batch, p.num_heads, rows, columns};
  const auto bits_shape = [&](int rows_together) -> std::array<int64_t, 4> {
    return {p.batch, p.num_heads, rows * bit_groups(p, rows_together), (columns + 7) / 8};
  };
  TensorView block_map = p.block_map == BlockMap::kSoft
                             ? view_over(soft_map, DType::kF32, map_shape)
                             : view_over(classes, DType::kI8, map_shape);
  if (c.shares_block_map && !classes.empty()) block_map.stride[0] = block_map.stride[1] = 0;
  const TensorView tile_bits = view_over(bits, DType::kU8, bits_shape(p.bit_rows));
  const TensorView query_order_view = view_over(query_order, DType::kI32, {1, 1, 1, p.num_queries});
  const TensorView key_order_view = view_over(key_order, DType::kI32, {1, 1, 1, p.num_keys});
  const WeightTensors weights(in.weights, /*is_output=*/false);
  const bool brings_router_mean = p.smooth_k && c.brings_k_mean && in.k_mean.empty();
  const Array means = brings_router_mean ? run_k_mean(c, in, misuse, executor) : in.k_mean;
  const GuardedTensor k_mean = means.empty() ? GuardedTensor() : GuardedTensor(DType::kF32, means);
  const std::vector<std::byte> k_mean_before = k_mean.bytes();

  const GuardedTensor o(p.dtype, in.q.shape, c.layout);
  const GuardedTensor lse(DType::kF32, {1, p.batch, p.num_heads, p.num_queries});
  const bool has_skip = p.skip.reference != SkipReference::kNone;
  const GuardedTensor kept_bits =
      has_skip ? GuardedTensor(DType::kU8, bits_shape(p.skip.rows)) : GuardedTensor();
  const bool has_votes = has_skip && c.wants_row_votes;
  const GuardedTensor row_votes =
      has_votes ? GuardedTensor(DType::kF32, {1, p.batch, p.num_heads, rows}) : GuardedTensor();
  GuardedWorkspace forward_space(plan.forward_workspace_bytes);
  const std::vector<std::byte> q_before = q.bytes(), k_before = k.bytes(), v_before = v.bytes();
  forward(plan,
          {.q = q.view(),
           .k = k.view(),
           .v = v.view(),
           .block_map = block_map,
           .tile_bits = tile_bits,
           .query_order = query_order_view,
           .key_order = key_order_view,
           .tile_order = view_over(tile_order, DType::kI32, {1, 1, rows, columns}),
           .k_mean = k_mean.view(),
           .weights = weights.views,
           .o = o.view(),
           .lse = lse.view(),
           .kept_bits = kept_bits.view(),
           .row_votes = row_votes.view()},
          forward_space.span(), stream);
  report(misuse, "forward o", o.misuse());
  report(misuse, "forward lse", lse.misuse());
  if (has_skip) report(misuse, "forward kept_bits", kept_bits.misuse());
  if (has_votes) report(misuse, "forward row_votes", row_votes.misuse());
  report(misuse, "forward", forward_space.misuse());

  const GuardedTensor d_q(p.dtype, in.q.shape, c.layout);
  const GuardedTensor d_k(p.dtype, in.k.shape, c.layout);
  const GuardedTensor d_v(p.dtype, in.v.shape, c.layout);
  const WeightTensors d_weights(in.weights, /*is_output=*/true);
  const GuardedTensor d_soft_map =
      p.block_map == BlockMap::kSoft ? GuardedTensor(DType::kF32, map_shape) : GuardedTensor();
  GuardedWorkspace backward_space(plan.backward_workspace_bytes);
  const std::vector<std::byte> o_before = o.bytes();
  backward(plan,
           {.d_o = d_o.view(),
            .q = q.view(),
            .k = k.view(),
            .v = v.view(),
            .o = o.view(),
            .lse = lse.view(),
            .block_map = block_map,
            .tile_bits = has_skip ? kept_bits.view() : tile_bits,
            .query_order = query_order_view,
            .key_order = key_order_view,
            .k_mean = k_mean.view(),
            .weights = weights.views,
            .d_q = d_q.view(),
            .d_k = d_k.view(),
            .d_v = d_v.view(),
            .d_block_map = d_soft_map.view(),
            .d_weights = d_weights.views},
           backward_space.span(), stream);
  report(misuse, "backward d_q", d_q.misuse());
  report(misuse, "backward d_k", d_k.misuse());
  report(misuse, "backward d_v", d_v.misuse());
  if (d_soft_map.view()) report(misuse, "backward d_block_map", d_soft_map.misuse());
  report(misuse, "backward", backward_space.misuse());
  const bool is_untouched = q.bytes() == q_before && k.bytes() == k_before &&
                            v.bytes() == v_before && o.bytes() == o_before &&
                            k_mean.bytes() == k_mean_before && classes == in.block_class &&
                            bits == in.tile_bits && query_order == in.query_order &&
                            key_order == in.key_order && tile_order == in.tile_order;
  if (!is_untouched) *misuse += "an input was written\n";

  Outputs out{.o = o.load(),
              .lse = lse.load(),
              .d_q = d_q.load(),
              .d_k = d_k.load(),
              .d_v = d_v.load(),
              .d_weights = {},
              .d_soft_map = d_soft_map.view() ? d_soft_map.load() : Array(),
              .kept_bits = has_skip ? bytes_of(kept_bits.load()) : std::vector<uint8_t>(),
              .row_votes = has_votes ? row_votes.load() : Array(),
              .most_row_votes = {},
              .contradictions = {}};
  Array* gradients[] = {&out.d_weights.proj_weight,      &out.d_weights.proj_bias,
                        &out.d_weights.feature_weight_q, &out.d_weights.feature_bias_q,
                        &out.d_weights.feature_weight_k, &out.d_weights.feature_bias_k,
                        &out.d_weights.alpha_logit};
  for (int n = 0; n < WeightTensors::kCount; ++n) {
    if (!d_weights.memory[n].view()) continue;
    report(misuse, "backward d_weights[" + std::to_string(n) + "]", d_weights.memory[n].misuse());
    *gradients[n] = d_weights.memory[n].load();
  }
  return out;
}

namespace {

void call_route(const Case& c, const RouteRule& rule, const Inputs& in,
                const GuardedTensor& classes, const GuardedTensor& k_mean, std::string* misuse,
                const Executor& executor) {
  const Problem& p = c.problem;
  const Plan plan = sparline::plan(p, {.device = c.device, .num_threads = executor.num_threads});
  const GuardedTensor q(p.dtype, in.q, c.layout), k(p.dtype, in.k, c.layout);
  std::vector<int32_t> query_order = in.query_order, key_order = in.key_order;
  GuardedWorkspace space(plan.route_workspace_bytes);
  route(plan,
        {.q = q.view(),
         .k = k.view(),
         .rule = rule,
         .query_order = view_over(query_order, DType::kI32, {1, 1, 1, p.num_queries}),
         .key_order = view_over(key_order, DType::kI32, {1, 1, 1, p.num_keys}),
         .block_class = classes.view(),
         .k_mean = k_mean.view()},
        space.span(), {.executor = &executor});
  report(misuse, "route", classes.misuse());
  if (k_mean.view()) report(misuse, "route k_mean", k_mean.misuse());
  report(misuse, "route", space.misuse());
}

GuardedTensor classes_of(const Problem& p) {
  const auto num_blocks = [](const std::vector<Segment>& segments, int64_t length, int rows) {
    return std::ssize(make_blocks(segments, length, rows));
  };
  return {DType::kI8,
          {p.batch, p.num_heads, num_blocks(p.query_segments, p.num_queries, p.block_q),
           num_blocks(p.key_segments, p.num_keys, p.block_k)}};
}

}  // namespace

std::vector<int8_t> run_route(const Case& c, const Array& q, const Array& k, std::string* misuse,
                              const Executor& executor) {
  Inputs in;
  in.q = q;
  in.k = k;
  const GuardedTensor block_class = classes_of(c.problem);
  call_route(c, c.rule, in, block_class, {}, misuse, executor);
  std::vector<int8_t> classes;
  for (double value : block_class.load().data) classes.push_back(static_cast<int8_t>(value));
  return classes;
}

Array run_k_mean(const Case& c, const Inputs& in, std::string* misuse, const Executor& executor) {
  const Problem& p = c.problem;
  RouteRule rule = c.rule;
  rule.smooth_k = true;
  const GuardedTensor k_mean(
      DType::kF32, {p.batch, p.num_kv_heads, std::ssize(sequence_numbers(p)), p.head_dim});
  call_route(c, rule, in, classes_of(p), k_mean, misuse, executor);
  return k_mean.load();
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
  // Under low bit the last bit of a score decides now and then which code P gets, and with smoothed
  // keys which code a key gets: o moves by a step of one key's P, 1/16 of it.
  const bool is_low_bit = c.problem.low_bit.is_enabled;
  // Tensor cores multiply P, dS and phi rounded as storage is, and states rounded to bf16.
  const bool is_cuda = c.device == Device::kCUDA;
  const double products = is_cuda ? storage : 0.0;
  const double states = is_cuda && has_linear_branch(c.problem) ? 0x1p-8 : 0.0;
  const double forward_bound =
      slack * (2e-5 + storage + products + 2.0 * states + (is_low_bit ? 2e-2 : 0.0));
  const double backward_bound =
      slack * (2e-4 + 5.0 * (storage + products + states) + (is_low_bit ? 5e-2 : 0.0));
  // delta is taken from the rounded o. Where d_q and d_k cancel (a single key: exactly 0), that
  // error stays.
  const double scale = c.problem.softmax_scale == 0.0 ? 1.0 / std::sqrt(double(c.problem.head_dim))
                                                      : c.problem.softmax_scale;
  double largest_o = 0.0;
  for (double value : want.o.data) largest_o = std::max(largest_o, std::abs(value));
  const double length = std::sqrt(double(c.problem.head_dim));
  // So it is with the rounding of states in the linear branch, whose gradient goes as d phi / phi.
  const bool is_steep =
      c.problem.feature_map == FeatureMap::kIdentity || c.problem.feature_map == FeatureMap::kRelu;
  const double slope = is_steep ? 1.0 / c.magnitude : 1.0;
  const double cancellation = std::max(0.1, (scale * 6.0 * c.magnitude * storage + slope * states) *
                                                length * largest_o / backward_bound);
  std::ostringstream out;
  const auto check = [&](const char* what, const Array& a, const Array& b, double bound,
                         double floor) {
    const double e = error(a, b, floor);
    if (e > bound) out << what << " is off by " << e << ", allowed " << bound << "\n";
  };
  check("o", got.o, want.o, forward_bound, 0.1);
  check("lse", got.lse, want.lse, slack * (is_low_bit && c.problem.smooth_k ? 1e-2 : 2e-5), 1.0);
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
  // dO (o - o_l) holds the rounding of o, whatever is left of the difference.
  check("d_alpha_logit", g.alpha_logit, w.alpha_logit, backward_bound,
        std::max(1.0, 4.0 * std::sqrt(double(c.problem.head_dim)) * largest_o * storage /
                          backward_bound));
  // The rounding of o is in delta, and comes out magnified by 1 / m.
  if (is_wide) check("d_block_map", got.d_soft_map, want.d_soft_map, slack * 1e-3, 1.0);
  out << want.contradictions;
  for (size_t n = 0; n < got.row_votes.data.size(); ++n) {
    const double votes = got.row_votes.data[n];
    if (votes >= want.row_votes.data[n] && votes <= want.most_row_votes.data[n]) continue;
    out << "row_votes[" << n << "] is " << votes << ", not from " << want.row_votes.data[n]
        << " to " << want.most_row_votes.data[n] << "\n";
  }
  return out.str();
}

}  // namespace sparline::testing
