// SPDX-License-Identifier: Apache-2.0
//
// What the scores of one query block make of the key blocks: the best become 1, the worst -1, the
// rest 0.
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

/// Classes of the key blocks of query block i of a head, from its scores. All threads of the group
/// call it.
template <bool kIsOneWarp, bool kIsHeld>
__device__ __forceinline__ void classify_row(const ClassifyParams& p, RowGroup<kIsOneWarp>& group,
                                             int32_t b, int32_t h, int32_t i, const float* scores) {
  const Axis& queries = p.frame.queries;
  const Axis& keys = p.frame.keys;
  const int64_t row = (int64_t{b} * p.frame.num_heads + h) * queries.num_blocks + i;
  const int64_t kv_pair = int64_t{b} * p.frame.num_kv_heads + h / p.frame.group();
  const BlockInfo query = queries.block(i);
  int8_t* const out = static_cast<int8_t*>(const_cast<void*>(p.block_class.data)) +
                      p.block_class.offset(b, h, i, 0);
  const int64_t stride = p.block_class.stride_j;

  // Blocks of other sequences.
  const int lane = group.warp() * kWarpSize + lane_index();
  const int num_lanes = group.num_warps() * kWarpSize;
  for (int32_t j = lane; j < query.other_begin; j += num_lanes) out[j * stride] = -1;
  for (int32_t j = query.other_end + lane; j < keys.num_blocks; j += num_lanes) {
    out[j * stride] = -1;
  }
  if (query.is_protected || (p.is_alike_q != nullptr && !p.is_alike_q[row])) {
    for (int32_t j = query.other_begin + lane; j < query.other_end; j += num_lanes) {
      out[j * stride] = 1;
    }
    return;
  }

  const uint8_t* const is_alike =
      p.is_alike_k == nullptr ? nullptr : p.is_alike_k + kv_pair * keys.num_blocks;
  const auto key_of = [&](int32_t j) {
    const bool is_protected = keys.table != nullptr && keys.table[j].is_protected;
    const bool is_ranked = !is_protected && (is_alike == nullptr || is_alike[j]);
    return is_ranked ? rank_key(scores[j]) : kNoKey;
  };
  using RowRanking = Ranking<kIsOneWarp, kIsHeld>;
  const RowRanking ranking(group, query.other_begin, query.other_end, key_of);

  Cut cuts[2];  // where the critical blocks end, and the marginal ones
  if (ranking.num > 0) {
    auto num_free = static_cast<uint32_t>(query.other_end - query.other_begin);
    if (keys.table != nullptr) {
      num_free = 0;
      for (int32_t j = query.other_begin + lane; j < query.other_end; j += num_lanes) {
        num_free += keys.table[j].is_protected ? 0 : 1;
      }
      num_free = group.sums(num_free, 0).x;
    }
    const RouteRule& rule = p.rule;
    const int64_t num = ranking.num;
    int64_t num_critical =
        rule.critical_count > 0
            ? rule.critical_count
            : rounded_count(rule.critical_ratio, static_cast<int32_t>(num_free), rule.rounding);
    num_critical = min(max(num_critical, int64_t{1}), num);
    if (rule.selection != Selection::kTopK) {
      int64_t num_of_mass = num;  // and not what float32 leaves of the tail
      if (rule.critical_mass < 1.0) {
        num_of_mass = count_of_mass<kIsHeld>(ranking, key_of, rule.critical_mass,
                                             rule.is_longest_prefix, p.scale);
      }
      if (rule.selection == Selection::kTopP) num_critical = num_of_mass;
      if (rule.selection == Selection::kUnion) num_critical = max(num_critical, num_of_mass);
      if (rule.selection == Selection::kIntersection) num_critical = min(num_critical, num_of_mass);
    }
    const int64_t num_negligible =
        min(num - num_critical,
            rounded_count(rule.negligible_ratio, static_cast<int32_t>(num_free), rule.rounding));
    const uint32_t wanted[2] = {static_cast<uint32_t>(num_critical),
                                static_cast<uint32_t>(num - num_negligible)};
    find_cuts(ranking, key_of, wanted, cuts);
  }
  ranking.for_each(key_of, [&](uint32_t key, int32_t j, int) {
    if (j >= query.other_end) return;
    const bool is_critical = key == kNoKey || cuts[0].has(key, j);
    out[j * stride] = is_critical ? 1 : cuts[1].has(key, j) ? 0 : -1;
  });
}

}  // namespace sparline::cuda
