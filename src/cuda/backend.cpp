// SPDX-License-Identifier: Apache-2.0
#include "core/backend.h"

#include <sstream>

#include "cuda/device.h"
#include "cuda/host.h"

namespace sparline {
namespace {

constexpr int kOldestArch = 80;  // cp.async, ldmatrix, mma.sync of bf16
constexpr int kOldestFp8Arch = 89;

/// What was compiled, as CMake names it: "80-real;90" is machine code for 8.x and for 9.0, and PTX
/// of 9.0 from which the driver makes code for newer devices.
struct CompiledArch {
  int arch = 0;
  bool has_code = true;
  bool has_ptx = true;
};

std::vector<CompiledArch> compiled_archs() {
  std::vector<CompiledArch> archs;
  std::istringstream list(SPARLINE_CUDA_ARCHS);
  for (std::string item; std::getline(list, item, ',');) {
    const size_t dash = item.find('-');
    const std::string kind = dash == std::string::npos ? "" : item.substr(dash + 1);
    archs.push_back({.arch = std::stoi(item.substr(0, dash)),
                     .has_code = kind != "virtual",
                     .has_ptx = kind != "real"});
  }
  return archs;
}

std::string text(int arch) { return "sm_" + std::to_string(arch); }

std::string compiled_text() {
  std::string words;
  for (const std::string& arch : compiled_cuda_archs()) words += (words.empty() ? "" : ", ") + arch;
  return words;
}

/// What of the compiled code a device of this kind runs; empty if none.
std::string code_for(int arch) {
  std::string best;
  for (const CompiledArch& item : compiled_archs()) {
    // Machine code runs on devices of the same major number that are not older.
    if (item.has_code && item.arch / 10 == arch / 10 && item.arch <= arch) best = text(item.arch);
  }
  if (!best.empty()) return best;
  for (const CompiledArch& item : compiled_archs()) {
    if (item.has_ptx && item.arch <= arch) best = "PTX " + std::to_string(item.arch);
  }
  return best;
}

/// Which kernels the forward takes on Hopper, and why.
std::string hopper_forward(const Plan& plan) {
  const std::string why = cuda::why_forward_is_portable(plan);
  if (!why.empty()) return "the portable kernel, because " + why;
  std::string words = "Hopper's own kernel, where rows lie in memory order";
  if (plan.problem.skip.reference != SkipReference::kNone) words += " and tiles ascend";
  const std::string why_linear = cuda::why_linear_is_portable(plan);
  if (has_linear_branch(plan.problem) && !why_linear.empty()) {
    words += "; the portable ones for the linear branch, because " + why_linear;
  }
  return words;
}

class CudaBackend final : public Backend {
 public:
  const char* name() const override { return "cuda"; }

  std::string describe() const override {
    std::string words = "compiled for " + compiled_text() + "; ";
    const std::vector<cuda::DeviceInfo> devices = cuda::devices();
    if (devices.empty()) return words + "no device (" + cuda::why_no_device() + ")";
    for (size_t idx = 0; idx < devices.size(); ++idx) {
      const auto& [name, arch] = devices[idx];
      const std::string code = arch < kOldestArch ? "" : code_for(arch);
      words += (idx == 0 ? "" : ", ") + name + " (" + text(arch) + ", " +
               (code.empty() ? "no code that it runs" : "runs " + code) +
               (!code.empty() && arch < kOldestFp8Arch ? ", no fp8" : "") + ")";
    }
    return words;
  }

  std::string rejects(const Problem& problem, const Target& target) const override {
    if (target.device != Device::kCUDA) return "it runs on CUDA tensors only";
    if (problem.dtype == DType::kF32) {
      return "it stores bfloat16 and float16 only: cast q, k and v to one of them; float32 runs "
             "with backend=\"reference\", or on the CPU";
    }
    if (target.cuda_arch != 0 && target.cuda_arch < kOldestArch) {
      return "it needs a device of compute capability 8.0 or later, and this one is " +
             text(target.cuda_arch);
    }
    if (target.cuda_arch != 0 && code_for(target.cuda_arch).empty()) {
      return "it was compiled for " + compiled_text() + ", none of which " +
             text(target.cuda_arch) + " runs: build it with that architecture in " +
             "SPARLINE_CUDA_ARCHITECTURES";
    }
    // Positions are 32-bit, and so is the number of thread blocks of a launch.
    constexpr int64_t kMost = (int64_t{1} << 31) - 1;
    const int64_t num_rows = std::max(problem.num_queries, problem.num_keys);
    const int64_t num_heads = problem.batch * problem.num_heads;
    if (num_rows > kMost - 128) return "it counts rows in 32 bits";
    if (num_heads > kMost / (num_rows / 16 + 2)) {
      return "it counts the blocks of all heads in 32 bits";
    }
    return "";
  }

  void complete(Plan& plan) const override {
    plan.heads_per_wave = cuda::num_pairs(plan.problem);
    plan.heads_per_wave =
        std::max(cuda::forward_pairs_per_wave(plan), cuda::backward_pairs_per_wave(plan));
    plan.route_workspace_bytes = cuda::route_workspace_bytes(plan);
    plan.forward_workspace_bytes = cuda::forward_workspace_bytes(plan);
    plan.backward_workspace_bytes = cuda::backward_workspace_bytes(plan);
  }

  std::string remarks(const Plan& plan) const override {
    const Problem& p = plan.problem;
    const int arch = plan.target.cuda_arch;
    std::string words;
    if (p.low_bit.is_enabled && arch != 0 && arch < kOldestFp8Arch) {
      words += "low_bit: " + text(arch) +
               " multiplies no fp8, so e4m3 values are multiplied as float16: q k^T alone is "
               "faster\n";
    }
    const bool is_hopper = arch == 90 && code_for(arch) == text(arch);
    if (is_hopper) words += "forward: " + hopper_forward(plan) + "\n";
    return words;
  }

  void route(const Plan& plan, const RouteArgs& args, std::span<std::byte> workspace,
             Stream stream) const override {
    cuda::route(plan, args, workspace.data(), stream.cuda_stream);
  }
  void forward(const Plan& plan, const ForwardArgs& args, std::span<std::byte> workspace,
               Stream stream) const override {
    cuda::forward(plan, args, workspace.data(), stream.cuda_stream);
  }
  void backward(const Plan& plan, const BackwardArgs& args, std::span<std::byte> workspace,
                Stream stream) const override {
    cuda::backward(plan, args, workspace.data(), stream.cuda_stream);
  }

  void soft_top_k(const Target&, const SoftTopKArgs& args, Stream stream) const override {
    cuda::soft_top_k(args, stream.cuda_stream);
  }
  void soft_top_k_backward(const Target&, const SoftTopKBackwardArgs& args,
                           Stream stream) const override {
    cuda::soft_top_k_backward(args, stream.cuda_stream);
  }
};

}  // namespace

std::vector<std::string> compiled_cuda_archs() {
  std::vector<std::string> names;
  for (const CompiledArch& item : compiled_archs()) {
    if (item.has_code) names.push_back(text(item.arch));
    if (item.has_ptx) names.push_back("PTX " + std::to_string(item.arch));
  }
  return names;
}

int device_arch(int device_index) { return cuda::device_arch(device_index); }

const Backend& cuda_backend() {
  static const CudaBackend backend;
  return backend;
}

}  // namespace sparline
