// SPDX-License-Identifier: Apache-2.0
//
// Where a tensor lies and what runs there: torch's current device and stream.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "sparline/attention.h"

namespace sparline::binding {

/// What plans are made for: the tensor's device, torch's threads.
Target target_of(const torch::stable::Tensor& tensor, const std::string& backend = {});

/// Makes the device of a tensor the current one, for as long as it lives; finds torch's stream.
class DeviceScope {
 public:
  explicit DeviceScope(const torch::stable::Tensor& tensor);
  /// torch's current stream of the device, a cudaStream_t; null for the CPU.
  void* cuda_stream() const { return cuda_stream_; }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  void* cuda_stream_ = nullptr;
};

}  // namespace sparline::binding
