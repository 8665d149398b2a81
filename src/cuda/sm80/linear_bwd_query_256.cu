// SPDX-License-Identifier: Apache-2.0
#include "cuda/sm80/linear_bwd_query.cuh"

namespace sparline::cuda {

void linear_backward_queries_256(const LinearQueryBackward& args, void* stream) {
  if (args.params.forward.dtype == DType::kBF16) {
    return launch_query_kernel<LinearTileTraits<bf16, 256, 64, 64, 1>>(args, stream);
  }
  launch_query_kernel<LinearTileTraits<fp16, 256, 64, 64, 1>>(args, stream);
}

}  // namespace sparline::cuda
