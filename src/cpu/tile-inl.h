// SPDX-License-Identifier: Apache-2.0
//
// Float32 tiles in scratch memory: moving rows between storage dtypes and tiles, transposes,
// exponentials, row sums. A tile row holds `num` values and, up to the next multiple of kPadFloats,
// zeros.

#if defined(SPARLINE_CPU_TILE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SPARLINE_CPU_TILE_INL_H_
#undef SPARLINE_CPU_TILE_INL_H_
#else
#define SPARLINE_CPU_TILE_INL_H_
#endif

#include <hwy/highway.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/gemm-inl.h"
#include "cpu/layout.h"
#include "sparline/tensor.h"

HWY_BEFORE_NAMESPACE();
namespace sparline::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

/// Calls body(offset) for every vector of a padded row of `num` floats.
template <class Body>
HWY_INLINE void for_each_vector(int64_t num, Body&& body) {
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(FloatTag()));
  const int64_t end = pad(num);
  for (int64_t at = 0; at < end; at += lanes) body(at);
}

/// Lanes of the vector at `at` that lie inside a row of `num` floats.
HWY_INLINE hn::Mask<FloatTag> inside(int64_t at, int64_t num) {
  return hn::FirstN(FloatTag(), static_cast<size_t>(std::max<int64_t>(0, num - at)));
}

// ---- storage dtypes

HWY_INLINE float bf16_to_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

/// Rounds to nearest even; NaN stays NaN.
HWY_INLINE uint16_t float_to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return static_cast<uint16_t>(is_nan ? (bits >> 16) | 0x40u : rounded);
}

/// Rounds to nearest even, past 65504 to infinity; NaN stays NaN.
HWY_INLINE uint16_t float_to_f16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {  // below 2^-14: the sum with 0.5 rounds at the last subnormal bit
    float shifted;
    std::memcpy(&shifted, &magnitude, sizeof(shifted));
    shifted += 0.5f;
    std::memcpy(&bits, &shifted, sizeof(bits));
    return static_cast<uint16_t>(sign | (bits - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

/// Copies `num_rows` rows of one (b, h) of a tensor, from position `begin` on, into a tile, times
/// `factor`.
HWY_INLINE void load_rows(const TensorView& x, int64_t b, int64_t h, int64_t begin,
                          int64_t num_rows, float factor, float* HWY_RESTRICT tile, int64_t ld,
                          RowOrder order = {}) {
  const FloatTag d;
  const int64_t num = x.shape[3];
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  for (int64_t r = 0; r < num_rows; ++r, tile += ld) {
    const int64_t n = order[begin + r];
    int64_t c = 0;
    if (x.dtype == DType::kF32) {
      const float* HWY_RESTRICT row = x.row<const float>(b, h, n);
      for (; c + lanes <= num; c += lanes)
        hn::StoreU(hn::Mul(hn::LoadU(d, row + c), hn::Set(d, factor)), d, tile + c);
      for (; c < num; ++c) tile[c] = row[c] * factor;
    } else if (x.dtype == DType::kBF16) {
      const uint16_t* HWY_RESTRICT row = x.row<const uint16_t>(b, h, n);
      for (; c < num; ++c) tile[c] = bf16_to_float(row[c]) * factor;
    } else {
      const hn::Rebind<hwy::float16_t, FloatTag> half;
      const hwy::float16_t* HWY_RESTRICT row = x.row<const hwy::float16_t>(b, h, n);
      for (; c + lanes <= num; c += lanes) {
        hn::StoreU(hn::Mul(hn::PromoteTo(d, hn::LoadU(half, row + c)), hn::Set(d, factor)), d,
                   tile + c);
      }
      if (c < num) {
        HWY_ALIGN hwy::float16_t tail[kPadFloats] = {};
        HWY_ALIGN float wide[kPadFloats];
        std::memcpy(tail, row + c, static_cast<size_t>(num - c) * sizeof(tail[0]));
        hn::StoreU(hn::Mul(hn::PromoteTo(d, hn::LoadU(half, tail)), hn::Set(d, factor)), d, wide);
        for (int64_t at = 0; c < num; ++c, ++at) tile[c] = wide[at];
      }
    }
    for (; c < pad(num); ++c) tile[c] = 0.0f;
  }
}

/// Writes tile rows back in the tensor's dtype, rounding to nearest even.
HWY_INLINE void store_rows(const float* HWY_RESTRICT tile, int64_t ld, const TensorView& x,
                           int64_t b, int64_t h, int64_t begin, int64_t num_rows,
                           RowOrder order = {}) {
  const int64_t num = x.shape[3];
  for (int64_t r = 0; r < num_rows; ++r, tile += ld) {
    const int64_t n = order[begin + r];
    if (x.dtype == DType::kF32) {
      std::memcpy(x.row<float>(b, h, n), tile, static_cast<size_t>(num) * sizeof(float));
    } else if (x.dtype == DType::kBF16) {
      uint16_t* HWY_RESTRICT row = x.row<uint16_t>(b, h, n);
      for (int64_t c = 0; c < num; ++c) row[c] = float_to_bf16(tile[c]);
    } else {
#if HWY_TARGET == HWY_SSE4 || HWY_TARGET == HWY_SCALAR
      // No instruction for it there, and Highway 1.0's replacement truncates.
      uint16_t* HWY_RESTRICT row = x.row<uint16_t>(b, h, n);
      for (int64_t c = 0; c < num; ++c) row[c] = float_to_f16(tile[c]);
#else
      const FloatTag d;
      const hn::Rebind<hwy::float16_t, FloatTag> half;
      const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
      hwy::float16_t* HWY_RESTRICT row = x.row<hwy::float16_t>(b, h, n);
      int64_t c = 0;
      for (; c + lanes <= num; c += lanes)
        hn::StoreU(hn::DemoteTo(half, hn::LoadU(d, tile + c)), half, row + c);
      if (c < num) {
        HWY_ALIGN hwy::float16_t tail[kPadFloats];
        hn::StoreU(hn::DemoteTo(half, hn::LoadU(d, tile + c)), half, tail);
        std::memcpy(row + c, tail, static_cast<size_t>(num - c) * sizeof(tail[0]));
      }
#endif
    }
  }
}

// ---- tile algebra

/// out (num_cols x num_rows) = tile^T, times factor; columns of `out` up to pad(num_rows) are
/// zeroed.
HWY_INLINE void transpose(const float* HWY_RESTRICT tile, int64_t ld, int64_t num_rows,
                          int64_t num_cols, float factor, float* HWY_RESTRICT out, int64_t ld_out) {
  int64_t r = 0;
#if HWY_TARGET != HWY_SCALAR
  const hn::Full128<float> d4;
  const hn::Full128<double> d2;
  const auto scale = hn::Set(d4, factor);
  for (; r + 4 <= num_rows; r += 4) {
    const float* HWY_RESTRICT in = tile + r * ld;
    int64_t c = 0;
    for (; c + 4 <= num_cols; c += 4) {
      const auto r0 = hn::LoadU(d4, in + c), r1 = hn::LoadU(d4, in + ld + c);
      const auto r2 = hn::LoadU(d4, in + 2 * ld + c), r3 = hn::LoadU(d4, in + 3 * ld + c);
      const auto low01 = hn::BitCast(d2, hn::InterleaveLower(d4, r0, r1));  // 00 10 01 11
      const auto low23 = hn::BitCast(d2, hn::InterleaveLower(d4, r2, r3));  // 20 30 21 31
      const auto high01 = hn::BitCast(d2, hn::InterleaveUpper(d4, r0, r1));
      const auto high23 = hn::BitCast(d2, hn::InterleaveUpper(d4, r2, r3));
      float* HWY_RESTRICT to = out + c * ld_out + r;
      hn::StoreU(hn::Mul(scale, hn::BitCast(d4, hn::InterleaveLower(d2, low01, low23))), d4, to);
      hn::StoreU(hn::Mul(scale, hn::BitCast(d4, hn::InterleaveUpper(d2, low01, low23))), d4,
                 to + ld_out);
      hn::StoreU(hn::Mul(scale, hn::BitCast(d4, hn::InterleaveLower(d2, high01, high23))), d4,
                 to + 2 * ld_out);
      hn::StoreU(hn::Mul(scale, hn::BitCast(d4, hn::InterleaveUpper(d2, high01, high23))), d4,
                 to + 3 * ld_out);
    }
    for (; c < num_cols; ++c) {
      for (int64_t k = 0; k < 4; ++k) out[c * ld_out + r + k] = in[k * ld + c] * factor;
    }
  }
#endif
  for (int64_t c = 0; c < num_cols; ++c) {
    for (int64_t k = r; k < num_rows; ++k) out[c * ld_out + k] = tile[k * ld + c] * factor;
    for (int64_t k = num_rows; k < pad(num_rows); ++k) out[c * ld_out + k] = 0.0f;
  }
}

/// y += factor x
HWY_INLINE void add_scaled(int64_t num, float factor, const float* HWY_RESTRICT x,
                           float* HWY_RESTRICT y) {
  const FloatTag d;
  for_each_vector(num, [&](int64_t at) HWY_ATTR {
    hn::StoreU(hn::MulAdd(hn::Set(d, factor), hn::LoadU(d, x + at), hn::LoadU(d, y + at)), d,
               y + at);
  });
}

HWY_INLINE void scale_row(int64_t num, float factor, float* HWY_RESTRICT x) {
  const FloatTag d;
  for_each_vector(num, [&](int64_t at) HWY_ATTR {
    hn::StoreU(hn::Mul(hn::Set(d, factor), hn::LoadU(d, x + at)), d, x + at);
  });
}

/// y *= x, element by element.
HWY_INLINE void multiply_row(int64_t num, const float* HWY_RESTRICT x, float* HWY_RESTRICT y) {
  const FloatTag d;
  for_each_vector(num, [&](int64_t at) HWY_ATTR {
    hn::StoreU(hn::Mul(hn::LoadU(d, x + at), hn::LoadU(d, y + at)), d, y + at);
  });
}

HWY_INLINE float dot(int64_t num, const float* HWY_RESTRICT x, const float* HWY_RESTRICT y) {
  const FloatTag d;
  FloatVec sum = hn::Zero(d);
  for_each_vector(num, [&](int64_t at) HWY_ATTR {
    sum = hn::MulAdd(hn::LoadU(d, x + at), hn::LoadU(d, y + at), sum);
  });
  return hn::GetLane(hn::SumOfLanes(d, sum));
}

// ---- exponentials

/// 2^x to float32 accuracy for x in [-125, 127]; smaller x give 2^-125, larger 2^127.
HWY_INLINE FloatVec exp2_clamped(FloatVec x) {
  const FloatTag d;
  const hn::RebindToSigned<FloatTag> di;
  x = hn::Min(hn::Max(x, hn::Set(d, -125.0f)), hn::Set(d, 127.0f));
  const FloatVec whole = hn::Round(x);
  const FloatVec f = hn::Sub(x, whole);  // [-1/2, 1/2]: degree 6 leaves a relative error of 2e-9
  FloatVec p = hn::Set(d, 1.5345810e-4f);
  p = hn::MulAdd(p, f, hn::Set(d, 1.3399932e-3f));
  p = hn::MulAdd(p, f, hn::Set(d, 9.6184890e-3f));
  p = hn::MulAdd(p, f, hn::Set(d, 5.5503288e-2f));
  p = hn::MulAdd(p, f, hn::Set(d, 2.4022647e-1f));
  p = hn::MulAdd(p, f, hn::Set(d, 6.9314721e-1f));
  p = hn::MulAdd(p, f, hn::Set(d, 1.0f));
  return hn::BitCast(d, hn::Add(hn::BitCast(di, p), hn::ShiftLeft<23>(hn::ConvertTo(di, whole))));
}

HWY_INLINE FloatVec exp_clamped(FloatVec x) {
  return exp2_clamped(hn::Mul(x, hn::Set(FloatTag(), kLog2E)));
}

/// 2^x as exp2_clamped, but exactly 0 where 2^-125 would be rounded up to.
HWY_INLINE FloatVec exp2_or_zero(FloatVec x) {
  const FloatTag d;
  return hn::IfThenZeroElse(hn::Lt(x, hn::Set(d, -125.0f)), exp2_clamped(x));
}

}  // namespace sparline::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // SPARLINE_CPU_TILE_INL_H_
