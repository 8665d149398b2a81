// SPDX-License-Identifier: Apache-2.0
#include "cuda/sm80/linear_bwd_key.cuh"

namespace sparline::cuda {

void linear_backward_keys_256(const LinearKeyBackward& args, void* stream) {
  if (args.params.forward.dtype == DType::kBF16) {
    return launch_key_kernel<LinearTileTraits<bf16, 256, 64, 64, 1>>(args, stream);
  }
  launch_key_kernel<LinearTileTraits<fp16, 256, 64, 64, 1>>(args, stream);
}

}  // namespace sparline::cuda
