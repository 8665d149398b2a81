// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/common/platform.cuh"
#include "cuda/kernels.h"

namespace sparline::cuda {

/// Which query block a CTA works on.
struct QueryPlace {
  int32_t b, h, h_kv, i;
  BlockInfo block;
};

/// Blocks of a head are neighbours, so that its keys and values stay in the cache.
__device__ __forceinline__ QueryPlace query_place(const Frame& frame, const Wave& wave,
                                                  uint32_t idx) {
  const int32_t num_blocks = frame.queries.num_blocks, group = frame.group();
  const auto head = static_cast<int32_t>(idx / num_blocks);  // of the wave
  const auto i = static_cast<int32_t>(idx % num_blocks);
  const int32_t pair = wave.first + head / group;
  const int32_t h_kv = pair % frame.num_kv_heads;
  return {pair / frame.num_kv_heads, h_kv * group + head % group, h_kv, i, frame.queries.block(i)};
}

}  // namespace sparline::cuda
