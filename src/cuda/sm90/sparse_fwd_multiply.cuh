// SPDX-License-Identifier: Apache-2.0
//
// The Hopper forward, warpgroups 1 and 2: products, softmax, and what leaves.
#pragma once

#include <bit>
#include <cfloat>

#include "cuda/sm80/feature_map.cuh"
#include "cuda/sm90/sparse_fwd_shared.cuh"

namespace sparline::cuda {

/// 64 query rows of every block, for one warpgroup: warps 4 to 7, or 8 to 11 where there are two. A
/// warp holds 16 of them, a lane two (halves 0 and 1, rows g and g + 8 of its fragments).
template <class Traits>
class SparseForwardSm90Rows {
 protected:
  using T = typename Traits::T;
  static constexpr int kHeadDim = Traits::kHeadDim, kTileK = Traits::kTileK;
  static constexpr int kRunK = Traits::kRunK;
  static constexpr float kLazyLog2 = 8.0f;  // how far scores may rise above the maxima
  // Whether o of a block with a linear tile is stored while the second scores of the next block are
  // under way.
  static constexpr bool kStoresLate = Traits::kHasLinear && !Traits::kTakesTurns;
  static constexpr int kFirstTurn = 1, kMultiplyThreads = Traits::kMultiplyWarps * kWarpSize;

 public:
  __device__ SparseForwardSm90Rows(const SparseForwardSm90Params& params,
                                   SparseForwardSm90Shared<Traits>& shared)
      : p_(params.forward),
        shared_(shared),
        lane_(lane_index()),
        warp_row_(warp_index() * 16 - 64) {}

  __device__ __forceinline__ void run() {
    wait(shared_.full[0], 0);
    TileInfo tile = shared_.infos[0];
    if (tile.num_keys == TileInfo::kEnd) return;
    if (Traits::kTakesTurns && warp_index() >= 8) arrive_named(kFirstTurn, kMultiplyThreads);
    reset(tile.block);
    load_queries(tile.block);
    bool had_second = is_whole(tile);
    had_second ? first_step<kTileK>(tile) : first_step<kRunK>(tile);
    read(tile);
    bool was_linear = false, stores_late = false;
    while (tile.num_keys != TileInfo::kEnd) {
      const bool is_linear = Traits::kHasLinear && tile.block == TileInfo::kLinear;
      const bool is_last = Traits::kHasLinear && tile.block == TileInfo::kLast && is_softmax();
      const bool has_second = is_whole(tile);
      // Cursors and the wait for the next tile stand here, once, and not in every step: ptxas 13.0
      // then keeps slots in uniform registers (33 R2UR in the kernel with a linear tile, else 269).
      k_ = ring_;
      ring_.advance();
      v_ = ring_;
      ring_.advance();
      RingCursor<Traits::kSlots> v_after = ring_;  // of this tile's values
      v_after.advance();
      // Nearly all tiles, first: every jump to far code waits for instructions. had_second stands
      // for tiles of keys alone: no linear tile has a second run, and after one it is false.
      if (__builtin_expect(had_second && has_second && !stores_late, 1)) {
        step<kTileK, kTileK>(tile);
      } else if (stores_late) {
        step<kTileK, kTileK, false, kStoresLate>(tile);
      } else if (is_last) {
        step_with_linear(tile, v_after);
      } else if (is_linear) {
        had_second ? linear_step<kTileK>() : linear_step<kRunK>();
      } else if (was_linear) {
        has_second ? step<kTileK, kHeadDim, true>(tile) : step<kRunK, kHeadDim, true>(tile);
      } else if (has_second) {
        step<kTileK, kRunK>(tile);
      } else {
        had_second ? step<kRunK, kTileK>(tile) : step<kRunK, kRunK>(tile);
      }
      had_second = has_second;
      const bool has_combined = was_linear;
      was_linear = is_linear || is_last;
      if (is_last) {
        ring_.advance();
        ring_.advance();
      }
      read(tile);
      stores_late = kStoresLate && has_combined && had_second && is_whole(tile);
      if (Traits::kHasLinear && has_combined && !stores_late) store_combined(block_before());
    }
    k_ = ring_;
    ring_.advance();
    v_ = ring_;
    if (Traits::kHasLinear && was_linear) {
      last_step<kHeadDim, true>();
    } else {
      had_second ? last_step<kTileK>() : last_step<kRunK>();
    }
    // The other warpgroup has arrived once more.
    if (Traits::kTakesTurns && warp_index() < 8) sync_named(kFirstTurn, kMultiplyThreads);
  }

 protected:
  /// Whether it has all runs that a tile can have.
  __device__ __forceinline__ static bool is_whole(const TileInfo& tile) {
    return kTileK == kRunK || tile.has_second();
  }
  /// Waits for the next tile of keys and tells of it, with the queries of the block it begins.
  __device__ __forceinline__ void read(TileInfo& tile) {
    wait(shared_.full[ring_.slot], ring_.parity);
    tile = shared_.infos[ring_.slot];
    if (tile.block >= 0) load_queries(tile.block);
  }
  __device__ __forceinline__ void release(int slot) {
    __syncwarp();  // what the others have read of it
    if (lane_ == 0) arrive(shared_.empty[slot]);
  }
  __device__ __forceinline__ void reset(int32_t block) {
    block_ = block;
    row_max_[0] = row_max_[1] = -INFINITY;
    row_sum_[0] = row_sum_[1] = 0.0f;
  }
  template <int kKeys>
  __device__ __forceinline__ void first_step(const TileInfo& tile) {
    float s[kKeys / 2];
    start_scores<kKeys>(s);
    wgmma_wait<0>();
    release(0);
    ring_.advance();
    softmax<kKeys>(s, tile);
    pack_p<0>(s);
    if constexpr (kKeys > kRunK) pack_p<1>(s);
  }
  /// S and P of a tile, and P v of the one before. A function of both tiles' widths, so that no
  /// branch lies between products: ptxas 13.0 would wait for each of them (C7515). The scores are a
  /// local array for the same reason (C7511).
  template <int kKeys, int kKeysBefore, bool kWasLinear = false, bool kStores = false>
  __device__ __forceinline__ void step(const TileInfo& tile) {
    const bool is_new = tile.block >= 0;
    const int32_t old_block = block_;
    const int k_slot = k_.slot;
    float s[kKeys / 2];
    if constexpr (Traits::kTakesTurns) sync_named(warp_index() / 4, kMultiplyThreads);
    start_scores<kKeys>(s);
    if constexpr (kStores) store_combined(block_before());
    const int v_slot = v_.slot;
    start_values<kKeysBefore, kWasLinear>();
    if constexpr (Traits::kTakesTurns) arrive_named(3 - warp_index() / 4, kMultiplyThreads);
    wgmma_wait<1>();
    release(k_slot);
    const float old_max[2] = {row_max_[0], row_max_[1]};
    const float old_sum[2] = {row_sum_[0], row_sum_[1]};
    if (is_new) reset(tile.block);
    start_softmax<kKeys>(s, tile);
    find_tops<0>(s);
    exponentials<0>(s);
    if constexpr (kKeys > kRunK) find_tops<1>(s);
    const bool is_raised = is_raised_;
    // After a branch (find_tops): ptxas would move the exponentials of a basic block past the wait.
    wgmma_wait<0>();
    release(v_slot);
    pack_p<0>(s);
    if constexpr (kKeys > kRunK) {
      exponentials<1>(s);
      pack_p<1>(s);
    }
    is_first_ = is_new;
    if constexpr (kWasLinear) {
      finish_combined();
    } else if (is_new) {
      finish(old_block, old_max, old_sum);
    } else if (is_raised) {
      rescale();
    }
  }
  template <int kKeys, bool kWasLinear = false>
  __device__ __forceinline__ void last_step() {
    start_values<kKeys, kWasLinear>();
    wgmma_wait<0>();
    if constexpr (kWasLinear) {
      finish_combined();
      store_combined(block_);
    } else {
      finish(block_, row_max_, row_sum_);
    }
  }

  // The linear tile ----------------------------------------------------------------------------

  /// P v of the last tile of keys, and beside it phi(q), which multiplies H_i in the next step. It
  /// is not divided by phi(q) . Z_i: o_s is multiplied by that instead, and o is divided by it
  /// before it is stored.
  template <int kKeysBefore>
  __device__ __forceinline__ void linear_step() {
    const int z_slot = k_.slot;
    const BlockPlace& at = shared_.places[block_];
    const float logits[2] = {load_logit(at, 0), load_logit(at, 1)};
    if constexpr (Traits::kTakesTurns) sync_named(warp_index() / 4, kMultiplyThreads);
    const int v_slot = v_.slot;
    start_values<kKeysBefore>();
    if constexpr (Traits::kTakesTurns) arrive_named(3 - warp_index() / 4, kMultiplyThreads);
    float phi[kHeadDim / 2], den[2];
    make_phi(phi, z_of(z_slot), den);
    release(z_slot);
    float o_factor[2];
    find_factors(at, den, logits, o_factor,
                 [&](const float (&factor)[2], const bool (&has_linear)[2]) {
#pragma unroll
                   for (int n = 0; n < kHeadDim / 2; ++n) {
                     phi[n] = has_linear[n / 2 % 2] ? phi[n] * factor[n / 2 % 2] : 0.0f;
                   }
                 });
    wgmma_wait<0>();
    release(v_slot);
#pragma unroll
    for (int n = 0; n < kHeadDim / 2; ++n) o_[n] *= o_factor[n / 2 % 2];
    // Not before the wait: every product would wait for the one before (C7513).
#pragma unroll
    for (int n = 0; n < kHeadDim / 4; ++n) p_frag_[n] = pack<bf16>(phi[n * 2], phi[n * 2 + 1]);
    is_first_ = false;
  }
  /// The same where the last tile has one run: its scores and P too. One part of phi(q) is made
  /// while the scores are under way, the other one beside P v.
  __device__ __forceinline__ void step_with_linear(const TileInfo& tile,
                                                   const RingCursor<Traits::kSlots>& v_after) {
    constexpr int kFirstPart = kHeadDim / 64 * 3;  // of kHeadDim / 8: half of them spill
    const int k_slot = k_.slot, z_slot = ring_.slot;
    wait(shared_.full[ring_.slot], ring_.parity);
    float s[kRunK / 2];
    if constexpr (Traits::kTakesTurns) sync_named(warp_index() / 4, kMultiplyThreads);
    start_scores<kRunK>(s);
    int v_slot = v_.slot;
    start_values<kTileK>();
    if constexpr (Traits::kTakesTurns) arrive_named(3 - warp_index() / 4, kMultiplyThreads);
    uint32_t a[kHeadDim / 4];
    float shift[2], sums[2][2] = {};
    find_shifts(shift);
    const auto apply = [&](float x, int half) { return exponential(x, shift[half]); };
    const auto take = [&](int n, float low, float high) { a[n] = pack<bf16>(low, high); };
    make_some<0, kFirstPart>(z_of(z_slot), p_.linear.epsilon, sums, apply, take);
    // Never true. ptxas moves exponentials past a wait, but not past a branch that waits for them.
    if (__any_sync(kAllLanes, sums[0][0] + sums[0][1] + sums[1][0] + sums[1][1] < 0.0f)) {
      __nanosleep(1);
    }
    wgmma_wait<1>();
    release(k_slot);
    start_softmax<kRunK>(s, tile);
    find_tops<0>(s);
    exponentials<0>(s);
    const bool is_raised = is_raised_;
    wgmma_wait<0>();
    release(v_slot);
    pack_p<0>(s);
    if (is_raised) rescale();
    is_first_ = false;
    const BlockPlace& at = shared_.places[block_];
    const float logits[2] = {load_logit(at, 0), load_logit(at, 1)};
    v_ = v_after;
    v_slot = v_.slot;
    if constexpr (Traits::kTakesTurns) sync_named(warp_index() / 4, kMultiplyThreads);
    start_values<kRunK>();
    if constexpr (Traits::kTakesTurns) arrive_named(3 - warp_index() / 4, kMultiplyThreads);
    make_some<kFirstPart, kHeadDim / 8>(z_of(z_slot), p_.linear.epsilon, sums, apply, take);
    const float den[2] = {quad_sum(sums[0][0] + sums[0][1]), quad_sum(sums[1][0] + sums[1][1])};
    __syncwarp();
    release(z_slot);
    float o_factor[2];
    bool has_linear[2] = {true, true};
    find_factors(at, den, logits, o_factor, [&](const float (&factor)[2], const bool (&has)[2]) {
#pragma unroll
      for (int n = 0; n < kHeadDim / 4; ++n) {
        const float low = __uint_as_float(a[n] << 16);
        const float high = __uint_as_float(a[n] & 0xffff0000u);
        a[n] = pack<bf16>(low * factor[n % 2], high * factor[n % 2]);
      }
      has_linear[0] = has[0];
      has_linear[1] = has[1];
    });
    wgmma_wait<0>();
    release(v_slot);
#pragma unroll
    for (int n = 0; n < kHeadDim / 2; ++n) o_[n] *= o_factor[n / 2 % 2];
    // A copy alone would make the products wait (C7513).
#pragma unroll
    for (int n = 0; n < kHeadDim / 4; ++n) p_frag_[n] = has_linear[n % 2] ? a[n] : 0u;
  }
  __device__ bool is_softmax() const { return p_.linear.feature_map == FeatureMap::kSoftmax; }
  __device__ const float* z_of(int slot) const {
    return reinterpret_cast<const float*>(shared_.slots[slot]) + lane_ % 4 * 2;
  }
  /// How a row of o is made of both branches, a o_s + c o_l.
  struct Shares {
    float a_to_c, inverse_c;  // a / c, 1 / c
  };
  __device__ __forceinline__ float load_logit(const BlockPlace& at, int half) const {
    if (p_.linear.combine != Combine::kBlend || row_of(half) >= at.rows) return 0.0f;
    return *p_.linear.alpha_logit.at(at.b, at.h, at.begin + row_of(half));
  }
  __device__ __forceinline__ Shares shares_of(float logit) const {
    const bool is_blend = p_.linear.combine == Combine::kBlend;
    const float a_to_c = exp2_approx(kLog2E * logit);
    return {is_blend ? a_to_c : (p_.linear.combine == Combine::kLinear ? 0.0f : 1.0f),
            is_blend ? 1.0f + a_to_c : 1.0f};
  }
  /// phi(q), two columns for each word of q_, and phi(q) . Z_i of the lane's rows, with epsilon.
  __device__ __forceinline__ void make_phi(float (&phi)[kHeadDim / 2], const float* z,
                                           float (&den)[2]) const {
    const auto take = [&](int n, float low, float high) {
      phi[n * 2] = low;
      phi[n * 2 + 1] = high;
    };
    if (is_softmax()) {
      make_softmax(z, den, take);
      return;
    }
    const bool is_elu = p_.linear.feature_map == FeatureMap::kElu1;
    const bool is_relu = p_.linear.feature_map == FeatureMap::kRelu;
    const auto apply = [&](float x) {
      const float e = exp2_approx(fminf(x * kLog2E, 127.0f));
      if (is_elu) return x <= 0.0f ? e : x + 1.0f;
      return is_relu && x <= 0.0f ? 0.0f : x;
    };
    make_all(z, 0.0f, den, [&](float x, int) { return apply(x); }, take);
    den[0] += p_.linear.epsilon;
    den[1] += p_.linear.epsilon;
  }
  /// The softmax is not divided by its sum: what it is divided by in the end has that factor too.
  template <class Take>
  __device__ __forceinline__ void make_softmax(const float* z, float (&den)[2],
                                               const Take& take) const {
    float shift[2];
    find_shifts(shift);
    make_all(
        z, p_.linear.epsilon, den, [&](float x, int half) { return exponential(x, shift[half]); },
        take);
  }
  __device__ __forceinline__ static float exponential(float x, float shift) {
    return exp2_approx(fmaf(x, kLog2E, shift));
  }
  /// All elements of q go through `apply` to `take`, and their sums with z + epsilon to `den`.
  template <class Apply, class Take>
  __device__ __forceinline__ void make_all(const float* z, float epsilon, float (&den)[2],
                                           const Apply& apply, const Take& take) const {
    float sums[2][2] = {};
    make_some<0, kHeadDim / 8>(z, epsilon, sums, apply, take);
#pragma unroll
    for (int half = 0; half < 2; ++half) den[half] = quad_sum(sums[half][0] + sums[half][1]);
    __syncwarp();  // all have read z
  }
  template <int kFirst, int kEnd, class Apply, class Take>
  __device__ __forceinline__ void make_some(const float* z, float epsilon, float (&sums)[2][2],
                                            const Apply& apply, const Take& take) const {
#pragma unroll
    for (int n = kFirst; n < kEnd; ++n) {
      float2 of_pair = *reinterpret_cast<const float2*>(z + n * 8);
      of_pair = {of_pair.x + epsilon, of_pair.y + epsilon};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 q = to_floats(q_[n * 2 + half]);
        const float low = apply(q.x, half), high = apply(q.y, half);
        sums[half][0] = fmaf(low, of_pair.x, sums[half][0]);
        sums[half][1] = fmaf(high, of_pair.y, sums[half][1]);
        take(n * 2 + half, low, high);
      }
    }
  }
  /// Both elements of a word: of bf16 the bits are those of the upper half of a float.
  __device__ __forceinline__ static float2 to_floats(uint32_t pair) {
    if constexpr (std::is_same_v<T, bf16>) {
      return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
    } else {
      const auto elements = std::bit_cast<Pair>(pair);
      return {to_float(elements.low), to_float(elements.high)};
    }
  }
  /// The larger ones of two times two elements; of a number and NaN the number.
  __device__ __forceinline__ static uint32_t max_pairs(uint32_t a, uint32_t b) {
    using Two = std::conditional_t<std::is_same_v<T, bf16>, __nv_bfloat162, __half2>;
    const Two tops = __hmax2(*reinterpret_cast<Two*>(&a), *reinterpret_cast<Two*>(&b));
    return *reinterpret_cast<const uint32_t*>(&tops);
  }
  /// -log2(e) times the largest query of each of the lane's rows. Maxima of T are exact.
  __device__ __forceinline__ void find_shifts(float (&shift)[2]) const {
    uint32_t tops[4] = {q_[0], q_[1], q_[2], q_[3]};
#pragma unroll
    for (int n = 4; n < kHeadDim / 4; ++n) tops[n % 4] = max_pairs(tops[n % 4], q_[n]);
    const uint32_t first = max_pairs(tops[0], tops[2]), second = max_pairs(tops[1], tops[3]);
    // Both rows in one word.
    uint32_t top =
        max_pairs(__byte_perm(first, second, 0x5410), __byte_perm(first, second, 0x7632));
    top = max_pairs(top, __shfl_xor_sync(kAllLanes, top, 1));
    top = max_pairs(top, __shfl_xor_sync(kAllLanes, top, 2));
    const float2 both = to_floats(top);
    shift[0] = -kLog2E * both.x;
    shift[1] = -kLog2E * both.y;
  }
  /// What P v and, later, o are to be multiplied by; stores lse. Where o times what phi is to be
  /// divided by might leave the range of floats, or there is nothing to divide by, divide_phi is
  /// told to do it at once, or to make phi 0, even where it is not finite.
  template <class DividePhi>
  __device__ __forceinline__ void find_factors(const BlockPlace& at, const float (&den)[2],
                                               const float (&logits)[2], float (&o_factor)[2],
                                               const DividePhi& divide_phi) {
    Shares shares[2];
    bool is_usual = true;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      shares[half] = shares_of(logits[half]);
      const float divisor = den[half] * shares[half].inverse_c;
      is_usual = is_usual && divisor >= 0x1p-32f && divisor <= 0x1p32f;
      o_factor[half] = shares[half].a_to_c * den[half];
      inverse_[half] = __fdividef(1.0f, divisor);
    }
    if (!__all_sync(kAllLanes, is_usual)) {
      float factor[2];
      bool has_linear[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float inverse = 1.0f / den[half];
        has_linear[half] = den[half] > 0.0f && den[half] <= FLT_MAX && inverse <= FLT_MAX;
        factor[half] = inverse / shares[half].inverse_c;
        o_factor[half] = p_.linear.combine == Combine::kLinear ? 0.0f : 1.0f;
        if (p_.linear.combine == Combine::kBlend && has_linear[half]) {
          o_factor[half] = 1.0f / (1.0f + 1.0f / shares[half].a_to_c);
        }
        inverse_[half] = 1.0f;
      }
      divide_phi(factor, has_linear);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      o_factor[half] *= finish_row(block_, at, half, row_max_[half], row_sum_[half]);
    }
  }
  /// Divides by what linear_step() left and adds the bias.
  __device__ __forceinline__ void finish_combined() {
    if (p_.linear.bias != nullptr) {
      const float* const bias = p_.linear.bias + lane_ % 4 * 2;
#pragma unroll
      for (int n = 0; n < kHeadDim / 2; ++n) {
        o_[n] = fmaf(o_[n], inverse_[n / 2 % 2], bias[n / 4 * 8 + n % 2]);
      }
    } else {
#pragma unroll
      for (int n = 0; n < kHeadDim / 2; ++n) o_[n] *= inverse_[n / 2 % 2];
    }
  }
  __device__ __forceinline__ int32_t block_before() const {
    return block_ == 0 ? Traits::kPlaces - 1 : block_ - 1;
  }
  __device__ __forceinline__ void store_combined(int32_t block) {
    const BlockPlace at = shared_.places[block];
    store_row(at, 0, 1.0f);
    store_row(at, 1, 1.0f);
  }

  /// The warp's 16 rows of the queries as A fragments.
  __device__ __forceinline__ void load_queries(int32_t block) {
    wait(shared_.q_full, q_parity_);
    q_parity_ ^= 1;
    read_queries();
    release_queries();
    if (p_.k_mean != nullptr) find_lse_shift(block);
  }
  /// The same, but the queries stay in shared memory until release_queries().
  __device__ __forceinline__ void wait_for_queries(int32_t block) {
    wait(shared_.q_full, q_parity_);
    q_parity_ ^= 1;
    if (p_.k_mean == nullptr) return;
    read_queries();
    find_lse_shift(block);
  }
  __device__ __forceinline__ void read_queries() {
    const int row = warp_row_ + lane_ % 16;
    const SharedAddress first = shared_address(shared_.q) + row * 128;
#pragma unroll
    for (int d = 0; d < kHeadDim / 16; ++d) {
      const int chunk = (d % 4 * 2 + lane_ / 16) ^ (row % 8);
      uint32_t a[4];
      ldmatrix_x4(a, first + d / 4 * Traits::kSliceBytesQ + chunk * 16);
#pragma unroll
      for (int n = 0; n < 4; ++n) q_[d * 4 + n] = a[n];
    }
  }
  __device__ __forceinline__ void release_queries() {
    __syncwarp();
    if (lane_ == 0) arrive(shared_.q_empty);
  }
  struct Pair {
    T low, high;
  };
  /// scale q_r . k_mean of the block's sequence: what lse loses where keys are smoothed. A quad's
  /// first lane keeps it for finish().
  __device__ __forceinline__ void find_lse_shift(int32_t block) {
    const float* const mean =
        p_.k_mean + int64_t{shared_.places[block].mean} * kHeadDim + lane_ % 4 * 2;
    float2 of_pairs[kHeadDim / 8];
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
      of_pairs[n] = *reinterpret_cast<const float2*>(mean + n * 8);
    }
    float sum[2] = {0.0f, 0.0f};
#pragma unroll
    for (int n = 0; n < kHeadDim / 4; ++n) {
      const float2 q = to_floats(q_[n]), of_pair = of_pairs[n / 2];
      sum[n % 2] = fmaf(q.x, of_pair.x, fmaf(q.y, of_pair.y, sum[n % 2]));
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float dot = quad_sum(sum[half]);
      if (lane_ % 4 == 0) shared_.lse_shift[block % 3][row_of(half)] = p_.scale * dot;
    }
  }
  __device__ int row_of(int half) const { return warp_row_ + half * 8 + lane_ / 4; }

  /// Starts S = q k^T of the tile whose keys lie in k_.
  template <int kKeys>
  __device__ __forceinline__ void start_scores(float (&s)[kKeys / 2]) {
    const uint32_t b = matrix_descriptor(shared_address(shared_.slots[k_.slot]), 0);
    wgmma_fence();
    wgmma<T, kKeys, false>(s, q_, b, 0);
#pragma unroll
    for (int d = 1; d < kHeadDim / 16; ++d) {
      wgmma<T, kKeys, false>(s, q_ + d * 4, b + ((d / 4 * Traits::kSliceBytesK + d % 4 * 32) >> 4),
                             1);
    }
    wgmma_commit();
  }

  /// Starts o += P v of the tile before, once its values are there.
  /// With kIsLinear o += A H_i, bf16 whatever T is.
  template <int kKeys, bool kIsLinear = false>
  __device__ __forceinline__ void start_values() {
    using Operand = std::conditional_t<kIsLinear, bf16, T>;
    wait(shared_.full[v_.slot], v_.parity);
    const uint32_t b =
        matrix_descriptor(shared_address(shared_.slots[v_.slot]), Traits::kSliceBytesK);
    wgmma_fence();
#pragma unroll
    for (int n = 0; n < kKeys / 16; ++n) {
      wgmma<Operand, kHeadDim, true>(o_, p_frag_ + n * 4, b + (n * 16 * 128 >> 4),
                                     n == 0 ? !is_first_ : 1);
    }
    wgmma_commit();
  }

  /// Online softmax, a run of keys at a time: S becomes P. A row keeps an older maximum as long as
  /// P stays below 2^kLazyLog2: most runs then rescale nothing, and no maximum has to be agreed
  /// upon by the four lanes of a row. That of the second run is found while the first one waits for
  /// its exponentials.
  template <int kKeys>
  __device__ __forceinline__ void softmax(float (&s)[kKeys / 2], const TileInfo& tile) {
    start_softmax<kKeys>(s, tile);
    find_tops<0>(s);
    exponentials<0>(s);
    if constexpr (kKeys > kRunK) {
      find_tops<1>(s);
      exponentials<1>(s);
    }
  }
  template <int kKeys>
  __device__ __forceinline__ void start_softmax(float (&s)[kKeys / 2], const TileInfo& tile) {
    if (tile.num_keys != (kKeys > kRunK ? TileInfo::kFull : kRunK)) mask_keys<kKeys>(s, tile);
    is_raised_ = false;
  }
  template <int kRun, int kSize>
  __device__ __forceinline__ void find_tops(float (&s)[kSize]) {
    float top[2];
    find_lane_tops<kRun>(s, top);
    follow_tops<kRun>(top, kLazyLog2, s);
  }
  /// The largest scores of a run in this lane's columns, log2 units.
  template <int kRun, int kSize>
  __device__ __forceinline__ void find_lane_tops(const float (&s)[kSize], float (&top)[2]) const {
    constexpr int kFirst = kRun * kRunK / 2;
    float tops[4] = {s[kFirst], s[kFirst + 1], s[kFirst + 2], s[kFirst + 3]};
#pragma unroll
    for (int n = 4; n < kRunK / 2; ++n) tops[n % 4] = fmaxf(tops[n % 4], s[kFirst + n]);
    top[0] = fmaxf(tops[0], tops[1]) * p_.scale_log2;
    top[1] = fmaxf(tops[2], tops[3]) * p_.scale_log2;
  }
  /// The same where no maximum of the warp's rows lies below 0, and all limits lie above it: of
  /// numbers below 0 this may take the wrong one, and they are below all that they are compared
  /// with. As integers three numbers are compared by one instruction.
  template <int kRun, int kSize>
  __device__ __forceinline__ void find_positive_tops(const float (&s)[kSize],
                                                     float (&top)[2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const auto at = [&](int n) { return s[kRun * kRunK / 2 + n / 2 * 4 + half * 2 + n % 2]; };
      float tops[2] = {at(0), at(1)};
#pragma unroll
      for (int n = 2; n < kRunK / 4; n += 2) {
        largest_as_integer(tops[n / 2 % 2], at(n), at(n + 1));
      }
      largest_as_integer(tops[0], tops[1], tops[1]);
      top[half] = tops[0] * p_.scale_log2;
    }
  }
  /// Raises the maxima of the rows where a run's scores are too high for them.
  template <int kRun, int kSize>
  __device__ __forceinline__ void follow_tops(const float (&top)[2], float lazy_log2,
                                              float (&s)[kSize]) {
    constexpr int kFirst = kRun * kRunK / 2;
    const bool is_high = top[0] > row_max_[0] + lazy_log2 || top[1] > row_max_[1] + lazy_log2;
    if (__any_sync(kAllLanes, is_high)) {
      raise(top);
#pragma unroll
      for (int n = 0; n < kFirst; ++n) s[n] *= last_factor_[n / 2 % 2];
    }
  }
  /// S of a run becomes P.
  template <int kRun, int kSize>
  __device__ __forceinline__ void exponentials(float (&s)[kSize]) {
    constexpr int kFirst = kRun * kRunK / 2;
    float sums[2] = {0.0f, 0.0f};
    // -inf - -inf is NaN: a row without keys so far is shifted by nothing.
    const float offsets[2] = {row_max_[0] == -INFINITY ? 0.0f : -row_max_[0],
                              row_max_[1] == -INFINITY ? 0.0f : -row_max_[1]};
#pragma unroll
    for (int n = kFirst; n < kFirst + kRunK / 2; ++n) {
      s[n] = exp2_approx(fmaf(s[n], p_.scale_log2, offsets[n / 2 % 2]));
      sums[n / 2 % 2] += s[n];
    }
    row_sum_[0] += sums[0];
    row_sum_[1] += sums[1];
  }
  /// Raises the maxima of the warp's rows to what a run has, `top` of this lane's columns.
  __device__ __forceinline__ void raise(const float (&top)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float raised = fmaxf(row_max_[half], quad_max(top[half]));
      const float factor = raised == -INFINITY ? 1.0f : exp2_approx(row_max_[half] - raised);
      last_factor_[half] = factor;
      factor_[half] = is_raised_ ? factor_[half] * factor : factor;
      row_max_[half] = raised;
      row_sum_[half] *= factor;
    }
    is_raised_ = true;
  }
  /// Columns past the last key of a run: S = -inf.
  template <int kKeys>
  __device__ __forceinline__ void mask_keys(float (&s)[kKeys / 2], const TileInfo& tile) {
    const auto first = static_cast<int>(tile.num_keys % 256);
    const auto second = static_cast<int>(tile.num_keys / 256);
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int column = n % 8 * 8 + lane_ % 4 * 2 + e % 2;
        if (column >= (n < 8 ? first : second)) s[n * 4 + e] = -INFINITY;
      }
    }
  }
  __device__ __forceinline__ void rescale() {
#pragma unroll
    for (int n = 0; n < kHeadDim / 2; ++n) o_[n] *= factor_[n / 2 % 2];
  }
  /// P as A fragments.
  template <int kRun, int kSize>
  __device__ __forceinline__ void pack_p(const float (&s)[kSize]) {
#pragma unroll
    for (int n = kRun * kRunK / 4; n < (kRun + 1) * kRunK / 4; ++n) {
      p_frag_[n] = pack<T>(s[n * 2], s[n * 2 + 1]);
    }
  }

  /// Divides by the row sums and stores o and lse of a query block.
  __device__ __forceinline__ void finish(int32_t block, const float (&row_max)[2],
                                         const float (&row_sum)[2]) {
    const BlockPlace at = shared_.places[block];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float inverse = finish_row(block, at, half, row_max[half], row_sum[half]);
      store_row(at, half, inverse);
    }
  }
  /// Stores lse of a row; 1 / l of it, 0 where l is.
  __device__ __forceinline__ float finish_row(int32_t block, const BlockPlace& at, int half,
                                              float row_max, float row_sum) {
    const int r = row_of(half);
    const float sum = quad_sum(row_sum);
    if (r < at.rows && lane_ % 4 == 0) {
      float lse = sum == 0.0f ? -INFINITY : (row_max + __log2f(sum)) * kLn2;
      if (p_.k_mean != nullptr) lse -= shared_.lse_shift[block % 3][r];
      p_.lse.data[at.b * p_.lse.stride_b + at.h * p_.lse.stride_h + at.begin + r] = lse;
    }
    return sum == 0.0f ? 0.0f : __fdividef(1.0f, sum);
  }
  /// Stores a row of o times `factor`.
  __device__ __forceinline__ void store_row(const BlockPlace& at, int half, float factor) {
    const int r = row_of(half);
    const bool is_row = r < at.rows;
    T* const row = p_.o.head<T>(at.b, at.h) + lane_ % 4 * 8 + (at.begin + r) * p_.o.stride_n;
    {
#pragma unroll
      for (int d = 0; d < kHeadDim; d += 32) {
        // Four lanes hold 32 columns of a row, two of every eight; each shall have eight in a row.
        uint32_t w[4];
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const float* const o = o_ + d / 2 + n * 4 + half * 2;
          w[n] = pack<T>(o[0] * factor, o[1] * factor);
        }
        exchange<1>(w[0], w[1]);
        exchange<1>(w[2], w[3]);
        exchange<2>(w[0], w[2]);
        exchange<2>(w[1], w[3]);
        if (is_row) *reinterpret_cast<uint4*>(row + d) = make_uint4(w[0], w[1], w[2], w[3]);
      }
    }
  }
  /// Transposes 2 x 2 words of lanes whose numbers differ by kStep.
  template <int kStep>
  __device__ __forceinline__ void exchange(uint32_t& low, uint32_t& high) const {
    const bool is_upper = lane_ & kStep;
    const uint32_t other = __shfl_xor_sync(kAllLanes, is_upper ? low : high, kStep);
    low = is_upper ? other : low;
    high = is_upper ? high : other;
  }

  const SparseForward& p_;
  SparseForwardSm90Shared<Traits>& shared_;
  const int lane_, warp_row_;
  RingCursor<Traits::kSlots> ring_, k_, v_;  // the next slot; those of the step's keys and values
  uint32_t q_parity_ = 0;
  int32_t block_ = 0;

  float o_[kHeadDim / 2];             // o_s times l
  uint32_t p_frag_[kTileK / 4];       // P
  uint32_t q_[kHeadDim / 4];          // q
  float row_max_[2], row_sum_[2];     // m, log2 units; l of this lane's columns
  float factor_[2], last_factor_[2];  // what raise() multiplies by, in this tile and at last
  float inverse_[2];                  // what o of a linear tile is yet to be multiplied by
  bool is_raised_ = false;
  bool is_first_ = true;  // whether nothing is in o yet
};

}  // namespace sparline::cuda
