// SPDX-License-Identifier: Apache-2.0
#include "core/validate.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <sstream>
#include <string>
#include <utility>

namespace sparline {
namespace {

using Shape = std::array<int64_t, 4>;

std::string text(std::string value) { return value; }
std::string text(int64_t value) { return std::to_string(value); }
std::string text(double value) {
  std::ostringstream digits;
  digits << value;
  return digits.str();
}
std::string text(const Shape& shape) {
  std::ostringstream digits;
  digits << "(" << shape[0] << ", " << shape[1] << ", " << shape[2] << ", " << shape[3] << ")";
  return digits.str();
}

/// The three parts of an error, in the caller's words.
template <class T>
void require(bool holds, const std::string& rule, const T& got, const char* way_out) {
  if (holds) return;
  throw Error(ErrorCode::kInvalidArgument, rule + ", got " + text(got) + ". " + way_out);
}

// Problem and target -----------------------------------------------------------------------------

void validate_segments(std::span<const Segment> segments, int64_t length, const std::string& axis) {
  if (segments.empty()) return;
  const auto fail = [&](size_t idx, const std::string& rule, const char* way_out) {
    const Segment& segment = segments[idx];
    throw Error(ErrorCode::kInvalidArgument,
                axis + "_segments: " + rule + ", got segment " + std::to_string(idx) + " = [" +
                    text(segment.begin) + ", " + text(segment.end) + ") of sequence " +
                    text(int64_t{segment.sequence}) + ". " + way_out);
  };
  int64_t covered = 0;
  for (size_t idx = 0; idx < segments.size(); ++idx) {
    const Segment& segment = segments[idx];
    if (segment.end < segment.begin) {
      fail(idx, "a segment must not end before it begins", "Swap begin and end.");
    }
    if (segment.begin != covered) {
      fail(idx, "a segment must begin where the one before it ends, here at " + text(covered),
           "List the segments in order, without gaps or overlaps.");
    }
    if (idx > 0 && segment.sequence < segments[idx - 1].sequence) {
      fail(idx, "sequence numbers must not decrease", "Number the sequences in order.");
    }
    covered = segment.end;
  }
  if (covered != length) {
    fail(segments.size() - 1, "the segments must cover all " + text(length) + " rows",
         "Extend the last segment, or add one.");
  }
}

/// Refuses sizes whose byte counts could leave int64_t or the address space: no later arithmetic on
/// sizes overflows.
void validate_size(const char* what, std::initializer_list<int64_t> factors) {
  double elements = 1.0;
  for (int64_t factor : factors) elements *= static_cast<double>(factor);
  require(elements <= 0x1p40, what, elements, "Split the batch or the heads over several calls.");
}

// Tensors ----------------------------------------------------------------------------------------

struct Argument {
  const char* name;
  const TensorView* view;
  DType dtype;
  Shape shape;
  bool is_output = false;
  bool is_packed = false;  // row-major without gaps
  int64_t alignment_bytes = 1;
};

/// Bytes from the first to past the last element.
struct Range {
  uintptr_t begin;
  uintptr_t end;
};

Range range(const TensorView& view) {
  int64_t last = 0;
  for (int d = 0; d < 4; ++d) last += (view.shape[d] - 1) * view.stride[d];
  const auto begin = reinterpret_cast<uintptr_t>(view.data);
  return {begin, begin + static_cast<uintptr_t>((last + 1) * size_bytes(view.dtype))};
}

bool intersect(Range a, Range b) { return a.begin < b.end && b.begin < a.end; }

/// Whether distinct indices always mean distinct elements. Sufficient, and exact for slices and
/// permutations of a dense tensor: sorted by stride, each dimension steps past everything inside
/// it.
template <size_t kRank>
bool is_injective(std::array<std::pair<int64_t, int64_t>, kRank> dims_by_stride) {
  std::sort(dims_by_stride.begin(), dims_by_stride.end());
  int64_t inner_extent = 1;
  for (const auto& [stride, size] : dims_by_stride) {
    if (size <= 1) continue;
    if (stride < inner_extent) return false;
    inner_extent = stride * (size - 1) + inner_extent;
  }
  return true;
}

bool is_injective(const TensorView& view) {
  std::array<std::pair<int64_t, int64_t>, 4> dims;
  for (int d = 0; d < 4; ++d) dims[d] = {view.stride[d], view.shape[d]};
  return is_injective(dims);
}

/// Whether two views may share an element. Slices of one fused tensor (q, k, v of one projection)
/// interleave without sharing: seen as one tensor with a fifth dimension of two, they are still
/// injective.
bool may_share(const TensorView& a, const TensorView& b) {
  if (!intersect(range(a), range(b))) return false;
  if (a.dtype != b.dtype || a.stride != b.stride) return true;
  const auto distance_bytes =
      std::abs(static_cast<const char*>(a.data) - static_cast<const char*>(b.data));
  if (distance_bytes % size_bytes(a.dtype) != 0) return true;
  std::array<std::pair<int64_t, int64_t>, 5> dims;
  for (int d = 0; d < 4; ++d) dims[d] = {a.stride[d], std::max(a.shape[d], b.shape[d])};
  dims[4] = {distance_bytes / size_bytes(a.dtype), 2};
  return !is_injective(dims);
}

Shape packed_strides(const Shape& shape) {
  return contiguous_view(nullptr, DType::kF32, shape).stride;
}

bool is_packed(const TensorView& view) {
  const Shape expected = packed_strides(view.shape);
  for (int d = 0; d < 4; ++d) {
    if (view.shape[d] > 1 && view.stride[d] != expected[d]) return false;
  }
  return true;
}

void validate_argument(const std::string& call, const Argument& arg) {
  const std::string name = call + ": " + arg.name;
  const TensorView& view = *arg.view;
  require(static_cast<bool>(view), name + " must be present", text("a null pointer"),
          "Pass the tensor that the plan's problem asks for.");
  require(view.dtype == arg.dtype, name + " must have dtype " + sparline::name(arg.dtype),
          text(sparline::name(view.dtype)), "Convert it, or plan for that dtype.");
  require(view.shape == arg.shape, name + " must have shape " + text(arg.shape), view.shape,
          "Pass the tensors that the plan was made for, or plan again.");
  require(reinterpret_cast<uintptr_t>(view.data) % size_bytes(view.dtype) == 0,
          name + " must be aligned to its element size", text("an odd address"),
          "Copy it to an aligned address.");
  const auto past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(view.data) %
                                         static_cast<uintptr_t>(arg.alignment_bytes));
  require(past == 0, name + " must be aligned to " + text(arg.alignment_bytes) + " bytes",
          "an address " + text(past) + " past such a one", "Copy it to an aligned address.");
  require(std::ranges::all_of(view.stride, [](int64_t stride) { return stride >= 0; }),
          name + " must have no negative stride", view.stride, "Copy it to a row-major tensor.");
  double extent = 1.0;
  for (int d = 0; d < 4; ++d) {
    extent += static_cast<double>(view.shape[d] - 1) * static_cast<double>(view.stride[d]);
  }
  require(extent <= 0x1p56, name + " must span at most 2^56 elements", view.stride,
          "Copy it to a row-major tensor.");
  require(view.stride[3] == 1 || view.shape[3] == 1,
          name + " must have unit stride in its last dimension", view.stride,
          "Make it contiguous in that dimension.");
  if (arg.is_packed) {
    require(is_packed(view), name + " must be row-major without gaps", view.stride,
            "Make it contiguous.");
  }
  if (arg.is_output) {
    require(is_injective(view), name + " is written, so its elements must not overlap", view.stride,
            "Give it memory of its own.");
  }
}

void validate_absent(const std::string& call, const char* name, const TensorView& view,
                     const char* because) {
  require(!view, call + ": " + name + " must be absent " + because, text("a tensor"),
          "Drop it, or plan a problem that uses it.");
}

void validate_workspace(const std::string& call, std::span<const std::byte> workspace,
                        int64_t workspace_bytes) {
  if (workspace_bytes == 0) return;
  require(workspace.data() != nullptr, call + ": workspace must be present", text("a null pointer"),
          "Allocate the plan's workspace_bytes, aligned to 64 bytes.");
  require(std::cmp_greater_equal(workspace.size(), workspace_bytes),
          call + ": workspace must hold the plan's " + text(workspace_bytes) + " bytes",
          static_cast<int64_t>(workspace.size()), "Allocate what the plan says.");
  const auto past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(workspace.data()) % 64);
  require(past == 0, call + ": workspace must be aligned to 64 bytes",
          "an address " + text(past) + " past such a one",
          "Allocate it with std::aligned_alloc(64, bytes), or round its address up.");
}

/// All arguments of one call: each by itself, then what is written against everything else.
void validate_arguments(const std::string& call, std::span<const Argument> args,
                        std::span<const std::byte> workspace, int64_t workspace_bytes) {
  for (const Argument& arg : args) validate_argument(call, arg);
  validate_workspace(call, workspace, workspace_bytes);

  const auto start = reinterpret_cast<uintptr_t>(workspace.data());
  const Range scratch{start, start + static_cast<uintptr_t>(workspace_bytes)};
  for (size_t i = 0; i < args.size(); ++i) {
    require(!intersect(range(*args[i].view), scratch),
            call + ": " + args[i].name + " must not overlap the workspace", text("shared memory"),
            "Give the workspace memory of its own.");
    if (!args[i].is_output) continue;
    for (size_t j = 0; j < args.size(); ++j) {
      if (j == i || (args[j].is_output && j < i)) continue;
      require(!may_share(*args[i].view, *args[j].view),
              call + ": " + args[i].name + " is written, so it must not overlap " + args[j].name,
              text("shared memory"), "Give the output memory of its own.");
    }
  }
}

// The arguments of a problem ---------------------------------------------------------------------

Shape query_shape(const Problem& p) { return {p.batch, p.num_heads, p.num_queries, p.head_dim}; }
Shape key_shape(const Problem& p) { return {p.batch, p.num_kv_heads, p.num_keys, p.head_dim}; }
Shape lse_shape(const Problem& p) { return {1, p.batch, p.num_heads, p.num_queries}; }
Shape bits_shape(const Plan& plan, int rows) {
  return {plan.problem.batch, plan.problem.num_heads,
          static_cast<int64_t>(plan.query_blocks.size()) * bit_groups(plan.problem, rows),
          (static_cast<int64_t>(plan.key_blocks.size()) + 7) / 8};
}
Shape block_class_shape(const Plan& plan) {
  return {plan.problem.batch, plan.problem.num_heads,
          static_cast<int64_t>(plan.query_blocks.size()),
          static_cast<int64_t>(plan.key_blocks.size())};
}

void add_block_map(std::vector<Argument>& args, const std::string& call, const Plan& plan,
                   const TensorView& block_map) {
  if (plan.problem.block_map != BlockMap::kNone) {
    const bool is_soft = plan.problem.block_map == BlockMap::kSoft;
    args.push_back(
        {"block_map", &block_map, is_soft ? DType::kF32 : DType::kI8, block_class_shape(plan)});
  } else {
    validate_absent(call, "block_map", block_map, "when the problem has no block map");
  }
}

void add_optional(std::vector<Argument>& args, const Argument& arg) {
  if (*arg.view) args.push_back(arg);
}

/// Adds an argument that is there exactly where `is_used`.
void add_where(std::vector<Argument>& args, const std::string& call, bool is_used,
               const Argument& arg, const char* because) {
  if (is_used) {
    args.push_back(arg);
  } else {
    validate_absent(call, arg.name, *arg.view, because);
  }
}

void add_k_mean(std::vector<Argument>& args, const std::string& call, const Problem& p,
                bool smooth_k, const TensorView& k_mean, bool is_output) {
  const Shape shape{p.batch, p.num_kv_heads, std::ssize(sequence_numbers(p)), p.head_dim};
  add_where(args, call, static_cast<bool>(k_mean) && smooth_k,
            {"k_mean", &k_mean, DType::kF32, shape, is_output, /*is_packed=*/true,
             /*alignment_bytes=*/8},
            "unless smooth_k is on");
}

void add_orders(std::vector<Argument>& args, const Problem& p, const TensorView& query_order,
                const TensorView& key_order) {
  add_optional(args, {"query_order", &query_order, DType::kI32, {1, 1, 1, p.num_queries}});
  add_optional(args, {"key_order", &key_order, DType::kI32, {1, 1, 1, p.num_keys}});
}

/// Each row of an order must name every index once: kernels read and write where it points. Device
/// memory is taken on trust, it cannot be looked at from here.
void validate_permutations(const std::string& call, const Plan& plan, const char* name,
                           const TensorView& order) {
  if (!order || plan.target.device != Device::kCPU) return;
  const int64_t size = order.shape[3];
  const int64_t rows = order.stride[2] == 0 ? 1 : order.shape[2];
  std::vector<bool> is_seen(static_cast<size_t>(size));
  for (int64_t n = 0; n < rows; ++n) {
    is_seen.assign(is_seen.size(), false);
    const int32_t* const row = order.row<const int32_t>(0, 0, n);
    for (int64_t at = 0; at < size; ++at) {
      const int64_t idx = row[at];
      const bool is_inside = idx >= 0 && idx < size;
      if (is_inside && !is_seen[static_cast<size_t>(idx)]) {
        is_seen[static_cast<size_t>(idx)] = true;
        continue;
      }
      require(false, call + ": " + name + " must be a permutation of 0 .. " + text(size - 1),
              text(idx) + (is_inside ? " twice" : ""),
              "Name every position once, as argsort does.");
    }
  }
}

struct WeightNames {
  const char* proj_weight = "proj_weight";
  const char* proj_bias = "proj_bias";
  const char* feature_weight_q = "feature_weight_q";
  const char* feature_bias_q = "feature_bias_q";
  const char* feature_weight_k = "feature_weight_k";
  const char* feature_bias_k = "feature_bias_k";
  const char* alpha_logit = "alpha_logit";
};
constexpr WeightNames kGradientNames{"d_proj_weight",    "d_proj_bias",        "d_feature_weight_q",
                                     "d_feature_bias_q", "d_feature_weight_k", "d_feature_bias_k",
                                     "d_alpha_logit"};

/// `has_proj_bias`: the projection's bias is the only optional weight; its gradient is there
/// exactly where it is.
void add_weights(std::vector<Argument>& args, const std::string& call, const Problem& p,
                 const Weights& weights, bool has_proj_bias, bool is_output,
                 const WeightNames& names) {
  const auto add = [&](bool is_used, const char* name, const TensorView& view, const Shape& shape,
                       const char* because) {
    add_where(args, call, is_used, {name, &view, DType::kF32, shape, is_output, /*is_packed=*/true},
              because);
  };
  const int64_t dim = p.head_dim;
  const bool has_proj = p.combine == Combine::kProjection;
  const bool has_maps = has_feature_weights(p);
  const char* no_proj = "unless combine is projection";
  const char* no_maps = "unless a linear branch has a hedgehog feature map";
  add(has_proj, names.proj_weight, weights.proj_weight, {1, 1, dim, dim}, no_proj);
  add(has_proj && has_proj_bias, names.proj_bias, weights.proj_bias, {1, 1, 1, dim},
      has_proj ? "where the forward had no proj_bias" : no_proj);
  add(has_maps, names.feature_weight_q, weights.feature_weight_q, {1, p.num_heads, dim, dim},
      no_maps);
  add(has_maps, names.feature_bias_q, weights.feature_bias_q, {1, 1, p.num_heads, dim}, no_maps);
  add(has_maps, names.feature_weight_k, weights.feature_weight_k, {1, p.num_kv_heads, dim, dim},
      no_maps);
  add(has_maps, names.feature_bias_k, weights.feature_bias_k, {1, 1, p.num_kv_heads, dim}, no_maps);
  add(p.combine == Combine::kBlend, names.alpha_logit, weights.alpha_logit, lse_shape(p),
      "unless combine is blend");
}

// Problems, feature by feature -------------------------------------------------------------------

/// Rows of a query block that belong together must fill whole vectors, or the block.
void validate_rows_together(const Problem& p, const char* rule, int rows) {
  require(rows == 0 || rows == p.block_q || (rows > 0 && rows < p.block_q && rows % 16 == 0),
          std::string(rule) + " must be 0, block_q = " + text(int64_t{p.block_q}) +
              " or a smaller multiple of 16",
          int64_t{rows}, "Pass 0 for the whole query block.");
}

void validate_soft_map(const Problem& p) {
  if (p.block_map != BlockMap::kSoft) return;
  require(!has_linear_branch(p) || p.linear_scope == LinearScope::kComplement,
          "plan: linear_scope must be complement with a soft block map",
          text(p.linear_scope == LinearScope::kAll ? "all" : "marginal"),
          "The linear branch weighs by 1 - m.");
  require(p.skip.reference == SkipReference::kNone,
          "plan: a soft block map must come without a skip rule", text("both"),
          "Train with the map, then skip with classes.");
  require(!p.low_bit.is_enabled, "plan: a soft block map must come without low_bit", text("both"),
          "Train with the map, then use low_bit with classes.");
}

void validate_skip(const Problem& p) {
  if (p.skip.reference == SkipReference::kNone) return;
  require(p.skip.log_threshold < 0.0, "plan: skip.log_threshold must be negative",  // or -inf
          p.skip.log_threshold, "Pass -inf to skip nothing.");
  validate_rows_together(p, "plan: skip.rows", p.skip.rows);
  require(p.bit_rows == 0, "plan: bit_rows must be 0 with a skip rule", int64_t{p.bit_rows},
          "Put what the bits say into the block map, or drop the rule.");
}

void validate_low_bit(const Problem& p) {
  if (!p.low_bit.is_enabled) return;
  validate_rows_together(p, "plan: low_bit.q_rows", p.low_bit.q_rows);
  const auto require_range = [](const char* rule, double range) {
    require(range > 0.0 && range <= 448.0, rule, range, "448 is the largest e4m3 value.");
  };
  require_range("plan: low_bit.p_range must be above 0 and at most 448", p.low_bit.p_range);
  require_range("plan: low_bit.v_range must be above 0 and at most 448", p.low_bit.v_range);
}

void validate_temperature(const std::string& call, double temperature) {
  require(std::isfinite(temperature) && temperature > 0.0,
          call + ": temperature must be positive and finite", temperature,
          "The published value is 0.1.");
}

/// The tensor that gives a SoftTop-k call its shape.
void validate_scores(const std::string& call, const std::string& name, const TensorView& view) {
  require(!view || std::ranges::all_of(view.shape, [](int64_t size) { return size >= 1; }),
          call + ": " + name + " must have at least one row and one column", view.shape,
          "Skip the call for an empty map.");
  const Shape& shape = view.shape;
  validate_size((call + ": " + name + " must have at most 2^40 elements").c_str(),
                {shape[0], shape[1], shape[2], shape[3]});
}

}  // namespace

void validate(const Problem& p) {
  require(p.batch >= 1, "plan: batch must be at least 1", p.batch,
          "Skip the call for an empty batch.");
  require(p.num_kv_heads >= 1, "plan: num_kv_heads must be at least 1", p.num_kv_heads,
          "Set it to the number of key/value heads.");
  require(p.num_heads >= 1 && p.num_heads % p.num_kv_heads == 0,
          "plan: num_heads must be a positive multiple of num_kv_heads = " + text(p.num_kv_heads),
          p.num_heads, "Repeat or drop key/value heads so that it divides.");
  require(p.num_queries >= 1, "plan: num_queries must be at least 1", p.num_queries,
          "Skip the call when there are no queries.");
  require(p.num_keys >= 1, "plan: num_keys must be at least 1", p.num_keys,
          "Skip the call when there are no keys.");
  require(p.head_dim >= 4 && p.head_dim <= 256 && p.head_dim % 2 == 0,
          "plan: head_dim must be even and from 4 to 256", p.head_dim,
          "Use such a head size, or the reference in Python.");
  require(p.dtype == DType::kF32 || p.dtype == DType::kBF16 || p.dtype == DType::kF16,
          "plan: dtype must be float32, bfloat16 or float16", text(name(p.dtype)),
          "Convert q, k and v.");
  require(p.block_q >= 16 && p.block_q <= 128, "plan: block_q must be from 16 to 128",
          int64_t{p.block_q}, "The usual values are 64 and 128.");
  require(p.block_k >= 16 && p.block_k <= 128, "plan: block_k must be from 16 to 128",
          int64_t{p.block_k}, "The usual values are 64 and 128.");
  require(std::isfinite(p.softmax_scale) && p.softmax_scale >= 0.0,
          "plan: softmax_scale must be finite and not negative", p.softmax_scale,
          "Pass 0 for 1 / sqrt(head_dim), or negate q.");
  require(std::isfinite(p.epsilon) && p.epsilon >= 0.0,
          "plan: epsilon must be finite and not negative", p.epsilon,
          "Pass 0, or 1e-5 for linear_scope all.");
  require(p.bit_rows >= 0 && p.bit_rows <= p.block_q,
          "plan: bit_rows must be from 0 to block_q = " + text(int64_t{p.block_q}),
          int64_t{p.bit_rows}, "0 is no tile bits, 1 a bit for every query.");
  validate_soft_map(p);
  validate_skip(p);
  validate_low_bit(p);
  const char* too_large = "plan: a tensor must have at most 2^40 elements";
  validate_size(too_large, {p.batch, p.num_heads, p.num_queries, p.head_dim});
  validate_size(too_large, {p.batch, p.num_kv_heads, p.num_keys, p.head_dim});
  validate_size(too_large,
                {p.batch, p.num_heads, p.num_queries / p.block_q + 1, p.num_keys / p.block_k + 1});
  validate_size(too_large,
                {p.batch, p.num_heads, p.num_queries + p.block_q, p.num_keys / p.block_k / 8 + 1});
  validate_segments(p.query_segments, p.num_queries, "query");
  validate_segments(p.key_segments, p.num_keys, "key");
}

void validate(const Target& target) {
  require(target.num_threads >= 1, "plan: num_threads must be at least 1",
          int64_t{target.num_threads}, "Pass default_executor().num_threads.");
}

void validate(const Plan& plan, const RouteArgs& args, std::span<const std::byte> workspace) {
  const auto require_ratio = [](const char* rule, double ratio) {
    require(ratio >= 0.0 && ratio <= 1.0, rule, ratio, "5 % is 0.05.");  // false for NaN
  };
  const RouteRule& rule = args.rule;
  require_ratio("route: critical_ratio must be from 0 to 1", rule.critical_ratio);
  require(rule.critical_count >= 0, "route: critical_count must not be negative",
          rule.critical_count, "0 takes critical_ratio.");
  require_ratio("route: critical_mass must be from 0 to 1", rule.critical_mass);
  require_ratio("route: negligible_ratio must be from 0 to 1", rule.negligible_ratio);
  require(rule.min_similarity >= -1.0 && rule.min_similarity <= 1.0,
          "route: min_similarity must be from -1 to 1", rule.min_similarity,
          "Pass -1 to rank every block.");
  const Problem& p = plan.problem;
  std::vector<Argument> list{
      {"q", &args.q, p.dtype, query_shape(p)},
      {"k", &args.k, p.dtype, key_shape(p)},
      {"block_class", &args.block_class, DType::kI8, block_class_shape(plan), /*is_output=*/true},
  };
  const auto add_projection = [&](const char* name, const TensorView& view,
                                  const TensorView& other) {
    if (!view && !other) return;  // both, or neither
    const Shape shape{1, view.shape[1] == 1 ? 1 : p.num_heads, p.head_dim, p.head_dim};
    list.push_back({name, &view, DType::kF32, shape, /*is_output=*/false, /*is_packed=*/true});
  };
  add_projection("proj_q", args.proj_q, args.proj_k);
  add_projection("proj_k", args.proj_k, args.proj_q);
  add_orders(list, p, args.query_order, args.key_order);
  add_k_mean(list, "route", p, rule.smooth_k, args.k_mean, /*is_output=*/true);
  validate_arguments("route", list, workspace, plan.route_workspace_bytes);
  validate_permutations("route", plan, "query_order", args.query_order);
  validate_permutations("route", plan, "key_order", args.key_order);
}

void validate(const SoftTopKArgs& args) {
  validate_temperature("soft_top_k", args.temperature);
  validate_scores("soft_top_k", "scores", args.scores);
  const Shape& shape = args.scores.shape;
  const Shape rows{1, 1, 1, shape[0] * shape[1] * shape[2]};
  require(args.kappa.shape == rows || !args.scores || !args.kappa,
          "soft_top_k: kappa must have one element for each of the " + text(rows[3]) +
              " rows of scores",
          args.kappa.shape, "Expand it to the rows.");
  const Argument list[] = {{"scores", &args.scores, DType::kF32, shape},
                           {"kappa", &args.kappa, DType::kF32, rows},
                           {"soft_map", &args.soft_map, DType::kF32, shape, /*is_output=*/true}};
  validate_arguments("soft_top_k", list, {}, 0);
}

void validate(const SoftTopKBackwardArgs& args) {
  validate_temperature("soft_top_k_backward", args.temperature);
  validate_scores("soft_top_k_backward", "soft_map", args.soft_map);
  const Shape& shape = args.soft_map.shape;
  const Argument list[] = {{"d_soft_map", &args.d_soft_map, DType::kF32, shape},
                           {"soft_map", &args.soft_map, DType::kF32, shape},
                           {"d_scores", &args.d_scores, DType::kF32, shape, /*is_output=*/true}};
  validate_arguments("soft_top_k_backward", list, {}, 0);
}

void validate(const Plan& plan, const ForwardArgs& args, std::span<const std::byte> workspace) {
  const Problem& p = plan.problem;
  std::vector<Argument> list{
      {"q", &args.q, p.dtype, query_shape(p)},
      {"k", &args.k, p.dtype, key_shape(p)},
      {"v", &args.v, p.dtype, key_shape(p)},
      {"o", &args.o, p.dtype, query_shape(p), /*is_output=*/true},
      {"lse", &args.lse, DType::kF32, lse_shape(p), /*is_output=*/true},
  };
  const bool has_skip = p.skip.reference != SkipReference::kNone;
  const char* no_skip = "unless the problem has a skip rule";
  add_block_map(list, "forward", plan, args.block_map);
  add_where(list, "forward", p.bit_rows > 0,
            {"tile_bits", &args.tile_bits, DType::kU8, bits_shape(plan, p.bit_rows)},
            "when bit_rows is 0");
  add_orders(list, p, args.query_order, args.key_order);
  const Shape map = block_class_shape(plan);
  add_where(list, "forward",
            static_cast<bool>(args.tile_order) && (has_skip || p.low_bit.is_enabled),
            {"tile_order", &args.tile_order, DType::kI32, {1, 1, map[2], map[3]}},
            "unless the problem has a skip rule or low_bit, whose results depend on it");
  add_k_mean(list, "forward", p, p.smooth_k, args.k_mean, /*is_output=*/false);
  add_where(list, "forward", has_skip,
            {"kept_bits", &args.kept_bits, DType::kU8, bits_shape(plan, p.skip.rows),
             /*is_output=*/true},
            no_skip);
  add_where(list, "forward", static_cast<bool>(args.row_votes) && has_skip,
            {"row_votes",
             &args.row_votes,
             DType::kF32,
             {1, p.batch, p.num_heads, map[2]},
             /*is_output=*/true},
            no_skip);
  add_weights(list, "forward", p, args.weights, static_cast<bool>(args.weights.proj_bias),
              /*is_output=*/false, {});
  validate_arguments("forward", list, workspace, plan.forward_workspace_bytes);
  validate_permutations("forward", plan, "query_order", args.query_order);
  validate_permutations("forward", plan, "key_order", args.key_order);
  validate_permutations("forward", plan, "tile_order", args.tile_order);
}

void validate(const Plan& plan, const BackwardArgs& args, std::span<const std::byte> workspace) {
  const Problem& p = plan.problem;
  std::vector<Argument> list{
      {"d_o", &args.d_o, p.dtype, query_shape(p)},
      {"q", &args.q, p.dtype, query_shape(p)},
      {"k", &args.k, p.dtype, key_shape(p)},
      {"v", &args.v, p.dtype, key_shape(p)},
      {"o", &args.o, p.dtype, query_shape(p)},
      {"lse", &args.lse, DType::kF32, lse_shape(p)},
      {"d_q", &args.d_q, p.dtype, query_shape(p), /*is_output=*/true},
      {"d_k", &args.d_k, p.dtype, key_shape(p), /*is_output=*/true},
      {"d_v", &args.d_v, p.dtype, key_shape(p), /*is_output=*/true},
  };
  const bool has_proj_bias = static_cast<bool>(args.weights.proj_bias);
  const bool has_skip = p.skip.reference != SkipReference::kNone;
  add_block_map(list, "backward", plan, args.block_map);
  add_where(list, "backward", has_skip || p.bit_rows > 0,
            {"tile_bits", &args.tile_bits, DType::kU8,
             bits_shape(plan, has_skip ? p.skip.rows : p.bit_rows)},
            "when bit_rows is 0 and there is no skip rule");
  add_orders(list, p, args.query_order, args.key_order);
  add_k_mean(list, "backward", p, p.smooth_k, args.k_mean, /*is_output=*/false);
  add_where(list, "backward", p.block_map == BlockMap::kSoft,
            {"d_block_map", &args.d_block_map, DType::kF32, block_class_shape(plan),
             /*is_output=*/true},
            "unless the block map is soft");
  add_weights(list, "backward", p, args.weights, has_proj_bias, /*is_output=*/false, {});
  add_weights(list, "backward", p, args.d_weights, has_proj_bias, /*is_output=*/true,
              kGradientNames);
  validate_arguments("backward", list, workspace, plan.backward_workspace_bytes);
  validate_permutations("backward", plan, "query_order", args.query_order);
  validate_permutations("backward", plan, "key_order", args.key_order);
}

}  // namespace sparline
