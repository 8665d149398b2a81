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
  using Votes = decltype(SparseForwardSm90Shared<Traits>::votes);

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
      constexpr int kBeforeQueries = Traits::kKeySlots - 1;
      int num_runs = 0;
      KeyRun run = runs.template next<kRunK>();
      // A block without critical keys gets a run without keys: zeros from past the end.
      do {
        if constexpr (kIsValues) {
          load_values(run, at);
        } else {
          load_keys(run, at, num_runs == 0 ? place : -1);
          if (++num_runs == kBeforeQueries) wait_and_load_queries(at);
        }
        run = runs.template next<kRunK>();
      } while (run.num_keys > 0);
      if (!kIsValues && num_runs < kBeforeQueries) wait_and_load_queries(at);
      if constexpr (kIsValues) {
        __syncwarp();
        store_kept_bits(params_.forward, at.z, 0, this->kept_words());
      }
      __syncwarp();
      if (elect_one()) arrive(shared_.list_empty[list.slot]);
      list.advance();
    }
    if constexpr (!kIsValues) this->end_tiles(keys_);
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

  __device__ __forceinline__ void load_keys(const KeyRun& run, const BlockPlace& at,
                                            int32_t block) {
    wait(shared_.empty[keys_.slot], keys_.parity ^ 1);
    if (elect_one()) {
      const auto num_keys = static_cast<uint32_t>(run.num_keys);
      shared_.infos[keys_.slot] = {num_keys | (is_sure(run, at) ? TileInfo::kIsKept : 0), block};
      arrive_expecting(shared_.full[keys_.slot], kRunBytes);
      Copies::template load_run<false>(run, keys_.slot, 0, at);
    }
    __syncwarp();
    keys_.advance();
  }

  /// Values of a run, as soon as one warp wants it. Its keys' place is given back once this warp
  /// has decided too: until then no vote is cast in the place of those that it looks at.
  __device__ __forceinline__ void load_values(const KeyRun& run, const BlockPlace& at) {
    const bool is_kept =
        is_sure(run, at) || wait_for_wish(shared_.votes, turn_ * 2, turn_ % Votes::kTurns) != 0;
    ++turn_;
    if (elect_one()) arrive(shared_.empty[keys_.slot]);
    __syncwarp();
    keys_.advance();
    if (!is_kept) return;
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

  RingCursor<Traits::kKeySlots> keys_, values_;
  uint32_t q_parity_ = 0;
  uint32_t turn_ = 1;  // the number of the next run
};

}  // namespace sparline::cuda
