// SPDX-License-Identifier: Apache-2.0
//
// The row pass of the sparse backward for head dims up to 128.
#include "cuda/sm80/sparse_bwd_rows.cuh"

namespace sparline::cuda {

void sparse_backward_rows_128(const SparseBackward& params, void* stream) {
  if (params.block_q <= 64) {
    backward::launch_rows_of<backward::RowsShape<128, 2, 2, 32, 3, 3>>(params, stream);
  } else {
    backward::launch_rows_of<backward::RowsShape<128, 4, 2, 32, 2, 2>>(params, stream);
  }
}

}  // namespace sparline::cuda
