// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "core/workspace.h"
#include "cpu/layout.h"

namespace sparline::cpu {

/// Everything the forward keeps in its workspace.
struct ForwardSpace : Dims {
  struct Slot {        // one (batch, kv head) in flight
    float* k;          // (N_k x ld)
    float* v;          // (N_k x ld)
    float* k_mean;     // (T_n x ld): of block sums, then of the mean key of each block's sequence
    float* v_step;     // (T_n x ld), low bit: of largest |v|, then of the steps, likewise
    int16_t* k_codes;  // (N_k x ld_codes), low bit
    float* k_step;     // (T_n), low bit
    float* states;     // (h_j, z_j) of all key blocks
    float* masks;      // per query head of the group (T_m x ld_mask): weights of the members of E_i
    float* sums;       // per query head of the group, per query block: (H_i, Z_i)
  };
  struct Worker {
    float* q;            // (block_q x ld)
    float* q_t;          // (D x ld_rows), scaled by softmax_scale log2(e); low bit: unscaled
    int32_t* q_pairs;    // (D / 2 x ld_rows), low bit: pairs of codes
    float* p_t;          // (block_k x ld_rows)
    float* o;            // (block_q x ld)
    float* o_l;          // (block_q x ld)
    float* y;            // (max_rows x ld), hedgehog preactivations
    float* phi;          // (max_rows x ld_phi)
    float* inverse_den;  // (block_q)
    float* lse;          // (ld_rows)
    float* row_max;      // (ld_rows), log2 units
    float* row_sum;      // (ld_rows)
    float* row_scale;    // (ld_rows)
    float* q_step;       // (ld_rows), low bit: step of q, times softmax_scale log2(e)
    float* visible;      // (ld_rows): 1 for the rows that take part in a tile, 0 for others
  };

  const Plan& plan;
  int64_t heads_per_wave;
  int64_t ld_codes;  // between the int8 codes of keys: like leading_dim, in pairs
  float* proj_t;     // W^T (D x ld)
  float* proj_bias;  // b (pad(D)); zeros where there is none
  float* features;   // FeatureWeightTiles
  std::byte* slots;
  std::byte* workers;
  int64_t slot_bytes, worker_bytes, total_bytes;

  ForwardSpace(const Plan& plan_in, std::byte* base) : Dims(plan_in), plan(plan_in) {
    // Query blocks are the tasks of a wave: where one head has plenty, more heads in flight would
    // only take memory.
    const int64_t wanted_tasks = 8 * plan.target.num_threads, tasks = group * num_query_blocks;
    heads_per_wave = std::min(plan.heads_per_wave, (wanted_tasks + tasks - 1) / tasks);
    ld_codes = 2 * leading_dim(head_dim / 2);
    Arena arena(base), slot_arena, worker_arena;
    carve_slot(slot_arena);
    carve_worker(worker_arena);
    slot_bytes = slot_arena.used_bytes();
    worker_bytes = worker_arena.used_bytes();
    proj_t = arena.take<float>(has_projection ? head_dim * ld : 0);
    proj_bias = arena.take<float>(has_projection ? pad(head_dim) : 0);
    features = arena.take<float>(FeatureWeightTiles::num_floats(*this));
    slots = arena.take<std::byte>(heads_per_wave * slot_bytes);
    workers = arena.take<std::byte>(plan.target.num_threads * worker_bytes);
    total_bytes = arena.used_bytes();
  }

  FeatureWeightTiles feature_tiles(const Weights& weights) const {
    return {*this, features, bool(weights.feature_bias_q), bool(weights.feature_bias_k)};
  }
  Slot slot(int64_t n) const {
    Arena arena(slots + n * slot_bytes);
    return carve_slot(arena);
  }
  Worker worker(int64_t n) const {
    Arena arena(workers + n * worker_bytes);
    return carve_worker(arena);
  }

 private:
  Slot carve_slot(Arena& arena) const {
    const int64_t num_keys = plan.problem.num_keys, linear = is_linear ? 1 : 0;
    const int64_t low_bit = plan.problem.low_bit.is_enabled ? 1 : 0;
    return {
        .k = arena.take<float>(num_keys * ld),
        .v = arena.take<float>(num_keys * ld),
        .k_mean = arena.take<float>(plan.problem.smooth_k ? num_key_blocks * ld : 0),
        .v_step = arena.take<float>(low_bit * num_key_blocks * ld),
        .k_codes = arena.take<int16_t>(low_bit * num_keys * ld_codes),
        .k_step = arena.take<float>(low_bit * num_key_blocks),
        .states = arena.take<float>(linear * states_floats(num_key_blocks, num_features, head_dim)),
        .masks = arena.take<float>(linear * group * num_query_blocks * ld_mask),
        .sums = arena.take<float>(linear * group * num_query_blocks * ld_sum)};
  }
  Worker carve_worker(Arena& arena) const {
    const int64_t block_q = plan.problem.block_q, linear = is_linear ? 1 : 0;
    const int64_t low_bit = plan.problem.low_bit.is_enabled ? 1 : 0;
    return {.q = arena.take<float>(block_q * ld),
            .q_t = arena.take<float>(head_dim * ld_rows),
            .q_pairs = arena.take<int32_t>(low_bit * head_dim / 2 * ld_rows),
            .p_t = arena.take<float>(plan.problem.block_k * ld_rows),
            .o = arena.take<float>(block_q * ld),
            .o_l = arena.take<float>(linear * block_q * ld),
            .y = arena.take<float>(is_hedgehog ? max_rows * ld : 0),
            .phi = arena.take<float>(linear * max_rows * ld_phi),
            .inverse_den = arena.take<float>(linear * block_q),
            .lse = arena.take<float>(ld_rows),
            .row_max = arena.take<float>(ld_rows),
            .row_sum = arena.take<float>(ld_rows),
            .row_scale = arena.take<float>(ld_rows),
            .q_step = arena.take<float>(low_bit * ld_rows),
            .visible = arena.take<float>(has_row_mask ? ld_rows : 0)};
  }
};

}  // namespace sparline::cpu
