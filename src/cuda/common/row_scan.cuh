// SPDX-License-Identifier: Apache-2.0
//
// Which key blocks a query block attends: its row of the block map as bits in shared memory, and a
// cursor that walks them tile by tile.
#pragma once

#include "cuda/common/tile.cuh"

namespace sparline::cuda {

/// Whether row r of query block i sees key block j.
__device__ __forceinline__ bool row_bit(const TileBits& bits, int64_t b, int64_t h, int64_t i,
                                        int32_t r, int32_t j) {
  return bits.data[bits.offset(b, h, i, r / bits.rows, j)] >> (j % 8) & 1;
}

/// One bit for each key block.
class RowScan {
 public:
  SPARLINE_HOST_DEVICE static constexpr int64_t bytes(int32_t num_blocks) {
    return (int64_t{num_blocks} + 31) / 32 * 4;
  }

  __device__ RowScan(uint32_t* words, int32_t num_blocks)
      : words_(words), num_words_((num_blocks + 31) / 32) {}

  /// Sets the bits of the blocks that are critical for any row of query block i. All kThreads
  /// threads call it; ends with a barrier.
  template <int kThreads>
  __device__ void fill(const Frame& frame, const PairMap& map, const TileBits& bits, int64_t b,
                       int64_t h, int32_t i, const BlockInfo& block) const {
    for (int w = warp_index(); w < num_words_; w += kThreads / kWarpSize) {
      const int32_t j = w * 32 + lane_index();
      bool is_critical = j >= block.other_begin && j < block.other_end;
      if (is_critical && !block.is_protected && (map.data != nullptr || bits.data != nullptr)) {
        const bool is_protected = frame.keys.table != nullptr && frame.keys.table[j].is_protected;
        is_critical = map.sparse_weight(b, h, i, j, is_protected) > 0.0f;
        if (is_critical && bits.data != nullptr && !is_protected) {
          bool is_seen = false;
          for (int32_t r = 0; r < block.rows && !is_seen; r += bits.rows) {
            is_seen = row_bit(bits, b, h, i, r, j);
          }
          is_critical = is_seen;
        }
      }
      const uint32_t word = __ballot_sync(kAllLanes, is_critical);
      if (lane_index() == 0) words_[w] = word;
    }
    __syncthreads();
  }

  __device__ bool has(int32_t j) const { return words_[j / 32] >> (j % 32) & 1; }
  /// The first set bit at or after j; `end` if there is none before it.
  __device__ int32_t next(int32_t j, int32_t end) const {
    while (j < end) {
      const uint32_t rest = words_[j / 32] >> (j % 32);
      if (rest != 0) {
        j += __ffs(static_cast<int>(rest)) - 1;
        return j < end ? j : end;
      }
      j = (j / 32 + 1) * 32;
    }
    return end;
  }
  __device__ int num_words() const { return num_words_; }
  __device__ uint32_t* end() const { return words_ + num_words_; }

 private:
  uint32_t* words_;
  int num_words_;
};

/// A run of keys of one key block.
struct KeyTile {
  int32_t block;      // j
  int32_t first_key;  // position
  int32_t num_keys;
  bool is_protected;  // the key block is
};

/// Walks the attended key blocks of a query block in tiles of at most kTileKeys keys: ascending, or
/// as `order` (T_n, a permutation) says. One thread works the tiles out and hands them to all
/// through shared memory: the loops that use it have no register to spare for a cursor.
template <int kTileKeys>
struct TileQueue {
  KeyTile tiles[3];  // the current one, the next, the one being worked out; num_keys 0: no more
  int32_t at, end;   // the cursor: position in the order, or key block
  int32_t first_key, end_key, block;
  bool is_protected;

  /// Called by thread 0, then a barrier.
  __device__ void start(const RowScan& scan, const Axis& keys, const BlockInfo& query,
                        const int32_t* order) {
    at = order == nullptr ? query.other_begin - 1 : -1;
    end = order == nullptr ? query.other_end : keys.num_blocks;
    first_key = end_key = 0;
    tiles[0] = pop(scan, keys, order);
    tiles[1] = pop(scan, keys, order);
  }
  __device__ KeyTile pop(const RowScan& scan, const Axis& keys, const int32_t* order) {
    if (first_key >= end_key) {
      if (order == nullptr) {
        at = scan.next(at + 1, end);
      } else {
        do {
          ++at;
        } while (at < end && !scan.has(order[at]));
      }
      if (at >= end) {
        at = end;
        return {};
      }
      block = order == nullptr ? at : order[at];
      const BlockInfo info = keys.block(block);
      first_key = info.begin;
      end_key = info.begin + info.rows;
      is_protected = info.is_protected != 0;
    }
    const int32_t rest = end_key - first_key;
    const KeyTile tile{block, first_key, rest < kTileKeys ? rest : kTileKeys, is_protected};
    first_key += kTileKeys;
    return tile;
  }
};

}  // namespace sparline::cuda
