// SPDX-License-Identifier: Apache-2.0
//
// The calls: check, then hand over to the plan's backend.
#include "sparline/attention.h"

#include "core/backend.h"
#include "core/validate.h"

namespace sparline {
namespace {

/// The stream with an executor: the caller's, or else `own`, which is then filled in.
Stream with_executor(Stream stream, const Target& target, Executor& own) {
  if (target.device != Device::kCPU || stream.executor != nullptr) return stream;
  own = default_executor(target.num_threads);
  stream.executor = &own;
  return stream;
}

void require_backend(const char* call, const Plan& plan) {
  if (plan.backend != nullptr) return;
  throw Error(ErrorCode::kUnsupported,
              std::string(call) + ": the plan must have a backend, got none: " + plan.reason +
                  ". Move the tensors to a device that a compiled backend runs on.");
}

template <class Args>
void run(const char* call, const Plan& plan, const Args& args, std::span<std::byte> workspace,
         Stream stream,
         void (Backend::*pass)(const Plan&, const Args&, std::span<std::byte>, Stream) const) {
  require_backend(call, plan);
  validate(plan, args, workspace);
  Executor own;
  (plan.backend->*pass)(plan, args, workspace, with_executor(stream, plan.target, own));
}

/// A call that depends on no problem. The smallest one that every backend runs stands in for it, so
/// that plan() stays the only place where a backend is picked.
template <class Args>
void run(const char* call, const Target& target, const Args& args, Stream stream,
         void (Backend::*pass)(const Target&, const Args&, Stream) const) {
  const Plan smallest =
      plan({.num_queries = 1, .num_keys = 1, .head_dim = 4, .dtype = DType::kBF16}, target);
  require_backend(call, smallest);
  validate(args);
  Executor own;
  (smallest.backend->*pass)(target, args, with_executor(stream, target, own));
}

}  // namespace

void route(const Plan& plan, const RouteArgs& args, std::span<std::byte> workspace, Stream stream) {
  run("route", plan, args, workspace, stream, &Backend::route);
}

void forward(const Plan& plan, const ForwardArgs& args, std::span<std::byte> workspace,
             Stream stream) {
  run("forward", plan, args, workspace, stream, &Backend::forward);
}

void backward(const Plan& plan, const BackwardArgs& args, std::span<std::byte> workspace,
              Stream stream) {
  run("backward", plan, args, workspace, stream, &Backend::backward);
}

void soft_top_k(const Target& target, const SoftTopKArgs& args, Stream stream) {
  run("soft_top_k", target, args, stream, &Backend::soft_top_k);
}

void soft_top_k_backward(const Target& target, const SoftTopKBackwardArgs& args, Stream stream) {
  run("soft_top_k_backward", target, args, stream, &Backend::soft_top_k_backward);
}

const char* version() { return SPARLINE_VERSION; }

}  // namespace sparline
