// SPDX-License-Identifier: Apache-2.0
//
// The codes of the low-bit forward: how they lie in memory, and the roundings that make them.
//
// k_codes and v_codes hold the key blocks one after another, each padded with zeros to whole groups
// of 16 keys and to the head dimension of the tiles. A group is
//   k_codes  (D / 16, 16 keys, 16)  int8: 16 columns of a key together
//   v_codes  (D, 16 keys)           e4m3: 16 keys of a column together
// A tile of keys is one run of bytes, copied as it is, and what ldmatrix reads at a time, eight
// rows of 16 bytes, lies side by side: no bank conflicts.
//
// Lane 4 g + t gets bytes 4 t .. 4 t + 3 of a row. Of S it holds columns 2 t and 2 t + 1 of each
// tile of eight keys; the 16 keys of a v_codes row stand so that its bytes are those keys, of both
// tiles. P then is an operand of P V as it is, in products of 8-bit and of 16-bit elements alike.
#pragma once

#include <cuda_fp8.h>

#include "cuda/common/tile.cuh"

namespace sparline::cuda {

constexpr int kCodeGroup = 16;  // keys

SPARLINE_HOST_DEVICE int32_t padded_head_dim(int32_t head_dim) {
  return head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 256;
}
/// Keys that a block takes in the codes.
SPARLINE_HOST_DEVICE int32_t padded_keys(const Axis& keys) {
  return (keys.block_rows + kCodeGroup - 1) / kCodeGroup * kCodeGroup;
}
/// Which key of a group stands at `place` in a row of v_codes.
SPARLINE_HOST_DEVICE constexpr int key_at(int place) {
  return place / 2 % 2 * 8 + place / 4 * 2 + place % 2;
}

// What the device can do --------------------------------------------------------------------------

#if defined(__CUDA_ARCH__)
constexpr int kArch = __CUDA_ARCH__;
#elif defined(SPARLINE_EMULATED_ARCH)
constexpr int kArch = SPARLINE_EMULATED_ARCH;
#else
constexpr int kArch = 900;
#endif
/// Instructions that round to e4m3 and convert from it.
constexpr bool kHasE4m3 = kArch >= 890;
/// Products of e4m3 elements. On other devices mma.sync takes them too, but becomes conversions to
/// fp16 of both operands, again for each product, and products of fp16.
constexpr bool kHasE4m3Mma = kArch == 890 || kArch >= 1200;

// int8 --------------------------------------------------------------------------------------------

/// The step of a group of values whose largest magnitude is `peak` and whose largest code is
/// `range`; 1 where all is zero. Never a denormal number, whose reciprocal may be infinite.
__device__ __forceinline__ float step_of(float peak, float range) {
  return peak > 0.0f ? fmaxf(peak / range, 0x1p-126f) : 1.0f;
}

/// Division by a step, correctly rounded, in three instructions: the product with the reciprocal,
/// and once the remainder.
class Divisor {
 public:
  __device__ explicit Divisor(float step) : step_(step), inverse_(1.0f / step) {}
  __device__ float quotient(float x) const {
    const float first = x * inverse_;
    return fmaf(fmaf(-first, step_, x), inverse_, first);
  }

 private:
  float step_, inverse_;
};

/// Four codes x / step, to nearest even, the first in the lowest byte; step is that of values x
/// belongs to, so that no code is beyond 127. Adding 1.5 2^23 leaves whole numbers, in two's
/// complement in the low bits.
__device__ __forceinline__ uint32_t int8_codes(const float* x, const Divisor& step) {
  uint32_t codes[4];
#pragma unroll
  for (int n = 0; n < 4; ++n) codes[n] = __float_as_uint(step.quotient(x[n]) + 0x1.8p23f);
  return __byte_perm(__byte_perm(codes[0], codes[1], 0x0040),
                     __byte_perm(codes[2], codes[3], 0x0040), 0x5410);
}

// e4m3 --------------------------------------------------------------------------------------------

/// The nearest e4m3 value to x within +-448, ties to even: adding and subtracting 1.5 2^23 steps
/// leaves whole steps, and a step is 2^-3 of the power of two below |x|, at least 2^-9.
__device__ __forceinline__ float e4m3_value(float x) {
  const float power = __uint_as_float(__float_as_uint(x) & 0x7f800000u);
  const float shift = fmaxf(power, 0x1p-6f) * 0x1.8p20f;
  return (x + shift) - shift;
}

/// Two codes, that of `low` in the low byte.
__device__ __forceinline__ uint32_t e4m3_codes(float low, float high) {
  if constexpr (kHasE4m3) {
    return __nv_cvt_float2_to_fp8x2(make_float2(low, high), __NV_SATFINITE, __NV_E4M3);
  }
  const auto code = [](float x) {
    // 2^-120 takes exponents to where float32 has those of e4m3, denormals included.
    const uint32_t sign = __float_as_uint(x) >> 24 & 0x80u;
    const float scaled = e4m3_value(fminf(fabsf(x), 448.0f)) * 0x1p-120f;
    return sign | (x != x ? 0x7fu : __float_as_uint(scaled) >> 20);
  };
  return code(low) | code(high) << 8;
}

/// What e4m3_halves() leaves to be multiplied.
constexpr float kHalvesScale = kHasE4m3 ? 1.0f : 256.0f;
/// Four codes as fp16, two to a register, over kHalvesScale: an e4m3 shifted to where fp16 has its
/// exponent is 2^-8 of its value.
__device__ __forceinline__ void e4m3_halves(uint32_t codes, uint32_t& low, uint32_t& high) {
  if constexpr (kHasE4m3) {
    // As a pair, because a shift would be an instruction.
    const ushort2 pairs = __builtin_bit_cast(ushort2, codes);
    low = __builtin_bit_cast(uint32_t, __nv_cvt_fp8x2_to_halfraw2(pairs.x, __NV_E4M3));
    high = __builtin_bit_cast(uint32_t, __nv_cvt_fp8x2_to_halfraw2(pairs.y, __NV_E4M3));
    return;
  }
  const auto halves = [](uint32_t pair) {  // a code in the upper byte of either half
    return (pair & 0x80008000u) | (pair >> 1 & 0x3f803f80u);
  };
  low = halves(__byte_perm(codes, 0, 0x1404));
  high = halves(__byte_perm(codes, 0, 0x3424));
}

/// Two values >= 0 rounded to e4m3, as fp16.
__device__ __forceinline__ uint32_t e4m3_rounded_halves(float low, float high) {
  if constexpr (kHasE4m3) {
    uint32_t rounded, unused;
    e4m3_halves(e4m3_codes(low, high), rounded, unused);
    return rounded;
  }
  return pack<fp16>(e4m3_value(fminf(low, 448.0f)), e4m3_value(fminf(high, 448.0f)));
}

// 16-bit rows -------------------------------------------------------------------------------------

/// Two neighbouring elements.
template <class T>
__device__ __forceinline__ float2 to_floats(uint32_t pair);
template <>
__device__ __forceinline__ float2 to_floats<bf16>(uint32_t pair) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}
template <>
__device__ __forceinline__ float2 to_floats<fp16>(uint32_t pair) {
  return make_float2(to_float(__ushort_as_half(static_cast<unsigned short>(pair & 0xffffu))),
                     to_float(__ushort_as_half(static_cast<unsigned short>(pair >> 16))));
}

/// kCount elements from column `col` of a row of head_dim elements, zeros past its end and where
/// not `is_valid` (then `row` is not read). kCount and `col` are multiples of 4.
template <int kCount>
__device__ __forceinline__ void load_elements(uint32_t (&pairs)[kCount / 2], const uint16_t* row,
                                              int col, int head_dim, bool is_valid,
                                              bool is_vectorised) {
  constexpr int kVector = kCount < 8 ? kCount : 8;
  static_assert(kVector == 4 || kVector == 8);
#pragma unroll
  for (int n = 0; n < kCount; n += kVector) {
    const int c = col + n;
    uint32_t* const out = pairs + n / 2;
    if (is_vectorised) {
      uint4 vector = make_uint4(0u, 0u, 0u, 0u);
      if (is_valid && c < head_dim) {
        if constexpr (kVector == 8) {
          vector = *reinterpret_cast<const uint4*>(row + c);
        } else {
          const uint2 half = *reinterpret_cast<const uint2*>(row + c);
          vector = make_uint4(half.x, half.y, 0u, 0u);
        }
      }
      out[0] = vector.x;
      out[1] = vector.y;
      if constexpr (kVector == 8) {
        out[2] = vector.z;
        out[3] = vector.w;
      }
    } else {
#pragma unroll
      for (int pair = 0; pair < kVector / 2; ++pair) {
        uint32_t low = 0, high = 0;
        if (is_valid && c + 2 * pair < head_dim) {  // head_dim is even
          low = row[c + 2 * pair];
          high = row[c + 2 * pair + 1];
        }
        out[pair] = low | high << 16;
      }
    }
  }
}

}  // namespace sparline::cuda
