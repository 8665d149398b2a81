// SPDX-License-Identifier: Apache-2.0
//
// What the units of the linear branch share beyond cuda/kernels.h: how sums of states are formed,
// sums by sequence, and rows of 16-bit elements in registers.
#pragma once

#include <type_traits>

#include "cuda/common/tile.cuh"
#include "cuda/kernels.h"
#include "cuda/sm80/feature_map.cuh"

namespace sparline::cuda {

// Sums of states ---------------------------------------------------------------------------------

/// How H_i and Z_i of all query blocks are formed.
enum class Aggregation : uint8_t {
  kShared,  // one sum for each sequence (sum_states): the query blocks share E_i
  kGemm,    // weights (T_m x T_n) times states (T_n x state_width) on tensor cores (aggregate)
};

/// The GEMM's cost does not depend on the map: 2 T_m T_n F (D + 1) flop, 4.3 G for a head of 32760
/// rows, 128 x 64 blocks and D = F = 128; it moves (T_m + T_n) states, 25 MB, through L2 a few
/// times. The alternatives lose or are worse:
///   Total minus the critical h_j reads T_m critical_ratio T_n states of 33 kB: 210 MB at 5 %, four
///   times the time of the GEMM. It also cancels where most blocks are critical, and the linear
///   branch divides by that difference.
///   Adding marginal h_j one by one, or by look-up tables of 8 blocks: T_m T_n / 8 states, 540 MB.
/// Under scope kAll all rows of the weights are equal within a sequence, so that a single sum,
/// which reads each state once, stands for the whole product.
constexpr Aggregation choose_aggregation(LinearScope scope) {
  return scope == LinearScope::kAll ? Aggregation::kShared : Aggregation::kGemm;
}

/// Planes of the weights: two for soft maps.
constexpr int num_weight_planes(bool is_soft) { return is_soft ? 2 : 1; }
/// `width` of linear_weights.
constexpr int64_t weights_width(int64_t num_key_blocks) { return (num_key_blocks + 7) / 8 * 8; }
inline int64_t weights_elements(const LinearParams& params) {
  return int64_t{params.wave.count} * params.frame.group() * num_weight_planes(params.is_soft) *
         params.frame.queries.num_blocks * weights_width(params.frame.keys.num_blocks);
}
inline int num_slices(const LinearParams& params) {
  return is_hedgehog(params.feature_map) ? 2 : 1;
}
inline int64_t state_width(const LinearParams& params) {
  const int64_t head_dim = params.frame.head_dim;
  return state_width(num_slices(params) * head_dim, head_dim);
}

/// sums[pair][sequence] (pairs, num_sequences, state_width) = the sum of states[pair][j] over the
/// key blocks j of the sequence; with is_transposed, of states[head][i] over the heads of the group
/// and the query blocks i that are not protected. What aggregate() gives under scope kAll for every
/// block of the sequence; zeros where it has none.
void sum_states(const LinearParams& params, const bf16_t* states, bf16_t* sums, bool is_transposed,
                void* stream);

/// key_states and linear_weights (unless `weights` is null) in one launch; with `proj`, also the
/// projection's weight (D x D) rounded to T.
void prepare_states(const LinearParams& params, const void* y, bf16_t* states, bf16_t* weights,
                    int64_t width, void* proj, void* stream);

// Heads of a wave --------------------------------------------------------------------------------

struct HeadIndex {
  int32_t b, h;
};
__device__ __forceinline__ HeadIndex kv_head_of(const Frame& frame, const Wave& wave, int32_t idx) {
  const int32_t pair = wave.first + idx;
  if (frame.batch == 1) return {0, pair};  // divisions are most of a prologue
  return {pair / frame.num_kv_heads, pair % frame.num_kv_heads};
}
__device__ __forceinline__ HeadIndex query_head_of(const Frame& frame, const Wave& wave,
                                                   int32_t idx) {
  if (frame.num_heads == frame.num_kv_heads) return kv_head_of(frame, wave, idx);
  const int32_t group = frame.group();
  const HeadIndex kv = kv_head_of(frame, wave, idx / group);
  return {kv.b, kv.h * group + idx % group};
}

// 16-bit elements --------------------------------------------------------------------------------

template <class T>
__device__ __forceinline__ float2 unpack(uint32_t pair) {
  const T* const x = reinterpret_cast<const T*>(&pair);
  return make_float2(to_float(x[0]), to_float(x[1]));
}

/// Eight elements, as one vector and as floats.
template <class T>
__device__ __forceinline__ void unpack_vector(const uint4& vector, float* x) {
  const uint32_t pairs[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    const float2 pair = unpack<T>(pairs[n]);
    x[2 * n] = pair.x;
    x[2 * n + 1] = pair.y;
  }
}
template <class T>
__device__ __forceinline__ uint4 pack_vector(const float* x) {
  return make_uint4(pack<T>(x[0], x[1]), pack<T>(x[2], x[3]), pack<T>(x[4], x[5]),
                    pack<T>(x[6], x[7]));
}

/// Starts copying rows `row_stride` elements apart into the tile, and zeros into the rest of it.
/// Rows start at multiples of 16 bytes.
template <int kThreads, class T, int kRows, int kCols>
__device__ __forceinline__ void load_strided_async(const SharedTile<T, kRows, kCols>& tile,
                                                   const T* rows, int64_t row_stride,
                                                   int32_t num_rows, int32_t num_cols) {
  constexpr int kVectors = kCols / 8, kStep = kThreads / kVectors;
  static_assert(kThreads % kVectors == 0 && kRows % kStep == 0);
  const int thread = static_cast<int>(threadIdx.x % static_cast<unsigned>(kThreads));
  const int r = thread / kVectors, c = thread % kVectors;
  const int32_t rest = c * 8 < num_cols ? num_rows - r : 0;
  const T* from = rows + r * row_stride + c * 8;
#pragma unroll
  for (int n = 0; n < kRows; n += kStep, from += kStep * row_stride) {
    cp_async_16(tile.chunk(r + n, c), from, n < rest);
  }
}
/// load_rows_async, in fewer instructions for rows that need no order.
template <int kThreads, class T, int kRows, int kCols>
__device__ __forceinline__ void load_tile_async(const SharedTile<T, kRows, kCols>& tile,
                                                const Rows& rows, const T* head, int32_t first,
                                                int32_t num_rows, int32_t head_dim) {
  if (rows.is_vectorised && rows.order == nullptr) {
    load_strided_async<kThreads>(tile, head + first * rows.stride_n, rows.stride_n, num_rows,
                                 head_dim);
  } else {
    load_rows_async<kThreads>(tile, rows, head, first, num_rows, head_dim);
  }
}

/// Elements [col, col + 8) of a row; zeros from num_cols on.
template <class T>
__device__ __forceinline__ uint4 load_vector(const T* row, int32_t col, int32_t num_cols,
                                             bool is_vectorised) {
  if (col >= num_cols) return make_uint4(0, 0, 0, 0);
  if (is_vectorised) return *reinterpret_cast<const uint4*>(row + col);
  alignas(16) T x[8];
#pragma unroll
  for (int e = 0; e < 8; ++e) x[e] = col + e < num_cols ? row[col + e] : T(0.0f);
  return *reinterpret_cast<const uint4*>(x);
}
template <class T>
__device__ __forceinline__ void store_vector(T* row, int32_t col, int32_t num_cols,
                                             bool is_vectorised, const uint4& vector) {
  if (col >= num_cols) return;
  if (is_vectorised) {
    *reinterpret_cast<uint4*>(row + col) = vector;
    return;
  }
  const T* const x = reinterpret_cast<const T*>(&vector);
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    if (col + e < num_cols) row[col + e] = x[e];
  }
}

}  // namespace sparline::cuda
