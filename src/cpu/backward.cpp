// SPDX-License-Identifier: Apache-2.0
//
// Sparse-linear attention, backward (docs/math.md); block classes and bits are constants.
//   Saved from the forward: q, k, v, o, lse. Recomputed: phi, h_j, H_i, o_l.
//   Sparse
//     P = exp(S - lse),  dS = P (dO V^T - delta)
//     dV += P^T dO,  dK += scale dS^T Q,  dQ += scale dS K
//   Linear
//     A = phi(q) / den,  dH_i = A^T dO_l,  dZ_i = -A^T d_l,  dphi(q) = (dO_l H_i^T - d_l Z_i) / den
//     dH^j = sum of dH_i over the rows i with j in E_i,  dZ^j likewise
//     dphi(k) = v dH^j^T + dZ^j,  dV += phi(k) dH^j
//   with d_l = rowsum(dO_l o_l). As o = o_s + o_l W^T + b,
//     delta = rowsum(dO o_s) = rowsum(dO o) - dO b - d_l,
//   so that o_s is not needed. A blend has dO_s = a dO in place of dO, dO_l = (1 - a) dO and
//     dalpha_logit = (1 - a) dO (o - o_l)
//   Soft map
//     P = m exp(S - lse),  dm = sum of P / m (dO V^T - delta) - h_j dH_i - z_j dZ_i
//
// Keys less their mean: rows of dS sum to zero, so the sparse branch's d_k has no mean, and only
// the linear branch's loses its own.
//
// Five products a tile, no atomics, and the same bits for any number of threads: queries and keys
// of a head are cut into kChunks chunks, and in step s the tiles of (query chunk r, key chunk r +
// s) run for all r at once. No two of them touch the same d_q, d_k or d_v, and every accumulator
// sees its tiles in an order that depends on the problem alone.

#include "cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/backward.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <atomic>
#include <thread>

#include "cpu/backward_space.h"
#include "cpu/kernels.h"
#include "cpu/keys-inl.h"
#include "cpu/linear-inl.h"

HWY_BEFORE_NAMESPACE();
namespace sparline::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;
namespace {

/// P^T = weight exp2(S^T - lse_log2) over S^T, and dS^T = scale P^T (dP^T - delta) over dP^T; both
/// (num_keys x num_queries), and 0 in columns that are not visible. With kHasWeight, m of a soft
/// map, returns its gradient, the sum of P^T / m (dP^T - delta); else the weight is 1. `visible` is
/// read if kIsPartial.
template <bool kHasWeight, bool kIsPartial>
HWY_INLINE float softmax_backward(float* HWY_RESTRICT p_t, float* HWY_RESTRICT ds_t,
                                  int64_t ld_rows, int64_t num_keys, int64_t num_queries,
                                  const float* HWY_RESTRICT visible,
                                  const float* HWY_RESTRICT lse_log2,
                                  const float* HWY_RESTRICT delta, float scale, float weight) {
  const FloatTag d;
  const FloatVec factor = hn::Set(d, scale), m = hn::Set(d, weight);
  // P = m exp(S - lse) is at most 1, which bounds the exponential; for m = 0 nothing does, and its
  // gradient, which SoftTop-k multiplies by 0, must stay finite.
  const FloatVec ceiling =
      hn::Set(d, weight > 0.0f ? std::min(1.0f - std::log2(weight), 100.0f) : 64.0f);
  FloatVec d_weight = hn::Zero(d);
  for (int64_t c = 0; c < num_keys; ++c, p_t += ld_rows, ds_t += ld_rows) {
    for_each_vector(num_queries, [&](int64_t at) HWY_ATTR {
      FloatVec exponent = hn::Sub(hn::LoadU(d, p_t + at), hn::LoadU(d, lse_log2 + at));
      if constexpr (kHasWeight) exponent = hn::Min(exponent, ceiling);
      FloatVec p = exp2_clamped(exponent);
      if constexpr (kIsPartial) {
        p = hn::IfThenElseZero(hn::Ne(hn::LoadU(d, visible + at), hn::Zero(d)), p);
      }
      const FloatVec dp = hn::Sub(hn::LoadU(d, ds_t + at), hn::LoadU(d, delta + at));
      if constexpr (kHasWeight) {
        d_weight = hn::MulAdd(p, dp, d_weight);
        p = hn::Mul(m, p);
      }
      hn::StoreU(p, d, p_t + at);
      hn::StoreU(hn::Mul(hn::Mul(factor, p), dp), d, ds_t + at);
    });
  }
  return kHasWeight ? hn::GetLane(hn::SumOfLanes(d, d_weight)) : 0.0f;
}

/// One wave of (batch, kv head) pairs.
class Wave {
 public:
  Wave(const BackwardSpace& space, const BackwardArgs& args, const Stream& stream, int64_t first,
       int64_t num_slots)
      : space_(space),
        plan_(space.plan),
        p_(space.plan.problem),
        args_(args),
        stream_(stream),
        pairs_(space.plan, args.block_map, args.tile_bits,
               space.has_skip ? p_.skip.rows : p_.bit_rows),
        query_order_(args.query_order),
        key_order_(args.key_order),
        sequences_(space.plan.problem),
        finds_mean_(p_.smooth_k && !args.k_mean),
        is_soft_(p_.block_map == BlockMap::kSoft),
        feature_tiles_(space.feature_tiles(args.weights)),
        first_(first),
        num_slots_(num_slots) {}

  void run() const {
    if (finds_mean_) {
      run_tasks(plan_, stream_, num_slots_ * kChunks,
                [&](int64_t task, int64_t) { load_keys(task); });
      means_of_slots();
    }
    run_tasks(plan_, stream_, num_slots_ * kChunks,
              [&](int64_t task, int64_t worker) { keys_in(task, worker); });
    if (space_.is_linear) {
      run_tasks(plan_, stream_, num_slots_ * space_.group, [&](int64_t task, int64_t) {
        const int64_t n = task / space_.group, g = task % space_.group;
        fill_linear_mask(plan_, pairs_, batch_of(n), kv_head_of(n) * space_.group + g,
                         space_.head(space_.slot(n), g).mask, space_.ld_mask);
      });
      run_tasks(plan_, stream_, num_slots_ * kFeatureSlices,
                [&](int64_t task, int64_t) { sum_key_states(task); });
    }
    run_tasks(plan_, stream_, num_slots_ * kChunks,
              [&](int64_t task, int64_t worker) { queries_in(task, worker); });
    if (space_.is_linear) {
      run_tasks(plan_, stream_, num_slots_ * kFeatureSlices,
                [&](int64_t task, int64_t) { sum_query_states(task); });
    }
    std::fill_n(space_.progress, num_slots_ * kChunks, 0);
    run_tasks(plan_, stream_, kChunks * num_slots_ * kChunks, [&](int64_t task, int64_t worker) {
      tiles(task % (num_slots_ * kChunks), task / (num_slots_ * kChunks), worker);
    });
    const bool is_centred = p_.smooth_k && space_.is_linear;
    if (is_centred) {
      run_tasks(plan_, stream_, num_slots_ * kChunks,
                [&](int64_t task, int64_t worker) { linear_keys_in(task, worker); });
      means_of_slots();
    }
    run_tasks(plan_, stream_, num_slots_ * kChunks, [&](int64_t task, int64_t worker) {
      if (space_.is_linear && !is_centred) linear_keys_in(task, worker);
      keys_out(task, is_centred);
      queries_out(task);
    });
    add_weight_grads();
  }

 private:
  int64_t batch_of(int64_t n) const { return (first_ + n) / p_.num_kv_heads; }
  int64_t kv_head_of(int64_t n) const { return (first_ + n) % p_.num_kv_heads; }

  FeatureWeightGrads feature_grads(float* per_chunk, int64_t chunk) const {
    if (!space_.is_hedgehog) return {};
    float* weight = per_chunk + chunk * space_.grad_floats;
    return {weight, weight + p_.head_dim * space_.ld};
  }

  /// Replaces the block sums in k_mean by the means of sequences.
  void means_of_slots() const {
    run_tasks(plan_, stream_, num_slots_, [&](int64_t n, int64_t) {
      means_of_sequences(plan_.key_blocks, p_.head_dim, space_.ld, space_.slot(n).k_mean);
    });
  }

  /// Loads a chunk of k and v, and into k_mean the mean keys or, where they are still to be found,
  /// the block sums of k.
  void load_keys(int64_t task) const {
    const int64_t n = task / kChunks, ld = space_.ld, b = batch_of(n), h_kv = kv_head_of(n);
    const BackwardSpace::Slot slot = space_.slot(n);
    const BlockRange blocks = share(space_.num_key_blocks, task % kChunks, kChunks);
    for (int64_t j = blocks.begin; j < blocks.end; ++j) {
      const Block& block = plan_.key_blocks[j];
      const int64_t at = block.begin * ld;
      load_rows(args_.k, b, h_kv, block.begin, block.rows, 1.0f, slot.k + at, ld, key_order_);
      load_rows(args_.v, b, h_kv, block.begin, block.rows, 1.0f, slot.v + at, ld, key_order_);
      if (finds_mean_) {
        column_sums(slot.k + at, ld, block.rows, p_.head_dim, slot.k_mean + j * ld);
      } else if (p_.smooth_k) {
        load_rows(args_.k_mean, b, h_kv, sequences_[block.sequence], 1, 1.0f, slot.k_mean + j * ld,
                  ld);
      }
    }
  }

  /// Stages a chunk of k and v, clears their gradients, computes h_j and z_j.
  void keys_in(int64_t task, int64_t worker) const {
    const int64_t n = task / kChunks, chunk = task % kChunks, ld = space_.ld;
    const BackwardSpace::Slot slot = space_.slot(n);
    const BackwardSpace::Worker w = space_.worker(worker);
    if (!finds_mean_) load_keys(task);
    if (space_.is_hedgehog) {
      std::fill_n(slot.d_feature + chunk * space_.grad_floats, space_.grad_floats, 0.0f);
    }
    const BlockRange blocks = share(space_.num_key_blocks, chunk, kChunks);
    for (int64_t j = blocks.begin; j < blocks.end; ++j) {
      const Block& block = plan_.key_blocks[j];
      const int64_t at = block.begin * ld;
      if (p_.smooth_k) {
        subtract_row(slot.k_mean + j * ld, ld, block.rows, p_.head_dim, slot.k + at);
      }
      std::fill_n(slot.d_k + at, block.rows * ld, 0.0f);
      std::fill_n(slot.d_v + at, block.rows * ld, 0.0f);
      if (!space_.is_linear) continue;
      feature_map(p_.feature_map, p_.head_dim, feature_tiles_.key(kv_head_of(n)), slot.k + at,
                  block.rows, w.y, w.phi);
      block_state(space_.num_features, p_.head_dim, w.phi, slot.v + at, nullptr, block.rows,
                  key_state(slot, j));
    }
  }

  /// Stages a chunk of q and d_o for each query head of the group; delta; everything of the linear
  /// branch that belongs to queries.
  void queries_in(int64_t task, int64_t worker) const {
    const int64_t n = task / kChunks, chunk = task % kChunks, ld = space_.ld,
                  ld_rows = space_.ld_rows;
    const BackwardSpace::Slot slot = space_.slot(n);
    const BackwardSpace::Worker w = space_.worker(worker);
    if (space_.has_projection)
      std::fill_n(slot.d_proj + chunk * space_.grad_floats, space_.grad_floats, 0.0f);
    const BlockRange blocks = share(space_.num_query_blocks, chunk, kChunks);
    for (int64_t g = 0; g < space_.group; ++g) {
      const int64_t b = batch_of(n), h = kv_head_of(n) * space_.group + g;
      const BackwardSpace::Head head = space_.head(slot, g);
      if (space_.is_hedgehog) {
        std::fill_n(head.d_feature + chunk * space_.grad_floats, space_.grad_floats, 0.0f);
      }
      for (int64_t i = blocks.begin; i < blocks.end; ++i) {
        const Block& block = plan_.query_blocks[i];
        const int64_t at = block.begin * ld;
        load_rows(args_.q, b, h, block.begin, block.rows, 1.0f, head.q + at, ld, query_order_);
        load_rows(args_.d_o, b, h, block.begin, block.rows, 1.0f, head.d_o + at, ld, query_order_);
        load_rows(args_.o, b, h, block.begin, block.rows, 1.0f, w.o, ld, query_order_);
        if (is_soft_) std::fill_n(d_block_map(b, h, i), space_.num_key_blocks, 0.0f);
        std::fill_n(head.d_q + at, block.rows * ld, 0.0f);
        float* const lse_log2 = head.lse_log2 + i * ld_rows;
        float* const delta = head.delta + i * ld_rows;
        const float* const lse = args_.lse.row<const float>(0, b, h);
        for (int64_t r = 0; r < ld_rows; ++r) {
          const float lse_r = r < block.rows ? lse[query_order_[block.begin + r]] : -HUGE_VALF;
          lse_log2[r] = lse_r != -HUGE_VALF ? lse_r * kLog2E : HUGE_VALF;
          delta[r] = r < block.rows ? dot(p_.head_dim, head.d_o + at + r * ld, w.o + r * ld) : 0.0f;
        }
        if (!space_.is_linear) continue;
        if (block.is_protected) {
          clear_state(query_state(head, i));
          for (int64_t r = 0; p_.combine == Combine::kBlend && r < block.rows; ++r) {
            *d_alpha_logit(b, h, block.begin + r) = 0.0f;
          }
        } else {
          linear_queries(slot, head, w, b, h, i, chunk, delta);
        }
      }
    }
  }

  void linear_queries(const BackwardSpace::Slot& slot, const BackwardSpace::Head& head,
                      const BackwardSpace::Worker& w, int64_t b, int64_t h, int64_t i,
                      int64_t chunk, float* delta) const {
    const Block& block = plan_.query_blocks[i];
    const int64_t rows = block.rows, head_dim = p_.head_dim, features = space_.num_features;
    const int64_t ld = space_.ld, ld_phi = space_.ld_phi;
    const float* const q = head.q + block.begin * ld;
    float* const d_o = head.d_o + block.begin * ld;

    // The forward's o_l again.
    feature_map(p_.feature_map, head_dim, feature_tiles_.query(h), q, rows, w.y, w.phi);
    const float* const sum = head.sums + i * space_.ld_sum;
    const float* const z = sum + features * ld;
    linear_output(p_, space_, head.mask + i * space_.ld_mask, w.phi, sum, rows, w.o_l,
                  w.inverse_den);

    // Through the combination: d_o_l, d_l, and what delta holds beyond the sparse branch.
    const float* d_o_l = d_o;
    if (space_.has_projection) {
      gemm<Into::kOverwrite>(rows, pad(head_dim), head_dim, rows_of(d_o, ld), space_.proj, ld,
                             w.d_o_l, ld);
      d_o_l = w.d_o_l;
      float* const d_weight = slot.d_proj + chunk * space_.grad_floats;
      float* const d_bias = d_weight + head_dim * ld;
      gemm<Into::kAdd>(head_dim, pad(head_dim), rows, columns_of(d_o, ld), w.o_l, ld, d_weight, ld);
      for (int64_t r = 0; r < rows; ++r) {
        add_scaled(head_dim, 1.0f, d_o + r * ld, d_bias);
        delta[r] -= dot(head_dim, d_o + r * ld, space_.proj_bias);
      }
    }
    if (p_.combine == Combine::kBlend) {
      const float* const logits = args_.weights.alpha_logit.row<const float>(0, b, h);
      for (int64_t r = 0; r < rows; ++r) {
        const Shares share = blend_shares(logits[query_order_[block.begin + r]], w.inverse_den[r]);
        // d_alpha a (1 - a) = dO (o_s - o_l) a (1 - a), and a (o_s - o_l) = o - o_l.
        *d_alpha_logit(b, h, block.begin + r) =
            share.linear * (delta[r] - dot(head_dim, d_o + r * ld, w.o_l + r * ld));
        std::fill_n(w.d_o_l + r * ld, pad(head_dim), 0.0f);
        add_scaled(head_dim, share.linear, d_o + r * ld, w.d_o_l + r * ld);
        scale_row(head_dim, share.sparse, d_o + r * ld);
      }
      d_o_l = w.d_o_l;
    }
    for (int64_t r = 0; r < rows; ++r) {
      w.d_l[r] = dot(head_dim, d_o_l + r * ld, w.o_l + r * ld);
      delta[r] -= w.d_l[r];
    }

    // dH_i = A^T d_o_l, dZ_i = -A^T d_l.
    for (int64_t r = 0; r < rows; ++r) {
      std::fill_n(w.a + r * ld_phi, pad(features), 0.0f);
      if (w.inverse_den[r] != 0.0f) {
        add_scaled(features, w.inverse_den[r], w.phi + r * ld_phi, w.a + r * ld_phi);
      }
      w.d_l[r] = -w.d_l[r];
    }
    block_state(features, head_dim, w.a, d_o_l, w.d_l, rows, query_state(head, i));

    // dphi(q), through the map into d_q.
    transpose(sum, ld, features, head_dim, 1.0f, w.sum_t, ld_phi);
    gemm<Into::kOverwrite>(rows, pad(features), head_dim, rows_of(d_o_l, ld), w.sum_t, ld_phi,
                           w.d_phi, ld_phi);
    for (int64_t r = 0; r < rows; ++r) {
      float* const row = w.d_phi + r * ld_phi;
      if (w.inverse_den[r] == 0.0f) {
        std::fill_n(row, pad(features), 0.0f);
      } else {
        add_scaled(features, w.d_l[r], z, row);
        scale_row(features, w.inverse_den[r], row);
      }
    }
    feature_map_backward(p_.feature_map, head_dim, feature_tiles_.query(h), q, w.phi, w.d_phi, rows,
                         w.y, head.d_q + block.begin * ld, feature_grads(head.d_feature, chunk));
  }

  /// The tiles of query chunk r and key chunk (r + step) mod kChunks. Query chunk r must
  /// have done its previous step (it adds to the same d_q), and so must query chunk r + 1 (to the
  /// same d_k and d_v). Tasks start in the order of their steps, so what is waited for is under
  /// way.
  void tiles(int64_t task, int64_t step, int64_t worker) const {
    const int64_t n = task / kChunks, r = task % kChunks;
    std::atomic_ref<int32_t> own(space_.progress[task]);
    wait_for(own, step);
    wait_for(std::atomic_ref<int32_t>(space_.progress[n * kChunks + (r + 1) % kChunks]), step);
    tiles_of_chunks(n, r, (r + step) % kChunks, worker);
    own.store(static_cast<int32_t>(step) + 1, std::memory_order_release);
  }

  static void wait_for(std::atomic_ref<int32_t> progress, int64_t step) {
    while (progress.load(std::memory_order_acquire) < step) std::this_thread::yield();
  }

  void tiles_of_chunks(int64_t n, int64_t r, int64_t c, int64_t worker) const {
    const int64_t ld = space_.ld, b = batch_of(n);
    const BackwardSpace::Slot slot = space_.slot(n);
    const BackwardSpace::Worker w = space_.worker(worker);
    const BlockRange query_chunk = share(space_.num_query_blocks, r, kChunks);
    const BlockRange key_chunk = share(space_.num_key_blocks, c, kChunks);
    for (int64_t g = 0; g < space_.group; ++g) {
      const int64_t h = kv_head_of(n) * space_.group + g;
      const BackwardSpace::Head head = space_.head(slot, g);
      for (int64_t i = query_chunk.begin; i < query_chunk.end; ++i) {
        const Block& queries = plan_.query_blocks[i];
        const bool has_sparse = p_.combine != Combine::kLinear || queries.is_protected;
        if (!has_sparse && !is_soft_) continue;
        const BlockRange sequence = blocks_of_sequence(plan_.key_blocks, queries.sequence);
        bool is_transposed = false;
        const int64_t end = std::min(key_chunk.end, sequence.end);
        for (int64_t j = std::max(key_chunk.begin, sequence.begin); j < end; ++j) {
          const float weight = has_sparse ? pairs_.sparse_weight(b, h, i, j) : 0.0f;
          const bool has_map_grad = is_soft_ && !pairs_.is_protected(i, j);
          if (!(weight > 0.0f) && !has_map_grad) continue;
          if (has_sparse && !is_transposed) {  // cheaper than to keep both orders: they would come
                                               // from memory
            const int64_t at = queries.begin * ld, ld_rows = space_.ld_rows;
            transpose(head.q + at, ld, queries.rows, p_.head_dim,
                      static_cast<float>(p_.softmax_scale) * kLog2E, w.q_t, ld_rows);
            transpose(head.d_o + at, ld, queries.rows, p_.head_dim, 1.0f, w.d_o_t, ld_rows);
            is_transposed = true;
          }
          float d_map = has_sparse ? tile(slot, head, w, b, h, i, j, weight) : 0.0f;
          if (!has_map_grad) continue;
          if (space_.is_linear) {
            d_map -= state_dot(space_.num_features, p_.head_dim, key_state(slot, j),
                               query_state(head, i));
          }
          d_block_map(b, h, i)[j] = d_map;
        }
      }
    }
  }

  /// One tile of the sparse branch; returns its gradient of m under a soft map.
  float tile(const BackwardSpace::Slot& slot, const BackwardSpace::Head& head,
             const BackwardSpace::Worker& w, int64_t b, int64_t h, int64_t i, int64_t j,
             float weight) const {
    const Block& queries = plan_.query_blocks[i];
    const Block& keys = plan_.key_blocks[j];
    const int64_t ld = space_.ld, ld_rows = space_.ld_rows, head_dim = p_.head_dim;
    const int64_t at = keys.begin * ld;
    const RowRuns runs = pairs_.rows(b, h, i, j, w.visible);
    const auto softmax =
        is_soft_ ? runs.is_partial ? softmax_backward<true, true> : softmax_backward<true, false>
        : runs.is_partial ? softmax_backward<false, true>
                          : softmax_backward<false, false>;
    float d_map = 0.0f;
    for (const auto [begin, end] : runs) {
      const int64_t rows = end - begin, row = (queries.begin + begin) * ld;
      const int64_t statistic = i * ld_rows + begin;
      float* const p_t = w.p_t + begin;
      float* const ds_t = w.ds_t + begin;
      gemm<Into::kOverwrite>(keys.rows, pad(rows), head_dim, rows_of(slot.k + at, ld),
                             w.q_t + begin, ld_rows, p_t, ld_rows);
      gemm<Into::kOverwrite>(keys.rows, pad(rows), head_dim, rows_of(slot.v + at, ld),
                             w.d_o_t + begin, ld_rows, ds_t, ld_rows);
      d_map +=
          softmax(p_t, ds_t, ld_rows, keys.rows, rows, w.visible + begin, head.lse_log2 + statistic,
                  head.delta + statistic, static_cast<float>(p_.softmax_scale), weight);
      if (!(weight > 0.0f)) continue;
      gemm<Into::kAdd>(keys.rows, pad(head_dim), rows, rows_of(p_t, ld_rows), head.d_o + row, ld,
                       slot.d_v + at, ld);
      gemm<Into::kAdd>(keys.rows, pad(head_dim), rows, rows_of(ds_t, ld_rows), head.q + row, ld,
                       slot.d_k + at, ld);
      gemm<Into::kAdd>(rows, pad(head_dim), keys.rows, columns_of(ds_t, ld_rows), slot.k + at, ld,
                       head.d_q + row, ld);
    }
    return d_map;
  }

  /// The linear branch's share of d_k and d_v for a chunk of keys.
  void linear_keys_in(int64_t task, int64_t worker) const {
    const int64_t n = task / kChunks, chunk = task % kChunks;
    const BackwardSpace::Slot slot = space_.slot(n);
    const BackwardSpace::Worker w = space_.worker(worker);
    const BlockRange blocks = share(space_.num_key_blocks, chunk, kChunks);
    for (int64_t j = blocks.begin; j < blocks.end; ++j) linear_keys(slot, w, n, j, chunk);
  }

  /// Stores d_k and d_v of a chunk of keys, d_k less the mean of the linear branch's share in it.
  void keys_out(int64_t task, bool is_centred) const {
    const int64_t n = task / kChunks, ld = space_.ld, b = batch_of(n), h_kv = kv_head_of(n);
    const BackwardSpace::Slot slot = space_.slot(n);
    const BlockRange blocks = share(space_.num_key_blocks, task % kChunks, kChunks);
    for (int64_t j = blocks.begin; j < blocks.end; ++j) {
      const Block& block = plan_.key_blocks[j];
      float* const d_k = slot.d_k + block.begin * ld;
      if (is_centred) subtract_row(slot.k_mean + j * ld, ld, block.rows, p_.head_dim, d_k);
      store_rows(d_k, ld, args_.d_k, b, h_kv, block.begin, block.rows, key_order_);
      store_rows(slot.d_v + block.begin * ld, ld, args_.d_v, b, h_kv, block.begin, block.rows,
                 key_order_);
    }
  }

  void linear_keys(const BackwardSpace::Slot& slot, const BackwardSpace::Worker& w, int64_t n,
                   int64_t j, int64_t chunk) const {
    const Block& block = plan_.key_blocks[j];
    const int64_t head_dim = p_.head_dim, features = space_.num_features;
    const int64_t ld = space_.ld, ld_phi = space_.ld_phi, at = block.begin * ld;
    const float* const d_sum = slot.d_sums + j * space_.ld_sum;
    const float* const d_z = d_sum + features * ld;
    feature_map(p_.feature_map, head_dim, feature_tiles_.key(kv_head_of(n)), slot.k + at,
                block.rows, w.y, w.phi);
    gemm<Into::kAdd>(block.rows, pad(head_dim), features, rows_of(w.phi, ld_phi), d_sum, ld,
                     slot.d_v + at, ld);
    transpose(d_sum, ld, features, head_dim, 1.0f, w.sum_t, ld_phi);
    gemm<Into::kOverwrite>(block.rows, pad(features), head_dim, rows_of(slot.v + at, ld), w.sum_t,
                           ld_phi, w.d_phi, ld_phi);
    for (int64_t r = 0; r < block.rows; ++r) add_scaled(features, 1.0f, d_z, w.d_phi + r * ld_phi);
    float* const d_k = p_.smooth_k ? w.d_k : slot.d_k + at;
    if (p_.smooth_k) std::fill_n(d_k, block.rows * ld, 0.0f);
    feature_map_backward(p_.feature_map, head_dim, feature_tiles_.key(kv_head_of(n)), slot.k + at,
                         w.phi, w.d_phi, block.rows, w.y, d_k,
                         feature_grads(slot.d_feature, chunk));
    if (!p_.smooth_k) return;
    column_sums(d_k, ld, block.rows, head_dim, slot.k_mean + j * ld);
    for (int64_t r = 0; r < block.rows; ++r) {
      add_scaled(head_dim, 1.0f, d_k + r * ld, slot.d_k + at + r * ld);
    }
  }

  void queries_out(int64_t task) const {
    const int64_t n = task / kChunks, ld = space_.ld;
    const BackwardSpace::Slot slot = space_.slot(n);
    const BlockRange blocks = share(space_.num_query_blocks, task % kChunks, kChunks);
    for (int64_t g = 0; g < space_.group; ++g) {
      const BackwardSpace::Head head = space_.head(slot, g);
      for (int64_t i = blocks.begin; i < blocks.end; ++i) {
        const Block& block = plan_.query_blocks[i];
        store_rows(head.d_q + block.begin * ld, ld, args_.d_q, batch_of(n),
                   kv_head_of(n) * space_.group + g, block.begin, block.rows, query_order_);
      }
    }
  }

  float* d_block_map(int64_t b, int64_t h, int64_t i) const {
    return args_.d_block_map.row<float>(b, h, i);
  }
  /// Of the query at a position.
  float* d_alpha_logit(int64_t b, int64_t h, int64_t position) const {
    return args_.d_weights.alpha_logit.row<float>(0, b, h) + query_order_[position];
  }
  StateView key_state(const BackwardSpace::Slot& slot, int64_t j) const {
    return state_of(slot.states, j, space_.num_key_blocks, space_.num_features, p_.head_dim);
  }
  StateView query_state(const BackwardSpace::Head& head, int64_t i) const {
    return state_of(head.d_states, i, space_.num_query_blocks, space_.num_features, p_.head_dim);
  }
  void clear_state(StateView state) const {
    for (int64_t f = 0; f < space_.num_features; ++f) {
      std::fill_n(state.h + f * state.h_row, pad(p_.head_dim), 0.0f);
    }
    std::fill_n(state.z, pad(space_.num_features), 0.0f);
  }

  /// (H_i, Z_i) of every query block, for a slice of the features.
  void sum_key_states(int64_t task) const {
    const BackwardSpace::Slot slot = space_.slot(task / kFeatureSlices);
    for (int64_t g = 0; g < space_.group; ++g) {
      const BackwardSpace::Head head = space_.head(slot, g);
      sum_states<Into::kOverwrite>(
          rows_of(head.mask, space_.ld_mask), space_.num_query_blocks, space_.num_key_blocks,
          slot.states, space_.num_features, p_.head_dim,
          share(space_.num_features + 1, task % kFeatureSlices, kFeatureSlices), head.sums);
    }
  }

  /// (dH^j, dZ^j) of every key block, over the whole group, for a slice of the features.
  void sum_query_states(int64_t task) const {
    const BackwardSpace::Slot slot = space_.slot(task / kFeatureSlices);
    const BlockRange features =
        share(space_.num_features + 1, task % kFeatureSlices, kFeatureSlices);
    for (int64_t g = 0; g < space_.group; ++g) {
      const BackwardSpace::Head head = space_.head(slot, g);
      const auto sum = g == 0 ? sum_states<Into::kOverwrite> : sum_states<Into::kAdd>;
      sum(columns_of(head.mask, space_.ld_mask), space_.num_key_blocks, space_.num_query_blocks,
          head.d_states, space_.num_features, p_.head_dim, features, slot.d_sums);
    }
  }

  /// Adds the chunks' weight gradients to the totals, in a fixed order.
  void add_weight_grads() const {
    const int64_t num = space_.grad_floats;
    for (int64_t n = 0; n < num_slots_; ++n) {
      const BackwardSpace::Slot slot = space_.slot(n);
      const int64_t h_kv = kv_head_of(n);
      for (int64_t at = 0; at < kChunks * num; at += num) {
        if (space_.has_projection) add_scaled(num, 1.0f, slot.d_proj + at, space_.d_projection());
        if (!space_.is_hedgehog) continue;
        for (int64_t g = 0; g < space_.group; ++g) {
          add_scaled(num, 1.0f, space_.head(slot, g).d_feature + at,
                     space_.d_query_feature(h_kv * space_.group + g));
        }
        add_scaled(num, 1.0f, slot.d_feature + at, space_.d_key_feature(h_kv));
      }
    }
  }

  const BackwardSpace& space_;
  const Plan& plan_;
  const Problem& p_;
  const BackwardArgs& args_;
  const Stream& stream_;
  const BlockPairs pairs_;
  const RowOrder query_order_, key_order_;
  const SequenceRows sequences_;
  const bool finds_mean_;  // of the keys; else it is given, or not needed
  const bool is_soft_;
  const FeatureWeightTiles feature_tiles_;
  const int64_t first_, num_slots_;
};

void store_weight_grads(const BackwardSpace& space, const Weights& out) {
  const auto store = [&](const float* grads, const TensorView& weight, const TensorView& bias,
                         int64_t head) {
    if (weight) store_rows(grads, space.ld, weight, 0, head, 0, space.head_dim);
    if (bias) store_rows(grads + space.head_dim * space.ld, 0, bias, 0, 0, head, 1);
  };
  if (space.has_projection) store(space.d_projection(), out.proj_weight, out.proj_bias, 0);
  if (!space.is_hedgehog) return;
  for (int64_t h = 0; h < space.num_heads; ++h) {
    store(space.d_query_feature(h), out.feature_weight_q, out.feature_bias_q, h);
  }
  for (int64_t h = 0; h < space.num_kv_heads; ++h) {
    store(space.d_key_feature(h), out.feature_weight_k, out.feature_bias_k, h);
  }
}

}  // namespace

void Backward(const Plan& plan, const BackwardArgs& args, std::byte* workspace,
              const Stream& stream) {
  const BackwardSpace space(plan, workspace);
  stage_feature_weights(args.weights, space.feature_tiles(args.weights));
  if (space.has_projection) {
    load_rows(args.weights.proj_weight, 0, 0, 0, space.head_dim, 1.0f, space.proj, space.ld);
    stage_bias(args.weights.proj_bias, space.head_dim, space.proj_bias);
  }
  std::fill_n(space.d_weights, space.num_weight_grads * space.grad_floats, 0.0f);
  const int64_t num_pairs = plan.problem.batch * plan.problem.num_kv_heads;
  for (int64_t first = 0; first < num_pairs; first += plan.heads_per_wave) {
    Wave(space, args, stream, first, std::min(plan.heads_per_wave, num_pairs - first)).run();
  }
  store_weight_grads(space, args.d_weights);
}

const char* TargetName() { return hwy::TargetName(HWY_TARGET); }

}  // namespace sparline::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace sparline::cpu {

HWY_EXPORT(Backward);
HWY_EXPORT(TargetName);

int64_t backward_workspace_bytes(const Plan& plan) {
  return BackwardSpace(plan, nullptr).total_bytes;
}

void backward(const Plan& plan, const BackwardArgs& args, std::byte* workspace,
              const Stream& stream) {
  HWY_DYNAMIC_DISPATCH(Backward)(plan, args, workspace, stream);
}

std::string simd_target() { return HWY_DYNAMIC_DISPATCH(TargetName)(); }

}  // namespace sparline::cpu
#endif
