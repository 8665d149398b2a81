// SPDX-License-Identifier: Apache-2.0
//
// 16-bit tiles in shared memory: how they are filled, how mma fragments are read from them.
#pragma once

#include "cuda/common/frame.h"
#include "cuda/common/platform.cuh"

namespace sparline::cuda {

constexpr int kWarpSize = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;
/// Stands for a scale of 0, so that a score of -inf stays one.
constexpr float kLeastScale = 1e-30f;

// Unsigned division first: the compiler does not know that threadIdx.x is small, and what is
// divided by powers of two further on should be known not to be negative.
__device__ __forceinline__ int lane_index() {
  return static_cast<int>(threadIdx.x % static_cast<unsigned>(kWarpSize));
}
__device__ __forceinline__ int warp_index() {
  return static_cast<int>(threadIdx.x / static_cast<unsigned>(kWarpSize));
}

/// A (kRows x kCols) tile of 16-bit elements. Chunks of 8 elements are swizzled by row, so that
/// eight rows of one chunk column, what ldmatrix reads at a time, lie in different banks.
template <class T, int kRows, int kCols>
struct SharedTile {
  static_assert(sizeof(T) == 2 && kCols % 64 == 0);
  static constexpr int kChunks = kCols / 8;
  static constexpr int kBytes = kRows * kCols * 2;

  T* data;

  __device__ __forceinline__ T* chunk(int row, int chunk) const {
    return data + row * kCols + ((chunk ^ (row & 7)) * 8);
  }
  __device__ __forceinline__ T* at(int row, int col) const { return chunk(row, col / 8) + col % 8; }
};

/// Where the chunk kStep rows `steps` times below the one at `chunk` is, in tiles of kCols columns:
/// kStep a power of two, `chunk` in the first kStep rows of a tile that begins at a multiple of its
/// rows' bytes. See SharedTile.
template <int kStep, int kCols>
__device__ __forceinline__ SharedAddress chunk_below(SharedAddress chunk, int steps) {
  static_assert((kStep & (kStep - 1)) == 0);
  return (chunk ^ static_cast<uint32_t>(steps * kStep % 8 * 16)) +
         static_cast<uint32_t>(steps * kStep * kCols * 2);
}

/// Starts copying positions [first, first + num_rows) of a head into rows 0.. of the tile, and
/// zeros into the rest of the tile: rows from num_rows, columns from head_dim. All kThreads threads
/// call it; cp_async_commit is the caller's. Rows that are not vectorised are copied on the spot.
template <int kThreads, class T, int kRows, int kCols>
__device__ __forceinline__ void load_rows_async(const SharedTile<T, kRows, kCols>& tile,
                                                const Rows& rows, const T* head, int32_t first,
                                                int32_t num_rows, int32_t head_dim) {
  // A thread copies one chunk column, kStep rows apart; the unrolling is short because loads are
  // issued where registers are full.
  constexpr int kChunks = kCols / 8, kStep = kThreads / kChunks;
  static_assert(kThreads % kChunks == 0 && kRows % kStep == 0);
  const int thread = static_cast<int>(threadIdx.x % static_cast<unsigned>(kThreads));
  const int c = thread % kChunks, r_first = thread / kChunks;
  const bool is_column = c * 8 < head_dim;
  const T* source = head + c * 8;
  if (rows.is_vectorised && rows.order == nullptr) {
    source += (first + r_first) * rows.stride_n;
    const int64_t step = kStep * rows.stride_n;
    if (num_rows >= kRows && head_dim == kCols) {
      const SharedAddress to = shared_address(tile.chunk(r_first, c));
#pragma unroll
      for (int n = 0; n < kRows / kStep; ++n, source += step) {
        cp_async_16(chunk_below<kStep, kCols>(to, n), source);
      }
      return;
    }
#pragma unroll 4
    for (int r = r_first; r < kRows; r += kStep, source += step) {
      const bool is_valid = r < num_rows && is_column;
      cp_async_16(tile.chunk(r, c), is_valid ? source : head, is_valid);
    }
    return;
  }
  if (rows.is_vectorised) {
    // Positions of several rows at a time: to look up each alone is to wait for memory as often.
    constexpr int kTogether = kRows / kStep % 4 == 0 ? 4 : 1;
#pragma unroll 1
    for (int r = r_first; r < kRows; r += kTogether * kStep) {
      int32_t found[kTogether];
#pragma unroll
      for (int n = 0; n < kTogether; ++n) {
        found[n] = r + n * kStep < num_rows ? rows.order[first + r + n * kStep] : 0;
      }
#pragma unroll
      for (int n = 0; n < kTogether; ++n) {
        const bool is_valid = r + n * kStep < num_rows && is_column;
        cp_async_16(tile.chunk(r + n * kStep, c),
                    is_valid ? source + found[n] * rows.stride_n : head, is_valid);
      }
    }
    return;
  }
#pragma unroll 1
  for (int r = r_first; r < kRows; r += kStep) {
    const bool is_valid = r < num_rows && is_column;
    const T* const row = is_valid ? source + rows.offset(first + r) : head;
#pragma unroll 1
    for (int e = 0; e < 8; ++e) {
      tile.chunk(r, c)[e] = is_valid && c * 8 + e < head_dim ? row[e] : T(0.0f);
    }
  }
}

// Fragments; names as in ptx.cuh. `lane` is lane_index(); `row` and `col` are multiples of 16 (8
// for the rows of load_a), the same for all lanes.

/// The address that a lane gives to ldmatrix: chunk column lane_chunk (0 or 1) past `col`, row
/// lane_row past `row`. All that depends on the lane is one offset; the column is an exclusive or
/// with a constant, as 64 columns are swizzled among themselves.
template <class T, int kRows, int kCols>
__device__ __forceinline__ const T* fragment_row(const SharedTile<T, kRows, kCols>& tile, int row,
                                                 int col, int lane_row, int lane_chunk) {
  const int lane_offset = lane_row * kCols + (lane_chunk ^ (lane_row & 7)) * 8;
  return tile.data + (lane_offset ^ (col % 64)) + (row * kCols + col / 64 * 64);
}

/// A 16x16 at (row, col).
template <class Tile>
__device__ __forceinline__ void load_a(uint32_t (&a)[4], const Tile& tile, int row, int col,
                                       int lane) {
  ldmatrix_x4(a, fragment_row(tile, row, col, lane % 16, lane / 16));
}
/// A = X^T, 16x16: rows are the tile's columns from `col`, columns (k) the tile's rows from `row`.
template <class Tile>
__device__ __forceinline__ void load_a_trans(uint32_t (&a)[4], const Tile& tile, int row, int col,
                                             int lane) {
  ldmatrix_x4_trans(a, fragment_row(tile, row, col, lane % 8 + lane / 16 * 8, lane / 8 % 2));
}
/// Two B 16x8 = X^T next to each other: columns (n) are the tile's rows from `row`, 16 of them; k
/// are the tile's columns from `col`. b[0] b[1] belong to the first eight columns, b[2] b[3] to the
/// others.
template <class Tile>
__device__ __forceinline__ void load_b(uint32_t (&b)[4], const Tile& tile, int row, int col,
                                       int lane) {
  ldmatrix_x4(b, fragment_row(tile, row, col, lane % 8 + lane / 16 * 8, lane / 8 % 2));
}
/// Two B 16x8 = X: k are the tile's rows from `row`, columns (n) the tile's columns from `col`, 16
/// of them; registers as load_b.
template <class Tile>
__device__ __forceinline__ void load_b_trans(uint32_t (&b)[4], const Tile& tile, int row, int col,
                                             int lane) {
  ldmatrix_x4_trans(b, fragment_row(tile, row, col, lane % 16, lane / 16));
}

/// The sum over the four lanes that share rows of a C fragment.
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}

__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(fp16 x) { return __half2float(x); }
template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ fp16 from_float<fp16>(float x) {
  return __float2half_rn(x);
}

}  // namespace sparline::cuda
