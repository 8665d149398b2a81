// SPDX-License-Identifier: Apache-2.0
//
// Sparse-linear attention, forward (docs/math.md).
//   Over the critical key blocks j of query block i
//     S = scale q_i k_j^T,  o_s = softmax(S) v,  lse = ln sum exp S
//   over its linear set E_i
//     o_l = phi(q) H_i / phi(q) Z_i,  H_i = sum h_j,  Z_i = sum z_j
//   o = o_s, o_l, o_s + o_l, o_s + o_l W^T + b or a o_s + (1 - a) o_l
//
// (batch, kv head) pairs run in waves. In a wave, key blocks are staged as float32 tiles with their
// h_j and z_j, H_i and Z_i are summed, and then every query block of every query head is one task.
// Scores are computed transposed, S^T = k_j q_i^T: the softmax then runs down the columns without
// horizontal sums, and k_j and v_j are used as they lie in memory. Base-2 exponent; statistics
// float32; a row without a critical key gives o_s = 0, lse = -inf.
//
// Rows stand in blocks in the order of query_order and key_order; loads and stores translate. Tile
// bits and the skip rule take rows out of a tile, which is then worked on in runs of whole vectors.
// Under low bit q k^T is a product of int8 codes; the tiles of v and P hold the values of their
// e4m3 codes as float32.

#include "cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/forward.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "cpu/forward_space.h"
#include "cpu/kernels.h"
#include "cpu/keys-inl.h"
#include "cpu/linear-inl.h"

HWY_BEFORE_NAMESPACE();
namespace sparline::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;
namespace {

/// One step of online softmax down the columns (queries) of S^T (num_keys x num_queries), in place:
/// S^T becomes exp2(S^T + weight_log2 - row_max), or 0 in columns that are not visible; row_max and
/// row_sum advance; row_scale is what earlier sums and outputs must be multiplied by. Returns
/// whether any row_scale differs from 1. `visible` is read if kIsPartial.
template <bool kIsPartial>
HWY_INLINE bool online_softmax(float* HWY_RESTRICT s_t, int64_t ld_rows, int64_t num_keys,
                               int64_t num_queries, const float* HWY_RESTRICT visible,
                               float weight_log2, float* HWY_RESTRICT row_max,
                               float* HWY_RESTRICT row_sum, float* HWY_RESTRICT row_scale) {
  const FloatTag d;
  const FloatVec one = hn::Set(d, 1.0f), lowest = hn::Set(d, -HUGE_VALF);
  const FloatVec weight = hn::Set(d, weight_log2);
  hn::Mask<FloatTag> rescaled = hn::Lt(one, one);
  for_each_vector(num_queries, [&](int64_t at) HWY_ATTR {
    const FloatVec old_max = hn::LoadU(d, row_max + at);
    float* HWY_RESTRICT column = s_t + at;
    FloatVec top = lowest;
    for (int64_t c = 0; c < num_keys; ++c) top = hn::Max(top, hn::LoadU(d, column + c * ld_rows));
    hn::Mask<FloatTag> is_visible = hn::Eq(one, one);
    if constexpr (kIsPartial) {
      is_visible = hn::Eq(hn::LoadU(d, visible + at), one);
      top = hn::IfThenElse(is_visible, top, lowest);
    }
    top = hn::Max(old_max, hn::Add(top, weight));
    const FloatVec shift = hn::Sub(top, weight);
    FloatVec sum = hn::Zero(d);
    for (int64_t c = 0; c < num_keys; ++c) {
      FloatVec p = exp2_clamped(hn::Sub(hn::LoadU(d, column + c * ld_rows), shift));
      if constexpr (kIsPartial) p = hn::IfThenElseZero(is_visible, p);
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

/// Where a task stands: one query block of one query head.
struct QueryBlock {
  int64_t b, h, i;
  const Block& block;
};

/// The sparse branch of one query block: an online softmax over its key blocks. A tile goes through
/// scores() and, with a skip rule, kept_rows(); what is left of it goes through add().
class SparseBranch {
 public:
  SparseBranch(const ForwardSpace& space, const ForwardArgs& args, const BlockPairs& pairs,
               const ForwardSpace::Slot& slot, const ForwardSpace::Worker& w,
               const QueryBlock& query)
      : space_(space),
        args_(args),
        pairs_(pairs),
        slot_(slot),
        w_(w),
        query_(query),
        p_(space.plan.problem),
        rows_(query.block.rows) {}

  /// o_s (normalised) into w.o, its lse into `lse` (rows).
  void run(float* lse) {
    const auto [b, h, i, block] = query_;
    start();
    const BlockRange keys = blocks_of_sequence(space_.plan.key_blocks, block.sequence);
    const int32_t* const order =
        args_.tile_order ? args_.tile_order.row<const int32_t>(0, 0, i) : nullptr;
    const BlockRange visits = order != nullptr ? BlockRange{0, space_.num_key_blocks} : keys;
    for (int64_t n = visits.begin; n < visits.end; ++n) {
      const int64_t j = order != nullptr ? order[n] : n;
      if (j < keys.begin || j >= keys.end) continue;
      const float weight = pairs_.sparse_weight(b, h, i, j);
      if (!(weight > 0.0f)) continue;
      RowRuns runs = pairs_.rows(b, h, i, j, w_.visible);
      scores(j, runs);
      if (space_.has_skip) runs = kept_rows(j);
      add(j, runs, weight);
    }
    finish(lse);
  }

 private:
  void start() {
    const int64_t head_dim = p_.head_dim, ld_rows = space_.ld_rows;
    const float scale_log2 = static_cast<float>(p_.softmax_scale) * kLog2E;
    transpose(w_.q, space_.ld, rows_, head_dim, p_.low_bit.is_enabled ? 1.0f : scale_log2, w_.q_t,
              ld_rows);
    if (p_.low_bit.is_enabled) {
      quantise_queries(w_.q_t, head_dim, ld_rows, rows_, p_.low_bit.q_rows, w_.q_pairs, w_.q_step);
      scale_row(rows_, scale_log2, w_.q_step);
    }
    std::fill(w_.o, w_.o + rows_ * space_.ld, 0.0f);
    std::fill(w_.row_max, w_.row_max + ld_rows, -HUGE_VALF);
    std::fill(w_.row_sum, w_.row_sum + ld_rows, 0.0f);
  }

  /// S^T in log2 units into w.p_t.
  void scores(int64_t j, const RowRuns& runs) {
    const Block& block = space_.plan.key_blocks[j];
    const int64_t ld = space_.ld, ld_rows = space_.ld_rows;
    for (const auto [begin, end] : runs) {
      const int64_t num_rows = pad(end - begin);
      if (p_.low_bit.is_enabled) {
        run_tiles(block.rows, num_rows,
                  Int8Tile{.num_k = p_.head_dim,
                           .a = slot_.k_codes + block.begin * space_.ld_codes,
                           .lda = space_.ld_codes,
                           .a_step = slot_.k_step[j],
                           .b = w_.q_pairs + begin,
                           .ldb = ld_rows,
                           .b_steps = w_.q_step + begin,
                           .c = w_.p_t + begin,
                           .ldc = ld_rows});
      } else {
        gemm<Into::kOverwrite>(block.rows, num_rows, p_.head_dim,
                               rows_of(slot_.k + block.begin * ld, ld), w_.q_t + begin, ld_rows,
                               w_.p_t + begin, ld_rows);
      }
    }
  }

  /// Applies the skip rule: the rows whose group keeps the tile, also noted in kept_bits. A row
  /// that has seen no tile keeps all: its maximum is -inf and its sum 0.
  RowRuns kept_rows(int64_t j) {
    const auto [b, h, i, block] = query_;
    const FloatTag d;
    const FloatVec threshold = hn::Set(d, static_cast<float>(p_.skip.log_threshold) * kLog2E);
    const bool is_forced = pairs_.is_protected(i, j);
    const int64_t num_keys = space_.plan.key_blocks[j].rows;
    for_each_vector(rows_, [&](int64_t at) HWY_ATTR {
      const float* const column = w_.p_t + at;
      FloatVec top = hn::Set(d, -HUGE_VALF);
      for (int64_t c = 0; c < num_keys; ++c) {
        top = hn::Max(top, hn::LoadU(d, column + c * space_.ld_rows));
      }
      const FloatVec above = hn::Sub(top, hn::LoadU(d, w_.row_max + at));
      const auto passes =
          p_.skip.reference == SkipReference::kRunningMax
              ? hn::Lt(above, threshold)
              : hn::Lt(exp2_clamped(hn::Sub(above, threshold)), hn::LoadU(d, w_.row_sum + at));
      hn::StoreU(hn::IfThenZeroElse(passes, hn::Set(d, 1.0f)), d, w_.visible + at);
    });
    const int64_t num_kept = std::count(w_.visible, w_.visible + rows_, 1.0f);
    if (args_.row_votes && !is_forced) {
      args_.row_votes.row<float>(0, b, h)[i] += static_cast<float>(rows_ - num_kept);
    }
    const int64_t group = p_.skip.rows;
    for (int64_t begin = 0, g = 0; begin < rows_; begin += group, ++g) {
      float* const first = w_.visible + begin;
      float* const last = w_.visible + std::min(begin + group, rows_);
      const bool is_kept = is_forced || std::find(first, last, 1.0f) != last;
      std::fill(first, last, is_kept ? 1.0f : 0.0f);
      if (!is_kept) continue;
      args_.kept_bits.row<uint8_t>(b, h, i * bit_groups(p_, p_.skip.rows) + g)[j / 8] |=
          static_cast<uint8_t>(1 << (j % 8));
    }
    return runs_of(w_.visible, rows_);
  }

  /// Adds a tile of scores to the running softmax and P V to w.o.
  void add(int64_t j, const RowRuns& runs, float weight) {
    const Block& block = space_.plan.key_blocks[j];
    const int64_t head_dim = p_.head_dim, ld = space_.ld, ld_rows = space_.ld_rows;
    const float weight_log2 = std::log2(weight);
    const auto softmax = runs.is_partial ? online_softmax<true> : online_softmax<false>;
    for (const auto [begin, end] : runs) {
      const int64_t rows = end - begin;
      float* const p_t = w_.p_t + begin;
      float* const o = w_.o + begin * ld;
      if (softmax(p_t, ld_rows, block.rows, rows, w_.visible + begin, weight_log2,
                  w_.row_max + begin, w_.row_sum + begin, w_.row_scale + begin)) {
        for (int64_t r = 0; r < rows; ++r) scale_row(head_dim, w_.row_scale[begin + r], o + r * ld);
      }
      if (p_.low_bit.is_enabled) quantise_probabilities(p_t, block.rows, rows);
      gemm<Into::kAdd>(rows, pad(head_dim), block.rows, columns_of(p_t, ld_rows),
                       slot_.v + block.begin * ld, ld, o, ld);
    }
  }

  void quantise_probabilities(float* p_t, int64_t num_keys, int64_t num_queries) {
    const FloatTag d;
    const FloatVec range = hn::Set(d, static_cast<float>(p_.low_bit.p_range));
    for (int64_t c = 0; c < num_keys; ++c, p_t += space_.ld_rows) {
      for_each_vector(num_queries, [&](int64_t at) HWY_ATTR {
        hn::StoreU(e4m3(hn::Mul(range, hn::LoadU(d, p_t + at))), d, p_t + at);
      });
    }
  }

  void finish(float* lse) {
    const int64_t ld = space_.ld;
    const float p_range = p_.low_bit.is_enabled ? static_cast<float>(p_.low_bit.p_range) : 1.0f;
    for (int64_t r = 0; r < rows_; ++r) {
      const bool has_keys = w_.row_sum[r] != 0.0f;
      lse[r] = has_keys ? w_.row_max[r] * kLn2 + std::log(w_.row_sum[r]) : -HUGE_VALF;
      if (has_keys) scale_row(p_.head_dim, 1.0f / (w_.row_sum[r] * p_range), w_.o + r * ld);
    }
    if (!p_.low_bit.is_enabled) return;
    const BlockRange keys = blocks_of_sequence(space_.plan.key_blocks, query_.block.sequence);
    if (keys.begin == keys.end) return;
    for (int64_t r = 0; r < rows_; ++r) {
      multiply_row(p_.head_dim, slot_.v_step + keys.begin * ld, w_.o + r * ld);
    }
  }

  const ForwardSpace& space_;
  const ForwardArgs& args_;
  const BlockPairs& pairs_;
  const ForwardSpace::Slot& slot_;
  const ForwardSpace::Worker& w_;
  const QueryBlock& query_;
  const Problem& p_;
  const int64_t rows_;
};

/// Combines the linear branch with o_s in w.o (or replaces it); `mask` says what `sum`, (H_i, Z_i),
/// is a sum of.
void linear_branch(const ForwardSpace& space, const ForwardSpace::Worker& w,
                   const ForwardArgs& args, const QueryBlock& query, const float* mask,
                   const float* sum) {
  const auto [b, h, i, block] = query;
  const Problem& problem = space.plan.problem;
  const int64_t head_dim = problem.head_dim, ld = space.ld, rows = block.rows;
  feature_map(problem.feature_map, head_dim, space.feature_tiles(args.weights).query(h), w.q, rows,
              w.y, w.phi);
  float* o_l = problem.combine == Combine::kLinear ? w.o : w.o_l;
  linear_output(problem, space, mask, w.phi, sum, rows, o_l, w.inverse_den);
  if (problem.combine == Combine::kProjection) {
    gemm<Into::kAdd>(rows, pad(head_dim), head_dim, rows_of(o_l, ld), space.proj_t, ld, w.o, ld);
    for (int64_t r = 0; r < rows; ++r) {
      add_scaled(head_dim, 1.0f, space.proj_bias, w.o + r * ld);
    }
  } else if (problem.combine == Combine::kSum) {
    for (int64_t r = 0; r < rows; ++r) add_scaled(head_dim, 1.0f, o_l + r * ld, w.o + r * ld);
  } else if (problem.combine == Combine::kBlend) {
    const float* const logits = args.weights.alpha_logit.row<const float>(0, b, h);
    const RowOrder order(args.query_order);
    for (int64_t r = 0; r < rows; ++r) {
      const Shares share = blend_shares(logits[order[block.begin + r]], w.inverse_den[r]);
      scale_row(head_dim, share.sparse, w.o + r * ld);
      add_scaled(head_dim, share.linear, o_l + r * ld, w.o + r * ld);
    }
  }
}

void clear_skip_outputs(const ForwardArgs& args, const QueryBlock& query, int64_t groups) {
  for (int64_t g = 0; g < groups; ++g) {
    std::fill_n(args.kept_bits.row<uint8_t>(query.b, query.h, query.i * groups + g),
                args.kept_bits.shape[3], uint8_t{0});
  }
  if (args.row_votes) args.row_votes.row<float>(0, query.b, query.h)[query.i] = 0.0f;
}

}  // namespace

void Forward(const Plan& plan, const ForwardArgs& args, std::byte* workspace,
             const Stream& stream) {
  const Problem& problem = plan.problem;
  const ForwardSpace space(plan, workspace);
  const BlockPairs pairs(plan, args.block_map, args.tile_bits, problem.bit_rows);
  const RowOrder query_order(args.query_order), key_order(args.key_order);
  const SequenceRows sequences(problem);
  const bool is_low_bit = problem.low_bit.is_enabled;
  const bool finds_mean = problem.smooth_k && !args.k_mean;
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

    const auto load_keys = [&](int64_t task, int64_t) {
      const int64_t n = task / num_key_blocks, j = task % num_key_blocks;
      const ForwardSpace::Slot slot = space.slot(n);
      const Block& block = plan.key_blocks[j];
      float* const k = slot.k + block.begin * ld;
      float* const v = slot.v + block.begin * ld;
      load_rows(args.k, batch_of(n), kv_head_of(n), block.begin, block.rows, 1.0f, k, ld,
                key_order);
      load_rows(args.v, batch_of(n), kv_head_of(n), block.begin, block.rows, 1.0f, v, ld,
                key_order);
      if (finds_mean) column_sums(k, ld, block.rows, head_dim, slot.k_mean + j * ld);
      if (args.k_mean) {
        load_rows(args.k_mean, batch_of(n), kv_head_of(n), sequences[block.sequence], 1, 1.0f,
                  slot.k_mean + j * ld, ld);
      }
      if (is_low_bit) column_peaks(v, ld, block.rows, head_dim, slot.v_step + j * ld);
    };
    const auto finish_keys = [&](int64_t task, int64_t worker) {
      const int64_t n = task / num_key_blocks, j = task % num_key_blocks;
      const ForwardSpace::Slot slot = space.slot(n);
      const Block& block = plan.key_blocks[j];
      float* const k = slot.k + block.begin * ld;
      float* const v = slot.v + block.begin * ld;
      if (problem.smooth_k) subtract_row(slot.k_mean + j * ld, ld, block.rows, head_dim, k);
      if (space.is_linear) {
        const ForwardSpace::Worker w = space.worker(worker);
        feature_map(problem.feature_map, head_dim, feature_tiles.key(kv_head_of(n)), k, block.rows,
                    w.y, w.phi);
        block_state(features, head_dim, w.phi, v, nullptr, block.rows,
                    state_of(slot.states, j, num_key_blocks, features, head_dim));
      }
      if (is_low_bit) {
        slot.k_step[j] = quantise_keys(k, ld, block.rows, head_dim,
                                       slot.k_codes + block.begin * space.ld_codes, space.ld_codes);
        quantise_values(slot.v_step + j * ld, ld, block.rows, head_dim, v);
      }
    };
    if (finds_mean || is_low_bit) {  // which need a whole sequence before they can finish
      run_tasks(plan, stream, wave * num_key_blocks, load_keys);
      run_tasks(plan, stream, wave, [&](int64_t n, int64_t) {
        const ForwardSpace::Slot slot = space.slot(n);
        if (finds_mean) means_of_sequences(plan.key_blocks, head_dim, ld, slot.k_mean);
        if (!is_low_bit) return;
        steps_of_sequences(plan.key_blocks, head_dim, ld,
                           static_cast<float>(problem.low_bit.v_range), slot.v_step);
      });
      run_tasks(plan, stream, wave * num_key_blocks, finish_keys);
    } else {
      run_tasks(plan, stream, wave * num_key_blocks, [&](int64_t task, int64_t worker) {
        load_keys(task, worker);
        finish_keys(task, worker);
      });
    }

    if (space.is_linear) {
      run_tasks(plan, stream, wave * group, [&](int64_t task, int64_t) {
        const int64_t n = task / group, g = task % group;
        fill_linear_mask(plan, pairs, batch_of(n), kv_head_of(n) * group + g,
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
      const QueryBlock query{b, h, i, block};
      if (space.has_skip) clear_skip_outputs(args, query, bit_groups(problem, problem.skip.rows));
      load_rows(args.q, b, h, block.begin, block.rows, 1.0f, w.q, ld, query_order);
      if (problem.combine == Combine::kLinear && !block.is_protected) {
        std::fill_n(w.lse, block.rows, -HUGE_VALF);
      } else {
        SparseBranch(space, args, pairs, slot, w, query).run(w.lse);
      }
      if (space.is_linear && !block.is_protected) {
        linear_branch(space, w, args, query, slot.masks + g * mask_floats + i * space.ld_mask,
                      slot.sums + (g * num_query_blocks + i) * space.ld_sum);
      }
      store_rows(w.o, ld, args.o, b, h, block.begin, block.rows, query_order);
      float* const lse = args.lse.row<float>(0, b, h);
      for (int64_t r = 0; r < block.rows; ++r) lse[query_order[block.begin + r]] = w.lse[r];
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
