// SPDX-License-Identifier: Apache-2.0
#include "cuda/sm90/tensor_map.h"

#include <cuda_runtime.h>

namespace sparline::cuda {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

/// Through the runtime: the library is not linked to the driver. Null where there is none.
Encode find_encode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
  const cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                              12000, cudaEnableDefault, &result);
#else
  const cudaError_t status =
      cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result);
#endif
  if (status != cudaSuccess || result != cudaDriverEntryPointSuccess) {
    cudaGetLastError();
    return nullptr;
  }
  return reinterpret_cast<Encode>(function);
}

constexpr cuuint64_t kElementBytes = 2;

/// What an axis of one has for a stride is never used and may be anything.
cuuint64_t byte_stride(int64_t elements, int64_t size) {
  constexpr cuuint64_t kAnyStride = 16;
  return size == 1 ? kAnyStride : static_cast<cuuint64_t>(elements) * kElementBytes;
}

/// Boxes of 64 columns and `box_rows` places of the second axis.
template <int kRank>
bool encode_boxes(CUtensorMap& map, const void* data, DType dtype, const cuuint64_t (&sizes)[kRank],
                  const cuuint64_t (&strides)[kRank - 1], int box_rows) {
  static const Encode encode = find_encode();
  if (encode == nullptr) return false;
  cuuint32_t box[kRank] = {64, static_cast<cuuint32_t>(box_rows)}, steps[kRank] = {1, 1};
  for (int n = 2; n < kRank; ++n) box[n] = steps[n] = 1;
  return encode(&map,
                dtype == DType::kBF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                      : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                kRank, const_cast<void*>(data), sizes, strides, box, steps,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace

bool encode_rows(CUtensorMap& map, const Rows& rows, DType dtype, int64_t num_batches,
                 int64_t num_heads, int64_t num_rows, int64_t head_dim, int box_rows) {
  if (!rows.is_vectorised || rows.order != nullptr) return false;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(head_dim), static_cast<cuuint64_t>(num_rows),
                              static_cast<cuuint64_t>(num_heads),
                              static_cast<cuuint64_t>(num_batches)};
  const cuuint64_t strides[] = {byte_stride(rows.stride_n, num_rows),
                                byte_stride(rows.stride_h, num_heads),
                                byte_stride(rows.stride_b, num_batches)};
  return encode_boxes<4>(map, rows.data, dtype, sizes, strides, box_rows);
}

// Rows have two axes of the same stride. The first one, r, has the length of a box, so that a box
// at r = box_rows - num_rows ends after num_rows rows, where the axis does; the second one, n +
// num_rows, makes up for that. Both begin `box_rows` rows before the tensor, where nothing is read.
bool encode_cut_rows(CUtensorMap& map, const Rows& rows, DType dtype, int64_t num_batches,
                     int64_t num_heads, int64_t num_rows, int64_t head_dim, int box_rows) {
  if (!rows.is_vectorised || rows.order != nullptr) return false;
  const cuuint64_t row_bytes = byte_stride(rows.stride_n, num_rows);
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(head_dim), static_cast<cuuint64_t>(box_rows),
                              static_cast<cuuint64_t>(num_rows) + 1,
                              static_cast<cuuint64_t>(num_heads),
                              static_cast<cuuint64_t>(num_batches)};
  const cuuint64_t strides[] = {row_bytes, row_bytes, byte_stride(rows.stride_h, num_heads),
                                byte_stride(rows.stride_b, num_batches)};
  const auto first =
      reinterpret_cast<uintptr_t>(rows.data) - row_bytes * static_cast<cuuint64_t>(box_rows);
  return encode_boxes<5>(map, reinterpret_cast<const void*>(first), dtype, sizes, strides,
                         box_rows);
}

}  // namespace sparline::cuda
