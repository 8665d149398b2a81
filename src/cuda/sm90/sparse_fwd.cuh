// SPDX-License-Identifier: Apache-2.0
//
// The sparse branch, forward, on Hopper (sm_90a). Over the critical key blocks j of query block i
//     S = scale q_i k_j^T,  o_s = softmax(S) v,  lse = ln sum exp S
// the same function as sm80/sparse_fwd.cuh without a policy.
//
//   Tiles   128 queries x 128 keys: two runs of up to 64 keys, wherever they lie, or one
//   Roles   warpgroup 0: one thread loads, one warp looks up critical blocks; 1 and 2 multiply, 64
//           rows each. A CTA for each multiprocessor, which takes every so-manieth query block
//   Shared  queries 32 KiB, 6 slots of 32 KiB (head_dim 128) for tiles of keys and of values
//   Sync    load -> full[slot] -> multiply -> empty[slot] -> load; the same for queries and lists
//
// All query blocks of a CTA are one stream of tiles: while P v of a tile is under way, S of the
// next one is already there and goes through the softmax, also where the next tile is that of
// another query block. Queries wait in registers, as the A operand, so that the next ones can be
// loaded as soon as a block begins.
#pragma once

#include <algorithm>
#include <bit>

#include "cuda/common/query_place.cuh"
#include "cuda/common/row_scan.cuh"
#include "cuda/kernels.h"
#include "cuda/sm90/ptx.cuh"
#include "cuda/sm90/tensor_map.h"

namespace sparline::cuda {

template <class T_, int kHeadDim_>
struct SparseForwardSm90Traits {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kTileQ = 128, kTileK = 128, kRunK = 64;
  static constexpr int kSlices = kHeadDim / 64;  // of 64 columns, which lie behind one another
  static constexpr int kSlots = kHeadDim == 64 ? 12 : 6;
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
  int32_t mean;  // of its keys: row of k_mean
};

/// What the loading thread says of a tile of keys.
struct TileInfo {
  uint32_t num_keys;  // of the first run, and 256 times those of the second; kEnd: no more tiles
  int32_t block;      // whether a query block begins: its entry in `places`, else -1
  static constexpr uint32_t kEnd = 255, kFull = 64 + 256 * 64;

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
  int32_t list_block[2];               // whose list it is: entry in `places`; -1: no more
  int32_t list_begin[2], list_end[2];  // blocks of keys of its sequence
  BlockPlace places[Traits::kPlaces];
  float lse_shift[3][Traits::kTileQ];  // with k_mean, of blocks by turn; of those who wrote it
  uint32_t lists[1];  // two of RowScan's bits: the critical blocks of a query block
};

struct SparseForwardSm90Params {
  CUtensorMap q, k, v, o;
  SparseForward forward;
  int32_t num_blocks;  // query blocks of all heads
};

/// Position in a ring, and the parity of the round.
template <int kSize>
struct RingCursor {
  int slot = 0;
  uint32_t parity = 0;
  __device__ void advance() {
    if (++slot < kSize) return;
    slot = 0;
    parity ^= 1;
  }
};

// Looking up critical blocks: one warp --------------------------------------------------------

/// One bit for each key block: whether query block i attends it.
__device__ __forceinline__ void fill_list(const SparseForward& p, const QueryPlace& at,
                                          uint32_t* words) {
  constexpr int kTogether = 8;  // loads under way
  const Axis& keys = p.frame.keys;
  const bool is_dense = p.map.data == nullptr || at.block.is_protected;
  const int64_t first = p.map.offset(at.b, at.h, at.i, 0);
  const int num_words = (keys.num_blocks + 31) / 32;
  for (int w_first = 0; w_first < num_words; w_first += kTogether) {
    bool is_critical[kTogether];
#pragma unroll
    for (int n = 0; n < kTogether; ++n) {
      const int32_t j = (w_first + n) * 32 + lane_index();
      is_critical[n] = j >= at.block.other_begin && j < at.block.other_end;
      if (is_critical[n] && !is_dense) {
        is_critical[n] = p.map.block_class(first + j * p.map.stride_j) == 1;
        if (keys.table != nullptr) is_critical[n] |= keys.table[j].is_protected != 0;
      }
    }
#pragma unroll
    for (int n = 0; n < kTogether; ++n) {
      const uint32_t word = __ballot_sync(kAllLanes, is_critical[n]);
      if (lane_index() == 0 && w_first + n < num_words) words[w_first + n] = word;
    }
  }
}

template <class Traits>
__device__ void look_up(const SparseForwardSm90Params& params,
                        SparseForwardSm90Shared<Traits>& shared) {
  const SparseForward& p = params.forward;
  const int num_words = (p.frame.keys.num_blocks + 31) / 32;
  RingCursor<2> list;
  RingCursor<Traits::kPlaces> place;
  for (auto idx = static_cast<int32_t>(blockIdx.x);; idx += static_cast<int32_t>(gridDim.x)) {
    const bool is_end = idx >= params.num_blocks;
    QueryPlace at{};
    if (!is_end) at = query_place(p.frame, p.wave, idx);
    if (!is_end && p.is_protected_only && !at.block.is_protected) {
      for (int r = lane_index(); r < at.block.rows; r += kWarpSize) {
        *p.lse.at(at.b, at.h, at.block.begin + r) = -INFINITY;
      }
      continue;
    }
    wait(shared.list_empty[list.slot], list.parity ^ 1);
    if (!is_end) fill_list(p, at, shared.lists + list.slot * num_words);
    if (lane_index() == 0) {
      const int32_t mean =
          (at.b * p.frame.num_kv_heads + at.h_kv) * p.frame.keys.num_sequences + at.block.sequence;
      shared.places[place.slot] = {at.b, at.h, at.h_kv, at.block.begin, at.block.rows, mean};
      shared.list_block[list.slot] = is_end ? -1 : place.slot;
      shared.list_begin[list.slot] = at.block.other_begin;
      shared.list_end[list.slot] = at.block.other_end;
    }
    place.advance();
    __syncwarp();
    if (lane_index() == 0) arrive(shared.list_full[list.slot]);
    list.advance();
    if (is_end) return;
  }
}

// Loading: one thread -------------------------------------------------------------------------

template <class Traits>
class SparseForwardSm90Loader {
 public:
  __device__ SparseForwardSm90Loader(const SparseForwardSm90Params& params,
                                     SparseForwardSm90Shared<Traits>& shared)
      : params_(params), shared_(shared) {}

  __device__ void run() {
    const SparseForward& p = params_.forward;
    const int num_words = (p.frame.keys.num_blocks + 31) / 32;
    RingCursor<2> list;
    uint32_t q_parity = 0;
    while (true) {
      wait(shared_.list_full[list.slot], list.parity);
      const int32_t place = shared_.list_block[list.slot];
      if (place < 0) break;
      const BlockPlace at = shared_.places[place];
      wait(shared_.q_empty, q_parity ^ 1);
      q_parity ^= 1;
      load_queries(at);
      const RowScan scan(shared_.lists + list.slot * num_words, p.frame.keys.num_blocks);
      TileQueue<Traits::kRunK> queue;
      BlockInfo block_info{};
      block_info.other_begin = shared_.list_begin[list.slot];
      block_info.other_end = shared_.list_end[list.slot];
      queue.start(scan, p.frame.keys, block_info, nullptr);
      // A block without critical keys gets a tile without keys: zeros from past the end.
      if (queue.tiles[0].num_keys == 0) queue.tiles[0].first_key = p.frame.keys.length;
      int32_t block = place;
      do {
        const Tile tile{{queue.tiles[0].first_key, queue.tiles[1].first_key},
                        {queue.tiles[0].num_keys, queue.tiles[1].num_keys},
                        at.h_kv,
                        at.b};
        load_keys(tile, block);
        load_values();
        last_ = tile;
        has_last_ = true;
        block = -1;
        if (tile.num_keys[1] == 0) break;
        queue.tiles[0] = queue.pop(scan, p.frame.keys, nullptr);
        queue.tiles[1] = queue.pop(scan, p.frame.keys, nullptr);
      } while (queue.tiles[0].num_keys > 0);
      arrive(shared_.list_empty[list.slot]);
      list.advance();
    }
    wait(shared_.empty[ring_.slot], ring_.parity ^ 1);
    shared_.infos[ring_.slot] = {TileInfo::kEnd, -1};
    arrive(shared_.full[ring_.slot]);
    ring_.advance();
    load_values();
  }

 private:
  static constexpr int kRunK = Traits::kRunK, kHeadDim = Traits::kHeadDim;
  struct Tile {
    int32_t first_key[2], num_keys[2], h, b;
  };

  __device__ void load_queries(const BlockPlace& at) {
    arrive_expecting(shared_.q_full, Traits::kTileQ * kHeadDim * 2);
#pragma unroll
    for (int slice = 0; slice < Traits::kSlices; ++slice) {
      load_box(reinterpret_cast<unsigned char*>(shared_.q) + slice * Traits::kSliceBytesQ,
               params_.q, shared_.q_full, slice * 64, at.begin, at.h, at.b);
    }
  }
  __device__ void load_keys(const Tile& tile, int32_t block) {
    wait(shared_.empty[ring_.slot], ring_.parity ^ 1);
    shared_.infos[ring_.slot] = {static_cast<uint32_t>(tile.num_keys[0] + 256 * tile.num_keys[1]),
                                 block};
    load(params_.k, tile);
  }
  /// Those of the tile before: its P v comes after the S of the tile that follows.
  __device__ void load_values() {
    if (!has_last_) return;
    wait(shared_.empty[ring_.slot], ring_.parity ^ 1);
    load(params_.v, last_);
  }
  __device__ void load(const CUtensorMap& map, const Tile& tile) {
    const int num_runs = tile.num_keys[1] > 0 ? 2 : 1;
    Barrier& full = shared_.full[ring_.slot];
    auto* const slot = reinterpret_cast<unsigned char*>(shared_.slots[ring_.slot]);
    arrive_expecting(full, static_cast<uint32_t>(num_runs * kRunK * kHeadDim * 2));
#pragma unroll
    for (int run = 0; run < 2; ++run) {
      if (run >= num_runs) break;
#pragma unroll
      for (int slice = 0; slice < Traits::kSlices; ++slice) {
        load_box(slot + slice * Traits::kSliceBytesK + run * (kRunK * 128), map, full, slice * 64,
                 tile.first_key[run], tile.h, tile.b);
      }
    }
    ring_.advance();
  }

  const SparseForwardSm90Params& params_;
  SparseForwardSm90Shared<Traits>& shared_;
  RingCursor<Traits::kSlots> ring_;
  Tile last_{};
  bool has_last_ = false;
};

// Multiplying: two warpgroups -----------------------------------------------------------------

template <class Traits>
class SparseForwardSm90Rows {
  using T = typename Traits::T;
  static constexpr int kHeadDim = Traits::kHeadDim, kTileK = Traits::kTileK;
  static constexpr int kRunK = Traits::kRunK;
  static constexpr int kFirstTurn = 1, kMultiplyThreads = Traits::kMultiplyWarps * kWarpSize;

 public:
  __device__ SparseForwardSm90Rows(const SparseForwardSm90Params& params,
                                   SparseForwardSm90Shared<Traits>& shared)
      : p_(params.forward),
        o_map_(params.o),
        shared_(shared),
        lane_(lane_index()),
        warp_row_(warp_index() * 16 - 64) {}

  __device__ void run() {
    wait(shared_.full[0], 0);
    TileInfo tile = shared_.infos[0];
    if (tile.num_keys == TileInfo::kEnd) return;
    if (warp_index() >= 8) arrive_named(kFirstTurn, kMultiplyThreads);
    reset(tile.block);
    load_queries(tile.block);
    is_q_held_ = true;
    tile.has_second() ? first_step<kTileK>(tile) : first_step<kRunK>(tile);
    bool had_second = tile.has_second();
    wait(shared_.full[ring_.slot], ring_.parity);
    tile = shared_.infos[ring_.slot];
    if (tile.block >= 0) [[unlikely]]
      load_queries(tile.block);
    while (tile.num_keys != TileInfo::kEnd) {
      if (tile.has_second()) {
        if (!had_second) step<kTileK, kRunK>(tile);
        while (tile.has_second()) step<kTileK, kTileK>(tile);
        had_second = true;
      } else {
        had_second ? step<kRunK, kTileK>(tile) : step<kRunK, kRunK>(tile);
        had_second = false;
      }
    }
    ring_.advance();
    had_second ? last_step<kTileK>() : last_step<kRunK>();
    if (warp_index() < 8) sync_named(kFirstTurn, kMultiplyThreads);  // what was arrived for
  }

 private:
  __device__ void release(int slot) {
    if (lane_ == 0) arrive(shared_.empty[slot]);
  }
  __device__ void reset(int32_t block) {
    block_ = block;
    row_max_[0] = row_max_[1] = -INFINITY;
    row_sum_[0] = row_sum_[1] = 0.0f;
  }
  template <int kKeys>
  __device__ __forceinline__ void first_step(const TileInfo& tile) {
    float s[kKeys / 2];
    start_scores<kKeys>(s);
    wgmma_wait<0>();
    release(0);
    ring_.advance();
    softmax<kKeys>(s, tile);
    pack_p<0>(s);
    if constexpr (kKeys > kRunK) pack_p<1>(s);
  }
  /// S and P of a tile, and P v of the one before. A function of both tiles' widths, so that no
  /// branch lies between products: the compiler would wait for each of them.
  template <int kKeys, int kKeysBefore>
  __device__ __forceinline__ void step(TileInfo& tile) {
    const bool is_new = tile.block >= 0;
    const int32_t old_block = block_;
    const int k_slot = ring_.slot;
    float s[kKeys / 2];
    sync_named(warp_index() / 4, kMultiplyThreads);  // one warpgroup after the other
    start_scores<kKeys>(s);
    ring_.advance();
    const int v_slot = ring_.slot;
    start_values<kKeysBefore>();
    ring_.advance();
    arrive_named(3 - warp_index() / 4, kMultiplyThreads);
    wgmma_wait<1>();
    release(k_slot);
    if (is_q_held_) [[unlikely]]
      give_back_queries();
    const float old_max[2] = {row_max_[0], row_max_[1]};
    const float old_sum[2] = {row_sum_[0], row_sum_[1]};
    if (is_new) reset(tile.block);
    start_softmax<kKeys>(s, tile);
    find_tops<0>(s);
    exponentials<0>(s);
    if constexpr (kKeys > kRunK) find_tops<1>(s);
    const bool is_raised = is_raised_;
    wgmma_wait<0>();
    release(v_slot);
    pack_p<0>(s);
    if constexpr (kKeys > kRunK) {
      exponentials<1>(s);
      pack_p<1>(s);
    }
    is_first_ = is_new;
    if (is_new) [[unlikely]] {
      finish(old_block, old_max, old_sum);
    } else if (is_raised) [[unlikely]] {
      rescale();
    }
    wait(shared_.full[ring_.slot], ring_.parity);
    tile = shared_.infos[ring_.slot];
    if (tile.block >= 0) [[unlikely]]
      load_queries(tile.block);
  }
  template <int kKeys>
  __device__ __forceinline__ void last_step() {
    start_values<kKeys>();
    wgmma_wait<0>();
    finish(block_, row_max_, row_sum_);
    if (lane_ == 0) wait_stores();
  }

  /// The warp's 16 rows of the queries as A fragments.
  __device__ void load_queries(int32_t block) {
    if (is_q_held_) give_back_queries();
    wait(shared_.q_full, q_parity_);
    q_parity_ ^= 1;
    const int row = warp_row_ + lane_ % 16;
    const SharedAddress first = shared_address(shared_.q) + row * 128;
#pragma unroll
    for (int d = 0; d < kHeadDim / 16; ++d) {
      const int chunk = (d % 4 * 2 + lane_ / 16) ^ (row % 8);
      uint32_t a[4];
      ldmatrix_x4(a, first + d / 4 * Traits::kSliceBytesQ + chunk * 16);
#pragma unroll
      for (int n = 0; n < 4; ++n) q_[d * 4 + n] = a[n];
    }
    if (p_.k_mean != nullptr) [[unlikely]]
      find_lse_shift(block);
  }
  /// Lets the next queries be loaded, once the rows of o that lay in their place have left.
  __device__ void give_back_queries() {
    if (lane_ == 0) {
      wait_stores_read();
      arrive(shared_.q_empty);
    }
    is_q_held_ = false;
  }
  /// scale q_r . k_mean of the block's sequence: what lse loses where keys are smoothed. A quad's
  /// first lane keeps it for finish().
  struct Pair {
    T low, high;
  };
  __device__ void find_lse_shift(int32_t block) {
    const float* const mean =
        p_.k_mean + int64_t{shared_.places[block].mean} * kHeadDim + lane_ % 4 * 2;
    float sum[2] = {0.0f, 0.0f};
#pragma unroll
    for (int n = 0; n < kHeadDim / 4; ++n) {
      const int column = n / 4 * 16 + n % 4 / 2 * 8;
      const auto q = std::bit_cast<Pair>(q_[n]);
      sum[n % 2] =
          fmaf(to_float(q.low), mean[column], fmaf(to_float(q.high), mean[column + 1], sum[n % 2]));
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float dot = quad_sum(sum[half]);
      if (lane_ % 4 == 0) shared_.lse_shift[block % 3][row_of(half)] = p_.scale * dot;
    }
  }
  __device__ int row_of(int half) const { return warp_row_ + half * 8 + lane_ / 4; }

  /// Starts S = q k^T of the tile in the current slot.
  template <int kKeys>
  __device__ __forceinline__ void start_scores(float (&s)[kKeys / 2]) {
    const uint32_t b = matrix_descriptor(shared_address(shared_.slots[ring_.slot]), 0);
    wgmma_fence();
    wgmma<T, kKeys, false>(s, q_, b, 0);
#pragma unroll
    for (int d = 1; d < kHeadDim / 16; ++d) {
      wgmma<T, kKeys, false>(s, q_ + d * 4, b + ((d / 4 * Traits::kSliceBytesK + d % 4 * 32) >> 4),
                             1);
    }
    wgmma_commit();
  }

  /// Starts o += P v of the tile before, once its values are there.
  template <int kKeys>
  __device__ __forceinline__ void start_values() {
    wait(shared_.full[ring_.slot], ring_.parity);
    const uint32_t b =
        matrix_descriptor(shared_address(shared_.slots[ring_.slot]), Traits::kSliceBytesK);
    wgmma_fence();
#pragma unroll
    for (int n = 0; n < kKeys / 16; ++n) {
      wgmma<T, kHeadDim, true>(o_, p_frag_ + n * 4, b + (n * 16 * 128 >> 4),
                               n == 0 ? !is_first_ : 1);
    }
    wgmma_commit();
  }

  /// Online softmax, a run of keys at a time: S becomes P. A row keeps an older maximum as long as
  /// P stays below 2^kLazyLog2: most runs then rescale nothing, and no maximum has to be agreed
  /// upon by the four lanes of a row. That of the second run is found while the first one waits for
  /// its exponentials.
  template <int kKeys>
  __device__ __forceinline__ void softmax(float (&s)[kKeys / 2], const TileInfo& tile) {
    start_softmax<kKeys>(s, tile);
    find_tops<0>(s);
    exponentials<0>(s);
    if constexpr (kKeys > kRunK) {
      find_tops<1>(s);
      exponentials<1>(s);
    }
  }
  template <int kKeys>
  __device__ __forceinline__ void start_softmax(float (&s)[kKeys / 2], const TileInfo& tile) {
    if (tile.num_keys != (kKeys == kTileK ? TileInfo::kFull : kRunK)) [[unlikely]]
      mask_keys<kKeys>(s, tile);
    is_raised_ = false;
  }
  template <int kRun, int kSize>
  __device__ __forceinline__ void find_tops(float (&s)[kSize]) {
    constexpr float kLazyLog2 = 8.0f;
    constexpr int kFirst = kRun * kRunK / 2;
    float tops[4] = {s[kFirst], s[kFirst + 1], s[kFirst + 2], s[kFirst + 3]};
#pragma unroll
    for (int n = 4; n < kRunK / 2; ++n) tops[n % 4] = fmaxf(tops[n % 4], s[kFirst + n]);
    const float top[2] = {fmaxf(tops[0], tops[1]) * p_.scale_log2,
                          fmaxf(tops[2], tops[3]) * p_.scale_log2};
    const bool is_high = top[0] > row_max_[0] + kLazyLog2 || top[1] > row_max_[1] + kLazyLog2;
    if (__any_sync(kAllLanes, is_high)) [[unlikely]] {
      raise(top);
#pragma unroll
      for (int n = 0; n < kFirst; ++n) s[n] *= last_factor_[n / 2 % 2];
    }
  }
  template <int kRun, int kSize>
  __device__ __forceinline__ void exponentials(float (&s)[kSize]) {
    constexpr int kFirst = kRun * kRunK / 2;
    float sums[2] = {0.0f, 0.0f};
    // -inf - -inf is NaN: a row without keys so far is shifted by nothing.
    const float offsets[2] = {row_max_[0] == -INFINITY ? 0.0f : -row_max_[0],
                              row_max_[1] == -INFINITY ? 0.0f : -row_max_[1]};
#pragma unroll
    for (int n = kFirst; n < kFirst + kRunK / 2; ++n) {
      s[n] = exp2_approx(fmaf(s[n], p_.scale_log2, offsets[n / 2 % 2]));
      sums[n / 2 % 2] += s[n];
    }
    row_sum_[0] += sums[0];
    row_sum_[1] += sums[1];
  }
  /// Raises the maxima of the warp's rows to what a run has, `top` of this lane's columns.
  __device__ __forceinline__ void raise(const float (&top)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float raised = fmaxf(row_max_[half], quad_max(top[half]));
      const float factor = raised == -INFINITY ? 1.0f : exp2_approx(row_max_[half] - raised);
      last_factor_[half] = factor;
      factor_[half] = is_raised_ ? factor_[half] * factor : factor;
      row_max_[half] = raised;
      row_sum_[half] *= factor;
    }
    is_raised_ = true;
  }
  /// Columns past the last key of a run: S = -inf.
  template <int kKeys>
  __device__ __forceinline__ void mask_keys(float (&s)[kKeys / 2], const TileInfo& tile) {
    const auto first = static_cast<int>(tile.num_keys % 256);
    const auto second = static_cast<int>(tile.num_keys / 256);
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int column = n % 8 * 8 + lane_ % 4 * 2 + e % 2;
        if (column >= (n < 8 ? first : second)) s[n * 4 + e] = -INFINITY;
      }
    }
  }
  __device__ void rescale() {
#pragma unroll
    for (int n = 0; n < kHeadDim / 2; ++n) o_[n] *= factor_[n / 2 % 2];
  }
  /// P as A fragments.
  template <int kRun, int kSize>
  __device__ __forceinline__ void pack_p(const float (&s)[kSize]) {
#pragma unroll
    for (int n = kRun * kRunK / 4; n < (kRun + 1) * kRunK / 4; ++n) {
      p_frag_[n] = pack<T>(s[n * 2], s[n * 2 + 1]);
    }
  }

  /// Divides by the row sums and stores o and lse of a query block. The rows of o leave through the
  /// place of the queries, each warp's through that of its own, which it has read.
  __device__ void finish(int32_t block, const float (&row_max)[2], const float (&row_sum)[2]) {
    const BlockPlace at = shared_.places[block];
    float inverse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = row_of(half);
      const float sum = quad_sum(row_sum[half]);
      inverse[half] = sum == 0.0f ? 0.0f : __fdividef(1.0f, sum);
      if (r < at.rows && lane_ % 4 == 0) {
        float lse = sum == 0.0f ? -INFINITY : (row_max[half] + __log2f(sum)) * kLn2;
        if (p_.k_mean != nullptr) lse -= shared_.lse_shift[block % 3][r];
        p_.lse.data[at.b * p_.lse.stride_b + at.h * p_.lse.stride_h + at.begin + r] = lse;
      }
    }
    constexpr int kSliceElements = Traits::kTileQ * 64;
    T* const rows = shared_.q + warp_row_ * 64;
    const SharedAddress row = shared_address(rows) + lane_ % 16 * 128;
#pragma unroll
    for (int d = 0; d < kHeadDim / 16; ++d) {
      uint32_t a[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const float* const o = o_ + d * 8 + n * 2;
        a[n] = pack<T>(o[0] * inverse[n % 2], o[1] * inverse[n % 2]);
      }
      const int chunk = (d % 4 * 2 + lane_ / 16) ^ (lane_ % 8);
      stmatrix_x4(row + d / 4 * (kSliceElements * 2) + chunk * 16, a);
    }
    is_q_held_ = true;
    const int num_rows = at.rows - warp_row_;
    if (num_rows >= 16 || at.begin + at.rows == p_.frame.queries.length) {
      fence_stores();
      __syncwarp();
      if (lane_ == 0) {
#pragma unroll
        for (int slice = 0; slice < Traits::kSlices; ++slice) {
          store_box(o_map_, rows + slice * kSliceElements, slice * 64, at.begin + warp_row_, at.h,
                    at.b);
        }
        commit_stores();
      }
      return;
    }
    // Rows of the next block follow those of this one.
    __syncwarp();
    constexpr int kChunks = kHeadDim / 8;
    for (int idx = lane_; idx < num_rows * kChunks; idx += kWarpSize) {
      const int r = idx / kChunks, c = idx % kChunks;
      *reinterpret_cast<uint4*>(p_.o.row<T>(at.b, at.h, at.begin + warp_row_ + r) + c * 8) =
          *reinterpret_cast<const uint4*>(rows + c / 8 * kSliceElements + r * 64 +
                                          ((c ^ r) % 8) * 8);
    }
    __syncwarp();
  }

  const SparseForward& p_;
  const CUtensorMap& o_map_;
  SparseForwardSm90Shared<Traits>& shared_;
  const int lane_, warp_row_;
  RingCursor<Traits::kSlots> ring_;
  uint32_t q_parity_ = 0;
  int32_t block_ = 0;

  float o_[kHeadDim / 2];          // o_s times l
  uint32_t p_frag_[kTileK / 4];    // P
  uint32_t q_[kHeadDim / 4];       // q
  float row_max_[2], row_sum_[2];  // m, log2 units; l of this lane's columns
  float factor_[2], last_factor_[2];
  bool is_raised_ = false;
  bool is_q_held_ = false;  // whether o may still be leaving from the place of the queries
  bool is_first_ = true;    // whether nothing is in o yet
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    sparse_forward_sm90_kernel(const __grid_constant__ SparseForwardSm90Params params) {
  begin_kernel();
  extern __shared__ __align__(1024) unsigned char bytes[];
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
      init(shared.list_empty[n], 1);
    }
    fence_barrier_init();
  }
  __syncthreads();
  if (warp_index() < 4) {
    give_back_registers<Traits::kLoadRegisters>();
    if (warp_index() == 0 && lane_index() == 0) {
      SparseForwardSm90Loader<Traits>(params, shared).run();
    } else if (warp_index() == 1) {
      look_up(params, shared);
    }
  } else {
    take_registers<Traits::kMultiplyRegisters>();
    SparseForwardSm90Rows<Traits>(params, shared).run();
  }
}

/// False, and nothing is launched, where the copy engine cannot read the tensors or the lists have
/// no room.
template <class Traits>
bool launch_sparse_forward_sm90(const SparseForward& params, int num_multiprocessors,
                                void* stream) {
  const Frame& f = params.frame;
  SparseForwardSm90Params p{.forward = params};
  const bool is_encoded = encode_rows(p.q, params.q, params.dtype, f.batch, f.num_heads,
                                      f.queries.length, f.head_dim, Traits::kTileQ) &&
                          encode_rows(p.k, params.k, params.dtype, f.batch, f.num_kv_heads,
                                      f.keys.length, f.head_dim, Traits::kRunK) &&
                          encode_rows(p.v, params.v, params.dtype, f.batch, f.num_kv_heads,
                                      f.keys.length, f.head_dim, Traits::kRunK) &&
                          encode_rows(p.o, params.o, params.dtype, f.batch, f.num_heads,
                                      f.queries.length, f.head_dim, 16);
  const int64_t shared_bytes = static_cast<int64_t>(sizeof(SparseForwardSm90Shared<Traits>)) +
                               2 * RowScan::bytes(f.keys.num_blocks);
  constexpr int64_t kMostSharedBytes = 227 * 1024;
  if (!is_encoded || shared_bytes > kMostSharedBytes) return false;
  p.forward.scale_log2 = std::max(params.scale * kLog2E, kLeastScale);
  p.num_blocks = params.wave.count * f.group() * f.queries.num_blocks;
  launch(sparse_forward_sm90_kernel<Traits>,
         {.blocks = std::min(p.num_blocks, num_multiprocessors),
          .threads = Traits::kThreads,
          .shared_bytes = shared_bytes},
         stream, p);
  return true;
}

template <int kHeadDim>
bool sparse_forward_sm90(const SparseForward& params, int num_multiprocessors, void* stream) {
  return params.dtype == DType::kBF16
             ? launch_sparse_forward_sm90<SparseForwardSm90Traits<bf16, kHeadDim>>(
                   params, num_multiprocessors, stream)
             : launch_sparse_forward_sm90<SparseForwardSm90Traits<fp16, kHeadDim>>(
                   params, num_multiprocessors, stream);
}

}  // namespace sparline::cuda
