// SPDX-License-Identifier: Apache-2.0
//
// Block classification (SLA Eq. 2-3): pooled scores Zc = scale pool(q) pool(k)^T in float32, then
// per query block the best n_h key blocks of its sequence become 1, the worst n_l become -1, the
// rest 0, in the total order (score descending, index ascending; NaN last).

#include "cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/route.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "core/workspace.h"
#include "cpu/kernels.h"
#include "cpu/layout.h"
#include "cpu/tile-inl.h"

#ifndef SPARLINE_CPU_ROUTE_SPACE_
#define SPARLINE_CPU_ROUTE_SPACE_
namespace sparline::cpu {

constexpr int64_t kRouteRows = 16;  // query blocks scored together

/// Everything the router keeps in its workspace.
struct RouteSpace {
  float* pooled_q;    // (B H, T_m, ld)
  float* pooled_k;    // (B H_kv, T_n, ld)
  float* pooled_k_t;  // (B H_kv, D, ld_keys)
  float* scores;      // per worker (kRouteRows, ld_keys)
  int32_t* order;     // per worker (T_n)
  int64_t ld, ld_keys, total_bytes;

  RouteSpace(const Plan& plan, std::byte* base) {
    const Problem& p = plan.problem;
    const int64_t num_query_blocks = static_cast<int64_t>(plan.query_blocks.size());
    const int64_t num_key_blocks = static_cast<int64_t>(plan.key_blocks.size());
    ld = leading_dim(p.head_dim);
    ld_keys = leading_dim(num_key_blocks);
    Arena arena(base);
    pooled_q = arena.take<float>(p.batch * p.num_heads * num_query_blocks * ld);
    pooled_k = arena.take<float>(p.batch * p.num_kv_heads * num_key_blocks * ld);
    pooled_k_t = arena.take<float>(p.batch * p.num_kv_heads * p.head_dim * ld_keys);
    scores = arena.take<float>(plan.target.num_threads * kRouteRows * ld_keys);
    order = arena.take<int32_t>(plan.target.num_threads * num_key_blocks);
    total_bytes = arena.used_bytes();
  }
};

/// How many of `num_blocks` a ratio stands for; the product is taken in double.
inline int64_t rounded_count(double ratio, int64_t num_blocks, CountRounding rounding) {
  const double count = ratio * static_cast<double>(num_blocks);
  switch (rounding) {
    case CountRounding::kFloor: return static_cast<int64_t>(std::floor(count));
    case CountRounding::kRound: return static_cast<int64_t>(std::round(count));
    case CountRounding::kCeil: return static_cast<int64_t>(std::ceil(count));
  }
  return 0;
}

/// Classifies the key blocks of one query block from their scores.
inline void classify(const RouteRule& rule, const std::vector<Block>& key_blocks, BlockRange keys,
                     const float* scores, int32_t* order, int8_t* out, int64_t out_stride) {
  for (int64_t j = 0; j < static_cast<int64_t>(key_blocks.size()); ++j) out[j * out_stride] = -1;
  int64_t num = 0;
  for (int64_t j = keys.begin; j < keys.end; ++j) {
    out[j * out_stride] = key_blocks[j].is_protected ? 1 : 0;
    if (!key_blocks[j].is_protected) order[num++] = static_cast<int32_t>(j);
  }
  if (num == 0) return;
  const int64_t num_critical =
      std::clamp<int64_t>(rounded_count(rule.critical_ratio, num, rule.rounding), 1, num);
  const int64_t num_negligible =
      std::min(num - num_critical, rounded_count(rule.negligible_ratio, num, rule.rounding));
  const auto ranks_before = [scores](int32_t x, int32_t y) {
    const float score_x = scores[x], score_y = scores[y];
    if (score_x > score_y) return true;
    if (score_x < score_y) return false;
    const bool nan_x = std::isnan(score_x), nan_y = std::isnan(score_y);
    return nan_x == nan_y ? x < y : nan_y;
  };
  int32_t* const end = order + num;
  int32_t* const marginal = order + num_critical;
  int32_t* const negligible = end - num_negligible;
  if (marginal < end) std::nth_element(order, marginal, end, ranks_before);
  if (negligible < end && negligible > marginal)
    std::nth_element(marginal, negligible, end, ranks_before);
  for (int32_t* at = order; at < marginal; ++at) out[*at * out_stride] = 1;
  for (int32_t* at = negligible; at < end; ++at) out[*at * out_stride] = -1;
}

}  // namespace sparline::cpu
#endif  // SPARLINE_CPU_ROUTE_SPACE_

HWY_BEFORE_NAMESPACE();
namespace sparline::cpu::HWY_NAMESPACE {
namespace {

/// out = mean of the block's rows.
void pool(const TensorView& x, int64_t b, int64_t h, const Block& block, float* out) {
  HWY_ALIGN float row[256 + kPadFloats];
  const int64_t num = x.shape[3];
  std::fill(out, out + pad(num), 0.0f);
  for (int64_t r = 0; r < block.rows; ++r) {
    load_rows(x, b, h, block.begin + r, 1, 1.0f, row, pad(num));
    add_scaled(num, 1.0f, row, out);
  }
  scale_row(num, 1.0f / static_cast<float>(block.rows), out);
}

/// Subtracts from each pooled key the mean over all rows of its sequence.
void smooth(const std::vector<Block>& key_blocks, int64_t head_dim, float* pooled_k, int64_t ld) {
  HWY_ALIGN float mean[256 + kPadFloats];
  for (size_t begin = 0; begin < key_blocks.size();) {
    const BlockRange range = blocks_of_sequence(key_blocks, key_blocks[begin].sequence);
    int64_t num_rows = 0;
    for (int64_t j = range.begin; j < range.end; ++j) num_rows += key_blocks[j].rows;
    std::fill(mean, mean + pad(head_dim), 0.0f);
    for (int64_t j = range.begin; j < range.end; ++j) {
      add_scaled(head_dim, static_cast<float>(key_blocks[j].rows) / static_cast<float>(num_rows),
                 pooled_k + j * ld, mean);
    }
    for (int64_t j = range.begin; j < range.end; ++j)
      add_scaled(head_dim, -1.0f, mean, pooled_k + j * ld);
    begin = static_cast<size_t>(range.end);
  }
}

}  // namespace

void Route(const Plan& plan, const RouteArgs& args, std::byte* workspace, const Stream& stream) {
  const Problem& p = plan.problem;
  const RouteSpace space(plan, workspace);
  const int64_t ld = space.ld, ld_keys = space.ld_keys;
  const int64_t num_query_blocks = static_cast<int64_t>(plan.query_blocks.size());
  const int64_t num_key_blocks = static_cast<int64_t>(plan.key_blocks.size());
  const int64_t num_kv_pairs = p.batch * p.num_kv_heads, num_pairs = p.batch * p.num_heads;

  run_tasks(plan, stream, num_kv_pairs * num_key_blocks, [&](int64_t task, int64_t) {
    const int64_t pair = task / num_key_blocks, j = task % num_key_blocks;
    pool(args.k, pair / p.num_kv_heads, pair % p.num_kv_heads, plan.key_blocks[j],
         space.pooled_k + task * ld);
  });
  run_tasks(plan, stream, num_pairs * num_query_blocks, [&](int64_t task, int64_t) {
    const int64_t pair = task / num_query_blocks, i = task % num_query_blocks;
    pool(args.q, pair / p.num_heads, pair % p.num_heads, plan.query_blocks[i],
         space.pooled_q + task * ld);
  });
  run_tasks(plan, stream, num_kv_pairs, [&](int64_t pair, int64_t) {
    float* const pooled = space.pooled_k + pair * num_key_blocks * ld;
    if (args.rule.smooth_k) smooth(plan.key_blocks, p.head_dim, pooled, ld);
    // Unscaled: softmax_scale changes no order, but its rounding would break ties.
    transpose(pooled, ld, num_key_blocks, p.head_dim, 1.0f,
              space.pooled_k_t + pair * p.head_dim * ld_keys, ld_keys);
  });

  const int64_t num_chunks = (num_query_blocks + kRouteRows - 1) / kRouteRows;
  run_tasks(plan, stream, num_pairs * num_chunks, [&](int64_t task, int64_t worker) {
    const int64_t pair = task / num_chunks, first = task % num_chunks * kRouteRows;
    const int64_t rows = std::min(kRouteRows, num_query_blocks - first);
    const int64_t b = pair / p.num_heads, h = pair % p.num_heads;
    const int64_t kv_pair = b * p.num_kv_heads + h / (p.num_heads / p.num_kv_heads);
    float* const scores = space.scores + worker * kRouteRows * ld_keys;
    gemm<Into::kOverwrite>(rows, pad(num_key_blocks), p.head_dim,
                           rows_of(space.pooled_q + (pair * num_query_blocks + first) * ld, ld),
                           space.pooled_k_t + kv_pair * p.head_dim * ld_keys, ld_keys, scores,
                           ld_keys);
    for (int64_t r = 0; r < rows; ++r) {
      const Block& block = plan.query_blocks[first + r];
      const BlockRange keys = blocks_of_sequence(plan.key_blocks, block.sequence);
      int8_t* const out = args.block_class.row<int8_t>(b, h, first + r);
      classify(args.rule, plan.key_blocks, keys, scores + r * ld_keys,
               space.order + worker * num_key_blocks, out, args.block_class.stride[3]);
      if (!block.is_protected) continue;
      for (int64_t j = keys.begin; j < keys.end; ++j) out[j * args.block_class.stride[3]] = 1;
    }
  });
}

}  // namespace sparline::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace sparline::cpu {

HWY_EXPORT(Route);

int64_t route_workspace_bytes(const Plan& plan) { return RouteSpace(plan, nullptr).total_bytes; }

void route(const Plan& plan, const RouteArgs& args, std::byte* workspace, const Stream& stream) {
  HWY_DYNAMIC_DISPATCH(Route)(plan, args, workspace, stream);
}

}  // namespace sparline::cpu
#endif
