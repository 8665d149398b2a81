// SPDX-License-Identifier: Apache-2.0
//
// Pieces of the linear branch that the forward and the backward share: staged weights, h_j and z_j
// of a key block, the linear set E_i of a query block, and o_l of its rows.

#if defined(SPARLINE_CPU_LINEAR_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SPARLINE_CPU_LINEAR_INL_H_
#undef SPARLINE_CPU_LINEAR_INL_H_
#else
#define SPARLINE_CPU_LINEAR_INL_H_
#endif

#include "cpu/feature_map-inl.h"

HWY_BEFORE_NAMESPACE();
namespace sparline::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

/// Fills the tiles of the hedgehog maps, if the problem has them.
inline void stage_feature_weights(const Weights& weights, const FeatureWeightTiles& tiles) {
  const Dims& dims = tiles.dims;
  const int64_t num = dims.head_dim, matrix = num * dims.ld;
  for (int64_t head = 0; dims.is_hedgehog && head < dims.num_heads + dims.num_kv_heads; ++head) {
    const bool is_query = head < dims.num_heads;
    const int64_t h = is_query ? head : head - dims.num_heads;
    const TensorView& weight = is_query ? weights.feature_weight_q : weights.feature_weight_k;
    const TensorView& bias = is_query ? weights.feature_bias_q : weights.feature_bias_k;
    float* const tile = tiles.data + head * FeatureWeightTiles::head_floats(dims);
    load_rows(weight, 0, h, 0, num, 1.0f, tile, dims.ld);
    transpose(tile, dims.ld, num, num, 1.0f, tile + matrix, dims.ld);
    if (bias) load_rows(bias, 0, 0, h, 1, 1.0f, tile + 2 * matrix, pad(num));
  }
}

/// Copies the projection's bias into a padded row; zeros where there is none.
HWY_INLINE void stage_bias(const TensorView& bias, int64_t num, float* row) {
  std::fill_n(row, pad(num), 0.0f);
  if (bias) load_rows(bias, 0, 0, 0, 1, 1.0f, row, pad(num));
}

/// Where block n's state lies among those of `num_blocks` blocks.
struct StateView {
  float* h;  // row f at h + f * h_row
  int64_t h_row;
  float* z;
};
HWY_INLINE StateView state_of(float* states, int64_t n, int64_t num_blocks, int64_t num_features,
                              int64_t head_dim) {
  const int64_t ld = leading_dim(head_dim);
  return {states + n * ld, num_blocks * ld,
          states + num_features * num_blocks * ld + n * leading_dim(num_features)};
}

/// state = (a^T x, a^T weight) over the rows of a block; no weight stands for ones. With a = phi(k)
/// and x = v: h_j and z_j.
HWY_INLINE void block_state(int64_t num_features, int64_t head_dim, const float* a, const float* x,
                            const float* weight, int64_t num_rows, StateView state) {
  const int64_t ld = leading_dim(head_dim), ld_phi = leading_dim(num_features);
  gemm<Into::kOverwrite>(num_features, pad(head_dim), num_rows, columns_of(a, ld_phi), x, ld,
                         state.h, state.h_row);
  std::fill_n(state.z, pad(num_features), 0.0f);
  for (int64_t r = 0; r < num_rows; ++r) {
    add_scaled(num_features, weight == nullptr ? 1.0f : weight[r], a + r * ld_phi, state.z);
  }
}

/// mask (T_m x ld_mask): the weight of key block j in H_i and Z_i: 1 for members of E_i, 1 - m
/// under a soft map, else 0.
inline void fill_linear_mask(const Plan& plan, const BlockPairs& pairs, int64_t b, int64_t h,
                             float* mask, int64_t ld_mask) {
  for (size_t i = 0; i < plan.query_blocks.size(); ++i, mask += ld_mask) {
    std::fill_n(mask, ld_mask, 0.0f);
    const BlockRange keys = blocks_of_sequence(plan.key_blocks, plan.query_blocks[i].sequence);
    for (int64_t j = keys.begin; j < keys.end; ++j) {
      mask[j] = pairs.linear_weight(b, h, static_cast<int64_t>(i), j);
    }
  }
}

/// sums[m] = or += the sum over n of mask(m, n) state n, for the features [begin, end) of 0..F,
/// where "feature" F stands for z. The product with a 0/1 matrix adds up exactly the members. Total
/// minus the others would be cheaper, but leaves rounding noise where the true sum is tiny or zero,
/// and the linear branch divides by such a sum.
template <Into kInto>
void sum_states(Operand mask, int64_t num_sums, int64_t num_states, const float* states,
                int64_t num_features, int64_t head_dim, BlockRange features, float* sums) {
  const int64_t ld = leading_dim(head_dim), ld_sum = sum_floats(num_features, head_dim);
  for (int64_t f = features.begin; f < features.end; ++f) {
    const int64_t width = f < num_features ? head_dim : num_features;
    gemm<kInto>(num_sums, pad(width), num_states, mask, states + f * num_states * ld,
                leading_dim(width), sums + f * ld, ld_sum);
  }
}

/// o_l = phi(q) H / (phi(q) . Z + epsilon) and 1 / den per row; both 0 where den is not a positive
/// finite number, or where the row of the mask is all 0 (the empty rule).
HWY_INLINE void linear_output(const Problem& problem, const Dims& dims, const float* mask,
                              const float* phi_q, const float* sum, int64_t num_rows, float* o_l,
                              float* inverse_den) {
  const int64_t num_features = dims.num_features;
  const bool has_members =
      std::any_of(mask, mask + dims.num_key_blocks, [](float weight) { return weight != 0.0f; });
  const int64_t head_dim = problem.head_dim, ld = leading_dim(head_dim);
  const int64_t ld_phi = leading_dim(num_features);
  const float* z = sum + num_features * ld;
  gemm<Into::kOverwrite>(num_rows, pad(head_dim), num_features, rows_of(phi_q, ld_phi), sum, ld,
                         o_l, ld);
  for (int64_t r = 0; r < num_rows; ++r) {
    const float den =
        dot(num_features, phi_q + r * ld_phi, z) + static_cast<float>(problem.epsilon);
    const bool is_usable =
        has_members && den > 0.0f && std::isfinite(den) && std::isfinite(1.0f / den);
    inverse_den[r] = is_usable ? 1.0f / den : 0.0f;
    if (is_usable) {
      scale_row(head_dim, inverse_den[r], o_l + r * ld);
    } else {
      std::fill_n(o_l + r * ld, pad(head_dim), 0.0f);
    }
  }
}

/// <h, h'> + z . z' of two states.
HWY_INLINE float state_dot(int64_t num_features, int64_t head_dim, StateView x, StateView y) {
  float sum = dot(num_features, x.z, y.z);
  for (int64_t f = 0; f < num_features; ++f) {
    sum += dot(head_dim, x.h + f * x.h_row, y.h + f * y.h_row);
  }
  return sum;
}

/// The two shares of a blended row, a = sigmoid(logit) and 1 - a, each to full precision.
struct Shares {
  float sparse = 1.0f;
  float linear = 0.0f;
};
HWY_INLINE Shares blend_shares(float logit, float inverse_den) {
  if (inverse_den == 0.0f) return {};  // the linear branch is empty
  return {1.0f / (1.0f + std::exp(-logit)), 1.0f / (1.0f + std::exp(logit))};
}

}  // namespace sparline::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // SPARLINE_CPU_LINEAR_INL_H_
