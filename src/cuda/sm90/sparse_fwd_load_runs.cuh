// SPDX-License-Identifier: Apache-2.0
//
// The Hopper forward, warpgroup 0, with a skip rule and key blocks of at most 64 keys
// (sparse_fwd_skip_runs.cuh): a ring of keys of all blocks, and one of values of those that stay.
#pragma once

#include "cuda/sm90/sparse_fwd_load.cuh"

namespace sparline::cuda {

/// One warp loads queries and keys, another one values (kIsValues). All lanes follow the loops, so
/// that the compiler sees that what the copy engine is told is the same for all; one of them tells
/// it.
template <class Traits, bool kIsValues>
class SparseForwardSm90RunLoader : SparseForwardSm90Copies<Traits> {
  using Copies = SparseForwardSm90Copies<Traits>;
  using Copies::kRunBytes;
  using Copies::kRunK;
  using Copies::params_;
  using Copies::shared_;
  using Votes = RunVotes<Traits::kTurns, Traits::kPlaces>;

 public:
  __device__ SparseForwardSm90RunLoader(const SparseForwardSm90Params& params,
                                        SparseForwardSm90Shared<Traits>& shared)
      : Copies(params, shared) {}

  __device__ void run() {
    RingCursor<2> list;
    while (true) {
      wait(shared_.list_full[list.slot], list.parity);
      const int32_t place = shared_.list_block[list.slot];
      if (place < 0) break;
      const BlockPlace& at = shared_.places[place];
      KeyRuns runs(params_.forward.frame.keys, shared_.lists + list.slot * this->num_list_words());
      if constexpr (kIsValues) {
        this->clear_kept_words();
        __syncwarp();
      }
      // The first keys tell those who multiply that the block before has ended: its queries keep
      // their place until then. So these come after as many keys as there is room for then.
      constexpr int kBeforeQueries = Traits::kKeySlots / 2 - 1;
      int num_tiles = 0;
      KeyRun first = runs.template next<kRunK>(), second;
      // A block without critical keys gets a tile without keys: zeros from past the end.
      do {
        second = runs.template next<kRunK>();
        if constexpr (kIsValues) {
          decide(first, second, at);
        } else {
          load_keys(first, second, at, num_tiles == 0 ? place : -1);
          if (++num_tiles == kBeforeQueries) wait_and_load_queries(at);
        }
        if (second.num_keys == 0) break;
        first = runs.template next<kRunK>();
      } while (first.num_keys > 0);
      if (!kIsValues && num_tiles < kBeforeQueries) wait_and_load_queries(at);
      if constexpr (kIsValues) {
        __syncwarp();
        store_kept_bits(params_.forward, at.z, 0, this->kept_words());
      }
      __syncwarp();
      if (elect_one()) arrive(shared_.list_empty[list.slot]);
      list.advance();
    }
    if constexpr (!kIsValues) this->end_tiles(2 * keys_.slot, keys_.parity);
  }

 private:
  __device__ __forceinline__ void wait_and_load_queries(const BlockPlace& at) {
    wait(shared_.q_empty, q_parity_ ^ 1);
    q_parity_ ^= 1;
    if (elect_one()) this->load_queries(at);
    __syncwarp();
  }
  /// Nobody is asked about such a run.
  __device__ static bool is_sure(const KeyRun& run, const BlockPlace& at) {
    return at.ragged < 0 || run.is_protected || run.num_keys == 0;
  }

  __device__ __forceinline__ void load_keys(const KeyRun& first, const KeyRun& second,
                                            const BlockPlace& at, int32_t block) {
    const int slot = 2 * keys_.slot;
    wait(shared_.empty[slot], keys_.parity ^ 1);
    wait_for_decisions();
    if (elect_one()) {
      uint32_t num_keys = static_cast<uint32_t>(first.num_keys + 256 * second.num_keys);
      if (is_sure(first, at)) num_keys |= TileInfo::kIsKept;
      if (is_sure(second, at)) num_keys |= TileInfo::kIsSecondKept;
      shared_.infos[slot] = {num_keys, block};
      const bool has_second = second.num_keys > 0;
      arrive_expecting(shared_.full[slot], (has_second ? 2 : 1) * kRunBytes);
      load_keys(first, slot, 0, at);
      if (has_second) load_keys(second, slot, kRunK * 128, at);
    }
    __syncwarp();
    keys_.advance();
    ++num_tiles_;
  }
  /// The next tile's keys let those who multiply cast votes, in the place of earlier ones: these
  /// must have been looked at.
  __device__ __forceinline__ void wait_for_decisions() {
    [[maybe_unused]] int num_polls = 0;
    while (static_cast<int32_t>(num_tiles_ - num_decided_) >= Traits::kTurns / 2) {
      num_decided_ = __shfl_sync(kAllLanes, posted(shared_.votes.num_decided), 0);
#ifdef SPARLINE_WATCHDOG
      if (++num_polls > SPARLINE_WATCHDOG) __trap();
#endif
    }
  }
  /// Rows of the two runs of a tile lie one behind the other.
  __device__ __forceinline__ void load_keys(const KeyRun& run, int slot, int offset,
                                            const BlockPlace& at) {
#pragma unroll
    for (int slice = 0; slice < Traits::kSlices; ++slice) {
      load_box(this->place(slot, 2 * slice, offset), params_.k, shared_.full[slot], slice * 64,
               run.first_key, at.h_kv, at.b);
    }
  }

  /// Values of the runs of a tile, each as soon as one warp wants it. The decisions are those of
  /// SparseForwardSm90SkipRuns::step(), from the same votes.
  __device__ __forceinline__ void decide(const KeyRun& first, const KeyRun& second,
                                         const BlockPlace& at) {
    const bool keeps_first = is_sure(first, at) || is_wanted<Votes::kWantsFirst>();
    if (keeps_first) load_values(first, at);
    if (second.num_keys > 0) {
      const bool is_second_sure = is_sure(second, at);
      bool keeps_second = is_second_sure || is_wanted<Votes::kWantsSecond>();
      if (keeps_first && keeps_second && !is_second_sure) {
        ++turn_;
        keeps_second = is_wanted<Votes::kWantsFirst>();
      }
      if (keeps_second) load_values(second, at);
    }
    ++turn_;
    ++num_decided_;
    __syncwarp();  // all lanes have looked
    if (elect_one()) post(shared_.votes.num_decided, num_decided_);
    __syncwarp();
  }
  template <uint32_t kWish>
  __device__ __forceinline__ bool is_wanted() const {
    uint32_t wishes;
    return wait_for_wish<kWish>(shared_.votes, turn_ * Votes::kOne, turn_ % Votes::kTurns, wishes);
  }
  __device__ __forceinline__ void load_values(const KeyRun& run, const BlockPlace& at) {
    const int slot = Traits::kKeySlots + values_.slot;
    wait(shared_.empty[slot], values_.parity ^ 1);
    if (elect_one()) {
      arrive_expecting(shared_.full[slot], kRunBytes);
      Copies::template load_run<true>(run, slot, 0, at);
    }
    __syncwarp();
    values_.advance();
    if (run.num_keys > 0) this->keep(run.block);
  }

  RingCursor<Traits::kKeySlots / 2> keys_;
  RingCursor<Traits::kKeySlots> values_;
  uint32_t q_parity_ = 0;
  uint32_t turn_ = 1;         // the number of the next vote
  uint32_t num_tiles_ = 0;    // whose keys are loaded, or asked for
  uint32_t num_decided_ = 0;  // upon which has been decided, as far as this warp knows
};

}  // namespace sparline::cuda
