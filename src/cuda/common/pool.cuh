// SPDX-License-Identifier: Apache-2.0
//
// Pooling as the router uses it: rows padded with zeros to `ld` floats. pool.cu
#pragma once

#include "cuda/common/frame.h"

namespace sparline::cuda {

/// The blocks of one axis.
struct PoolJob {
  Axis axis;
  Rows rows;
  int32_t num_heads = 0;
  bool is_mean = false;          // pooled: the mean of a block's rows; else their sum
  float* pooled = nullptr;       // out (B, heads, T, ld)
  const float* means = nullptr;  // similarity: (B, heads, sequences, D), taken off every row
  uint8_t* is_alike = nullptr;   // similarity: out (B, heads, T)
};

/// Pools two axes in one launch; a job without heads is none.
void pool(const Frame& frame, DType dtype, const PoolJob& first, const PoolJob& second, int64_t ld,
          void* stream);

/// Pools an axis; the sums that an axis pooled before it on the stream has become means less the
/// mean row of their sequence. Both have blocks. means: out (B, heads, sequences, D), or null.
/// Rows are read while the kernels between end: those must have waited for whoever wrote the rows.
void pool_and_centre(const Frame& frame, DType dtype, const PoolJob& job, const PoolJob& pooled,
                     int64_t ld, float* means, void* stream);

/// is_alike: whether the mean cosine of all pairs of a block's rows is not below `least`.
void find_alike(const Frame& frame, DType dtype, const PoolJob& first, const PoolJob& second,
                float least, void* stream);

}  // namespace sparline::cuda
