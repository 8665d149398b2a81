// SPDX-License-Identifier: Apache-2.0
//
// Small matrix products on tiles that fit the caches: C = A B or C += A B, float32.
//   A  m x k, element (m, k) at a[m * row + k * col]; either stride may be 1, so A^T costs nothing
//   B  k x n, rows contiguous, n padded to kPadFloats (pad columns are read and their results
//   written) C  m x n, rows contiguous, padded like B
// A register tile of kTileRows x 2 vectors keeps the multipliers busy: per step two loads of B,
// kTileRows broadcasts of A.

#if defined(SPARLINE_CPU_GEMM_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SPARLINE_CPU_GEMM_INL_H_
#undef SPARLINE_CPU_GEMM_INL_H_
#else
#define SPARLINE_CPU_GEMM_INL_H_
#endif

#include <hwy/highway.h>

#include <cstdint>

HWY_BEFORE_NAMESPACE();
namespace sparline::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using FloatTag = hn::ScalableTag<float>;
using FloatVec = hn::Vec<FloatTag>;

// 6 x 2 accumulators + 2 + 1 fill the 16 registers of SSE and AVX2; 12 x 2 suit the 32 of AVX-512
// and NEON.
constexpr int kTileRows = (HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_NEON) ? 12 : 6;

struct Operand {
  const float* data;
  int64_t row;  // stride between m
  int64_t col;  // stride between k
};

/// A stored as its rows.
HWY_INLINE Operand rows_of(const float* data, int64_t ld) { return {data, ld, 1}; }
/// A stored as its columns: multiplies by the transpose of what lies in memory.
HWY_INLINE Operand columns_of(const float* data, int64_t ld) { return {data, 1, ld}; }

enum class Into { kOverwrite, kAdd };

template <int kRows, int kVectors, Into kInto>
HWY_INLINE void gemm_tile(Operand a, const float* HWY_RESTRICT b, int64_t ldb,
                          float* HWY_RESTRICT c, int64_t ldc, int64_t num_k) {
  const FloatTag d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  FloatVec acc[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      acc[r][v] = kInto == Into::kAdd ? hn::LoadU(d, c + r * ldc + v * lanes) : hn::Zero(d);
    }
  }
  const float* HWY_RESTRICT a_k = a.data;
  for (int64_t k = 0; k < num_k; ++k, a_k += a.col, b += ldb) {
    FloatVec b_k[kVectors];
    for (int v = 0; v < kVectors; ++v) b_k[v] = hn::LoadU(d, b + v * lanes);
    for (int r = 0; r < kRows; ++r) {
      const FloatVec a_rk = hn::Set(d, a_k[r * a.row]);
      for (int v = 0; v < kVectors; ++v) acc[r][v] = hn::MulAdd(a_rk, b_k[v], acc[r][v]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) hn::StoreU(acc[r][v], d, c + r * ldc + v * lanes);
  }
}

/// All columns of `kRows` rows of C.
template <int kRows, Into kInto>
HWY_NOINLINE void gemm_rows(Operand a, const float* b, int64_t ldb, float* c, int64_t ldc,
                            int64_t num_n, int64_t num_k) {
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(FloatTag()));
  int64_t n = 0;
  for (; n + 2 * lanes <= num_n; n += 2 * lanes)
    gemm_tile<kRows, 2, kInto>(a, b + n, ldb, c + n, ldc, num_k);
  for (; n < num_n; n += lanes) gemm_tile<kRows, 1, kInto>(a, b + n, ldb, c + n, ldc, num_k);
}

template <int kRows, Into kInto>
HWY_INLINE void gemm_rows_exactly(int rows, Operand a, const float* b, int64_t ldb, float* c,
                                  int64_t ldc, int64_t num_n, int64_t num_k) {
  if constexpr (kRows > 0) {
    if (rows == kRows) return gemm_rows<kRows, kInto>(a, b, ldb, c, ldc, num_n, num_k);
    gemm_rows_exactly<kRows - 1, kInto>(rows, a, b, ldb, c, ldc, num_n, num_k);
  }
}

/// C (num_m x num_n) = or += A B. Rows are shared out evenly over the register tiles, so that none
/// is left nearly empty.
template <Into kInto>
HWY_INLINE void gemm(int64_t num_m, int64_t num_n, int64_t num_k, Operand a, const float* b,
                     int64_t ldb, float* c, int64_t ldc) {
  const int64_t num_tiles = (num_m + kTileRows - 1) / kTileRows;
  for (int64_t tile = 0; tile < num_tiles; ++tile) {
    const int64_t begin = num_m * tile / num_tiles;
    const int rows = static_cast<int>(num_m * (tile + 1) / num_tiles - begin);
    gemm_rows_exactly<kTileRows, kInto>(rows, {a.data + begin * a.row, a.row, a.col}, b, ldb,
                                        c + begin * ldc, ldc, num_n, num_k);
  }
}

}  // namespace sparline::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // SPARLINE_CPU_GEMM_INL_H_
