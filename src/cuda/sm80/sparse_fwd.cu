// SPDX-License-Identifier: Apache-2.0
#include "cuda/kernels.h"
#include "sparline/error.h"

namespace sparline::cuda {

template <int kHeadDim>
void sparse_forward(const SparseForward& params, void* stream);  // sparse_fwd.cuh

void sparse_forward(const SparseForward& params, void* stream) {
#ifdef SPARLINE_WITH_SM90
  if (sparse_forward_sm90(params, stream)) return;
#endif
  if (params.linear.is_on) {
    throw Error(ErrorCode::kInternal,
                "CUDA: the sums of the linear branch lie in o, and no kernel combines them. Please "
                "report it with the output of `sparline doctor`.");
  }
  if (params.frame.head_dim <= 64) return sparse_forward<64>(params, stream);
  if (params.frame.head_dim <= 128) return sparse_forward<128>(params, stream);
  sparse_forward<256>(params, stream);
}

}  // namespace sparline::cuda
