// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "core/workspace.h"
#include "cpu/layout.h"

namespace sparline::cpu {

/// Parts into which the queries and the keys of a head are cut (see backward.cpp). More parts feed
/// more threads; fewer let a query block meet more of its tiles at once.
constexpr int64_t kChunks = 4;

/// Everything the backward keeps in its workspace.
struct BackwardSpace : Dims {
  struct Head {        // one query head in flight
    float* q;          // (N_q x ld)
    float* d_o;        // (N_q x ld)
    float* d_q;        // (N_q x ld)
    float* lse_log2;   // (T_m, ld_rows), +inf where a row has no critical key
    float* delta;      // (T_m, ld_rows)
    float* mask;       // (T_m x ld_mask): weights of the members of E_i
    float* sums;       // per query block: (H_i, Z_i)
    float* d_states;   // (dH_i, dZ_i) of all query blocks
    float* d_feature;  // per chunk: gradients of the query feature map
  };
  struct Slot {        // one (batch, kv head) in flight
    float* k;          // (N_k x ld)
    float* v;          // (N_k x ld)
    float* k_mean;     // (T_n x ld): block sums of k, later of d_k, then the means of sequences
    float* d_k;        // (N_k x ld)
    float* d_v;        // (N_k x ld)
    float* states;     // (h_j, z_j) of all key blocks
    float* d_sums;     // per key block: (dH^j, dZ^j)
    float* d_proj;     // per chunk: gradients of the projection
    float* d_feature;  // per chunk: gradients of the key feature map
    std::byte* heads;
  };
  struct Worker {
    float* q_t;          // (D x ld_rows), scaled by softmax_scale log2(e)
    float* d_o_t;        // (D x ld_rows)
    float* p_t;          // (block_k x ld_rows)
    float* ds_t;         // (block_k x ld_rows)
    float* o;            // (block_q x ld)
    float* o_l;          // (block_q x ld)
    float* d_o_l;        // (block_q x ld)
    float* y;            // (max_rows x ld), hedgehog preactivations and their gradients
    float* phi;          // (max_rows x ld_phi)
    float* a;            // (block_q x ld_phi)
    float* d_phi;        // (max_rows x ld_phi)
    float* sum_t;        // (D x ld_phi): H^T
    float* inverse_den;  // (block_q)
    float* d_l;          // (block_q)
    float* d_k;          // (block_k x ld), smoothed keys: the linear branch's own d_k
    float* visible;      // (ld_rows): 1 for the rows that take part in a tile, 0 for others
  };

  const Plan& plan;
  int64_t grad_floats;       // of one learned map's gradient: dW (D x ld), then db (pad(D))
  int64_t num_weight_grads;  // projection, query feature maps, key feature maps
  float* proj;               // W (D x ld)
  float* proj_bias;          // b (pad(D)); zeros where there is none
  float* features;           // FeatureWeightTiles
  float* d_weights;          // (num_weight_grads, grad_floats)
  int32_t* progress;         // per slot and query chunk: steps done
  std::byte* slots;
  std::byte* workers;
  int64_t head_bytes, slot_bytes, worker_bytes, total_bytes;

  BackwardSpace(const Plan& plan_in, std::byte* base) : Dims(plan_in), plan(plan_in) {
    grad_floats = head_dim * ld + pad(head_dim);
    num_weight_grads = (has_projection ? 1 : 0) + (is_hedgehog ? num_heads + num_kv_heads : 0);
    Arena arena(base), head_arena, slot_arena, worker_arena;
    carve_head(head_arena);
    head_bytes = head_arena.used_bytes();
    carve_slot(slot_arena);
    slot_bytes = slot_arena.used_bytes();
    carve_worker(worker_arena);
    worker_bytes = worker_arena.used_bytes();
    proj = arena.take<float>(has_projection ? head_dim * ld : 0);
    proj_bias = arena.take<float>(has_projection ? pad(head_dim) : 0);
    features = arena.take<float>(FeatureWeightTiles::num_floats(*this));
    d_weights = arena.take<float>(num_weight_grads * grad_floats);
    progress = arena.take<int32_t>(plan.heads_per_wave * kChunks);
    slots = arena.take<std::byte>(plan.heads_per_wave * slot_bytes);
    workers = arena.take<std::byte>(plan.target.num_threads * worker_bytes);
    total_bytes = arena.used_bytes();
  }

  float* d_projection() const { return d_weights; }
  float* d_query_feature(int64_t h) const {
    return d_weights + ((has_projection ? 1 : 0) + h) * grad_floats;
  }
  float* d_key_feature(int64_t h_kv) const { return d_query_feature(num_heads + h_kv); }

  FeatureWeightTiles feature_tiles(const Weights& weights) const {
    return {*this, features, bool(weights.feature_bias_q), bool(weights.feature_bias_k)};
  }
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
    const int64_t num_queries = plan.problem.num_queries, linear = is_linear ? 1 : 0;
    return {.q = arena.take<float>(num_queries * ld),
            .d_o = arena.take<float>(num_queries * ld),
            .d_q = arena.take<float>(num_queries * ld),
            .lse_log2 = arena.take<float>(num_query_blocks * ld_rows),
            .delta = arena.take<float>(num_query_blocks * ld_rows),
            .mask = arena.take<float>(linear * num_query_blocks * ld_mask),
            .sums = arena.take<float>(linear * num_query_blocks * ld_sum),
            .d_states =
                arena.take<float>(linear * states_floats(num_query_blocks, num_features, head_dim)),
            .d_feature = arena.take<float>(is_hedgehog ? kChunks * grad_floats : 0)};
  }
  Slot carve_slot(Arena& arena) const {
    const int64_t num_keys = plan.problem.num_keys, linear = is_linear ? 1 : 0;
    return {
        .k = arena.take<float>(num_keys * ld),
        .v = arena.take<float>(num_keys * ld),
        .k_mean = arena.take<float>(plan.problem.smooth_k ? num_key_blocks * ld : 0),
        .d_k = arena.take<float>(num_keys * ld),
        .d_v = arena.take<float>(num_keys * ld),
        .states = arena.take<float>(linear * states_floats(num_key_blocks, num_features, head_dim)),
        .d_sums = arena.take<float>(linear * num_key_blocks * ld_sum),
        .d_proj = arena.take<float>(has_projection ? kChunks * grad_floats : 0),
        .d_feature = arena.take<float>(is_hedgehog ? kChunks * grad_floats : 0),
        .heads = arena.take<std::byte>(group * head_bytes)};
  }
  Worker carve_worker(Arena& arena) const {
    const int64_t block_q = plan.problem.block_q, linear = is_linear ? 1 : 0;
    return {
        .q_t = arena.take<float>(head_dim * ld_rows),
        .d_o_t = arena.take<float>(head_dim * ld_rows),
        .p_t = arena.take<float>(plan.problem.block_k * ld_rows),
        .ds_t = arena.take<float>(plan.problem.block_k * ld_rows),
        .o = arena.take<float>(block_q * ld),
        .o_l = arena.take<float>(linear * block_q * ld),
        .d_o_l = arena.take<float>(linear * block_q * ld),
        .y = arena.take<float>(is_hedgehog ? max_rows * ld : 0),
        .phi = arena.take<float>(linear * max_rows * ld_phi),
        .a = arena.take<float>(linear * block_q * ld_phi),
        .d_phi = arena.take<float>(linear * max_rows * ld_phi),
        .sum_t = arena.take<float>(linear * head_dim * ld_phi),
        .inverse_den = arena.take<float>(linear * block_q),
        .d_l = arena.take<float>(linear * block_q),
        .d_k = arena.take<float>(plan.problem.smooth_k ? linear * plan.problem.block_k * ld : 0),
        .visible = arena.take<float>(has_row_mask ? ld_rows : 0)};
  }
};

}  // namespace sparline::cpu
