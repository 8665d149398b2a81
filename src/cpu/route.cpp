// SPDX-License-Identifier: Apache-2.0
//
// Block classification (SLA Eq. 2-3; SpargeAttention2; SpargeAttn): pooled scores in float32, then
// for each query block the best key blocks of its sequence become 1, the worst -1, the rest 0. The
// best are always a prefix of one total order (score descending, index ascending; NaN last), so
// that every selection comes down to a count.

#include "cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/route.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <bit>
#include <limits>
#include <span>

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
  float* pooled_q;      // (B H, T_m, ld)
  float* pooled_k;      // (B H_kv, T_n, ld)
  float* pooled_k_t;    // (B H_kv, D, ld_keys)
  float* projection;    // (H, D, ld), Wq^T Wk
  uint8_t* is_alike_q;  // (B H, T_m), whether the block is ranked by its mean
  uint8_t* is_alike_k;  // (B H_kv, T_n)
  float* matrix;        // per worker (D, ld)
  float* projected;     // per worker (kRouteRows, ld)
  float* scores;        // per worker (kRouteRows, ld_keys)
  uint64_t* ranking;    // per worker (T_n)
  int64_t ld, ld_keys, total_bytes;

  RouteSpace(const Plan& plan, std::byte* base) {
    const Problem& p = plan.problem;
    const int64_t num_query_blocks = static_cast<int64_t>(plan.query_blocks.size());
    const int64_t num_key_blocks = static_cast<int64_t>(plan.key_blocks.size());
    const int64_t num_pairs = p.batch * p.num_heads, num_kv_pairs = p.batch * p.num_kv_heads;
    const int64_t num_workers = plan.target.num_threads;
    ld = leading_dim(p.head_dim);
    ld_keys = leading_dim(num_key_blocks);
    Arena arena(base);
    pooled_q = arena.take<float>(num_pairs * num_query_blocks * ld);
    pooled_k = arena.take<float>(num_kv_pairs * num_key_blocks * ld);
    pooled_k_t = arena.take<float>(num_kv_pairs * p.head_dim * ld_keys);
    projection = arena.take<float>(p.num_heads * p.head_dim * ld);
    is_alike_q = arena.take<uint8_t>(num_pairs * num_query_blocks);
    is_alike_k = arena.take<uint8_t>(num_kv_pairs * num_key_blocks);
    matrix = arena.take<float>(num_workers * p.head_dim * ld);
    projected = arena.take<float>(num_workers * kRouteRows * ld);
    scores = arena.take<float>(num_workers * kRouteRows * ld_keys);
    ranking = arena.take<uint64_t>(num_workers * num_key_blocks);
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

/// One number that sorts as the rule says: the score's bits, turned so that larger scores come
/// first, -0 beside 0 and NaN last, above the index.
inline uint64_t rank_key(float score, int64_t j) {
  const uint32_t bits = std::bit_cast<uint32_t>(score + 0.0f);  // -0 becomes 0
  const bool is_negative = (bits >> 31) != 0;
  const uint32_t descending = std::isnan(score) ? ~0u : is_negative ? bits : ~bits & 0x7fffffffu;
  return uint64_t{descending} << 32 | static_cast<uint64_t>(j);
}
inline int64_t block_of(uint64_t key) { return static_cast<int64_t>(key & 0xffffffffu); }

/// How many of the best blocks hold the critical mass of softmax(scale scores). NaN weighs like
/// -inf, and equal infinities weigh the same. `scores` are indexed by block; `ranking` is sorted.
inline int64_t count_of_mass(const RouteRule& rule, std::span<const uint64_t> ranking,
                             const float* scores, float scale) {
  const int64_t num = static_cast<int64_t>(ranking.size());
  if (rule.critical_mass >= 1.0) return num;  // and not what float32 leaves of the tail
  const auto score_of = [scores](uint64_t key) {
    const float score = scores[block_of(key)];
    return std::isnan(score) ? -std::numeric_limits<float>::infinity() : score;
  };
  const auto weight = [&, best = score_of(ranking[0])](uint64_t key) {
    const float score = score_of(key);
    return score == best ? 1.0 : static_cast<double>(std::exp(scale * (score - best)));
  };
  double total = 0.0;
  for (uint64_t key : ranking) total += weight(key);
  const double wanted = rule.critical_mass * total;
  double mass = 0.0;
  for (int64_t n = 0; n < num; ++n) {
    mass += weight(ranking[n]);
    if (rule.is_longest_prefix && mass > wanted) return std::max<int64_t>(n, 1);
    if (!rule.is_longest_prefix && mass >= wanted) return n + 1;
  }
  return num;
}

/// Classifies the key blocks of one query block from their scores.
inline void classify(const RouteRule& rule, const std::vector<Block>& key_blocks, BlockRange keys,
                     const uint8_t* is_alike, const float* scores, float scale,
                     uint64_t* HWY_RESTRICT ranking, int8_t* out, int64_t out_stride) {
  for (int64_t j = 0; j < static_cast<int64_t>(key_blocks.size()); ++j) out[j * out_stride] = -1;
  int64_t num_free = 0, num = 0;  // blocks that count, and of those the ones that are ranked
  for (int64_t j = keys.begin; j < keys.end; ++j) {
    num_free += !key_blocks[j].is_protected;
    const bool is_ranked = !key_blocks[j].is_protected && is_alike[j];
    out[j * out_stride] = is_ranked ? 0 : 1;
    if (is_ranked) ranking[num++] = rank_key(scores[j], j);
  }
  if (num == 0) return;
  const int64_t wanted = rule.critical_count > 0
                             ? rule.critical_count
                             : rounded_count(rule.critical_ratio, num_free, rule.rounding);
  int64_t num_critical = std::clamp<int64_t>(wanted, 1, num);
  if (rule.selection != Selection::kTopK) {
    std::sort(ranking, ranking + num);
    const std::span<const uint64_t> sorted(ranking, static_cast<size_t>(num));
    const int64_t num_of_mass = count_of_mass(rule, sorted, scores, scale);
    if (rule.selection == Selection::kTopP) num_critical = num_of_mass;
    if (rule.selection == Selection::kUnion) num_critical = std::max(num_critical, num_of_mass);
    if (rule.selection == Selection::kIntersection)
      num_critical = std::min(num_critical, num_of_mass);
  }
  const int64_t num_negligible =
      std::min(num - num_critical, rounded_count(rule.negligible_ratio, num_free, rule.rounding));
  uint64_t* const end = ranking + num;
  uint64_t* const marginal = ranking + num_critical;
  uint64_t* const negligible = end - num_negligible;
  if (rule.selection == Selection::kTopK) {
    if (marginal < end) std::nth_element(ranking, marginal, end);
    if (marginal < negligible && negligible < end) std::nth_element(marginal, negligible, end);
  }
  for (uint64_t* at = ranking; at < marginal; ++at) out[block_of(*at) * out_stride] = 1;
  for (uint64_t* at = negligible; at < end; ++at) out[block_of(*at) * out_stride] = -1;
}

}  // namespace sparline::cpu
#endif  // SPARLINE_CPU_ROUTE_SPACE_

HWY_BEFORE_NAMESPACE();
namespace sparline::cpu::HWY_NAMESPACE {
namespace {

/// A tensor's rows in the order in which its blocks are cut.
struct Rows {
  Rows(const TensorView& tensor, const TensorView& order_view)
      : x(tensor), order(order_view ? order_view.row<const int32_t>(0, 0, 0) : nullptr) {}

  /// Row n of (b, h) as a float32 row.
  void load(int64_t b, int64_t h, int64_t n, float* row) const {
    load_rows(x, b, h, order == nullptr ? n : order[n], 1, 1.0f, row, pad(x.shape[3]));
  }

  const TensorView& x;
  const int32_t* order;
};

/// out = sum of the block's rows.
void sum_rows(const Rows& rows, int64_t b, int64_t h, const Block& block, float* out) {
  HWY_ALIGN float row[256 + kPadFloats];
  const int64_t num = rows.x.shape[3];
  std::fill(out, out + pad(num), 0.0f);
  for (int64_t r = 0; r < block.rows; ++r) {
    rows.load(b, h, block.begin + r, row);
    add_scaled(num, 1.0f, row, out);
  }
}

/// A sum of the block's rows becomes their mean.
void divide_by_rows(int64_t num, const Block& block, float* sum) {
  scale_row(num, 1.0f / static_cast<float>(block.rows), sum);
}

/// row / |row|; a row of zeros stays.
void normalise(int64_t num, float* row) {
  const float square = dot(num, row, row);
  if (square > 1e-30f && square < 1e30f) return scale_row(num, 1.0f / std::sqrt(square), row);
  double exact = 0.0;  // float32 cannot hold the square
  for (int64_t c = 0; c < num; ++c) exact += static_cast<double>(row[c]) * row[c];
  if (exact == 0.0) return;
  for (int64_t c = 0; c < num; ++c) row[c] = static_cast<float>(row[c] / std::sqrt(exact));
}

/// Mean cosine over all pairs of the block's rows, each less `mean`: with unit rows it is
/// |sum of rows|^2 / n^2, and thus never negative.
float similarity(const Rows& rows, int64_t b, int64_t h, const Block& block, const float* mean) {
  HWY_ALIGN float row[256 + kPadFloats];
  HWY_ALIGN float sum[256 + kPadFloats] = {};
  const int64_t num = rows.x.shape[3];
  for (int64_t r = 0; r < block.rows; ++r) {
    rows.load(b, h, block.begin + r, row);
    add_scaled(num, -1.0f, mean, row);
    normalise(num, row);
    add_scaled(num, 1.0f, row, sum);
  }
  scale_row(num, 1.0f / static_cast<float>(block.rows), sum);
  return dot(num, sum, sum);
}

/// out += mean over the rows of some blocks, from their sums: the bits that means_of_sequences()
/// gives the operator.
void mean_of_blocks(const std::vector<Block>& blocks, BlockRange range, int64_t head_dim,
                    const float* sums, int64_t ld, float* out) {
  int64_t num_rows = 0;
  for (int64_t j = range.begin; j < range.end; ++j) {
    num_rows += blocks[j].rows;
    add_scaled(head_dim, 1.0f, sums + j * ld, out);
  }
  scale_row(head_dim, 1.0f / static_cast<float>(num_rows), out);
}

/// projection = Wq^T Wk: with it on the side of the queries, pooled keys need no projection of
/// their own for each query head that reads them.
void fold_projections(const RouteArgs& args, int64_t h, int64_t head_dim, float* matrix,
                      float* projection, int64_t ld) {
  const auto head_of = [h](const TensorView& w) { return w.shape[1] == 1 ? 0 : h; };
  load_rows(args.proj_k, 0, head_of(args.proj_k), 0, head_dim, 1.0f, matrix, ld);
  const float* const proj_q = args.proj_q.row<const float>(0, head_of(args.proj_q), 0);
  gemm<Into::kOverwrite>(head_dim, pad(head_dim), head_dim, columns_of(proj_q, head_dim), matrix,
                         ld, projection, ld);
}

}  // namespace

void Route(const Plan& plan, const RouteArgs& args, std::byte* workspace, const Stream& stream) {
  const Problem& p = plan.problem;
  const RouteRule& rule = args.rule;
  const RouteSpace space(plan, workspace);
  const int64_t ld = space.ld, ld_keys = space.ld_keys, dim = p.head_dim;
  const int64_t num_query_blocks = static_cast<int64_t>(plan.query_blocks.size());
  const int64_t num_key_blocks = static_cast<int64_t>(plan.key_blocks.size());
  const int64_t num_kv_pairs = p.batch * p.num_kv_heads, num_pairs = p.batch * p.num_heads;
  const Rows q(args.q, args.query_order), k(args.k, args.key_order);
  const SequenceRows sequences(p);
  const bool checks_similarity = rule.min_similarity > 0.0;  // none is below 0
  const auto is_alike = [&](const Rows& rows, int64_t b, int64_t h, const Block& block,
                            const float* mean) {
    return !checks_similarity ||
           !(similarity(rows, b, h, block, mean) < static_cast<float>(rule.min_similarity));
  };

  run_tasks(plan, stream, num_kv_pairs * num_key_blocks, [&](int64_t task, int64_t) {
    const int64_t pair = task / num_key_blocks, j = task % num_key_blocks;
    sum_rows(k, pair / p.num_kv_heads, pair % p.num_kv_heads, plan.key_blocks[j],
             space.pooled_k + task * ld);
  });
  run_tasks(plan, stream, num_pairs * num_query_blocks, [&](int64_t task, int64_t) {
    HWY_ALIGN const float zero[256 + kPadFloats] = {};
    const int64_t pair = task / num_query_blocks, i = task % num_query_blocks;
    const int64_t b = pair / p.num_heads, h = pair % p.num_heads;
    sum_rows(q, b, h, plan.query_blocks[i], space.pooled_q + task * ld);
    divide_by_rows(dim, plan.query_blocks[i], space.pooled_q + task * ld);
    space.is_alike_q[task] = is_alike(q, b, h, plan.query_blocks[i], zero);
  });
  run_tasks(plan, stream, num_kv_pairs, [&](int64_t pair, int64_t) {
    const int64_t b = pair / p.num_kv_heads, h = pair % p.num_kv_heads;
    float* const pooled = space.pooled_k + pair * num_key_blocks * ld;
    for (int64_t s = 0; s < args.k_mean.shape[2]; ++s) {
      std::fill_n(args.k_mean.row<float>(b, h, s), dim, 0.0f);
    }
    for (BlockRange range; range.end < num_key_blocks;) {
      const int32_t sequence = plan.key_blocks[range.end].sequence;
      range = blocks_of_sequence(plan.key_blocks, sequence);
      HWY_ALIGN float mean[256 + kPadFloats] = {};
      if (rule.smooth_k) mean_of_blocks(plan.key_blocks, range, dim, pooled, ld, mean);
      if (args.k_mean) std::copy_n(mean, dim, args.k_mean.row<float>(b, h, sequences[sequence]));
      for (int64_t j = range.begin; j < range.end; ++j) {
        divide_by_rows(dim, plan.key_blocks[j], pooled + j * ld);
        add_scaled(dim, -1.0f, mean, pooled + j * ld);
        space.is_alike_k[pair * num_key_blocks + j] = is_alike(k, b, h, plan.key_blocks[j], mean);
      }
    }
    // Unscaled: softmax_scale changes no order, but its rounding would break ties.
    transpose(pooled, ld, num_key_blocks, dim, 1.0f, space.pooled_k_t + pair * dim * ld_keys,
              ld_keys);
  });
  const bool has_projection = static_cast<bool>(args.proj_q);
  const int64_t num_projections =
      has_projection ? std::max(args.proj_q.shape[1], args.proj_k.shape[1]) : 0;
  run_tasks(plan, stream, num_projections, [&](int64_t h, int64_t worker) {
    fold_projections(args, h, dim, space.matrix + worker * dim * ld,
                     space.projection + h * dim * ld, ld);
  });

  const int64_t num_chunks = (num_query_blocks + kRouteRows - 1) / kRouteRows;
  run_tasks(plan, stream, num_pairs * num_chunks, [&](int64_t task, int64_t worker) {
    const int64_t pair = task / num_chunks, first = task % num_chunks * kRouteRows;
    const int64_t rows = std::min(kRouteRows, num_query_blocks - first);
    const int64_t b = pair / p.num_heads, h = pair % p.num_heads;
    const int64_t kv_pair = b * p.num_kv_heads + h / (p.num_heads / p.num_kv_heads);
    const float* queries = space.pooled_q + (pair * num_query_blocks + first) * ld;
    if (has_projection) {
      float* const projected = space.projected + worker * kRouteRows * ld;
      const float* const projection = space.projection + (num_projections == 1 ? 0 : h) * dim * ld;
      gemm<Into::kOverwrite>(rows, pad(dim), dim, rows_of(queries, ld), projection, ld, projected,
                             ld);
      queries = projected;
    }
    float* const scores = space.scores + worker * kRouteRows * ld_keys;
    gemm<Into::kOverwrite>(rows, pad(num_key_blocks), dim, rows_of(queries, ld),
                           space.pooled_k_t + kv_pair * dim * ld_keys, ld_keys, scores, ld_keys);
    for (int64_t r = 0; r < rows; ++r) {
      const Block& block = plan.query_blocks[first + r];
      const BlockRange keys = blocks_of_sequence(plan.key_blocks, block.sequence);
      int8_t* const out = args.block_class.row<int8_t>(b, h, first + r);
      const int64_t stride = args.block_class.stride[3];
      classify(rule, plan.key_blocks, keys, space.is_alike_k + kv_pair * num_key_blocks,
               scores + r * ld_keys, static_cast<float>(p.softmax_scale),
               space.ranking + worker * num_key_blocks, out, stride);
      if (!block.is_protected && space.is_alike_q[pair * num_query_blocks + first + r]) continue;
      for (int64_t j = keys.begin; j < keys.end; ++j) out[j * stride] = 1;
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
