// SPDX-License-Identifier: Apache-2.0
//
// What the parts of the Hopper forward share: tile sizes, shared memory, parameters
// (sparse_fwd.cuh).
#pragma once

#include "cuda/common/tile.cuh"
#include "cuda/kernels.h"
#include "cuda/sm90/ptx.cuh"
#include "cuda/sm90/ring.cuh"
#include "cuda/sm90/tiles.h"

namespace sparline::cuda {

template <class T_, int kHeadDim_, Tiles kTiles>
struct SparseForwardSm90Traits {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kHasLinear = kTiles == Tiles::kLinear;
  static constexpr bool kHasSkip = kTiles == Tiles::kSkipped;
  static constexpr int kTileQ = 128, kTileK = 128, kRunK = 64;
  static constexpr int kSlices = kHeadDim / 64;  // of 64 columns, one behind the other
  static constexpr int kSlots = kHeadDim == 64 ? 12 : 6;
  // Whether the warpgroups start their products one after the other, so that the softmax of one
  // runs beside the products of the other: 17 % faster at head_dim 64, where the exponentials take
  // as long as the products, and 1 % slower at 128 (docs/performance-log.md). At 128 with a skip
  // rule: not timed yet.
  static constexpr bool kSkipTakesTurns = false;
  // With a skip rule: whether a warp that does without a run waits for the others' votes. If not,
  // it makes P anyway, beside the other warpgroup's products.
  static constexpr bool kSkipWaits = true;
  static constexpr bool kTakesTurns = kHeadDim == 64 || (kHasSkip && kSkipTakesTurns);
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
  int32_t z;       // its row of sums_z; -1: it has no linear tile. With a skip rule: of row_votes
  int32_t ragged;  // which matrix of ragged_sums is its H_i; -1: H_i lies in o. With a skip rule:
                   // 0, or -1 for a protected block
};

/// What those who load say of a tile.
struct TileInfo {
  uint32_t num_keys;  // of the first run, and 256 times those of the second; kEnd: no more tiles
  int32_t block;      // whether a query block begins: its entry in `places`, else -1; or kLinear
  static constexpr uint32_t kEnd = 255, kFull = 64 + 256 * 64;
  static constexpr int32_t kLinear = -2;  // the linear tile: Z_i among the keys, H_i as values
  // With a skip rule: num_keys of a tile of values, the runs that stay.
  static constexpr uint32_t kFirstStays = 1, kSecondStays = 2;

  __device__ bool has_second() const { return num_keys >= 256; }
};

/// How the warps that multiply vote on a tile under a skip rule: which of their rows want a run.
template <bool kHasSkip>
struct Votes {};
template <>
struct Votes<true> {
  static constexpr int kWarps = 8;
  // Votes on the first run, on the second one if the first stays, and if it does not: the limits
  // are then different ones under SkipReference::kKeptLse, and else only the former are cast.
  static constexpr int kFirst = 0, kSecond = 1, kSecondAlone = 2, kKinds = 3;
  // A vote: a bit for each row g and g + 8, 4 g and 4 g + 1, and one that tells it from none.
  static constexpr uint32_t kRows = 0x11111111, kIsCast = 4;
  int num_passes;  // rows of the query block so far that did without a run
  // Tiles by turns. The warp that loads values clears a tile's words when it has counted them all,
  // and only then lets anybody have the values of the next tile. As each warp waits for these
  // before it votes on the tile after that, no vote meets another one in its place.
  uint32_t words[2][kKinds][kWarps];
  // What becomes of a tile, as soon as it is sure: TileInfo's bits for the runs that stay, those of
  // which it is known, and one that changes from use to use. By turns like the votes: the next use
  // comes after each warp's vote on the tile between.
  static constexpr uint32_t kFirstKnown = 4, kSecondKnown = 8, kUse = 16;
  uint32_t decisions[2];
  __device__ static uint32_t use_of(uint32_t turn) { return (turn & 2) != 0 ? 0 : kUse; }
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
  Votes<Traits::kHasSkip> votes;
  uint32_t lists[1];  // two of RowScan's bits, the critical blocks of a query block; with a skip
                      // rule a third one, the blocks that stay
};

struct SparseForwardSm90Params {
  CUtensorMap q, k, v;
  CUtensorMap cut_v;              // for load_cut_box()
  CUtensorMap sums, ragged_sums;  // with a linear tile: H_i in o, and elsewhere
  SparseForward forward;
  int32_t num_blocks;    // query blocks of all heads
  float threshold_log2;  // of a skip rule
};

}  // namespace sparline::cuda
