// SPDX-License-Identifier: Apache-2.0
#include "cuda/sm90/sparse_fwd.cuh"

namespace sparline::cuda {

template bool sparse_forward_sm90<64, Tiles::kLinear, 64>(const SparseForward& params,
                                                          int num_multiprocessors, void* stream);

}  // namespace sparline::cuda
