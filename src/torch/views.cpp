// SPDX-License-Identifier: Apache-2.0
#include "torch/views.h"

#include <string>
#include <utility>

namespace sparline::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

[[noreturn]] void invalid(const std::string& message) {
  throw Error(ErrorCode::kInvalidArgument, message);
}

}  // namespace

DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::kF32;
    case ScalarType::BFloat16: return DType::kBF16;
    case ScalarType::Half: return DType::kF16;
    case ScalarType::Int: return DType::kI32;
    case ScalarType::Char: return DType::kI8;
    case ScalarType::Byte: return DType::kU8;
    default:
      invalid(
          std::string(name) +
          " must be float32, bfloat16 or float16 (classes: int8, bits: uint8, orders: int32), " +
          "got " + torch::headeronly::toString(tensor.scalar_type()) +
          ". Convert it, or pass backend=\"reference\".");
  }
}

TensorView view_of(const Tensor& tensor, const char* name) {
  const int64_t rank = tensor.dim();
  if (rank > 4) {
    invalid(std::string(name) + " must have at most 4 dimensions, got " + std::to_string(rank) +
            ". Fold the leading ones into the batch.");
  }
  TensorView view{
      .data = tensor.data_ptr(), .dtype = dtype_of(tensor, name), .shape = {1, 1, 1, 1}};
  for (int64_t d = 0; d < rank; ++d) {
    view.shape[4 - rank + d] = tensor.size(d);
    view.stride[4 - rank + d] = tensor.stride(d);
  }
  return view;
}

TensorView view_of(const std::optional<Tensor>& tensor, const char* name) {
  return tensor && tensor->numel() > 0 ? view_of(*tensor, name) : TensorView{};
}

std::vector<Segment> segments_of(const Ints& flat, const char* name) {
  if (flat.size() % 4 != 0) {
    invalid(std::string(name) + " must hold four ints for each segment (begin, end, sequence, " +
            "is_protected), got " + std::to_string(flat.size()) + ". Flatten whole segments.");
  }
  std::vector<Segment> segments;
  for (size_t at = 0; at < flat.size(); at += 4) {
    segments.push_back({.begin = flat[at],
                        .end = flat[at + 1],
                        .sequence = static_cast<int32_t>(flat[at + 2]),
                        .is_protected = flat[at + 3] != 0});
  }
  return segments;
}

Weights weights_of(const std::vector<Tensor>& tensors) {
  Weights weights;
  if (tensors.empty()) return weights;
  if (tensors.size() != 7) {
    invalid(
        "weights must hold none or all seven of proj_weight, proj_bias, feature_weight_q, "
        "feature_bias_q, feature_weight_k, feature_bias_k, alpha_logit, got " +
        std::to_string(tensors.size()) + ". Pass empty tensors for absent ones.");
  }
  const std::pair<TensorView*, const char*> slots[] = {
      {&weights.proj_weight, "proj_weight"},
      {&weights.proj_bias, "proj_bias"},
      {&weights.feature_weight_q, "feature_weight_q"},
      {&weights.feature_bias_q, "feature_bias_q"},
      {&weights.feature_weight_k, "feature_weight_k"},
      {&weights.feature_bias_k, "feature_bias_k"},
      {&weights.alpha_logit, "alpha_logit"}};
  for (size_t idx = 0; idx < 7; ++idx) {
    const auto& [slot, name] = slots[idx];
    if (tensors[idx].numel() > 0) *slot = view_of(tensors[idx], name);
  }
  return weights;
}

}  // namespace sparline::binding
