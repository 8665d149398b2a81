// SPDX-License-Identifier: Apache-2.0
//
// Pooling: what the rows of a block sum to, the mean row of a sequence, and whether the rows of a
// block are alike (SpargeAttn). One pass at memory bandwidth: one thread block for each block of
// rows, 16 bytes a load, kBatch loads in flight in every thread. Float32 sums in a fixed order.
#include "cuda/common/pool.cuh"

#include "cuda/common/tile.cuh"
#include "cuda/kernels.h"

namespace sparline::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kVector = 8;  // 16-bit elements of a load
constexpr int kBatch = 8;

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

// Sequences --------------------------------------------------------------------------------------

constexpr int kMeanCols = 8;  // of a slice: 32 bytes of a row

struct MeanParams {
  Axis axis;
  int32_t head_dim = 0;
  float* sums = nullptr;  // (pairs, T, ld)
  int64_t ld = 0;
  float* means = nullptr;  // out (pairs, sequences, D)
  bool is_centred = false;
};

/// The mean of a slice of columns of one sequence, and the means of its blocks less that one.
/// idx = (pair sequences + sequence) slices + slice. Eight threads for each block in turn.
__device__ __forceinline__ void find_mean(const MeanParams& params, int32_t idx) {
  __shared__ float partial[kWarps][kMeanCols];
  constexpr int kStep = kThreads / kMeanCols;
  const int32_t num_slices = (params.head_dim + kMeanCols - 1) / kMeanCols;
  const int32_t task = idx / num_slices;
  const int32_t sequence = task % params.axis.num_sequences;
  const int32_t pair = task / params.axis.num_sequences;
  const int col = lane_index() % kMeanCols;
  const int32_t d = idx % num_slices * kMeanCols + col;
  const bool has_column = d < params.head_dim;
  const int32_t begin = params.axis.first_block_of(sequence);
  const int32_t end = params.axis.first_block_of(sequence + 1);
  const int32_t first = begin + static_cast<int32_t>(threadIdx.x) / kMeanCols;
  float* const sums = params.sums + int64_t{pair} * params.axis.num_blocks * params.ld + d;

  float sum = 0.0f;
  if (has_column) {
#pragma unroll 8
    for (int32_t j = first; j < end; j += kStep) sum += sums[j * params.ld];
  }
#pragma unroll
  for (int step = kMeanCols; step < kWarpSize; step *= 2) {
    sum += __shfl_xor_sync(kAllLanes, sum, step);
  }
  if (lane_index() < kMeanCols) partial[warp_index()][col] = sum;
  __syncthreads();
  sum = (partial[0][col] + partial[1][col]) + (partial[2][col] + partial[3][col]);
  if (!has_column) return;
  const float mean =
      begin < end ? sum / static_cast<float>(params.axis.block(begin).sequence_rows) : 0.0f;
  if (params.means != nullptr && threadIdx.x < kMeanCols) {
    params.means[int64_t{task} * params.head_dim + d] = mean;
  }
  if (!params.is_centred) return;
  for (int32_t batch = first; batch < end; batch += kBatch * kStep) {
    float x[kBatch];
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      const int32_t j = batch + n * kStep;
      if (j < end) x[n] = sums[j * params.ld];
    }
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      const int32_t j = batch + n * kStep;
      if (j >= end) break;
      const float inverse_rows = 1.0f / static_cast<float>(params.axis.block(j).rows);
      sums[j * params.ld] = x[n] * inverse_rows - mean;
    }
  }
}

__global__ void __launch_bounds__(kThreads) mean_kernel(const MeanParams params) {
  begin_kernel();
  find_mean(params, static_cast<int32_t>(blockIdx.x));
}

// Blocks -----------------------------------------------------------------------------------------

struct PoolParams {
  PoolJob jobs[2];
  int32_t num_blocks_first = 0;  // thread blocks of the first job
  int32_t head_dim = 0;
  int64_t ld = 0;
  float least = 0.0f;
  // What find_mean() does beside, of what the kernel before has pooled: thread blocks
  // [first_mean, past_mean). Rows are then read while the kernel before ends.
  MeanParams mean;
  int32_t first_mean = 0, past_mean = 0;
};

/// One block of rows. kIsSimilarity: unit rows instead of rows, and what comes out is is_alike:
/// with unit rows the mean cosine of all pairs is |sum of rows|^2 / n^2.
template <class T, int kHeadDim, bool kIsSimilarity>
__global__ void __launch_bounds__(kThreads) pool_kernel(const PoolParams params) {
  constexpr int kLanes = kHeadDim / kVector;  // that hold a row
  constexpr int kStep = kThreads / kLanes;    // rows that the thread block loads at a time
  __shared__ float partial[kWarps][kHeadDim];
  __shared__ float warp_squares[kWarps];

  int32_t idx = static_cast<int32_t>(blockIdx.x);
  // Tables are of this call: they are read where its kernels before have ended for sure.
  const bool is_early = params.first_mean < params.past_mean &&
                        params.jobs[0].axis.table == nullptr &&
                        params.jobs[0].rows.order == nullptr;
  if (!is_early) await_last_kernel();
  admit_next_kernel();
  if constexpr (!kIsSimilarity) {
    if (idx >= params.first_mean && idx < params.past_mean) {
      await_last_kernel();
      find_mean(params.mean, idx - params.first_mean);
      return;
    }
    if (idx >= params.past_mean) idx -= params.past_mean - params.first_mean;
  }
  const bool is_first = idx < params.num_blocks_first;
  if (!is_first) idx -= params.num_blocks_first;
  const PoolJob& job = params.jobs[is_first ? 0 : 1];
  const int32_t pair = idx / job.axis.num_blocks;
  const int32_t b = pair / job.num_heads, h = pair % job.num_heads;
  const BlockInfo block = job.axis.block(idx % job.axis.num_blocks);
  const int32_t head_dim = params.head_dim;

  const int thread = static_cast<int>(threadIdx.x);
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
    for (int32_t begin = r_first; begin - r_first < block.rows; begin += kBatch * kStep) {
      int64_t offsets[kBatch];  // all first, so that the loads of an order overlap too
#pragma unroll
      for (int n = 0; n < kBatch; ++n) {
        const int32_t r = begin + n * kStep;
        offsets[n] = r < block.rows ? job.rows.offset(block.begin + r) : 0;
      }
      uint4 vectors[kBatch];
#pragma unroll
      for (int n = 0; n < kBatch; ++n) {
        vectors[n] = make_uint4(0u, 0u, 0u, 0u);
        if (has_column && begin + n * kStep < block.rows) {
          vectors[n] = load_once(head + offsets[n] + col);
        }
      }
#pragma unroll
      for (int n = 0; n < kBatch; ++n) {
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
    for (int n = 0; n < kVector; ++n) partial[warp_index()][col + n] = sum[n];
  }
  __syncthreads();

  if (is_early) await_last_kernel();  // so that whoever waits for this kernel waits for that one
  const float inverse_rows = 1.0f / static_cast<float>(block.rows);
  const auto total = [&](int d) {
    return (partial[0][d] + partial[1][d]) + (partial[2][d] + partial[3][d]);
  };
  if constexpr (!kIsSimilarity) {
    const float factor = job.is_mean ? inverse_rows : 1.0f;
    for (int d = thread; d < params.ld; d += kThreads) {
      job.pooled[int64_t{idx} * params.ld + d] = total(d) * factor;
    }
  } else {
    float square = 0.0f;
    for (int d = thread; d < kHeadDim; d += kThreads) {
      const float x = total(d) * inverse_rows;
      square = fmaf(x, x, square);
    }
    square = warp_sum(square);
    if (lane_index() == 0) warp_squares[warp_index()] = square;
    __syncthreads();
    if (thread == 0) {
      const float similarity =
          (warp_squares[0] + warp_squares[1]) + (warp_squares[2] + warp_squares[3]);
      job.is_alike[idx] = similarity < params.least ? 0 : 1;  // NaN: alike
    }
  }
}
static_assert(kWarps == 4, "the sums above name four warps");

// Launches ---------------------------------------------------------------------------------------

int64_t blocks_of(const Frame& frame, const PoolJob& job) {
  return int64_t{frame.batch} * job.num_heads * job.axis.num_blocks;
}

int64_t slices_of(const Frame& frame, const Axis& axis, int num_heads) {
  const int64_t num_slices = (frame.head_dim + kMeanCols - 1) / kMeanCols;
  return int64_t{frame.batch} * num_heads * axis.num_sequences * num_slices;
}

template <class T, bool kIsSimilarity>
void launch_pool(const Frame& frame, const PoolParams& params, void* stream) {
  const LaunchShape shape{.blocks = blocks_of(frame, params.jobs[0]) +
                                    blocks_of(frame, params.jobs[1]) + params.past_mean -
                                    params.first_mean,
                          .threads = kThreads};
  if (frame.head_dim <= 64) {
    launch(pool_kernel<T, 64, kIsSimilarity>, shape, stream, params);
  } else if (frame.head_dim <= 128) {
    launch(pool_kernel<T, 128, kIsSimilarity>, shape, stream, params);
  } else {
    launch(pool_kernel<T, 256, kIsSimilarity>, shape, stream, params);
  }
}

template <bool kIsSimilarity>
void launch_pool(const Frame& frame, DType dtype, PoolParams params, void* stream) {
  params.num_blocks_first = static_cast<int32_t>(blocks_of(frame, params.jobs[0]));
  params.head_dim = frame.head_dim;
  if (dtype == DType::kF16) {
    launch_pool<fp16, kIsSimilarity>(frame, params, stream);
  } else {
    launch_pool<bf16, kIsSimilarity>(frame, params, stream);
  }
}

}  // namespace

void pool(const Frame& frame, DType dtype, const PoolJob& first, const PoolJob& second, int64_t ld,
          void* stream) {
  const PoolParams params{.jobs = {first, second}, .ld = ld};
  launch_pool</*kIsSimilarity=*/false>(frame, dtype, params, stream);
}

void pool_and_centre(const Frame& frame, DType dtype, const PoolJob& job, const PoolJob& pooled,
                     int64_t ld, float* means, void* stream) {
  // In the middle of the job: what they wait for has ended by then, and they are not last.
  PoolParams params{.jobs = {job, {}},
                    .ld = ld,
                    .mean = {.axis = pooled.axis,
                             .head_dim = frame.head_dim,
                             .sums = pooled.pooled,
                             .ld = ld,
                             .means = means,
                             .is_centred = true},
                    .first_mean = static_cast<int32_t>(blocks_of(frame, job) / 2)};
  params.past_mean =
      params.first_mean + static_cast<int32_t>(slices_of(frame, pooled.axis, pooled.num_heads));
  launch_pool</*kIsSimilarity=*/false>(frame, dtype, params, stream);
}

void find_alike(const Frame& frame, DType dtype, const PoolJob& first, const PoolJob& second,
                float least, void* stream) {
  const PoolParams params{.jobs = {first, second}, .least = least};
  launch_pool</*kIsSimilarity=*/true>(frame, dtype, params, stream);
}

void block_sums(const Frame& frame, const Axis& axis, DType dtype, const Rows& rows, int num_heads,
                float* sums, void* stream) {
  pool(frame, dtype, {.axis = axis, .rows = rows, .num_heads = num_heads, .pooled = sums}, {},
       frame.head_dim, stream);
}

void sequence_means(const Frame& frame, const Axis& axis, int num_heads, const float* sums,
                    float* means, void* stream) {
  launch(mean_kernel, {.blocks = slices_of(frame, axis, num_heads), .threads = kThreads}, stream,
         MeanParams{.axis = axis,
                    .head_dim = frame.head_dim,
                    .sums = const_cast<float*>(sums),
                    .ld = frame.head_dim,
                    .means = means});
}

}  // namespace sparline::cuda
