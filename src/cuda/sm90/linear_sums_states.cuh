// SPDX-License-Identifier: Apache-2.0
//
// The sums of states on Hopper, warpgroups 1 and 2: the states of key blocks.
//   h_j = phi(k_j)^T v_j, or phi(k_j)^T (v_j W^T),  z_j = the sum of the rows of phi(k_j)
#pragma once

#include "cuda/sm80/feature_map.cuh"
#include "cuda/sm90/linear_sums_shared.cuh"

namespace sparline::cuda {

/// Every other key block of the CTA, for one warpgroup. phi takes the place of the keys in their
/// slot, v W^T that of the values.
template <class Traits>
class LinearStates {
  using T = typename Traits::T;
  static constexpr int kHeadDim = Traits::kHeadDim, kRunK = Traits::kRunK;
  static constexpr int kSliceBytes = Traits::kSliceBytes;

 public:
  __device__ LinearStates(const LinearSumsParams& params, LinearSumsShared<Traits>& shared,
                          int group)
      : params_(params),
        p_(params.linear),
        shared_(shared),
        group_(group),
        lane_(lane_index()),
        warp_(warp_index() % 4) {}

  __device__ void run() {
    int turn = 0;
    for (auto unit = static_cast<int32_t>(blockIdx.x); unit < params_.num_units;
         unit += static_cast<int32_t>(gridDim.x), turn ^= 1, ring_.advance()) {
      if (turn == group_) make(unit);
    }
  }

 private:
  __device__ __forceinline__ void sync_group() { sync_named(1 + group_, 128); }

  __device__ __forceinline__ void make(int32_t unit) {
    const int32_t num_blocks = p_.frame.keys.num_blocks;
    const int32_t pair = unit / num_blocks, j = unit % num_blocks;
    const BlockInfo block = p_.frame.keys.block(j);
    auto& slot = shared_.key_slots[ring_.slot];
    const SharedAddress keys = shared_address(slot.k), values = shared_address(slot.v);
    const bool has_projection = p_.combine == Combine::kProjection;
    wait(shared_.key_full[ring_.slot], ring_.parity);
    if (!has_projection && !std::is_same_v<T, bf16>) {
      round_values(slot.v, block.rows);
    } else if (block.rows < kRunK) {
      clear_values(slot.v, block.rows);
    }

    if (has_projection) {
      if (block.rows < kRunK) {
        fence_async_shared();
        sync_group();
      }
      float y[kHeadDim / 2];
      const uint32_t a = matrix_descriptor(values, 0);
      const uint32_t b = matrix_descriptor(shared_address(shared_.weight), 0);
      wgmma_fence();
#pragma unroll
      for (int d = 0; d < kHeadDim / 16; ++d) {
        wgmma_shared<T, kHeadDim, false, false>(y, a + ((d / 4 * kSliceBytes + d % 4 * 32) >> 4),
                                                b + ((d / 4 * kHeadDim * 128 + d % 4 * 32) >> 4),
                                                d > 0);
      }
      wgmma_commit();
      wgmma_wait<0>();
      sync_group();  // all have read the values
      const int row = warp_ * 16 + lane_ / 4;
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
        unsigned char* const to = reinterpret_cast<unsigned char*>(slot.v) + n / 8 * kSliceBytes +
                                  row * 128 + ((n % 8 ^ row % 8) * 16) + lane_ % 4 * 4;
        *reinterpret_cast<uint32_t*>(to) = pack<bf16>(y[n * 4], y[n * 4 + 1]);
        *reinterpret_cast<uint32_t*>(to + 8 * 128) = pack<bf16>(y[n * 4 + 2], y[n * 4 + 3]);
      }
    }
    const int32_t sequence = pair * p_.frame.keys.num_sequences + block.sequence;
    if (p_.k_mean != nullptr && sequence != sequence_) load_mean(sequence);
    map_keys(slot.k, block.rows, p_.k_mean == nullptr ? nullptr : shared_.mean[group_]);
    fence_async_shared();
    sync_group();

    if (sequence != sequence_) {  // the place of its pair may still be read
      sequence_ = sequence;
      if (pair >= params_.slots) {
        wait_for_count(
            params_.pair_done + pair - params_.slots,
            static_cast<uint32_t>(2 * p_.frame.group() * params_.tiles_m * params_.tiles_n));
      }
    }
    const int64_t state = int64_t{pair % params_.slots} * num_blocks + j;
#pragma unroll
    for (int m = 0; m < kHeadDim / 64; ++m) {
      sum_features(keys + m * kSliceBytes, params_.z_data + state * kHeadDim + m * 64);
    }
#pragma unroll 1
    for (int m = 0; m < kHeadDim / 64; ++m) {
      float h[kHeadDim / 2];
      const uint32_t a = matrix_descriptor(keys + m * kSliceBytes, kSliceBytes);
      const uint32_t b = matrix_descriptor(values, kSliceBytes);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kRunK / 16; ++k) {
        wgmma_shared<bf16, kHeadDim, true, true>(h, a + (k * 2048 >> 4), b + (k * 2048 >> 4),
                                                 k > 0);
      }
      wgmma_commit();
      wgmma_wait<0>();
      if (m == kHeadDim / 64 - 1) {
        __syncwarp();
        if (lane_ == 0) arrive(shared_.key_empty[ring_.slot]);
      }
      const int f = m * 64 + warp_ * 16 + lane_ / 4;
      bf16* const to = params_.state_data + (state * kHeadDim + f) * kHeadDim + lane_ % 4 * 8;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int d = 0; d < kHeadDim; d += 32) {
          const float* const x = h + d / 2 + half * 2;
          *reinterpret_cast<uint4*>(to + half * 8 * kHeadDim + d) =
              make_uint4(pack<bf16>(x[0], x[1]), pack<bf16>(x[4], x[5]), pack<bf16>(x[8], x[9]),
                         pack<bf16>(x[12], x[13]));
        }
      }
    }
    wait(shared_.announced[group_][stored_.slot], stored_.parity ^ 1);
    __syncwarp();
    if (lane_ == 0) arrive(shared_.stored[group_][stored_.slot]);
    stored_.advance();
  }

  /// All have read the mean before: make() synchronised since.
  __device__ __forceinline__ void load_mean(int32_t sequence) {
    for (int n = warp_ * kWarpSize + lane_; n < kHeadDim; n += 128) {
      shared_.mean[group_][n] = p_.k_mean[int64_t{sequence} * kHeadDim + n];
    }
    sync_group();
  }
  /// What another block's rows are: phi is 0 there, but they need not be finite.
  __device__ void clear_values(T* v, int32_t num_rows) {
    for (int n = static_cast<int>(threadIdx.x) % 128; n < kRunK * kHeadDim / 8; n += 128) {
      if (n % (kRunK * 8) / 8 >= num_rows) reinterpret_cast<uint4*>(v)[n] = make_uint4(0, 0, 0, 0);
    }
  }
  /// Values as bf16, and those of another block cleared: by one thread each, for nothing orders two
  /// passes over them.
  __device__ void round_values(T* v, int32_t num_rows) {
    for (int n = static_cast<int>(threadIdx.x) % 128; n < kRunK * kHeadDim / 2; n += 128) {
      uint32_t& two = reinterpret_cast<uint32_t*>(v)[n];
      const T* const x = reinterpret_cast<const T*>(&two);
      two = n % (kRunK * 32) / 32 < num_rows ? pack<bf16>(to_float(x[0]), to_float(x[1])) : 0u;
    }
  }

  /// k becomes phi(k), bf16: a quad of lanes takes a row, 32 rows at a time.
  __device__ __forceinline__ void map_keys(T* k, int32_t num_rows, const float* mean) {
    constexpr int kVectors = kHeadDim / 32;
    const int t = lane_ % 4;
#pragma unroll
    for (int first = 0; first < kRunK; first += 32) {
      const int row = first + warp_ * 8 + lane_ / 4;
      // Odd rows take their vectors in another order, or two rows would meet in the same banks.
      const auto chunk_of = [&](int n) { return (n ^ row % 2) * 4 + t; };
      const auto at = [&](int n) {
        const int chunk = chunk_of(n);
        return reinterpret_cast<uint4*>(reinterpret_cast<unsigned char*>(k) +
                                        chunk / 8 * kSliceBytes + row * 128 +
                                        ((chunk % 8 ^ row % 8) * 16));
      };
      float x[kHeadDim / 4];
#pragma unroll
      for (int n = 0; n < kVectors; ++n) {
        const uint4 vector = *at(n);
        const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const T* const two = reinterpret_cast<const T*>(words + e);
          x[n * 8 + e * 2] = to_float(two[0]);
          x[n * 8 + e * 2 + 1] = to_float(two[1]);
        }
      }
      if (mean != nullptr) {
#pragma unroll
        for (int n = 0; n < kVectors; ++n) {
#pragma unroll
          for (int e = 0; e < 8; e += 4) {
            const float4 four = *reinterpret_cast<const float4*>(mean + chunk_of(n) * 8 + e);
            x[n * 8 + e] -= four.x;
            x[n * 8 + e + 1] -= four.y;
            x[n * 8 + e + 2] -= four.z;
            x[n * 8 + e + 3] -= four.w;
          }
        }
      }
      feature_map<VectorColumns>(p_.feature_map, kHeadDim, 1.0f, x, x);
      const bool is_row = row < num_rows;
#pragma unroll
      for (int n = 0; n < kVectors; ++n) {
        const float* const y = x + n * 8;
        *at(n) = is_row ? make_uint4(pack<bf16>(y[0], y[1]), pack<bf16>(y[2], y[3]),
                                     pack<bf16>(y[4], y[5]), pack<bf16>(y[6], y[7]))
                        : make_uint4(0, 0, 0, 0);
      }
    }
  }

  /// The sums over keys of the warp's 16 features of a slice: phi^T times a column of ones.
  __device__ __forceinline__ void sum_features(SharedAddress slice, bf16* out) {
    float z[4] = {};  // column 0
    const uint32_t ones = lane_ < 4 ? pack<bf16>(1.0f, 1.0f) : 0u;
    const int row = lane_ % 8 + lane_ / 16 * 8;
    const SharedAddress from = slice + row * 128 + (((warp_ * 2 + lane_ / 8 % 2) ^ row % 8) * 16);
#pragma unroll
    for (int k = 0; k < kRunK / 16; ++k) {
      uint32_t a[4];
      ldmatrix_x4_trans(a, from + k * 2048);
      mma<bf16>(z, a, ones, ones);
    }
    if (lane_ % 4 == 0) {
      out[warp_ * 16 + lane_ / 4] = from_float<bf16>(z[0]);
      out[warp_ * 16 + lane_ / 4 + 8] = from_float<bf16>(z[2]);
    }
  }

  const LinearSumsParams& params_;
  const LinearParams& p_;
  LinearSumsShared<Traits>& shared_;
  const int group_, lane_, warp_;
  RingCursor<Traits::kKeySlots> ring_;
  RingCursor<Traits::kAnnouncements> stored_;
  int32_t sequence_ = -1;  // of the block before, of all heads
};

}  // namespace sparline::cuda
