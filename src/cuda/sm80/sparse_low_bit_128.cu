// SPDX-License-Identifier: Apache-2.0
#include "cuda/sm80/sparse_low_bit.cuh"

namespace sparline::cuda {

template void sparse_forward_low_bit<128>(const SparseForward& params, void* stream);

}  // namespace sparline::cuda
