// SPDX-License-Identifier: Apache-2.0
//
// Sparse-linear attention, forward (docs/math.md).
//   Over the critical key blocks j of query block i
//     S = scale q_i k_j^T,  o_s = softmax(S) v,  lse = ln sum exp S
//   over its linear set E_i
//     o_l = phi(q) H_i / phi(q) Z_i,  H_i = sum h_j,  Z_i = sum z_j
//   o = o_s, o_l, o_s + o_l or o_s + o_l W^T + b
//
// (batch, kv head) pairs run in waves. In a wave, key blocks are staged as
// float32 tiles with their h_j and z_j, H_i and Z_i are summed, and then every query block of every
// query head is one task. Scores are computed transposed, S^T = k_j q_i^T: the softmax then runs
// down the columns without horizontal sums, and k_j and v_j are used as they lie in memory. Base-2
// exponent; statistics float32; a row without a critical key gives o_s = 0, lse = -inf.

#include "cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/forward.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "cpu/forward_space.h"
#include "cpu/kernels.h"
#include "cpu/linear-inl.h"

HWY_BEFORE_NAMESPACE();
namespace sparline::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;
namespace {

/// One step of online softmax down the columns (queries) of S^T (num_keys x num_queries), in place:
/// S^T becomes exp2(S^T - row_max); row_max and row_sum advance; row_scale is what earlier sums and
/// outputs must be multiplied by. Returns whether any row_scale differs from 1.
HWY_INLINE bool online_softmax(float* HWY_RESTRICT s_t, int64_t ld_rows, int64_t num_keys,
                               int64_t num_queries, float* HWY_RESTRICT row_max,
                               float* HWY_RESTRICT row_sum, float* HWY_RESTRICT row_scale) {
  const FloatTag d;
  const FloatVec one = hn::Set(d, 1.0f);
  hn::Mask<FloatTag> rescaled = hn::Lt(one, one);
  for_each_vector(num_queries, [&](int64_t at) HWY_ATTR {
    const FloatVec old_max = hn::LoadU(d, row_max + at);
    float* HWY_RESTRICT column = s_t + at;
    FloatVec top = old_max;
    for (int64_t c = 0; c < num_keys; ++c) top = hn::Max(top, hn::LoadU(d, column + c * ld_rows));
    FloatVec sum = hn::Zero(d);
    for (int64_t c = 0; c < num_keys; ++c) {
      const FloatVec p = exp2_clamped(hn::Sub(hn::LoadU(d, column + c * ld_rows), top));
      hn::StoreU(p, d, column + c * ld_rows);
      sum = hn::Add(sum, p);
    }
    const FloatVec scale =
        hn::IfThenElse(hn::Eq(old_max, top), one, exp2_clamped(hn::Sub(old_max, top)));
    rescaled = hn::Or(rescaled, hn::Ne(scale, one));
    hn::StoreU(top, d, row_max + at);
    hn::StoreU(hn::MulAdd(hn::LoadU(d, row_sum + at), scale, sum), d, row_sum + at);
    hn::StoreU(scale, d, row_scale + at);
  });
  return !hn::AllFalse(d, rescaled);
}

/// o_s (normalised) of one query block into w.o, its lse into `lse`.
void sparse_branch(const ForwardSpace& space, const ForwardSpace::Slot& slot,
                   const ForwardSpace::Worker& w, const BlockClasses& classes, int64_t b, int64_t h,
                   int64_t i, BlockRange keys, float* lse) {
  const Plan& plan = space.plan;
  const int64_t head_dim = plan.problem.head_dim, ld = space.ld, ld_rows = space.ld_rows;
  const int64_t rows = plan.query_blocks[i].rows;
  const float scale_log2 = static_cast<float>(plan.problem.softmax_scale) * kLog2E;
  transpose(w.q, ld, rows, head_dim, scale_log2, w.q_t, ld_rows);
  std::fill(w.o, w.o + rows * ld, 0.0f);
  std::fill(w.row_max, w.row_max + ld_rows, -HUGE_VALF);
  std::fill(w.row_sum, w.row_sum + ld_rows, 0.0f);
  for (int64_t j = keys.begin; j < keys.end; ++j) {
    if (classes(b, h, i, j) != 1) continue;
    const Block& block = plan.key_blocks[j];
    const float* k = slot.k + block.begin * ld;
    const float* v = slot.v + block.begin * ld;
    gemm<Into::kOverwrite>(block.rows, pad(rows), head_dim, rows_of(k, ld), w.q_t, ld_rows, w.p_t,
                           ld_rows);
    if (online_softmax(w.p_t, ld_rows, block.rows, rows, w.row_max, w.row_sum, w.row_scale)) {
      for (int64_t r = 0; r < rows; ++r) scale_row(head_dim, w.row_scale[r], w.o + r * ld);
    }
    gemm<Into::kAdd>(rows, pad(head_dim), block.rows, columns_of(w.p_t, ld_rows), v, ld, w.o, ld);
  }
  for (int64_t r = 0; r < rows; ++r) {
    const bool has_keys = w.row_sum[r] != 0.0f;
    lse[r] = has_keys ? w.row_max[r] * kLn2 + std::log(w.row_sum[r]) : -HUGE_VALF;
    if (has_keys) scale_row(head_dim, 1.0f / w.row_sum[r], w.o + r * ld);
  }
}

/// Adds the linear branch to w.o (or replaces it); `sum` is (H_i, Z_i).
void linear_branch(const ForwardSpace& space, const ForwardSpace::Worker& w,
                   const ForwardArgs& args, int64_t h, int64_t rows, const float* sum) {
  const Problem& problem = space.plan.problem;
  const int64_t head_dim = problem.head_dim, ld = space.ld, features = space.num_features;
  feature_map(problem.feature_map, head_dim, space.feature_tiles(args.weights).query(h), w.q, rows,
              w.y, w.phi);
  float* o_l = problem.combine == Combine::kLinear ? w.o : w.o_l;
  linear_output(problem, features, w.phi, sum, rows, o_l, w.inverse_den);
  if (problem.combine == Combine::kProjection) {
    gemm<Into::kAdd>(rows, pad(head_dim), head_dim, rows_of(o_l, ld), space.proj_t, ld, w.o, ld);
    for (int64_t r = 0; r < rows; ++r) {
      add_scaled(head_dim, 1.0f, space.proj_bias, w.o + r * ld);
    }
  } else if (problem.combine == Combine::kSum) {
    for (int64_t r = 0; r < rows; ++r) add_scaled(head_dim, 1.0f, o_l + r * ld, w.o + r * ld);
  }
}

}  // namespace

void Forward(const Plan& plan, const ForwardArgs& args, std::byte* workspace,
             const Stream& stream) {
  const Problem& problem = plan.problem;
  const ForwardSpace space(plan, workspace);
  const BlockClasses classes(plan, args.block_class);
  const int64_t head_dim = problem.head_dim, ld = space.ld, features = space.num_features;
  const int64_t num_query_blocks = space.num_query_blocks, num_key_blocks = space.num_key_blocks;
  const int64_t group = space.group, mask_floats = num_query_blocks * space.ld_mask;
  const FeatureWeightTiles feature_tiles = space.feature_tiles(args.weights);
  stage_feature_weights(args.weights, feature_tiles);
  if (space.has_projection) {
    const TensorView& proj = args.weights.proj_weight;
    transpose(proj.row<const float>(0, 0, 0), proj.stride[2], head_dim, head_dim, 1.0f,
              space.proj_t, ld);
    stage_bias(args.weights.proj_bias, head_dim, space.proj_bias);
  }

  const int64_t num_pairs = problem.batch * problem.num_kv_heads;
  for (int64_t first = 0; first < num_pairs; first += space.heads_per_wave) {
    const int64_t wave = std::min(space.heads_per_wave, num_pairs - first);
    const auto batch_of = [&](int64_t n) { return (first + n) / problem.num_kv_heads; };
    const auto kv_head_of = [&](int64_t n) { return (first + n) % problem.num_kv_heads; };

    run_tasks(plan, stream, wave * num_key_blocks, [&](int64_t task, int64_t worker) {
      const int64_t n = task / num_key_blocks, j = task % num_key_blocks;
      const ForwardSpace::Slot slot = space.slot(n);
      const Block& block = plan.key_blocks[j];
      float* const k = slot.k + block.begin * ld;
      float* const v = slot.v + block.begin * ld;
      load_rows(args.k, batch_of(n), kv_head_of(n), block.begin, block.rows, 1.0f, k, ld);
      load_rows(args.v, batch_of(n), kv_head_of(n), block.begin, block.rows, 1.0f, v, ld);
      if (!space.is_linear) return;
      const ForwardSpace::Worker w = space.worker(worker);
      feature_map(problem.feature_map, head_dim, feature_tiles.key(kv_head_of(n)), k, block.rows,
                  w.y, w.phi);
      block_state(features, head_dim, w.phi, v, nullptr, block.rows,
                  state_of(slot.states, j, num_key_blocks, features, head_dim));
    });

    if (space.is_linear) {
      run_tasks(plan, stream, wave * group, [&](int64_t task, int64_t) {
        const int64_t n = task / group, g = task % group;
        fill_linear_mask(plan, classes, batch_of(n), kv_head_of(n) * group + g,
                         space.slot(n).masks + g * mask_floats, space.ld_mask);
      });
      run_tasks(plan, stream, wave * group * kFeatureSlices, [&](int64_t task, int64_t) {
        const int64_t n = task / kFeatureSlices / group, g = task / kFeatureSlices % group;
        const ForwardSpace::Slot slot = space.slot(n);
        sum_states<Into::kOverwrite>(rows_of(slot.masks + g * mask_floats, space.ld_mask),
                                     num_query_blocks, num_key_blocks, slot.states, features,
                                     head_dim,
                                     share(features + 1, task % kFeatureSlices, kFeatureSlices),
                                     slot.sums + g * num_query_blocks * space.ld_sum);
      });
    }

    run_tasks(plan, stream, wave * group * num_query_blocks, [&](int64_t task, int64_t worker) {
      const int64_t i = task % num_query_blocks, g = task / num_query_blocks % group;
      const int64_t n = task / num_query_blocks / group;
      const int64_t b = batch_of(n), h = kv_head_of(n) * group + g;
      const ForwardSpace::Slot slot = space.slot(n);
      const ForwardSpace::Worker w = space.worker(worker);
      const Block& block = plan.query_blocks[i];
      load_rows(args.q, b, h, block.begin, block.rows, 1.0f, w.q, ld);
      float* const lse = args.lse.row<float>(0, b, h) + block.begin;
      if (problem.combine == Combine::kLinear && !block.is_protected) {
        std::fill_n(lse, block.rows, -HUGE_VALF);
      } else {
        const BlockRange keys = blocks_of_sequence(plan.key_blocks, block.sequence);
        sparse_branch(space, slot, w, classes, b, h, i, keys, lse);
      }
      if (space.is_linear && !block.is_protected) {
        linear_branch(space, w, args, h, block.rows,
                      slot.sums + (g * num_query_blocks + i) * space.ld_sum);
      }
      store_rows(w.o, ld, args.o, b, h, block.begin, block.rows);
    });
  }
}

}  // namespace sparline::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace sparline::cpu {

HWY_EXPORT(Forward);

int64_t forward_workspace_bytes(const Plan& plan) {
  return ForwardSpace(plan, nullptr).total_bytes;
}

void forward(const Plan& plan, const ForwardArgs& args, std::byte* workspace,
             const Stream& stream) {
  HWY_DYNAMIC_DISPATCH(Forward)(plan, args, workspace, stream);
}

}  // namespace sparline::cpu
#endif
