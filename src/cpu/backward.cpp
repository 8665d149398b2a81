// SPDX-License-Identifier: Apache-2.0
//
// Sparse-linear attention, backward (docs/math.md); the block map is constant.
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
//   so that o_s is not needed.
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

#include "core/workspace.h"
#include "cpu/kernels.h"
#include "cpu/layout.h"
#include "cpu/linear-inl.h"

#ifndef SPARLINE_CPU_BACKWARD_SPACE_
#define SPARLINE_CPU_BACKWARD_SPACE_
namespace sparline::cpu {

constexpr int64_t kChunks = 8;

/// Everything the backward keeps in its workspace.
struct BackwardSpace {
  struct Head {  // one query head in flight; rows of block i begin at its first row, columns at i *
                 // ld_rows
    float* q;    // (N_q x ld)
    float* d_o;  // (N_q x ld)
    float* d_q;  // (N_q x ld)
    float* q_t;  // (T_m, D x ld_rows), scaled by softmax_scale log2(e)
    float* d_o_t;      // (T_m, D x ld_rows)
    float* lse_log2;   // (T_m, ld_rows), +inf where a row has no critical key
    float* delta;      // (T_m, ld_rows)
    float* mask;       // (T_m x ld_mask): E_i
    float* sums;       // per query block: (H_i, Z_i)
    float* d_states;   // (dH_i, dZ_i) of all query blocks
    float* d_feature;  // per chunk, gradients of the query feature map
  };
  struct Slot {        // one (batch, kv head) in flight
    float* k;          // (N_k x ld)
    float* v;          // (N_k x ld)
    float* d_k;        // (N_k x ld)
    float* d_v;        // (N_k x ld)
    float* states;     // (h_j, z_j) of all key blocks
    float* d_sums;     // per key block: (dH^j, dZ^j)
    float* d_proj;     // per chunk, gradients of the projection
    float* d_feature;  // per chunk, gradients of the key feature map
    std::byte* heads;
  };
  struct Worker {
    float* p_t;          // (block_k x ld_rows)
    float* ds_t;         // (block_k x ld_rows)
    float* o;            // (block_q x ld)
    float* o_l;          // (block_q x ld)
    float* d_o_l;        // (block_q x ld)
    float* y;            // (max block x ld)
    float* phi;          // (max block x ld_phi)
    float* a;            // (block_q x ld_phi)
    float* d_phi;        // (max block x ld_phi)
    float* sum_t;        // (D x ld_phi): H^T
    float* inverse_den;  // (block_q)
    float* d_l;          // (block_q)
  };

  const Plan& plan;
  int64_t num_features, ld, ld_rows, ld_phi, ld_mask, ld_sum;
  int64_t num_query_blocks, num_key_blocks, group, grad_floats;
  float* proj;       // W (D x ld)
  float* features;   // per head W, W^T, b
  float* d_proj;     // (grad_floats)
  float* d_feature;  // per head (grad_floats)
  std::byte* slots;
  std::byte* workers;
  int64_t head_bytes, slot_bytes, worker_bytes, total_bytes;

  BackwardSpace(const Plan& plan_in, std::byte* base) : plan(plan_in) {
    const Problem& p = plan.problem;
    num_features = feature_dim(p);
    ld = leading_dim(p.head_dim);
    ld_rows = leading_dim(p.block_q);
    ld_phi = leading_dim(num_features);
    num_query_blocks = static_cast<int64_t>(plan.query_blocks.size());
    num_key_blocks = static_cast<int64_t>(plan.key_blocks.size());
    ld_mask = leading_dim(num_key_blocks);
    ld_sum = sum_floats(num_features, p.head_dim);
    group = p.num_heads / p.num_kv_heads;
    grad_floats = p.head_dim * ld + pad(p.head_dim);
    const int64_t feature_heads = has_feature_weights(p) ? p.num_heads + p.num_kv_heads : 0;
    Arena arena(base), head_arena, slot_arena, worker_arena;
    carve_head(head_arena);
    head_bytes = head_arena.used_bytes();
    carve_slot(slot_arena);
    slot_bytes = slot_arena.used_bytes();
    carve_worker(worker_arena);
    worker_bytes = worker_arena.used_bytes();
    proj = arena.take<float>(has_projection() * p.head_dim * ld);
    features = arena.take<float>(feature_heads * weight_floats());
    d_proj = arena.take<float>(has_projection() * grad_floats);
    d_feature = arena.take<float>(feature_heads * grad_floats);
    slots = arena.take<std::byte>(plan.heads_per_wave * slot_bytes);
    workers = arena.take<std::byte>(plan.target.num_threads * worker_bytes);
    total_bytes = arena.used_bytes();
  }

  int64_t has_projection() const { return plan.problem.combine == Combine::kProjection ? 1 : 0; }
  int64_t weight_floats() const {
    return 2 * plan.problem.head_dim * ld + pad(plan.problem.head_dim);
  }
  float* head_weights(int64_t head) const { return features + head * weight_floats(); }

  Slot slot(int64_t n) const {
    Arena arena(slots + n * slot_bytes);
    return carve_slot(arena);
  }
  Head head(const Slot& slot, int64_t g) const {
    Arena arena(slot.heads + g * head_bytes);
    return carve_head(arena);
  }
  Worker worker(int64_t n) const {
    Arena arena(workers + n * worker_bytes);
    return carve_worker(arena);
  }

 private:
  Head carve_head(Arena& arena) const {
    const Problem& p = plan.problem;
    const int64_t linear = has_linear_branch(p) ? 1 : 0;
    return {arena.take<float>(p.num_queries * ld),
            arena.take<float>(p.num_queries * ld),
            arena.take<float>(p.num_queries * ld),
            arena.take<float>(num_query_blocks * p.head_dim * ld_rows),
            arena.take<float>(num_query_blocks * p.head_dim * ld_rows),
            arena.take<float>(num_query_blocks * ld_rows),
            arena.take<float>(num_query_blocks * ld_rows),
            arena.take<float>(linear * num_query_blocks * ld_mask),
            arena.take<float>(linear * num_query_blocks * ld_sum),
            arena.take<float>(linear * states_floats(num_query_blocks, num_features, p.head_dim)),
            arena.take<float>(has_feature_weights(p) ? kChunks * grad_floats : 0)};
  }
  Slot carve_slot(Arena& arena) const {
    const Problem& p = plan.problem;
    const int64_t linear = has_linear_branch(p) ? 1 : 0;
    return {arena.take<float>(p.num_keys * ld),
            arena.take<float>(p.num_keys * ld),
            arena.take<float>(p.num_keys * ld),
            arena.take<float>(p.num_keys * ld),
            arena.take<float>(linear * states_floats(num_key_blocks, num_features, p.head_dim)),
            arena.take<float>(linear * num_key_blocks * ld_sum),
            arena.take<float>(has_projection() * kChunks * grad_floats),
            arena.take<float>(has_feature_weights(p) ? kChunks * grad_floats : 0),
            arena.take<std::byte>(group * head_bytes)};
  }
  Worker carve_worker(Arena& arena) const {
    const Problem& p = plan.problem;
    const int64_t linear = has_linear_branch(p) ? 1 : 0;
    const int64_t max_rows = std::max(p.block_q, p.block_k);
    return {arena.take<float>(p.block_k * ld_rows),
            arena.take<float>(p.block_k * ld_rows),
            arena.take<float>(p.block_q * ld),
            arena.take<float>(linear * p.block_q * ld),
            arena.take<float>(linear * p.block_q * ld),
            arena.take<float>(linear * max_rows * ld),
            arena.take<float>(linear * max_rows * ld_phi),
            arena.take<float>(linear * p.block_q * ld_phi),
            arena.take<float>(linear * max_rows * ld_phi),
            arena.take<float>(linear * p.head_dim * ld_phi),
            arena.take<float>(linear * p.block_q),
            arena.take<float>(linear * p.block_q)};
  }
};

}  // namespace sparline::cpu
#endif  // SPARLINE_CPU_BACKWARD_SPACE_

HWY_BEFORE_NAMESPACE();
namespace sparline::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;
namespace {

/// P^T = exp2(S^T - lse_log2) over S^T, and dS^T = scale P^T (dP^T - delta) over dP^T; both
/// (num_keys x num_queries).
HWY_INLINE void softmax_backward(float* HWY_RESTRICT p_t, float* HWY_RESTRICT ds_t, int64_t ld_rows,
                                 int64_t num_keys, int64_t num_queries,
                                 const float* HWY_RESTRICT lse_log2,
                                 const float* HWY_RESTRICT delta, float scale) {
  const FloatTag d;
  const FloatVec factor = hn::Set(d, scale);
  for (int64_t c = 0; c < num_keys; ++c, p_t += ld_rows, ds_t += ld_rows) {
    for_each_vector(num_queries, [&](int64_t at) HWY_ATTR {
      const FloatVec p = exp2_clamped(hn::Sub(hn::LoadU(d, p_t + at), hn::LoadU(d, lse_log2 + at)));
      const FloatVec dp = hn::Sub(hn::LoadU(d, ds_t + at), hn::LoadU(d, delta + at));
      hn::StoreU(p, d, p_t + at);
      hn::StoreU(hn::Mul(hn::Mul(factor, p), dp), d, ds_t + at);
    });
  }
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
        classes_(space.plan, args.block_class),
        first_(first),
        num_slots_(num_slots),
        is_linear_(has_linear_branch(space.plan.problem)) {}

  void run() const {
    run_tasks(plan_, stream_, num_slots_ * kChunks,
              [&](int64_t task, int64_t worker) { keys_in(task, worker); });
    if (is_linear_) {
      run_tasks(plan_, stream_, num_slots_ * space_.group, [&](int64_t task, int64_t) {
        const int64_t n = task / space_.group, g = task % space_.group;
        fill_linear_mask(plan_, classes_, batch_of(n), kv_head_of(n) * space_.group + g,
                         space_.head(space_.slot(n), g).mask, space_.ld_mask);
      });
      run_tasks(plan_, stream_, num_slots_ * kFeatureSlices,
                [&](int64_t task, int64_t) { sum_key_states(task); });
    }
    run_tasks(plan_, stream_, num_slots_ * kChunks,
              [&](int64_t task, int64_t worker) { queries_in(task, worker); });
    if (is_linear_) {
      run_tasks(plan_, stream_, num_slots_ * kFeatureSlices,
                [&](int64_t task, int64_t) { sum_query_states(task); });
    }
    for (int64_t step = 0; step < kChunks; ++step) {
      run_tasks(plan_, stream_, num_slots_ * kChunks,
                [&](int64_t task, int64_t worker) { tiles(task, step, worker); });
    }
    run_tasks(plan_, stream_, num_slots_ * kChunks, [&](int64_t task, int64_t worker) {
      keys_out(task, worker);
      queries_out(task);
    });
    add_weight_grads();
  }

 private:
  int64_t batch_of(int64_t n) const { return (first_ + n) / p_.num_kv_heads; }
  int64_t kv_head_of(int64_t n) const { return (first_ + n) % p_.num_kv_heads; }

  FeatureWeights feature_weights(int64_t head, bool has_bias) const {
    if (!has_feature_weights(p_)) return {};
    const int64_t matrix = p_.head_dim * space_.ld;
    const float* tile = space_.head_weights(head);
    return {tile, tile + matrix, has_bias ? tile + 2 * matrix : nullptr};
  }
  FeatureWeights query_weights(int64_t h) const {
    return feature_weights(h, bool(args_.weights.feature_bias_q));
  }
  FeatureWeights key_weights(int64_t h_kv) const {
    return feature_weights(p_.num_heads + h_kv, bool(args_.weights.feature_bias_k));
  }
  FeatureWeightGrads feature_grads(float* per_chunk, int64_t chunk) const {
    if (!has_feature_weights(p_)) return {};
    float* weight = per_chunk + chunk * space_.grad_floats;
    return {weight, weight + p_.head_dim * space_.ld};
  }

  /// Stages a chunk of k and v, clears their gradients, computes h_j and z_j.
  void keys_in(int64_t task, int64_t worker) const {
    const int64_t n = task / kChunks, chunk = task % kChunks, ld = space_.ld, b = batch_of(n),
                  h_kv = kv_head_of(n);
    const BackwardSpace::Slot slot = space_.slot(n);
    const BackwardSpace::Worker w = space_.worker(worker);
    if (has_feature_weights(p_)) {
      std::fill_n(slot.d_feature + chunk * space_.grad_floats, space_.grad_floats, 0.0f);
    }
    const BlockRange blocks = share(space_.num_key_blocks, chunk, kChunks);
    for (int64_t j = blocks.begin; j < blocks.end; ++j) {
      const Block& block = plan_.key_blocks[j];
      const int64_t at = block.begin * ld;
      load_rows(args_.k, b, h_kv, block.begin, block.rows, 1.0f, slot.k + at, ld);
      load_rows(args_.v, b, h_kv, block.begin, block.rows, 1.0f, slot.v + at, ld);
      std::fill_n(slot.d_k + at, block.rows * ld, 0.0f);
      std::fill_n(slot.d_v + at, block.rows * ld, 0.0f);
      if (!is_linear_) continue;
      feature_map(p_.feature_map, p_.head_dim, key_weights(h_kv), slot.k + at, block.rows, w.y,
                  w.phi);
      block_state(
          space_.num_features, p_.head_dim, w.phi, slot.v + at, nullptr, block.rows,
          state_of(slot.states, j, space_.num_key_blocks, space_.num_features, p_.head_dim));
    }
  }

  /// Stages a chunk of q and d_o for each query head of the group; delta; everything of the linear
  /// branch that belongs to queries.
  void queries_in(int64_t task, int64_t worker) const {
    const int64_t n = task / kChunks, chunk = task % kChunks, ld = space_.ld,
                  ld_rows = space_.ld_rows;
    const BackwardSpace::Slot slot = space_.slot(n);
    const BackwardSpace::Worker w = space_.worker(worker);
    if (space_.has_projection())
      std::fill_n(slot.d_proj + chunk * space_.grad_floats, space_.grad_floats, 0.0f);
    const BlockRange blocks = share(space_.num_query_blocks, chunk, kChunks);
    for (int64_t g = 0; g < space_.group; ++g) {
      const int64_t b = batch_of(n), h = kv_head_of(n) * space_.group + g;
      const BackwardSpace::Head head = space_.head(slot, g);
      if (has_feature_weights(p_)) {
        std::fill_n(head.d_feature + chunk * space_.grad_floats, space_.grad_floats, 0.0f);
      }
      for (int64_t i = blocks.begin; i < blocks.end; ++i) {
        const Block& block = plan_.query_blocks[i];
        const int64_t at = block.begin * ld;
        load_rows(args_.q, b, h, block.begin, block.rows, 1.0f, head.q + at, ld);
        load_rows(args_.d_o, b, h, block.begin, block.rows, 1.0f, head.d_o + at, ld);
        load_rows(args_.o, b, h, block.begin, block.rows, 1.0f, w.o, ld);
        std::fill_n(head.d_q + at, block.rows * ld, 0.0f);
        transpose(head.q + at, ld, block.rows, p_.head_dim,
                  static_cast<float>(p_.softmax_scale) * kLog2E,
                  head.q_t + i * p_.head_dim * ld_rows, ld_rows);
        transpose(head.d_o + at, ld, block.rows, p_.head_dim, 1.0f,
                  head.d_o_t + i * p_.head_dim * ld_rows, ld_rows);
        float* const lse_log2 = head.lse_log2 + i * ld_rows;
        float* const delta = head.delta + i * ld_rows;
        const float* const lse = args_.lse.row<const float>(0, b, h) + block.begin;
        for (int64_t r = 0; r < ld_rows; ++r) {
          const bool has_keys = r < block.rows && lse[r] != -HUGE_VALF;
          lse_log2[r] = has_keys ? lse[r] * kLog2E : HUGE_VALF;
          delta[r] = r < block.rows ? dot(p_.head_dim, head.d_o + at + r * ld, w.o + r * ld) : 0.0f;
        }
        if (!is_linear_) continue;
        if (block.is_protected) {
          clear_state(query_state(head, i));
        } else {
          linear_queries(slot, head, w, h, i, chunk, delta);
        }
      }
    }
  }

  void linear_queries(const BackwardSpace::Slot& slot, const BackwardSpace::Head& head,
                      const BackwardSpace::Worker& w, int64_t h, int64_t i, int64_t chunk,
                      float* delta) const {
    const Block& block = plan_.query_blocks[i];
    const int64_t rows = block.rows, head_dim = p_.head_dim, features = space_.num_features;
    const int64_t ld = space_.ld, ld_phi = space_.ld_phi;
    const float* const q = head.q + block.begin * ld;
    const float* const d_o = head.d_o + block.begin * ld;

    // The forward's o_l again.
    feature_map(p_.feature_map, head_dim, query_weights(h), q, rows, w.y, w.phi);
    const float* const sum = head.sums + i * space_.ld_sum;
    const float* const z = sum + features * ld;
    linear_output(p_, features, w.phi, sum, rows, w.o_l, w.inverse_den);

    // Through the combination: d_o_l, d_l, and what delta holds beyond the sparse branch.
    const float* d_o_l = d_o;
    if (space_.has_projection()) {
      gemm<Into::kOverwrite>(rows, pad(head_dim), head_dim, rows_of(d_o, ld), space_.proj, ld,
                             w.d_o_l, ld);
      d_o_l = w.d_o_l;
      float* const d_weight = slot.d_proj + chunk * space_.grad_floats;
      float* const d_bias = d_weight + head_dim * ld;
      gemm<Into::kAdd>(head_dim, pad(head_dim), rows, columns_of(d_o, ld), w.o_l, ld, d_weight, ld);
      const float* const bias = static_cast<const float*>(args_.weights.proj_bias.data);
      for (int64_t r = 0; r < rows; ++r) {
        add_scaled(head_dim, 1.0f, d_o + r * ld, d_bias);
        for (int64_t c = 0; bias != nullptr && c < head_dim; ++c)
          delta[r] -= d_o[r * ld + c] * bias[c];
      }
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
    feature_map_backward(p_.feature_map, head_dim, query_weights(h), q, w.phi, w.d_phi, rows, w.y,
                         head.d_q + block.begin * ld, feature_grads(head.d_feature, chunk));
  }

  /// The critical tiles of query chunk r and key chunk (r + step) mod kChunks.
  void tiles(int64_t task, int64_t step, int64_t worker) const {
    const int64_t n = task / kChunks, r = task % kChunks, ld = space_.ld, ld_rows = space_.ld_rows;
    const int64_t head_dim = p_.head_dim, b = batch_of(n);
    const BackwardSpace::Slot slot = space_.slot(n);
    const BackwardSpace::Worker w = space_.worker(worker);
    const BlockRange query_chunk = share(space_.num_query_blocks, r, kChunks);
    const BlockRange key_chunk = share(space_.num_key_blocks, (r + step) % kChunks, kChunks);
    for (int64_t g = 0; g < space_.group; ++g) {
      const int64_t h = kv_head_of(n) * space_.group + g;
      const BackwardSpace::Head head = space_.head(slot, g);
      for (int64_t i = query_chunk.begin; i < query_chunk.end; ++i) {
        const Block& queries = plan_.query_blocks[i];
        if (p_.combine == Combine::kLinear && !queries.is_protected) continue;
        const BlockRange sequence = blocks_of_sequence(plan_.key_blocks, queries.sequence);
        const float* const q = head.q + queries.begin * ld;
        const float* const d_o = head.d_o + queries.begin * ld;
        float* const d_q = head.d_q + queries.begin * ld;
        const float* const q_t = head.q_t + i * head_dim * ld_rows;
        const float* const d_o_t = head.d_o_t + i * head_dim * ld_rows;
        const int64_t end = std::min(key_chunk.end, sequence.end);
        for (int64_t j = std::max(key_chunk.begin, sequence.begin); j < end; ++j) {
          if (classes_(b, h, i, j) != 1) continue;
          const Block& keys = plan_.key_blocks[j];
          const int64_t at = keys.begin * ld;
          gemm<Into::kOverwrite>(keys.rows, pad(queries.rows), head_dim, rows_of(slot.k + at, ld),
                                 q_t, ld_rows, w.p_t, ld_rows);
          gemm<Into::kOverwrite>(keys.rows, pad(queries.rows), head_dim, rows_of(slot.v + at, ld),
                                 d_o_t, ld_rows, w.ds_t, ld_rows);
          softmax_backward(w.p_t, w.ds_t, ld_rows, keys.rows, queries.rows,
                           head.lse_log2 + i * ld_rows, head.delta + i * ld_rows,
                           static_cast<float>(p_.softmax_scale));
          gemm<Into::kAdd>(keys.rows, pad(head_dim), queries.rows, rows_of(w.p_t, ld_rows), d_o, ld,
                           slot.d_v + at, ld);
          gemm<Into::kAdd>(keys.rows, pad(head_dim), queries.rows, rows_of(w.ds_t, ld_rows), q, ld,
                           slot.d_k + at, ld);
          gemm<Into::kAdd>(queries.rows, pad(head_dim), keys.rows, columns_of(w.ds_t, ld_rows),
                           slot.k + at, ld, d_q, ld);
        }
      }
    }
  }

  /// The linear branch's share of d_k and d_v for a chunk of keys; stores both.
  void keys_out(int64_t task, int64_t worker) const {
    const int64_t n = task / kChunks, chunk = task % kChunks, ld = space_.ld, b = batch_of(n),
                  h_kv = kv_head_of(n);
    const BackwardSpace::Slot slot = space_.slot(n);
    const BackwardSpace::Worker w = space_.worker(worker);
    const BlockRange blocks = share(space_.num_key_blocks, chunk, kChunks);
    for (int64_t j = blocks.begin; j < blocks.end; ++j) {
      const Block& block = plan_.key_blocks[j];
      if (is_linear_) linear_keys(slot, w, n, j, chunk);
      store_rows(slot.d_k + block.begin * ld, ld, args_.d_k, b, h_kv, block.begin, block.rows);
      store_rows(slot.d_v + block.begin * ld, ld, args_.d_v, b, h_kv, block.begin, block.rows);
    }
  }

  void linear_keys(const BackwardSpace::Slot& slot, const BackwardSpace::Worker& w, int64_t n,
                   int64_t j, int64_t chunk) const {
    const Block& block = plan_.key_blocks[j];
    const int64_t head_dim = p_.head_dim, features = space_.num_features;
    const int64_t ld = space_.ld, ld_phi = space_.ld_phi, at = block.begin * ld;
    const float* const d_sum = slot.d_sums + j * space_.ld_sum;
    const float* const d_z = d_sum + features * ld;
    feature_map(p_.feature_map, head_dim, key_weights(kv_head_of(n)), slot.k + at, block.rows, w.y,
                w.phi);
    gemm<Into::kAdd>(block.rows, pad(head_dim), features, rows_of(w.phi, ld_phi), d_sum, ld,
                     slot.d_v + at, ld);
    transpose(d_sum, ld, features, head_dim, 1.0f, w.sum_t, ld_phi);
    gemm<Into::kOverwrite>(block.rows, pad(features), head_dim, rows_of(slot.v + at, ld), w.sum_t,
                           ld_phi, w.d_phi, ld_phi);
    for (int64_t r = 0; r < block.rows; ++r) add_scaled(features, 1.0f, d_z, w.d_phi + r * ld_phi);
    feature_map_backward(p_.feature_map, head_dim, key_weights(kv_head_of(n)), slot.k + at, w.phi,
                         w.d_phi, block.rows, w.y, slot.d_k + at,
                         feature_grads(slot.d_feature, chunk));
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
                   kv_head_of(n) * space_.group + g, block.begin, block.rows);
      }
    }
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
    for (int64_t n = 0; n < num_slots_; ++n) {
      const BackwardSpace::Slot slot = space_.slot(n);
      for (int64_t chunk = 0; chunk < kChunks; ++chunk) {
        const int64_t at = chunk * space_.grad_floats;
        if (space_.has_projection())
          add_scaled(space_.grad_floats, 1.0f, slot.d_proj + at, space_.d_proj);
        if (!has_feature_weights(p_)) continue;
        const int64_t h_kv = kv_head_of(n);
        for (int64_t g = 0; g < space_.group; ++g) {
          add_scaled(space_.grad_floats, 1.0f, space_.head(slot, g).d_feature + at,
                     space_.d_feature + (h_kv * space_.group + g) * space_.grad_floats);
        }
        add_scaled(space_.grad_floats, 1.0f, slot.d_feature + at,
                   space_.d_feature + (p_.num_heads + h_kv) * space_.grad_floats);
      }
    }
  }

  const BackwardSpace& space_;
  const Plan& plan_;
  const Problem& p_;
  const BackwardArgs& args_;
  const Stream& stream_;
  const BlockClasses classes_;
  const int64_t first_, num_slots_;
  const bool is_linear_;
};

/// Stages the learned tensors and clears the totals of their gradients.
void stage_weights(const BackwardSpace& space, const Weights& weights) {
  const Problem& p = space.plan.problem;
  if (space.has_projection()) {
    load_rows(weights.proj_weight, 0, 0, 0, p.head_dim, 1.0f, space.proj, space.ld);
    std::fill_n(space.d_proj, space.grad_floats, 0.0f);
  }
  if (!has_feature_weights(p)) return;
  const int64_t matrix = p.head_dim * space.ld;
  for (int64_t head = 0; head < p.num_heads + p.num_kv_heads; ++head) {
    const bool is_query = head < p.num_heads;
    float* const tile = space.head_weights(head);
    stage_feature_weights(is_query ? weights.feature_weight_q : weights.feature_weight_k,
                          is_query ? weights.feature_bias_q : weights.feature_bias_k,
                          is_query ? head : head - p.num_heads, tile, tile + matrix,
                          tile + 2 * matrix);
  }
  std::fill_n(space.d_feature, (p.num_heads + p.num_kv_heads) * space.grad_floats, 0.0f);
}

void store_weight_grads(const BackwardSpace& space, const Weights& out) {
  const Problem& p = space.plan.problem;
  const int64_t matrix = p.head_dim * space.ld;
  const auto store = [&](const float* grads, const TensorView& weight, const TensorView& bias,
                         int64_t head) {
    if (weight) store_rows(grads, space.ld, weight, 0, head, 0, p.head_dim);
    if (bias) store_rows(grads + matrix, 0, bias, 0, 0, head, 1);
  };
  if (space.has_projection()) store(space.d_proj, out.proj_weight, out.proj_bias, 0);
  if (!has_feature_weights(p)) return;
  for (int64_t h = 0; h < p.num_heads; ++h) {
    store(space.d_feature + h * space.grad_floats, out.feature_weight_q, out.feature_bias_q, h);
  }
  for (int64_t h = 0; h < p.num_kv_heads; ++h) {
    store(space.d_feature + (p.num_heads + h) * space.grad_floats, out.feature_weight_k,
          out.feature_bias_k, h);
  }
}

}  // namespace

void Backward(const Plan& plan, const BackwardArgs& args, std::byte* workspace,
              const Stream& stream) {
  const BackwardSpace space(plan, workspace);
  stage_weights(space, args.weights);
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
