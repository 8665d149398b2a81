// SPDX-License-Identifier: Apache-2.0
//
// The stages of the linear branch's backward, for the heads of a wave (docs/math.md):
//   (h_j, z_j) and (H_i, Z_i) again, as in the forward
//   queries: o_l, dO_l; (dH_i, dZ_i); d_q; what the sparse branch needs of the combination
//   the gradient of a soft map; those of the projection and of the queries' hedgehog maps
//   (dH^j, dZ^j), the sums of (dH_i, dZ_i) over the query blocks whose E_i holds j
//   keys: d_k, d_v; the gradient of the keys' hedgehog maps
#include <algorithm>

#include "core/workspace.h"
#include "cuda/sm80/linear_bwd.cuh"

namespace sparline::cuda {
namespace {

/// Rows of (heads of the wave, N, D).
Rows rows_of_wave(void* data, int64_t num_rows, int32_t head_dim) {
  Rows rows = matrix_rows(data, head_dim);
  rows.stride_h = num_rows * head_dim;
  return rows;
}

/// What the wave keeps. Two sets of arrays share memory:
///   (h_j, z_j), which (H_i, Z_i) are made from; y of the queries, o_l and partial sums of weight
///     gradients; (dH^j, dZ^j). A soft map needs (h_j, z_j) longer.
///   (H_i, Z_i) and (dH_i, dZ_i), where a query block reads the one before it writes the other.
struct Space {
  int64_t width;          // of a state
  int64_t weights_width;  // of a row of `weights`
  bool is_shared, is_hedgehog, has_projection;

  void *proj_t, *feature_t_q, *feature_t_k;  // T
  void* y_k;                                 // T, (pairs, N_k, D); later d_y
  bf16_t* weights;                           // as linear_weights has them
  bf16_t *sums, *d_states;                   // (H_i, Z_i), (dH_i, dZ_i)
  bf16_t *states, *d_sums;                   // (h_j, z_j), (dH^j, dZ^j)
  void *y_q, *o_l;                           // T, (query heads, N_q, D); y_q is d_y later
  float* partial;
  int64_t total_bytes;

  Space(const LinearBackward& args, std::byte* base) {
    const LinearParams& p = args.forward;
    const Frame& frame = p.frame;
    const int64_t head_dim = frame.head_dim, matrix = head_dim * head_dim;
    const int64_t pairs = p.wave.count, heads = pairs * frame.group();
    const int64_t query_rows = heads * frame.queries.length * head_dim;
    width = state_width(p);
    weights_width = cuda::weights_width(frame.keys.num_blocks);
    is_shared = choose_aggregation(p.scope) == Aggregation::kShared;
    is_hedgehog = cuda::is_hedgehog(p.feature_map);
    has_projection = p.combine == Combine::kProjection;

    Arena arena(base);
    proj_t = arena.take<bf16_t>(has_projection ? matrix : 0);
    feature_t_q = arena.take<bf16_t>(is_hedgehog ? heads * matrix : 0);
    feature_t_k = arena.take<bf16_t>(is_hedgehog ? pairs * matrix : 0);
    y_k = arena.take<bf16_t>(is_hedgehog ? pairs * frame.keys.length * head_dim : 0);
    weights = arena.take<bf16_t>(is_shared ? 0 : weights_elements(p));
    const int64_t query_states = heads * frame.queries.num_blocks * width;
    sums = arena.take<bf16_t>(is_shared ? pairs * frame.keys.num_sequences * width : query_states);
    const bool is_in_place = !is_shared && has_whole_state(head_dim, p.feature_map);
    d_states = is_in_place ? sums : arena.take<bf16_t>(query_states);

    const int64_t key_states =
        pairs * std::max(frame.keys.num_blocks, frame.keys.num_sequences) * width;
    const auto take_row_arrays = [&](Arena& from) {
      y_q = from.take<bf16_t>(is_hedgehog ? query_rows : 0);
      o_l = from.take<bf16_t>(has_projection ? query_rows : 0);
      int64_t floats = 0;
      if (has_projection) floats = weight_gradient_floats(p, {.is_one = true});
      if (is_hedgehog) {
        floats = std::max({floats, weight_gradient_floats(p, {}),
                           weight_gradient_floats(p, {.is_of_keys = true})});
      }
      partial = from.take<float>(floats);
    };
    if (p.is_soft) {
      states = d_sums = arena.take<bf16_t>(key_states);
      take_row_arrays(arena);
    } else {
      Arena counted;
      take_row_arrays(counted);
      const int64_t num = std::max(key_states, counted.used_bytes() / int64_t{sizeof(bf16_t)});
      states = d_sums = arena.take<bf16_t>(num);
      Arena shared(reinterpret_cast<std::byte*>(states));
      if (states != nullptr) take_row_arrays(shared);
    }
    total_bytes = arena.used_bytes();
  }
};

}  // namespace

int64_t linear_backward_bytes(const LinearBackward& params) {
  return Space(params, nullptr).total_bytes;
}

void linear_backward(const LinearBackward& params, std::byte* workspace, void* stream) {
  const LinearParams& p = params.forward;
  const Frame& frame = p.frame;
  const Space space(params, workspace);
  const int32_t head_dim = frame.head_dim;

  if (space.is_hedgehog) {
    transpose_weights(p, p.feature_weight_q, WeightHeads::kQuery, space.feature_t_q, stream);
    transpose_weights(p, p.feature_weight_k, WeightHeads::kKey, space.feature_t_k, stream);
    hedgehog_keys(p, space.y_k, stream);
  }
  if (space.has_projection) {
    transpose_weights(p, p.proj_weight, WeightHeads::kOne, space.proj_t, stream);
  }
  bf16_t* const weights = space.is_shared ? nullptr : space.weights;
  prepare_states(p, space.y_k, space.states, weights, space.weights_width, nullptr, stream);
  if (space.is_shared) {
    sum_states(p, space.states, space.sums, false, stream);
  } else {
    aggregate(p, space.weights, space.weights_width, space.states, space.sums, false, stream);
  }

  if (space.is_hedgehog) hedgehog_queries(p, space.y_q, stream);
  const Rows y_q = rows_of_wave(space.y_q, frame.queries.length, head_dim);
  linear_backward_queries({.params = params,
                           .x = space.is_hedgehog ? y_q : p.q,
                           .width = space.width,
                           .is_shared = space.is_shared,
                           .sums = space.sums,
                           .d_states = space.d_states,
                           .weights = space.weights,
                           .weights_width = space.weights_width,
                           .proj_t = space.proj_t,
                           .feature_t = space.feature_t_q,
                           .o_l = space.o_l},
                          stream);
  if (p.is_soft) map_gradient(p, space.states, space.d_states, params.d_block_map, stream);
  if (space.has_projection) {
    weight_gradient(p,
                    {.left = params.d_o,
                     .right = rows_of_wave(space.o_l, frame.queries.length, head_dim),
                     .is_right_of_wave = true,
                     .is_one = true,
                     .partial = space.partial,
                     .weight = params.d_proj_weight,
                     .bias = params.d_proj_bias},
                    stream);
  }
  if (space.is_hedgehog) {
    weight_gradient(p,
                    {.left = y_q,
                     .right = p.q,
                     .is_left_of_wave = true,
                     .partial = space.partial,
                     .weight = params.d_feature_weight_q,
                     .bias = params.d_feature_bias_q},
                    stream);
  }

  if (space.is_shared) {
    sum_states(p, space.d_states, space.d_sums, true, stream);
  } else {
    aggregate(p, space.weights, space.weights_width, space.d_states, space.d_sums, true, stream);
  }
  const Rows y_k = rows_of_wave(space.y_k, frame.keys.length, head_dim);
  linear_backward_keys({.params = params,
                        .x = space.is_hedgehog ? y_k : p.k,
                        .width = space.width,
                        .is_shared = space.is_shared,
                        .d_sums = space.d_sums,
                        .feature_t = space.feature_t_k},
                       stream);
  if (space.is_hedgehog) {
    weight_gradient(p,
                    {.left = y_k,
                     .right = p.k,
                     .is_left_of_wave = true,
                     .right_mean = p.k_mean,
                     .is_of_keys = true,
                     .partial = space.partial,
                     .weight = params.d_feature_weight_k,
                     .bias = params.d_feature_bias_k},
                    stream);
  }
}

}  // namespace sparline::cuda
