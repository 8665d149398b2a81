// SPDX-License-Identifier: Apache-2.0
//
// From the operators' arguments to the core's: borrowed views, segments, weights. Errors name the
// argument.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "sparline/attention.h"

namespace sparline::binding {

using Ints = std::vector<int64_t>;

DType dtype_of(const torch::stable::Tensor& tensor, const char* name);

/// Views of tensors that must lie on one device: that of the first.
class ViewsBeside {
 public:
  ViewsBeside(const torch::stable::Tensor& first, const char* name);

  /// Tensors of fewer than four dimensions lead with ones.
  TensorView operator()(const torch::stable::Tensor& tensor, const char* name) const;
  /// Absent for no tensor and for an empty one.
  TensorView operator()(const std::optional<torch::stable::Tensor>& tensor, const char* name) const;
  /// Nothing, or seven tensors in the order of Weights; empty tensors stand for absent ones.
  Weights weights(const std::vector<torch::stable::Tensor>& tensors) const;

  /// Throws Error{kInvalidArgument} for a tensor elsewhere.
  void require_here(const torch::stable::Tensor& tensor, const char* name) const;

 private:
  const char* first_name_;
  bool is_cuda_;
  int32_t device_index_;
};

/// Four ints for each segment: begin, end, sequence, is_protected.
std::vector<Segment> segments_of(const Ints& flat, const char* name);

}  // namespace sparline::binding
