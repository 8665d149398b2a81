// SPDX-License-Identifier: Apache-2.0
//
// Products of int8 codes with exact int32 sums, on the register tiles of gemm-inl.h.
//
// Codes lie as pairs of int16, two neighbours along k in one int32, because CPUs multiply and add
// such pairs in one instruction: twice the products of a float32 vector.
//   A  m x k codes, rows contiguous, k even
//   B  k / 2 x n pairs, rows contiguous, n padded to kPadFloats

#if defined(SPARLINE_CPU_INT8_GEMM_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SPARLINE_CPU_INT8_GEMM_INL_H_
#undef SPARLINE_CPU_INT8_GEMM_INL_H_
#else
#define SPARLINE_CPU_INT8_GEMM_INL_H_
#endif

#include <cstring>

#include "cpu/gemm-inl.h"

HWY_BEFORE_NAMESPACE();
namespace sparline::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using IntTag = hn::RebindToSigned<FloatTag>;
using IntVec = hn::Vec<IntTag>;

HWY_INLINE IntVec code_pairs(IntVec first, IntVec second) {
  return hn::Or(hn::And(first, hn::Set(IntTag(), 0xffff)), hn::ShiftLeft<16>(second));
}

#if HWY_TARGET == HWY_SCALAR  // a vector of one lane: two codes are more than Highway puts there

HWY_INLINE IntVec add_products(IntVec a, IntVec b, IntVec sum0, IntVec& sum1) {
  const auto low = [](IntVec x) { return hn::ShiftRight<16>(hn::ShiftLeft<16>(x)); };
  const auto high = [](IntVec x) { return hn::ShiftRight<16>(x); };
  sum1 = hn::Add(sum1, hn::Mul(high(a), high(b)));
  return hn::Add(sum0, hn::Mul(low(a), low(b)));
}
HWY_INLINE IntVec pair_sums(IntVec sum0, IntVec sum1) { return hn::Add(sum0, sum1); }

#else

/// A pair times a pair in every lane, added to sum0 and sum1; pair_sums(sum0, sum1) is their total
/// per lane. (NEON's products of neighbours land in the two sums, x86 leaves sum1 alone.)
HWY_INLINE IntVec add_products(IntVec a, IntVec b, IntVec sum0, IntVec& sum1) {
  const hn::Repartition<int16_t, IntTag> d16;
  return hn::ReorderWidenMulAccumulate(IntTag(), hn::BitCast(d16, a), hn::BitCast(d16, b), sum0,
                                       sum1);
}
HWY_INLINE IntVec pair_sums(IntVec sum0, IntVec sum1) {
  return hn::RearrangeToOddPlusEven(sum0, sum1);
}

#endif

/// A register tile of C = a_step (A B) b_steps, float32: b_steps is a row of n factors.
struct Int8Tile {
  // 4 x 2 sums, 4 products and 2 + 1 operands stay within the 16 registers of SSE and AVX2, as do
  // NEON's 4 x 2 x 2 within its 32. Gmac/s of a Zen 3 core, m, n, k = 64, 128, 128: AVX2 52 where
  // float32 has 42 (6 rows: 40, as GCC spills sums), SSE4 26 for 16. Others: not measured.
  static constexpr int kMaxRows = HWY_TARGET == HWY_AVX3 ? 8 : 4;

  template <int kRows, int kVectors>
  HWY_INLINE void run(int64_t m, int64_t n) const {
    const IntTag di;
    const FloatTag d;
    const int64_t lanes = static_cast<int64_t>(hn::Lanes(di));
    IntVec sum0[kRows][kVectors], sum1[kRows][kVectors];
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) sum0[r][v] = sum1[r][v] = hn::Zero(di);
    }
    const int16_t* HWY_RESTRICT a_k = a + m * lda;
    const int32_t* HWY_RESTRICT b_k = b + n;
    for (int64_t k = 0; k < num_k; k += 2, a_k += 2, b_k += ldb) {
      IntVec pairs[kVectors];
      for (int v = 0; v < kVectors; ++v) pairs[v] = hn::LoadU(di, b_k + v * lanes);
      for (int r = 0; r < kRows; ++r) {
        int32_t pair;
        std::memcpy(&pair, a_k + r * lda, sizeof(pair));
        const IntVec a_rk = hn::Set(di, pair);
        for (int v = 0; v < kVectors; ++v) {
          sum0[r][v] = add_products(a_rk, pairs[v], sum0[r][v], sum1[r][v]);
        }
      }
    }
    float* HWY_RESTRICT out = c + m * ldc + n;
    for (int v = 0; v < kVectors; ++v) {
      const FloatVec step = hn::Mul(hn::LoadU(d, b_steps + n + v * lanes), hn::Set(d, a_step));
      for (int r = 0; r < kRows; ++r) {
        const FloatVec sum = hn::ConvertTo(d, pair_sums(sum0[r][v], sum1[r][v]));
        hn::StoreU(hn::Mul(sum, step), d, out + r * ldc + v * lanes);
      }
    }
  }

  int64_t num_k;
  const int16_t* a;
  int64_t lda;
  float a_step;
  const int32_t* b;
  int64_t ldb;
  const float* b_steps;
  float* c;
  int64_t ldc;
};

}  // namespace sparline::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // SPARLINE_CPU_INT8_GEMM_INL_H_
