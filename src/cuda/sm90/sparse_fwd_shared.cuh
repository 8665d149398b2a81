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

template <class T_, int kHeadDim_, Tiles kTiles, int kTileQ_>
struct SparseForwardSm90Traits {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_, kTileQ = kTileQ_;
  static constexpr int kCtas = 128 / kTileQ;  // of a multiprocessor
  static constexpr int32_t kMostKeyBlocks = most_key_blocks(kTiles, kHeadDim, kTileQ);
  static constexpr bool kHasLinear = kTiles == Tiles::kLinear;
  // Whether a skip rule's votes are counted at a barrier of each warpgroup, and values asked for,
  // as in sparse_fwd_skip_apart.cuh; or runs have places of their own, as in
  // sparse_fwd_skip_runs.cuh; else as in sparse_fwd_skip.cuh.
  static constexpr bool kIsApart = kTiles == Tiles::kSkippedApart;
  static constexpr bool kHasRuns = kTiles == Tiles::kSkippedRuns;
  static constexpr bool kVotesInRounds = kTiles == Tiles::kSkipped;
  static constexpr bool kHasSkip = kIsApart || kHasRuns || kVotesInRounds;
  // Keys of a tile: two runs of up to kRunK keys, or one where half of shared memory has no room
  // for more.
  static constexpr int kRunK = 64;
  static constexpr int kTileK = kHasRuns || (kCtas == 2 && kHeadDim == 128) ? kRunK : 2 * kRunK;
  static constexpr int kSlices = kHeadDim / 64;  // of 64 columns, one behind the other
  // With kHasRuns: slots of runs of keys, two a tile, and as many of values; and votes that are
  // kept, up to two a tile. Those on tile t are cast when the keys of tile t + 1 are there. By then
  // who multiplies has given back those of tile t + 1 - kKeySlots / 2, and has decided upon all
  // before; the warp that loads values has decided upon tile t + 1 - kTurns / 2, for which keys
  // wait.
  static constexpr int kKeySlots = kHeadDim == 64 ? 8 : 6;
  static constexpr int kTurns = kHeadDim == 64 ? 16 : 8;
  static_assert(kTurns >= kKeySlots && kKeySlots % 2 == 0 && kTurns % 2 == 0);
  static constexpr int kSlots =
      kHasRuns ? 2 * kKeySlots
               : (kCtas == 2 ? (kHeadDim == 64 ? 6 : 5) : (kHeadDim == 64 ? 12 : 6));
  // Whether the warpgroups start their products one after the other, so that the softmax of one
  // runs beside the products of the other: 17 % faster at head_dim 64, where the exponentials take
  // as long as the products, and 1 % slower at 128 (docs/performance-log.md).
  static constexpr bool kTakesTurns = kHeadDim == 64 && kCtas == 1 && !kHasRuns;
  static constexpr int kMultiplyWarps = kTileQ / 16, kThreads = (4 + kMultiplyWarps) * kWarpSize;
  // Lists are two blocks ahead of the loads, and these half as many as there are slots.
  static constexpr int kPlaces = (kHasRuns || kVotesInRounds) && kHeadDim == 128 ? 12 : 15;
  static_assert(kPlaces > kSlots / 2 + 4 && kPlaces % 3 == 0);
  // Bits of key blocks: two of critical ones; with a skip rule, of those that stay.
  static constexpr int kLists = kIsApart ? 4 : (kHasSkip ? 3 : 2);
  static constexpr int kLoadRegisters = 40, kMultiplyRegisters = kCtas == 2 ? 216 : 232;
  static constexpr int64_t kMostSharedBytes = (kCtas == 2 ? 113 : 227) * 1024;
  static constexpr int kSliceBytesQ = kTileQ * 128, kSliceBytesK = kTileK * 128;
  static_assert(kHeadDim % 64 == 0 && kHeadDim <= 128 && (kTileQ == 64 || kTileQ == 128));
  static_assert(kCtas == 1 || (!kHasSkip && (!kHasLinear || kHeadDim <= kTileK / 2)));
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

/// What those who load say of a tile of keys.
struct TileInfo {
  uint32_t num_keys;  // of the first run, and 256 times those of the second; kEnd: no more tiles
  int32_t block;      // whether a query block begins: its entry in `places`, else -1; or a name
  static constexpr uint32_t kEnd = 255, kFull = 64 + 256 * 64;
  static constexpr int32_t kLinear = -2;  // the linear tile: Z_i among the keys, H_i as values
  static constexpr int32_t kLast = -3;    // the last one before that, of one run, and not the first
  // In num_keys with a skip rule, above the counts: runs that nobody is asked about.
  static constexpr uint32_t kIsKept = 1u << 16, kIsSecondKept = 1u << 17, kCounts = (1u << 16) - 1;

  __device__ bool has_second() const { return num_keys >= 256; }
  __device__ bool has_second_run() const { return (num_keys & kCounts) >= 256; }  // skip rule
};

/// How the warps that multiply vote on a tile under a skip rule: in round 0 on both of its runs, in
/// round 1, if both are wanted, on the second one once more.
template <bool kHasSkip>
struct Votes {};
template <>
struct Votes<true> {
  static constexpr int kWarps = 8;
  // A vote: wishes, and how many of the warp's rows do without each run.
  static constexpr uint32_t kWantsFirst = 1, kWantsSecond = 2;
  static constexpr int kPassesFirst = 8, kPassesSecond = 16;  // shifts
  int num_passes;                                             // rows of the query block so far
  Barrier cast[2];                                            // by round
  alignas(16) uint32_t words[2][2][kWarps];                   // by round; by turns
};

/// What warpgroups tell the warp that loads values, where each decides for its own 64 rows of a
/// query block, and what they keep count of.
template <int kSlots, int kPlaces>
struct Wishes {
  // A wish: its tile is known by the parity of the slot that the values would take.
  static constexpr uint32_t kWantsFirst = 1, kWantsSecond = 2;
  static constexpr int kParity = 2;  // shift
  uint32_t words[kSlots][2];         // by slot of values, by warpgroup
  Barrier second_full[kSlots];       // of values of second runs; `full` is of first ones
  int32_t blocks[2][kSlots][2];      // of a tile's runs, by its keys' slot; -1: no keys
  uint32_t tallies[kPlaces];         // by query block: votes, and kWarp for each warp
  static constexpr uint32_t kWarp = 1u << 28;

  /// One thread, before fence_barrier_init().
  __device__ void init_all() {
    for (int n = 0; n < kSlots; ++n) {
      init(second_full[n], 1);
      words[n][0] = words[n][1] = (n == 0 ? 0u : 1u) << kParity;
    }
    arrive(second_full[0]);  // The slot's first use is by keys.
    for (int n = 0; n < kPlaces; ++n) tallies[n] = 0;
  }
};

/// Votes of sparse_fwd_skip_runs.cuh.
template <int kTurns_, int kPlaces>
struct RunVotes {
  static constexpr int kWarps = 8;
  // Each vote of the CTA has a number, from 1 on: kOne times it, and what the warp wants. It takes
  // the place of that of kTurns votes before, which nobody looks at any more:
  // SparseForwardSm90Traits.
  static constexpr uint32_t kWantsFirst = 1, kWantsSecond = 2, kOne = 4;
  static constexpr int kTurns = kTurns_;
  uint32_t words[kTurns][kWarps];
  // Of query blocks by their place: rows that did without a run, and above kCountBits the warps
  // that have added theirs.
  static constexpr int kCountBits = 28;
  uint32_t num_passes[kPlaces];
  uint32_t num_decided;  // tiles that the warp which loads values has decided upon

  /// One thread, before anyone looks.
  __device__ void init_all() {
    num_decided = 0;
    for (auto& turn : words) {
      for (uint32_t& word : turn) word = 0;
    }
  }
};

/// Whether any warp has this wish: known with the first one, or with the last vote. The same for
/// all lanes. `vote`: one without wishes; `turn`: its place; `wishes`: those of the lane's warp, if
/// its vote is there, as those of all warps are where nobody has this wish.
template <uint32_t kWish, class Votes>
__device__ __forceinline__ bool wait_for_wish(const Votes& votes, uint32_t vote, uint32_t turn,
                                              uint32_t& wishes) {
  [[maybe_unused]] int num_polls = 0;
  while (true) {
    // Of this vote less than kOne, of one before a large number.
    wishes = posted(votes.words[turn][lane_index() % Votes::kWarps]) - vote;
    const bool is_there = wishes < Votes::kOne;
    const bool is_wished = __any_sync(kAllLanes, is_there && (wishes & kWish) != 0) != 0;
    const bool are_there = __all_sync(kAllLanes, is_there) != 0;
    if (is_wished || are_there) return is_wished;
#ifdef SPARLINE_WATCHDOG
    if (++num_polls > SPARLINE_WATCHDOG) __trap();
#endif
  }
}

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
  std::conditional_t<Traits::kIsApart, Wishes<Traits::kSlots, Traits::kPlaces>,
                     std::conditional_t<Traits::kHasRuns, RunVotes<Traits::kTurns, Traits::kPlaces>,
                                        Votes<Traits::kVotesInRounds>>>
      votes;
  uint32_t lists[1];  // two of RowScan's bits, the critical blocks of a query block; with a skip
                      // rule a third one, the blocks that stay; or one for each warpgroup
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
