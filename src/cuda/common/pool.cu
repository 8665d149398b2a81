// SPDX-License-Identifier: Apache-2.0
//
// Pooling: what the rows of a block sum to, the mean row of a sequence, and whether the rows of a
// block are alike (SpargeAttn). One pass at memory bandwidth: one thread block for each block of
// rows. Float32 sums in a fixed order.
#include "cuda/common/pool_block.cuh"
#include "cuda/kernels.h"

namespace sparline::cuda {
namespace {

constexpr int kBatch = 8;

struct PoolParams {
  PoolJob jobs[2];
  int32_t num_blocks_first = 0;  // thread blocks of the first job
  int32_t head_dim = 0;
  int64_t ld = 0;
  float least = 0.0f;
};

template <class T, int kHeadDim, bool kIsSimilarity>
__global__ void __launch_bounds__(kPoolThreads) pool_kernel(const PoolParams params) {
  begin_kernel();
  __shared__ PoolScratch<kHeadDim> scratch;
  const auto idx = static_cast<int32_t>(blockIdx.x);
  const bool is_first = idx < params.num_blocks_first;
  pool_block<T, kHeadDim, kIsSimilarity>(params.jobs[is_first ? 0 : 1],
                                         is_first ? idx : idx - params.num_blocks_first,
                                         params.head_dim, params.ld, params.least, scratch);
}

// Sequences --------------------------------------------------------------------------------------

constexpr int kMeanWarps = 32;

struct MeanParams {
  Axis axis;
  int32_t head_dim = 0;
  float* sums = nullptr;  // (pairs, T, ld)
  int64_t ld = 0;
  float* means = nullptr;  // out (pairs, sequences, D)
  bool is_centred = false;
};

/// 32 columns of one sequence: a lane for each column, a warp for every 32nd block.
__global__ void __launch_bounds__(kMeanWarps* kWarpSize) mean_kernel(const MeanParams params) {
  begin_kernel();
  __shared__ float partial[kMeanWarps][kWarpSize];
  const int32_t num_slices = (params.head_dim + kWarpSize - 1) / kWarpSize;
  const int32_t slice = static_cast<int32_t>(blockIdx.x) % num_slices;
  const int32_t task = static_cast<int32_t>(blockIdx.x) / num_slices;
  const int32_t sequence = task % params.axis.num_sequences;
  const int32_t pair = task / params.axis.num_sequences;
  const int32_t d = slice * kWarpSize + lane_index();
  const bool has_column = d < params.head_dim;
  const int32_t begin = first_block_of(params.axis, sequence);
  const int32_t end = first_block_of(params.axis, sequence + 1);
  float* const sums = params.sums + int64_t{pair} * params.axis.num_blocks * params.ld + d;

  float sum = 0.0f;
  if (has_column) {
#pragma unroll 16
    for (int32_t j = begin + warp_index(); j < end; j += kMeanWarps) sum += sums[j * params.ld];
  }
  partial[warp_index()][lane_index()] = sum;
  __syncthreads();
  float mean = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kMeanWarps; ++warp) mean += partial[warp][lane_index()];
  mean = begin < end ? mean / static_cast<float>(params.axis.block(begin).sequence_rows) : 0.0f;

  if (!has_column) return;
  if (params.means != nullptr && warp_index() == 0) {
    params.means[int64_t{task} * params.head_dim + d] = mean;
  }
  if (!params.is_centred) return;
  for (int32_t first = begin + warp_index(); first < end; first += kBatch * kMeanWarps) {
    float x[kBatch];
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      const int32_t j = first + n * kMeanWarps;
      if (j < end) x[n] = sums[j * params.ld];
    }
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      const int32_t j = first + n * kMeanWarps;
      if (j >= end) break;
      const float inverse_rows = 1.0f / static_cast<float>(params.axis.block(j).rows);
      sums[j * params.ld] = x[n] * inverse_rows - mean;
    }
  }
}

// Launches ---------------------------------------------------------------------------------------

int64_t blocks_of(const Frame& frame, const PoolJob& job) {
  return int64_t{frame.batch} * job.num_heads * job.axis.num_blocks;
}

template <class T, bool kIsSimilarity>
void launch_pool(const Frame& frame, const PoolParams& params, void* stream) {
  const LaunchShape shape{
      .blocks = blocks_of(frame, params.jobs[0]) + blocks_of(frame, params.jobs[1]),
      .threads = kPoolThreads};
  if (frame.head_dim <= 64) {
    launch(pool_kernel<T, 64, kIsSimilarity>, shape, stream, params);
  } else if (frame.head_dim <= 128) {
    launch(pool_kernel<T, 128, kIsSimilarity>, shape, stream, params);
  } else {
    launch(pool_kernel<T, 256, kIsSimilarity>, shape, stream, params);
  }
}

template <bool kIsSimilarity>
void launch_pool(const Frame& frame, DType dtype, const PoolJob& first, const PoolJob& second,
                 int64_t ld, float least, void* stream) {
  const PoolParams params{.jobs = {first, second},
                          .num_blocks_first = static_cast<int32_t>(blocks_of(frame, first)),
                          .head_dim = frame.head_dim,
                          .ld = ld,
                          .least = least};
  if (dtype == DType::kF16) {
    launch_pool<fp16, kIsSimilarity>(frame, params, stream);
  } else {
    launch_pool<bf16, kIsSimilarity>(frame, params, stream);
  }
}

void launch_mean(const Frame& frame, int num_heads, const MeanParams& params, void* stream) {
  const int64_t num_slices = (frame.head_dim + kWarpSize - 1) / kWarpSize;
  launch(mean_kernel,
         {.blocks = int64_t{frame.batch} * num_heads * params.axis.num_sequences * num_slices,
          .threads = kMeanWarps * kWarpSize},
         stream, params);
}

}  // namespace

void pool(const Frame& frame, DType dtype, const PoolJob& first, const PoolJob& second, int64_t ld,
          void* stream) {
  launch_pool</*kIsSimilarity=*/false>(frame, dtype, first, second, ld, 0.0f, stream);
}

void find_alike(const Frame& frame, DType dtype, const PoolJob& first, const PoolJob& second,
                float least, void* stream) {
  launch_pool</*kIsSimilarity=*/true>(frame, dtype, first, second, 0, least, stream);
}

void centre(const Frame& frame, const Axis& axis, int num_heads, float* sums, int64_t ld,
            float* means, void* stream) {
  launch_mean(frame, num_heads,
              {.axis = axis,
               .head_dim = frame.head_dim,
               .sums = sums,
               .ld = ld,
               .means = means,
               .is_centred = true},
              stream);
}

void block_sums(const Frame& frame, const Axis& axis, DType dtype, const Rows& rows, int num_heads,
                float* sums, void* stream) {
  pool(frame, dtype, {.axis = axis, .rows = rows, .num_heads = num_heads, .pooled = sums}, {},
       frame.head_dim, stream);
}

void sequence_means(const Frame& frame, const Axis& axis, int num_heads, const float* sums,
                    float* means, void* stream) {
  launch_mean(frame, num_heads,
              {.axis = axis,
               .head_dim = frame.head_dim,
               .sums = const_cast<float*>(sums),
               .ld = frame.head_dim,
               .means = means},
              stream);
}

}  // namespace sparline::cuda
