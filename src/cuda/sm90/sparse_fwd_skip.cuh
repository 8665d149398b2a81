// SPDX-License-Identifier: Apache-2.0
//
// The Hopper forward, warpgroups 1 and 2, with a skip rule (BLASST, DynSparse): a key block whose
// scores lie below a limit in all rows of the query block,
//     max S < m + ln lambda  or  max S < ln l + lambda,
// leaves no trace: no exponentials, no product with its values, and these are not loaded. For key
// blocks of more than 64 keys, or too many of them for the lists of sparse_fwd_skip_runs.cuh.
//
// Every warp votes for its rows on both runs of a tile. One that wants a run goes on with it at
// once: it stays, whatever the others say. One that does not waits for all eight. The second run is
// asked about twice where that matters: first against the limits before the first run; if that
// stays and the second one is wanted, the limits rise and so a second round may end otherwise. No
// other case has one, as nobody who does without a run wants it when limits are higher. The warp
// that loads values counts the same votes. P v of a tile is under way during the next tile's vote,
// or skipped.
#pragma once

#include "cuda/sm90/sparse_fwd_multiply.cuh"

namespace sparline::cuda {

template <class Traits>
class SparseForwardSm90SkipRows : protected SparseForwardSm90Rows<Traits> {
 protected:
  using Rows = SparseForwardSm90Rows<Traits>;
  using Round = Votes<true>;
  using Rows::block_;
  using Rows::k_;
  using Rows::kFirstTurn;
  using Rows::kMultiplyThreads;
  using Rows::kRunK;
  using Rows::kTileK;
  using Rows::lane_;
  using Rows::p_;
  using Rows::p_frag_;
  using Rows::row_max_;
  using Rows::row_sum_;
  using Rows::shared_;
  using Rows::v_;

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
        begin_block(tile);
      } else if (tile.has_second_run()) {
        if (state_.num_kept == 2) {
          step<kTileK, kTileK>(tile);
        } else {
          state_.num_kept == 1 ? step<kTileK, kRunK>(tile) : step<kTileK, 0>(tile);
        }
      } else if (state_.num_kept == 2) {
        step<kRunK, kTileK>(tile);
      } else {
        state_.num_kept == 1 ? step<kRunK, kRunK>(tile) : step<kRunK, 0>(tile);
      }
    } while (next_tile(tile));
    end_block();
    if (Traits::kTakesTurns && warp_index() < 8) sync_named(kFirstTurn, kMultiplyThreads);
  }

 protected:
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

  /// The queries, and S and P of the first tile.
  __device__ __forceinline__ void begin_block(const TileInfo& tile) {
    this->q_parity_ = state_.q_parity;
    this->load_queries(tile.block);
    state_.q_parity ^= 1;
    this->reset(tile.block);
    tile.has_second_run() ? first_step<kTileK>(tile) : first_step<kRunK>(tile);
    state_.is_first = 1;
  }
  template <int kKeys>
  __device__ __forceinline__ void first_step(const TileInfo& tile) {
    float s[kKeys / 2];
    this->template start_scores<kKeys>(s);
    wgmma_wait<0>();
    this->release(k_.slot);
    mask<kKeys>(s, tile);
    float limit[2] = {-INFINITY, -INFINITY};
    finish_softmax<kKeys>(s, decide<kKeys>(s, limit, tile));
  }
  /// P v of the last tile, and the results.
  __device__ __forceinline__ void end_block() {
    if (state_.num_kept == 2) {
      add_values<kTileK>();
    } else if (state_.num_kept == 1) {
      add_values<kRunK>();
    } else {
      wait(shared_.full[v_.slot], v_.parity);
    }
    this->release(v_.slot);
    this->finish(block_, row_max_, row_sum_);
  }
  template <int kKeys>
  __device__ __forceinline__ void add_values() {
    this->is_first_ = state_.is_first;
    this->template start_values<kKeys>();
    wgmma_wait<0>();
  }

  /// S and P of a tile, and P v of what is left of the one before, kKeysBefore keys; a function of
  /// both widths for the reasons of SparseForwardSm90Rows::step().
  template <int kKeys, int kKeysBefore>
  __device__ __forceinline__ void step(const TileInfo& tile) {
    const int k_slot = k_.slot;
    float s[kKeys / 2];
    if constexpr (Traits::kTakesTurns) sync_named(warp_index() / 4, kMultiplyThreads);
    this->template start_scores<kKeys>(s);
    const int v_slot = v_.slot;
    if constexpr (kKeysBefore > 0) {
      this->is_first_ = state_.is_first;
      this->template start_values<kKeysBefore>();
    }
    if constexpr (Traits::kTakesTurns) arrive_named(3 - warp_index() / 4, kMultiplyThreads);
    float limit[2];
    find_limits(limit);
    if constexpr (kKeysBefore > 0) {
      wgmma_wait<1>();
      this->release(k_slot);
    } else {
      wgmma_wait<0>();
      this->release(k_slot);
      // By now the votes on the tile before have been counted, and may be overwritten.
      wait(shared_.full[v_slot], v_.parity);
      this->release(v_slot);
    }
    mask<kKeys>(s, tile);
    const Kept kept = decide<kKeys>(s, limit, tile);
    const bool is_raised = this->is_raised_;
    if constexpr (kKeysBefore > 0) {
      wgmma_wait<0>();
      this->release(v_slot);
    }
    finish_softmax<kKeys>(s, kept);
    state_.is_first = 0;
    if (is_raised) this->rescale();
  }

  template <int kKeys>
  __device__ __forceinline__ void mask(float (&s)[kKeys / 2], const TileInfo& tile) {
    this->template start_softmax<kKeys>(s, {tile.num_keys & TileInfo::kCounts, tile.block});
  }
  /// Whether a rule decides over both runs of a tile at once, because key blocks have two.
  __device__ bool is_tile_a_block() const { return p_.block_k > kRunK; }

  /// Which runs of a tile stay.
  struct Kept {
    bool first, second;
  };
  /// The decision, and the softmax up to P of the first run and the maxima of the second one.
  template <int kKeys>
  __device__ __forceinline__ Kept decide(float (&s)[kKeys / 2], float (&limit)[2],
                                         const TileInfo& tile) {
    float first[2], second[2] = {-INFINITY, -INFINITY};
    this->template find_lane_tops<0>(s, first);
    if constexpr (kKeys > kRunK) this->template find_lane_tops<1>(s, second);
    Vote vote, second_vote{false, 0};
    if (is_tile_a_block()) {
      const float both[2] = {fmaxf(first[0], second[0]), fmaxf(first[1], second[1])};
      vote = ask(both, limit, TileInfo::kIsKept, tile);
    } else {
      vote = ask(first, limit, TileInfo::kIsKept, tile);
      if constexpr (kKeys > kRunK) second_vote = ask(second, limit, TileInfo::kIsSecondKept, tile);
    }
    cast(0, vote, second_vote);
    Kept kept{wants(0, vote, Round::kWantsFirst), false};
    if (kept.first) {
      follow<0>(first, s);
      this->template exponentials<0>(s);
    }
    if constexpr (kKeys > kRunK) {
      if (is_tile_a_block()) {
        kept.second = kept.first;
      } else {
        kept.second = wants(0, second_vote, Round::kWantsSecond);
        if (kept.first && kept.second) {
          find_limits(limit);
          const Vote again = ask(second, limit, TileInfo::kIsSecondKept, tile);
          cast(1, {false, 0}, again);
          kept.second = wants(1, again, Round::kWantsSecond);
          state_.vote_parities ^= 2;
        }
      }
      if (kept.second) {
        follow<1>(second, s);
      }
    }
    state_.vote_parities ^= 1;
    return kept;
  }
  /// Packs P of the runs that stay, one behind the other. Products that read P have ended.
  template <int kKeys>
  __device__ __forceinline__ void finish_softmax(float (&s)[kKeys / 2], const Kept& kept) {
    state_.num_kept = (kept.first ? 1 : 0) + (kept.second ? 1 : 0);
    if (kept.first) this->template pack_p<0>(s);
    if constexpr (kKeys > kRunK) {
      if (kept.second) {
        this->template exponentials<1>(s);
        if (kept.first) {
          this->template pack_p<1>(s);
        } else {
#pragma unroll
          for (int n = 0; n < kRunK / 4; ++n) {
            p_frag_[n] = pack<typename Traits::T>(s[kRunK / 2 + n * 2], s[kRunK / 2 + n * 2 + 1]);
          }
        }
      }
    }
  }

  /// The warp's vote on a run: whether a row is not below its limit, and how many rows are. Apart
  /// from each other up to cast(): only the first one is of ballots alone, which tells ptxas that
  /// all lanes go the same way.
  struct Vote {
    bool wants;
    int num_passes;
  };
  /// `top`: of this lane's columns.
  __device__ __forceinline__ Vote ask(const float (&top)[2], const float (&limit)[2],
                                      uint32_t kept_flag, const TileInfo& tile) const {
    const int num_rows = min(max(shared_.places[block_].rows - this->warp_row_, 0), 16);
    uint32_t rows = 0;  // that want it, a bit each
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool is_row = lane_ / 4 + half * 8 < num_rows;
      uint32_t lanes = __ballot_sync(kAllLanes, is_row && !(top[half] < limit[half]));
      lanes |= lanes >> 1;
      lanes |= lanes >> 2;  // the first lane of each row speaks for all four
      rows |= (lanes & 0x11111111u) << half;
    }
    const bool is_kept_anyhow = (tile.num_keys & kept_flag) != 0;
    return {rows != 0 || is_kept_anyhow, is_kept_anyhow ? 0 : num_rows - __popc(rows)};
  }
  __device__ uint32_t parity(int round) const { return state_.vote_parities >> round & 1; }
  __device__ __forceinline__ void cast(int round, const Vote& first, const Vote& second) {
    if (lane_ != 0) return;
    shared_.votes.words[round][parity(round)][warp_index() - 4] =
        (first.wants ? Round::kWantsFirst : 0u) | (second.wants ? Round::kWantsSecond : 0u) |
        static_cast<uint32_t>(first.num_passes) << Round::kPassesFirst |
        static_cast<uint32_t>(second.num_passes) << Round::kPassesSecond;
    arrive(shared_.votes.cast[round]);
  }
  /// Whether any warp wants a run. The own vote is enough where it says so.
  __device__ __forceinline__ bool wants(int round, const Vote& own, uint32_t wants_bit) {
    if (own.wants) return true;
    wait(shared_.votes.cast[round], parity(round));
    const auto* const votes =
        reinterpret_cast<const uint4*>(shared_.votes.words[round][parity(round)]);
    const uint4 x = votes[0], y = votes[1];
    return ((x.x | x.y | x.z | x.w | y.x | y.y | y.z | y.w) & wants_bit) != 0;
  }

  /// What the next scores of the rows must reach, log2 units. Of rows without keys so far: -inf.
  __device__ __forceinline__ void find_limits(float (&limit)[2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float above = is_running_max() ? 0.0f : __log2f(quad_sum(row_sum_[half]));
      limit[half] = row_max_[half] + above + threshold_log2_;
    }
  }
  __device__ bool is_running_max() const { return p_.skip.reference == SkipReference::kRunningMax; }
  /// Maxima lag behind where the rule does not ask for them.
  template <int kRun, int kSize>
  __device__ __forceinline__ void follow(const float (&top)[2], float (&s)[kSize]) {
    this->template follow_tops<kRun>(top, is_running_max() ? 0.0f : Rows::kLazyLog2, s);
  }

  const float& threshold_log2_;
  // What lives on from tile to tile, in one register.
  struct {
    uint32_t vote_parities : 2;  // of the votes to come, a bit for each round
    uint32_t q_parity : 1;
    uint32_t is_first : 1;  // whether nothing is in o yet
    uint32_t num_kept : 2;  // runs whose P waits for its values
  } state_ = {0, 0, 1, 0};
};

}  // namespace sparline::cuda
