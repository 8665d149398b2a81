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

}  // namespace

bool encode_rows(CUtensorMap& map, const Rows& rows, DType dtype, int64_t num_batches,
                 int64_t num_heads, int64_t num_rows, int64_t head_dim, int box_rows) {
  static const Encode encode = find_encode();
  if (encode == nullptr || !rows.is_vectorised || rows.order != nullptr) return false;
  constexpr int kRank = 4;
  constexpr cuuint64_t kElementBytes = 2, kAnyStride = 16;
  const cuuint64_t sizes[kRank] = {
      static_cast<cuuint64_t>(head_dim), static_cast<cuuint64_t>(num_rows),
      static_cast<cuuint64_t>(num_heads), static_cast<cuuint64_t>(num_batches)};
  // What an axis of one has for a stride is never used and may be anything.
  const auto stride = [](int64_t elements, int64_t size) {
    return size == 1 ? kAnyStride : static_cast<cuuint64_t>(elements) * kElementBytes;
  };
  const cuuint64_t strides[kRank - 1] = {stride(rows.stride_n, num_rows),
                                         stride(rows.stride_h, num_heads),
                                         stride(rows.stride_b, num_batches)};
  const cuuint32_t box[kRank] = {64, static_cast<cuuint32_t>(box_rows), 1, 1};
  const cuuint32_t steps[kRank] = {1, 1, 1, 1};
  return encode(&map,
                dtype == DType::kBF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                      : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                kRank, rows.data, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace sparline::cuda
