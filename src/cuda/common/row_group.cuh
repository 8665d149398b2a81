// SPDX-License-Identifier: Apache-2.0
//
// The warps that work on one row of a block map together: a lane holds kRowItems entries of the row
// in registers (or more, where one warp takes a long row), a warp a run of kWarpItems entries.
#pragma once

#include "cuda/common/tile.cuh"

namespace sparline::cuda {

constexpr int kRowItems = 16;
constexpr int kWarpItems = kRowItems * kWarpSize;
constexpr int kMaxRowWarps = 32;
constexpr int kMaxHeldItems = kMaxRowWarps * kWarpItems;  // longer rows stay in memory
constexpr int kRowsPerBlock = 4;                          // of one warp each
template <bool kIsOneWarp>
constexpr int kMaxThreads = (kIsOneWarp ? kRowsPerBlock : kMaxRowWarps) * kWarpSize;

/// kIsOneWarp: one of several warps in a thread block that know nothing of each other; else all
/// warps of the thread block.
template <bool kIsOneWarp>
class RowGroup {
 public:
  /// `exchange`: shared memory for two values of each warp; unused by one warp.
  __device__ explicit RowGroup(uint2* exchange) : exchange_(exchange) {}

  __device__ __forceinline__ int warp() const { return kIsOneWarp ? 0 : warp_index(); }
  __device__ __forceinline__ int num_warps() const {
    return kIsOneWarp ? 1 : static_cast<int>(blockDim.x) / kWarpSize;
  }

  /// What `reduce`, a reduction over a warp, makes of all x. Every thread of the group calls it and
  /// gets the result. `neutral` changes no reduction.
  template <class T, class Reduce>
  __device__ __forceinline__ T all(T x, T neutral, const Reduce& reduce) {
    static_assert(sizeof(T) <= sizeof(uint2));
    x = reduce(x);
    if constexpr (!kIsOneWarp) {
      // Two buffers in turn: whoever writes one again has passed the barrier of the other, and with
      // it everyone's reads of the first.
      T* const parts = reinterpret_cast<T*>(exchange_ + turn_ * kMaxRowWarps);
      turn_ ^= 1;
      if (lane_index() == 0) parts[warp()] = x;
      __syncthreads();
      x = reduce(lane_index() < num_warps() ? parts[lane_index()] : neutral);
    }
    return x;
  }

  __device__ __forceinline__ uint2 sums(uint32_t a, uint32_t b) {
    return all(make_uint2(a, b), make_uint2(0u, 0u), [](uint2 x) {
      return make_uint2(__reduce_add_sync(kAllLanes, x.x), __reduce_add_sync(kAllLanes, x.y));
    });
  }
  __device__ __forceinline__ uint32_t sum(uint32_t x) {
    return all(x, 0u, [](uint32_t y) { return __reduce_add_sync(kAllLanes, y); });
  }
  /// Of numbers below 2^44.
  __device__ __forceinline__ uint64_t sum(uint64_t x) {
    constexpr int kLowBits = 22;  // of 1024 threads they sum to less than 2^32
    const uint2 parts = sums(static_cast<uint32_t>(x) & ((1u << kLowBits) - 1),
                             static_cast<uint32_t>(x >> kLowBits));
    return parts.x + (uint64_t{parts.y} << kLowBits);
  }
  __device__ __forceinline__ float sum(float x) {
    return all(x, 0.0f, [](float y) { return warp_sum(y); });
  }

 private:
  uint2* exchange_;
  int turn_ = 0;
};

/// Entries [begin, end) of a row, as the lanes of a group walk them; a lane holds kItems of them.
template <bool kIsOneWarp, bool kIsHeld, int kItems = kRowItems>
class RowWalk {
 public:
  __device__ RowWalk(const RowGroup<kIsOneWarp>& group, int32_t begin, int32_t end) : end_(end) {
    int32_t run = kItems * kWarpSize;
    if constexpr (!kIsHeld) {
      const int32_t lines = (end - begin + kWarpSize - 1) / kWarpSize;
      run = (lines + group.num_warps() - 1) / group.num_warps() * kWarpSize;
    }
    first_ = begin + group.warp() * run + lane_index();
    past_ = first_ + run;
  }

  /// The lane's first entry.
  __device__ __forceinline__ int32_t first() const { return first_; }

  /// body(j, n) for this lane's entries, kWarpSize apart; n < kItems counts them where the row is
  /// held in registers. There j may be at or past the end, so that registers are always set.
  template <class Body>
  __device__ __forceinline__ void for_each(const Body& body) const {
    if constexpr (kIsHeld) {
#pragma unroll
      for (int n = 0; n < kItems; ++n) body(first_ + n * kWarpSize, n);
    } else {
      const int32_t past = past_ < end_ ? past_ : end_;
#pragma unroll 4
      for (int32_t j = first_; j < past; j += kWarpSize) body(j, 0);
    }
  }

 private:
  int32_t first_, past_, end_;
};

/// The shape of a kernel with one group for each of `num_rows` rows of `num_items` entries.
struct RowShape {
  bool is_one_warp, is_held;
  int64_t blocks;
  int threads;

  RowShape(int64_t num_rows, int64_t num_items) {
    is_one_warp = num_items <= kWarpItems;
    is_held = num_items <= kMaxHeldItems;
    blocks = is_one_warp ? (num_rows + kRowsPerBlock - 1) / kRowsPerBlock : num_rows;
    const int64_t num_warps = is_held ? (num_items + kWarpItems - 1) / kWarpItems : kMaxRowWarps;
    threads = static_cast<int>(is_one_warp ? kRowsPerBlock : num_warps) * kWarpSize;
  }
};

/// The row of this thread's group.
template <bool kIsOneWarp>
__device__ __forceinline__ int64_t row_index() {
  return kIsOneWarp ? int64_t{blockIdx.x} * kRowsPerBlock + warp_index() : int64_t{blockIdx.x};
}

}  // namespace sparline::cuda
