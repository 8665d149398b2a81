// SPDX-License-Identifier: Apache-2.0
//
// The backward of the sparse branch: what every query row needs beforehand, then dQ by rows
// (sparse_bwd_rows.cuh) and dK, dV by columns (sparse_bwd_columns.cu).
//   lse_log2 = (lse + scale q k_mean) log2(e)   k_mean: of smoothed keys, else 0
//   delta    = rowsum(dO o)
#include "cuda/sm80/sparse_bwd.cuh"

namespace sparline::cuda {
namespace backward {
namespace {

constexpr int kStatsThreads = 128;

/// The sum of x y over 8 elements of each.
template <class T>
__device__ __forceinline__ float dot(const uint4& x, const uint4& y) {
  const uint32_t left[4] = {x.x, x.y, x.z, x.w}, right[4] = {y.x, y.y, y.z, y.w};
  float sum = 0.0f;
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    const float2 a = unpack<T>(left[n]), c = unpack<T>(right[n]);
    sum = fmaf(a.x, c.x, fmaf(a.y, c.y, sum));
  }
  return sum;
}

/// A CTA per query block; kLanes neighbouring lanes read a row, 8 columns each.
template <class T, int kLanes>
__global__ void __launch_bounds__(kStatsThreads) row_stats_kernel(const SparseBackward p) {
  begin_kernel();
  constexpr int kUnroll = 4;  // rows in flight
  constexpr int kRowsAtOnce = kStatsThreads / kLanes;
  const int32_t num_blocks = p.frame.queries.num_blocks;
  const int32_t i = static_cast<int32_t>(blockIdx.x) % num_blocks;
  const int32_t bh = static_cast<int32_t>(blockIdx.x) / num_blocks;
  const int32_t b = bh / p.frame.num_heads, h = bh % p.frame.num_heads;
  const int32_t head_dim = p.frame.head_dim;
  const BlockInfo block = p.frame.queries.block(i);
  const T* const q_head = p.q.head<T>(b, h);
  const T* const o_head = p.o.head<T>(b, h);
  const T* const d_o_head = p.d_o.head<T>(b, h);
  const float* const k_mean =
      p.k_mean == nullptr
          ? nullptr
          : p.k_mean + ((static_cast<int64_t>(b) * p.frame.num_kv_heads + h / p.frame.group()) *
                            p.frame.keys.num_sequences +
                        block.sequence) *
                           head_dim;
  const bool is_vectorised =
      p.o.is_vectorised && p.d_o.is_vectorised && (k_mean == nullptr || p.q.is_vectorised);
  const int part = static_cast<int>(threadIdx.x) % kLanes;

  for (int r0 = 0; r0 < block.rows; r0 += kUnroll * kRowsAtOnce) {
    float delta[kUnroll] = {}, shift[kUnroll] = {};
    if (is_vectorised) {
      uint4 o[kUnroll], d_o[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int r = r0 + u * kRowsAtOnce + static_cast<int>(threadIdx.x) / kLanes;
        o[u] = d_o[u] = make_uint4(0, 0, 0, 0);
        if (r < block.rows && 8 * part < head_dim) {
          const int32_t n = block.begin + r;
          o[u] = *reinterpret_cast<const uint4*>(o_head + p.o.offset(n) + 8 * part);
          d_o[u] = *reinterpret_cast<const uint4*>(d_o_head + p.d_o.offset(n) + 8 * part);
        }
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) delta[u] = dot<T>(o[u], d_o[u]);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int r = r0 + u * kRowsAtOnce + static_cast<int>(threadIdx.x) / kLanes;
      if (r >= block.rows) continue;
      const int32_t n = block.begin + r;
      if (!is_vectorised) {
        const T* const o = o_head + p.o.offset(n);
        const T* const d_o = d_o_head + p.d_o.offset(n);
        for (int c = part; c < head_dim; c += kLanes) {
          delta[u] = fmaf(to_float(o[c]), to_float(d_o[c]), delta[u]);
        }
      }
      if (k_mean == nullptr) continue;
      const T* const q = q_head + p.q.offset(n);
      if (is_vectorised) {
        if (8 * part >= head_dim) continue;
        const uint4 chunk = *reinterpret_cast<const uint4*>(q + 8 * part);
        const uint32_t pairs[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const float2 x = unpack<T>(pairs[c]);
          shift[u] = fmaf(x.x, k_mean[8 * part + 2 * c],
                          fmaf(x.y, k_mean[8 * part + 2 * c + 1], shift[u]));
        }
      } else {
        for (int c = part; c < head_dim; c += kLanes) {
          shift[u] = fmaf(to_float(q[c]), k_mean[c], shift[u]);
        }
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int step = kLanes / 2; step > 0; step /= 2) {
        delta[u] += __shfl_xor_sync(kAllLanes, delta[u], step);
        shift[u] += __shfl_xor_sync(kAllLanes, shift[u], step);
      }
      const int r = r0 + u * kRowsAtOnce + static_cast<int>(threadIdx.x) / kLanes;
      if (part != 0 || r >= block.rows) continue;
      const int32_t n = block.begin + r;
      const int64_t at = static_cast<int64_t>(bh) * p.frame.queries.length + n;
      const float lse = *p.lse.at(b, h, n);
      p.stats.lse_log2[at] = lse == -kInfinity ? kInfinity : fmaf(p.scale, shift[u], lse) * kLog2E;
      p.stats.delta[at] = delta[u];
    }
  }
}

template <class T>
void launch_row_stats(const SparseBackward& params, void* stream) {
  const LaunchShape shape{static_cast<int64_t>(params.frame.batch) * params.frame.num_heads *
                              params.frame.queries.num_blocks,
                          kStatsThreads};
  const int head_dim = params.frame.head_dim;
  const auto kernel = head_dim <= 64    ? row_stats_kernel<T, 8>
                      : head_dim <= 128 ? row_stats_kernel<T, 16>
                                        : row_stats_kernel<T, 32>;
  launch(kernel, shape, stream, params);
}

}  // namespace
}  // namespace backward

void row_stats(const SparseBackward& params, void* stream) {
  if (params.dtype == DType::kBF16) {
    backward::launch_row_stats<bf16>(params, stream);
  } else {
    backward::launch_row_stats<fp16>(params, stream);
  }
}

void sparse_backward(const SparseBackward& params, void* stream) {
  if (params.frame.head_dim <= 64) {
    sparse_backward_rows_64(params, stream);
  } else if (params.frame.head_dim <= 128) {
    sparse_backward_rows_128(params, stream);
  } else {
    sparse_backward_rows_256(params, stream);
  }
  sparse_backward_columns(params, stream);
}

}  // namespace sparline::cuda
