// SPDX-License-Identifier: Apache-2.0
//
// The classes of the key blocks of one query block, from its scores.
#pragma once

#include "cuda/common/select.cuh"
#include "cuda/kernels.h"

namespace sparline::cuda {

struct ClassifyParams {
  Frame frame;
  RouteRule rule;
  float scale = 1.0f;
  const uint8_t* is_alike_q = nullptr;  // (B, H, T_m); null: all are
  const uint8_t* is_alike_k = nullptr;  // (B, H_kv, T_n)
  PairMap block_class;
};

/// How many of `num_blocks` a ratio stands for, as on the CPU: the product is taken in double.
__device__ __forceinline__ int64_t rounded_count(double ratio, int32_t num_blocks,
                                                 CountRounding rounding) {
  const double count = ratio * static_cast<double>(num_blocks);
  const auto whole = static_cast<int64_t>(count);
  const double rest = count - static_cast<double>(whole);
  if (rounding == CountRounding::kRound) return rest >= 0.5 ? whole + 1 : whole;
  if (rounding == CountRounding::kCeil) return rest > 0.0 ? whole + 1 : whole;
  return whole;
}

/// How many of a row's `num_free` key blocks that are not protected a rule asks for, at most all.
struct RowShares {
  uint32_t critical = 0, negligible = 0;

  __device__ RowShares(const RouteRule& rule, int32_t num_free) {
    critical = at_most(num_free, rule.critical_count > 0
                                     ? rule.critical_count
                                     : rounded_count(rule.critical_ratio, num_free, rule.rounding));
    negligible = at_most(num_free, rounded_count(rule.negligible_ratio, num_free, rule.rounding));
  }

 private:
  __device__ static uint32_t at_most(int32_t num_free, int64_t count) {
    return static_cast<uint32_t>(min(count, int64_t{num_free}));
  }
};

/// Which key blocks of a (b, kv head) have a place in rankings; those that have none are critical.
class RankedBlocks {
 public:
  __device__ RankedBlocks(const ClassifyParams& p, int64_t kv_pair)
      : table_(p.frame.keys.table),
        is_alike_(p.is_alike_k == nullptr ? nullptr
                                          : p.is_alike_k + kv_pair * p.frame.keys.num_blocks) {}

  __device__ __forceinline__ bool has(int32_t j) const {
    const bool is_protected = table_ != nullptr && table_[j].is_protected;
    return !is_protected && (is_alike_ == nullptr || is_alike_[j]);
  }

 private:
  const BlockInfo* const table_;
  const uint8_t* const is_alike_;
};

/// All classes of query block i. `score_at(j)`: the score of key block j of its sequence, kNoScore
/// for what is not ranked. `shares`: those of a row of all key blocks, for keys without a table.
/// `bins`: of one warp that holds its row; else unused. kHasMass: whether a rule with a mass may
/// come.
template <bool kHasMass, bool kIsHeld, int kItems, bool kIsOneWarp, class ScoreAt>
__device__ __forceinline__ void classify(const ClassifyParams& p, RowGroup<kIsOneWarp>& group,
                                         int64_t b, int64_t h, int32_t i, RowShares shares,
                                         WarpBins* bins, const ScoreAt& score_at) {
  const Axis& queries = p.frame.queries;
  const Axis& keys = p.frame.keys;
  const BlockInfo query = queries.block(i);
  int8_t* const out = static_cast<int8_t*>(const_cast<void*>(p.block_class.data)) +
                      p.block_class.offset(b, h, i, 0);
  const int64_t stride = p.block_class.stride_j;

  // Blocks of other sequences.
  const int lane = group.warp() * kWarpSize + lane_index();
  const int num_lanes = group.num_warps() * kWarpSize;
#pragma unroll 1
  for (int32_t j = lane; j < query.other_begin; j += num_lanes) out[j * stride] = -1;
#pragma unroll 1
  for (int32_t j = query.other_end + lane; j < keys.num_blocks; j += num_lanes) {
    out[j * stride] = -1;
  }
  const int64_t row = (b * p.frame.num_heads + h) * queries.num_blocks + i;
  if (query.is_protected || (p.is_alike_q != nullptr && !p.is_alike_q[row])) {
#pragma unroll 1
    for (int32_t j = query.other_begin + lane; j < query.other_end; j += num_lanes) {
      out[j * stride] = 1;
    }
    return;
  }

  if (query.other_begin == query.other_end) return;
  using RowRanking = Ranking<kIsOneWarp, kIsHeld, kItems>;
  const RowRanking ranking(group, query.other_begin, query.other_end,
                           keys.table != nullptr || p.is_alike_k != nullptr, score_at);

  Cut cuts[2];  // where the critical blocks end, and the marginal ones
  if (ranking.num > 0) {
    const RouteRule& rule = p.rule;
    if (keys.table != nullptr) {
      uint32_t num_free = 0;
#pragma unroll 1
      for (int32_t j = query.other_begin + lane; j < query.other_end; j += num_lanes) {
        num_free += keys.table[j].is_protected ? 0 : 1;
      }
      shares = RowShares(rule, static_cast<int32_t>(group.sum(num_free)));
    }
    const uint32_t num = ranking.num;
    uint32_t num_critical = min(max(shares.critical, 1u), num);
    if constexpr (kHasMass) {
      if (rule.selection != Selection::kTopK) {
        uint32_t num_of_mass = num;  // and not what float32 leaves of the tail
        if (rule.critical_mass < 1.0) {
          num_of_mass = count_of_mass<kIsHeld>(ranking, score_at, rule.critical_mass,
                                               rule.is_longest_prefix, p.scale);
        }
        if (rule.selection == Selection::kTopP) num_critical = num_of_mass;
        if (rule.selection == Selection::kUnion) num_critical = max(num_critical, num_of_mass);
        if (rule.selection == Selection::kIntersection) {
          num_critical = min(num_critical, num_of_mass);
        }
      }
    }
    const uint32_t num_negligible = min(num - num_critical, shares.negligible);
    find_cuts(ranking, score_at, num_critical, num - num_negligible, bins, cuts);
  }
  int8_t* at = out + ranking.walk.first() * stride;
  const auto write = [&](const auto& is_critical, const auto& is_marginal) {
    ranking.for_each(score_at, [&](uint32_t key, int32_t j, int) {
      const int value = is_critical(key, j) ? 1 : is_marginal(key, j) ? 0 : -1;
      if (j < query.other_end) *at = static_cast<int8_t>(value);
      at += kWarpSize * stride;
    });
  };
  if (cuts[0].is_tied() || cuts[1].is_tied()) {
    write([&](uint32_t key, int32_t j) { return (key == kNoKey) | cuts[0].has(key, j); },
          [&](uint32_t key, int32_t j) { return cuts[1].has(key, j); });
  } else {
    // Keys from past the cut to the last one that is ranked are not critical.
    const uint32_t first = cuts[0].key + 1, num_past = kNoKey - first;
    write([&](uint32_t key, int32_t) { return key - first >= num_past; },
          [&](uint32_t key, int32_t) { return key <= cuts[1].key; });
  }
}

}  // namespace sparline::cuda
