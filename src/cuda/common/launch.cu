// SPDX-License-Identifier: Apache-2.0
#include "cuda/common/platform.cuh"

#ifndef SPARLINE_EMULATE_CUDA

#include <array>
#include <atomic>

namespace sparline::cuda {
namespace {

/// Compiled like every kernel: tells which of their versions a device has picked.
__global__ void probe_kernel() { begin_kernel(); }

bool picks_code_that_waits() {
  cudaFuncAttributes attributes{};
  check(cudaFuncGetAttributes(&attributes, probe_kernel), "looking up a kernel");
  return attributes.ptxVersion >= 90;  // as in await_last_kernel
}

}  // namespace

bool can_launch_early() {
  enum : char { kUnknown, kNo, kYes };
  static std::array<std::atomic<char>, 64> known{};  // by device
  int device = 0;
  check(cudaGetDevice(&device), "asking for the current device");
  if (device < 0 || device >= static_cast<int>(known.size())) return picks_code_that_waits();
  std::atomic<char>& entry = known[static_cast<size_t>(device)];
  if (entry.load(std::memory_order_relaxed) == kUnknown) {
    entry.store(picks_code_that_waits() ? kYes : kNo, std::memory_order_relaxed);
  }
  return entry.load(std::memory_order_relaxed) == kYes;
}

}  // namespace sparline::cuda

#endif
