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

/// Tensors of fewer than four dimensions lead with ones.
TensorView view_of(const torch::stable::Tensor& tensor, const char* name);
/// Absent for no tensor and for an empty one.
TensorView view_of(const std::optional<torch::stable::Tensor>& tensor, const char* name);

/// Four ints for each segment: begin, end, sequence, is_protected.
std::vector<Segment> segments_of(const Ints& flat, const char* name);

/// Nothing, or seven tensors in the order of Weights; empty tensors stand for absent ones.
Weights weights_of(const std::vector<torch::stable::Tensor>& tensors);

}  // namespace sparline::binding
