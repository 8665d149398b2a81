// SPDX-License-Identifier: Apache-2.0
//
// The sums of states on Hopper, warpgroups 3 and 4: the product of the map with the states.
//   H_i = the sum over j in E_i of h_j, Z_i likewise
#pragma once

#include "cuda/sm90/linear_sums_shared.cuh"

namespace sparline::cuda {

/// Two of every four 64 rows of a tile, for one warpgroup. The map comes as bits, which become A
/// fragments of ones and zeros in registers.
template <class Traits>
class LinearProduct {
  static constexpr int kHeadDim = Traits::kHeadDim, kTileN = Traits::kTileN;

 public:
  __device__ LinearProduct(const LinearSumsParams& params, LinearSumsShared<Traits>& shared,
                           int group)
      : params_(params),
        shared_(shared),
        group_(group),
        lane_(lane_index()),
        row_(warp_index() % 4 * 16 + lane_ / 4) {}

  __device__ void run() {
    for (auto idx = static_cast<int32_t>(blockIdx.x); idx < params_.num_tiles;
         idx += static_cast<int32_t>(gridDim.x)) {
      const SumTile tile(params_, idx);
      const ChunkRange range = chunk_range<Traits>(params_, tile.m);
#pragma unroll
      for (int n = 0; n < kTileN / 2; ++n) sum_[0][n] = sum_[1][n] = 0.0f;
      for (int32_t chunk = range.begin; chunk < range.end; ++chunk) {
        add_chunk();
        ring_.advance();
      }
      if (threadIdx.x % 128 == 0) {
        count_up(params_.pair_done + tile.head / params_.linear.frame.group());
      }
      store(tile);
    }
  }

 private:
  __device__ __forceinline__ void release(int slot) {
    __syncwarp();
    if (lane_ == 0) arrive(shared_.sum_empty[slot]);
  }
  /// Two neighbours of a row of the map as bf16: bits kShift and 16 + kShift.
  template <int kShift>
  __device__ __forceinline__ static uint32_t ones(uint32_t word) {
    static_assert(kShift <= 7);
    constexpr uint32_t kOne = 0x3f80;  // 7 bits that end at bit 7
    return (word & (0x00010001u << kShift)) * (kOne >> kShift);
  }

  __device__ __forceinline__ void add_chunk() {
    wait(shared_.sum_full[ring_.slot], ring_.parity);
    const auto& slot = shared_.sum_slots[ring_.slot];
    uint2 words[4];  // rows g and g + 8 of both 64 rows
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      words[n] = slot.bits[row_ + group_ * 64 + n / 2 * 128 + n % 2 * 8];
    }
    const uint32_t b = matrix_descriptor(shared_address(slot.states), 0);
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      words[n].x >>= lane_ % 4;
      words[n].y >>= lane_ % 4;
    }
    // All of A first: ptxas 13.0 waits for every product between whose start and end a register of
    // another one is written (C7513). The other warpgroup multiplies meanwhile.
    uint32_t a[2][Traits::kChunk / 4];
#pragma unroll
    for (int k = 0; k < Traits::kChunk / 16; ++k) {
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const uint32_t word = (k < 2 ? words[n].x : words[n].y) >> (k % 2 * 8);
        a[n / 2][k * 4 + n % 2] = ones<0>(word);
        a[n / 2][k * 4 + n % 2 + 2] = ones<4>(word);
      }
    }
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < Traits::kChunk / 16; ++k) {
      wgmma<bf16, kTileN, true>(sum_[0], a[0] + k * 4, b + (k * 2048 >> 4), 1);
      wgmma<bf16, kTileN, true>(sum_[1], a[1] + k * 4, b + (k * 2048 >> 4), 1);
    }
    wgmma_commit();
    wgmma_wait<0>();
    release(ring_.slot);
  }

  __device__ __forceinline__ void store(const SumTile& tile) {
    const Frame& frame = params_.linear.frame;
    constexpr int kTilesH = kHeadDim * kHeadDim / kTileN;
    const int32_t b = tile.head / frame.num_heads, h = tile.head % frame.num_heads;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const int32_t i = tile.m * Traits::kTileM + row_ + group_ * 64 + n / 2 * 128 + n % 2 * 8;
      const float* const x = sum_[n / 2] + n % 2 * 2;
      if (i >= frame.queries.num_blocks) continue;
      if (tile.n >= kTilesH) {
        float* const to = params_.sums_z +
                          (int64_t{tile.head} * frame.queries.num_blocks + i) * kHeadDim +
                          (tile.n - kTilesH) * kTileN + lane_ % 4 * 2;
        const float empty =
            params_.empty_rows[int64_t{tile.head} * params_.tiles_m * Traits::kTileM + i];
#pragma unroll
        for (int f = 0; f < kTileN / 8; ++f) {
          *reinterpret_cast<float2*>(to + f * 8) =
              make_float2(x[f * 4] + empty, x[f * 4 + 1] + empty);
        }
        continue;
      }
      const BlockInfo block = frame.queries.block(i);
      if (block.is_protected) continue;
      const int f = tile.n * kTileN / kHeadDim;
      bf16* to;
      if (block.rows >= kHeadDim) {
        to = params_.o.head<bf16>(b, h) + (block.begin + f) * params_.o.stride_n;
      } else {
        const int64_t matrix = int64_t{tile.head} * frame.queries.num_sequences + block.sequence;
        to = params_.ragged + (matrix * kHeadDim + f) * kHeadDim;
      }
      to += tile.n * kTileN % kHeadDim + lane_ % 4 * 8;
#pragma unroll
      for (int d = 0; d < kTileN; d += 32) {
        const float* const y = x + d / 2;
        *reinterpret_cast<uint4*>(to + d) =
            make_uint4(pack<bf16>(y[0], y[1]), pack<bf16>(y[4], y[5]), pack<bf16>(y[8], y[9]),
                       pack<bf16>(y[12], y[13]));
      }
    }
  }

  const LinearSumsParams& params_;
  LinearSumsShared<Traits>& shared_;
  const int group_, lane_, row_;
  RingCursor<Traits::kSumSlots> ring_;
  float sum_[2][kTileN / 2];
};

}  // namespace sparline::cuda
