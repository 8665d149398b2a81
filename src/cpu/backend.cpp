// SPDX-License-Identifier: Apache-2.0
#include "core/backend.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdint>
#include <thread>

#include "cpu/kernels.h"

namespace sparline {
namespace {

/// Asks for large pages: a fresh workspace is tens of megabytes that a call touches once and the
/// tiles then reuse at random, so small pages cost both faults and address translation. Advice
/// only; the contents stay as they are.
std::byte* with_large_pages(std::span<std::byte> workspace) {
#ifdef __linux__
  constexpr uintptr_t kPageBytes = uintptr_t{1} << 21;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(workspace.data());
  const uintptr_t first = (begin + kPageBytes - 1) / kPageBytes * kPageBytes;
  const uintptr_t last = (begin + workspace.size()) / kPageBytes * kPageBytes;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return workspace.data();
}

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
    cpu::route(plan, args, with_large_pages(workspace), stream);
  }
  void forward(const Plan& plan, const ForwardArgs& args, std::span<std::byte> workspace,
               Stream stream) const override {
    cpu::forward(plan, args, with_large_pages(workspace), stream);
  }
  void backward(const Plan& plan, const BackwardArgs& args, std::span<std::byte> workspace,
                Stream stream) const override {
    cpu::backward(plan, args, with_large_pages(workspace), stream);
  }

  void soft_top_k(const Target& target, const SoftTopKArgs& args, Stream stream) const override {
    cpu::soft_top_k(target, args, stream);
  }
  void soft_top_k_backward(const Target& target, const SoftTopKBackwardArgs& args,
                           Stream stream) const override {
    cpu::soft_top_k_backward(target, args, stream);
  }
};

}  // namespace

const Backend& cpu_backend() {
  static const CpuBackend backend;
  return backend;
}

}  // namespace sparline
