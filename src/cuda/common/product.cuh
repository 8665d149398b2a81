// SPDX-License-Identifier: Apache-2.0
//
// Products C = A B^T of float32 matrices for every head, on the float32 units: what is ranked by
// the result must not depend on the rounding of a shorter format. Every element adds up its
// products in the order of the columns, so that equal rows give equal bits.
//   Tiles    64 x 128, four warps of 32 x 64, 8 x 8 a thread, or 32 x 128, 4 x 8 a thread; slices
//   of
//            16 columns, three in flight
#pragma once

#include "cuda/common/tile.cuh"
#include "cuda/device.h"

namespace sparline::cuda {

constexpr int kTileRows = 64, kTileCols = 128, kSlice = 16, kStages = 3;
constexpr int kFewRows = 32;  // of a tile, where tiles of kTileRows leave multiprocessors idle
constexpr int kProductThreads = 128;      // four warps
constexpr int kSliceStride = kSlice + 4;  // floats; eight neighbouring rows lie in different banks
template <int kRows>
constexpr int kStageFloats = (kRows + kTileCols) * kSliceStride;

/// For every z = b H + h: C (num_rows x num_cols) = A (num_rows x ld) B^T (num_cols x ld).
struct Product {
  const float* a = nullptr;  // (B H, num_rows, ld)
  const float* b = nullptr;  // (any, num_cols, ld): number b b_per_batch + h / b_group
  float* c = nullptr;        // (B H, num_rows, ld_c), from row first_row of all of these
  int64_t ld = 0, ld_c = 0;
  int32_t num_rows = 0, num_cols = 0, num_heads = 1;
  int32_t b_per_batch = 0, b_group = 1;
  int64_t first_tile = 0, first_row = 0;
  Axis rows;  // with a table, tiles without two blocks of one sequence are left out
};

/// Tile `tile` of `rows` rows, counted over all z.
struct RowTile {
  int64_t z = 0;
  int32_t first = 0;

  SPARLINE_HOST_DEVICE RowTile(int64_t tile, int32_t num_rows, int rows = kTileRows) {
    const int32_t tiles = (num_rows + rows - 1) / rows;
    z = tile / tiles;
    first = static_cast<int32_t>(tile % tiles) * rows;
  }
  SPARLINE_HOST_DEVICE int64_t row(int32_t num_rows) const { return z * num_rows + first; }
};

/// A lane's part in a product whose lanes are spread over 4 rows and 8 columns. Lanes next to each
/// other share a column and half a warp has two rows, so that 16 bytes a lane take two reads of
/// shared memory and not four.
struct ProductLane {
  int row = lane_index() / 16 * 2 + lane_index() % 2;
  int col = lane_index() / 2 % 8;
};

/// sum[m][n] += the products of four columns of row m of A and row n of B, in their order. Rows are
/// `a_stride` and `b_stride` floats apart.
template <int kRows, int kCols>
__device__ __forceinline__ void add_products(float (&sum)[kRows][kCols], const float* a,
                                             int a_stride, const float* b, int b_stride) {
  float4 x[kRows];
#pragma unroll
  for (int m = 0; m < kRows; ++m) x[m] = *reinterpret_cast<const float4*>(a + m * a_stride);
#pragma unroll
  for (int n = 0; n < kCols; ++n) {
    const float4 y = *reinterpret_cast<const float4*>(b + n * b_stride);
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
      sum[m][n] = fmaf(x[m].x, y.x, sum[m][n]);
      sum[m][n] = fmaf(x[m].y, y.y, sum[m][n]);
      sum[m][n] = fmaf(x[m].z, y.z, sum[m][n]);
      sum[m][n] = fmaf(x[m].w, y.w, sum[m][n]);
    }
  }
}

template <int kRows>
__global__ void __launch_bounds__(kProductThreads, 3) product_kernel(const Product p) {
  begin_kernel();
  SPARLINE_DYNAMIC_SHARED(shared);
  float* const stages = reinterpret_cast<float*>(shared);

  const int32_t num_col_tiles = (p.num_cols + kTileCols - 1) / kTileCols;
  const RowTile tile(p.first_tile + static_cast<int32_t>(blockIdx.x) / num_col_tiles, p.num_rows,
                     kRows);
  const int32_t first_col = static_cast<int32_t>(blockIdx.x) % num_col_tiles * kTileCols;
  const int32_t num_rows = min(p.num_rows - tile.first, kRows);
  const int32_t num_cols = min(p.num_cols - first_col, kTileCols);
  if (p.rows.table != nullptr) {
    const int32_t begin = p.rows.table[tile.first].other_begin;
    const int32_t end = p.rows.table[tile.first + num_rows - 1].other_end;
    if (first_col >= end || first_col + num_cols <= begin) return;
  }
  const int64_t h = tile.z % p.num_heads;
  const int64_t b_idx = tile.z / p.num_heads * p.b_per_batch + h / p.b_group;
  const float* const a = p.a + tile.row(p.num_rows) * p.ld;
  const float* const b = p.b + (b_idx * p.num_cols + first_col) * p.ld;

  // A thread copies 16 bytes of every 32nd row of a stage: rows of A, then rows of B.
  constexpr int kVectors = kSlice / 4, kStep = kProductThreads / kVectors;
  const int source_row = static_cast<int>(threadIdx.x) / kVectors;
  const int source_k = static_cast<int>(threadIdx.x) % kVectors * 4;
  const int64_t source_offset = source_row * p.ld + source_k;
  const int num_slices = static_cast<int>(p.ld) / kSlice;
  const auto load = [&](int slice) {
    float* const stage =
        stages + slice % kStages * kStageFloats<kRows> + source_row * kSliceStride + source_k;
    const auto load_rows = [&](float* to, const float* from, int row, int row_count) {
      const bool is_valid = source_row + row < row_count;
      const float* const source = from + source_offset + row * p.ld + slice * kSlice;
      cp_async_16(to + row * kSliceStride, is_valid ? source : from, is_valid);
    };
#pragma unroll
    for (int row = 0; row < kRows; row += kStep) load_rows(stage, a, row, num_rows);
#pragma unroll
    for (int row = 0; row < kTileCols; row += kStep) {
      load_rows(stage + kRows * kSliceStride, b, row, num_cols);
    }
  };
#pragma unroll
  for (int slice = 0; slice < kStages - 1; ++slice) {
    if (slice < num_slices) load(slice);
    cp_async_commit();
  }

  // A thread's rows are 4 apart, its columns 8 apart.
  const ProductLane lane;
  constexpr int kThreadRows = kRows / 8;
  const int row = warp_index() / 2 * (kRows / 2) + lane.row;
  const int col = warp_index() % 2 * 64 + lane.col;
  float sum[kThreadRows][8] = {};
  for (int slice = 0; slice < num_slices; ++slice) {
    cp_async_wait<kStages - 2>();
    __syncthreads();
    if (slice + kStages - 1 < num_slices) load(slice + kStages - 1);
    cp_async_commit();
    const float* const stage = stages + slice % kStages * kStageFloats<kRows>;
    const float* const a_row = stage + row * kSliceStride;
    const float* const b_row = stage + (kRows + col) * kSliceStride;
#pragma unroll
    for (int k = 0; k < kSlice; k += 4) {
      add_products(sum, a_row + k, 4 * kSliceStride, b_row + k, 8 * kSliceStride);
    }
  }

  float* const c = p.c + (tile.row(p.num_rows) - p.first_row) * p.ld_c + first_col;
#pragma unroll
  for (int m = 0; m < kThreadRows; ++m) {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const int r = row + 4 * m, d = col + 8 * n;
      if (r < num_rows && d < num_cols) c[r * p.ld_c + d] = sum[m][n];
    }
  }
}

inline int64_t padded(int64_t size, int64_t unit) { return (size + unit - 1) / unit * unit; }

template <int kRows>
void launch_product_tiles(const Product& product, int64_t tiles, void* stream) {
  const int64_t num_col_tiles = padded(product.num_cols, kTileCols) / kTileCols;
  launch(product_kernel<kRows>,
         {.blocks = tiles * num_col_tiles,
          .threads = kProductThreads,
          .shared_bytes = kStages * kStageFloats<kRows> * static_cast<int64_t>(sizeof(float))},
         stream, product);
}

/// `tiles`: tiles of kTileRows rows, from product.first_tile.
inline void launch_product(const Product& product, int64_t tiles, void* stream) {
  launch_product_tiles<kTileRows>(product, tiles, stream);
}

/// All rows of a product of `num_matrices` = B H.
inline void launch_whole_product(const Product& product, int64_t num_matrices, void* stream) {
  const auto num_tiles = [&](int rows) {
    return num_matrices * (padded(product.num_rows, rows) / rows);
  };
  const int64_t num_col_tiles = padded(product.num_cols, kTileCols) / kTileCols;
  if (num_tiles(kFewRows) * num_col_tiles <= current_device().num_multiprocessors) {
    launch_product_tiles<kFewRows>(product, num_tiles(kFewRows), stream);
  } else {
    launch_product_tiles<kTileRows>(product, num_tiles(kTileRows), stream);
  }
}

}  // namespace sparline::cuda
