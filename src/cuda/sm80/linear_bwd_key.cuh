// SPDX-License-Identifier: Apache-2.0
//
// The linear branch of one key block, backward (docs/math.md), phi = phi(k):
//     d_v = phi dH^j                      d_k = (v dH^j^T + dZ^j) through the map
// With (H, Z) = (dH^j, dZ^j), g = v, s = 1 and e = -1 this is what the queries do, and the mean of
// d_phi is v . d_v + phi . dZ^j.
//
// One CTA, one key block, two products, both between a warp and its 16 rows. Tiles: x (k; later d_v
// and d_k), g (v) and dH^j in the chunk. Streamed: 64 rows at a time.
#pragma once

#include "cuda/sm80/linear_bwd.cuh"

namespace sparline::cuda {

template <class Traits>
class LinearKeyBlock {
  using T = typename Traits::T;
  static constexpr int kHeadDim = Traits::kHeadDim, kRows = Traits::kRows;
  static constexpr int kSlices = Traits::kSlices, kThreads = Traits::kThreads;
  static constexpr bool kIsWhole = Traits::kIsWhole;
  static constexpr int kColumnsOfThread = (kHeadDim + kThreads - 1) / kThreads;

 public:
  static constexpr int kSharedBytes =
      Traits::kTileBytes + kHeadDim * static_cast<int>(sizeof(float));

  __device__ LinearKeyBlock(const LinearKeyBackward& args, unsigned char* shared, int32_t head,
                            int32_t j)
      : args_(args),
        p_(args.params),
        frame_(p_.forward.frame),
        head_(head),
        at_(kv_head_of(frame_, p_.forward.wave, head)),
        j_(j),
        block_(frame_.keys.block(j)),
        tile_(shared, p_.forward.feature_map, frame_.head_dim),
        mean_(reinterpret_cast<float*>(shared + Traits::kTileBytes)) {
    const int64_t sum = args.is_shared ? int64_t{head} * frame_.keys.num_sequences + block_.sequence
                                       : int64_t{head} * frame_.keys.num_blocks + j;
    state_ = reinterpret_cast<const bf16*>(args.d_sums) + sum * args.width;
  }

  __device__ void run() {
    float sums[kColumnsOfThread] = {};
    load_mean();
    if constexpr (kIsWhole) {
      run_rows(0, sums);
    } else {
      for (int32_t begin = 0; begin < block_.rows; begin += kRows) {
        if (begin > 0) __syncthreads();
        run_rows(begin, sums);
      }
    }
    if (p_.d_k_sums != nullptr) store_sums(sums);
  }

 private:
  /// y has the mean key off already.
  __device__ bool has_mean_key() const { return kSlices == 1 && p_.forward.k_mean != nullptr; }
  __device__ T* x_head() const {
    return kSlices == 2 ? args_.x.template head<T>(0, head_)
                        : args_.x.template head<T>(at_.b, at_.h);
  }
  __device__ int64_t pair() const { return int64_t{at_.b} * frame_.num_kv_heads + at_.h; }

  /// The mean key of the block's sequence; a barrier follows.
  __device__ void load_mean() const {
    if (!has_mean_key()) return;
    const float* const row =
        p_.forward.k_mean +
        (pair() * frame_.keys.num_sequences + block_.sequence) * frame_.head_dim;
    for (int32_t c = static_cast<int32_t>(threadIdx.x); c < kHeadDim; c += kThreads) {
      mean_[c] = c < frame_.head_dim ? row[c] : 0.0f;
    }
  }

  /// Rows [begin, begin + kRows) of the block; adds their columns of d_k to `sums`.
  __device__ void run_rows(int32_t begin, float (&sums)[kColumnsOfThread]) {
    const int32_t first = block_.begin + begin;
    const int32_t num_rows = block_.rows - begin < kRows ? block_.rows - begin : kRows;
    load_rows_async<kThreads>(tile_.x, args_.x, static_cast<const T*>(x_head()), first, num_rows,
                              frame_.head_dim);
    cp_async_commit();
    load_rows_async<kThreads>(tile_.g, p_.forward.v,
                              p_.forward.v.template head<const T>(at_.b, at_.h), first, num_rows,
                              frame_.head_dim);
    if constexpr (kIsWhole) tile_.load_state(state_);
    cp_async_commit();

    cp_async_wait<1>();
    __syncthreads();  // k is here
    tile_.find_features(has_mean_key() ? mean_ : nullptr);
    float den[kSlices][2];
    tile_.multiply_z(state_, den);
    cp_async_wait<0>();
    __syncthreads();  // v is here, and dH^j
    tile_.convert_g();

    float mean[kSlices][2];
    tile_.multiply_state(state_, mean, [&](int col, const GroupSums& products) {
      tile_.stage(tile_.x, col, products, [](float value, int) { return value; });
    });
    tile_.store_x(p_.d_v, p_.d_v.template head<T>(at_.b, at_.h), first, num_rows);

#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        mean[slice][half] = tile_.has_mean() ? mean[slice][half] + den[slice][half] : 0.0f;
      }
    }
    constexpr float kOnes[2] = {1.0f, 1.0f}, kMinusOnes[2] = {-1.0f, -1.0f};
    tile_.pull_back(state_, kOnes, kMinusOnes, mean);
    if constexpr (kSlices == 2) {
      tile_.store_x(args_.x, x_head(), first, num_rows);
      tile_.multiply_feature_weight(static_cast<const T*>(args_.feature_t) +
                                    int64_t{head_} * frame_.head_dim * frame_.head_dim);
    }
    tile_.store_x(p_.d_k, p_.d_k.template head<T>(at_.b, at_.h), first, num_rows);
    if (p_.d_k_sums != nullptr) add_columns(num_rows, sums);
  }

  /// Of d_k as stored.
  __device__ void add_columns(int32_t num_rows, float (&sums)[kColumnsOfThread]) const {
    __syncthreads();
#pragma unroll
    for (int n = 0; n < kColumnsOfThread; ++n) {
      const int c = static_cast<int>(threadIdx.x) + n * kThreads;
      if (c >= kHeadDim) break;
      for (int32_t r = 0; r < num_rows; ++r) sums[n] += to_float(*tile_.x.at(r, c));
    }
  }
  __device__ void store_sums(const float (&sums)[kColumnsOfThread]) const {
    float* const row =
        p_.d_k_sums + (pair() * frame_.keys.num_blocks + j_) * int64_t{frame_.head_dim};
#pragma unroll
    for (int n = 0; n < kColumnsOfThread; ++n) {
      const int c = static_cast<int>(threadIdx.x) + n * kThreads;
      if (c < frame_.head_dim) row[c] = sums[n];
    }
  }

  const LinearKeyBackward& args_;
  const LinearBackward& p_;
  const Frame& frame_;
  const int32_t head_;  // of the wave
  const HeadIndex at_;
  const int32_t j_;
  const BlockInfo block_;
  LinearTile<Traits> tile_;
  float* const mean_;  // the mean key
  const bf16* state_;
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads,
                                  Traits::min_blocks(LinearKeyBlock<Traits>::kSharedBytes))
    linear_backward_key_kernel(const __grid_constant__ LinearKeyBackward args) {
  begin_kernel();
  SPARLINE_DYNAMIC_SHARED(shared);
  const auto num_blocks = static_cast<unsigned>(args.params.forward.frame.keys.num_blocks);
  LinearKeyBlock<Traits>(args, shared, static_cast<int32_t>(blockIdx.x / num_blocks),
                         static_cast<int32_t>(blockIdx.x % num_blocks))
      .run();
}

template <class Traits>
void launch_key_kernel(const LinearKeyBackward& args, void* stream) {
  const LinearParams& p = args.params.forward;
  launch(linear_backward_key_kernel<Traits>,
         {.blocks = int64_t{p.wave.count} * p.frame.keys.num_blocks,
          .threads = Traits::kThreads,
          .shared_bytes = LinearKeyBlock<Traits>::kSharedBytes},
         stream, args);
}

}  // namespace sparline::cuda
