// SPDX-License-Identifier: Apache-2.0
//
// The definition once more, in float64 and with loops over single rows and keys: no blocks of work,
// no running sums, no shared code with the library. The linear branch is the weighted mean that it
// stands for, so h and z never appear.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "sparline/attention.h"

namespace sparline::oracle {

/// A row-major float64 tensor.
struct Array {
  std::array<int64_t, 4> shape{};
  std::vector<double> data;

  Array() = default;
  explicit Array(std::array<int64_t, 4> dims, double fill = 0.0)
      : shape(dims), data(static_cast<size_t>(dims[0] * dims[1] * dims[2] * dims[3]), fill) {}
  double* row(int64_t b, int64_t h, int64_t n) {
    return data.data() + ((b * shape[1] + h) * shape[2] + n) * shape[3];
  }
  const double* row(int64_t b, int64_t h, int64_t n) const {
    return const_cast<Array*>(this)->row(b, h, n);
  }
  bool empty() const { return data.empty(); }
};

struct WeightArrays {
  Array proj_weight, proj_bias, feature_weight_q, feature_bias_q, feature_weight_k, feature_bias_k;
  Array alpha_logit;
};

struct Inputs {
  Array q, k, v, d_o;
  std::vector<int8_t> block_class;  // (B, H, T_m, T_n); empty without a map of classes
  Array soft_map;                   // (B, H, T_m, T_n); empty without a soft map
  std::vector<uint8_t> tile_bits;   // (B, H, T_m G, ceil(T_n / 8)); empty without bits
  std::vector<int32_t> query_order, key_order, tile_order;  // empty: ascending
  Array k_mean;  // (B, H_kv, S, D), not for the oracle; empty: as the case says
  /// With a skip rule: the tiles that the library kept. A decision near the threshold may go either
  /// way, and everything after it follows; so the oracle takes the decisions over and checks each.
  std::vector<uint8_t> kept_bits;
  WeightArrays weights;
};

struct Outputs {
  Array o, lse;
  Array d_q, d_k, d_v;
  WeightArrays d_weights;
  Array d_soft_map;
  std::vector<uint8_t> kept_bits;  // of the library
  Array row_votes;                 // of the library; of the oracle the fewest there may be
  Array most_row_votes;            // of the oracle
  std::string contradictions;      // of the oracle: decisions in Inputs.kept_bits that are wrong
};

/// Forward and backward. `problem.softmax_scale` may be 0 for the default.
Outputs attend(const Problem& problem, const Inputs& inputs);

/// The nearest e4m3 value, ties to the even code, saturating at 448.
double e4m3(double x);

/// For every (b, h, i, j) the score that ranks key block j for query block i, unscaled.
std::vector<double> route_scores(const Problem& problem, const Array& q, const Array& k);

/// The classes that follow from scores. Row-major (B, H, T_m, T_n).
std::vector<int8_t> classify(const Problem& problem, const RouteRule& rule,
                             const std::vector<double>& scores);

/// What every row of one axis belongs to.
struct Row {
  int64_t block;
  int32_t sequence;
  bool is_protected;
};
std::vector<Row> rows_of(const std::vector<Segment>& segments, int64_t length, int block_rows);
int64_t num_blocks(const std::vector<Row>& rows);

}  // namespace sparline::oracle
