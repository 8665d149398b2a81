// SPDX-License-Identifier: Apache-2.0
//
// The sums of states on Hopper, warpgroups 3 and 4: the product of the map with the states.
//   H_i = the sum over j in E_i of h_j, Z_i likewise
#pragma once

#include "cuda/sm90/linear_sums_shared.cuh"

namespace sparline::cuda {

/// 64 of the 128 rows of every tile, for one warpgroup. The map comes as bits, which become A
/// fragments of ones and zeros in registers. Products of 64 columns would take as long as those of
/// 128: as long as A takes to leave the registers.
template <class Traits>
class LinearProduct {
  static constexpr int kHeadDim = Traits::kHeadDim;
  static constexpr int kTileM = Traits::kTileM, kTileN = Traits::kTileN;
  static constexpr int kAhead = 4;
  static_assert(kTileM == 128 && kTileN == 128);

 public:
  __device__ LinearProduct(const LinearSumsParams& params, LinearSumsShared<Traits>& shared,
                           int group)
      : params_(params),
        shared_(shared),
        lane_(lane_index()),
        row_(group * 64 + warp_index() % 4 * 16 + lane_ / 4),
        next_bits_(params.bits + row_) {}

  __device__ void run() {
    // All of them: every CTA makes its share before it adds up anything.
    wait_for_count(params_.bits_made, gridDim.x * Traits::kSumWarps);
    __syncwarp();
    find_next_bits(static_cast<int32_t>(blockIdx.x));
#pragma unroll
    for (int n = 0; n < kAhead; ++n) load(next_[n], next_bits_, n);
    for (auto idx = static_cast<int32_t>(blockIdx.x); idx < params_.num_tiles;
         idx += static_cast<int32_t>(gridDim.x)) {
      const SumTile tile(params_, idx);
      SumRange range;
      for (bool is_left = next_range<Traits>(params_, tile.m, range); is_left;) {
        const SumRange own = range;
        is_left = next_range<Traits>(params_, tile.m, range);
        bits_ = next_bits_;
        find_next_bits(is_left ? idx : idx + static_cast<int32_t>(gridDim.x));
        add_chunks(own.template num_chunks<Traits>());
        if (!is_left && threadIdx.x % 128 == 0) {
          count_reads(params_.pair_done + tile.head / params_.linear.frame.group());
        }
        store(tile, own);
      }
    }
  }

 private:
  /// Two neighbours of a row of the map as bf16: bits kShift and 16 + kShift.
  template <int kShift>
  __device__ __forceinline__ static uint32_t ones(uint32_t word) {
    static_assert(kShift <= 7);
    constexpr uint32_t kOne = 0x3f80;  // 7 bits that end at bit 7
    return (word & (0x00010001u << kShift)) * (kOne >> kShift);
  }

  /// The map of a chunk, rows g and g + 8.
  using Bits = uint2[2];
  /// The map is kAhead chunks ahead: where states fill L2's queues, it takes as long to come as the
  /// products of two or three. Past a tile's last chunks come the first ones of the next one, so
  /// that they are there when its sums have been stored: a store would wait for what was asked for
  /// just before, with which it shares a scoreboard.
  __device__ __forceinline__ void load(Bits& to, const uint2* bits, int32_t chunk) {
    bits += min(chunk, params_.chunks - 1) * kTileM;
    to[0] = __ldcg(bits);
    to[1] = __ldcg(bits + 8);
  }
  /// Where the bits of tile `idx` are; past the last one, of any that is there.
  __device__ __forceinline__ void find_next_bits(int32_t idx) {
    if (idx >= params_.num_tiles) return;
    const SumTile tile(params_, idx);
    next_bits_ = params_.bits +
                 (int64_t{tile.head} * params_.tiles_m + tile.m) * params_.chunks * kTileM + row_;
  }

  __device__ __forceinline__ void add_chunks(int32_t num_chunks) {
#pragma unroll
    for (int n = 0; n < kTileN / 2; ++n) sum_[n] = 0.0f;
#pragma unroll
    for (int n = 0; n < kAhead; ++n) {
      if (n >= num_chunks) load(next_[n], next_bits_, n);
    }
    for (int32_t first = 0; first < num_chunks; first += kAhead) {
#pragma unroll
      for (int n = 0; n < kAhead; ++n) {
        const int32_t chunk = first + n;
        if (chunk < num_chunks) {
          add_chunk(next_[n], chunk + kAhead < num_chunks, chunk + kAhead, n);
        }
      }
    }
  }
  /// `own` then becomes the map of the chunk `after`, if there is one, or of the next tile's chunk
  /// n.
  __device__ __forceinline__ void add_chunk(Bits& own, bool has_more, int32_t after, int n) {
    // All of A first: ptxas 13.0 waits for every product between whose start and end a register
    // of another one is written (C7513). The other warpgroup multiplies meanwhile.
    uint32_t a[Traits::kChunk / 4];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const uint32_t words[2] = {own[n].x >> lane_ % 4, own[n].y >> lane_ % 4};
#pragma unroll
      for (int k = 0; k < Traits::kChunk / 16; ++k) {
        const uint32_t word = words[k / 2] >> (k % 2 * 8);
        a[k * 4 + n] = ones<0>(word);
        a[k * 4 + n + 2] = ones<4>(word);
      }
    }
    // Made here, and not between the products, where ptxas would wait for them.
#pragma unroll
    for (int n = 0; n < Traits::kChunk / 4; ++n) asm volatile("" : "+r"(a[n]));
    load(own, has_more ? bits_ : next_bits_, has_more ? after : n);
    wait(shared_.sum_full[ring_.slot], ring_.parity);
    const uint32_t b =
        matrix_descriptor(shared_address(shared_.sum_slots[ring_.slot]), Traits::kSliceBytes);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < Traits::kChunk / 16; ++k) {
      wgmma<bf16, kTileN, true>(sum_, a + k * 4, b + (k * 2048 >> 4), 1);
    }
    wgmma_commit();
    wgmma_wait<0>();
    __syncwarp();
    if (lane_ == 0) arrive(shared_.sum_empty[ring_.slot]);
    ring_.advance();
  }

  __device__ __forceinline__ void store(const SumTile& tile, const SumRange& range) {
    if (tile.n == kHeadDim * kHeadDim / kTileN) {
      store_z(tile, range);
      return;
    }
    const Frame& frame = params_.linear.frame;
    const int32_t b = tile.head / frame.num_heads, h = tile.head % frame.num_heads;
    bf16* rows[2];  // row 0 of H_i; null: nothing is stored
    int64_t strides[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row_ + half * 8;
      rows[half] = nullptr;
      if (row < range.first || row >= range.last) continue;
      const BlockInfo block = frame.queries.block(tile.m * kTileM + row);
      if (block.is_protected) continue;
      if (block.rows >= kHeadDim) {
        strides[half] = params_.o.stride_n;
        rows[half] = params_.o.head<bf16>(b, h) + block.begin * params_.o.stride_n;
      } else {
        const int64_t matrix = int64_t{tile.head} * frame.queries.num_sequences + block.sequence;
        strides[half] = kHeadDim;
        rows[half] = params_.ragged + matrix * kHeadDim * kHeadDim;
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (rows[half] == nullptr) continue;
      const float* const x = sum_ + half * 2;
#pragma unroll
      for (int n = 0; n < kTileN; n += 32) {
        const float* const y = x + n / 2;
        const int f = tile.n * (kTileN / kHeadDim) + n / kHeadDim, d = n % kHeadDim;
        // First to leave the cache: its place is for states, which are read again.
        __stcs(reinterpret_cast<uint4*>(rows[half] + f * strides[half] + d + lane_ % 4 * 8),
               make_uint4(pack<bf16>(y[0], y[1]), pack<bf16>(y[4], y[5]), pack<bf16>(y[8], y[9]),
                          pack<bf16>(y[12], y[13])));
      }
    }
  }
  __device__ __forceinline__ void store_z(const SumTile& tile, const SumRange& range) {
    const int32_t num_blocks = params_.linear.frame.queries.num_blocks;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row_ + half * 8;
      if (row < range.first || row >= range.last) continue;
      const int32_t i = tile.m * kTileM + row;
      const float* const x = sum_ + half * 2;
      float* const to =
          params_.sums_z + (int64_t{tile.head} * num_blocks + i) * kHeadDim + lane_ % 4 * 2;
      const float empty =
          range.begin == range.end
              ? NAN
              : params_.empty_rows[int64_t{tile.head} * params_.tiles_m * kTileM + i];
#pragma unroll
      for (int f = 0; f < kHeadDim / 8; ++f) {
        *reinterpret_cast<float2*>(to + f * 8) =
            make_float2(x[f * 4] + empty, x[f * 4 + 1] + empty);
      }
    }
  }

  const LinearSumsParams& params_;
  LinearSumsShared<Traits>& shared_;
  const int lane_, row_;
  RingCursor<Traits::kSumSlots> ring_;
  const uint2* bits_ = nullptr;  // of the tile
  const uint2* next_bits_;       // of the next one, or of any that is there
  Bits next_[kAhead] = {};       // of the next chunks to multiply
  float sum_[kTileN / 2];
};

}  // namespace sparline::cuda
