// SPDX-License-Identifier: Apache-2.0
#include "emulator/hopper.h"

#include "cuda/sm90/tensor_map.h"

namespace sparline::cuda {

bool encode_rows(CUtensorMap& map, const Rows& rows, DType, int64_t num_batches, int64_t num_heads,
                 int64_t num_rows, int64_t head_dim, int box_rows) {
  if (!rows.is_vectorised || rows.order != nullptr) return false;
  const EmulatedTensorMap encoded{
      .data = static_cast<const unsigned char*>(static_cast<const void*>(rows.data)),
      .sizes = {head_dim, num_rows, num_heads, num_batches},
      .strides = {1, rows.stride_n, rows.stride_h, rows.stride_b},
      .box_rows = box_rows};
  std::memcpy(static_cast<void*>(&map), &encoded, sizeof(encoded));
  return true;
}

}  // namespace sparline::cuda
