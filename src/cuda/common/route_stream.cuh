// SPDX-License-Identifier: Apache-2.0
//
// The router in one kernel. route_stream.cu
#pragma once

#include "cuda/common/classify.cuh"
#include "cuda/common/pool.cuh"

namespace sparline::cuda {

constexpr int kStreamCols = 512;  // key blocks whose scores one thread block keeps

/// Whether that kernel serves the problem: any frame and rule but long rows and the test of
/// similarity, which reads queries and keys a second time.
inline bool can_stream_route(const Frame& frame, const RouteRule& rule) {
  return frame.keys.num_blocks <= kStreamCols && rule.min_similarity <= 0.0;
}

struct StreamRoute {
  PoolJob queries, keys;  // pooled in workspace; keys.is_mean: no mean is taken off
  ClassifyParams classify;
  int64_t ld = 0;                 // of pooled rows
  const float* folded = nullptr;  // Wq^T Wk, (1 or H, ld, ld); null: no projections
  int64_t folded_stride_h = 0;
  float* projected = nullptr;  // scratch (B, H, T_m, ld), with projections
  uint32_t* counters = nullptr;
};
int64_t num_stream_counters(const Frame& frame);
void stream_route(const StreamRoute& params, DType dtype, void* stream);

}  // namespace sparline::cuda
