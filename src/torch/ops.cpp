// SPDX-License-Identifier: Apache-2.0
//
// The PyTorch operators: schemas, Tensor -> TensorView, allocation. No maths, and only LibTorch's
// stable ABI. Fakes, autograd and autocast are registered in Python (python/sparline/_ops.py).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <sstream>
#include <string>
#include <tuple>
#include <vector>

#include "sparline/attention.h"
#include "torch/device.h"
#include "torch/spec.h"
#include "torch/views.h"

using sparline::Spec;
using sparline::TensorView;
using torch::stable::Tensor;

// The headers' own conversion of a str argument (torch 2.10 to 2.13) leaks the string, on every
// call. This one frees it, and parses on the way.
template <>
struct torch::stable::detail::ToImpl<Spec> {
  static Spec call(StableIValue value, uint64_t, bool) {
    const auto handle = torch::stable::detail::to<StringHandle>(value);
    size_t length = 0;
    const char* data = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    const std::string text(data, length);
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return sparline::parse_spec(text);
  }
};

namespace sparline::binding {
namespace {

using torch::headeronly::ScalarType;

Plan plan_for(Spec spec, const Tensor& q, const Tensor& k, const Ints& query_segments,
              const Ints& key_segments) {
  if (q.dim() != 4 || k.dim() != 4) {
    throw Error(ErrorCode::kInvalidArgument,
                "q and k must have 4 dimensions (batch, heads, length, head_dim), got " +
                    std::to_string(q.dim()) + " and " + std::to_string(k.dim()) +
                    ". Add the missing ones.");
  }
  Problem& problem = spec.problem;
  problem.batch = q.size(0);
  problem.num_heads = q.size(1);
  problem.num_kv_heads = k.size(1);
  problem.num_queries = q.size(2);
  problem.num_keys = k.size(2);
  problem.head_dim = q.size(3);
  problem.dtype = dtype_of(q, "q");
  problem.query_segments = segments_of(query_segments, "query_segments");
  problem.key_segments = segments_of(key_segments, "key_segments");
  Target target = target_of(q, spec.backend);
  if (spec.device && *spec.device != target.device) {
    target.device = *spec.device;
    target.cuda_arch = 0;
  }
  if (spec.cuda_arch > 0) target.cuda_arch = spec.cuda_arch;
  return sparline::plan(problem, target);
}

/// What the map that came with a call holds. `spec` says so only where there is no map to look at.
BlockMap kind_of(const std::optional<Tensor>& block_map) {
  if (!block_map) return BlockMap::kNone;
  return block_map->scalar_type() == ScalarType::Float ? BlockMap::kSoft : BlockMap::kClass;
}

// Memory and threads -----------------------------------------------------------------------------

Tensor like(const Tensor& tensor) {
  Tensor result = torch::stable::empty_like(tensor);
  // A broadcast tensor may come back in an order of its own; the kernels want rows.
  if (result.dim() == 0 || result.stride(result.dim() - 1) == 1) return result;
  return torch::stable::empty(tensor.sizes(), tensor.scalar_type(), std::nullopt, tensor.device());
}

Tensor with_unit_stride(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return last >= 0 && tensor.stride(last) != 1 ? torch::stable::contiguous(tensor) : tensor;
}

Tensor empty(const Ints& shape, ScalarType dtype, const Tensor& beside) {
  return torch::stable::empty(shape, dtype, std::nullopt, beside.device());
}

int64_t num_query_blocks(const Plan& plan) {
  return static_cast<int64_t>(plan.query_blocks.size());
}
int64_t num_key_blocks(const Plan& plan) { return static_cast<int64_t>(plan.key_blocks.size()); }
int64_t num_sequences(const Plan& plan) { return std::ssize(sequence_numbers(plan.problem)); }

/// Scratch from torch's allocator, aligned to 64 bytes.
struct Workspace {
  Workspace(const Tensor& q, int64_t bytes) : tensor(empty({bytes + 63}, ScalarType::Byte, q)) {
    auto* const start = static_cast<std::byte*>(tensor.data_ptr());
    const uintptr_t past = reinterpret_cast<uintptr_t>(start) % 64;
    span = {start + (64 - past) % 64, static_cast<size_t>(bytes)};
  }
  Tensor tensor;
  std::span<std::byte> span;
};

/// Runs the loops of the core on torch's own threads, so torch.set_num_threads holds here too.
void torch_parallel_for(int num_threads, int64_t count, void (*body)(void*, int64_t),
                        void* body_context) {
  std::atomic<int64_t> next{0};
  const auto drain = [&](int64_t, int64_t) {
    for (int64_t idx = next++; idx < count; idx = next++) body(body_context, idx);
  };
  torch::stable::parallel_for(0, std::min<int64_t>(num_threads, count), 1, drain);
}

/// A call of the core: its plan, the executor or the stream, the workspace.
template <class Args>
void run(void (*call)(const Plan&, const Args&, std::span<std::byte>, Stream), const Plan& plan,
         const Args& args, const Tensor& q, int64_t workspace_bytes) {
  const Executor executor{.num_threads = plan.target.num_threads,
                          .parallel_for = torch_parallel_for};
  const DeviceScope device(q);
  const Workspace workspace(q, workspace_bytes);
  call(plan, args, workspace.span, {.cuda_stream = device.cuda_stream(), .executor = &executor});
}

template <class Args>
void run_without_plan(void (*call)(const Target&, const Args&, Stream), const Args& args,
                      const Tensor& tensor) {
  const Target target = target_of(tensor);
  const Executor executor{.num_threads = target.num_threads, .parallel_for = torch_parallel_for};
  const DeviceScope device(tensor);
  call(target, args, {.cuda_stream = device.cuda_stream(), .executor = &executor});
}

/// Refuses tensors that no backend runs before anything is allocated for them.
void require_backend(const char* call, const Plan& plan) {
  if (plan.backend != nullptr) return;
  throw Error(ErrorCode::kUnsupported, std::string(call) + ": " + plan.reason +
                                           ". Move the tensors to the CPU, or pass "
                                           "backend=\"reference\".");
}

// The operators ----------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> route(const Tensor& q, const Tensor& k,
                                 const std::optional<Tensor>& proj_q,
                                 const std::optional<Tensor>& proj_k,
                                 const std::optional<Tensor>& query_order,
                                 const std::optional<Tensor>& key_order, const Ints& query_segments,
                                 const Ints& key_segments, const Spec& spec) {
  const Plan plan = plan_for(spec, q, k, query_segments, key_segments);
  require_backend("route", plan);
  const ViewsBeside view(q, "q");
  Tensor block_class = empty({q.size(0), q.size(1), num_query_blocks(plan), num_key_blocks(plan)},
                             ScalarType::Char, q);
  Tensor k_mean = empty(
      spec.gives_k_mean ? Ints{k.size(0), k.size(1), num_sequences(plan), k.size(3)} : Ints{0},
      ScalarType::Float, q);
  run<RouteArgs>(sparline::route, plan,
                 {.q = view(q, "q"),
                  .k = view(k, "k"),
                  .rule = spec.rule,
                  .proj_q = view(proj_q, "proj_q"),
                  .proj_k = view(proj_k, "proj_k"),
                  .query_order = view(query_order, "query_order"),
                  .key_order = view(key_order, "key_order"),
                  .block_class = view(block_class, "block_class"),
                  .k_mean = spec.gives_k_mean ? view(k_mean, "k_mean") : TensorView{}},
                 q, plan.route_workspace_bytes);
  return {block_class, k_mean};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attend(
    const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& block_map,
    const std::optional<Tensor>& tile_bits, const std::optional<Tensor>& query_order,
    const std::optional<Tensor>& key_order, const std::optional<Tensor>& tile_order,
    const std::optional<Tensor>& k_mean, const std::vector<Tensor>& weights,
    const Ints& query_segments, const Ints& key_segments, Spec spec) {
  spec.problem.block_map = kind_of(block_map);
  const Plan plan = plan_for(spec, q, k, query_segments, key_segments);
  require_backend("attend", plan);
  const ViewsBeside view(q, "q");
  Tensor o = like(q);
  Tensor lse = empty({q.size(0), q.size(1), q.size(2)}, ScalarType::Float, q);
  const SkipRule& skip = plan.problem.skip;
  const bool skips = skip.reference != SkipReference::kNone;
  const int64_t bit_rows = num_query_blocks(plan) * bit_groups(plan.problem, skip.rows);
  const Ints absent{0};
  Tensor kept_bits =
      empty(skips ? Ints{q.size(0), q.size(1), bit_rows, (num_key_blocks(plan) + 7) / 8} : absent,
            ScalarType::Byte, q);
  Tensor row_votes =
      empty(spec.counts_votes ? Ints{q.size(0), q.size(1), num_query_blocks(plan)} : absent,
            ScalarType::Float, q);
  run<ForwardArgs>(sparline::forward, plan,
                   {.q = view(q, "q"),
                    .k = view(k, "k"),
                    .v = view(v, "v"),
                    .block_map = view(block_map, "block_map"),
                    .tile_bits = view(tile_bits, "tile_bits"),
                    .query_order = view(query_order, "query_order"),
                    .key_order = view(key_order, "key_order"),
                    .tile_order = view(tile_order, "tile_order"),
                    .k_mean = view(k_mean, "k_mean"),
                    .weights = view.weights(weights),
                    .o = view(o, "o"),
                    .lse = view(lse, "lse"),
                    .kept_bits = skips ? view(kept_bits, "kept_bits") : TensorView{},
                    .row_votes = spec.counts_votes ? view(row_votes, "row_votes") : TensorView{}},
                   q, plan.forward_workspace_bytes);
  return {o, lse, kept_bits, row_votes};
}

/// What the backward of a problem differentiates: skipped tiles have become bits, and rounding to
/// few bits is passed straight through.
Problem differentiated(Problem problem) {
  if (problem.skip.reference != SkipReference::kNone) {
    problem.bit_rows = problem.skip.rows == 0 ? problem.block_q : problem.skip.rows;
    problem.skip = {};
  }
  problem.low_bit = {};
  return problem;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, std::vector<Tensor>> attend_backward(
    const Tensor& d_o_given, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& o,
    const Tensor& lse_given, const std::optional<Tensor>& block_map,
    const std::optional<Tensor>& tile_bits, const std::optional<Tensor>& query_order,
    const std::optional<Tensor>& key_order, const std::optional<Tensor>& k_mean,
    const std::vector<Tensor>& weights, const Ints& query_segments, const Ints& key_segments,
    Spec spec) {
  const bool recomputes_lse = spec.recompute_lse && spec.problem.low_bit.is_enabled;
  spec.problem.block_map = kind_of(block_map);
  spec.problem = differentiated(spec.problem);
  const Plan plan = plan_for(spec, q, k, query_segments, key_segments);
  require_backend("attend_backward", plan);
  const ViewsBeside view(q, "q");
  Tensor lse = lse_given;
  if (recomputes_lse) {  // needs the sparse branch alone
    spec.problem.combine = Combine::kSparse;
    lse = std::get<1>(attend(q, k, v, block_map, tile_bits, query_order, key_order, std::nullopt,
                             k_mean, {}, query_segments, key_segments, spec));
  }
  // The one copy made here: autograd hands over gradients that it may have broadcast, as sum()
  // does.
  const Tensor d_o = with_unit_stride(d_o_given);
  Tensor d_q = like(q);
  Tensor d_k = like(k);
  Tensor d_v = like(v);
  const bool is_soft = plan.problem.block_map == BlockMap::kSoft;
  Tensor d_block_map = empty(
      is_soft ? Ints{q.size(0), q.size(1), num_query_blocks(plan), num_key_blocks(plan)} : Ints{0},
      ScalarType::Float, q);
  std::vector<Tensor> d_weights;
  d_weights.reserve(weights.size());
  for (const Tensor& weight : weights) d_weights.push_back(like(weight));
  run<BackwardArgs>(sparline::backward, plan,
                    {.d_o = view(d_o, "d_o"),
                     .q = view(q, "q"),
                     .k = view(k, "k"),
                     .v = view(v, "v"),
                     .o = view(o, "o"),
                     .lse = view(lse, "lse"),
                     .block_map = view(block_map, "block_map"),
                     .tile_bits = view(tile_bits, "tile_bits"),
                     .query_order = view(query_order, "query_order"),
                     .key_order = view(key_order, "key_order"),
                     .k_mean = view(k_mean, "k_mean"),
                     .weights = view.weights(weights),
                     .d_q = view(d_q, "d_q"),
                     .d_k = view(d_k, "d_k"),
                     .d_v = view(d_v, "d_v"),
                     .d_block_map = is_soft ? view(d_block_map, "d_block_map") : TensorView{},
                     .d_weights = view.weights(d_weights)},
                    q, plan.backward_workspace_bytes);
  return {d_q, d_k, d_v, d_block_map, d_weights};
}

Tensor soft_top_k(const Tensor& scores_given, const Tensor& kappa_given, double temperature) {
  const Tensor scores = with_unit_stride(scores_given);
  const Tensor kappa = torch::stable::contiguous(kappa_given);
  const ViewsBeside view(scores, "scores");
  Tensor soft_map = like(scores);
  view.require_here(kappa, "kappa");
  TensorView flat_kappa = contiguous_view(kappa.data_ptr(), dtype_of(kappa, "kappa"),
                                          {1, 1, 1, static_cast<int64_t>(kappa.numel())});
  run_without_plan<SoftTopKArgs>(sparline::soft_top_k,
                                 {.scores = view(scores, "scores"),
                                  .kappa = flat_kappa,
                                  .temperature = temperature,
                                  .soft_map = view(soft_map, "soft_map")},
                                 scores);
  return soft_map;
}

Tensor soft_top_k_backward(const Tensor& d_soft_map_given, const Tensor& soft_map_given,
                           double temperature) {
  const Tensor d_soft_map = with_unit_stride(d_soft_map_given);
  const Tensor soft_map = with_unit_stride(soft_map_given);
  const ViewsBeside view(soft_map, "soft_map");
  Tensor d_scores = like(soft_map);
  run_without_plan<SoftTopKBackwardArgs>(sparline::soft_top_k_backward,
                                         {.d_soft_map = view(d_soft_map, "d_soft_map"),
                                          .soft_map = view(soft_map, "soft_map"),
                                          .temperature = temperature,
                                          .d_scores = view(d_scores, "d_scores")},
                                         soft_map);
  return d_scores;
}

std::string explain(const Tensor& q, const Tensor& k, const Ints& query_segments,
                    const Ints& key_segments, const Spec& spec) {
  return sparline::explain(plan_for(spec, q, k, query_segments, key_segments));
}

void write_list(std::ostream& json, const std::vector<std::string>& items) {
  const char* separator = "[";
  for (const std::string& item : items) {
    json << separator << '"' << item << '"';
    separator = ", ";
  }
  json << (items.empty() ? "[]" : "]");
}

std::string build_info() {
  std::ostringstream json;
  json << R"({"version": ")" << version() << R"(", "compiler": ")" << SPARLINE_COMPILER
       << R"(", "torch_abi": "2.10", "cuda_archs": )";
  write_list(json, compiled_cuda_archs());
  json << R"(, "backends": )";
  write_list(json, compiled_backends());
  json << "}";
  return json.str();
}

}  // namespace
}  // namespace sparline::binding

// Empty tensors stand for absent ones, in and out. `block_map` is int8 classes or a float32 soft
// map. `weights` is empty or seven float32 tensors: proj_weight (D, D), proj_bias (D),
// feature_weight_q (H, D, D), feature_bias_q (H, D), feature_weight_k (H_kv, D, D), feature_bias_k
// (H_kv, D), alpha_logit (B, H, N_q). Orders are int32 permutations. Segments are flat: begin, end,
// sequence, is_protected. `spec` is described in spec.h. route returns block_class and k_mean, the
// latter only with k_mean=1; attend and its backward take it where they smooth keys. attend returns
// o, lse, kept_bits with a skip rule, and row_votes with row_votes=1: counting them takes time. Its
// backward then takes kept_bits for tile_bits.
STABLE_TORCH_LIBRARY(sparline, library) {
  library.def(
      "route(Tensor q, Tensor k, Tensor? proj_q, Tensor? proj_k, Tensor? query_order, "
      "Tensor? key_order, int[] query_segments, int[] key_segments, str spec) -> (Tensor, Tensor)");
  library.def(
      "attend(Tensor q, Tensor k, Tensor v, Tensor? block_map, Tensor? tile_bits, "
      "Tensor? query_order, Tensor? key_order, Tensor? tile_order, Tensor? k_mean, "
      "Tensor[] weights, int[] query_segments, int[] key_segments, str spec) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "attend_backward(Tensor d_o, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, "
      "Tensor? block_map, Tensor? tile_bits, Tensor? query_order, Tensor? key_order, "
      "Tensor? k_mean, Tensor[] weights, int[] query_segments, int[] key_segments, str spec) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor[])");
  library.def("soft_top_k(Tensor scores, Tensor kappa, float temperature) -> Tensor");
  library.def(
      "soft_top_k_backward(Tensor d_soft_map, Tensor soft_map, float temperature) -> Tensor");
  library.def(
      "explain(Tensor q, Tensor k, int[] query_segments, int[] key_segments, str spec) -> str");
  library.def("build_info() -> str");
}

// CUDA tensors take the same road: plan() says what can run them.
template <class Library>
void implement(Library& library) {
  library.impl("route", TORCH_BOX(&sparline::binding::route));
  library.impl("attend", TORCH_BOX(&sparline::binding::attend));
  library.impl("attend_backward", TORCH_BOX(&sparline::binding::attend_backward));
  library.impl("soft_top_k", TORCH_BOX(&sparline::binding::soft_top_k));
  library.impl("soft_top_k_backward", TORCH_BOX(&sparline::binding::soft_top_k_backward));
}
STABLE_TORCH_LIBRARY_IMPL(sparline, CPU, library) { implement(library); }
STABLE_TORCH_LIBRARY_IMPL(sparline, CUDA, library) { implement(library); }
STABLE_TORCH_LIBRARY_IMPL(sparline, CompositeExplicitAutograd, library) {
  library.impl("explain", TORCH_BOX(&sparline::binding::explain));
  library.impl("build_info", TORCH_BOX(&sparline::binding::build_info));
}
