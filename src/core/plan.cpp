// SPDX-License-Identifier: Apache-2.0
//
// The one decision: plan() asks the compiled backends in order of preference, and writes down what
// each answered.
#include <cmath>
#include <cstdlib>
#include <sstream>

#include "core/backend.h"
#include "core/validate.h"

namespace sparline {
namespace {

/// All compiled backends, best first.
std::vector<const Backend*> backends() {
#ifdef SPARLINE_WITH_CUDA
  return {&cuda_backend(), &cpu_backend()};
#else
  return {&cpu_backend()};
#endif
}

#ifdef SPARLINE_WITH_CUDA
constexpr bool kHasCuda = true;
#else
constexpr bool kHasCuda = false;
#endif
constexpr const char* kNoCuda =
    "this build has no CUDA backend; build again where CMake finds nvcc (CUDA 12.4 or later), or "
    "with -DSPARLINE_BUILD_CUDA=ON to be told why it does not";

std::string backend_names() {
  std::string names;
  for (const Backend* backend : backends())
    names += (names.empty() ? "" : ", ") + std::string(backend->name());
  return names;
}

/// The backend that was asked for by name, or "" for a free choice.
std::string asked_backend(const Target& target) {
  const char* forced = std::getenv("SPARLINE_BACKEND");
  const bool is_forced = forced != nullptr && *forced != '\0';
  const std::string name = is_forced ? forced : target.backend;
  if (name.empty()) return name;
  for (const Backend* backend : backends()) {
    if (name == backend->name()) return name;
  }
  throw Error(ErrorCode::kInvalidArgument,
              std::string("plan: ") + (is_forced ? "SPARLINE_BACKEND" : "backend") +
                  " must name a compiled backend (" + backend_names() + "), got \"" + name +
                  "\". " + (is_forced ? "Unset it" : "Leave it empty") +
                  " to take the best that fits" +
                  (name == "cuda" ? std::string("; ") + kNoCuda : "") + ".");
}

Problem normalised(Problem problem) {
  if (problem.softmax_scale == 0.0) {
    problem.softmax_scale = 1.0 / std::sqrt(static_cast<double>(problem.head_dim));
  }
  if (problem.skip.rows == 0) problem.skip.rows = problem.block_q;
  if (problem.low_bit.q_rows == 0) problem.low_bit.q_rows = problem.block_q;
  if (problem.query_segments.empty())
    problem.query_segments = {{.begin = 0, .end = problem.num_queries}};
  if (problem.key_segments.empty()) problem.key_segments = {{.begin = 0, .end = problem.num_keys}};
  return problem;
}

const char* name(Device device) { return device == Device::kCPU ? "CPU" : "CUDA"; }

const char* name(Combine combine) {
  switch (combine) {
    case Combine::kSparse: return "sparse";
    case Combine::kLinear: return "linear";
    case Combine::kSum: return "sum";
    case Combine::kProjection: return "projection";
    case Combine::kBlend: return "blend";
  }
  return "unknown";
}

const char* name(FeatureMap map) {
  switch (map) {
    case FeatureMap::kSoftmax: return "softmax";
    case FeatureMap::kElu1: return "elu1";
    case FeatureMap::kRelu: return "relu";
    case FeatureMap::kIdentity: return "identity";
    case FeatureMap::kHedgehog: return "hedgehog";
    case FeatureMap::kHedgehogExp: return "hedgehog_exp";
  }
  return "unknown";
}

const char* name(LinearScope scope) {
  switch (scope) {
    case LinearScope::kMarginal: return "marginal";
    case LinearScope::kComplement: return "complement";
    case LinearScope::kAll: return "all";
  }
  return "unknown";
}

const char* name(BlockMap map) {
  switch (map) {
    case BlockMap::kNone: return "all critical";
    case BlockMap::kClass: return "classes from a block map";
    case BlockMap::kSoft: return "weights from a soft block map";
  }
  return "unknown";
}

const char* name(SkipReference reference) {
  switch (reference) {
    case SkipReference::kNone: return "none";
    case SkipReference::kRunningMax: return "running_max";
    case SkipReference::kKeptLse: return "kept_lse";
  }
  return "unknown";
}

}  // namespace

Plan plan(const Problem& problem, const Target& target) {
  validate(problem);
  validate(target);
  Plan plan;
  plan.problem = normalised(problem);
  plan.target = target;
  plan.query_blocks =
      make_blocks(plan.problem.query_segments, problem.num_queries, problem.block_q);
  plan.key_blocks = make_blocks(plan.problem.key_segments, problem.num_keys, problem.block_k);

  const std::string asked = asked_backend(target);
  for (const Backend* backend : backends()) {
    const bool is_asked = asked.empty() || asked == backend->name();
    const std::string why =
        is_asked ? backend->rejects(plan.problem, target) : asked + " was asked for";
    if (why.empty()) {
      plan.backend = backend;
      plan.reason = asked.empty() ? "the first that fits" : "asked for by name";
      backend->complete(plan);
      return plan;
    }
    plan.rejected.push_back(std::string(backend->name()) + ": " + why);
  }
  if (!kHasCuda && target.device == Device::kCUDA) {
    plan.rejected.push_back(std::string("cuda: ") + kNoCuda);
  }
  plan.reason = std::string("no compiled backend runs this problem on ") + name(target.device);
  for (const std::string& why : plan.rejected) plan.reason += "; " + why;
  return plan;
}

std::string explain(const Plan& plan) {
  const Problem& p = plan.problem;
  std::ostringstream out;
  out << "backend: ";
  if (plan.backend != nullptr) {
    out << plan.backend->name() << " (" << plan.backend->describe() << "), " << plan.reason << "\n";
  } else {
    out << "none, " << plan.reason << "\n";
  }
  out << "problem: batch " << p.batch << ", " << p.num_heads << " heads over " << p.num_kv_heads
      << " kv heads, " << p.num_queries << " queries x " << p.num_keys << " keys, head_dim "
      << p.head_dim << ", " << name(p.dtype) << ", softmax_scale " << p.softmax_scale << "\n";
  out << "blocks: " << plan.query_blocks.size() << " x " << plan.key_blocks.size() << " of "
      << p.block_q << " x " << p.block_k << " rows, " << name(p.block_map);
  if (p.bit_rows > 0) out << ", a bit for every " << p.bit_rows << " query rows of a tile";
  out << "\n";
  if (p.skip.reference != SkipReference::kNone) {
    out << "skip: tiles below " << name(p.skip.reference) << " + " << p.skip.log_threshold
        << ", decided by " << p.skip.rows << " rows together\n";
  }
  if (p.low_bit.is_enabled) {
    out << "low_bit: q k int8, a step for every " << p.low_bit.q_rows << " query rows; p v e4m3 of "
        << p.low_bit.p_range << " and " << p.low_bit.v_range << "\n";
  }
  if (p.smooth_k) out << "keys: less the mean key of their sequence\n";
  out << "output: " << name(p.combine);
  if (has_linear_branch(p)) {
    out << ", feature map " << name(p.feature_map) << " (" << feature_dim(p) << " features), scope "
        << name(p.linear_scope) << ", epsilon " << p.epsilon;
  }
  out << "\n";
  if (plan.backend != nullptr) {
    out << "workspace_bytes: route " << plan.route_workspace_bytes << ", forward "
        << plan.forward_workspace_bytes << ", backward " << plan.backward_workspace_bytes << "\n";
    if (plan.target.device == Device::kCPU) {
      out << "threads: " << plan.target.num_threads << ", ";
    } else {
      out << "device: ";
      if (plan.target.cuda_arch > 0) {
        out << "sm_" << plan.target.cuda_arch << ", ";
      } else {
        out << "any, ";
      }
    }
    out << plan.heads_per_wave << " heads in flight\n" << plan.backend->remarks(plan);
  }
  for (const std::string& why : plan.rejected) out << "rejected: " << why << "\n";
  return out.str();
}

#ifndef SPARLINE_WITH_CUDA
std::vector<std::string> compiled_cuda_archs() { return {}; }
int device_arch(int) { return 0; }
#endif

std::vector<std::string> compiled_backends() {
  std::vector<std::string> lines;
  for (const Backend* backend : backends()) {
    lines.push_back(std::string(backend->name()) + ": " + backend->describe());
  }
  return lines;
}

}  // namespace sparline
