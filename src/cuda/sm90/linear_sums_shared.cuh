// SPDX-License-Identifier: Apache-2.0
//
// What the parts of the sums of states on Hopper share: sizes, shared memory, parameters
// (linear_sums.cuh).
#pragma once

#include "cuda/common/tile.cuh"
#include "cuda/kernels.h"
#include "cuda/sm90/ptx.cuh"
#include "cuda/sm90/ring.cuh"

namespace sparline::cuda {

template <class T_, int kHeadDim_>
struct LinearSumsTraits {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_;     // and features
  static constexpr int kSlices = kHeadDim / 64;  // of 64 columns, one behind the other
  static constexpr int kRunK = 64;               // keys of a block, at most
  static constexpr int kKeySlots = kHeadDim == 64 ? 8 : 4;
  static constexpr int kSumSlots = 4;
  static constexpr int kTileM = 128, kTileN = 128, kChunk = 64;  // of the product
  static constexpr int kAnnouncements = 4;  // of states, by each warpgroup, under way
  static constexpr int kSliceBytes = kRunK * 128;
  static constexpr int kThreads = 640, kSumWarps = 8;
  static constexpr int kLoadRegisters = 32, kStateRegisters = 104, kSumRegisters = 120;
  static_assert(kHeadDim % 64 == 0 && kHeadDim <= 128);
  // A slot always serves the same of two warpgroups: one that has not waited for the phase before
  // would take it for the next one's.
  static_assert(kKeySlots % 2 == 0);
};

template <class Traits>
struct LinearSumsShared {
  using T = typename Traits::T;
  struct KeySlot {  // of a block of keys
    T k[Traits::kRunK * Traits::kHeadDim];
    T v[Traits::kRunK * Traits::kHeadDim];
  };
  using SumSlot = bf16[Traits::kChunk * Traits::kTileN];  // states of a chunk, by slices
  T weight[Traits::kHeadDim * Traits::kHeadDim];          // W, by slices
  KeySlot key_slots[Traits::kKeySlots];
  SumSlot sum_slots[Traits::kSumSlots];
  float mean[2][Traits::kHeadDim];  // of the keys, for either warpgroup that makes states
  Barrier key_full[Traits::kKeySlots], key_empty[Traits::kKeySlots];
  Barrier sum_full[Traits::kSumSlots], sum_empty[Traits::kSumSlots];
  Barrier stored[2][Traits::kAnnouncements], announced[2][Traits::kAnnouncements];
};
static_assert(sizeof(LinearSumsShared<LinearSumsTraits<bf16, 128>>) <= 227 * 1024);

/// A thread of a product holds two of every eight columns of a row; a state keeps each 32 columns
/// in that order, lane by lane: what lane t holds of the eights m = 0..3 is columns 8 t + 2 m and
/// 8 t + 2 m + 1 of the stored row. The order is its own inverse: a thread of the product with
/// states finds, in its twos of every eight, eight neighbouring columns.
struct LinearSumsParams {
  CUtensorMap k, v, states, z;
  CUtensorMap cut_states, cut_z;  // for load_cut_box()
  LinearParams linear;
  Rows o;                      // out: row f of H_i is row begin + f
  bf16* ragged = nullptr;      // out (B, H, sequences, D, D): of blocks of fewer rows than features
  float* sums_z = nullptr;     // out (B, H, T_m, D); NaN where E_i is empty
  bf16* state_data = nullptr;  // (slots, T_n, D D)
  bf16* z_data = nullptr;      // (slots, T_n, D)
  uint2* bits = nullptr;       // (heads, tiles_m, chunks, kTileM): E_i, see make_bits
  float* empty_rows = nullptr;      // (heads, tiles_m kTileM): NaN where E_i is empty, else 0
  uint32_t* bits_made = nullptr;    // warps that have made their rows of bits
  uint32_t* chunk_ready = nullptr;  // (pairs, chunks): states that are there
  uint32_t* pair_done = nullptr;    // (pairs): tiles of the product, once by each warpgroup
  int32_t num_units = 0;            // states
  int32_t num_tiles = 0;            // of the product
  int32_t tiles_m = 0, tiles_n = 0, chunks = 0;
  int32_t slots = 0;  // pairs whose states are there at a time
};

/// The sums of a tile that are of one sequence, rows [first, last), and the key blocks [begin, end)
/// that they add up, in chunks from `begin` on: states of another sequence may be infinite or NaN,
/// which the zeros of a map would not take away.
struct SumRange {
  int32_t first = 0, last = 0, begin = 0, end = 0;

  template <class Traits>
  __device__ int32_t num_chunks() const {
    return (end - begin + Traits::kChunk - 1) / Traits::kChunk;
  }
};
/// Goes on to the next sequence of the tile, from SumRange{} on; false if there is none. All lanes
/// of a warp call it.
template <class Traits>
__device__ __forceinline__ bool next_range(const LinearSumsParams& params, int32_t tile_m,
                                           SumRange& range) {
  const Axis& queries = params.linear.frame.queries;
  const int32_t num_rows = min(Traits::kTileM, queries.num_blocks - tile_m * Traits::kTileM);
  if (range.last >= num_rows) return false;
  range.first = range.last;
  range.last = num_rows;
  range.end = queries.num_other_blocks;
  if (queries.table == nullptr) return true;
  const BlockInfo* const blocks = queries.table + tile_m * Traits::kTileM;
  const BlockInfo block = blocks[range.first];
  range.begin = block.other_begin;
  range.end = max(block.other_begin, block.other_end);
  for (int32_t n = range.first; n < num_rows; n += kWarpSize) {
    const int32_t own = min(n + lane_index(), num_rows - 1);
    const uint32_t others = __ballot_sync(kAllLanes, blocks[own].sequence != block.sequence);
    if (others == 0) continue;
    range.last = n + __ffs(static_cast<int>(others)) - 1;
    break;
  }
  return true;
}

/// A tile of the product. Tiles that share their states are neighbours.
struct SumTile {
  int32_t head, n, m;
  __device__ SumTile(const LinearSumsParams& params, int32_t idx) {
    m = idx % params.tiles_m;
    idx /= params.tiles_m;
    n = idx % params.tiles_n;
    head = idx / params.tiles_n;
  }
};

}  // namespace sparline::cuda
