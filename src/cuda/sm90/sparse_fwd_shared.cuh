// SPDX-License-Identifier: Apache-2.0
//
// What the parts of the Hopper forward share: tile sizes, shared memory, parameters
// (sparse_fwd.cuh).
#pragma once

#include "cuda/common/tile.cuh"
#include "cuda/kernels.h"
#include "cuda/sm90/ptx.cuh"
#include "cuda/sm90/ring.cuh"

namespace sparline::cuda {

template <class T_, int kHeadDim_, bool kHasLinear_>
struct SparseForwardSm90Traits {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kHasLinear = kHasLinear_;  // whether blocks end with a linear tile
  static constexpr int kTileQ = 128, kTileK = 128, kRunK = 64;
  static constexpr int kSlices = kHeadDim / 64;  // of 64 columns, one behind the other
  static constexpr int kSlots = kHeadDim == 64 ? 12 : 6;
  // Whether the warpgroups start their products one after the other, so that the softmax of one
  // runs beside the products of the other: 17 % faster at head_dim 64, where the exponentials take
  // as long as the products, and 1 % slower at 128 (docs/performance-log.md).
  static constexpr bool kTakesTurns = kHeadDim == 64;
  static constexpr int kThreads = 384, kMultiplyWarps = 8;
  // Lists are two blocks ahead of the loads, and these half as many as there are slots.
  static constexpr int kPlaces = 15;
  static_assert(kPlaces > kSlots / 2 + 4 && kPlaces % 3 == 0);
  static constexpr int kLoadRegisters = 40, kMultiplyRegisters = 232;
  static constexpr int kSliceBytesQ = kTileQ * 128, kSliceBytesK = kTileK * 128;
  static_assert(kHeadDim % 64 == 0 && kHeadDim <= 128);
};

/// A query block, for those who load and multiply.
struct BlockPlace {
  int32_t b, h, h_kv;
  int32_t begin, rows;
  int32_t mean;    // of its keys: row of k_mean
  int32_t z;       // its row of sums_z; -1: it has no linear tile
  int32_t ragged;  // which matrix of ragged_sums is its H_i; -1: H_i lies in o
};

/// What those who load say of a tile of keys.
struct TileInfo {
  uint32_t num_keys;  // of the first run, and 256 times those of the second; kEnd: no more tiles
  int32_t block;      // whether a query block begins: its entry in `places`, else -1; or kLinear
  static constexpr uint32_t kEnd = 255, kFull = 64 + 256 * 64;
  static constexpr int32_t kLinear = -2;  // the linear tile: Z_i among the keys, H_i as values

  __device__ bool has_second() const { return num_keys >= 256; }
};

template <class Traits>
struct SparseForwardSm90Shared {
  using T = typename Traits::T;
  T q[Traits::kTileQ * Traits::kHeadDim];
  T slots[Traits::kSlots][Traits::kTileK * Traits::kHeadDim];
  Barrier full[Traits::kSlots], empty[Traits::kSlots];
  Barrier q_full, q_empty, list_full[2], list_empty[2];
  TileInfo infos[Traits::kSlots];
  int32_t list_block[2];  // whose list it is: entry in `places`; -1: no more
  BlockPlace places[Traits::kPlaces];
  float lse_shift[3][Traits::kTileQ];  // with k_mean, of blocks by turn: scale q_r . k_mean
  uint32_t lists[1];  // two of RowScan's bits: the critical blocks of a query block
};

struct SparseForwardSm90Params {
  CUtensorMap q, k, v;
  CUtensorMap cut_v;              // for load_cut_box()
  CUtensorMap sums, ragged_sums;  // with a linear tile: H_i in o, and elsewhere
  SparseForward forward;
  int32_t num_blocks;  // query blocks of all heads
};

}  // namespace sparline::cuda
