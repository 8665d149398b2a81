// SPDX-License-Identifier: Apache-2.0
//
// Descriptions of tensors for the copy engine.
#pragma once

#include <cuda.h>

#include "cuda/common/frame.h"

namespace sparline::cuda {

/// A (B, heads, N, D) tensor of 16-bit elements as the copy engine reads it: boxes of `box_rows`
/// rows and 64 columns, their 16-byte chunks swizzled by row. False where it cannot: the caller
/// takes another road. Nothing is allocated, the driver is only asked for the encoding.
bool encode_rows(CUtensorMap& map, const Rows& rows, DType dtype, int64_t num_batches,
                 int64_t num_heads, int64_t num_rows, int64_t head_dim, int box_rows);
/// The same for boxes that end where a copy says, load_cut_box().
bool encode_cut_rows(CUtensorMap& map, const Rows& rows, DType dtype, int64_t num_batches,
                     int64_t num_heads, int64_t num_rows, int64_t head_dim, int box_rows);

}  // namespace sparline::cuda
