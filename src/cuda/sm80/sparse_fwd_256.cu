// SPDX-License-Identifier: Apache-2.0
#include "cuda/sm80/sparse_fwd.cuh"

namespace sparline::cuda {

template void sparse_forward<256>(const SparseForward& params, void* stream);

}  // namespace sparline::cuda
