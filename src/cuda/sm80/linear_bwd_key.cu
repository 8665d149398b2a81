// SPDX-License-Identifier: Apache-2.0
#include "cuda/sm80/linear_bwd_key.cuh"

namespace sparline::cuda {
namespace {

template <class T, int kHeadDim>
void run(const LinearKeyBackward& args, void* stream) {
  if (args.params.forward.block_k <= 64) {
    return launch_key_kernel<LinearTileTraits<T, kHeadDim, 64, kHeadDim, 1>>(args, stream);
  }
  launch_key_kernel<LinearTileTraits<T, kHeadDim, 128, kHeadDim, 1>>(args, stream);
}

template <class T>
void run(const LinearKeyBackward& args, void* stream) {
  if (args.params.forward.frame.head_dim <= 64) return run<T, 64>(args, stream);
  run<T, 128>(args, stream);
}

}  // namespace

void linear_backward_keys(const LinearKeyBackward& args, void* stream) {
  const LinearParams& p = args.params.forward;
  if (is_hedgehog(p.feature_map)) return linear_backward_keys_hedgehog(args, stream);
  if (p.frame.head_dim > 128) return linear_backward_keys_256(args, stream);
  if (p.dtype == DType::kBF16) return run<bf16>(args, stream);
  run<fp16>(args, stream);
}

}  // namespace sparline::cuda
