// SPDX-License-Identifier: Apache-2.0
//
// The linear branch of one query block, backward (docs/math.md). With phi = phi(q), den = phi . Z_i
// and s = (1 - a) / den (a blend; else s = 1 / den; 0 under the empty rule):
//     o_l = phi H_i / den                 dO_l = dO W (a projection; else dO)
//     e = rowsum(dO_l o_l)                d_q = s (dO_l H_i^T - e Z_i) through the map
//     dH_i = (s phi)^T dO_l               dZ_i = -(s phi)^T e
// A blend's factor 1 - a is in s alone, so that dO_l need not be scaled: d_l = (1 - a) e.
//
// One CTA, one query block, four products (three without a projection). Tiles: x (q; later o_l, d_q
// and s phi), g (dO; later dO_l), and W^T, then H_i, then dH_i in the chunk. All but the last
// product and the barriers around it is between a warp and its 16 rows. Streamed: 64 rows at a
// time, dH_i of the first 64 is added to.
#pragma once

#include "cuda/sm80/linear_bwd.cuh"

namespace sparline::cuda {

template <class Traits>
class LinearQueryBlock {
  using T = typename Traits::T;
  using Tile = LinearTile<Traits>;
  static constexpr int kHeadDim = Traits::kHeadDim, kRows = Traits::kRows;
  static constexpr int kSlices = Traits::kSlices, kThreads = Traits::kThreads;
  static constexpr int kWarps = Traits::kWarps, kSteps = Traits::kSteps;
  static constexpr bool kIsWhole = Traits::kIsWhole;

 public:
  static constexpr int kSharedBytes = Traits::kTileBytes + kRows * static_cast<int>(sizeof(float));

  __device__ LinearQueryBlock(const LinearQueryBackward& args, unsigned char* shared, int32_t head,
                              int32_t i)
      : args_(args),
        p_(args.params),
        frame_(p_.forward.frame),
        head_(head),
        at_(query_head_of(frame_, p_.forward.wave, head)),
        i_(i),
        block_(frame_.queries.block(i)),
        tile_(shared, p_.forward.feature_map, frame_.head_dim),
        e_(reinterpret_cast<float*>(shared + Traits::kTileBytes)) {
    const int64_t block = int64_t{head} * frame_.queries.num_blocks + i;
    const int64_t sequence =
        int64_t{head / frame_.group()} * frame_.queries.num_sequences + block_.sequence;
    state_ =
        reinterpret_cast<const bf16*>(args.sums) + (args.is_shared ? sequence : block) * args.width;
    d_state_ = reinterpret_cast<bf16*>(args.d_states) + block * args.width;
  }

  __device__ void run() {
    if (block_.is_protected) {
      clear();
      return;
    }
    if constexpr (kIsWhole) {
      run_rows(0);
    } else {
      for (int32_t begin = 0; begin < block_.rows; begin += kRows) {
        if (begin > 0) __syncthreads();
        run_rows(begin);
      }
    }
    const int64_t num_used = int64_t{kSlices} * frame_.head_dim * (frame_.head_dim + 1);
    const int64_t at = num_used + static_cast<int64_t>(threadIdx.x);
    if (at < args_.width) d_state_[at] = bf16(0.0f);
  }

 private:
  __device__ bool has_projection() const { return p_.forward.combine == Combine::kProjection; }
  __device__ bool is_blend() const { return p_.forward.combine == Combine::kBlend; }
  /// Where the statistics of the head's rows begin.
  __device__ int64_t statistics() const {
    return (int64_t{at_.b} * frame_.num_heads + at_.h) * frame_.queries.length;
  }
  __device__ T* x_head() const {
    return kSlices == 2 ? args_.x.template head<T>(0, head_)
                        : args_.x.template head<T>(at_.b, at_.h);
  }

  /// Protected rows have no linear branch.
  __device__ void clear() const {
    const int32_t head_dim = frame_.head_dim, thread = static_cast<int32_t>(threadIdx.x);
    T* const d_q = p_.d_q.template head<T>(at_.b, at_.h);
    for (int32_t idx = thread; idx < block_.rows * head_dim; idx += kThreads) {
      d_q[p_.d_q.offset(block_.begin + idx / head_dim) + idx % head_dim] = T(0.0f);
    }
    for (int64_t idx = thread; idx < args_.width; idx += kThreads) d_state_[idx] = bf16(0.0f);
    if (!is_blend()) return;
    for (int32_t r = thread; r < block_.rows; r += kThreads) {
      *p_.d_alpha_logit.at(at_.b, at_.h, block_.begin + r) = 0.0f;
    }
  }

  /// Whether E_i has members: epsilon would hide from den that it has none.
  __device__ bool find_members() const {
    if (p_.forward.epsilon == 0.0f) return true;
    if (args_.is_shared) return block_.other_end > block_.other_begin;
    const int64_t rows = int64_t{num_weight_planes(p_.forward.is_soft)} * frame_.queries.num_blocks;
    const bf16_t* const row = args_.weights + (head_ * rows + i_) * args_.weights_width;
    bool is_member = false;
    for (int32_t j = block_.other_begin + lane_index(); j < block_.other_end; j += kWarpSize) {
      is_member = is_member || (row[j] & 0x7fff) != 0;
    }
    return __any_sync(kAllLanes, is_member);
  }

  /// Rows [begin, begin + kRows) of the block.
  __device__ void run_rows(int32_t begin) {
    begin_ = begin;
    first_ = block_.begin + begin;
    num_rows_ = block_.rows - begin < kRows ? block_.rows - begin : kRows;

    load_rows_async<kThreads>(tile_.g, p_.d_o, p_.d_o.template head<const T>(at_.b, at_.h), first_,
                              num_rows_, frame_.head_dim);
    if (kIsWhole && has_projection()) tile_.load_weight(proj_t(), 0);
    cp_async_commit();
    load_rows_async<kThreads>(tile_.x, args_.x, static_cast<const T*>(x_head()), first_, num_rows_,
                              frame_.head_dim);
    cp_async_commit();
    if (kIsWhole && !has_projection()) tile_.load_state(state_);
    cp_async_commit();

    cp_async_wait<2>();
    __syncthreads();  // g is here, and W^T
    if (has_projection()) {
      through_projection();
      if constexpr (kIsWhole) {
        __syncthreads();  // all warps are done with W^T
        tile_.load_state(state_);
        cp_async_commit();
      }
    } else {
      tile_.convert_g();
    }
    cp_async_wait<kIsWhole ? 1 : 0>();
    __syncthreads();  // x is here
    tile_.find_features(nullptr);
    float den[kSlices][2];
    tile_.multiply_z(state_, den);
    float inverse_den[2];
    invert(den, inverse_den);
    if constexpr (kIsWhole) {
      cp_async_wait<0>();
      __syncthreads();  // H_i is here
    }

    float dots[kSlices][2];
    tile_.multiply_state(state_, dots, [&](int col, const GroupSums& sums) {
      if (!has_projection()) return;
      tile_.stage(tile_.x, col, sums, [&](float value, int half) {
        return inverse_den[half] == 0.0f ? 0.0f : value * inverse_den[half];
      });
    });
    if (has_projection()) store_o_l();

    float s[2], e[2], mean[kSlices][2];
    finish_rows(dots, den, inverse_den, s, e, mean);
    tile_.pull_back(state_, s, e, mean);
    if constexpr (kSlices == 2) {
      tile_.store_x(args_.x, x_head(), first_, num_rows_);
      tile_.multiply_feature_weight(feature_t());
    }
    tile_.store_x(p_.d_q, p_.d_q.template head<T>(at_.b, at_.h), first_, num_rows_);
    add_state();
  }

  __device__ const T* proj_t() const { return static_cast<const T*>(args_.proj_t); }
  __device__ const T* feature_t() const {
    return static_cast<const T*>(args_.feature_t) +
           int64_t{head_} * frame_.head_dim * frame_.head_dim;
  }

  /// dO_l = dO W in place of dO; dO b waits where e will be.
  __device__ void through_projection() const {
    typename Tile::Fragments a;
    tile_.load_fragments(a, tile_.g);
    __syncwarp();
    const float* const bias = p_.forward.proj_bias;
    float dots_bias[2] = {0.0f, 0.0f};
    if (bias != nullptr) {
#pragma unroll
      for (int col = 0; col < kHeadDim; col += 8) {
        const int c = tile_.col_of(col);
        if (c >= frame_.head_dim) continue;
        const float2 b = make_float2(bias[c], bias[c + 1]);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float2 value = unpack<T>(a[col / 16][col / 8 % 2 * 2 + half]);
          dots_bias[half] = fmaf(value.x, b.x, fmaf(value.y, b.y, dots_bias[half]));
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float dot = quad_sum(dots_bias[half]);
      if (tile_.lane % 4 == 0) e_[tile_.row_of(half)] = dot;
    }
    tile_.multiply_weight(a, proj_t(), [&](int col, const GroupSums& sums) {
      tile_.stage(tile_.g_bf16, col, sums, [](float value, int) { return value; });
    });
    __syncwarp();
  }

  /// 1 / den, or 0 under the empty rule.
  __device__ void invert(const float (&den)[kSlices][2], float (&inverse_den)[2]) const {
    constexpr float kLargest = 3.402823466e38f;
    const bool has_members = find_members();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = den[0][half] + p_.forward.epsilon;
      if constexpr (kSlices == 2) sum += den[1][half];
      const float inverse = 1.0f / sum;
      const bool is_usable = has_members && tile_.row_of(half) < num_rows_ && sum > 0.0f &&
                             sum <= kLargest && inverse <= kLargest;
      inverse_den[half] = is_usable ? inverse : 0.0f;
    }
  }

  __device__ void store_o_l() const {
    const int64_t rows = frame_.queries.length;
    T* const head = static_cast<T*>(args_.o_l) + head_ * rows * frame_.head_dim;
    tile_.store_x(matrix_rows(head, frame_.head_dim), head, first_, num_rows_);
  }

  /// s, e and the means of d_phi; what the sparse branch and the shares of a blend need.
  __device__ void finish_rows(const float (&dots)[kSlices][2], const float (&den)[kSlices][2],
                              const float (&inverse_den)[2], float (&s)[2], float (&e)[2],
                              float (&mean)[kSlices][2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int32_t row = tile_.row_of(half), position = first_ + row;
      const bool is_row = row < num_rows_, is_usable = inverse_den[half] != 0.0f;
      float dot = dots[0][half];
      if constexpr (kSlices == 2) dot += dots[1][half];
      e[half] = is_usable ? dot * inverse_den[half] : 0.0f;
      float linear_share = 1.0f, sparse_share = 1.0f;
      if (is_blend() && is_row) {
        const float logit = *p_.forward.alpha_logit.at(at_.b, at_.h, position);
        linear_share = is_usable ? __fdividef(1.0f, 1.0f + expf(logit)) : 0.0f;
        sparse_share = is_usable ? __fdividef(1.0f, 1.0f + expf(-logit)) : 1.0f;
      }
      s[half] = linear_share * inverse_den[half];
#pragma unroll
      for (int slice = 0; slice < kSlices; ++slice) {
        mean[slice][half] = tile_.has_mean() && s[half] != 0.0f
                                ? s[half] * (dots[slice][half] - e[half] * den[slice][half])
                                : 0.0f;
      }
      if (tile_.lane % 4 != 0) continue;
      const float dot_bias = has_projection() ? e_[row] : 0.0f;
      e_[row] = e[half];
      if (!is_row) continue;
      // In: rowsum(dO o), o = sparse_share o_s + linear_share o_l (+ bias). See RowStats.
      float* const delta = p_.stats.delta + statistics() + position;
      const float sparse_dot = *delta - dot_bias - linear_share * e[half];
      if (!is_blend()) {
        *delta = sparse_dot;
        continue;
      }
      *p_.d_alpha_logit.at(at_.b, at_.h, position) =
          linear_share == 0.0f ? 0.0f : linear_share * (*delta - e[half]);
      constexpr float kSmallestShare = 1e-20f;  // up to which it counts as 0: delta stays finite
      const bool has_share = sparse_share > kSmallestShare;
      *delta = has_share ? sparse_dot / sparse_share : 0.0f;
      float* const lse_log2 = p_.stats.lse_log2 + statistics() + position;
      *lse_log2 = has_share ? *lse_log2 - log2f(sparse_share) : __builtin_huge_valf();
    }
  }

  /// dH_i = (s phi)^T dO_l and dZ_i = -(s phi)^T e, slice by slice. e travels as two more columns
  /// of dO_l, its upper and its lower bits.
  __device__ void add_state() const {
    const int32_t head_dim = frame_.head_dim;
    const typename Traits::BF16RowTile a_tile{reinterpret_cast<bf16*>(tile_.x.data)};
    constexpr int kFeatureTiles = kHeadDim / 16;
    // Warps beyond the 16-row tiles of dH share their columns.
    constexpr int kParts = kWarps > kFeatureTiles ? kWarps / kFeatureTiles : 1;
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
      if (slice > 0) __syncthreads();  // all warps are done with the slice before
#pragma unroll
      for (int col = 0; col < kHeadDim; col += 8) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          tile_.pair(a_tile, col, half) = tile_.phi[slice][col / 16][col / 8 % 2 * 2 + half];
        }
      }
      __syncthreads();  // A, dO_l and e of all rows are here; all warps are done with H_i
      for (int task = warp_index(); task < kFeatureTiles * kParts; task += kWarps) {
        const int f = task % kFeatureTiles * 16, part = task / kFeatureTiles;
        if (f >= head_dim) continue;
        uint32_t a[kRows / 16][4];
#pragma unroll
        for (int k = 0; k < kRows / 16; ++k) load_a_trans(a[k], a_tile, k * 16, f, tile_.lane);
#pragma unroll
        for (int n = 0; n < kHeadDim / kParts; n += kGroup) {
          const int col = part * (kHeadDim / kParts) + n;
          GroupSums sums;
          multiply<bf16>(sums, a, tile_.g_bf16, col, tile_.lane);
          if constexpr (kIsWhole) {
            stage_state(f, col, sums);
          } else {
            store_state(slice, f, col, sums);
          }
        }
        if (part == 0) store_z(slice, f, a);
      }
    }
    if constexpr (kIsWhole) {
      __syncthreads();
      store_chunk();
    }
  }

  /// Rows f.. of dH_i into the chunk, which was H_i's.
  __device__ void stage_state(int f, int col, const GroupSums& sums) const {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        pair_at(tile_.chunk, f, col + n * 8, half, tile_.lane) =
            pack<bf16>(sums.c[n][2 * half], sums.c[n][2 * half + 1]);
      }
    }
  }
  __device__ void store_chunk() const {
    const int32_t head_dim = frame_.head_dim;
    constexpr int kChunks = kHeadDim / 8;
#pragma unroll 4
    for (int idx = static_cast<int>(threadIdx.x); idx < kHeadDim * kChunks; idx += kThreads) {
      const int f = idx / kChunks, c = idx % kChunks;
      if (f >= head_dim) break;
      store_vector(d_state_ + f * head_dim, c * 8, head_dim, head_dim % 8 == 0,
                   *reinterpret_cast<const uint4*>(tile_.chunk.chunk(f, c)));
    }
  }
  /// Rows f.. of dH_i to memory; those of the block's first rows are added to.
  __device__ void store_state(int slice, int f, int col, const GroupSums& sums) const {
    const int32_t head_dim = frame_.head_dim;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = f + half * 8 + tile_.lane / 4, c = tile_.col_of(col + n * 8);
        if (row >= head_dim || c >= head_dim) continue;
        uint32_t* const to = reinterpret_cast<uint32_t*>(
            d_state_ + (int64_t{slice} * head_dim + row) * head_dim + c);
        const float2 before = begin_ > 0 ? unpack_bf16(*to) : make_float2(0.0f, 0.0f);
        *to = pack<bf16>(before.x + sums.c[n][2 * half], before.y + sums.c[n][2 * half + 1]);
      }
    }
  }

  __device__ void store_z(int slice, int f, const uint32_t (&a)[kRows / 16][4]) const {
    const int32_t head_dim = frame_.head_dim;
    const int col = tile_.lane / 4, k = tile_.lane % 4 * 2;
    const auto b_pair = [&](int row) {
      const float first = e_[row], second = e_[row + 1];
      const float2 upper = unpack_bf16(pack<bf16>(first, second));
      if (col > 1) return 0u;
      return col == 0 ? pack<bf16>(upper.x, upper.y)
                      : pack<bf16>(first - upper.x, second - upper.y);
    };
    float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int step = 0; step < kRows / 16; ++step) {
      mma<bf16>(sums, a[step], b_pair(step * 16 + k), b_pair(step * 16 + k + 8));
    }
    if (tile_.lane % 4 != 0) return;
    bf16* const d_z = d_state_ + int64_t{kSlices} * head_dim * head_dim + int64_t{slice} * head_dim;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = f + half * 8 + col;
      if (row >= head_dim) continue;
      const float before = begin_ > 0 ? to_float(d_z[row]) : 0.0f;
      d_z[row] = from_float<bf16>(before - (sums[2 * half] + sums[2 * half + 1]));
    }
  }

  const LinearQueryBackward& args_;
  const LinearBackward& p_;
  const Frame& frame_;
  const int32_t head_;  // of the wave
  const HeadIndex at_;
  const int32_t i_;
  const BlockInfo block_;
  Tile tile_;
  float* const e_;  // by row of the tile
  const bf16* state_;
  bf16* d_state_;
  int32_t begin_ = 0, first_ = 0, num_rows_ = 0;
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads,
                                  Traits::min_blocks(LinearQueryBlock<Traits>::kSharedBytes))
    linear_backward_query_kernel(const __grid_constant__ LinearQueryBackward args) {
  begin_kernel();
  SPARLINE_DYNAMIC_SHARED(shared);
  const auto num_blocks = static_cast<unsigned>(args.params.forward.frame.queries.num_blocks);
  LinearQueryBlock<Traits>(args, shared, static_cast<int32_t>(blockIdx.x / num_blocks),
                           static_cast<int32_t>(blockIdx.x % num_blocks))
      .run();
}

template <class Traits>
void launch_query_kernel(const LinearQueryBackward& args, void* stream) {
  const LinearParams& p = args.params.forward;
  launch(linear_backward_query_kernel<Traits>,
         {.blocks = int64_t{p.wave.count} * p.frame.group() * p.frame.queries.num_blocks,
          .threads = Traits::kThreads,
          .shared_bytes = LinearQueryBlock<Traits>::kSharedBytes},
         stream, args);
}

}  // namespace sparline::cuda
