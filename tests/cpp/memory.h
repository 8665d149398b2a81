// SPDX-License-Identifier: Apache-2.0
//
// Memory that notices: tensors in any layout between guard words, poisoned so that a stray write, a
// missed write and a read of what was never written all show.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "oracle.h"
#include "sparline/tensor.h"

namespace sparline::testing {

/// How (batch, heads, length, head_dim) lies in memory.
enum class Layout { kBHND, kBNHD, kPadded };  // kPadded: BHND rows with a gap after each

const char* name(Layout layout);

/// Round to the dtype and back.
double rounded(double value, DType dtype);
oracle::Array rounded(oracle::Array array, DType dtype);

class GuardedTensor {
 public:
  GuardedTensor() = default;
  GuardedTensor(DType dtype, std::array<int64_t, 4> shape, Layout layout = Layout::kBHND);
  /// Filled with `values`, rounded to the dtype.
  GuardedTensor(DType dtype, const oracle::Array& values, Layout layout = Layout::kBHND);

  TensorView view() const { return view_; }
  oracle::Array load() const;
  std::vector<std::byte> bytes() const { return memory_; }

  /// Empty, or what went wrong: an element never written, or a byte beside the elements changed.
  std::string misuse() const;

 private:
  int64_t offset_bytes(int64_t b, int64_t h, int64_t n, int64_t d) const;

  std::vector<std::byte> memory_;
  TensorView view_;
};

/// Exactly `size_bytes` of scratch at an address aligned to 64 bytes, between guard words, filled
/// with NaN.
class GuardedWorkspace {
 public:
  explicit GuardedWorkspace(int64_t size_bytes);
  std::span<std::byte> span();
  std::string misuse() const;

 private:
  std::vector<std::byte> memory_;
  size_t begin_ = 0;
  size_t size_ = 0;
};

}  // namespace sparline::testing
