// SPDX-License-Identifier: Apache-2.0
//
// The linear branch on Hopper (sm_90a) up to the sums of states, in one kernel that reads keys and
// values once:
//   h_j = phi(k_j)^T v_j (with a projection phi(k_j)^T (v_j W^T)),  z_j = the sum of phi(k_j)
//   H_i = the sum over j in E_i of h_j,  Z_i likewise
// the same functions as sm80/linear_state.cu for classes. H_i goes to o's own rows: row f of it is
// row f of query block i.
//
//   Roles     warpgroup 0 loads (linear_sums_load.cuh), 1 and 2 make states of key blocks
//             (linear_sums_states.cuh), 3 and 4 add them up (linear_sums_product.cuh). States wait
//             for device memory and the product for tensor cores: one runs beside the other. CTA n
//             of G takes key blocks and tiles of the product n, n + G, ..., head by head
//   Tiles     states: a block of up to 64 keys. Product: 128 query blocks x 128 columns of a state,
//             64 key blocks at a time
//   Shared    W 32 KiB, 4 slots of 32 KiB for keys and values, 4 of 16 KiB for states
//   Sync      load -> full[slot] -> use -> empty[slot] -> load, in both rings. Between CTAs,
//             counters in global memory: states of a chunk are there, the map is there, the sums
//             of a pair are done and its states may be overwritten. The launch is cooperative: no
//             CTA waits for one that cannot begin
//   Numerics  phi, v W^T, h and z bf16, sums float32, H_i bf16. No atomics on data
//
// The states of the pairs that are there at a time fit into L2, where the product reads them.
#pragma once

#include "cuda/sm90/linear_sums_load.cuh"
#include "cuda/sm90/linear_sums_product.cuh"
#include "cuda/sm90/linear_sums_states.cuh"

namespace sparline::cuda {

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    linear_sums_sm90_kernel(const __grid_constant__ LinearSumsParams params) {
  begin_kernel();
  SPARLINE_DYNAMIC_SHARED_ALIGNED(bytes, 1024);
  auto& shared = *reinterpret_cast<LinearSumsShared<Traits>*>(bytes);
  if (threadIdx.x == 0) {
    for (int n = 0; n < Traits::kKeySlots; ++n) {
      init(shared.key_full[n], 1);
      init(shared.key_empty[n], 4);
    }
    for (int n = 0; n < Traits::kSumSlots; ++n) {
      init(shared.sum_full[n], 1);
      init(shared.sum_empty[n], 8);
    }
    for (int n = 0; n < Traits::kAnnouncements; ++n) {
      for (int group = 0; group < 2; ++group) {
        init(shared.stored[group][n], 4);
        init(shared.announced[group][n], 1);
      }
    }
    fence_barrier_init();
  }
  if (params.linear.combine == Combine::kProjection) {
    using T = typename Traits::T;
    constexpr int kHeadDim = Traits::kHeadDim;
    for (int n = static_cast<int>(threadIdx.x); n < kHeadDim * kHeadDim / 2;
         n += Traits::kThreads) {
      const int row = n / (kHeadDim / 2), col = n % (kHeadDim / 2) * 2;
      // One by one: a caller's weights may begin at any float.
      const float* const w = params.linear.proj_weight + n * 2;
      unsigned char* const to = reinterpret_cast<unsigned char*>(shared.weight) +
                                col / 64 * (kHeadDim * 128) + row * 128 +
                                ((col % 64 / 8 ^ row % 8) * 16) + col % 8 * 2;
      *reinterpret_cast<uint32_t*>(to) = pack<T>(w[0], w[1]);
    }
    fence_async_shared();
  }
  __syncthreads();
  const int warp = __shfl_sync(kAllLanes, warp_index(), 0);
  if (warp < 4) {
    give_back_registers<Traits::kLoadRegisters>();
    if (warp == 0) {
      load_keys(params, shared);
    } else if (warp == 1) {
      load_sums(params, shared);
    } else {
      announce_states(params, shared, warp - 2);
    }
  } else if (warp < 12) {
    take_registers<Traits::kStateRegisters>();
    LinearStates<Traits>(params, shared, warp / 4 - 1).run();
  } else {
    take_registers<Traits::kSumRegisters>();
    make_bits<Traits>(params, warp - 12, Traits::kSumWarps);
    LinearProduct<Traits>(params, shared, warp / 4 - 3).run();
  }
}

}  // namespace sparline::cuda
