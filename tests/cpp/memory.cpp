// SPDX-License-Identifier: Apache-2.0
#include "memory.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <sstream>

namespace sparline::testing {
namespace {

constexpr int64_t kGuardBytes = 256;
constexpr int64_t kRowGap = 8;  // elements

/// As float32, bf16 or fp16 a NaN that arithmetic never makes; as int8 no block class (unlike 0xFF,
/// which is -1). Every byte is a legal uint8: there, what was never written shows as wrong values.
std::byte poison(DType dtype) { return dtype == DType::kI8 ? std::byte{0x55} : std::byte{0xFF}; }

uint16_t to_bf16(float value) {
  if (std::isnan(value)) return 0x7FC0;
  const auto bits = std::bit_cast<uint32_t>(value);
  return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

void store(std::byte* to, double value, DType dtype) {
  const auto as_float = static_cast<float>(value);
  if (dtype == DType::kF32) {
    std::memcpy(to, &as_float, 4);
  } else if (dtype == DType::kBF16) {
    const uint16_t bits = to_bf16(as_float);
    std::memcpy(to, &bits, 2);
  } else if (dtype == DType::kF16) {
    const auto half = static_cast<_Float16>(as_float);
    std::memcpy(to, &half, 2);
  } else if (dtype == DType::kU8) {
    *to = static_cast<std::byte>(value);
  } else {
    const auto integer = static_cast<int8_t>(value);
    std::memcpy(to, &integer, 1);
  }
}

double load(const std::byte* from, DType dtype) {
  if (dtype == DType::kF32) {
    float value;
    std::memcpy(&value, from, 4);
    return value;
  }
  if (dtype == DType::kBF16) {
    uint16_t bits;
    std::memcpy(&bits, from, 2);
    return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
  }
  if (dtype == DType::kF16) {
    _Float16 half;
    std::memcpy(&half, from, 2);
    return static_cast<double>(half);
  }
  if (dtype == DType::kU8) return static_cast<uint8_t>(*from);
  return static_cast<int8_t>(*from);
}

std::string index_text(int64_t b, int64_t h, int64_t n, int64_t d) {
  std::ostringstream out;
  out << "(" << b << ", " << h << ", " << n << ", " << d << ")";
  return out.str();
}

}  // namespace

const char* name(Layout layout) {
  switch (layout) {
    case Layout::kBHND: return "BHND";
    case Layout::kBNHD: return "BNHD";
    case Layout::kPadded: return "padded";
  }
  return "unknown";
}

double rounded(double value, DType dtype) {
  std::byte buffer[4];
  store(buffer, value, dtype);
  return load(buffer, dtype);
}

oracle::Array rounded(oracle::Array array, DType dtype) {
  for (double& value : array.data) value = rounded(value, dtype);
  return array;
}

GuardedTensor::GuardedTensor(DType dtype, std::array<int64_t, 4> shape, Layout layout) {
  view_ = contiguous_view(nullptr, dtype, shape);
  int64_t elements = shape[0] * shape[1] * shape[2] * shape[3];
  if (layout == Layout::kBNHD) {
    view_.stride = {shape[1] * shape[2] * shape[3], shape[3], shape[1] * shape[3], 1};
  } else if (layout == Layout::kPadded) {
    const int64_t row = shape[3] + kRowGap;
    view_.stride = {shape[1] * shape[2] * row, shape[2] * row, row, 1};
    elements = shape[0] * shape[1] * shape[2] * row;
  }
  memory_.assign(static_cast<size_t>(elements * size_bytes(dtype) + 2 * kGuardBytes),
                 poison(dtype));
  view_.data = memory_.data() + kGuardBytes;
}

GuardedTensor::GuardedTensor(DType dtype, const oracle::Array& values, Layout layout)
    : GuardedTensor(dtype, values.shape, layout) {
  const auto& s = values.shape;
  for (int64_t b = 0; b < s[0]; ++b) {
    for (int64_t h = 0; h < s[1]; ++h) {
      for (int64_t n = 0; n < s[2]; ++n) {
        for (int64_t d = 0; d < s[3]; ++d) {
          store(memory_.data() + offset_bytes(b, h, n, d), values.row(b, h, n)[d], dtype);
        }
      }
    }
  }
}

int64_t GuardedTensor::offset_bytes(int64_t b, int64_t h, int64_t n, int64_t d) const {
  const auto& stride = view_.stride;
  return kGuardBytes +
         (b * stride[0] + h * stride[1] + n * stride[2] + d * stride[3]) * size_bytes(view_.dtype);
}

oracle::Array GuardedTensor::load() const {
  oracle::Array result(view_.shape);
  const auto& s = view_.shape;
  for (int64_t b = 0; b < s[0]; ++b) {
    for (int64_t h = 0; h < s[1]; ++h) {
      for (int64_t n = 0; n < s[2]; ++n) {
        for (int64_t d = 0; d < s[3]; ++d) {
          result.row(b, h, n)[d] =
              testing::load(memory_.data() + offset_bytes(b, h, n, d), view_.dtype);
        }
      }
    }
  }
  return result;
}

std::string GuardedTensor::misuse() const {
  const std::byte blank = poison(view_.dtype);
  std::vector<bool> is_element(memory_.size());
  const auto& s = view_.shape;
  for (int64_t b = 0; b < s[0]; ++b) {
    for (int64_t h = 0; h < s[1]; ++h) {
      for (int64_t n = 0; n < s[2]; ++n) {
        for (int64_t d = 0; d < s[3]; ++d) {
          const int64_t at = offset_bytes(b, h, n, d);
          const int64_t end = at + size_bytes(view_.dtype);
          std::fill(is_element.begin() + at, is_element.begin() + end, true);
          if (view_.dtype == DType::kU8) continue;
          if (std::all_of(memory_.begin() + at, memory_.begin() + end,
                          [&](std::byte byte) { return byte == blank; })) {
            return "element " + index_text(b, h, n, d) + " was not written";
          }
        }
      }
    }
  }
  for (size_t at = 0; at < memory_.size(); ++at) {
    if (!is_element[at] && memory_[at] != blank) {
      return "byte " + std::to_string(static_cast<int64_t>(at) - kGuardBytes) +
             " lies beside the elements and was written";
    }
  }
  return "";
}

GuardedWorkspace::GuardedWorkspace(int64_t size_bytes)
    : memory_(static_cast<size_t>(size_bytes + 2 * kGuardBytes + 64), std::byte{0xFF}),
      size_(static_cast<size_t>(size_bytes)) {
  const auto address = reinterpret_cast<uintptr_t>(memory_.data()) + kGuardBytes;
  begin_ = (address + 63) / 64 * 64 - reinterpret_cast<uintptr_t>(memory_.data());
}

std::span<std::byte> GuardedWorkspace::span() { return {memory_.data() + begin_, size_}; }

std::string GuardedWorkspace::misuse() const {
  for (size_t at = 0; at < memory_.size(); ++at) {
    const bool is_guard = at < begin_ || at >= begin_ + size_;
    if (is_guard && memory_[at] != std::byte{0xFF}) {
      return "byte " + std::to_string(static_cast<int64_t>(at) - static_cast<int64_t>(begin_)) +
             " beside a workspace of " + std::to_string(size_) + " bytes was written";
    }
  }
  return "";
}

}  // namespace sparline::testing
