// SPDX-License-Identifier: Apache-2.0
#include "core/backend.h"

#include <algorithm>
#include <thread>

#include "cpu/kernels.h"

namespace sparline {
namespace {

class CpuBackend final : public Backend {
 public:
  const char* name() const override { return "cpu"; }

  std::string describe() const override {
    return cpu::simd_target() + ", " + std::to_string(std::thread::hardware_concurrency()) +
           " hardware threads";
  }

  std::string rejects(const Problem&, const Target& target) const override {
    return target.device == Device::kCPU ? "" : "it runs on CPU tensors only";
  }

  void complete(Plan& plan) const override {
    // As many heads in flight as threads: enough tasks for all, and the staged tiles of the others
    // need no memory.
    plan.heads_per_wave =
        std::min<int64_t>(plan.problem.batch * plan.problem.num_kv_heads, plan.target.num_threads);
    plan.route_workspace_bytes = cpu::route_workspace_bytes(plan);
    plan.forward_workspace_bytes = cpu::forward_workspace_bytes(plan);
    plan.backward_workspace_bytes = cpu::backward_workspace_bytes(plan);
  }

  void route(const Plan& plan, const RouteArgs& args, std::span<std::byte> workspace,
             Stream stream) const override {
    cpu::route(plan, args, workspace.data(), with_executor(stream, own_));
  }
  void forward(const Plan& plan, const ForwardArgs& args, std::span<std::byte> workspace,
               Stream stream) const override {
    cpu::forward(plan, args, workspace.data(), with_executor(stream, own_));
  }
  void backward(const Plan& plan, const BackwardArgs& args, std::span<std::byte> workspace,
                Stream stream) const override {
    cpu::backward(plan, args, workspace.data(), with_executor(stream, own_));
  }

 private:
  static Stream with_executor(Stream stream, const Executor& fallback) {
    if (stream.executor == nullptr) stream.executor = &fallback;
    return stream;
  }

  const Executor own_ = default_executor();
};

}  // namespace

const Backend& cpu_backend() {
  static const CpuBackend backend;
  return backend;
}

}  // namespace sparline
