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

Plan plan_for(Spec spec, const Tensor& q, const Tensor& k, bool has_block_map,
              const Ints& query_segments, const Ints& key_segments) {
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
  problem.has_block_map = has_block_map;
  problem.query_segments = segments_of(query_segments, "query_segments");
  problem.key_segments = segments_of(key_segments, "key_segments");
  return sparline::plan(problem, {.device = q.is_cuda() ? Device::kCUDA : Device::kCPU,
                                  .num_threads = static_cast<int>(torch::stable::get_num_threads()),
                                  .backend = spec.backend});
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

/// Scratch from torch's allocator, aligned to 64 bytes.
struct Workspace {
  Workspace(const Tensor& q, int64_t bytes)
      : tensor(torch::stable::empty({bytes + 63}, ScalarType::Byte, std::nullopt, q.device())) {
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

/// A call of the core: its plan, the executor, the workspace.
template <class Args>
void run(void (*call)(const Plan&, const Args&, std::span<std::byte>, Stream), const Plan& plan,
         const Args& args, const Tensor& q, int64_t workspace_bytes) {
  const Executor executor{.num_threads = plan.target.num_threads,
                          .parallel_for = torch_parallel_for};
  const Workspace workspace(q, workspace_bytes);
  call(plan, args, workspace.span, {.executor = &executor});
}

/// Refuses tensors that no backend runs before anything is allocated for them.
void require_backend(const char* call, const Plan& plan) {
  if (plan.backend != nullptr) return;
  throw Error(ErrorCode::kUnsupported, std::string(call) + ": " + plan.reason +
                                           ". Move the tensors to the CPU, or pass "
                                           "backend=\"reference\".");
}

// The operators ----------------------------------------------------------------------------------

Tensor route(const Tensor& q, const Tensor& k, const Ints& query_segments, const Ints& key_segments,
             const Spec& spec) {
  const Plan plan = plan_for(spec, q, k, /*has_block_map=*/false, query_segments, key_segments);
  require_backend("route", plan);
  const Ints shape{q.size(0), q.size(1), static_cast<int64_t>(plan.query_blocks.size()),
                   static_cast<int64_t>(plan.key_blocks.size())};
  Tensor block_class = torch::stable::empty(shape, ScalarType::Char, std::nullopt, q.device());
  run<RouteArgs>(sparline::route, plan,
                 {.q = view_of(q, "q"),
                  .k = view_of(k, "k"),
                  .rule = spec.rule,
                  .block_class = view_of(block_class, "block_class")},
                 q, plan.route_workspace_bytes);
  return block_class;
}

std::tuple<Tensor, Tensor> attend(const Tensor& q, const Tensor& k, const Tensor& v,
                                  const std::optional<Tensor>& block_class,
                                  const std::vector<Tensor>& weights, const Ints& query_segments,
                                  const Ints& key_segments, const Spec& spec) {
  const Plan plan = plan_for(spec, q, k, block_class.has_value(), query_segments, key_segments);
  require_backend("attend", plan);
  Tensor o = like(q);
  Tensor lse = torch::stable::empty(Ints{q.size(0), q.size(1), q.size(2)}, ScalarType::Float,
                                    std::nullopt, q.device());
  run<ForwardArgs>(
      sparline::forward, plan,
      {.q = view_of(q, "q"),
       .k = view_of(k, "k"),
       .v = view_of(v, "v"),
       .block_class = block_class ? view_of(*block_class, "block_class") : TensorView{},
       .weights = weights_of(weights),
       .o = view_of(o, "o"),
       .lse = view_of(lse, "lse")},
      q, plan.forward_workspace_bytes);
  return {o, lse};
}

std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> attend_backward(
    const Tensor& d_o_given, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& o,
    const Tensor& lse, const std::optional<Tensor>& block_class, const std::vector<Tensor>& weights,
    const Ints& query_segments, const Ints& key_segments, const Spec& spec) {
  const Plan plan = plan_for(spec, q, k, block_class.has_value(), query_segments, key_segments);
  require_backend("attend_backward", plan);
  // The one copy made here: autograd hands over gradients that it may have broadcast, as sum()
  // does.
  const Tensor d_o = with_unit_stride(d_o_given);
  Tensor d_q = like(q);
  Tensor d_k = like(k);
  Tensor d_v = like(v);
  std::vector<Tensor> d_weights;
  d_weights.reserve(weights.size());
  for (const Tensor& weight : weights) d_weights.push_back(like(weight));
  run<BackwardArgs>(
      sparline::backward, plan,
      {.d_o = view_of(d_o, "d_o"),
       .q = view_of(q, "q"),
       .k = view_of(k, "k"),
       .v = view_of(v, "v"),
       .o = view_of(o, "o"),
       .lse = view_of(lse, "lse"),
       .block_class = block_class ? view_of(*block_class, "block_class") : TensorView{},
       .weights = weights_of(weights),
       .d_q = view_of(d_q, "d_q"),
       .d_k = view_of(d_k, "d_k"),
       .d_v = view_of(d_v, "d_v"),
       .d_weights = weights_of(d_weights)},
      q, plan.backward_workspace_bytes);
  return {d_q, d_k, d_v, d_weights};
}

std::string explain(const Tensor& q, const Tensor& k, const Ints& query_segments,
                    const Ints& key_segments, const Spec& spec, bool has_block_map) {
  return sparline::explain(plan_for(spec, q, k, has_block_map, query_segments, key_segments));
}

std::string build_info() {
  std::ostringstream json;
  json << R"({"version": ")" << version() << R"(", "compiler": ")" << SPARLINE_COMPILER
       << R"(", "torch_abi": "2.10", "cuda_archs": [], "backends": [)";
  const char* separator = "";
  for (const std::string& backend : compiled_backends()) {
    json << separator << '"' << backend << '"';
    separator = ", ";
  }
  json << "]}";
  return json.str();
}

}  // namespace
}  // namespace sparline::binding

// `weights` is empty or six float32 tensors, empty ones standing for absent ones: proj_weight (D,
// D), proj_bias (D), feature_weight_q (H, D, D), feature_bias_q (H, D), feature_weight_k (H_kv, D,
// D), feature_bias_k (H_kv, D). Segments are flat: begin, end, sequence, is_protected. `spec` is
// described in spec.h.
STABLE_TORCH_LIBRARY(sparline, library) {
  library.def(
      "route(Tensor q, Tensor k, int[] query_segments, int[] key_segments, str spec) -> Tensor");
  library.def(
      "attend(Tensor q, Tensor k, Tensor v, Tensor? block_class, Tensor[] weights, "
      "int[] query_segments, int[] key_segments, str spec) -> (Tensor, Tensor)");
  library.def(
      "attend_backward(Tensor d_o, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, "
      "Tensor? block_class, Tensor[] weights, int[] query_segments, int[] key_segments, str spec) "
      "-> (Tensor, Tensor, Tensor, Tensor[])");
  library.def(
      "explain(Tensor q, Tensor k, int[] query_segments, int[] key_segments, str spec, "
      "bool has_block_map=True) -> str");
  library.def("build_info() -> str");
}

// CUDA tensors take the same road: plan() says what can run them.
STABLE_TORCH_LIBRARY_IMPL(sparline, CPU, library) {
  library.impl("route", TORCH_BOX(&sparline::binding::route));
  library.impl("attend", TORCH_BOX(&sparline::binding::attend));
  library.impl("attend_backward", TORCH_BOX(&sparline::binding::attend_backward));
}
STABLE_TORCH_LIBRARY_IMPL(sparline, CUDA, library) {
  library.impl("route", TORCH_BOX(&sparline::binding::route));
  library.impl("attend", TORCH_BOX(&sparline::binding::attend));
  library.impl("attend_backward", TORCH_BOX(&sparline::binding::attend_backward));
}
STABLE_TORCH_LIBRARY_IMPL(sparline, CompositeExplicitAutograd, library) {
  library.impl("explain", TORCH_BOX(&sparline::binding::explain));
  library.impl("build_info", TORCH_BOX(&sparline::binding::build_info));
}
