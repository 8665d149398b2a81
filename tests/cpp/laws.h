// SPDX-License-Identifier: Apache-2.0
//
// What holds for every backend, checked by the tests of each.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "case.h"

namespace sparline::testing {

inline bool is_same_bits(const oracle::Array& a, const oracle::Array& b) {
  return a.shape == b.shape &&
         std::equal(a.data.begin(), a.data.end(), b.data.begin(), [](double x, double y) {
           return x == y ? std::signbit(x) == std::signbit(y) : std::isnan(x) && std::isnan(y);
         });
}

inline void expect_same_bits(const oracle::Outputs& a, const oracle::Outputs& b,
                             const std::string& what) {
  EXPECT_TRUE(is_same_bits(a.o, b.o)) << what << ": o";
  EXPECT_TRUE(is_same_bits(a.lse, b.lse)) << what << ": lse";
  EXPECT_TRUE(is_same_bits(a.d_q, b.d_q)) << what << ": d_q";
  EXPECT_TRUE(is_same_bits(a.d_k, b.d_k)) << what << ": d_k";
  EXPECT_TRUE(is_same_bits(a.d_v, b.d_v)) << what << ": d_v";
  const auto& g = a.d_weights;
  const auto& w = b.d_weights;
  EXPECT_TRUE(is_same_bits(g.proj_weight, w.proj_weight)) << what << ": d_proj_weight";
  EXPECT_TRUE(is_same_bits(g.proj_bias, w.proj_bias)) << what << ": d_proj_bias";
  EXPECT_TRUE(is_same_bits(g.feature_weight_q, w.feature_weight_q))
      << what << ": d_feature_weight_q";
  EXPECT_TRUE(is_same_bits(g.feature_bias_q, w.feature_bias_q)) << what << ": d_feature_bias_q";
  EXPECT_TRUE(is_same_bits(g.feature_weight_k, w.feature_weight_k))
      << what << ": d_feature_weight_k";
  EXPECT_TRUE(is_same_bits(g.feature_bias_k, w.feature_bias_k)) << what << ": d_feature_bias_k";
  EXPECT_TRUE(is_same_bits(g.alpha_logit, w.alpha_logit)) << what << ": d_alpha_logit";
  EXPECT_TRUE(is_same_bits(a.d_soft_map, b.d_soft_map)) << what << ": d_block_map";
  EXPECT_TRUE(is_same_bits(a.row_votes, b.row_votes)) << what << ": row_votes";
  EXPECT_EQ(a.kept_bits, b.kept_bits) << what << ": kept_bits";
}

/// The router gives the mean over all keys of a sequence, protected ones too; 0 where a sequence
/// has none, as in every third case.
inline void check_mean_keys(Case c, uint64_t seed) {
  Problem& p = c.problem;
  if (seed % 3 == 0) {
    p.query_segments = {{0, p.num_queries, 1, false}};
    p.key_segments = {{0, p.num_keys / 2, 0, true}, {p.num_keys / 2, p.num_keys, 3, false}};
  }
  if (seed % 3 == 1) c.rule.min_similarity = 0.05;
  const oracle::Inputs in = random_inputs(c);
  const std::vector<int32_t> numbers = sequence_numbers(p);
  oracle::Array want({p.batch, p.num_kv_heads, std::ssize(numbers), p.head_dim});
  const auto rows = oracle::rows_of(p.key_segments, p.num_keys, p.block_k);
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t h = 0; h < p.num_kv_heads; ++h) {
      for (int64_t s = 0; s < want.shape[2]; ++s) {
        double* const mean = want.row(b, h, s);
        double num_keys = 0.0;
        for (int64_t n = 0; n < p.num_keys; ++n) {
          if (rows[n].sequence != numbers[s]) continue;
          num_keys += 1.0;
          const double* const key = in.k.row(b, h, in.key_order.empty() ? n : in.key_order[n]);
          for (int64_t d = 0; d < p.head_dim; ++d) mean[d] += key[d];
        }
        for (int64_t d = 0; d < p.head_dim && num_keys > 0.0; ++d) mean[d] /= num_keys;
      }
    }
  }
  std::string misuse;
  EXPECT_LT(error(run_k_mean(c, in, &misuse), want), 1e-5) << describe(c);
  EXPECT_EQ(misuse, "") << describe(c);
}

/// Found by the router or by the pass that needs them, mean keys have the same bits.
inline void check_router_means(Case c) {
  c.problem.smooth_k = c.problem.feature_map != FeatureMap::kIdentity;
  if (!c.problem.smooth_k) return;
  const oracle::Inputs inputs = random_inputs(c);
  std::string misuse;
  c.brings_k_mean = false;
  const oracle::Outputs found = run(c, inputs, &misuse);
  c.brings_k_mean = true;
  expect_same_bits(run(c, inputs, &misuse), found, describe(c));
  EXPECT_EQ(misuse, "") << describe(c);
}

/// What is given is what is subtracted: of zeros nothing is left but the shape of the problem.
/// `c`: of 90 queries and 100 keys.
inline void check_zero_means(Case c) {
  for (const bool is_low_bit : {false, true}) {
    for (const Combine combine : {Combine::kSparse, Combine::kBlend}) {
      Problem& p = c.problem;
      p.smooth_k = false;
      p.combine = combine;
      p.feature_map = FeatureMap::kElu1;  // softmax would not see what all channels share
      p.linear_scope = LinearScope::kAll;
      p.low_bit.is_enabled = is_low_bit;
      p.query_segments = {{0, 40, 0, false}, {40, 90, 2, false}};
      p.key_segments = {{0, 30, 0, true}, {30, 60, 0, false}, {60, 100, 2, false}};
      oracle::Inputs inputs = random_inputs(c);
      for (double& value : inputs.k.data) value = rounded(value + 1.0, p.dtype);
      std::string misuse;
      const oracle::Outputs want = run(c, inputs, &misuse);
      p.smooth_k = true;
      const oracle::Outputs smoothed = run(c, inputs, &misuse);
      inputs.k_mean = oracle::Array({p.batch, p.num_kv_heads, 2, p.head_dim});
      const oracle::Outputs got = run(c, inputs, &misuse);
      EXPECT_EQ(misuse, "");
      EXPECT_TRUE(is_same_bits(got.o, want.o)) << describe(c);
      EXPECT_TRUE(is_same_bits(got.lse, want.lse)) << describe(c);
      EXPECT_LT(error(got.d_q, want.d_q), 1e-3) << describe(c);
      EXPECT_LT(error(got.d_v, want.d_v), 1e-3) << describe(c);
      EXPECT_GT(error(smoothed.lse, want.lse), 0.05);
      if (combine != Combine::kBlend) continue;
      EXPECT_GT(error(smoothed.o, want.o), 0.02);
      EXPECT_GT(error(smoothed.d_q, want.d_q), 0.02);
      EXPECT_GT(error(smoothed.d_v, want.d_v), 5e-3);
    }
  }
}

}  // namespace sparline::testing
