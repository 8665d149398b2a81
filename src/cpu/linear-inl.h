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
#include "cpu/sum_tree-inl.h"

HWY_BEFORE_NAMESPACE();
namespace sparline::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

/// Copies one head's (D x D) matrix into a tile and its transpose into another, and its bias into a
/// padded row.
HWY_INLINE FeatureWeights stage_feature_weights(const TensorView& weight, const TensorView& bias,
                                                int64_t h, float* tile, float* tile_t, float* row) {
  const int64_t num = weight.shape[3], ld = leading_dim(num);
  load_rows(weight, 0, h, 0, num, 1.0f, tile, ld);
  transpose(tile, ld, num, num, 1.0f, tile_t, ld);
  if (bias) load_rows(bias, 0, 0, h, 1, 1.0f, row, pad(num));
  return {tile, tile_t, bias ? row : nullptr};
}

/// state = (h_j, z_j) = (sum of phi(k)^T v, sum of phi(k)) over the rows of a key block.
HWY_INLINE void key_block_state(int64_t num_features, int64_t head_dim, const float* phi_k,
                                const float* v, int64_t num_rows, float* state) {
  const int64_t ld = leading_dim(head_dim), ld_phi = leading_dim(num_features);
  gemm<Into::kOverwrite>(num_features, pad(head_dim), num_rows, columns_of(phi_k, ld_phi), v, ld,
                         state, ld);
  for (int64_t f = 0; f < num_features; ++f)
    std::fill(state + f * ld + pad(head_dim), state + (f + 1) * ld, 0.0f);
  float* z = state + num_features * ld;
  std::fill(z, z + pad(num_features), 0.0f);
  for (int64_t r = 0; r < num_rows; ++r) add_scaled(num_features, 1.0f, phi_k + r * ld_phi, z);
}

/// Whether a key block of this class belongs to E_i.
HWY_INLINE bool in_linear_set(LinearScope scope, int block_class) {
  return scope == LinearScope::kAll ||
         (scope == LinearScope::kMarginal ? block_class == 0 : block_class != 1);
}

/// Marks E_i among the key blocks of the query block's sequence.
inline void mark_linear_set(const Problem& problem, const BlockClasses& classes, int64_t b,
                            int64_t h, int64_t i, BlockRange keys, uint8_t* is_member) {
  for (int64_t j = keys.begin; j < keys.end; ++j) {
    is_member[j] = in_linear_set(problem.linear_scope, classes(b, h, i, j));
  }
}

/// o_l = phi(q) H / (phi(q) . Z + epsilon) and 1 / den per row; both 0 where den is not a positive
/// finite number (the empty rule).
HWY_INLINE void linear_output(const Problem& problem, int64_t num_features, const float* phi_q,
                              const float* state, bool is_empty, int64_t num_rows, float* o_l,
                              float* inverse_den) {
  const int64_t head_dim = problem.head_dim, ld = leading_dim(head_dim),
                ld_phi = leading_dim(num_features);
  const float* z = state + num_features * ld;
  if (!is_empty) {
    gemm<Into::kOverwrite>(num_rows, pad(head_dim), num_features, rows_of(phi_q, ld_phi), state, ld,
                           o_l, ld);
  }
  for (int64_t r = 0; r < num_rows; ++r) {
    const float den =
        is_empty ? 0.0f
                 : dot(num_features, phi_q + r * ld_phi, z) + static_cast<float>(problem.epsilon);
    const bool is_usable = den > 0.0f && std::isfinite(den) && std::isfinite(1.0f / den);
    inverse_den[r] = is_usable ? 1.0f / den : 0.0f;
    if (is_usable) {
      scale_row(head_dim, inverse_den[r], o_l + r * ld);
    } else {
      std::fill(o_l + r * ld, o_l + r * ld + pad(head_dim), 0.0f);
    }
  }
}

}  // namespace sparline::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // SPARLINE_CPU_LINEAR_INL_H_
