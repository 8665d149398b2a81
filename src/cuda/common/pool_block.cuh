// SPDX-License-Identifier: Apache-2.0
//
// Pooling as 128 threads do it: what the rows of a block sum to, and whether they are alike
// (SpargeAttn). 16 bytes a load, kPoolBatch loads in flight in every thread. Float32 sums in a
// fixed order.
#pragma once

#include "cuda/common/pool.cuh"
#include "cuda/common/tile.cuh"

namespace sparline::cuda {

constexpr int kPoolThreads = 128;
constexpr int kPoolWarps = kPoolThreads / kWarpSize;
constexpr int kVector = 8;  // 16-bit elements of a load
constexpr int kPoolBatch = 8;

// Rows -------------------------------------------------------------------------------------------

template <class T>
__device__ __forceinline__ void unpack(const uint4& vector, float (&x)[kVector]);
template <>
__device__ __forceinline__ void unpack<bf16>(const uint4& vector, float (&x)[kVector]) {
  const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    x[2 * n] = __uint_as_float(words[n] << 16);
    x[2 * n + 1] = __uint_as_float(words[n] & 0xffff0000u);
  }
}
template <>
__device__ __forceinline__ void unpack<fp16>(const uint4& vector, float (&x)[kVector]) {
  const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    x[2 * n] = to_float(__ushort_as_half(static_cast<unsigned short>(words[n] & 0xffffu)));
    x[2 * n + 1] = to_float(__ushort_as_half(static_cast<unsigned short>(words[n] >> 16)));
  }
}

/// Over the kLanes neighbouring lanes that hold one row.
template <int kLanes>
__device__ __forceinline__ float row_sum(float x) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}
template <int kLanes>
__device__ __forceinline__ float row_max(float x) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) {
    x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, step));
  }
  return x;
}

/// x / |x|, for a row spread over kLanes lanes; a row of zeros stays. All lanes call it.
template <int kLanes>
__device__ __forceinline__ void normalise(float (&x)[kVector]) {
  float square = 0.0f;
#pragma unroll
  for (int n = 0; n < kVector; ++n) square = fmaf(x[n], x[n], square);
  square = row_sum<kLanes>(square);
  const bool is_plain = square > 1e-30f && square < 1e30f;
  float factor = is_plain ? 1.0f / sqrtf(square) : 1.0f;
  if (__any_sync(kAllLanes, !is_plain)) {  // float32 cannot hold the square of such a row
    float peak = 0.0f;
#pragma unroll
    for (int n = 0; n < kVector; ++n) peak = fmaxf(peak, fabsf(x[n]));
    peak = row_max<kLanes>(peak);
    const bool is_scaled = !is_plain && peak > 0.0f;
    float scaled_square = 0.0f;
#pragma unroll
    for (int n = 0; n < kVector; ++n) {
      if (is_scaled) x[n] = x[n] / peak;
      scaled_square = fmaf(x[n], x[n], scaled_square);
    }
    scaled_square = row_sum<kLanes>(scaled_square);
    if (is_scaled) factor = 1.0f / sqrtf(scaled_square);
  }
#pragma unroll
  for (int n = 0; n < kVector; ++n) x[n] *= factor;
}

// Blocks -----------------------------------------------------------------------------------------

template <int kHeadDim>
struct PoolScratch {
  float partial[kPoolWarps][kHeadDim];
  float warp_squares[kPoolWarps];
};

/// Block idx of (B, heads, T): the threads of a thread block by groups of 128, one block each. All
/// of them call it, at a time when `scratch` of their group is free. kIsSimilarity: unit rows
/// instead of rows, and what comes out is is_alike: with unit rows the mean cosine of all pairs is
/// |sum of rows|^2 / n^2.
template <class T, int kHeadDim, bool kIsSimilarity>
__device__ __forceinline__ void pool_block(const PoolJob& job, int32_t idx, int32_t head_dim,
                                           int64_t ld, float least,
                                           PoolScratch<kHeadDim>& scratch) {
  constexpr int kLanes = kHeadDim / kVector;    // that hold a row
  constexpr int kStep = kPoolThreads / kLanes;  // rows that the group loads at a time
  auto& partial = scratch.partial;
  auto& warp_squares = scratch.warp_squares;
  const int32_t pair = idx / job.axis.num_blocks;
  const int32_t b = pair / job.num_heads, h = pair % job.num_heads;
  const BlockInfo block = job.axis.block(idx % job.axis.num_blocks);

  const int thread = static_cast<int>(threadIdx.x % static_cast<unsigned>(kPoolThreads));
  const int warp = warp_index() % kPoolWarps;
  const int col = thread % kLanes * kVector, r_first = thread / kLanes;
  const bool has_column = col < head_dim;
  const T* const head = job.rows.template head<const T>(b, h);

  float mean[kVector] = {};
  if constexpr (kIsSimilarity) {
    if (job.means != nullptr) {
      const float* const means =
          job.means + (int64_t{pair} * job.axis.num_sequences + block.sequence) * head_dim;
#pragma unroll
      for (int n = 0; n < kVector; ++n) mean[n] = col + n < head_dim ? means[col + n] : 0.0f;
    }
  }
  float sum[kVector] = {};
  const auto add = [&](float (&x)[kVector], bool is_valid) {
    if constexpr (kIsSimilarity) {
#pragma unroll
      for (int n = 0; n < kVector; ++n) x[n] = is_valid ? x[n] - mean[n] : 0.0f;
      normalise<kLanes>(x);
    }
#pragma unroll
    for (int n = 0; n < kVector; ++n) sum[n] += x[n];
  };

  if (job.rows.is_vectorised) {
    for (int32_t begin = r_first; begin - r_first < block.rows; begin += kPoolBatch * kStep) {
      int64_t offsets[kPoolBatch];  // all first, so that the loads of an order overlap too
#pragma unroll
      for (int n = 0; n < kPoolBatch; ++n) {
        const int32_t r = begin + n * kStep;
        offsets[n] = r < block.rows ? job.rows.offset(block.begin + r) : 0;
      }
      uint4 vectors[kPoolBatch];
#pragma unroll
      for (int n = 0; n < kPoolBatch; ++n) {
        vectors[n] = make_uint4(0u, 0u, 0u, 0u);
        if (has_column && begin + n * kStep < block.rows) {
          vectors[n] = __ldg(reinterpret_cast<const uint4*>(head + offsets[n] + col));
        }
      }
#pragma unroll
      for (int n = 0; n < kPoolBatch; ++n) {
        if (kIsSimilarity && begin - r_first + n * kStep >= block.rows) break;
        float x[kVector];
        unpack<T>(vectors[n], x);
        add(x, begin + n * kStep < block.rows);
      }
    }
  } else {
    for (int32_t r = r_first; r - r_first < block.rows; r += kStep) {
      const bool is_valid = r < block.rows;
      const T* const row = head + (is_valid ? job.rows.offset(block.begin + r) : 0);
      float x[kVector];
#pragma unroll
      for (int n = 0; n < kVector; ++n) {
        x[n] = is_valid && col + n < head_dim ? to_float(row[col + n]) : 0.0f;
      }
      add(x, is_valid);
    }
  }

#pragma unroll
  for (int step = kLanes; step < kWarpSize; step *= 2) {
#pragma unroll
    for (int n = 0; n < kVector; ++n) sum[n] += __shfl_xor_sync(kAllLanes, sum[n], step);
  }
  if (lane_index() < kLanes) {
#pragma unroll
    for (int n = 0; n < kVector; ++n) partial[warp][col + n] = sum[n];
  }
  __syncthreads();

  const float inverse_rows = 1.0f / static_cast<float>(block.rows);
  const auto total = [&](int d) {
    return (partial[0][d] + partial[1][d]) + (partial[2][d] + partial[3][d]);
  };
  if constexpr (!kIsSimilarity) {
    const float factor = job.is_mean ? inverse_rows : 1.0f;
    for (int d = thread; d < ld; d += kPoolThreads) {
      job.pooled[int64_t{idx} * ld + d] = total(d) * factor;
    }
  } else {
    float square = 0.0f;
    for (int d = thread; d < kHeadDim; d += kPoolThreads) {
      const float x = total(d) * inverse_rows;
      square = fmaf(x, x, square);
    }
    square = warp_sum(square);
    if (lane_index() == 0) warp_squares[warp] = square;
    __syncthreads();
    if (thread == 0) {
      const float similarity =
          (warp_squares[0] + warp_squares[1]) + (warp_squares[2] + warp_squares[3]);
      job.is_alike[idx] = similarity < least ? 0 : 1;  // NaN: alike
    }
  }
}
static_assert(kPoolWarps == 4, "the sums above name four warps");

// Sequences --------------------------------------------------------------------------------------

/// The first block whose sequence is not below `sequence`.
__device__ __forceinline__ int32_t first_block_of(const Axis& axis, int32_t sequence) {
  if (axis.table == nullptr) return sequence <= 0 ? 0 : axis.num_blocks;
  int32_t begin = 0, end = axis.num_blocks;
  while (begin < end) {
    const int32_t middle = begin + (end - begin) / 2;
    if (axis.table[middle].sequence < sequence) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

}  // namespace sparline::cuda
