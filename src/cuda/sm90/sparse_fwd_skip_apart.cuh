// SPDX-License-Identifier: Apache-2.0
//
// The Hopper forward, warpgroups 1 and 2, with a skip rule of sparse_fwd_skip.cuh by which every 64
// rows of a query block decide for themselves: each warpgroup for its own.
//
// The four warps of a warpgroup, which start their products together anyway, vote at one barrier of
// their 128 threads. Neither warpgroup waits for votes of the other one: while one finds maxima and
// votes, the tensor cores are the other one's. Both read all keys. What they want of the values
// they tell the warp that loads them; a warpgroup that does without does not wait for them.
//
// The second run of a tile is asked about twice where both runs are wanted, as the limits rise with
// the first one. Its values are on their way after the first time.
#pragma once

#include "cuda/sm90/sparse_fwd_load.cuh"
#include "cuda/sm90/sparse_fwd_skip.cuh"

namespace sparline::cuda {

template <class Traits>
class SparseForwardSm90SkipApartRows : SparseForwardSm90SkipRows<Traits> {
  using Base = SparseForwardSm90SkipRows<Traits>;
  using Wish = Wishes<Traits::kSlots, Traits::kPlaces>;
  using Base::block_;
  using Base::is_tile_a_block;
  using Base::k_;
  using Base::kFirstTurn;
  using Base::kMultiplyThreads;
  using Base::kRunK;
  using Base::kTileK;
  using Base::lane_;
  using Base::p_;
  using Base::p_frag_;
  using Base::row_max_;
  using Base::row_sum_;
  using Base::shared_;
  using Base::v_;
  static constexpr int kFirstVote = 2;  // named barriers, with the number of the warpgroup
  static constexpr int kVoters = 4 * kWarpSize, kForSecond = 16;
  // Runs of a tile, as bits: those that stay.
  static constexpr uint32_t kFirst = Wish::kWantsFirst, kSecond = Wish::kWantsSecond;
  static constexpr uint32_t kBoth = kFirst | kSecond;

 public:
  using Base::Base;

  __device__ __forceinline__ void run() {
    wait(shared_.full[0], 0);
    TileInfo tile = shared_.infos[0];
    if (tile.num_keys == TileInfo::kEnd) return;
    if (warp_index() >= 8) arrive_named_warps(kFirstTurn, kMultiplyThreads);
    block_ = -1;
    do {
      if (tile.block >= 0) {
        if (block_ >= 0) end_block();
        begin_block(tile);
      } else if (tile.has_second_run()) {
        step<kTileK>(tile);
      } else {
        step<kRunK>(tile);
      }
    } while (this->next_tile(tile));
    end_block();
    // No copy may outlive the block.
    release_old_values();
    v_.advance();
    v_.advance();
    release_old_values();
    if (warp_index() < 8) sync_named_warps(kFirstTurn, kMultiplyThreads);
  }

 private:
  /// The queries, and S and P of the first tile.
  __device__ __forceinline__ void begin_block(const TileInfo& tile) {
    const bool is_start = block_ < 0;
    this->q_parity_ = state_.q_parity;
    this->load_queries(tile.block);
    state_.q_parity ^= 1;
    this->reset(tile.block);
    const int num_rows = min(max(shared_.places[block_].rows - this->warp_row_, 0), 16);
    counts_ = {static_cast<uint32_t>(num_rows), 0};
    tile.has_second_run() ? first_step<kTileK>(tile, is_start) : first_step<kRunK>(tile, is_start);
    state_.is_first = 1;
  }
  template <int kKeys>
  __device__ __forceinline__ void first_step(const TileInfo& tile, bool is_start) {
    float s[kKeys / 2];
    this->template start_scores<kKeys>(s);
    if (!is_start) release_old_values();
    wgmma_wait<0>();
    // The keys of the very first tile lie where the values of a tile before it would: the next step
    // gives their place back.
    if (!is_start) this->release(k_.slot);
    this->template mask<kKeys>(s, tile);
    float limit[2] = {-INFINITY, -INFINITY};
    softmax<kKeys, false>(s, limit, tile, false);
  }
  /// P v of the last tile, and the results.
  __device__ __forceinline__ void end_block() {
    if (state_.stays == kBoth) {
      add_values<kBoth>();
    } else if (state_.stays == kFirst) {
      add_values<kFirst>();
    } else if (state_.stays == kSecond) {
      add_values<kSecond>();
    }
    this->finish(block_, row_max_, row_sum_);
    end_record();
  }
  template <uint32_t kStays>
  __device__ __forceinline__ void add_values() {
    start_values<kStays>();
    wgmma_wait<0>();
  }
  /// Starts o += P v of the runs that stay of the tile before, once their values are there.
  template <uint32_t kStays>
  __device__ __forceinline__ void start_values() {
    constexpr int kBegin = (kStays & kFirst) != 0 ? 0 : kRunK / 16;
    constexpr int kEnd = ((kStays & kSecond) != 0 ? kTileK : kRunK) / 16;
    const bool is_first = state_.is_first;
    if constexpr ((kStays & kFirst) != 0) wait(shared_.full[v_.slot], v_.parity);
    if constexpr ((kStays & kSecond) != 0) wait(shared_.votes.second_full[v_.slot], v_.parity);
    const uint32_t b =
        matrix_descriptor(shared_address(shared_.slots[v_.slot]), Traits::kSliceBytesK);
    wgmma_fence();
#pragma unroll
    for (int n = kBegin; n < kEnd; ++n) {
      wgmma<typename Traits::T, Traits::kHeadDim, true>(
          this->o_, p_frag_ + n * 4, b + (n * 16 * 128 >> 4), n == kBegin ? !is_first : 1);
    }
    wgmma_commit();
  }
  /// Gives back the place of the values of the tile before the last one, once it is known what
  /// became of them: they are there, or neither warpgroup wanted them. In the step before, a
  /// warpgroup that does without would wait for votes of the other one; if it never waited, it
  /// might be a round of places ahead, which parities do not tell.
  __device__ __forceinline__ void release_old_values() {
    const bool is_round_before = v_.slot < 2;
    const int slot = is_round_before ? v_.slot + Traits::kSlots - 2 : v_.slot - 2;
    const uint32_t parity = v_.parity ^ (is_round_before ? 1u : 0u);
    wait(shared_.full[slot], parity);
    wait(shared_.votes.second_full[slot], parity);
    this->release(slot);
  }

  /// As SparseForwardSm90SkipRows::step(). Where the last tile was skipped the way to the next
  /// product is the shortest, as there is nothing else beside it.
  template <int kKeys>
  __device__ __forceinline__ void step(const TileInfo& tile) {
    if (state_.stays == 0) {
      step<kKeys, 0>(tile);
    } else if (state_.stays == kBoth) {
      step<kKeys, kBoth>(tile);
    } else if (state_.stays == kFirst) {
      step<kKeys, kFirst>(tile);
    } else {
      step<kKeys, kSecond>(tile);
    }
  }
  template <int kKeys, uint32_t kStaysBefore>
  __device__ __forceinline__ void step(const TileInfo& tile) {
    const int k_slot = k_.slot;
    float s[kKeys / 2];
    // By turns: else both warpgroups, which wait for the same keys, would start scores together and
    // then find maxima together.
    sync_named_warps(warp_index() / 4, kMultiplyThreads);
    this->template start_scores<kKeys>(s);
    arrive_named_warps(3 - warp_index() / 4, kMultiplyThreads);
    if constexpr (kStaysBefore != 0) start_values<kStaysBefore>();
    float limit[2];
    this->find_limits(limit);
    const bool is_positive =
        __all_sync(kAllLanes, is_row_positive(limit, 0) & is_row_positive(limit, 1)) != 0;
    release_old_values();
    wgmma_wait<kStaysBefore == 0 ? 0 : 1>();
    this->release(k_slot);
    this->template mask<kKeys>(s, tile);
    softmax<kKeys, kStaysBefore != 0>(s, limit, tile, is_positive);
    state_.is_first = 0;
  }

  /// The decision; of the runs that stay P, and o for their maxima. Products that read P may be
  /// under way.
  template <int kKeys, bool kHasProducts>
  __device__ __forceinline__ void softmax(float (&s)[kKeys / 2], float (&limit)[2],
                                          const TileInfo& tile, bool is_positive) {
    constexpr bool kHasSecond = kKeys > kRunK;
    const bool is_one = kHasSecond && is_tile_a_block();
    float first[2], second[2] = {-INFINITY, -INFINITY};
    if (__builtin_expect(is_positive, 1)) {
      this->template find_positive_tops<0>(s, first);
      if constexpr (kHasSecond) this->template find_positive_tops<1>(s, second);
    } else {
      this->template find_lane_tops<0>(s, first);
      if constexpr (kHasSecond) this->template find_lane_tops<1>(s, second);
    }
    float tops[2] = {first[0], first[1]};
    if (is_one) {
      tops[0] = fmaxf(first[0], second[0]);
      tops[1] = fmaxf(first[1], second[1]);
    }
    const bool is_forced = (tile.num_keys & TileInfo::kIsKept) != 0;
    const bool is_second_forced = (tile.num_keys & TileInfo::kIsSecondKept) != 0;
    const bool asks_second = kHasSecond && !is_one && asks(second, limit, is_second_forced);
    uint32_t stays = vote(asks(tops, limit, is_forced), asks_second);
    if (is_one && stays != 0) stays = kBoth;
    tell(stays);
    state_.stays = 0;
    if (stays == 0) {
      counts_.num_passes += counts_.num_rows * (kHasSecond && !is_one ? 2 : 1);
      if constexpr (kHasProducts) wgmma_wait<0>();
      return;
    }
    if (!is_forced) count((stays & kFirst) != 0, tops, limit);
    if ((stays & kFirst) != 0) {
      this->template follow<0>(first, s);
      this->template exponentials<0>(s);
    }
    if constexpr (kHasSecond) {
      if (!is_one) {
        if (stays == kBoth) {
          this->find_limits(limit);
          stays = vote(asks(second, limit, is_second_forced), false) != 0 ? kBoth : kFirst;
        }
        if (!is_second_forced) count((stays & kSecond) != 0, second, limit);
      }
      if ((stays & kSecond) != 0) this->template follow<1>(second, s);
    }
    const bool is_raised = this->is_raised_;
    note(stays, is_one);
    if constexpr (kHasProducts) wgmma_wait<0>();
    if ((stays & kFirst) != 0) this->template pack_p<0>(s);
    if constexpr (kHasSecond) {
      if ((stays & kSecond) != 0) {
        this->template exponentials<1>(s);
        this->template pack_p<1>(s);
      }
    }
    if (is_raised) this->rescale();
    state_.stays = stays;
  }

  /// Whether its maximum is not below 0 and its limit above it, or there is no such row.
  __device__ __forceinline__ bool is_row_positive(const float (&limit)[2], int half) const {
    return (lane_ / 4 + half * 8 >= static_cast<int>(counts_.num_rows)) |
           ((row_max_[half] >= 0.0f) & (limit[half] > 0.0f));
  }
  /// Whether a row that this lane has a part of is not below its limit, or stays anyhow. `top`: of
  /// this lane's columns.
  __device__ __forceinline__ bool asks(const float (&top)[2], const float (&limit)[2],
                                       bool is_forced) const {
    const uint32_t row = lane_ / 4;
    const bool asks_low = is_forced | !(top[0] < limit[0]);
    const bool asks_high = is_forced | !(top[1] < limit[1]);
    return ((row < counts_.num_rows) & asks_low) | ((row + 8 < counts_.num_rows) & asks_high);
  }
  /// What any lane of the warpgroup asks for: a lane of each warp stands for all that ask for the
  /// first run, a number of others for the second one. The ballots behind the barrier tell ptxas
  /// that all lanes go the same way.
  __device__ __forceinline__ uint32_t vote(bool asks_first, bool asks_second) const {
    const bool first = __any_sync(kAllLanes, asks_first);
    const bool second = __any_sync(kAllLanes, asks_second);
    const bool is_counted = lane_ == 0 ? first : (lane_ <= kForSecond && second);
    const uint32_t count = count_named(kFirstVote + warp_index() / 4, kVoters, is_counted);
    return (__any_sync(kAllLanes, count % kForSecond != 0) ? kFirst : 0u) |
           (__any_sync(kAllLanes, count >= kForSecond) ? kSecond : 0u);
  }
  /// Tells the warp that loads values, by the place that those of the tile whose keys lie in k_
  /// would take.
  __device__ __forceinline__ void tell(uint32_t stays) const {
    if (warp_index() % 4 != 0 || lane_ != 0) return;
    RingCursor<Traits::kSlots> place = v_;
    place.advance();
    place.advance();
    post(shared_.votes.words[place.slot][warp_index() / 4 - 1],
         stays | place.parity << Wish::kParity);
  }
  /// Counts the warp's rows that are below their limits: all of them where nobody asks for a run.
  __device__ __forceinline__ void count(bool is_wanted, const float (&top)[2],
                                        const float (&limit)[2]) {
    if (p_.row_votes == nullptr) return;
    uint32_t num_passes = counts_.num_rows;
    if (is_wanted) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t row = lane_ / 4 + half * 8;
        uint32_t lanes =
            __ballot_sync(kAllLanes, row < counts_.num_rows && !(top[half] < limit[half]));
        lanes |= lanes >> 1;
        lanes |= lanes >> 2;  // the first lane of each row speaks for all four
        num_passes -= __popc(lanes & 0x11111111u);
      }
    }
    counts_.num_passes += num_passes;
  }

  // What the rule does: one warp of each warpgroup notes the key blocks that stay --------------

  __device__ int group() const { return warp_index() / 4 - 1; }
  __device__ bool is_noter() const { return warp_index() % 4 == 1; }
  __device__ uint32_t* kept_words() const {
    return shared_.lists + (2 + group()) * num_list_words();
  }
  __device__ int num_list_words() const { return (p_.frame.keys.num_blocks + 31) / 32; }
  __device__ __forceinline__ void note(uint32_t stays, bool is_one) const {
    if (!is_noter() || lane_ != 0) return;
    const int32_t (&blocks)[2] = shared_.votes.blocks[k_.parity][k_.slot];
    if ((stays & kFirst) != 0) keep(blocks[0]);
    if ((stays & kSecond) != 0 && !is_one) keep(blocks[1]);
  }
  __device__ __forceinline__ void keep(int32_t j) const {
    if (j >= 0) atomicOr(kept_words() + j / 32, 1u << (j % 32));
  }
  /// Stores what was noted and counted. The last warp of both warpgroups stores the count.
  __device__ __forceinline__ void end_record() {
    const int32_t row = shared_.places[block_].z;
    if (is_noter()) {
      __syncwarp();
      uint32_t* const words = kept_words();
      store_kept_bits(p_, row, group(), words);
      __syncwarp();
      for (int w = lane_; w < num_list_words(); w += kWarpSize) words[w] = 0;
      __syncwarp();
    }
    if (lane_ != 0) return;
    uint32_t& tally = shared_.votes.tallies[block_];
    const uint32_t before = atomicAdd(&tally, counts_.num_passes + Wish::kWarp);
    if (before / Wish::kWarp != Traits::kMultiplyWarps - 1) return;
    tally = 0;
    const uint32_t total = before % Wish::kWarp + counts_.num_passes;
    if (p_.row_votes != nullptr) p_.row_votes[row] = static_cast<float>(total);
  }

  // What lives on from tile to tile, in one register.
  struct {
    uint32_t q_parity : 1;
    uint32_t is_first : 1;  // whether nothing is in o yet
    uint32_t stays : 2;     // runs whose P waits for its values
  } state_ = {0, 1, 0};
  // Apart from that, which is the same in all warps of a warpgroup.
  struct {
    uint32_t num_rows : 5;     // the warp's rows of the query block
    uint32_t num_passes : 27;  // those below their limits, of all runs so far
  } counts_ = {0, 0};
};

}  // namespace sparline::cuda
