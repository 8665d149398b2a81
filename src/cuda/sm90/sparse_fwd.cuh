// SPDX-License-Identifier: Apache-2.0
//
// The sparse branch, forward, on Hopper (sm_90a). Over the critical key blocks j of query block i
//     S = scale q_i k_j^T,  o_s = softmax(S) v,  lse = ln sum exp S
// the same function as sm80/sparse_fwd.cuh without a policy, or with a skip rule (kHasSkip:
// sparse_fwd_skip_runs.cuh, sparse_fwd_skip.cuh where key blocks are larger or too many for that,
// sparse_fwd_skip_apart.cuh for 64 rows that decide by themselves); and, where the sums of the
// linear branch are there already, its combination with that, as sm80/linear_fwd.cu has it
// (kHasLinear):
//     o = a o_s + c phi(q) H_i / (phi(q) . Z_i)
//
//   Tiles     128 queries x 128 keys: two runs of up to 64 keys, wherever they lie, or one; with
//             kHasRuns 128 x 64, and what follows is different: sparse_fwd_skip_runs.cuh. Blocks of
//             up to 64 queries: 64 x 64 at head_dim 128, 64 x 128 at 64
//   Roles     warpgroup 0 loads (sparse_fwd_load.cuh), 1 and 2 multiply, 64 rows each
//             (sparse_fwd_multiply.cuh). One CTA for each multiprocessor takes query blocks as it
//             is done with others, head by head, so that the keys of a head stay in L2; or two,
//             which have one warpgroup each that multiplies
//   Shared    queries 32 KiB, 6 slots of 32 KiB (head_dim 128) for tiles of keys and of values; of
//             two CTAs each 16 KiB and 5 of 16 KiB
//   Sync      load -> full[slot] -> multiply -> empty[slot] -> load; likewise queries and lists
//   Numerics  S, o and sums float32, base 2; P rounded for P v, not for its sum
//
// All query blocks of a CTA are one stream of tiles: while P v of a tile is under way, S of the
// next one is already there and goes through the softmax, also where the next tile is that of
// another query block (not under a skip rule). Queries wait in registers, as the A operand, so that
// the next ones can be loaded as soon as a block begins.
//
// The linear branch is one more tile of each block: H_i is its values, and phi(q), made from the
// queries in registers, its P. Z_i comes where its keys would. H_i lies in the rows of o that the
// block stores to; the copy engine has read it before anyone stores there, as all wait for it.
// The kernel that makes the sums is the last one before: all else is there once it has begun, so
// that a multiprocessor which it has left begins with keys and values while others still add up.
#pragma once

#include <algorithm>

#include "cuda/common/row_scan.cuh"
#include "cuda/sm90/sparse_fwd_load.cuh"
#include "cuda/sm90/sparse_fwd_load_runs.cuh"
#include "cuda/sm90/sparse_fwd_multiply.cuh"
#include "cuda/sm90/sparse_fwd_skip.cuh"
#include "cuda/sm90/sparse_fwd_skip_apart.cuh"
#include "cuda/sm90/sparse_fwd_skip_runs.cuh"
#include "cuda/sm90/tensor_map.h"

namespace sparline::cuda {

template <class Traits>
using SparseForwardSm90Keys =
    std::conditional_t<Traits::kHasRuns, SparseForwardSm90RunLoader<Traits, false>,
                       SparseForwardSm90Loader<Traits, false>>;
template <class Traits>
using SparseForwardSm90Values =
    std::conditional_t<Traits::kHasRuns, SparseForwardSm90RunLoader<Traits, true>,
                       SparseForwardSm90Loader<Traits, true>>;

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kCtas)
    sparse_forward_sm90_kernel(const __grid_constant__ SparseForwardSm90Params params) {
  if constexpr (Traits::kHasLinear) {
    admit_next_kernel();  // sums are all that the last kernel made: who loads them waits
  } else {
    begin_kernel();
  }
  SPARLINE_DYNAMIC_SHARED_ALIGNED(bytes, 1024);
  auto& shared = *reinterpret_cast<SparseForwardSm90Shared<Traits>*>(bytes);
  if (threadIdx.x == 0) {
    for (int n = 0; n < Traits::kSlots; ++n) {
      init(shared.full[n], 1);
      init(shared.empty[n], Traits::kMultiplyWarps);
    }
    init(shared.q_full, 1);
    init(shared.q_empty, Traits::kMultiplyWarps);
    for (int n = 0; n < 2; ++n) {
      init(shared.list_full[n], 1);
      init(shared.list_empty[n], 2);
      if constexpr (Traits::kVotesInRounds) {
        init(shared.votes.cast[n], Traits::kMultiplyWarps);
      }
    }
    if constexpr (Traits::kIsApart) shared.votes.init_all();
    fence_barrier_init();
  }
  if constexpr (Traits::kIsApart) {
    const int num_words = (params.forward.frame.keys.num_blocks + 31) / 32;
    for (auto w = static_cast<int>(threadIdx.x); w < (Traits::kLists - 2) * num_words;
         w += Traits::kThreads) {
      shared.lists[2 * num_words + w] = 0;
    }
  } else if constexpr (Traits::kHasRuns) {
    if (threadIdx.x == 0) shared.votes.init_all();
  }
  __syncthreads();
  if (warp_index() < 4) {
    give_back_registers<Traits::kLoadRegisters>();
    if (warp_index() == 0) {
      SparseForwardSm90Keys<Traits>(params, shared).run();
    } else if (warp_index() == 1) {
      SparseForwardSm90Values<Traits>(params, shared).run();
    } else if (warp_index() == 2) {
      look_up(params, shared);
    }
  } else {
    take_registers<Traits::kMultiplyRegisters>();
    if constexpr (Traits::kIsApart) {
      SparseForwardSm90SkipApartRows<Traits>(params, shared).run();
    } else if constexpr (Traits::kHasRuns) {
      SparseForwardSm90SkipRuns<Traits>(params, shared).run();
    } else if constexpr (Traits::kHasSkip) {
      SparseForwardSm90SkipRows<Traits>(params, shared).run();
    } else {
      SparseForwardSm90Rows<Traits>(params, shared).run();
    }
  }
}

/// What one launch is given; false where the copy engine cannot read the tensors or the lists have
/// no room. The maps of H_i: as soon as the linear tile is on.
template <class Traits>
bool describe(const SparseForward& params, SparseForwardSm90Params& p, int64_t& shared_bytes) {
  const Frame& f = params.frame;
  const auto encode = [&](CUtensorMap& map, const Rows& rows, int num_heads, const Axis& axis,
                          int box_rows) {
    return encode_rows(map, rows, params.dtype, f.batch, num_heads, axis.length, f.head_dim,
                       box_rows);
  };
  if (!encode(p.q, params.q, f.num_heads, f.queries, Traits::kTileQ) ||
      !encode(p.k, params.k, f.num_kv_heads, f.keys, Traits::kRunK) ||
      !encode(p.v, params.v, f.num_kv_heads, f.keys, Traits::kRunK) ||
      !encode_cut_rows(p.cut_v, params.v, params.dtype, f.batch, f.num_kv_heads, f.keys.length,
                       f.head_dim, Traits::kRunK)) {
    return false;
  }
  if (Traits::kHasLinear && !encode(p.sums, params.o, f.num_heads, f.queries, Traits::kRunK)) {
    return false;
  }
  if (params.linear.is_on) {
    const int64_t rows = int64_t{f.queries.num_sequences} * f.head_dim;
    const Rows ragged{.data = const_cast<bf16_t*>(params.linear.ragged_sums),
                      .stride_b = f.num_heads * rows * f.head_dim,
                      .stride_h = rows * f.head_dim,
                      .stride_n = f.head_dim,
                      .is_vectorised = true};
    if (!encode_rows(p.ragged_sums, ragged, DType::kBF16, f.batch, f.num_heads, rows, f.head_dim,
                     Traits::kRunK)) {
      return false;
    }
  }
  constexpr auto kSharedBytes = static_cast<int64_t>(sizeof(SparseForwardSm90Shared<Traits>));
  static_assert(kSharedBytes + Traits::kLists * RowScan::bytes(Traits::kMostKeyBlocks) <=
                Traits::kMostSharedBytes);
  shared_bytes = kSharedBytes + Traits::kLists * RowScan::bytes(f.keys.num_blocks);
  return f.keys.num_blocks <= Traits::kMostKeyBlocks;
}

/// False, and nothing is launched, where describe() says so. No multiprocessors: it is only asked.
template <class Traits>
bool launch_sparse_forward_sm90(const SparseForward& params, int num_multiprocessors,
                                void* stream) {
  const Frame& f = params.frame;
  SparseForwardSm90Params p{};
  p.forward = params;
  int64_t shared_bytes = 0;
  if (!describe<Traits>(params, p, shared_bytes)) return false;
  p.forward.scale_log2 = std::max(params.scale * kLog2E, kLeastScale);
  p.threshold_log2 = static_cast<float>(params.skip.log_threshold) * kLog2E;
  p.num_blocks = params.wave.count * f.group() * f.queries.num_blocks;
  launch(sparse_forward_sm90_kernel<Traits>,
         {.blocks = std::min(p.num_blocks, num_multiprocessors * Traits::kCtas),
          .threads = Traits::kThreads,
          .shared_bytes = shared_bytes},
         stream, p);
  return true;
}

template <int kHeadDim, Tiles kTiles, int kTileQ = 128>
bool sparse_forward_sm90(const SparseForward& params, int num_multiprocessors, void* stream) {
  return params.dtype == DType::kBF16
             ? launch_sparse_forward_sm90<SparseForwardSm90Traits<bf16, kHeadDim, kTiles, kTileQ>>(
                   params, num_multiprocessors, stream)
             : launch_sparse_forward_sm90<SparseForwardSm90Traits<fp16, kHeadDim, kTiles, kTileQ>>(
                   params, num_multiprocessors, stream);
}

}  // namespace sparline::cuda
