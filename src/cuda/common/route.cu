// SPDX-License-Identifier: Apache-2.0
//
// Block classification (SLA Eq. 2-3; SpargeAttention2; SpargeAttn), all of it in float32.
//   pool        u = mean of q_i, w = mean of k_j less the mean key          (pool.cu)
//   fold        with projections u becomes u Wq^T Wk, so that w serves all query heads of a group:
//               where scores stay in shared memory, in the kernel that makes them
//   scores      Zc = u w^T, unscaled: softmax_scale changes no order, but its rounding breaks ties
//   select      the best key blocks of each query block become 1, the worst -1, the rest 0
// Scores stay in shared memory where they fit (route_tile.cuh); else they go through the workspace,
// as many rows at a time as kScoreBytes hold.
#include <algorithm>

#include "core/workspace.h"
#include "cuda/common/pool.cuh"
#include "cuda/common/product.cuh"
#include "cuda/common/route_tile.cuh"

namespace sparline::cuda {
namespace {

// Projections ------------------------------------------------------------------------------------

/// folded[h][c][a] = sum over r of Wk[r][c] Wq[r][a] (ld x ld, zeros from D on), the transpose of
/// Wq^T Wk. Multiplies while the kernel before ends: that is one of the router's, which has itself
/// waited for whoever wrote the matrices before it let this one come.
constexpr int kFoldTile = 32, kFoldThreads = 256;
__global__ void __launch_bounds__(kFoldThreads)
    fold_kernel(const float* proj_q, const float* proj_k, int64_t stride_h, int32_t head_dim,
                int32_t ld, float* folded) {
  admit_next_kernel();
  __shared__ float q_tile[kFoldTile][kFoldTile], k_tile[kFoldTile][kFoldTile];
  constexpr int kStep = kFoldThreads / kFoldTile;
  const int32_t num_tiles = (ld + kFoldTile - 1) / kFoldTile;
  const int32_t idx = static_cast<int32_t>(blockIdx.x);
  const int64_t h = idx / (num_tiles * num_tiles);
  const int32_t first_c = idx / num_tiles % num_tiles * kFoldTile;
  const int32_t first_a = idx % num_tiles * kFoldTile;
  const int x = static_cast<int>(threadIdx.x) % kFoldTile;
  const int y = static_cast<int>(threadIdx.x) / kFoldTile;
  float sum[kFoldTile / kStep] = {};
  for (int32_t first = 0; first < head_dim; first += kFoldTile) {
    __syncthreads();
#pragma unroll
    for (int r = y; r < kFoldTile; r += kStep) {
      const int64_t row = h * stride_h + int64_t{first + r} * head_dim;
      const bool is_row = first + r < head_dim;
      q_tile[r][x] = is_row && first_a + x < head_dim ? proj_q[row + first_a + x] : 0.0f;
      k_tile[r][x] = is_row && first_c + x < head_dim ? proj_k[row + first_c + x] : 0.0f;
    }
    __syncthreads();
#pragma unroll 8
    for (int r = 0; r < kFoldTile; ++r) {
#pragma unroll
      for (int n = 0; n < kFoldTile / kStep; ++n) {
        sum[n] = fmaf(k_tile[r][y + n * kStep], q_tile[r][x], sum[n]);
      }
    }
  }
  await_last_kernel();
#pragma unroll
  for (int n = 0; n < kFoldTile / kStep; ++n) {
    const int32_t c = first_c + y + n * kStep;
    if (c < ld && first_a + x < ld) folded[(h * ld + c) * ld + first_a + x] = sum[n];
  }
}

// Classes ----------------------------------------------------------------------------------------

struct SelectParams {
  ClassifyParams classify;
  const float* scores = nullptr;  // (rows of the call, ld)
  int64_t ld = 0;
  int64_t first_row = 0, num_rows = 0;  // of (B, H, T_m)
};

/// One query block for each group of warps.
template <bool kIsOneWarp, bool kIsHeld>
__global__ void __launch_bounds__(kMaxThreads<kIsOneWarp>, 1) select_kernel(const SelectParams p) {
  begin_kernel();
  __shared__ uint2 exchange[2 * kMaxRowWarps];
  const int64_t row_idx = row_index<kIsOneWarp>();
  if (row_idx >= p.num_rows) return;
  RowGroup<kIsOneWarp> group(exchange);
  const Frame& frame = p.classify.frame;
  const int64_t row = p.first_row + row_idx, pair = row / frame.queries.num_blocks;
  const int64_t b = pair / frame.num_heads, h = pair % frame.num_heads;
  const RankedBlocks ranked(p.classify, b * frame.num_kv_heads + h / frame.group());
  const float* const scores = p.scores + row_idx * p.ld;
  __shared__ WarpBins bins[kIsOneWarp ? kRowsPerBlock : 1];
  WarpBins& own_bins = bins[kIsOneWarp ? warp_index() : 0];
  if constexpr (kIsOneWarp) own_bins.clear();
  classify</*kHasMass=*/true, kIsHeld, kRowItems>(
      p.classify, group, b, h, static_cast<int32_t>(row % frame.queries.num_blocks),
      RowShares(p.classify.rule, frame.keys.num_blocks), &own_bins,
      [&](int32_t j) { return ranked.has(j) ? scores[j] : __uint_as_float(kNoScore); });
}

// Launches ---------------------------------------------------------------------------------------

constexpr int64_t kScoreBytes = int64_t{64} << 20;  // unless a tile of rows takes more

/// Everything the router keeps in its workspace.
struct RouteSpace {
  int64_t ld = 0, ld_scores = 0;
  int64_t num_tiles = 0;       // of rows, over all heads
  int64_t tiles_per_wave = 0;  // whose scores are there at a time
  float* pooled_q = nullptr;   // (B, H, T_m, ld)
  float* pooled_k = nullptr;   // (B, H_kv, T_n, ld)
  float* folded = nullptr;     // (H, ld, ld)
  float* projected = nullptr;  // (B, H, T_m, ld)
  float* means = nullptr;      // (B, H_kv, sequences, D), where similarity needs them
  uint8_t* is_alike_q = nullptr;
  uint8_t* is_alike_k = nullptr;
  float* scores = nullptr;  // (rows of a wave, ld_scores)
  int64_t total_bytes = 0;

  RouteSpace(const Frame& frame, const RouteRule& rule, bool has_projections, std::byte* base) {
    const int64_t num_q = int64_t{frame.batch} * frame.num_heads * frame.queries.num_blocks;
    const int64_t num_k = int64_t{frame.batch} * frame.num_kv_heads * frame.keys.num_blocks;
    ld = padded(frame.head_dim, kSlice);
    ld_scores = padded(frame.keys.num_blocks, kSlice);
    num_tiles = int64_t{frame.batch} * frame.num_heads *
                (padded(frame.queries.num_blocks, kTileRows) / kTileRows);
    const int64_t tile_floats = kTileRows * ld_scores;
    const int64_t most_tiles =
        std::max<int64_t>(1, kScoreBytes / (tile_floats * static_cast<int64_t>(sizeof(float))));
    const int64_t num_waves = (num_tiles + most_tiles - 1) / most_tiles;
    tiles_per_wave = (num_tiles + num_waves - 1) / num_waves;

    Arena arena(base);
    pooled_q = arena.take<float>(num_q * ld);
    pooled_k = arena.take<float>(num_k * ld);
    scores = arena.take<float>(std::min(tiles_per_wave * kTileRows, num_q) * ld_scores);
    if (has_projections) {
      folded = arena.take<float>(frame.num_heads * ld * ld);
      projected = arena.take<float>(num_q * ld);
    }
    if (rule.min_similarity > 0.0) {  // no mean cosine is below 0
      is_alike_q = arena.take<uint8_t>(num_q);
      is_alike_k = arena.take<uint8_t>(num_k);
      means = arena.take<float>(int64_t{frame.batch} * frame.num_kv_heads *
                                frame.keys.num_sequences * frame.head_dim);
    }
    total_bytes = arena.used_bytes();
  }
};

void launch_select(const SelectParams& params, void* stream) {
  const RowShape shape(params.num_rows, params.classify.frame.keys.num_blocks);
  const auto kernel = shape.is_one_warp ? select_kernel<true, true>
                      : shape.is_held   ? select_kernel<false, true>
                                        : select_kernel<false, false>;
  launch(kernel, {.blocks = shape.blocks, .threads = shape.threads}, stream, params);
}

/// Wq^T Wk of every head, or of all, in space.folded.
void fold(const RouteParams& params, const RouteSpace& space, void* stream) {
  const int64_t num_matrices = params.proj_stride_h == 0 ? 1 : params.frame.num_heads;
  const int64_t num_tiles = padded(space.ld, kFoldTile) / kFoldTile;
  launch(fold_kernel, {.blocks = num_matrices * num_tiles * num_tiles, .threads = kFoldThreads},
         stream, params.proj_q, params.proj_k, params.proj_stride_h, params.frame.head_dim,
         static_cast<int32_t>(space.ld), space.folded);
}

/// u Wq^T Wk, in space.projected.
void project(const RouteParams& params, const RouteSpace& space, void* stream) {
  const Frame& frame = params.frame;
  launch_whole_product({.a = space.pooled_q,
                        .b = space.folded,
                        .c = space.projected,
                        .ld = space.ld,
                        .ld_c = space.ld,
                        .num_rows = frame.queries.num_blocks,
                        .num_cols = static_cast<int32_t>(space.ld),
                        .num_heads = frame.num_heads,
                        .b_group = params.proj_stride_h == 0 ? frame.num_heads : 1},
                       int64_t{frame.batch} * frame.num_heads, stream);
}

}  // namespace

int64_t route_bytes(const Frame& frame, const RouteRule& rule, bool has_projections) {
  return RouteSpace(frame, rule, has_projections, nullptr).total_bytes;
}

void route(const RouteParams& params, std::byte* workspace, void* stream) {
  const Frame& frame = params.frame;
  const RouteRule& rule = params.rule;
  const bool has_projections = params.proj_q != nullptr;
  const RouteSpace space(frame, rule, has_projections, workspace);
  if (frame.queries.num_blocks == 0 || frame.keys.num_blocks == 0) return;  // nothing to write
  const bool checks_similarity = space.is_alike_q != nullptr;
  float* const means = params.k_mean != nullptr ? params.k_mean : space.means;
  const PoolJob queries{.axis = frame.queries,
                        .rows = params.q,
                        .num_heads = frame.num_heads,
                        .is_mean = true,
                        .pooled = space.pooled_q,
                        .is_alike = space.is_alike_q};
  const PoolJob keys{.axis = frame.keys,
                     .rows = params.k,
                     .num_heads = frame.num_kv_heads,
                     .is_mean = !rule.smooth_k,
                     .pooled = space.pooled_k,
                     .means = rule.smooth_k ? means : nullptr,
                     .is_alike = space.is_alike_k};
  if (rule.smooth_k) {
    pool(frame, params.dtype, keys, {}, space.ld, stream);
    if (has_projections) fold(params, space, stream);
    pool_and_centre(frame, params.dtype, queries, keys, space.ld, means, stream);
  } else {
    pool(frame, params.dtype, queries, keys, space.ld, stream);
    if (has_projections) fold(params, space, stream);
  }
  if (checks_similarity) {
    find_alike(frame, params.dtype, queries, keys, static_cast<float>(rule.min_similarity), stream);
  }

  Product product{
      .a = space.pooled_q,
      .b = space.pooled_k,
      .c = space.scores,
      .ld = space.ld,
      .ld_c = space.ld_scores,
      .num_rows = frame.queries.num_blocks,
      .num_cols = frame.keys.num_blocks,
      .num_heads = frame.num_heads,
      .b_per_batch = frame.num_kv_heads,
      .b_group = frame.group(),
      .rows = frame.queries,
  };
  const ClassifyParams classify{.frame = frame,
                                .rule = rule,
                                .scale = params.scale,
                                .is_alike_q = space.is_alike_q,
                                .is_alike_k = space.is_alike_k,
                                .block_class = params.block_class};
  const int64_t folded_stride_h = params.proj_stride_h == 0 ? 0 : space.ld * space.ld;
  if (launch_route_tiles(product, classify, space.folded, folded_stride_h, stream)) return;
  if (has_projections) {
    project(params, space, stream);
    product.a = space.projected;
  }
  SelectParams select{.classify = classify, .scores = space.scores, .ld = space.ld_scores};
  for (int64_t tile = 0; tile < space.num_tiles; tile += space.tiles_per_wave) {
    const int64_t past = std::min(tile + space.tiles_per_wave, space.num_tiles);
    const int64_t first_row = RowTile(tile, product.num_rows).row(product.num_rows);
    const int64_t past_row = RowTile(past, product.num_rows).row(product.num_rows);
    product.first_tile = tile;
    product.first_row = select.first_row = first_row;
    select.num_rows = past_row - first_row;
    launch_product(product, past - tile, stream);
    launch_select(select, stream);
  }
}

}  // namespace sparline::cuda
