// SPDX-License-Identifier: Apache-2.0
//
// The Hopper forward, warpgroups 1 and 2, with a skip rule (BLASST, DynSparse) and key blocks of at
// most 64 keys, a run: a block whose scores lie below a limit in all rows of the query block,
//     max S < m + ln lambda  or  max S < ln l + lambda,
// leaves no trace: no exponentials, no product with its values, and these are not loaded.
//
// A tile is a run, and there are two places for scores. S of the next run is under way while this
// one is decided upon, and so is P v of the last but one, if that stays: while warps wait for each
// other's votes, the tensor cores have work, and values have the time of a run to come. One that
// wants the run goes on at once: it stays, whatever the others say. One that does not looks at the
// votes until one of them wants it, or all are there. The warp that loads values looks at the same
// votes. Values are handed over for the runs that stay, and for no other.
//
//   Shared    queries, where they are the A operand: 64 columns take as long as 128 when A comes
//             out of registers. Two rings of 6 slots (head_dim 128) of 64 rows, keys and values
//   Sync      keys are given back by those who multiply and by the warp that loads values, queries
//             at the end of a query block
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
  using Scores = float[kRunK / 2];
  /// What there are two of.
  struct Run {
    Scores s;
    uint32_t p[kRunK / 4];
    uint32_t lanes;  // not 0 if p waits for its values: a ballot, which stays uniform for ptxas
    __device__ bool is_kept() const { return lanes != 0; }
  };

 public:
  __device__ SparseForwardSm90SkipRuns(const SparseForwardSm90Params& params,
                                       SparseForwardSm90Shared<Traits>& shared)
      : Rows(params, shared),
        threshold_log2_(params.threshold_log2),
        queries_(matrix_descriptor(
            shared_address(shared.q) + __shfl_sync(kAllLanes, warp_index() / 4 - 1, 0) * 64 * 128,
            0)) {}

  __device__ __forceinline__ void run() {
    Run even, odd;
    read_next();
    while (next_.num_keys != TileInfo::kEnd) {
      even.lanes = odd.lanes = 0;
      begin_block(even.s);
      while (true) {
        if (is_last()) {
          end_block(even, odd);
          break;
        }
        even.is_kept() ? step<true, true>(even, odd) : step<false, true>(even, odd);
        if (is_last()) {
          end_block(odd, even);
          break;
        }
        odd.is_kept() ? step<true, true>(odd, even) : step<false, true>(odd, even);
      }
      this->finish(block_, row_max_, row_sum_);
      if (lane_ == 0) add_passes();
    }
  }

 private:
  /// Waits for the keys of the next run.
  __device__ __forceinline__ void read_next() {
    wait(shared_.full[keys_.slot], keys_.parity);
    next_ = shared_.infos[keys_.slot];
  }
  /// Whether the next run, if there is any, is of another query block.
  __device__ bool is_last() const { return next_.block >= 0 || next_.num_keys == TileInfo::kEnd; }

  /// The queries, and S of the first run.
  __device__ __forceinline__ void begin_block(Scores& s) {
    this->wait_for_queries(next_.block);
    this->reset(next_.block);
    this->is_first_ = true;
    late_lanes_ = 0;
    num_passes_ = 0;
    num_rows_ =
        static_cast<uint32_t>(min(max(shared_.places[block_].rows - this->warp_row_, 0), 16));
    find_limits();
    start_scores(s, keys_.slot);
    wgmma_wait<0>();
    this->release(keys_.slot);
    num_keys_ = next_.num_keys;
    keys_.advance();
    read_next();
  }
  /// The last decision, P v of the last two runs, and the results.
  __device__ __forceinline__ void end_block(Run& last, Run& other) {
    this->release_queries();
    last.is_kept() ? step<true, false>(last, other) : step<false, false>(last, other);
    if (other.is_kept()) add_values(other);
    rescale_late();
    if (last.is_kept()) add_values(last);
  }
  /// The last warp of a query block stores how many rows did without a run.
  __device__ void add_passes() {
    constexpr uint32_t kOne = 1u << Votes::kCountBits;
    const uint32_t others = atomicAdd(&shared_.votes.num_passes[block_], num_passes_ + kOne);
    if (others / kOne != Votes::kWarps - 1 || p_.row_votes == nullptr) return;
    p_.row_votes[shared_.places[block_].z] = static_cast<float>(others % kOne + num_passes_);
  }

  /// Starts S = q k^T of a run, with the queries in shared memory: products of 64 columns whose A
  /// comes out of registers take as long as those of 128.
  __device__ __forceinline__ void start_scores(Scores& s, int slot) {
    const uint32_t b = matrix_descriptor(shared_address(shared_.slots[slot]), 0);
    wgmma_fence();
#pragma unroll
    for (int d = 0; d < kHeadDim / 16; ++d) {
      wgmma_shared<typename Traits::T, kRunK, false, false>(
          s, queries_ + ((d / 4 * Traits::kSliceBytesQ + d % 4 * 32) >> 4),
          b + ((d / 4 * Traits::kSliceBytesK + d % 4 * 32) >> 4), d > 0);
    }
    wgmma_commit();
  }
  /// Starts o += P v of a run that stays, once its values are there.
  __device__ __forceinline__ void start_values(const Run& run) {
    const int slot = Traits::kKeySlots + values_.slot;
    wait(shared_.full[slot], values_.parity);
    const uint32_t b = matrix_descriptor(shared_address(shared_.slots[slot]), Traits::kSliceBytesK);
    wgmma_fence();
#pragma unroll
    for (int n = 0; n < kRunK / 16; ++n) {
      wgmma<typename Traits::T, kHeadDim, true>(o_, run.p + n * 4, b + (n * 16 * 128 >> 4),
                                                n == 0 ? !this->is_first_ : 1);
    }
    wgmma_commit();
  }
  __device__ __forceinline__ void add_values(const Run& run) {
    start_values(run);
    wgmma_wait<0>();
    release_values();
  }
  __device__ __forceinline__ void release_values() {
    this->release(Traits::kKeySlots + values_.slot);
    values_.advance();
    this->is_first_ = false;
  }

  /// The decision about a run, and its P; S of the next one (kHasNext), and P v of the last but one
  /// if that stays (kHasValues).
  template <bool kHasValues, bool kHasNext>
  __device__ __forceinline__ void step(Run& run, Run& next) {
    const int k_slot = keys_.slot;
    if constexpr (kHasNext) start_scores(next.s, k_slot);
    float top[2];
    if ((num_keys_ & TileInfo::kCounts) != kRunK) {
      this->template mask_keys<kRunK>(run.s, {num_keys_ & TileInfo::kCounts, 0});
    }
    this->is_raised_ = false;
    this->template find_lane_tops<0>(run.s, top);
    const bool is_sure = (num_keys_ & TileInfo::kIsKept) != 0;
    const Wishes own = find_wishes(top);
    const uint32_t wishes = own.all(is_sure);
    cast(wishes);
    // After the vote, so that the others have it sooner.
    if constexpr (kHasValues) start_values(run);
    if constexpr (kHasNext) {
      num_keys_ = next_.num_keys;
      keys_.advance();
      read_next();
    }
    run.lanes = wishes != 0 ? wishes : wait_for_wish(shared_.votes, vote_, turn_);
    vote_ += 2;
    turn_ = (turn_ + 1) % Votes::kTurns;
    if (!is_sure) num_passes_ += num_rows_;
    if (run.is_kept()) {
      if (!is_sure) num_passes_ -= own.num_rows();
      this->template follow_tops<0>(top, is_running_max() ? 0.0f : Rows::kLazyLog2, run.s);
      this->template exponentials<0>(run.s);
      find_limits();
    }
    const bool is_raised = this->is_raised_;
    if constexpr (kHasValues || kHasNext) wgmma_wait<0>();
    if constexpr (kHasNext) this->release(k_slot);
    if constexpr (kHasValues) release_values();
    if (run.is_kept()) {
#pragma unroll
      for (int n = 0; n < kRunK / 4; ++n) {
        run.p[n] = pack<typename Traits::T>(run.s[n * 2], run.s[n * 2 + 1]);
      }
    }
    rescale_late();
    late_lanes_ = __ballot_sync(kAllLanes, is_raised);
    if (is_raised) {
      late_factor_[0] = this->factor_[0];
      late_factor_[1] = this->factor_[1];
    }
  }
  /// P of the last but one is in o now; next comes that of the last run, where maxima may have
  /// risen.
  __device__ __forceinline__ void rescale_late() {
    if (late_lanes_ == 0) return;
#pragma unroll
    for (int n = 0; n < kHeadDim / 2; ++n) o_[n] *= late_factor_[n / 2 % 2];
  }

  __device__ bool is_running_max() const { return p_.skip.reference == SkipReference::kRunningMax; }
  /// What scores of the rows must reach until a run stays, log2 units. Of rows without keys so far:
  /// -inf.
  __device__ __forceinline__ void find_limits() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float above = is_running_max() ? 0.0f : __log2f(quad_sum(row_sum_[half]));
      limit_[half] = row_max_[half] + above + threshold_log2_;
    }
  }
  /// The lanes that hold a row of the lower or upper half which is not below its limit.
  struct Wishes {
    uint32_t lanes[2];
    /// All where nobody is asked.
    __device__ uint32_t all(bool is_sure) const {
      return is_sure ? kAllLanes : (lanes[0] | lanes[1]);
    }
    __device__ uint32_t num_rows() const {
      return static_cast<uint32_t>(__popc(rows_of(lanes[0]) | rows_of(lanes[1]) << 1));
    }
  };
  /// `top`: of this lane's columns. Of ballots alone, which tells ptxas that all lanes go the same
  /// way.
  __device__ __forceinline__ Wishes find_wishes(const float (&top)[2]) const {
    return {{__ballot_sync(kAllLanes, is_row(0) && !(top[0] < limit_[0])),
             __ballot_sync(kAllLanes, is_row(1) && !(top[1] < limit_[1]))}};
  }
  __device__ __forceinline__ void cast(uint32_t wishes) {
    uint32_t& word = shared_.votes.words[turn_][lane_ % Votes::kWarps];
    if (lane_ == warp_index() - 4) post(word, vote_ + (wishes != 0 ? 1 : 0));
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
  const uint32_t queries_;                       // of the warpgroup's rows, a descriptor
  RingCursor<Traits::kKeySlots> keys_, values_;  // of the next run
  TileInfo next_;
  uint32_t num_keys_;        // TileInfo's, of the run whose scores are there
  uint32_t vote_ = 2;        // on that run, without a wish
  uint32_t turn_ = 1;        // place of votes on it
  float limit_[2];           // of this lane's rows
  uint32_t late_lanes_ = 0;  // not 0 if maxima have risen in the last run, by late_factor_
  uint32_t num_rows_;        // of this warp
  uint32_t num_passes_;      // how many of them did without a run
  float late_factor_[2];
};

}  // namespace sparline::cuda
