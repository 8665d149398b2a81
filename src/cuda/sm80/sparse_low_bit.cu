// SPDX-License-Identifier: Apache-2.0
#include "cuda/kernels.h"

namespace sparline::cuda {

template <int kHeadDim>
void sparse_forward_low_bit(const SparseForward& params, void* stream);  // sparse_low_bit.cuh

void sparse_forward_low_bit(const SparseForward& params, void* stream) {
  if (params.frame.head_dim <= 64) return sparse_forward_low_bit<64>(params, stream);
  if (params.frame.head_dim <= 128) return sparse_forward_low_bit<128>(params, stream);
  sparse_forward_low_bit<256>(params, stream);
}

}  // namespace sparline::cuda
