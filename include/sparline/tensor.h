// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstdint>

namespace sparline {

enum class DType : uint8_t { kF32, kBF16, kF16, kI32, kI8, kU8 };

constexpr int64_t size_bytes(DType dtype) {
  switch (dtype) {
    case DType::kF32:
    case DType::kI32: return 4;
    case DType::kBF16:
    case DType::kF16: return 2;
    case DType::kI8:
    case DType::kU8: return 1;
  }
  return 0;
}

constexpr const char* name(DType dtype) {
  switch (dtype) {
    case DType::kF32: return "float32";
    case DType::kBF16: return "bfloat16";
    case DType::kF16: return "float16";
    case DType::kI32: return "int32";
    case DType::kI8: return "int8";
    case DType::kU8: return "uint8";
  }
  return "unknown";
}

/// A borrowed four-dimensional tensor: it never owns and never copies. Tensors with fewer
/// dimensions lead with ones. A default-constructed view is absent (`!view`).
struct TensorView {
  void* data = nullptr;
  DType dtype = DType::kF32;
  std::array<int64_t, 4> shape{};   // (batch, heads, length, head_dim) for q, k, v, o
  std::array<int64_t, 4> stride{};  // in elements; any memory order fits, only the last must be 1

  explicit operator bool() const { return data != nullptr; }

  template <class T>
  T* row(int64_t b, int64_t h, int64_t n) const {
    return static_cast<T*>(data) + b * stride[0] + h * stride[1] + n * stride[2];
  }
};

/// A dense row-major view over `data`.
constexpr TensorView contiguous_view(void* data, DType dtype, std::array<int64_t, 4> shape) {
  return {data, dtype, shape, {shape[1] * shape[2] * shape[3], shape[2] * shape[3], shape[3], 1}};
}

}  // namespace sparline
