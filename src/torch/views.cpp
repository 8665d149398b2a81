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

std::string device_text(bool is_cuda, int32_t index) {
  return is_cuda ? "cuda:" + std::to_string(index) : "the CPU";
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

ViewsBeside::ViewsBeside(const Tensor& first, const char* name)
    : first_name_(name), is_cuda_(first.is_cuda()), device_index_(first.get_device_index()) {}

void ViewsBeside::require_here(const Tensor& tensor, const char* name) const {
  const bool is_cuda = tensor.is_cuda();
  const int32_t device_index = tensor.get_device_index();
  if (is_cuda == is_cuda_ && (!is_cuda || device_index == device_index_)) return;
  invalid(std::string(name) + " must be on the device of " + first_name_ + ", " +
          device_text(is_cuda_, device_index_) + ", got " + device_text(is_cuda, device_index) +
          ". Move them together.");
}

TensorView ViewsBeside::operator()(const Tensor& tensor, const char* name) const {
  require_here(tensor, name);
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

TensorView ViewsBeside::operator()(const std::optional<Tensor>& tensor, const char* name) const {
  return tensor && tensor->numel() > 0 ? (*this)(*tensor, name) : TensorView{};
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

Weights ViewsBeside::weights(const std::vector<Tensor>& tensors) const {
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
    if (tensors[idx].numel() > 0) *slot = (*this)(tensors[idx], name);
  }
  return weights;
}

}  // namespace sparline::binding
