// SPDX-License-Identifier: Apache-2.0
//
// The Hopper forward, warpgroups 1 and 2, with a skip rule (BLASST, DynSparse) and key blocks of at
// most 64 keys, a run: a block whose scores lie below a limit in all rows of the query block,
//     max S < m + ln lambda  or  max S < ln l + lambda,
// leaves no trace: no exponentials, no product with its values, and these are not loaded.
//
// A tile is two runs, or one at the end, and there are two places for its scores: S of the next
// tile is under way while this one is decided upon, so that the tensor cores have work while warps
// wait for each other's votes. A vote is on both runs; one that wants a run goes on at once: it
// stays, whatever the others say. One that does not looks at the votes until one of them wants it,
// or all are there. The limits of the second run are those behind the first one, which can only
// raise them where it stays: then, and if somebody wants the second run by the limits before it,
// there is another vote. The warp that loads values looks at the same votes. Values are handed over
// for the runs that stay, and for no other.
//
//   Shared    queries, where they are the A operand: there are no registers for them. A ring of 3
//             slots (head_dim 128) of 128 keys, and one of 6 slots of values of 64
//   Sync      keys are given back once multiplied, queries at the end of a query block; votes take
//             the place of older ones, upon which the warp that loads values has decided: it counts
//             tiles in a word, and keys wait for that
//   Counts    of rows that did without a run are added up at the end of a query block, by the warps
//             that multiply; bits of the blocks that stay are stored by the warp that loads values
#pragma once

#include "cuda/sm90/sparse_fwd_multiply.cuh"

namespace sparline::cuda {

template <class Traits>
class SparseForwardSm90SkipRuns : SparseForwardSm90Rows<Traits> {
  using Rows = SparseForwardSm90Rows<Traits>;
  using Rows::block_;
  using Rows::kHeadDim;
  using Rows::kRunK;
  using Rows::lane_;
  using Rows::o_;
  using Rows::p_;
  using Rows::row_max_;
  using Rows::row_sum_;
  using Rows::shared_;
  using Votes = RunVotes<Traits::kTurns, Traits::kPlaces>;
  using Scores = float[kRunK];  // of two runs

 public:
  __device__ SparseForwardSm90SkipRuns(const SparseForwardSm90Params& params,
                                       SparseForwardSm90Shared<Traits>& shared)
      : Rows(params, shared),
        threshold_log2_(params.threshold_log2),
        queries_(matrix_descriptor(
            shared_address(shared.q) + __shfl_sync(kAllLanes, warp_index() / 4 - 1, 0) * 64 * 128,
            0)) {}

  __device__ __forceinline__ void run() {
    Scores even, odd;
    read_next();
    while (next_.num_keys != TileInfo::kEnd) {
      begin_block(even);
      while (true) {
        if (is_last()) {
          end_block(even);
          break;
        }
        step<true>(even, odd);
        if (is_last()) {
          end_block(odd);
          break;
        }
        step<true>(odd, even);
      }
      this->finish(block_, row_max_, row_sum_);
      if (lane_ == 0) add_passes();
    }
  }

 private:
  /// Waits for the keys of the next tile.
  __device__ __forceinline__ void read_next() {
    wait(shared_.full[2 * keys_.slot], keys_.parity);
    next_ = shared_.infos[2 * keys_.slot];
  }
  /// Whether the next tile, if there is any, is of another query block.
  __device__ bool is_last() const { return next_.block >= 0 || next_.num_keys == TileInfo::kEnd; }

  /// The queries, and S of the first tile.
  __device__ __forceinline__ void begin_block(Scores& s) {
    this->wait_for_queries(next_.block);
    this->reset(next_.block);
    this->is_first_ = true;
    num_passes_ = 0;
    num_rows_ =
        static_cast<uint32_t>(min(max(shared_.places[block_].rows - this->warp_row_, 0), 16));
    find_limits();
    start_scores(s, keys_.slot);
    wgmma_wait<0>();
    this->release(2 * keys_.slot);
    go_on();
  }
  __device__ __forceinline__ void go_on() {
    num_keys_ = next_.num_keys;
    keys_.advance();
    read_next();
  }
  /// The last decision, and the results.
  __device__ __forceinline__ void end_block(Scores& last) {
    this->release_queries();
    step<false>(last, last);
  }
  /// The last warp of a query block stores how many rows did without a run.
  __device__ void add_passes() {
    constexpr uint32_t kOne = 1u << Votes::kCountBits;
    const uint32_t others = atomicAdd(&shared_.votes.num_passes[block_], num_passes_ + kOne);
    if (others / kOne != Votes::kWarps - 1 || p_.row_votes == nullptr) return;
    p_.row_votes[shared_.places[block_].z] = static_cast<float>(others % kOne + num_passes_);
  }

  /// Starts S = q k^T of a tile, with the queries in shared memory. Columns of a run that is not
  /// there are those of keys from before, which nobody looks at.
  __device__ __forceinline__ void start_scores(Scores& s, int slot) {
    const uint32_t b = matrix_descriptor(shared_address(shared_.slots[2 * slot]), 0);
    wgmma_fence();
#pragma unroll
    for (int d = 0; d < kHeadDim / 16; ++d) {
      wgmma_shared<typename Traits::T, 2 * kRunK, false, false>(
          s, queries_ + ((d / 4 * Traits::kSliceBytesQ + d % 4 * 32) >> 4),
          b + ((d / 4 * 2 * Traits::kSliceBytesK + d % 4 * 32) >> 4), d > 0);
    }
    wgmma_commit();
  }
  /// o += P v of the runs that stay, S of the next tile, and their places given back.
  template <bool kHasNext, bool kFirst, bool kSecond>
  __device__ __forceinline__ void finish_step(const Scores& s, int k_slot) {
    uint32_t p[kRunK / 2];
    if constexpr (kFirst) pack_run<0>(s, p);
    if constexpr (kSecond) pack_run<1>(s, p);
    if constexpr (kFirst || kSecond) {
      RingCursor<Traits::kKeySlots> place = values_;
      if constexpr (kFirst) {
        start_values<0>(p, place, !this->is_first_);
        place.advance();
      }
      if constexpr (kSecond) start_values<1>(p, place, kFirst ? 1 : !this->is_first_);
      wgmma_commit();
      this->is_first_ = false;
    }
    if constexpr (kHasNext || kFirst || kSecond) wgmma_wait<0>();
    if constexpr (kHasNext) this->release(2 * k_slot);
    if constexpr (kFirst) release_values();
    if constexpr (kSecond) release_values();
  }
  template <int kRun>
  __device__ __forceinline__ void pack_run(const Scores& s, uint32_t (&p)[kRunK / 2]) const {
#pragma unroll
    for (int n = kRun * kRunK / 4; n < (kRun + 1) * kRunK / 4; ++n) {
      p[n] = pack<typename Traits::T>(s[n * 2], s[n * 2 + 1]);
    }
  }
  template <int kRun>
  __device__ __forceinline__ void start_values(const uint32_t (&p)[kRunK / 2],
                                               const RingCursor<Traits::kKeySlots>& place,
                                               int adds) {
    const int slot = Traits::kKeySlots + place.slot;
    wait(shared_.full[slot], place.parity);
    const uint32_t b = matrix_descriptor(shared_address(shared_.slots[slot]), Traits::kSliceBytesK);
    wgmma_fence();
#pragma unroll
    for (int n = 0; n < kRunK / 16; ++n) {
      wgmma<typename Traits::T, kHeadDim, true>(o_, p + kRun * kRunK / 4 + n * 4,
                                                b + (n * 16 * 128 >> 4), n == 0 ? adds : 1);
    }
  }
  __device__ __forceinline__ void release_values() {
    this->release(Traits::kKeySlots + values_.slot);
    values_.advance();
  }

  /// The decisions about the runs of a tile, P v of those that stay, and S of the next tile.
  template <bool kHasNext>
  __device__ __forceinline__ void step(Scores& s, Scores& next) {
    const int k_slot = keys_.slot;
    if constexpr (kHasNext) start_scores(next, k_slot);
    const uint32_t counts = num_keys_ & TileInfo::kCounts;
    if (counts != TileInfo::kFull) this->template mask_keys<2 * kRunK>(s, {counts, 0});
    const bool has_second = counts >= 256;
    const bool is_sure = (num_keys_ & TileInfo::kIsKept) != 0;
    const bool is_second_sure = (num_keys_ & TileInfo::kIsSecondKept) != 0;
    this->is_raised_ = false;
    float first[2], second[2];
    if (__builtin_expect(is_positive_, 1)) {
      this->template find_positive_tops<0>(s, first);
      this->template find_positive_tops<1>(s, second);
    } else {
      this->template find_lane_tops<0>(s, first);
      this->template find_lane_tops<1>(s, second);
    }
    // Without short cuts here: each would be a branch, or turn a predicate of the warp into one of
    // lanes and back.
    const bool wants_first = is_sure | is_above(first);
    const bool wants_second = has_second & (is_second_sure | is_above(second));
    cast((wants_first ? Votes::kWantsFirst : 0u) | (wants_second ? Votes::kWantsSecond : 0u));
    if constexpr (kHasNext) go_on();
    uint32_t wishes = 0;  // of all warps, where none wants the first run
    const bool keeps_first = wants_first || heeds<Votes::kWantsFirst>(wishes);
    bool keeps_second = wants_second;
    if (!keeps_first) {
      const bool is_wanted = __any_sync(kAllLanes, (wishes & Votes::kWantsSecond) != 0) != 0;
      keeps_second |= has_second & is_wanted;
    }
    if (!keeps_first && !keeps_second) {  // nobody wants anything: the shortest way on
      next_turn();
      num_passes_ += has_second ? 2 * num_rows_ : num_rows_;
      finish_step<kHasNext, false, false>(s, k_slot);
      return;
    }
    const bool has_votes = p_.row_votes != nullptr;
    if (!is_sure) num_passes_ += num_rows_;
    if (has_second && !is_second_sure) num_passes_ += num_rows_;
    if (keeps_first) {
      if (has_votes && !is_sure) num_passes_ -= num_rows_above(first);
      this->template follow_tops<0>(first, lazy_log2(), s);
      this->template exponentials<0>(s);
      find_limits();
      if (has_second && !keeps_second) keeps_second = heeds<Votes::kWantsSecond>(wishes);
      if (keeps_second && !is_second_sure) {
        next_turn();
        keeps_second = is_above(second);
        cast(keeps_second ? Votes::kWantsFirst : 0u);
        if (!keeps_second) keeps_second = heeds<Votes::kWantsFirst>(wishes);
      }
    }
    next_turn();
    if (keeps_second) {
      if (has_votes && !is_second_sure) num_passes_ -= num_rows_above(second);
      this->template follow_tops<1>(second, lazy_log2(), s);
      this->template exponentials<1>(s);
      find_limits();
    }
    if (this->is_raised_) this->rescale();
    // No product is under way where they part but S of the next tile.
    if (keeps_first && keeps_second) {
      finish_step<kHasNext, true, true>(s, k_slot);
    } else if (keeps_first) {
      finish_step<kHasNext, true, false>(s, k_slot);
    } else {
      finish_step<kHasNext, false, true>(s, k_slot);
    }
  }
  __device__ __forceinline__ void next_turn() {
    vote_ += Votes::kOne;
    turn_ = (turn_ + 1) % Votes::kTurns;
  }

  __device__ bool is_running_max() const { return p_.skip.reference == SkipReference::kRunningMax; }
  __device__ float lazy_log2() const { return is_running_max() ? 0.0f : Rows::kLazyLog2; }
  /// What scores of the rows must reach until a run stays, log2 units. Of rows without keys so far:
  /// -inf.
  __device__ __forceinline__ void find_limits() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float above = is_running_max() ? 0.0f : __log2f(quad_sum(row_sum_[half]));
      limit_[half] = row_max_[half] + above + threshold_log2_;
    }
    is_positive_ = __all_sync(kAllLanes, is_positive(0) && is_positive(1)) != 0;
  }
  __device__ __forceinline__ bool is_positive(int half) const {
    return !is_row(half) || (row_max_[half] >= 0.0f && limit_[half] > 0.0f);
  }
  /// Whether a row of this half is not below its limit, as far as this lane's columns tell: `top`.
  __device__ __forceinline__ bool is_above(const float (&top)[2], int half) const {
    return is_row(half) & !(top[half] < limit_[half]);
  }
  /// Whether any row of the warp is: the vote tells ptxas that all lanes go the same way.
  __device__ __forceinline__ bool is_above(const float (&top)[2]) const {
    return __any_sync(kAllLanes, is_above(top, 0) | is_above(top, 1)) != 0;
  }
  __device__ __forceinline__ uint32_t num_rows_above(const float (&top)[2]) const {
    const uint32_t low = __ballot_sync(kAllLanes, is_above(top, 0));
    const uint32_t high = __ballot_sync(kAllLanes, is_above(top, 1));
    return static_cast<uint32_t>(__popc(rows_of(low) | rows_of(high) << 1));
  }
  __device__ __forceinline__ void cast(uint32_t wishes) {
    uint32_t& word = shared_.votes.words[turn_][lane_ % Votes::kWarps];
    if (lane_ == warp_index() - 4) post(word, vote_ | wishes);
  }
  /// Whether another warp has this wish, in the last vote.
  template <uint32_t kWish>
  __device__ __forceinline__ bool heeds(uint32_t& wishes) const {
    return wait_for_wish<kWish>(shared_.votes, vote_, turn_, wishes);
  }
  /// The rows of lanes, a bit each.
  __device__ static uint32_t rows_of(uint32_t lanes) {
    lanes |= lanes >> 1;
    lanes |= lanes >> 2;  // the first lane of each row speaks for all four
    return lanes & 0x11111111u;
  }
  __device__ bool is_row(int half) const {
    return static_cast<uint32_t>(lane_ / 4 + half * 8) < num_rows_;
  }

  const float& threshold_log2_;
  const uint32_t queries_;                  // of the warpgroup's rows, a descriptor
  RingCursor<Traits::kKeySlots / 2> keys_;  // of the next tile
  RingCursor<Traits::kKeySlots> values_;    // of the next run that stays
  TileInfo next_;
  uint32_t num_keys_;            // TileInfo's, of the tile whose scores are there
  uint32_t vote_ = Votes::kOne;  // the next one, without a wish
  uint32_t turn_ = 1;            // and its place
  float limit_[2];               // of this lane's rows
  bool is_positive_ = false;     // no row of the warp has a maximum below 0, or a limit not above
  uint32_t num_rows_;            // of this warp
  uint32_t num_passes_;          // how many of them did without a run; right if that is stored
};

}  // namespace sparline::cuda
