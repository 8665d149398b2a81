// SPDX-License-Identifier: Apache-2.0
//
// The sparse branch of one query block, forward. Over its critical key blocks j
//     S = scale q_i k_j^T,  o_s = softmax(S) v,  lse = ln sum exp S
// with an online softmax: running maximum m and sum l per row, both of S log2(e).
//
// One CTA, one query block of one head. Each warp owns kWarpRows query rows and all keys of a tile:
// S and P stay in registers, P is the A operand of P V as it is. With 32 rows to a warp a K or V
// fragment read from shared memory serves two mma; shared memory, 128 bytes a clock, is what limits
// mma.sync on large chips.
//
// What may happen to a tile between S and P (kHasPolicy): a weight m of a soft map, bits that take
// rows out, a skip rule. A row that takes no part has P = 0 in that tile.
#pragma once

#include <algorithm>

#include "cuda/common/query_place.cuh"
#include "cuda/common/row_scan.cuh"
#include "cuda/common/tile.cuh"
#include "cuda/kernels.h"

namespace sparline::cuda {

/// kStages 1: V arrives during Q K^T and the next K during P V, at two barriers a tile. 2: the next
/// K and V arrive during the whole of a tile, at one barrier.
template <class T_, int kHeadDim_, int kTileQ_, int kTileK_, int kWarpRows_, int kStages_,
          bool kHasPolicy_>
struct SparseForwardTraits {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_, kTileQ = kTileQ_, kTileK = kTileK_;
  static constexpr int kWarpRows = kWarpRows_, kStages = kStages_;
  static constexpr bool kHasPolicy = kHasPolicy_;
  static constexpr int kWarps = kTileQ / kWarpRows, kThreads = kWarps * kWarpSize;
  static constexpr int kMTiles = kWarpRows / 16;  // of 16 rows, the height of an mma
  static constexpr int kMaxGroups = kTileQ / 16;  // of rows that skip together

  // Registers for two blocks on a multiprocessor, where the output leaves that many.
  static constexpr int kMinBlocks = kHeadDim > 128 ? 1
                                    : kWarps == 2  ? 4
                                    : kWarps == 4  ? (kHeadDim == 64 && !kHasPolicy ? 3 : 2)
                                                   : 1;

  using TileQ = SharedTile<T, kTileQ, kHeadDim>;
  using TileK = SharedTile<T, kTileK, kHeadDim>;
  static constexpr int kTileBytes = TileQ::kBytes + 2 * kStages * TileK::kBytes;

  static int64_t shared_bytes(int32_t num_key_blocks, bool has_skip) {
    return kTileBytes + RowScan::bytes(num_key_blocks) +
           (has_skip ? kMaxGroups * RowScan::bytes(num_key_blocks) : 0);
  }
};

/// What a CTA keeps in shared memory beside its tiles.
template <class Traits>
struct SparseForwardShared {
  QueryPlace at;
  TileQueue<Traits::kTileK> queue;
  float weight_log2[3];                      // of the queue's tiles: log2 m of a soft map
  bool is_visible[3][Traits::kTileQ];        // tile bits, by turn
  uint8_t is_wanted[3][Traits::kMaxGroups];  // skip: whether a row of 16 wants the tile, by turn
  int num_votes[Traits::kWarps];             // skip: rows that passed the test, by warp
};

template <class Traits>
class SparseForwardBlock {
  using T = typename Traits::T;
  static constexpr int kHeadDim = Traits::kHeadDim, kTileQ = Traits::kTileQ;
  static constexpr int kTileK = Traits::kTileK, kStages = Traits::kStages;
  static constexpr int kMTiles = Traits::kMTiles, kThreads = Traits::kThreads;
  static constexpr unsigned kAllRows = (1u << (2 * kMTiles)) - 1;

 public:
  __device__ SparseForwardBlock(const SparseForward& params, unsigned char* shared,
                                SparseForwardShared<Traits>& state)
      : p_(params),
        state_(state),
        at_(state.at),
        k_head_(params.k.head<const T>(at_.b, at_.h_kv)),
        v_head_(params.v.head<const T>(at_.b, at_.h_kv)),
        lane_(lane_index()),
        warp_row_(warp_index() * Traits::kWarpRows),
        q_tile_{reinterpret_cast<T*>(shared)},
        kv_tiles_(reinterpret_cast<T*>(shared + Traits::TileQ::kBytes)),
        scan_(reinterpret_cast<uint32_t*>(shared + Traits::kTileBytes),
              params.frame.keys.num_blocks),
        kept_(scan_.end()) {
#pragma unroll
    for (int mt = 0; mt < kMTiles; ++mt) row_max_[mt][0] = row_max_[mt][1] = -INFINITY;
  }

  __device__ void run() {
    const bool is_computed = !p_.is_protected_only || at_.block.is_protected;
    if (has_skip()) clear_kept();
    if (!is_computed) {
      store_lse_of_nothing();
      if (has_skip()) store_kept();
      return;
    }
    load_rows_async<kThreads>(q_tile_, p_.q, p_.q.head<const T>(at_.b, at_.h), at_.block.begin,
                              at_.block.rows, p_.frame.head_dim);
    scan_.template fill<kThreads>(p_.frame, p_.map, p_.tile_bits, at_.b, at_.h, at_.i, at_.block);
    TileQueue<kTileK>& queue = state_.queue;
    if (threadIdx.x == 0) {
      queue.start(scan_, p_.frame.keys, at_.block, order());
      weigh(0);
      weigh(1);
    }
    __syncthreads();
    if (queue.tiles[0].num_keys > 0) start_loads(queue.tiles[0], 0);
    cp_async_commit();
    look_up_bits(0);

    for (int turn = 0, stage = 0; queue.tiles[turn].num_keys > 0;
         turn = (turn + 1) % 3, stage = (stage + 1) % kStages) {
      const KeyTile& tile = queue.tiles[turn];
      const KeyTile& next = queue.tiles[(turn + 1) % 3];
      cp_async_wait<0>();
      __syncthreads();  // this tile's keys are here; all warps are done with the tile before
      if constexpr (kStages == 1) {
        load_values(tile, 0);
      } else if (next.num_keys > 0) {
        start_loads(next, (stage + 1) % kStages);
      }
      cp_async_commit();
      if (threadIdx.x == 0) {
        queue.tiles[(turn + 2) % 3] = queue.pop(scan_, p_.frame.keys, order());
        weigh((turn + 2) % 3);
      }
      look_up_bits((turn + 1) % 3);

      float s[kMTiles][kTileK / 8][4];  // S, 16 x 8 each
      scores(s, k_tile(stage));
      mask_keys(s, tile.num_keys);
      unsigned rows = kAllRows;
      if constexpr (Traits::kHasPolicy) rows = rows_in(s, turn);
      if constexpr (kStages == 1) {
        cp_async_wait<0>();
        __syncthreads();  // the values are here; all warps are done with the keys
        if (next.num_keys > 0) load_keys(next, 0);
        cp_async_commit();
      }
      if (rows == 0) continue;
      softmax(s, turn, rows);
      add_values(s, v_tile(stage));
    }
    cp_async_wait<0>();
    __syncthreads();  // a block without a tile has not waited for its queries yet
    finish();
    if (has_skip()) {
      __syncthreads();
      store_kept();
    }
  }

 private:
  __device__ bool has_skip() const {
    return Traits::kHasPolicy && p_.skip.reference != SkipReference::kNone;
  }
  __device__ const int32_t* order() const {
    if (!Traits::kHasPolicy || p_.tile_order == nullptr) return nullptr;
    return p_.tile_order + at_.i * p_.tile_order_stride;
  }
  __device__ typename Traits::TileK k_tile(int stage) const {
    return {kv_tiles_ + stage * (kTileK * kHeadDim)};
  }
  __device__ typename Traits::TileK v_tile(int stage) const {
    return {kv_tiles_ + (kStages + stage) * (kTileK * kHeadDim)};
  }
  __device__ void load_keys(const KeyTile& tile, int stage) const {
    load_rows_async<kThreads>(k_tile(stage), p_.k, k_head_, tile.first_key, tile.num_keys,
                              p_.frame.head_dim);
  }
  __device__ void load_values(const KeyTile& tile, int stage) const {
    load_rows_async<kThreads>(v_tile(stage), p_.v, v_head_, tile.first_key, tile.num_keys,
                              p_.frame.head_dim);
  }
  __device__ void start_loads(const KeyTile& tile, int stage) const {
    load_keys(tile, stage);
    if constexpr (kStages > 1) load_values(tile, stage);
  }
  /// Thread 0: the weight of the queue's tile `turn`.
  __device__ void weigh(int turn) const {
    if constexpr (Traits::kHasPolicy) {
      const KeyTile& tile = state_.queue.tiles[turn];
      const bool has_weight = p_.map.is_soft && tile.num_keys > 0;
      state_.weight_log2[turn] =
          has_weight ? log2f(p_.map.sparse_weight(at_.b, at_.h, at_.i, tile.block, is_forced(tile)))
                     : 0.0f;
    }
  }
  /// All threads: which rows see the queue's tile `turn`. Ahead of the scores, while registers are
  /// free.
  __device__ void look_up_bits(int turn) const {
    if constexpr (Traits::kHasPolicy) {
      if (p_.tile_bits.data == nullptr) return;
      const KeyTile& tile = state_.queue.tiles[turn];
      if (tile.num_keys == 0) return;
      for (int r = static_cast<int>(threadIdx.x); r < kTileQ; r += kThreads) {
        state_.is_visible[turn][r] =
            r < at_.block.rows &&
            (is_forced(tile) || row_bit(p_.tile_bits, at_.b, at_.h, at_.i, r, tile.block));
      }
    }
  }
  __device__ bool is_forced(const KeyTile& tile) const {
    return at_.block.is_protected || tile.is_protected;
  }
  /// The row of the block that element 2 half, 2 half + 1 of m-tile mt belongs to.
  __device__ int row_of(int mt, int half) const {
    return warp_row_ + mt * 16 + half * 8 + lane_ / 4;
  }

  /// S = q k^T, unscaled.
  __device__ void scores(float (&s)[kMTiles][kTileK / 8][4],
                         const typename Traits::TileK& k_tile) const {
#pragma unroll
    for (int mt = 0; mt < kMTiles; ++mt) {
#pragma unroll
      for (int n = 0; n < kTileK / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) s[mt][n][e] = 0.0f;
      }
    }
#pragma unroll
    for (int d = 0; d < kHeadDim; d += 16) {
      uint32_t a[kMTiles][4];
#pragma unroll
      for (int mt = 0; mt < kMTiles; ++mt) load_a(a[mt], q_tile_, warp_row_ + mt * 16, d, lane_);
#pragma unroll
      for (int n = 0; n < kTileK; n += 16) {
        uint32_t k[4];
        load_b(k, k_tile, n, d, lane_);
#pragma unroll
        for (int mt = 0; mt < kMTiles; ++mt) {
          mma<T>(s[mt][n / 8], a[mt], k[0], k[1]);
          mma<T>(s[mt][n / 8 + 1], a[mt], k[2], k[3]);
        }
      }
    }
  }

  /// Columns past the last key: S = -inf.
  __device__ void mask_keys(float (&s)[kMTiles][kTileK / 8][4], int num_keys) const {
    if (num_keys == kTileK) return;
#pragma unroll
    for (int n = 0; n < kTileK / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (n * 8 + lane_ % 4 * 2 + e % 2 < num_keys) continue;
#pragma unroll
        for (int mt = 0; mt < kMTiles; ++mt) s[mt][n][e] = -INFINITY;
      }
    }
  }

  /// The largest score of a row of this tile.
  __device__ static float row_top(const float (&s)[kTileK / 8][4], int half) {
    float top = s[0][half * 2];
#pragma unroll
    for (int n = 0; n < kTileK / 8; ++n) {
      top = fmaxf(top, fmaxf(s[n][half * 2], s[n][half * 2 + 1]));
    }
    return quad_max(top);
  }

  /// Which of this lane's rows take part in the tile: bit 2 mt + half. None of the warp's: 0 for
  /// all its lanes.
  __device__ unsigned rows_in(const float (&s)[kMTiles][kTileK / 8][4], int turn) const {
    if (has_skip()) return rows_not_skipped(s, turn);
    if (p_.tile_bits.data == nullptr) return kAllRows;
    unsigned rows = 0;
#pragma unroll
    for (int n = 0; n < 2 * kMTiles; ++n) {
      rows |= unsigned{state_.is_visible[turn][row_of(n / 2, n % 2)]} << n;
    }
    return __any_sync(kAllLanes, rows != 0) ? rows | 1u << 31 : 0;
  }

  /// The skip rule: rows vote, groups of p_.skip.rows decide (all warps, over a barrier).
  __device__ unsigned rows_not_skipped(const float (&s)[kMTiles][kTileK / 8][4], int turn) const {
    const KeyTile& tile = state_.queue.tiles[turn];
    uint8_t* const is_wanted = state_.is_wanted[turn];
    const float threshold = static_cast<float>(p_.skip.log_threshold) * kLog2E;
    const bool is_kept_anyhow = is_forced(tile);
    int num_votes = 0;
#pragma unroll
    for (int mt = 0; mt < kMTiles; ++mt) {
      bool wants = false;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float above = row_top(s[mt], half) * p_.scale_log2 - row_max_[mt][half];
        const bool passes = p_.skip.reference == SkipReference::kRunningMax
                                ? above < threshold
                                : exp2_approx(above - threshold) < quad_sum(row_sum_[mt][half]);
        const bool is_row = row_of(mt, half) < at_.block.rows;
        wants |= is_row && !passes;
        num_votes += __popc(__ballot_sync(kAllLanes, is_row && passes && lane_ % 4 == 0));
      }
      wants = __any_sync(kAllLanes, wants);
      if (lane_ == 0) is_wanted[warp_row_ / 16 + mt] = wants || is_kept_anyhow;
    }
    if (lane_ == 0 && !is_kept_anyhow) state_.num_votes[warp_index()] += num_votes;
    __syncthreads();
    const int together = (p_.skip.rows + 15) / 16;  // sixteens of rows
    unsigned rows = 0;
#pragma unroll
    for (int mt = 0; mt < kMTiles; ++mt) {
      const int sixteen = warp_row_ / 16 + mt, first = sixteen / together * together;
      bool is_kept = false;
      for (int n = first; n < first + together && n < Traits::kMaxGroups; ++n) {
        is_kept |= is_wanted[n] != 0;
      }
      if (!is_kept || sixteen * 16 >= at_.block.rows) continue;
      rows |= 3u << (2 * mt);
      // The first sixteen of a group speaks for it.
      if (sixteen == first && lane_ == 0) note_kept(first / together, tile.block);
    }
    return rows;
  }

  /// One step of online softmax: S becomes P, rows of o and l are rescaled. Without a policy a row
  /// keeps an older maximum as long as P stays below 2^kLazyLog2: most tiles then rescale nothing.
  /// With one, the skip rule wants the true maximum.
  __device__ void softmax(float (&s)[kMTiles][kTileK / 8][4], int turn, unsigned rows) {
    constexpr float kLazyLog2 = Traits::kHasPolicy ? 0.0f : 8.0f;
    const float weight_log2 = Traits::kHasPolicy ? state_.weight_log2[turn] : 0.0f;
#pragma unroll
    for (int mt = 0; mt < kMTiles; ++mt) {
      float top[2];
      bool is_raised = false;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const bool is_in = rows >> (2 * mt + half) & 1;
        const float highest = row_top(s[mt], half);  // all lanes: it shuffles
        top[half] = is_in ? fmaf(highest, p_.scale_log2, weight_log2) : -INFINITY;
        is_raised |= top[half] > row_max_[mt][half] + kLazyLog2;
      }
      if (__any_sync(kAllLanes, is_raised)) rescale(mt, top);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // -inf - -inf is NaN: a row without keys so far is shifted by nothing.
        const float row_max = row_max_[mt][half];
        const bool is_in = rows >> (2 * mt + half) & 1;
        const float offset =
            is_in ? weight_log2 - (row_max == -INFINITY ? 0.0f : row_max) : -INFINITY;
        float sum = 0.0f;
#pragma unroll
        for (int n = 0; n < kTileK / 8; ++n) {
#pragma unroll
          for (int e = half * 2; e < half * 2 + 2; ++e) {
            s[mt][n][e] = exp2_approx(fmaf(s[mt][n][e], p_.scale_log2, offset));
            sum += s[mt][n][e];
          }
        }
        row_sum_[mt][half] += sum;
      }
    }
  }

  /// Raises the maxima of an m-tile's rows to `top` where that is higher.
  __device__ void rescale(int mt, const float (&top)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float raised = fmaxf(row_max_[mt][half], top[half]);
      const float factor = raised == -INFINITY ? 1.0f : exp2_approx(row_max_[mt][half] - raised);
      row_max_[mt][half] = raised;
      row_sum_[mt][half] *= factor;
#pragma unroll
      for (int d = 0; d < kHeadDim / 8; ++d) {
        o_[mt][d][half * 2] *= factor;
        o_[mt][d][half * 2 + 1] *= factor;
      }
    }
  }

  /// o += P v.
  __device__ void add_values(const float (&p)[kMTiles][kTileK / 8][4],
                             const typename Traits::TileK& v_tile) {
#pragma unroll
    for (int n = 0; n < kTileK; n += 16) {
      uint32_t a[kMTiles][4];
#pragma unroll
      for (int mt = 0; mt < kMTiles; ++mt) {
        a[mt][0] = pack<T>(p[mt][n / 8][0], p[mt][n / 8][1]);
        a[mt][1] = pack<T>(p[mt][n / 8][2], p[mt][n / 8][3]);
        a[mt][2] = pack<T>(p[mt][n / 8 + 1][0], p[mt][n / 8 + 1][1]);
        a[mt][3] = pack<T>(p[mt][n / 8 + 1][2], p[mt][n / 8 + 1][3]);
      }
#pragma unroll
      for (int d = 0; d < kHeadDim; d += 16) {
        uint32_t v[4];
        load_b_trans(v, v_tile, n, d, lane_);
#pragma unroll
        for (int mt = 0; mt < kMTiles; ++mt) {
          mma<T>(o_[mt][d / 8], a[mt], v[0], v[1]);
          mma<T>(o_[mt][d / 8 + 1], a[mt], v[2], v[3]);
        }
      }
    }
  }

  /// Divides by the row sums and stores o and lse. A warp writes its rows of o over its own rows of
  /// the q tile, so that they leave in whole vectors.
  __device__ void finish() {
#pragma unroll
    for (int mt = 0; mt < kMTiles; ++mt) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = row_of(mt, half);
        const float sum = quad_sum(row_sum_[mt][half]);
        const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
        float lse = sum == 0.0f ? -INFINITY : fmaf(row_max_[mt][half], kLn2, logf(sum));
        if (p_.k_mean != nullptr) lse -= p_.scale * dot_with_mean(r);
        if (r < at_.block.rows && lane_ % 4 == 0)
          *p_.lse.at(at_.b, at_.h, at_.block.begin + r) = lse;
        __syncwarp();
#pragma unroll
        for (int d = 0; d < kHeadDim / 8; ++d) {
          *reinterpret_cast<uint32_t*>(q_tile_.at(r, d * 8 + lane_ % 4 * 2)) =
              pack<T>(o_[mt][d][half * 2] * inverse, o_[mt][d][half * 2 + 1] * inverse);
        }
      }
    }
    __syncwarp();
    T* const head = p_.o.head<T>(at_.b, at_.h);
    const int32_t head_dim = p_.frame.head_dim;
    if (p_.o.is_vectorised) {
      constexpr int kChunks = kHeadDim / 8;
#pragma unroll
      for (int idx = lane_; idx < Traits::kWarpRows * kChunks; idx += kWarpSize) {
        const int r = warp_row_ + idx / kChunks, c = idx % kChunks;
        if (r >= at_.block.rows || c * 8 >= head_dim) continue;
        *reinterpret_cast<uint4*>(head + p_.o.offset(at_.block.begin + r) + c * 8) =
            *reinterpret_cast<const uint4*>(q_tile_.chunk(r, c));
      }
      return;
    }
    for (int idx = lane_; idx < Traits::kWarpRows * kHeadDim; idx += kWarpSize) {
      const int r = warp_row_ + idx / kHeadDim, c = idx % kHeadDim;
      if (r < at_.block.rows && c < head_dim) {
        head[p_.o.offset(at_.block.begin + r) + c] = *q_tile_.at(r, c);
      }
    }
  }

  /// q_r . k_mean of the block's sequence; the four lanes of a row share the work.
  __device__ float dot_with_mean(int r) const {
    const Frame& f = p_.frame;
    const int64_t sequence = at_.block.sequence;
    const int64_t row =
        (int64_t{at_.b} * f.num_kv_heads + at_.h_kv) * f.keys.num_sequences + sequence;
    const float* const mean = p_.k_mean + row * f.head_dim;
    float sum = 0.0f;
    for (int c = lane_ % 4; c < f.head_dim; c += 4) {
      sum = fmaf(to_float(*q_tile_.at(r, c)), mean[c], sum);
    }
    return quad_sum(sum);
  }

  __device__ void store_lse_of_nothing() const {
    for (int r = static_cast<int>(threadIdx.x); r < at_.block.rows; r += kThreads) {
      *p_.lse.at(at_.b, at_.h, at_.block.begin + r) = -INFINITY;
    }
  }

  // kept_bits: collected in shared memory (groups, words of T_n bits), stored at the end.

  __device__ void clear_kept() const {
    const int words = p_.kept_bits.groups * scan_.num_words();
    for (int w = static_cast<int>(threadIdx.x); w < words; w += kThreads) kept_[w] = 0;
    if (lane_ == 0) state_.num_votes[warp_index()] = 0;
    __syncthreads();
  }
  /// Each group has one writer.
  __device__ void note_kept(int group, int32_t j) const {
    kept_[group * scan_.num_words() + j / 32] |= 1u << (j % 32);
  }
  __device__ void store_kept() {
    const TileBits& bits = p_.kept_bits;
    const int num_bytes = (p_.frame.keys.num_blocks + 7) / 8;
    for (int idx = static_cast<int>(threadIdx.x); idx < bits.groups * num_bytes; idx += kThreads) {
      const int group = idx / num_bytes, byte = idx % num_bytes;
      bits.data[bits.offset(at_.b, at_.h, at_.i, group, int64_t{byte} * 8)] =
          static_cast<uint8_t>(kept_[group * scan_.num_words() + byte / 4] >> (byte % 4 * 8));
    }
    if (p_.row_votes == nullptr) return;
    if (threadIdx.x != 0) return;
    int total = 0;
    for (int w = 0; w < Traits::kWarps; ++w) total += state_.num_votes[w];
    p_.row_votes[(int64_t{at_.b} * p_.frame.num_heads + at_.h) * p_.frame.queries.num_blocks +
                 at_.i] = static_cast<float>(total);
  }

  const SparseForward& p_;
  SparseForwardShared<Traits>& state_;
  const QueryPlace& at_;
  const T* const k_head_;
  const T* const v_head_;
  const int lane_, warp_row_;
  const typename Traits::TileQ q_tile_;
  T* const kv_tiles_;
  const RowScan scan_;
  uint32_t* const kept_;

  float o_[kMTiles][kHeadDim / 8][4] = {};  // o_s times l, 16 x 8 each
  float row_max_[kMTiles][2];               // m, log2 units
  float row_sum_[kMTiles][2] = {};          // l of this lane's columns
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinBlocks)
    sparse_forward_kernel(const __grid_constant__ SparseForward params) {
  begin_kernel();
  SPARLINE_DYNAMIC_SHARED(shared);
  // Kept in shared memory: the main loop has no register to spare for it.
  __shared__ SparseForwardShared<Traits> state;
  if (threadIdx.x == 0) state.at = query_place(params.frame, params.wave, blockIdx.x);
  __syncthreads();
  SparseForwardBlock<Traits>(params, shared, state).run();
}

template <class Traits>
void launch_sparse_forward(const SparseForward& params, void* stream) {
  const Frame& frame = params.frame;
  const bool has_skip = params.skip.reference != SkipReference::kNone;
  SparseForward p = params;
  p.scale_log2 = std::max(params.scale * kLog2E, kLeastScale);
  launch(sparse_forward_kernel<Traits>,
         {.blocks = int64_t{params.wave.count} * frame.group() * frame.queries.num_blocks,
          .threads = Traits::kThreads,
          .shared_bytes = Traits::shared_bytes(frame.keys.num_blocks, has_skip)},
         stream, p);
}

/// The tiles for a problem: as many query rows as the block has (64 or 128), keys in tiles of 64; a
/// skip rule decides over a whole key block, so its tile holds up to 128. Warps of 32 rows where
/// the registers hold their output and scores: at 16 rows the loop is a quarter slower on an H200,
/// for shared memory. Two stages gain nothing at head_dim 128, where two blocks share a
/// multiprocessor anyway, and 9 % at 64.
template <class T, int kHeadDim, bool kHasPolicy>
void launch_sparse_forward(const SparseForward& params, void* stream) {
  const bool is_tall = params.block_q > 64;
  const auto with = [&]<int kTileK, int kWarpRows, int kTallStages>() {
    is_tall
        ? launch_sparse_forward<
              SparseForwardTraits<T, kHeadDim, 128, kTileK, kWarpRows, kTallStages, kHasPolicy>>(
              params, stream)
        : launch_sparse_forward<
              SparseForwardTraits<T, kHeadDim, 64, kTileK, kWarpRows, 1, kHasPolicy>>(params,
                                                                                      stream);
  };
  const bool has_skip = params.skip.reference != SkipReference::kNone;
  if constexpr (kHasPolicy) {
    if (has_skip && params.block_k > 64) return with.template operator()<128, 16, 1>();
  }
  with.template operator()<64, (kHeadDim <= 128 ? 32 : 16), (kHeadDim == 64 ? 2 : 1)>();
}

/// All of one head dimension; a unit each (sparse_fwd_<D>.cu), because ptxas takes its time.
template <int kHeadDim>
void sparse_forward(const SparseForward& params, void* stream) {
  const bool has_policy = params.map.is_soft || params.tile_bits.data != nullptr ||
                          params.skip.reference != SkipReference::kNone ||
                          params.tile_order != nullptr;
  const auto with = [&](auto type) {
    using T = decltype(type);
    // One kernel serves all of head_dim 256, which is there to be right.
    if (has_policy || kHeadDim > 128) {
      launch_sparse_forward<T, kHeadDim, true>(params, stream);
    } else if constexpr (kHeadDim <= 128) {
      launch_sparse_forward<T, kHeadDim, false>(params, stream);
    }
  };
  params.dtype == DType::kBF16 ? with(bf16{}) : with(fp16{});
}

}  // namespace sparline::cuda
