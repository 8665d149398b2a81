// SPDX-License-Identifier: Apache-2.0
#include "cuda/sm80/linear_bwd_query.cuh"

namespace sparline::cuda {
namespace {

template <class T>
void run(const LinearQueryBackward& args, void* stream) {
  const int32_t head_dim = args.params.forward.frame.head_dim;
  if (head_dim <= 64) {
    return launch_query_kernel<LinearTileTraits<T, 64, 64, 64, 2>>(args, stream);
  }
  if (head_dim <= 128) {
    return launch_query_kernel<LinearTileTraits<T, 128, 64, 64, 2>>(args, stream);
  }
  launch_query_kernel<LinearTileTraits<T, 256, 64, 64, 2>>(args, stream);
}

}  // namespace

void linear_backward_queries_hedgehog(const LinearQueryBackward& args, void* stream) {
  if (args.params.forward.dtype == DType::kBF16) return run<bf16>(args, stream);
  run<fp16>(args, stream);
}

}  // namespace sparline::cuda
