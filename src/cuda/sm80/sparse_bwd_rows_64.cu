// SPDX-License-Identifier: Apache-2.0
//
// The row pass of the sparse backward for head dims up to 64.
#include "cuda/sm80/sparse_bwd_rows.cuh"

namespace sparline::cuda {

void sparse_backward_rows_64(const SparseBackward& params, void* stream) {
  if (params.block_q <= 64) {
    backward::launch_rows_of<backward::RowsShape<64, 2, 2, 32, 6, 4>>(params, stream);
  } else {
    backward::launch_rows_of<backward::RowsShape<64, 4, 2, 32, 3, 2>>(params, stream);
  }
}

}  // namespace sparline::cuda
