// SPDX-License-Identifier: Apache-2.0
//
// The sums of states on Hopper, warpgroup 0: one warp loads keys and values, one the states that
// the product adds up, two tell other CTAs of states. And what the product's warps begin with: the
// map as bits.
#pragma once

#include "cuda/sm90/linear_sums_shared.cuh"

namespace sparline::cuda {

template <class Traits>
__device__ void load_keys(const LinearSumsParams& params, LinearSumsShared<Traits>& shared) {
  const Frame& frame = params.linear.frame;
  RingCursor<Traits::kKeySlots> ring;
  for (auto unit = static_cast<int32_t>(blockIdx.x); unit < params.num_units;
       unit += static_cast<int32_t>(gridDim.x), ring.advance()) {
    const int32_t pair = unit / frame.keys.num_blocks, j = unit % frame.keys.num_blocks;
    const int32_t b = pair / frame.num_kv_heads, h = pair % frame.num_kv_heads;
    const int32_t begin = frame.keys.block(j).begin;
    wait(shared.key_empty[ring.slot], ring.parity ^ 1);
    if (elect_one()) {
      auto& slot = shared.key_slots[ring.slot];
      Barrier& full = shared.key_full[ring.slot];
      arrive_expecting(full, 2 * Traits::kSlices * Traits::kSliceBytes);
#pragma unroll
      for (int slice = 0; slice < Traits::kSlices; ++slice) {
        load_box_once(slot.k + slice * Traits::kSliceBytes / 2, params.k, full, slice * 64, begin,
                      h, b);
        load_box_once(slot.v + slice * Traits::kSliceBytes / 2, params.v, full, slice * 64, begin,
                      h, b);
      }
    }
    __syncwarp();
  }
}

/// The chunks of states that are known to be there, 32 at a time: asking takes as long as the
/// product of a chunk.
template <class Traits>
class ReadyChunks {
 public:
  __device__ explicit ReadyChunks(const LinearSumsParams& params) : params_(params) {}

  __device__ void wait_for(int32_t pair, int32_t chunk) {
    const int32_t first = chunk / 32 * 32;
    if (pair != pair_ || first != first_) {
      pair_ = pair;
      first_ = first;
      is_ready_ = 0;
    }
    [[maybe_unused]] int num_polls = 0;
    while ((is_ready_ >> (chunk - first) & 1) == 0) {
      const int32_t own = first + lane_index();
      const int32_t num_left = params_.linear.frame.keys.num_blocks - own * Traits::kChunk;
      const uint32_t num = static_cast<uint32_t>(min(num_left, Traits::kChunk));
      is_ready_ = __ballot_sync(
          kAllLanes, num_left > 0 && count_of(params_.chunk_ready + int64_t{pair} * params_.chunks +
                                              own) >= num);
      __syncwarp();  // what one lane has learned of, the lane that copies must have learned of too
      fence_async_global();
      if ((is_ready_ >> (chunk - first) & 1) == 0) __nanosleep(64);
#ifdef SPARLINE_WATCHDOG
      if (++num_polls > SPARLINE_WATCHDOG) __trap();
#endif
    }
  }

 private:
  const LinearSumsParams& params_;
  int32_t pair_ = -1, first_ = 0;
  uint32_t is_ready_ = 0;
};

template <class Traits>
__device__ void load_sums(const LinearSumsParams& params, LinearSumsShared<Traits>& shared) {
  const Frame& frame = params.linear.frame;
  constexpr int kChunk = Traits::kChunk, kTileN = Traits::kTileN;
  constexpr int kTilesH = Traits::kHeadDim * Traits::kHeadDim / kTileN;  // the other is of z
  RingCursor<Traits::kSumSlots> ring;
  ReadyChunks<Traits> ready(params);
  for (auto idx = static_cast<int32_t>(blockIdx.x); idx < params.num_tiles;
       idx += static_cast<int32_t>(gridDim.x)) {
    const SumTile tile(params, idx);
    const int32_t pair = tile.head / frame.group();
    const bool is_z = tile.n == kTilesH;
    const CUtensorMap& map = is_z ? params.z : params.states;
    const CUtensorMap& cut_map = is_z ? params.cut_z : params.cut_states;
    const int32_t column = is_z ? 0 : tile.n * kTileN;
    const int32_t place = pair % params.slots;
    for (SumRange range; next_range<Traits>(params, tile.m, range);) {
      for (int32_t j = range.begin; j < range.end; j += kChunk, ring.advance()) {
        const int32_t num_states = min(kChunk, range.end - j);
        ready.wait_for(pair, j / kChunk);
        const int32_t last = (j + num_states - 1) / kChunk;
        if (last != j / kChunk) ready.wait_for(pair, last);
        wait(shared.sum_empty[ring.slot], ring.parity ^ 1);
        if (elect_one()) {
          Barrier& full = shared.sum_full[ring.slot];
          arrive_expecting(full, kChunk * kTileN * 2);
#pragma unroll
          for (int slice = 0; slice < kTileN / 64; ++slice) {  // past the end of z: zeros
            bf16* const to = shared.sum_slots[ring.slot] + slice * kChunk * 64;
            if (num_states < kChunk) {
              load_cut_box(to, cut_map, full, column + slice * 64, j, num_states, kChunk, place, 0);
            } else {
              load_box(to, map, full, column + slice * 64, j, place, 0);
            }
          }
        }
        __syncwarp();
      }
    }
  }
}

/// Tells other CTAs of the states that a warpgroup has stored. They are at rest only thousands of
/// clocks after they were stored, for which this warp waits in its place.
template <class Traits>
__device__ void announce_states(const LinearSumsParams& params, LinearSumsShared<Traits>& shared,
                                int group) {
  const int32_t num_blocks = params.linear.frame.keys.num_blocks;
  RingCursor<Traits::kAnnouncements> ring;
  for (int32_t unit = static_cast<int32_t>(blockIdx.x + group * gridDim.x); unit < params.num_units;
       unit += static_cast<int32_t>(2 * gridDim.x), ring.advance()) {
    const int32_t pair = unit / num_blocks, chunk = unit % num_blocks / Traits::kChunk;
    wait(shared.stored[group][ring.slot], ring.parity);
    if (lane_index() == 0) {
      fence_async_global();
      count_up(params.chunk_ready + int64_t{pair} * params.chunks + chunk);
      arrive(shared.announced[group][ring.slot]);
    }
    __syncwarp();
  }
}

/// Rows of the map as bits: a row of 64 key blocks is two words, in each of which bit n is block
/// 2 n and bit 16 + n block 2 n + 1, so that a shift and a mask give two neighbours of a fragment.
/// The first one is the first of the row's sequence.
template <class Traits>
__device__ void make_bits(const LinearSumsParams& params, int first_warp, int num_warps) {
  constexpr int kTileM = Traits::kTileM, kTogether = 16;
  const LinearParams& p = params.linear;
  const Axis& queries = p.frame.queries;
  const Axis& keys = p.frame.keys;
  const int32_t rows_per_head = params.tiles_m * kTileM;
  const int32_t num_rows = p.frame.batch * p.frame.num_heads * rows_per_head;
  const int lane = lane_index();
  const int lane_block = lane < 16 ? 2 * lane : 2 * lane - 31;
  for (int32_t row = static_cast<int32_t>(blockIdx.x) * num_warps + first_warp; row < num_rows;
       row += static_cast<int32_t>(gridDim.x) * num_warps) {
    const int32_t head = row / rows_per_head, i = row % rows_per_head;
    BlockInfo query{};
    if (i < queries.num_blocks) query = queries.block(i);
    const bool is_all = p.scope == LinearScope::kAll;
    const bool is_empty = query.is_protected || query.other_begin >= query.other_end ||
                          (!is_all && p.map.data == nullptr);
    const auto* const classes =
        static_cast<const int8_t*>(p.map.data) +
        p.map.offset(head / p.frame.num_heads, head % p.frame.num_heads, i, 0);
    uint2* const out = params.bits +
                       (int64_t{head} * params.tiles_m + i / kTileM) * params.chunks * kTileM +
                       i % kTileM;
    const int32_t num_words = params.chunks * 2;
    uint32_t any = 0;
    for (int32_t first = 0; first < num_words; first += kTogether) {
      // A branch for each value would wait for one after the other.
      const int32_t begin = query.other_begin + first * 32 + lane_block;
      int8_t values[kTogether] = {};
      if (!is_empty && !is_all) {
#pragma unroll
        for (int n = 0; n < kTogether; ++n) {
          values[n] = classes[min(begin + n * 32, query.other_end - 1) * p.map.stride_j];
        }
      }
      bool is_member[kTogether];
#pragma unroll
      for (int n = 0; n < kTogether; ++n) {
        const int32_t j = begin + n * 32;
        const bool is_of_scope =
            is_all | (p.scope == LinearScope::kMarginal ? values[n] == 0 : values[n] != 1);
        is_member[n] = !is_empty & (j < query.other_end) & is_of_scope;
      }
      if (!is_all && keys.table != nullptr) {
#pragma unroll
        for (int n = 0; n < kTogether; ++n) {
          is_member[n] = is_member[n] && keys.table[begin + n * 32].is_protected == 0;
        }
      }
#pragma unroll
      for (int n = 0; n < kTogether; n += 2) {
        const uint32_t low = __ballot_sync(kAllLanes, is_member[n]);
        const uint32_t high = __ballot_sync(kAllLanes, is_member[n + 1]);
        any |= low | high;
        if (lane == 0 && first + n < num_words) {
          out[int64_t{(first + n) / 2} * kTileM] = make_uint2(low, high);
        }
      }
    }
    if (lane == 0) params.empty_rows[row] = any == 0 ? NAN : 0.0f;
  }
  if (lane == 0) count_up(params.bits_made);
}

}  // namespace sparline::cuda
