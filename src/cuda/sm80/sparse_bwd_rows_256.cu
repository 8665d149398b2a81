// SPDX-License-Identifier: Apache-2.0
//
// The row pass of the sparse backward for head dims up to 256.
#include "cuda/sm80/sparse_bwd_rows.cuh"

namespace sparline::cuda {

void sparse_backward_rows_256(const SparseBackward& params, void* stream) {
  backward::launch_rows_of<backward::RowsShape<256, 4, 1, 16, 2, 2>>(params, stream);
}

}  // namespace sparline::cuda
