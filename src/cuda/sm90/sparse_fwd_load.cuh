// SPDX-License-Identifier: Apache-2.0
//
// The Hopper forward, warpgroup 0: one warp looks up the critical blocks of the query blocks to
// come, one loads queries and keys, one values.
#pragma once

#include "cuda/common/query_place.cuh"
#include "cuda/sm90/sparse_fwd_shared.cuh"

namespace sparline::cuda {

// Looking up critical blocks: one warp --------------------------------------------------------

/// One bit for each key block: whether query block i attends it.
__device__ __forceinline__ void fill_list(const SparseForward& p, const QueryPlace& at,
                                          uint32_t* words) {
  constexpr int kTogether = 8;  // loads under way
  const Axis& keys = p.frame.keys;
  const bool is_dense = p.map.data == nullptr || at.block.is_protected;
  const bool is_empty = p.is_protected_only && !at.block.is_protected;
  const int64_t first = p.map.offset(at.b, at.h, at.i, 0);
  const int num_words = (keys.num_blocks + 31) / 32;
  for (int w_first = 0; w_first < num_words; w_first += kTogether) {
    bool is_critical[kTogether];
#pragma unroll
    for (int n = 0; n < kTogether; ++n) {
      const int32_t j = (w_first + n) * 32 + lane_index();
      is_critical[n] = !is_empty && j >= at.block.other_begin && j < at.block.other_end;
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

/// Every CTA begins with the block of its own number, and takes the first that nobody has after it.
__device__ __forceinline__ int32_t next_block(uint32_t* num_taken) {
  const uint32_t mine = lane_index() == 0 ? gridDim.x + atomicAdd(num_taken, 1) : 0;
  return static_cast<int32_t>(__shfl_sync(kAllLanes, mine, 0));
}

/// A query block's row of row_votes.
__device__ __forceinline__ int32_t row_of_votes(const SparseForward& p, const QueryPlace& at) {
  return (at.b * p.frame.num_heads + at.h) * p.frame.queries.num_blocks + at.i;
}

/// Stores which key blocks a skip rule keeps for a group of rows of a query block: a row of
/// kept_bits, as words in shared memory or null for none. One warp. `row`: row_of_votes().
__device__ __forceinline__ void store_kept_bits(const SparseForward& p, int32_t row, int group,
                                                const uint32_t* words) {
  const int32_t i = row % p.frame.queries.num_blocks, head = row / p.frame.queries.num_blocks;
  const int64_t first =
      p.kept_bits.offset(head / p.frame.num_heads, head % p.frame.num_heads, i, group, 0);
  for (int32_t byte = lane_index(); byte * 8 < p.frame.keys.num_blocks; byte += kWarpSize) {
    const uint32_t word = words == nullptr ? 0u : words[byte / 4];
    p.kept_bits.data[first + byte * p.kept_bits.stride_byte] =
        static_cast<uint8_t>(word >> (byte % 4 * 8));
  }
}
/// The same for rows that decide together, and the count of their votes.
__device__ __forceinline__ void store_kept(const SparseForward& p, int32_t row,
                                           const uint32_t* words, int num_votes) {
  store_kept_bits(p, row, 0, words);
  if (p.row_votes != nullptr && lane_index() == 0) p.row_votes[row] = static_cast<float>(num_votes);
}

template <class Traits>
__device__ void look_up(const SparseForwardSm90Params& params,
                        SparseForwardSm90Shared<Traits>& shared) {
  const SparseForward& p = params.forward;
  const int num_words = (p.frame.keys.num_blocks + 31) / 32;
  RingCursor<2> list;
  RingCursor<Traits::kPlaces> place;
  for (auto idx = static_cast<int32_t>(blockIdx.x);; idx = next_block(p.num_taken)) {
    const bool is_end = idx >= params.num_blocks;
    QueryPlace at{};
    if (!is_end) at = query_place(p.frame, p.wave, idx);
    if (!Traits::kHasLinear && !is_end && p.is_protected_only && !at.block.is_protected) {
      for (int r = lane_index(); r < at.block.rows; r += kWarpSize) {
        *p.lse.at(at.b, at.h, at.block.begin + r) = -INFINITY;
      }
      if constexpr (Traits::kIsApart) store_kept_bits(p, row_of_votes(p, at), 1, nullptr);
      if constexpr (Traits::kHasSkip) store_kept(p, row_of_votes(p, at), nullptr, 0);
      continue;
    }
    wait(shared.list_empty[list.slot], list.parity ^ 1);
    if (!is_end) fill_list(p, at, shared.lists + list.slot * num_words);
    if (lane_index() == 0) {
      BlockPlace& to = shared.places[place.slot];
      to = {at.b, at.h, at.h_kv, at.block.begin, at.block.rows, 0, -1, -1};
      const int32_t num_sequences = p.frame.keys.num_sequences;
      to.mean = (at.b * p.frame.num_kv_heads + at.h_kv) * num_sequences + at.block.sequence;
      if (Traits::kHasLinear && !at.block.is_protected) {
        const int32_t head = at.b * p.frame.num_heads + at.h;
        to.z = head * p.frame.queries.num_blocks + at.i;
        if (at.block.rows < Traits::kHeadDim) to.ragged = at.block.sequence;
      } else if (Traits::kHasSkip) {
        if constexpr (Traits::kHasRuns) shared.votes.num_passes[place.slot] = 0;
        to.z = row_of_votes(p, at);
        to.ragged = at.block.is_protected != 0 ? -1 : 0;
      }
      shared.list_block[list.slot] = is_end ? -1 : place.slot;
    }
    place.advance();
    __syncwarp();
    if (lane_index() == 0) arrive(shared.list_full[list.slot]);
    list.advance();
    if (is_end) return;
  }
}

// Loading: two warps ---------------------------------------------------------------------------

/// A run of at most 64 keys of one key block; none: no keys, past the end of the axis.
struct KeyRun {
  int32_t first_key, num_keys;
  int32_t block = 0;  // j
  bool is_protected = false;
};

/// Walks the attended keys of a query block, ascending.
class KeyRuns {
 public:
  __device__ KeyRuns(const Axis& keys, const uint32_t* words)
      : keys_(keys), words_(words), num_words_((keys.num_blocks + 31) / 32), rest_(words[0]) {}

  template <int kMostKeys>
  __device__ __forceinline__ KeyRun next() {
    if (num_left_ <= 0) {
      while (rest_ == 0) {
        if (++word_ >= num_words_) return {keys_.length, 0};
        rest_ = words_[word_];
      }
      const int32_t j = word_ * 32 + __ffs(static_cast<int>(rest_)) - 1;
      rest_ &= rest_ - 1;
      const BlockInfo block = keys_.block(j);
      first_key_ = block.begin;
      num_left_ = block.rows;
      block_ = j;
      is_protected_ = block.is_protected != 0;
    }
    const KeyRun run{first_key_, min(num_left_, kMostKeys), block_, is_protected_};
    first_key_ += kMostKeys;
    num_left_ -= kMostKeys;
    return run;
  }
  /// Whether the next run is of the block of the last one.
  __device__ bool is_inside_block() const { return num_left_ > 0; }

 private:
  const Axis& keys_;
  const uint32_t* const words_;
  const int num_words_;
  int word_ = 0;
  uint32_t rest_;
  int32_t first_key_ = 0, num_left_ = 0;
  int32_t block_ = 0;
  bool is_protected_ = false;
};

/// What loaders of tiles and of runs share: copies, and what a skip rule does to a query block.
template <class Traits>
class SparseForwardSm90Copies {
 protected:
  static constexpr int kRunK = Traits::kRunK, kHeadDim = Traits::kHeadDim;
  static constexpr uint32_t kRunBytes = kRunK * kHeadDim * 2;

  __device__ SparseForwardSm90Copies(const SparseForwardSm90Params& params,
                                     SparseForwardSm90Shared<Traits>& shared)
      : params_(params), shared_(shared) {}

  __device__ void load_queries(const BlockPlace& at) {
    arrive_expecting(shared_.q_full, Traits::kTileQ * kHeadDim * 2);
#pragma unroll
    for (int slice = 0; slice < Traits::kSlices; ++slice) {
      load_box(reinterpret_cast<unsigned char*>(shared_.q) + slice * Traits::kSliceBytesQ,
               params_.q, shared_.q_full, slice * 64, at.begin, at.h, at.b);
    }
  }
  /// Says in the next slot of keys that there are no more tiles.
  __device__ __forceinline__ void end_tiles(int slot, uint32_t parity) {
    wait(shared_.empty[slot], parity ^ 1);
    if (elect_one()) {
      shared_.infos[slot] = {TileInfo::kEnd, -1};
      arrive(shared_.full[slot]);
    }
  }
  /// Keys of a run, or values, to a slot, `offset` bytes from its begin. Values end with their
  /// block: what comes after it may be infinite or NaN, which P = 0 would not take away. Scores of
  /// the keys there are overwritten.
  template <bool kIsValues>
  __device__ __forceinline__ void load_run(const KeyRun& run, int slot, int offset,
                                           const BlockPlace& at) {
    load_run<kIsValues>(run, slot, offset, at, shared_.full[slot]);
  }
  template <bool kIsValues>
  __device__ __forceinline__ void load_run(const KeyRun& run, int slot, int offset,
                                           const BlockPlace& at, Barrier& full) {
    if (kIsValues && run.num_keys > 0 && run.num_keys < kRunK) {
#pragma unroll
      for (int slice = 0; slice < Traits::kSlices; ++slice) {
        load_cut_box(place(slot, slice, offset), params_.cut_v, full, slice * 64, run.first_key,
                     run.num_keys, kRunK, at.h_kv, at.b);
      }
    } else {
      load_rows(kIsValues ? params_.v : params_.k, run.first_key, slot, offset, at.h_kv, at.b,
                full);
    }
  }
  __device__ __forceinline__ void load_rows(const CUtensorMap& map, int32_t first, int slot,
                                            int offset, int32_t h, int32_t b, Barrier& full) {
#pragma unroll
    for (int slice = 0; slice < Traits::kSlices; ++slice) {
      load_box(place(slot, slice, offset), map, full, slice * 64, first, h, b);
    }
  }
  __device__ __forceinline__ unsigned char* place(int slot, int slice, int offset) {
    return reinterpret_cast<unsigned char*>(shared_.slots[slot]) + slice * Traits::kSliceBytesK +
           offset;
  }

  __device__ int num_list_words() const {
    return (params_.forward.frame.keys.num_blocks + 31) / 32;
  }
  /// Bits of the key blocks that stay, behind the lists.
  __device__ uint32_t* kept_words() const { return shared_.lists + 2 * num_list_words(); }
  __device__ __forceinline__ void clear_kept_words() {
    for (int w = lane_index(); w < num_list_words(); w += kWarpSize) kept_words()[w] = 0;
  }
  __device__ __forceinline__ void keep(int32_t j) {
    if (lane_index() == 0) kept_words()[j / 32] |= 1u << (j % 32);
  }

  const SparseForwardSm90Params& params_;
  SparseForwardSm90Shared<Traits>& shared_;
};

/// One warp loads queries and keys, another one values (kIsValues). The slots are taken in the
/// order K0, K1, V0, K2, V1 and so on, as the products are. All lanes follow the loops, so that the
/// compiler sees that what the copy engine is told is the same for all; one of them tells it.
template <class Traits, bool kIsValues>
class SparseForwardSm90Loader : SparseForwardSm90Copies<Traits> {
  using Copies = SparseForwardSm90Copies<Traits>;
  using Copies::keep;
  using Copies::kept_words;
  using Copies::kHeadDim;
  using Copies::kRunK;
  using Copies::load_rows;
  using Copies::params_;
  using Copies::shared_;

 public:
  __device__ SparseForwardSm90Loader(const SparseForwardSm90Params& params,
                                     SparseForwardSm90Shared<Traits>& shared)
      : Copies(params, shared) {
    if constexpr (kIsValues) {
      ring_.advance();
      ring_.advance();
    }
  }

  __device__ void run() {
    const Axis& keys = params_.forward.frame.keys;
    const int num_words = (keys.num_blocks + 31) / 32;
    RingCursor<2> list;
    uint32_t q_parity = 0;
    while (true) {
      wait(shared_.list_full[list.slot], list.parity);
      const int32_t place = shared_.list_block[list.slot];
      if (place < 0) break;
      // Read again where it is needed under a skip rule, which wants the registers.
      std::conditional_t<Traits::kHasSkip, const BlockPlace&, const BlockPlace> at =
          shared_.places[place];
      KeyRuns runs(keys, shared_.lists + list.slot * num_words);
      int32_t block = place;
      // Blocks without a linear tile wait here: their rows of o are the sums' until these are done.
      if (Traits::kHasLinear && at.z < 0) await_last_kernel();
      begin_record();
      KeyRun first = runs.template next<kRunK>(), second;
      // A block without critical keys gets a tile without keys: zeros from past the end.
      do {
        second = second_run(runs);
        if (Traits::kHasLinear && block < 0 && at.z >= 0 && second.num_keys == 0) {
          block = TileInfo::kLast;
        }
        if constexpr (kIsValues && Traits::kIsApart) {
          load_wanted(first, second, at);
        } else if constexpr (kIsValues && Traits::kHasSkip) {
          load_kept(first, second, at);
        } else {
          load(first, second, at, block);
        }
        // After the first keys, which tell those who multiply of the block: the place of the
        // queries may be free only then.
        if (!kIsValues && block >= 0) {
          wait(shared_.q_empty, q_parity ^ 1);
          q_parity ^= 1;
          if (elect_one()) this->load_queries(at);
        }
        block = -1;
        if (second.num_keys == 0 && !kIsOneRun && !is_tile_a_block()) break;
        first = runs.template next<kRunK>();
      } while (first.num_keys > 0);
      if (Traits::kHasLinear && at.z >= 0) load_linear(at);
      if constexpr (kIsValues && Traits::kHasSkip && !Traits::kIsApart) end_record(at.z);
      __syncwarp();
      if (elect_one()) arrive(shared_.list_empty[list.slot]);
      list.advance();
    }
    if constexpr (!kIsValues) this->end_tiles(ring_.slot, ring_.parity);
  }

 private:
  using Wish = Wishes<Traits::kSlots, Traits::kPlaces>;
  static constexpr bool kIsOneRun = Traits::kTileK == kRunK;  // a tile

  __device__ __forceinline__ void load(const KeyRun& first, const KeyRun& second,
                                       const BlockPlace& at, int32_t block) {
    wait(shared_.empty[ring_.slot], ring_.parity ^ 1);
    const bool has_second = second.num_keys > 0;
    if (elect_one()) {
      if constexpr (!kIsValues) {
        auto num_keys = static_cast<uint32_t>(first.num_keys + 256 * second.num_keys);
        if constexpr (Traits::kHasSkip) {
          const bool is_protected = at.ragged < 0;
          if (is_protected || first.is_protected || first.num_keys == 0) {
            num_keys |= TileInfo::kIsKept;
          }
          if (is_protected || second.is_protected) num_keys |= TileInfo::kIsSecondKept;
        }
        if constexpr (Traits::kIsApart) {
          auto& blocks = shared_.votes.blocks[ring_.parity][ring_.slot];
          blocks[0] = first.num_keys > 0 ? first.block : -1;
          blocks[1] = second.block;
        }
        shared_.infos[ring_.slot] = {num_keys, block};
      }
      arrive_expecting(shared_.full[ring_.slot], (has_second ? 2 : 1) * Copies::kRunBytes);
      Barrier& full = shared_.full[ring_.slot];
      load_run(first, 0, at, full);
      if (has_second) load_run(second, kRunK * 128, at, full);
    }
    advance();
  }

  // With a skip rule ---------------------------------------------------------------------------

  /// Whether a rule decides over both runs of a tile at once, because key blocks have two.
  __device__ bool is_tile_a_block() const {
    return Traits::kHasSkip && params_.forward.block_k > kRunK;
  }
  __device__ __forceinline__ KeyRun second_run(KeyRuns& runs) const {
    if (kIsOneRun || (is_tile_a_block() && !runs.is_inside_block())) {
      return {params_.forward.frame.keys.length, 0};
    }
    return runs.template next<kRunK>();
  }

  __device__ __forceinline__ void begin_record() {
    if constexpr (kIsValues && Traits::kHasSkip && !Traits::kIsApart) {
      this->clear_kept_words();
      if (lane_index() == 0) shared_.votes.num_passes = 0;
      __syncwarp();
    }
  }
  __device__ __forceinline__ void count(int num_passes) {
    if (lane_index() == 0) shared_.votes.num_passes += num_passes;
  }
  __device__ __forceinline__ void end_record(int32_t row) {
    __syncwarp();
    store_kept(params_.forward, row, kept_words(), shared_.votes.num_passes);
  }

  struct Result {
    bool wants_first, wants_second;
    int passes_first, passes_second;
  };
  __device__ __forceinline__ Result result_of(int round) {
    using Round = Votes<true>;
    const uint32_t parity = vote_parities_ >> round & 1;
    wait(shared_.votes.cast[round], parity);
    uint32_t vote = 0;
    if (lane_index() < Round::kWarps) {
      vote = shared_.votes.words[round][parity][lane_index()];
    }
    vote_parities_ ^= 1u << round;
    // Counts of up to 128 fit into 8 bits.
    const uint32_t passes = __reduce_add_sync(kAllLanes, vote >> Round::kPassesFirst);
    return {__any_sync(kAllLanes, vote & Round::kWantsFirst) != 0,
            __any_sync(kAllLanes, vote & Round::kWantsSecond) != 0, static_cast<int>(passes & 0xff),
            static_cast<int>(passes >> 8 & 0xff)};
  }

  /// Values of the runs that stay, one behind the other. The decisions are those of
  /// SparseForwardSm90SkipRows::decide(), from the same votes.
  __device__ __forceinline__ void load_kept(const KeyRun& first, const KeyRun& second,
                                            const BlockPlace& at) {
    wait(shared_.empty[ring_.slot], ring_.parity ^ 1);
    const Result votes = result_of(0);
    count(votes.passes_first);
    const bool keeps_first = votes.wants_first;
    bool keeps_second = false;
    if (is_tile_a_block()) {
      keeps_second = keeps_first && second.num_keys > 0;
    } else if (second.num_keys > 0) {
      if (!keeps_first) {
        keeps_second = votes.wants_second;
        count(votes.passes_second);
      } else if (!votes.wants_second) {
        count(at.rows);
      }
    }
    if (keeps_first) {
      if (first.num_keys > 0) keep(first.block);
      if (elect_one()) load_run(first, 0, at, shared_.full[ring_.slot]);
      __syncwarp();
      if (!is_tile_a_block() && second.num_keys > 0 && votes.wants_second) {
        const Result again = result_of(1);
        keeps_second = again.wants_second;
        count(again.passes_second);
      }
    }
    if (keeps_second && !is_tile_a_block()) keep(second.block);
    if (elect_one()) {
      Barrier& full = shared_.full[ring_.slot];
      if (keeps_second) load_run(second, keeps_first ? kRunK * 128 : 0, at, full);
      const uint32_t num_runs = (keeps_first ? 1 : 0) + (keeps_second ? 1 : 0);
      if (num_runs > 0) {
        arrive_expecting(full, num_runs * Copies::kRunBytes);
      } else {
        arrive(full);
      }
    }
    advance();
  }

  /// Where each warpgroup decides for its own rows: values of the runs that either one wants, each
  /// as soon as one does. Nobody waits for a run that nobody wants.
  __device__ __forceinline__ void load_wanted(const KeyRun& first, const KeyRun& second,
                                              const BlockPlace& at) {
    wait(shared_.empty[ring_.slot], ring_.parity ^ 1);
    bool is_first_open = true, is_second_open = true;
    [[maybe_unused]] int num_polls = 0;
    do {
      uint32_t word = 0;
      bool is_known = false;
      if (lane_index() < 2) {
        word = posted(shared_.votes.words[ring_.slot][lane_index()]);
        is_known = word >> Wish::kParity == ring_.parity;
      }
      const bool are_known = __popc(__ballot_sync(kAllLanes, is_known)) == 2;
      const bool wants_first = __any_sync(kAllLanes, is_known && (word & Wish::kWantsFirst) != 0);
      const bool wants_second = __any_sync(kAllLanes, is_known && (word & Wish::kWantsSecond) != 0);
      if (is_first_open && (wants_first || are_known)) {
        answer(shared_.full[ring_.slot], wants_first, first, 0, at);
        is_first_open = false;
      }
      const bool is_alone = second.num_keys == 0 && !is_first_open;
      if (is_second_open && (wants_second || are_known || is_alone)) {
        answer(shared_.votes.second_full[ring_.slot], wants_second, second, kRunK * 128, at);
        is_second_open = false;
      }
#ifdef SPARLINE_WATCHDOG
      if (++num_polls > SPARLINE_WATCHDOG) __trap();
#endif
    } while (is_first_open || is_second_open);
    advance();
  }
  __device__ __forceinline__ void answer(Barrier& full, bool is_wanted, const KeyRun& run,
                                         int offset, const BlockPlace& at) {
    if (elect_one()) {
      if (is_wanted) {
        arrive_expecting(full, Copies::kRunBytes);
        load_run(run, offset, at, full);
      } else {
        arrive(full);
      }
    }
    __syncwarp();
  }

  /// Z_i to where keys lie, H_i as values: D rows.
  __device__ __forceinline__ void load_linear(const BlockPlace& at) {
    await_last_kernel();
    wait(shared_.empty[ring_.slot], ring_.parity ^ 1);
    Barrier& full = shared_.full[ring_.slot];
    if (elect_one()) {
      if constexpr (kIsValues) {
        const bool is_ragged = at.ragged >= 0;
        const CUtensorMap& map = is_ragged ? params_.ragged_sums : params_.sums;
        arrive_expecting(full, kHeadDim * kHeadDim * 2);
#pragma unroll
        for (int run = 0; run < kHeadDim / kRunK; ++run) {
          load_rows(map, (is_ragged ? at.ragged * kHeadDim : at.begin) + run * kRunK, ring_.slot,
                    run * kRunK * 128, at.h, at.b, full);
        }
      } else {
        shared_.infos[ring_.slot] = {0, TileInfo::kLinear};
        arrive_expecting(full, kHeadDim * 4);
        load_bytes(shared_.slots[ring_.slot],
                   params_.forward.linear.sums_z + int64_t{at.z} * kHeadDim, kHeadDim * 4, full);
      }
    }
    advance();
  }
  __device__ __forceinline__ void advance() {
    __syncwarp();
    ring_.advance();
    if (kIsValues || !is_first_) ring_.advance();
    is_first_ = false;
  }
  __device__ __forceinline__ void load_run(const KeyRun& run, int offset, const BlockPlace& at,
                                           Barrier& full) {
    Copies::template load_run<kIsValues>(run, ring_.slot, offset, at, full);
  }

  RingCursor<Traits::kSlots> ring_;
  bool is_first_ = true;
  uint32_t vote_parities_ = 0;  // with a skip rule: of the votes to come, a bit for each round
};

}  // namespace sparline::cuda
