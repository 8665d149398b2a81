// SPDX-License-Identifier: Apache-2.0
//
// What the linear branch's backward sums over many rows (docs/math.md):
//   dW = sum over rows of left^T right, db = sum over rows of left
//     projection      left = dO, right = o_l, over all heads of the wave
//     hedgehog maps   left = d_y, right = q or k less its mean, for each head
//   dm_ij = -(<h_j, dH_i> + z_j . dZ_i) of a soft map
// The rows of a sum are shared out to CTAs, whose partial sums another kernel adds up in order: no
// atomics. Both are products of long rows, 64 deep at a time, double buffered.
#include <algorithm>

#include "cuda/sm80/linear_bwd.cuh"

namespace sparline::cuda {
namespace {

constexpr int kDepth = 64;
constexpr int kStages = 2;

/// Warps of kWarpRows x kWarpCols each make up a kTile x kTile product.
template <int kTile_>
struct ProductTraits {
  static constexpr int kTile = kTile_;
  static constexpr int kWarpsAcross = 2;
  static constexpr int kWarpRows = 32, kWarpCols = kTile / kWarpsAcross;
  static constexpr int kThreads = kTile / kWarpRows * kWarpsAcross * kWarpSize;
  static constexpr int kColTiles = kWarpCols / 8;
};

// Weight gradients -------------------------------------------------------------------------------

template <class Traits>
class RowProduct {
  static constexpr int kTile = Traits::kTile;

 public:
  float sums[2][Traits::kColTiles][4];  // 16 x 8 each
  float column[2][4];                   // left^T 1, in the first column

  __device__ RowProduct()
      : lane_(lane_index()),
        row_(warp_index() / Traits::kWarpsAcross * Traits::kWarpRows),
        col_(warp_index() % Traits::kWarpsAcross * Traits::kWarpCols) {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        column[m][e] = 0.0f;
#pragma unroll
        for (int n = 0; n < Traits::kColTiles; ++n) sums[m][n][e] = 0.0f;
      }
    }
  }

  __device__ int row(int m, int half) const { return row_ + m * 16 + half * 8 + lane_ / 4; }
  __device__ int col(int n) const { return col_ + n * 8 + lane_ % 4 * 2; }
  /// Whether this lane holds elements of `column`.
  __device__ bool has_column() const { return col_ == 0 && lane_ % 4 == 0; }

  /// += left^T right, and the sum of left's rows.
  template <class T>
  __device__ void add_transposed(const SharedTile<T, kDepth, kTile>& left,
                                 const SharedTile<T, kDepth, kTile>& right) {
    const uint32_t ones = lane_ < 4 ? pack<T>(1.0f, 1.0f) : 0;
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      uint32_t a[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        load_a_trans(a[m], left, k, row_ + m * 16, lane_);
        if (col_ == 0) mma<T>(column[m], a[m], ones, ones);
      }
#pragma unroll
      for (int n = 0; n < Traits::kColTiles; n += 2) {
        uint32_t b[4];
        load_b_trans(b, right, k, col_ + n * 8, lane_);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          mma<T>(sums[m][n], a[m], b[0], b[1]);
          mma<T>(sums[m][n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }
  /// += left right^T.
  __device__ void add(const SharedTile<bf16, kTile, kDepth>& left,
                      const SharedTile<bf16, kTile, kDepth>& right) {
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      uint32_t a[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) load_a(a[m], left, row_ + m * 16, k, lane_);
#pragma unroll
      for (int n = 0; n < Traits::kColTiles; n += 2) {
        uint32_t b[4];
        load_b(b, right, col_ + n * 8, k, lane_);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          mma<bf16>(sums[m][n], a[m], b[0], b[1]);
          mma<bf16>(sums[m][n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

 private:
  const int lane_, row_, col_;
};

/// Blocks in turn, 64 rows at a time, of the heads of one sum; protected queries are left out.
class RowWalk {
 public:
  struct Item {
    int32_t head = 0, first = 0, rows = 0, sequence = 0;
    bool is_valid = false;
  };

  __device__ RowWalk(const Axis& axis, bool has_protected, int32_t first_head, int32_t num_heads,
                     int32_t idx, int32_t step)
      : axis_(axis),
        has_protected_(has_protected),
        first_head_(first_head),
        parts_((axis.block_rows + kDepth - 1) / kDepth),
        end_(int64_t{num_heads} * axis.num_blocks * parts_),
        idx_(idx),
        step_(step) {}

  __device__ Item next() {
    for (; idx_ < end_; idx_ += step_) {
      const auto block_idx = static_cast<int32_t>(idx_ / parts_);
      const int32_t part = static_cast<int32_t>(idx_ % parts_) * kDepth;
      const BlockInfo block = axis_.block(block_idx % axis_.num_blocks);
      if (part >= block.rows || (has_protected_ && block.is_protected)) continue;
      const int32_t rest = block.rows - part;
      idx_ += step_;
      return {first_head_ + block_idx / axis_.num_blocks, block.begin + part,
              rest < kDepth ? rest : kDepth, block.sequence, true};
    }
    return {};
  }

 private:
  const Axis axis_;
  const bool has_protected_;
  const int32_t first_head_, parts_;
  const int64_t end_;
  int64_t idx_;
  const int32_t step_;
};

struct WeightSums {
  WeightGradient args;
  Frame frame;
  Wave wave;
  int32_t num_sums = 1;  // 1, or one for each head of the wave
  int32_t num_splits = 1;
};

template <class T, int kTile>
__global__ void __launch_bounds__(ProductTraits<kTile>::kThreads)
    linear_backward_weight_kernel(const __grid_constant__ WeightSums sums) {
  begin_kernel();
  const WeightGradient& p = sums.args;
  using Traits = ProductTraits<kTile>;
  using Tile = SharedTile<T, kDepth, kTile>;
  SPARLINE_DYNAMIC_SHARED(shared);
  const Frame& frame = sums.frame;
  const int32_t head_dim = frame.head_dim;
  const int32_t num_heads = sums.wave.count * (p.is_of_keys ? 1 : frame.group());
  const auto tiles = static_cast<unsigned>((head_dim + kTile - 1) / kTile);
  const auto splits = static_cast<unsigned>(sums.num_splits);
  unsigned task = blockIdx.x;
  const int32_t col = static_cast<int32_t>(task % tiles) * kTile;
  task /= tiles;
  const int32_t row = static_cast<int32_t>(task % tiles) * kTile;
  task /= tiles;
  const auto split = static_cast<int32_t>(task % splits);
  const auto sum = static_cast<int32_t>(task / splits);

  const auto tile_of = [&](int stage, bool is_right) {
    return Tile{reinterpret_cast<T*>(shared + (stage * 2 + (is_right ? 1 : 0)) * Tile::kBytes)};
  };
  const auto head_of = [&](int32_t head) {
    return p.is_of_keys ? kv_head_of(frame, sums.wave, head)
                        : query_head_of(frame, sums.wave, head);
  };
  const auto load_operand = [&](const Tile& tile, const Rows& rows, bool is_of_wave,
                                const RowWalk::Item& item, int32_t first_col) {
    const HeadIndex at = is_of_wave ? HeadIndex{0, item.head} : head_of(item.head);
    load_rows_async<Traits::kThreads>(tile, rows, rows.head<const T>(at.b, at.h) + first_col,
                                      item.first, item.rows, head_dim - first_col);
  };
  const auto load = [&](int stage, const RowWalk::Item& item) {
    if (item.is_valid) {
      load_operand(tile_of(stage, false), p.left, p.is_left_of_wave, item, row);
      load_operand(tile_of(stage, true), p.right, p.is_right_of_wave, item, col);
    }
    cp_async_commit();
  };
  const auto subtract_mean = [&](const Tile& tile, const RowWalk::Item& item) {
    const HeadIndex at = head_of(item.head);
    const float* const mean =
        p.right_mean +
        ((int64_t{at.b} * frame.num_kv_heads + at.h) * frame.keys.num_sequences + item.sequence) *
            head_dim;
    for (int idx = static_cast<int>(threadIdx.x); idx < item.rows * kTile;
         idx += Traits::kThreads) {
      const int r = idx / kTile, c = idx % kTile;
      if (col + c >= head_dim) continue;
      T& x = *tile.at(r, c);
      x = from_float<T>(to_float(x) - mean[col + c]);
    }
    __syncthreads();
  };

  RowWalk walk(p.is_of_keys ? frame.keys : frame.queries, !p.is_of_keys, p.is_one ? 0 : sum,
               p.is_one ? num_heads : 1, split, sums.num_splits);
  RowProduct<Traits> product;
  RowWalk::Item item = walk.next();
  load(0, item);
  for (int stage = 0; item.is_valid; stage ^= 1) {
    const RowWalk::Item following = walk.next();
    load(stage ^ 1, following);
    cp_async_wait<1>();
    __syncthreads();
    if (p.right_mean != nullptr) subtract_mean(tile_of(stage, true), item);
    product.add_transposed(tile_of(stage, false), tile_of(stage, true));
    __syncthreads();
    item = following;
  }
  cp_async_wait<0>();

  const int64_t size = int64_t{head_dim} * head_dim + head_dim;
  float* const out = p.partial + (int64_t{sum} * sums.num_splits + split) * size;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int32_t r = row + product.row(m, half);
      if (r >= head_dim) continue;
#pragma unroll
      for (int n = 0; n < Traits::kColTiles; ++n) {
        const int32_t c = col + product.col(n);
        if (c >= head_dim) continue;
        out[int64_t{r} * head_dim + c] = product.sums[m][n][2 * half];
        out[int64_t{r} * head_dim + c + 1] = product.sums[m][n][2 * half + 1];
      }
      if (col == 0 && product.has_column()) {
        out[int64_t{head_dim} * head_dim + r] = product.column[m][2 * half];
      }
    }
  }
}

constexpr int kTotalColumns = 32;  // elements of a CTA
constexpr int kTotalGroups = 8;    // threads that share an element's partial sums

/// weight and bias += the partial sums of the wave's heads that share them.
__global__ void __launch_bounds__(kTotalColumns* kTotalGroups)
    linear_backward_weight_total_kernel(const __grid_constant__ WeightSums sums) {
  begin_kernel();
  const WeightGradient& p = sums.args;
  const Frame& frame = sums.frame;
  __shared__ float parts[kTotalGroups][kTotalColumns];
  const int64_t matrix = int64_t{frame.head_dim} * frame.head_dim;
  const int64_t size = matrix + frame.head_dim;
  const int64_t chunks = (size + kTotalColumns - 1) / kTotalColumns;
  const int64_t h = blockIdx.x / chunks;
  const int64_t at = blockIdx.x % chunks * kTotalColumns + lane_index();
  const int group = warp_index();
  const bool is_valid = at < size;

  float total = 0.0f;
  const auto add = [&](int32_t sum) {
    const float* const from = p.partial + int64_t{sum} * sums.num_splits * size + at;
    float part = 0.0f;
    if (is_valid) {
#pragma unroll 4
      for (int32_t split = group; split < sums.num_splits; split += kTotalGroups) {
        part += from[split * size];
      }
    }
    parts[group][lane_index()] = part;
    __syncthreads();
    if (group == 0) {
#pragma unroll
      for (int g = 0; g < kTotalGroups; ++g) total += parts[g][lane_index()];
    }
    __syncthreads();
  };
  if (p.is_one) {
    add(0);
  } else {  // the pairs of the wave that head h belongs to
    const int32_t heads_of_pair = p.is_of_keys ? 1 : frame.group();
    const auto h_kv = static_cast<int32_t>(h / heads_of_pair);
    const int32_t begin = sums.wave.first % frame.num_kv_heads;
    const int32_t first = (h_kv - begin + frame.num_kv_heads) % frame.num_kv_heads;
    for (int32_t pair = first; pair < sums.wave.count; pair += frame.num_kv_heads) {
      add(pair * heads_of_pair + static_cast<int32_t>(h % heads_of_pair));
    }
  }
  if (group != 0 || !is_valid) return;
  if (at < matrix) {
    p.weight[h * matrix + at] += total;
  } else if (p.bias != nullptr) {
    p.bias[h * frame.head_dim + at - matrix] += total;
  }
}

template <class T>
void launch_weight_sums(const WeightSums& sums, void* stream) {
  const auto run = [&]<int kTile>() {
    const int64_t tiles = (sums.frame.head_dim + kTile - 1) / kTile;
    launch(linear_backward_weight_kernel<T, kTile>,
           {.blocks = int64_t{sums.num_sums} * sums.num_splits * tiles * tiles,
            .threads = ProductTraits<kTile>::kThreads,
            .shared_bytes = kStages * 2 * SharedTile<T, kDepth, kTile>::kBytes},
           stream, sums);
  };
  if (sums.frame.head_dim <= 64) return run.template operator()<64>();
  run.template operator()<128>();
}

/// CTAs that a weight gradient is shared out to, about: one for each multiprocessor of a large
/// chip.
constexpr int64_t kWeightCTAs = 132;

WeightSums weight_sums(const LinearParams& params, const WeightGradient& args) {
  const int64_t num_heads =
      int64_t{params.wave.count} * (args.is_of_keys ? 1 : params.frame.group());
  const int64_t num_sums = args.is_one ? 1 : num_heads;
  const int64_t tiles = (params.frame.head_dim + 127) / 128;
  const int64_t num_blocks =
      args.is_of_keys ? params.frame.keys.num_blocks : params.frame.queries.num_blocks;
  const int64_t splits =
      std::min(kWeightCTAs / (num_sums * tiles * tiles), num_heads / num_sums * num_blocks);
  return {.args = args,
          .frame = params.frame,
          .wave = params.wave,
          .num_sums = static_cast<int32_t>(num_sums),
          .num_splits = static_cast<int32_t>(std::max<int64_t>(1, splits))};
}

// The weights themselves -------------------------------------------------------------------------

struct TransposedWeights {
  Frame frame;
  Wave wave;
  const float* weight;
  void* weight_t;
  WeightHeads heads;
};

/// weight_t[n][c][r] = weight[head of n][r][c], rounded to T.
template <class T>
__global__ void __launch_bounds__(256)
    linear_backward_transpose_kernel(const __grid_constant__ TransposedWeights p) {
  begin_kernel();
  constexpr int kTile = 32, kStep = 8;
  __shared__ float tile[kTile][kTile + 1];
  const int32_t head_dim = p.frame.head_dim;
  const auto tiles = static_cast<unsigned>((head_dim + kTile - 1) / kTile);
  const int32_t col = static_cast<int32_t>(blockIdx.x % tiles) * kTile;
  const int32_t row = static_cast<int32_t>(blockIdx.x / tiles % tiles) * kTile;
  const auto n = static_cast<int32_t>(blockIdx.x / tiles / tiles);
  int32_t h = 0;
  if (p.heads == WeightHeads::kQuery) h = query_head_of(p.frame, p.wave, n).h;
  if (p.heads == WeightHeads::kKey) h = kv_head_of(p.frame, p.wave, n).h;
  const float* const from = p.weight + int64_t{h} * head_dim * head_dim;
  T* const to = static_cast<T*>(p.weight_t) + int64_t{n} * head_dim * head_dim;
  const int lane = lane_index();
  for (int r = warp_index(); r < kTile; r += kStep) {
    if (row + r < head_dim && col + lane < head_dim) {
      tile[r][lane] = from[int64_t{row + r} * head_dim + col + lane];
    }
  }
  __syncthreads();
  for (int c = warp_index(); c < kTile; c += kStep) {
    if (col + c < head_dim && row + lane < head_dim) {
      to[int64_t{col + c} * head_dim + row + lane] = from_float<T>(tile[lane][c]);
    }
  }
}

// The gradient of a soft map ---------------------------------------------------------------------

struct MapGradient {
  Frame frame;
  Wave wave;
  int64_t width;
  const bf16_t *states, *d_states;
  float* d_block_map;
};

__global__ void __launch_bounds__(ProductTraits<128>::kThreads, 2)
    linear_backward_map_kernel(const __grid_constant__ MapGradient p) {
  begin_kernel();
  using Traits = ProductTraits<128>;
  constexpr int kTile = Traits::kTile;
  using Tile = SharedTile<bf16, kTile, kDepth>;
  SPARLINE_DYNAMIC_SHARED(shared);
  const int32_t num_queries = p.frame.queries.num_blocks, num_keys = p.frame.keys.num_blocks;
  const auto tiles_m = static_cast<unsigned>((num_queries + kTile - 1) / kTile);
  const auto tiles_n = static_cast<unsigned>((num_keys + kTile - 1) / kTile);
  const int32_t j0 = static_cast<int32_t>(blockIdx.x % tiles_n) * kTile;
  const int32_t i0 = static_cast<int32_t>(blockIdx.x / tiles_n % tiles_m) * kTile;
  const auto head = static_cast<int32_t>(blockIdx.x / tiles_n / tiles_m);
  const bf16* const left =
      reinterpret_cast<const bf16*>(p.d_states) + int64_t{head} * num_queries * p.width;
  const bf16* const right = reinterpret_cast<const bf16*>(p.states) +
                            int64_t{head / p.frame.group()} * num_keys * p.width;
  Rows rows;
  rows.stride_n = p.width;
  rows.is_vectorised = true;

  const auto tile_of = [&](int stage, bool is_right) {
    return Tile{reinterpret_cast<bf16*>(shared + (stage * 2 + (is_right ? 1 : 0)) * Tile::kBytes)};
  };
  const auto load = [&](int stage, int64_t k) {
    if (k < p.width) {
      const int64_t rest = p.width - k;
      const int32_t cols = rest < kDepth ? static_cast<int32_t>(rest) : kDepth;
      load_rows_async<Traits::kThreads>(tile_of(stage, false), rows, left + k, i0, num_queries - i0,
                                        cols);
      load_rows_async<Traits::kThreads>(tile_of(stage, true), rows, right + k, j0, num_keys - j0,
                                        cols);
    }
    cp_async_commit();
  };

  RowProduct<Traits> product;
  load(0, 0);
  int stage = 0;
  for (int64_t k = 0; k < p.width; k += kDepth, stage ^= 1) {
    load(stage ^ 1, k + kDepth);
    cp_async_wait<1>();
    __syncthreads();
    product.add(tile_of(stage, false), tile_of(stage, true));
    __syncthreads();
  }
  cp_async_wait<0>();

  const HeadIndex at = query_head_of(p.frame, p.wave, head);
  float* const out =
      p.d_block_map + (int64_t{at.b} * p.frame.num_heads + at.h) * int64_t{num_queries} * num_keys;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int32_t i = i0 + product.row(m, half);
      if (i >= num_queries) continue;
      const BlockInfo block = p.frame.queries.block(i);
#pragma unroll
      for (int n = 0; n < Traits::kColTiles; ++n) {
#pragma unroll
        for (int v = 0; v < 2; ++v) {
          const int32_t j = j0 + product.col(n) + v;
          if (j >= num_keys) continue;
          const bool is_linear = !block.is_protected && j >= block.other_begin &&
                                 j < block.other_end && !p.frame.keys.block(j).is_protected;
          out[int64_t{i} * num_keys + j] = is_linear ? -product.sums[m][n][2 * half + v] : 0.0f;
        }
      }
    }
  }
}

}  // namespace

int64_t weight_gradient_floats(const LinearParams& params, const WeightGradient& args) {
  const WeightSums sums = weight_sums(params, args);
  const int64_t head_dim = params.frame.head_dim;
  return int64_t{sums.num_sums} * sums.num_splits * head_dim * (head_dim + 1);
}

void weight_gradient(const LinearParams& params, const WeightGradient& args, void* stream) {
  const WeightSums sums = weight_sums(params, args);
  if (params.dtype == DType::kBF16) {
    launch_weight_sums<bf16>(sums, stream);
  } else {
    launch_weight_sums<fp16>(sums, stream);
  }
  const int64_t head_dim = params.frame.head_dim;
  const int64_t chunks = (head_dim * (head_dim + 1) + kTotalColumns - 1) / kTotalColumns;
  const int64_t num_heads =
      args.is_one ? 1 : (args.is_of_keys ? params.frame.num_kv_heads : params.frame.num_heads);
  launch(linear_backward_weight_total_kernel,
         {.blocks = num_heads * chunks, .threads = kTotalColumns * kTotalGroups}, stream, sums);
}

void transpose_weights(const LinearParams& params, const float* weight, WeightHeads heads,
                       void* weight_t, void* stream) {
  const TransposedWeights args{params.frame, params.wave, weight, weight_t, heads};
  const int64_t tiles = (params.frame.head_dim + 31) / 32;
  int64_t num_heads = 1;
  if (heads == WeightHeads::kKey) num_heads = params.wave.count;
  if (heads == WeightHeads::kQuery) num_heads = int64_t{params.wave.count} * params.frame.group();
  const LaunchShape shape{.blocks = num_heads * tiles * tiles, .threads = 256};
  if (params.dtype == DType::kBF16) {
    launch(linear_backward_transpose_kernel<bf16>, shape, stream, args);
  } else {
    launch(linear_backward_transpose_kernel<fp16>, shape, stream, args);
  }
}

void map_gradient(const LinearParams& params, const bf16_t* states, const bf16_t* d_states,
                  float* d_block_map, void* stream) {
  const MapGradient args{params.frame, params.wave, state_width(params),
                         states,       d_states,    d_block_map};
  const int64_t tiles_m = (params.frame.queries.num_blocks + 127) / 128;
  const int64_t tiles_n = (params.frame.keys.num_blocks + 127) / 128;
  launch(linear_backward_map_kernel,
         {.blocks = int64_t{params.wave.count} * params.frame.group() * tiles_m * tiles_n,
          .threads = ProductTraits<128>::kThreads,
          .shared_bytes = kStages * 2 * SharedTile<bf16, 128, kDepth>::kBytes},
         stream, args);
}

}  // namespace sparline::cuda
