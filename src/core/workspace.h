// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

namespace sparline {

/// Lays arrays out one after another, each aligned to 64 bytes. Built on a null base it counts
/// bytes; built on memory it carves pointers. One function that takes arrays from an Arena
/// therefore both sizes a workspace and splits it.
class Arena {
 public:
  static constexpr int64_t kAlignment = 64;

  explicit Arena(std::byte* base = nullptr) : base_(base) {}

  template <class T>
  T* take(int64_t count) {
    std::byte* const start = base_ == nullptr ? nullptr : base_ + used_bytes_;
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    used_bytes_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    return reinterpret_cast<T*>(start);
  }

  int64_t used_bytes() const { return used_bytes_; }

 private:
  std::byte* base_;
  int64_t used_bytes_ = 0;
};

}  // namespace sparline
