// SPDX-License-Identifier: Apache-2.0
//
// The three calls: check, then hand over to the plan's backend.
#include "sparline/attention.h"

#include "core/backend.h"
#include "core/validate.h"

namespace sparline {
namespace {

template <class Args>
void run(const char* call, const Plan& plan, const Args& args, std::span<std::byte> workspace,
         Stream stream,
         void (Backend::*pass)(const Plan&, const Args&, std::span<std::byte>, Stream) const) {
  if (plan.backend == nullptr) {
    throw Error(ErrorCode::kUnsupported,
                std::string(call) + ": the plan must have a backend, got none: " + plan.reason +
                    ". Move the tensors to a device that a compiled backend runs on.");
  }
  validate(plan, args, workspace);
  Executor own;
  if (plan.target.device == Device::kCPU && stream.executor == nullptr) {
    own = default_executor(plan.target.num_threads);
    stream.executor = &own;
  }
  (plan.backend->*pass)(plan, args, workspace, stream);
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

const char* version() { return SPARLINE_VERSION; }

}  // namespace sparline
