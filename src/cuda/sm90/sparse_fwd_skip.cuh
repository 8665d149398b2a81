// SPDX-License-Identifier: Apache-2.0
//
// The Hopper forward, warpgroups 1 and 2, with a skip rule (BLASST, DynSparse): a key block whose
// scores lie below a limit in all rows of the query block,
//     max S < m + ln lambda  or  max S < ln l + lambda,
// leaves no trace: no exponentials, no product with its values, and these are not loaded.
//
// Each warp votes for its rows on both runs of a tile. One that wants a run goes on with it at
// once: it stays, whatever the others say. One that does not waits until the warp that loads values
// tells it what becomes of the run, or makes P of it all the same (kSkipWaits). Whether P is
// multiplied is asked only when the values are there, or will not come, and by then the scores of
// the next tile are done as well: no vote stands between the tiles.
//
// The second run of a tile is compared with limits that depend on the first one. The running
// maximum does not: all rows of a run that is skipped lie below it. The sum of the keys that stay
// does, so that there are two votes, one for either case.
#pragma once

#include "cuda/sm90/sparse_fwd_multiply.cuh"

namespace sparline::cuda {

template <class Traits>
class SparseForwardSm90SkipRows : SparseForwardSm90Rows<Traits> {
  using Rows = SparseForwardSm90Rows<Traits>;
  using Cast = Votes<true>;
  using Rows::block_;
  using Rows::k_;
  using Rows::kFirstTurn;
  using Rows::kHeadDim;
  using Rows::kMultiplyThreads;
  using Rows::kRunK;
  using Rows::kTileK;
  using Rows::lane_;
  using Rows::o_;
  using Rows::p_;
  using Rows::p_frag_;
  using Rows::row_max_;
  using Rows::row_sum_;
  using Rows::shared_;
  using Rows::v_;
  static constexpr uint32_t kFirst = TileInfo::kFirstStays, kSecond = TileInfo::kSecondStays;

 public:
  __device__ SparseForwardSm90SkipRows(const SparseForwardSm90Params& params,
                                       SparseForwardSm90Shared<Traits>& shared)
      : Rows(params, shared), threshold_log2_(params.threshold_log2) {}

  __device__ __forceinline__ void run() {
    wait(shared_.full[0], 0);
    TileInfo tile = shared_.infos[0];
    if (tile.num_keys == TileInfo::kEnd) return;
    if (Traits::kTakesTurns && warp_index() >= 8) arrive_named(kFirstTurn, kMultiplyThreads);
    block_ = -1;
    do {
      // Rows are long where a rule skips: there is little to gain from the next block's first tile
      // beside this one's end, for which there are no registers.
      if (tile.block >= 0) {
        if (block_ >= 0) end_block();
        begin_block(tile.block);
      }
      if (__builtin_expect(tile.has_second(), 1)) {
        step<kTileK>(tile);
      } else {
        step<kRunK>(tile);
      }
    } while (next_tile(tile));
    end_block();
    if (Traits::kTakesTurns && warp_index() < 8) sync_named(kFirstTurn, kMultiplyThreads);
  }

 private:
  /// Waits for the keys of the next tile; false if there is none. They lie behind the values of the
  /// tile before the last one, and those of the last one behind them.
  __device__ __forceinline__ bool next_tile(TileInfo& tile) {
    k_ = v_;
    k_.advance();
    v_ = k_;
    v_.advance();
    wait(shared_.full[k_.slot], k_.parity);
    tile = shared_.infos[k_.slot];
    return tile.num_keys != TileInfo::kEnd;
  }

  __device__ __forceinline__ void begin_block(int32_t block) {
    this->load_queries(block);
    this->reset(block);
#pragma unroll
    for (int n = 0; n < kHeadDim / 2; ++n) o_[n] = 0.0f;
  }
  /// P v of the last tile, and the results.
  __device__ __forceinline__ void end_block() {
    const uint32_t stays = wait_for_values();
    if (stays == (kFirst | kSecond)) {
      add_values<kFirst | kSecond>();
    } else if (stays == kFirst) {
      add_values<kFirst>();
    } else if (stays == kSecond) {
      add_values<kSecond>();
    }
    this->release(v_.slot);
    this->finish(block_, row_max_, row_sum_);
  }
  template <uint32_t kStays>
  __device__ __forceinline__ void add_values() {
    start_values<kStays>(v_.slot);
    add_sums<kStays>();
    wgmma_wait<0>();
  }

  /// Which runs of the tile before stay. Their values are there.
  __device__ __forceinline__ uint32_t wait_for_values() {
    wait(shared_.full[v_.slot], v_.parity);
    return shared_.infos[v_.slot].num_keys;
  }
  /// Starts o += P v.
  template <uint32_t kStays>
  __device__ __forceinline__ void start_values(int slot) {
    constexpr int kBegin = (kStays & kFirst) != 0 ? 0 : kRunK;
    constexpr int kEnd = (kStays & kSecond) != 0 ? kTileK : kRunK;
    const uint32_t b = matrix_descriptor(shared_address(shared_.slots[slot]), Traits::kSliceBytesK);
    wgmma_fence();
#pragma unroll
    for (int n = kBegin / 16; n < kEnd / 16; ++n) {
      wgmma<typename Traits::T, kHeadDim, true>(o_, p_frag_ + n * 4, b + (n * 16 * 128 >> 4), 1);
    }
    wgmma_commit();
  }
  template <uint32_t kStays>
  __device__ __forceinline__ void add_sums() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if constexpr ((kStays & kFirst) != 0) row_sum_[half] += sums_[0][half];
      if constexpr ((kStays & kSecond) != 0) row_sum_[half] += sums_[1][half];
    }
  }

  /// S of a tile; then P of it, beside P v of what stays of the one before, in a function of both
  /// for the reasons of SparseForwardSm90Rows::step(). No product is under way where they part.
  template <int kKeys>
  __device__ __forceinline__ void step(const TileInfo& tile) {
    const int k_slot = k_.slot, v_slot = v_.slot;
    float s[kKeys / 2];
    if constexpr (Traits::kTakesTurns) sync_named(warp_index() / 4, kMultiplyThreads);
    this->template start_scores<kKeys>(s);
    if constexpr (Traits::kTakesTurns) arrive_named(3 - warp_index() / 4, kMultiplyThreads);
    wgmma_wait<0>();
    this->release(k_slot);
    uint32_t stays = 0;
    if (tile.block < 0) {
      stays = wait_for_values();
      if (stays == 0) this->release(v_slot);
    }
    if (__builtin_expect(stays == (kFirst | kSecond), 1)) {
      softmax<kKeys, kFirst | kSecond>(s, tile, v_slot);
    } else if (stays == 0) {
      softmax<kKeys, 0>(s, tile, v_slot);
    } else if (stays == kFirst) {
      softmax<kKeys, kFirst>(s, tile, v_slot);
    } else {
      softmax<kKeys, kSecond>(s, tile, v_slot);
    }
  }
  template <int kKeys, uint32_t kStays>
  __device__ __forceinline__ void softmax(float (&s)[kKeys / 2], const TileInfo& tile, int v_slot) {
    if constexpr (kStays != 0) start_values<kStays>(v_slot);
    add_sums<kStays>();
    sums_[0][0] = sums_[0][1] = sums_[1][0] = sums_[1][1] = 0.0f;
    float limit[2];
    find_limits(limit, row_sum_);
    this->template start_softmax<kKeys>(s, tile);
    float first[2], second[2];
    this->template find_lane_tops<0>(s, first);
    bool wants_first, wants_second = false;
    if (kKeys > kRunK && is_tile_a_block()) {
      this->template find_lane_tops<1>(s, second);
      const float both[2] = {fmaxf(first[0], second[0]), fmaxf(first[1], second[1])};
      wants_first = wants_second = cast(Cast::kFirst, both, limit);
    } else {
      wants_first = cast(Cast::kFirst, first, limit);
    }
    follow<0>(first, s);
    if constexpr (kKeys > kRunK) {
      this->template find_lane_tops<1>(s, second);
      if (!is_tile_a_block()) {
        if (is_running_max()) find_limits(limit, row_sum_);
        wants_second = cast(is_running_max() ? Cast::kSecond : Cast::kSecondAlone, second, limit);
      }
    }
    const bool has_first = is_wanted(wants_first, Cast::kFirstKnown, kFirst);
    if (has_first) this->template exponentials<0>(s, sums_[0]);
    bool has_second = false;
    if constexpr (kKeys > kRunK) {
      if (!is_tile_a_block() && !is_running_max()) {
        find_limits(limit, {row_sum_[0] + sums_[0][0], row_sum_[1] + sums_[0][1]});
        wants_second = cast(Cast::kSecond, second, limit) || wants_second;
      }
      has_second = is_wanted(wants_second, Cast::kSecondKnown, kSecond);
      if (has_second) follow<1>(second, s);
    }
    const bool is_raised = this->is_raised_;
    if constexpr (kStays != 0) {
      wgmma_wait<0>();
      this->release(v_slot);
    }
    if (has_first) this->template pack_p<0>(s);
    if constexpr (kKeys > kRunK) {
      if (has_second) {
        this->template exponentials<1>(s, sums_[1]);
        this->template pack_p<1>(s);
      }
    }
    ++turn_;
    if (is_raised) this->rescale();
  }

  /// Whether a rule decides over both runs of a tile at once, because key blocks have two.
  __device__ bool is_tile_a_block() const { return p_.block_k > kRunK; }
  __device__ bool is_running_max() const { return p_.skip.reference == SkipReference::kRunningMax; }

  /// The warp's vote: rows that are not below their limits. `top`: of this lane's columns.
  __device__ __forceinline__ bool cast(int kind, const float (&top)[2], const float (&limit)[2]) {
    uint32_t rows = Cast::kIsCast;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t lanes = __ballot_sync(kAllLanes, !(top[half] < limit[half]));
      lanes |= lanes >> 1;
      lanes |= lanes >> 2;  // the first lane of each row speaks for all four
      rows |= (lanes & Cast::kRows) << half;
    }
    if (lane_ == 0) post(shared_.votes.words[turn_ & 1][kind][warp_index() - 4], rows);
    return rows != Cast::kIsCast;
  }
  /// Whether P of a run is wanted: where this warp `wants` it, or as soon as others do.
  __device__ __forceinline__ bool is_wanted(bool wants, uint32_t known, uint32_t stays) const {
    if (!Traits::kSkipWaits || wants) return true;
    const uint32_t sure = known | Cast::use_of(turn_);
    uint32_t decision;
    do {
      decision = posted(shared_.votes.decisions[turn_ & 1]);
    } while ((decision & (known | Cast::kUse)) != sure);
    return __any_sync(kAllLanes, (decision & stays) != 0) != 0;
  }
  /// What the next scores of the rows must reach, log2 units. Of rows without keys so far: -inf.
  __device__ __forceinline__ void find_limits(float (&limit)[2], const float (&row_sum)[2]) const {
    float above[2] = {0.0f, 0.0f};
    if (!is_running_max()) {
      above[0] = __log2f(quad_sum(row_sum[0]));
      above[1] = __log2f(quad_sum(row_sum[1]));
    }
    limit[0] = row_max_[0] + above[0] + threshold_log2_;
    limit[1] = row_max_[1] + above[1] + threshold_log2_;
  }
  /// Raises the maxima of the rows where a run's scores are too high for them; maxima lag behind
  /// where the rule does not ask for them. Those of a run that is skipped do no harm: they are only
  /// what exponents are counted from.
  template <int kRun, int kSize>
  __device__ __forceinline__ void follow(const float (&top)[2], float (&s)[kSize]) {
    if (!this->is_high(top, is_running_max() ? 0.0f : Rows::kLazyLog2)) return;
    this->template raise<kRun>(top, s);
    if constexpr (kRun > 0) {
      sums_[0][0] *= this->last_factor_[0];
      sums_[0][1] *= this->last_factor_[1];
    }
  }

  const float& threshold_log2_;
  float sums_[2][2];   // of P of the last tile: by run; those of this lane's columns
  uint32_t turn_ = 0;  // the number of the next tile
};

}  // namespace sparline::cuda
