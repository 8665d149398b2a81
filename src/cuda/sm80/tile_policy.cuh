// SPDX-License-Identifier: Apache-2.0
//
// What takes rows of a query block out of a tile of scores, and the record of it: tile bits, and
// the skip rule (BLASST, DynSparse)
//   max S - m < log_threshold  or  max S - ln l < log_threshold,  in all rows that decide together
#pragma once

#include "cuda/sm80/sparse_fwd.cuh"  // QueryPlace

namespace sparline::cuda {

/// Scores of a warp: kMTiles tiles of 16 rows, kNTiles of 8 keys, fragments C each.
template <int kMTiles, int kNTiles>
using Scores = float[kMTiles][kNTiles][4];

/// The largest score of row `half` of a lane.
template <int kNTiles>
__device__ __forceinline__ float row_top(const float (&s)[kNTiles][4], int half) {
  float top = s[0][half * 2];
#pragma unroll
  for (int n = 0; n < kNTiles; ++n) top = fmaxf(top, fmaxf(s[n][half * 2], s[n][half * 2 + 1]));
  return quad_max(top);
}
/// Columns past the last key: S = -inf.
template <int kMTiles, int kNTiles>
__device__ __forceinline__ void mask_keys(Scores<kMTiles, kNTiles>& s, int num_keys) {
  if (num_keys == kNTiles * 8) return;
#pragma unroll
  for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (n * 8 + lane_index() % 4 * 2 + e % 2 < num_keys) continue;
#pragma unroll
      for (int mt = 0; mt < kMTiles; ++mt) s[mt][n][e] = -INFINITY;
    }
  }
}

/// Traits: kTileQ, kMTiles, kWarps, kThreads.
template <class Traits>
class TilePolicy {
  static constexpr int kMTiles = Traits::kMTiles;
  static constexpr int kBlockMTiles = Traits::kTileQ / 16;

 public:
  /// What all threads share, beside the words of kept_bits.
  struct Shared {
    uint32_t groups[kBlockMTiles];   // of each m-tile: the m-tiles of its group, as bits
    uint8_t votes[2][kBlockMTiles];  // whether an m-tile wants the key block, in turn
    int row_votes[Traits::kWarps];   // rows that did not
    float threshold_log2;
  };
  /// Shared memory of kept_bits while they are collected: (groups, words of T_n bits).
  static int64_t kept_bytes(const SparseForward& params) {
    if (params.skip.reference == SkipReference::kNone) return 0;
    return kBlockMTiles * RowScan::bytes(params.frame.keys.num_blocks);
  }

  __device__ TilePolicy(const SparseForward& params, const QueryPlace& at, Shared& shared,
                        uint32_t* kept)
      : p_(params), at_(at), shared_(shared), kept_(kept), m_tile_(warp_index() * kMTiles) {}

  __device__ bool has_skip() const { return p_.skip.reference != SkipReference::kNone; }

  /// All threads; ends with a barrier.
  __device__ void start() const {
    if (!has_skip()) return;
    const int thread = static_cast<int>(threadIdx.x);
    const int words = p_.kept_bits.groups * num_words();
    for (int w = thread; w < words; w += Traits::kThreads) kept_[w] = 0;
    if (thread < kBlockMTiles) {
      const int tiles = (p_.skip.rows + 15) / 16;
      shared_.groups[thread] = ((1u << tiles) - 1u) << (thread / tiles * tiles);
    }
    if (thread < Traits::kWarps) shared_.row_votes[thread] = 0;
    if (thread == 0) shared_.threshold_log2 = static_cast<float>(p_.skip.log_threshold) * kLog2E;
    __syncthreads();
  }

  /// Rows of a lane that take no part in a tile: bit 2 mt + half.
  using Rows = uint32_t;
  static constexpr Rows kAllRows = (1u << (2 * kMTiles)) - 1u;

  /// Tile bits: the rows that do not see key block j. `is_forced`: one of the two blocks is
  /// protected.
  __device__ Rows unseen(int32_t j, bool is_forced) const {
    Rows out = 0;
    if (p_.tile_bits.data == nullptr || is_forced) return out;
#pragma unroll
    for (int n = 0; n < 2 * kMTiles; ++n) {
      const int r = row_of(n / 2, n % 2);
      const bool is_seen = r < at_.block.rows && row_bit(p_.tile_bits, at_.b, at_.h, at_.i, r, j);
      if (!is_seen) out |= 1u << n;
    }
    return out;
  }

  /// The skip rule: rows vote, groups of p_.skip.rows decide (all warps, over a barrier): the rows
  /// of groups that do without the tile. `tops`: the largest score of each row in the tile; tops
  /// and row_max (m) in log2 units; row_sum is 2^sum_log2 l, of this lane's columns. `turn`: 0 and
  /// 1 from tile to tile, as a warp that is ahead votes on the next while others still count.
  __device__ Rows skipped(int32_t j, bool is_forced, const float (&tops)[kMTiles][2],
                          const float (&row_max)[kMTiles][2], const float (&row_sum)[kMTiles][2],
                          float sum_log2, int turn) const {
    const bool is_lse = p_.skip.reference == SkipReference::kKeptLse;
    int num_passes = 0;
#pragma unroll
    for (int mt = 0; mt < kMTiles; ++mt) {
      bool is_wanted = false;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float above = tops[mt][half] - row_max[mt][half] - shared_.threshold_log2;
        const bool passes =
            is_lse ? exp2_approx(above + sum_log2) < quad_sum(row_sum[mt][half]) : above < 0.0f;
        const bool is_row = row_of(mt, half) < at_.block.rows;
        is_wanted |= is_row && !passes;
        num_passes += __popc(__ballot_sync(kAllLanes, is_row && passes));
      }
      is_wanted = __any_sync(kAllLanes, is_wanted);
      if (lane_index() == 0) shared_.votes[turn][m_tile_ + mt] = is_wanted;
    }
    // Four lanes voted for each row.
    if (lane_index() == 0 && !is_forced) shared_.row_votes[warp_index()] += num_passes / 4;
    __syncthreads();
    const uint32_t wanted = __ballot_sync(
        kAllLanes, lane_index() < kBlockMTiles && shared_.votes[turn][lane_index()] != 0);
    Rows out = 0;
#pragma unroll
    for (int mt = 0; mt < kMTiles; ++mt) {
      const int m_tile = m_tile_ + mt;
      const uint32_t group = shared_.groups[m_tile];
      const bool is_kept = ((group & wanted) != 0 || is_forced) && m_tile * 16 < at_.block.rows;
      // The first m-tile of a group speaks for it: each group has one writer.
      if (is_kept && __ffs(static_cast<int>(group)) - 1 == m_tile && lane_index() == 0) {
        kept_[m_tile * 16 / p_.skip.rows * num_words() + j / 32] |= 1u << (j % 32);
      }
      if (!is_kept) out |= 3u << (2 * mt);
    }
    return out;
  }

  /// Stores kept_bits and row_votes. All threads, after a barrier.
  __device__ void finish() const {
    if (!has_skip()) return;
    const TileBits& bits = p_.kept_bits;
    const int num_bytes = (p_.frame.keys.num_blocks + 7) / 8;
    for (int idx = static_cast<int>(threadIdx.x); idx < bits.groups * num_bytes;
         idx += Traits::kThreads) {
      const int group = idx / num_bytes, byte = idx % num_bytes;
      bits.data[bits.offset(at_.b, at_.h, at_.i, group, int64_t{byte} * 8)] =
          static_cast<uint8_t>(kept_[group * num_words() + byte / 4] >> (byte % 4 * 8));
    }
    if (p_.row_votes == nullptr || threadIdx.x != 0) return;
    int total = 0;
    for (int w = 0; w < Traits::kWarps; ++w) total += shared_.row_votes[w];
    p_.row_votes[(int64_t{at_.b} * p_.frame.num_heads + at_.h) * p_.frame.queries.num_blocks +
                 at_.i] = static_cast<float>(total);
  }

 private:
  __device__ int num_words() const { return (p_.frame.keys.num_blocks + 31) / 32; }
  /// The row of the block that element 2 half, 2 half + 1 of m-tile mt belongs to.
  __device__ int row_of(int mt, int half) const {
    return (m_tile_ + mt) * 16 + half * 8 + lane_index() / 4;
  }

  const SparseForward& p_;
  const QueryPlace& at_;
  Shared& shared_;
  uint32_t* const kept_;
  const int m_tile_;  // of the block, the warp's first
};

}  // namespace sparline::cuda
