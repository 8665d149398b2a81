// SPDX-License-Identifier: Apache-2.0
//
// The Hopper forward, warpgroups 1 and 2, with a skip rule (BLASST, DynSparse) and key blocks of at
// most 64 keys, a run: a block whose scores lie below a limit in all rows of the query block,
//     max S < m + ln lambda  or  max S < ln l + lambda,
// leaves no trace: no exponentials, no product with its values, and these are not loaded.
//
// A tile is a run, and there are two places for scores. S of the next run is under way while this
// one is decided upon, and so is P v of the one before it, if that stays: while warps wait for each
// other's votes, the tensor cores have work. One that wants the run goes on at once: it stays,
// whatever the others say. One that does not looks at the votes until one of them wants it, or all
// are there. The warp that loads values looks at the same votes. Values are handed over for the
// runs that stay, and for no other.
#pragma once

#include "cuda/sm90/sparse_fwd_multiply.cuh"

namespace sparline::cuda {

template <class Traits>
class SparseForwardSm90SkipRuns : SparseForwardSm90Rows<Traits> {
  using Rows = SparseForwardSm90Rows<Traits>;
  using Rows::block_;
  using Rows::k_;
  using Rows::kRunK;
  using Rows::lane_;
  using Rows::p_;
  using Rows::row_max_;
  using Rows::row_sum_;
  using Rows::shared_;
  using Rows::v_;
  using Scores = float[kRunK / 2];

 public:
  __device__ SparseForwardSm90SkipRuns(const SparseForwardSm90Params& params,
                                       SparseForwardSm90Shared<Traits>& shared)
      : Rows(params, shared), threshold_log2_(params.threshold_log2) {}

  __device__ __forceinline__ void run() {
    Scores even, odd;
    read_next();
    while (next_.num_keys != TileInfo::kEnd) {
      begin_block(even);
      while (true) {
        if (is_last()) break;
        is_kept_ ? step<true, true>(even, odd) : step<false, true>(even, odd);
        if (is_last()) {
#pragma unroll
          for (int n = 0; n < kRunK / 2; ++n) even[n] = odd[n];
          break;
        }
        is_kept_ ? step<true, true>(odd, even) : step<false, true>(odd, even);
      }
      is_kept_ ? step<true, false>(even, even) : step<false, false>(even, even);
      end_block();
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
    this->load_queries(next_.block);
    this->reset(next_.block);
    this->is_first_ = true;
    is_kept_ = false;
    num_passes_ = 0;
    limit_[0] = limit_[1] = -INFINITY;
    num_rows_ =
        static_cast<uint32_t>(min(max(shared_.places[block_].rows - this->warp_row_, 0), 16));
    k_.slot = keys_.slot;
    this->template start_scores<kRunK>(s);
    wgmma_wait<0>();
    this->release(keys_.slot);
    num_keys_ = next_.num_keys;
    keys_.advance();
    read_next();
  }
  /// P v of the last run, and the results.
  __device__ __forceinline__ void end_block() {
    if (is_kept_) {
      add_values();
      wgmma_wait<0>();
      release_values();
    }
    this->finish(block_, row_max_, row_sum_);
    if (lane_ == 0) add_passes();
  }
  /// The last warp of a query block stores how many rows did without a run.
  __device__ void add_passes() {
    constexpr uint32_t kOne = 1u << RunVotes::kCountBits;
    const uint32_t others = atomicAdd(&shared_.votes.num_passes[block_], num_passes_ + kOne);
    if (others / kOne != RunVotes::kWarps - 1 || p_.row_votes == nullptr) return;
    p_.row_votes[shared_.places[block_].z] = static_cast<float>(others % kOne + num_passes_);
  }

  __device__ __forceinline__ void add_values() {
    v_.slot = Traits::kKeySlots + values_.slot;
    v_.parity = values_.parity;
    this->template start_values<kRunK>();
  }
  __device__ __forceinline__ void release_values() {
    this->release(Traits::kKeySlots + values_.slot);
    values_.advance();
    this->is_first_ = false;
  }

  /// The decision about a run, and its P; S of the next one (kHasNext), and P v of the one before,
  /// if that stays (kHasValues).
  template <bool kHasValues, bool kHasNext>
  __device__ __forceinline__ void step(Scores& s, Scores& next_s) {
    const int k_slot = keys_.slot;
    if constexpr (kHasNext) {
      k_.slot = k_slot;
      this->template start_scores<kRunK>(next_s);
    }
    if constexpr (kHasValues) find_limits();
    if ((num_keys_ & TileInfo::kCounts) != kRunK) {
      this->template mask_keys<kRunK>(s, {num_keys_ & TileInfo::kCounts, 0});
    }
    this->is_raised_ = false;
    float top[2];
    this->template find_lane_tops<0>(s, top);
    is_kept_ = cast(top);
    if constexpr (kHasNext) {
      num_keys_ = next_.num_keys;
      keys_.advance();
      read_next();
    }
    // A vote, for ptxas to see that all lanes go the same way: or products wait for each other
    // (C7520).
    is_kept_ = __any_sync(kAllLanes, is_kept_ || any_wants(shared_.votes, turn_));
    ++turn_;
    if (is_kept_) {
      this->template follow_tops<0>(top, is_running_max() ? 0.0f : Rows::kLazyLog2, s);
      exponentials<0>(s);
    }
    // Only now, as values come late: scores keep the tensor cores busy so far.
    if constexpr (kHasValues) add_values();
    if (is_kept_) exponentials<1>(s);
    const bool is_raised = this->is_raised_;
    if constexpr (kHasValues || kHasNext) wgmma_wait<0>();
    if constexpr (kHasNext) this->release(k_slot);
    if constexpr (kHasValues) release_values();
    if (is_kept_) this->template pack_p<0>(s);
    if (is_raised) this->rescale();
  }

  /// S of half of the run becomes P.
  template <int kHalf>
  __device__ __forceinline__ void exponentials(Scores& s) {
    constexpr int kBegin = kHalf * kRunK / 4;
    float sums[2] = {0.0f, 0.0f};
    // -inf - -inf is NaN: a row without keys so far is shifted by nothing.
    const float offsets[2] = {row_max_[0] == -INFINITY ? 0.0f : -row_max_[0],
                              row_max_[1] == -INFINITY ? 0.0f : -row_max_[1]};
#pragma unroll
    for (int n = kBegin; n < kBegin + kRunK / 4; ++n) {
      s[n] = exp2_approx(fmaf(s[n], p_.scale_log2, offsets[n / 2 % 2]));
      sums[n / 2 % 2] += s[n];
    }
    row_sum_[0] += sums[0];
    row_sum_[1] += sums[1];
  }

  __device__ bool is_running_max() const { return p_.skip.reference == SkipReference::kRunningMax; }
  /// What the next scores of the rows must reach, log2 units. Of rows without keys so far: -inf.
  __device__ __forceinline__ void find_limits() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // For both rules: without a branch it takes no time beside the maxima.
      const float above = __log2f(quad_sum(row_sum_[half]));
      limit_[half] = row_max_[half] + (is_running_max() ? 0.0f : above) + threshold_log2_;
    }
  }
  /// Casts the warp's vote, whether a row is not below its limit. `top`: of this lane's columns.
  __device__ __forceinline__ bool cast(const float (&top)[2]) {
    // Of ballots alone, which tells ptxas that all lanes go the same way.
    const uint32_t first = __ballot_sync(kAllLanes, is_row(0) && !(top[0] < limit_[0]));
    const uint32_t second = __ballot_sync(kAllLanes, is_row(1) && !(top[1] < limit_[1]));
    const bool is_sure = (num_keys_ & TileInfo::kIsKept) != 0;
    const bool wants = (first | second) != 0 || is_sure;
    if (lane_ == 0) {
      post(shared_.votes.words[turn_ % RunVotes::kTurns][warp_index() - 4],
           turn_ * 2 + (wants ? 1 : 0));
    }
    if (!is_sure) {
      num_passes_ +=
          num_rows_ - static_cast<uint32_t>(__popc(rows_of(first) | rows_of(second) << 1));
    }
    return wants;
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
  RingCursor<Traits::kKeySlots> keys_, values_;  // of the next run
  TileInfo next_;
  uint32_t num_keys_;     // TileInfo's, of the run whose scores are there
  uint32_t turn_ = 1;     // the number of that run
  bool is_kept_ = false;  // whether P of the last run waits for its values
  uint32_t num_rows_;     // of this warp
  uint32_t num_passes_;   // how many of them did without a run
  float limit_[2];
};

}  // namespace sparline::cuda
