// SPDX-License-Identifier: Apache-2.0
//
// Scores and classes of a tile of query blocks in one kernel: scores, bit for bit those of
// product.cuh, stay in shared memory. Its code comes out of memory when it starts, and it is over
// so soon that a loop rolled up is a loop that starts earlier.
//   Tiles    16 or 24 query blocks of one head, against all its key blocks; eight warps, each with
//            64 key blocks at a time, 4 x 8 or 6 x 8 a thread
//   Shared   pooled queries (rows, D); two or three slices of 16 columns of every warp's pooled
//            keys, which it alone loads and reads; scores (rows, T_n)
//   Folded   with projections the tile first makes its own u Wq^T Wk, in the place of u; 16 rows of
//            the matrix a warp, where its slices of keys will be
//   Classes  a warp for each row, which it holds in registers
#pragma once

#include "cuda/common/classify.cuh"
#include "cuda/common/product.cuh"
#include "cuda/device.h"

namespace sparline::cuda {

constexpr int kRouteWarps = 8;                         // that multiply
constexpr int kWarpCols = 64;                          // key blocks
constexpr int kRouteStageFloats = kWarpCols * kSlice;  // of one warp

/// A thread has kThreadRows rows and 8 columns, a lane holds kItems scores of a row; kStages slices
/// of a warp's keys are under way, kResident tiles on a multiprocessor. kWarps classify rows, which
/// is a chain of short steps: the more at a time, the better.
template <int kThreadRows_, int kItems_, int kStages_, int kResident_, int kWarps_ = kRouteWarps>
struct RouteTraits {
  static constexpr int kThreadRows = kThreadRows_, kRows = 4 * kThreadRows, kItems = kItems_;
  static constexpr int kStages = kStages_, kResident = kResident_;
  static constexpr int kWarps = kWarps_, kThreads = kWarps * kWarpSize;
  static_assert(kWarps * sizeof(WarpBins) <=
                kRouteWarps * kStages * kRouteStageFloats * sizeof(float));
};
using RouteOneTile = RouteTraits<6, kRowItems, 3, 1, 12>;
/// One multiplies while the other one loads or classifies.
using RouteTwoTiles = RouteTraits<4, kRowItems, 2, 2>;
using RouteLongRows = RouteTraits<6, 40, 3, 1>;
using RouteLongerRows = RouteTraits<4, 64, 3, 1>;
using RouteLongestRows = RouteTraits<4, 64, 2, 1>;

struct RouteTile {
  Product product;
  ClassifyParams classify;
  const float* folded = nullptr;  // (1 or H, ld, ld), see fold_kernel; null without projections
  int64_t folded_stride_h = 0;
  int32_t ld_scores = 0;  // 8 more than a multiple of 32: four rows of eight lie in 32 banks
};

/// One warp's pooled keys in slices, on their way from memory: 64 rows of 16 floats, the four
/// chunks of a row swizzled by row / 2, so that eight rows of one chunk lie in different banks.
template <int kStages>
class KeySlices {
 public:
  /// `rows`: pooled keys from the warp's first ones on, of which there are `num_rows`.
  __device__ KeySlices(const float* stages, const float* rows, int32_t num_rows, int32_t ld)
      : source_(rows + lane_index() / 4 * ld + lane_index() % 4 * 4),
        num_rows_(num_rows - lane_index() / 4),
        ld_(ld) {
    const int row = lane_index() / 4, chunk = lane_index() % 4 ^ row / 2 % 4;
    stages_ = shared_address(stages + row * kSlice + chunk * 4);
  }

  /// Starts copying the next slice: slices of 64 rows in turn, then those of the warp's next rows.
  /// Rows that there are not stay as they are: nothing reads what comes of them.
  __device__ __forceinline__ void load() {
    constexpr int kStep = kWarpSize / 4, kRowBytes = kSlice * static_cast<int>(sizeof(float));
    const SharedAddress to = stages_ + static_cast<uint32_t>(stage_ * kWarpCols * kRowBytes);
    const float* from = source_;
#pragma unroll
    for (int r = 0; r < kWarpCols; r += kStep) {
      if (r < num_rows_) cp_async_16(to + static_cast<uint32_t>(r * kRowBytes), from);
      from += kStep * ld_;
    }
    if (++stage_ == kStages) stage_ = 0;
    source_ += kSlice;
    k_ += kSlice;
    if (k_ < ld_) return;
    k_ = 0;
    source_ += (kRouteWarps * kWarpCols - 1) * ld_;
    num_rows_ -= kRouteWarps * kWarpCols;
  }

 private:
  SharedAddress stages_;
  const float* source_;
  int32_t num_rows_;
  const int32_t ld_;
  int32_t k_ = 0;
  int stage_ = 0;
};

/// The rows u of `a_tile` become u F^T, bit for bit those of product.cuh: what multiplies are
/// kRouteWarps warps, each with 16 columns at a time, whose rows of F (ld x ld) it alone loads into
/// `stage` and reads. All threads call it, with the rows on their way.
template <class Traits>
__device__ __forceinline__ void fold_rows(float* a_tile, int ld_a, float* stage,
                                          const float* folded, int ld) {
  constexpr int kThreadRows = Traits::kThreadRows, kCols = kSlice, kThreadCols = kCols / 8;
  constexpr int kPart = 128;  // columns of F that are there at a time
  constexpr int kMostPasses = 256 / (kRouteWarps * kCols);
  static_assert(kCols * kPart <= Traits::kStages * kRouteStageFloats);
  const int num_passes =
      warp_index() < kRouteWarps
          ? (ld / kCols - warp_index() + kRouteWarps - 1) / kRouteWarps  // of this warp
          : 0;
  const auto first_col_of = [](int pass) { return (pass * kRouteWarps + warp_index()) * kCols; };
  // The chunks of a row are swizzled, so that eight rows of one chunk lie in different banks.
  const auto load = [&](int pass, int first) {
    const int k = first + lane_index() * 4;
    if (k < min(ld, first + kPart)) {
      const float* from = folded + int64_t{first_col_of(pass)} * ld + k;
#pragma unroll
      for (int r = 0; r < kCols; ++r, from += ld) {
        cp_async_16(shared_address(stage + r * kPart + (lane_index() ^ r % 8) * 4), from);
      }
    }
  };
  if (num_passes > 0) load(0, 0);
  cp_async_commit();  // the rows too
  cp_async_wait<0>();
  __syncthreads();

  const ProductLane lane;
  const float* const a_row = a_tile + lane.row * ld_a;
  const float* const b_row = stage + lane.col * kPart;
  float out[kMostPasses][kThreadRows][kThreadCols] = {};
#pragma unroll
  for (int pass = 0; pass < kMostPasses; ++pass) {
    if (pass >= num_passes) break;
#pragma unroll 1
    for (int first = 0; first < ld; first += kPart) {
      if (pass + first > 0) {
        __syncwarp();  // all have read the part before
        load(pass, first);
        cp_async_commit();
        cp_async_wait<0>();
        __syncwarp();
      }
      const int num_chunks = min(ld - first, kPart) / 4;
#pragma unroll 2
      for (int chunk = 0; chunk < num_chunks; ++chunk) {
        add_products(out[pass], a_row + first + chunk * 4, 4 * ld_a, b_row + (chunk ^ lane.col) * 4,
                     8 * kPart);
      }
    }
  }
  __syncthreads();  // all have read the rows
#pragma unroll
  for (int pass = 0; pass < kMostPasses; ++pass) {
    if (pass >= num_passes) break;
    float* const to = a_tile + lane.row * ld_a + first_col_of(pass) + lane.col;
#pragma unroll
    for (int m = 0; m < kThreadRows; ++m) {
#pragma unroll
      for (int c = 0; c < kThreadCols; ++c) {
        to[4 * m * ld_a + 8 * c] = out[pass][m][c];
      }
    }
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kResident)
    route_tile_kernel(const RouteTile p) {
  constexpr int kTile = Traits::kRows, kThreadRows = Traits::kThreadRows;
  constexpr int kStages = Traits::kStages;
  SPARLINE_DYNAMIC_SHARED(shared);
  const Product& product = p.product;
  const int ld = static_cast<int>(product.ld), ld_a = ld + 4;
  float* const a_tile = reinterpret_cast<float*>(shared);  // (kTile, ld_a)
  float* const stages = a_tile + kTile * ld_a + warp_index() * kStages * kRouteStageFloats;
  float* const scores =  // (kTile, ld_scores)
      a_tile + kTile * ld_a + kRouteWarps * kStages * kRouteStageFloats;

  const int32_t tiles = (product.num_rows + kTile - 1) / kTile;
  const int32_t z = static_cast<int32_t>(blockIdx.x) / tiles;
  const int32_t first_row = (static_cast<int32_t>(blockIdx.x) - z * tiles) * kTile;
  const int32_t num_rows = min(product.num_rows - first_row, kTile);
  const int32_t b = z / product.num_heads, h = z - b * product.num_heads;
  const int64_t b_idx = b * product.b_per_batch + h / product.b_group;
  const RowShares shares(p.classify.rule, p.classify.frame.keys.num_blocks);
  begin_kernel();
  int32_t first_col = 0, past_col = product.num_cols;
  if (product.rows.table != nullptr) {
    first_col = product.rows.table[first_row].other_begin;
    past_col = product.rows.table[first_row + num_rows - 1].other_end;
  }

  const float* const a = product.a + (int64_t{z} * product.num_rows + first_row) * ld;
#pragma unroll 1
  for (int r = warp_index(); r < num_rows; r += Traits::kWarps) {
#pragma unroll 1
    for (int k = lane_index() * 4; k < ld; k += 4 * kWarpSize) {
      cp_async_16(shared_address(a_tile + r * ld_a + k), a + r * ld + k);
    }
  }
  if (p.folded != nullptr) {
    fold_rows<Traits>(a_tile, ld_a, stages, p.folded + h * p.folded_stride_h, ld);
  }
  const int32_t warp_col = first_col + warp_index() * kWarpCols;
  KeySlices<kStages> slices(stages, product.b + (b_idx * product.num_cols + warp_col) * ld,
                            past_col - warp_col, ld);
  const int num_slices = ld / kSlice;
  constexpr int kRound = kRouteWarps * kWarpCols;
  const bool has_keys = warp_index() < kRouteWarps && warp_col < past_col;
  const int num_loads = has_keys ? (past_col - warp_col + kRound - 1) / kRound * num_slices : 0;
#pragma unroll
  for (int n = 0; n < kStages - 1; ++n) {
    if (n < num_loads) slices.load();
    cp_async_commit();
  }
  cp_async_wait<kStages - 2>();
  __syncthreads();

  // A thread's rows are 4 apart, its columns 8 apart.
  const ProductLane lane;
  const float* const a_row = a_tile + lane.row * ld_a;
  int32_t col = warp_col + lane.col;
  float sum[kThreadRows][8] = {};
  int k = 0, stage = 0;
  for (int n = 0; n < num_loads; ++n) {
    cp_async_wait<kStages - 2>();
    __syncwarp();
    if (n + kStages - 1 < num_loads) slices.load();
    cp_async_commit();
    const float* const b_row = stages + stage * kRouteStageFloats + lane.col * kSlice;
#pragma unroll 2
    for (int chunk = 0; chunk < kSlice / 4; ++chunk) {
      add_products(sum, a_row + k + chunk * 4, 4 * ld_a, b_row + (chunk ^ lane.col / 2 % 4) * 4,
                   8 * kSlice);
    }
    if (++stage == kStages) stage = 0;
    k += kSlice;
    if (k < ld) continue;
    k = 0;
    float* const to = scores + lane.row * p.ld_scores + (col - first_col);
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      const bool has_column = col + 8 * c < past_col;
#pragma unroll
      for (int m = 0; m < kThreadRows; ++m) {
        if (has_column) to[4 * m * p.ld_scores + 8 * c] = sum[m][c];
        sum[m][c] = 0.0f;
      }
    }
    col += kRound;
  }
  __syncthreads();
  if (p.classify.frame.keys.table != nullptr || p.classify.is_alike_k != nullptr) {
    const RankedBlocks ranked(p.classify, b_idx);
#pragma unroll 1
    for (int32_t j = first_col + static_cast<int32_t>(threadIdx.x); j < past_col;
         j += Traits::kThreads) {
      if (ranked.has(j)) continue;
#pragma unroll 1
      for (int r = 0; r < num_rows; ++r) {
        scores[r * p.ld_scores + j - first_col] = __uint_as_float(kNoScore);
      }
    }
    __syncthreads();
  }

  RowGroup</*kIsOneWarp=*/true> group(nullptr);
  // Where the slices of keys were.
  WarpBins& bins = reinterpret_cast<WarpBins*>(a_tile + kTile * ld_a)[warp_index()];
  bins.clear();
#pragma unroll 1
  for (int r = warp_index(); r < num_rows; r += Traits::kWarps) {
    const float* const row = scores + r * p.ld_scores - first_col;
    classify</*kHasMass=*/false, /*kIsHeld=*/true, Traits::kItems>(
        p.classify, group, b, h, first_row + r, shares, &bins, [&](int32_t j) { return row[j]; });
  }
}

// Launches ---------------------------------------------------------------------------------------

template <class Traits>
int64_t num_route_tiles(const RouteTile& tile) {
  return int64_t{tile.classify.frame.batch} * tile.product.num_heads *
         (padded(tile.product.num_rows, Traits::kRows) / Traits::kRows);
}

/// Launches all tiles where a row and a tile of scores fit.
template <class Traits>
bool launch_route_tiles(const RouteTile& tile, const CurrentDevice& device, void* stream) {
  const int64_t floats = Traits::kRows * (tile.product.ld + 4 + tile.ld_scores) +
                         kRouteWarps * Traits::kStages * kRouteStageFloats;
  const LaunchShape shape{.blocks = num_route_tiles<Traits>(tile),
                          .threads = Traits::kThreads,
                          .shared_bytes = floats * static_cast<int64_t>(sizeof(float))};
  const bool fits = tile.product.num_cols <= Traits::kItems * kWarpSize &&
                    shape.shared_bytes <= device.shared_bytes;
  if (fits) launch(route_tile_kernel<Traits>, shape, stream, tile);
  return fits;
}

/// All rows of the product; false, and nothing is launched, where the rule knows a mass or scores
/// do not fit into shared memory. With `folded` the product's rows are first multiplied by it.
inline bool launch_route_tiles(const Product& product, const ClassifyParams& classify,
                               const float* folded, int64_t folded_stride_h, void* stream) {
  if (classify.rule.selection != Selection::kTopK) return false;
  const RouteTile tile{.product = product,
                       .classify = classify,
                       .folded = folded,
                       .folded_stride_h = folded_stride_h,
                       .ld_scores = static_cast<int32_t>(padded(product.num_cols, 32)) + 8};
  const CurrentDevice device = current_device();
  // A round of two small tiles takes about as long as one of a large tile.
  const int64_t num_small = num_route_tiles<RouteTwoTiles>(tile);
  const auto rounds = [](int64_t tiles, int64_t resident) {
    return padded(tiles, resident) / resident;
  };
  const bool is_small_best =
      num_small <= device.num_multiprocessors ||
      rounds(num_small, 2 * device.num_multiprocessors) <
          rounds(num_route_tiles<RouteOneTile>(tile), device.num_multiprocessors);
  return (!is_small_best && launch_route_tiles<RouteOneTile>(tile, device, stream)) ||
         launch_route_tiles<RouteTwoTiles>(tile, device, stream) ||
         launch_route_tiles<RouteLongRows>(tile, device, stream) ||
         launch_route_tiles<RouteLongerRows>(tile, device, stream) ||
         launch_route_tiles<RouteLongestRows>(tile, device, stream);
}

}  // namespace sparline::cuda
