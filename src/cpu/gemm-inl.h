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

/// All columns of `kRows` rows of C, from row m on.
template <int kRows, class Tile>
HWY_NOINLINE void run_rows(const Tile& tile, int64_t m, int64_t num_n) {
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(FloatTag()));
  int64_t n = 0;
  for (; n + 2 * lanes <= num_n; n += 2 * lanes) tile.template run<kRows, 2>(m, n);
  for (; n < num_n; n += lanes) tile.template run<kRows, 1>(m, n);
}

template <int kRows, class Tile>
HWY_INLINE void run_rows_exactly(int rows, const Tile& tile, int64_t m, int64_t num_n) {
  if constexpr (kRows > 0) {
    if (rows == kRows) return run_rows<kRows>(tile, m, num_n);
    run_rows_exactly<kRows - 1>(rows, tile, m, num_n);
  }
}

/// Covers C (num_m x num_n) with register tiles: tile.run<rows, vectors>(m, n) computes the one
/// whose first element is (m, n), of at most Tile::kMaxRows rows. Rows are shared out evenly, so
/// that no tile is left nearly empty.
template <class Tile>
HWY_INLINE void run_tiles(int64_t num_m, int64_t num_n, const Tile& tile) {
  const int64_t num_tiles = (num_m + Tile::kMaxRows - 1) / Tile::kMaxRows;
  for (int64_t idx = 0; idx < num_tiles; ++idx) {
    const int64_t begin = num_m * idx / num_tiles;
    const int rows = static_cast<int>(num_m * (idx + 1) / num_tiles - begin);
    run_rows_exactly<Tile::kMaxRows>(rows, tile, begin, num_n);
  }
}

template <Into kInto>
struct FloatTile {
  static constexpr int kMaxRows = kTileRows;

  template <int kRows, int kVectors>
  HWY_INLINE void run(int64_t m, int64_t n) const {
    const FloatTag d;
    const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
    float* HWY_RESTRICT out = c + m * ldc + n;
    FloatVec acc[kRows][kVectors];
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        acc[r][v] = kInto == Into::kAdd ? hn::LoadU(d, out + r * ldc + v * lanes) : hn::Zero(d);
      }
    }
    const float* HWY_RESTRICT a_k = a.data + m * a.row;
    const float* HWY_RESTRICT b_k = b + n;
    for (int64_t k = 0; k < num_k; ++k, a_k += a.col, b_k += ldb) {
      FloatVec b_kn[kVectors];
      for (int v = 0; v < kVectors; ++v) b_kn[v] = hn::LoadU(d, b_k + v * lanes);
      for (int r = 0; r < kRows; ++r) {
        const FloatVec a_rk = hn::Set(d, a_k[r * a.row]);
        for (int v = 0; v < kVectors; ++v) acc[r][v] = hn::MulAdd(a_rk, b_kn[v], acc[r][v]);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) hn::StoreU(acc[r][v], d, out + r * ldc + v * lanes);
    }
  }

  int64_t num_k;
  Operand a;
  const float* b;
  int64_t ldb;
  float* c;
  int64_t ldc;
};

/// C (num_m x num_n) = or += A B.
template <Into kInto>
HWY_INLINE void gemm(int64_t num_m, int64_t num_n, int64_t num_k, Operand a, const float* b,
                     int64_t ldb, float* c, int64_t ldc) {
  run_tiles(num_m, num_n, FloatTile<kInto>{num_k, a, b, ldb, c, ldc});
}

}  // namespace sparline::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // SPARLINE_CPU_GEMM_INL_H_
