// SPDX-License-Identifier: Apache-2.0
#include "oracle.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace sparline::oracle {
namespace {

using Vector = std::vector<double>;

double dot(const double* a, const double* b, int64_t size) {
  return std::inner_product(a, a + size, b, 0.0);
}

/// out += factor * x
void add(double* out, double factor, const double* x, int64_t size) {
  for (int64_t d = 0; d < size; ++d) out[d] += factor * x[d];
}

Vector softmax(const Vector& x, double sign) {
  Vector result(x.size());
  double top = -std::numeric_limits<double>::infinity();
  for (double value : x) top = std::max(top, sign * value);
  double sum = 0.0;
  for (size_t d = 0; d < x.size(); ++d) sum += result[d] = std::exp(sign * x[d] - top);
  for (double& value : result) value /= sum;
  return result;
}

bool is_hedgehog(FeatureMap map) {
  return map == FeatureMap::kHedgehog || map == FeatureMap::kHedgehogExp;
}

/// One row's features and their chain rule. `weight` and `bias` belong to the row's head (hedgehog
/// maps only).
class Features {
 public:
  Features(FeatureMap map, const double* x, int64_t dim, const double* weight, const double* bias)
      : map_(map), x_(x, x + dim), weight_(weight) {
    if (is_hedgehog(map)) {
      Vector y(dim);
      for (int64_t a = 0; a < dim; ++a) y[a] = bias[a] + dot(weight + a * dim, x, dim);
      if (map == FeatureMap::kHedgehog) {
        phi = softmax(y, 1.0);
        const Vector negative = softmax(y, -1.0);
        phi.insert(phi.end(), negative.begin(), negative.end());
      } else {
        for (double value : y) phi.push_back(std::exp(value));
        for (double value : y) phi.push_back(std::exp(-value));
      }
      return;
    }
    if (map == FeatureMap::kSoftmax) {
      phi = softmax(x_, 1.0);
      return;
    }
    for (double value : x_) {
      if (map == FeatureMap::kElu1) phi.push_back(value > 0.0 ? value + 1.0 : std::exp(value));
      if (map == FeatureMap::kRelu) phi.push_back(std::max(value, 0.0));
      if (map == FeatureMap::kIdentity) phi.push_back(value);
    }
  }

  /// Adds the gradient g of phi to d_x, and to d_weight and d_bias of a hedgehog map.
  void backward(const Vector& g, double* d_x, double* d_weight, double* d_bias) const {
    const auto dim = static_cast<int64_t>(x_.size());
    if (is_hedgehog(map_)) {
      const double* p = phi.data();
      const double* n = phi.data() + dim;
      const double* g_p = g.data();
      const double* g_n = g.data() + dim;
      const double mean_p = dot(g_p, p, dim);
      const double mean_n = dot(g_n, n, dim);
      for (int64_t a = 0; a < dim; ++a) {
        const double d_y = map_ == FeatureMap::kHedgehog
                               ? p[a] * (g_p[a] - mean_p) - n[a] * (g_n[a] - mean_n)
                               : g_p[a] * p[a] - g_n[a] * n[a];
        add(d_x, d_y, weight_ + a * dim, dim);
        add(d_weight + a * dim, d_y, x_.data(), dim);
        d_bias[a] += d_y;
      }
      return;
    }
    const double mean = dot(g.data(), phi.data(), dim);
    for (int64_t d = 0; d < dim; ++d) {
      if (map_ == FeatureMap::kSoftmax) d_x[d] += phi[d] * (g[d] - mean);
      if (map_ == FeatureMap::kElu1) d_x[d] += g[d] * (x_[d] > 0.0 ? 1.0 : phi[d]);
      if (map_ == FeatureMap::kRelu) d_x[d] += x_[d] > 0.0 ? g[d] : 0.0;
      if (map_ == FeatureMap::kIdentity) d_x[d] += g[d];
    }
  }

  Vector phi;

 private:
  FeatureMap map_;
  Vector x_;
  const double* weight_;
};

const double* head_row(const Array& array, int64_t h, int64_t size) {
  return array.empty() ? nullptr : array.data.data() + h * size;
}
double* head_row(Array& array, int64_t h, int64_t size) {
  return array.empty() ? nullptr : array.data.data() + h * size;
}

Array zeros_like(const Array& array) { return array.empty() ? Array{} : Array(array.shape); }

}  // namespace

std::vector<Row> rows_of(const std::vector<Segment>& segments, int64_t length, int block_rows) {
  std::vector<Segment> given = segments;
  if (given.empty()) given.push_back({.begin = 0, .end = length});
  std::vector<Row> rows;
  int64_t block = -1;
  for (const Segment& segment : given) {
    for (int64_t n = 0; n < segment.end - segment.begin; ++n) {
      if (n % block_rows == 0) ++block;
      rows.push_back({block, segment.sequence, segment.is_protected});
    }
  }
  return rows;
}

int64_t num_blocks(const std::vector<Row>& rows) { return rows.back().block + 1; }

Outputs attend(const Problem& p, const Inputs& in) {
  const int64_t dim = p.head_dim;
  const int64_t group = p.num_heads / p.num_kv_heads;
  const double scale = p.softmax_scale == 0.0 ? 1.0 / std::sqrt(double(dim)) : p.softmax_scale;
  const auto query_rows = rows_of(p.query_segments, p.num_queries, p.block_q);
  const auto key_rows = rows_of(p.key_segments, p.num_keys, p.block_k);
  const int64_t query_blocks = num_blocks(query_rows);
  const int64_t key_blocks = num_blocks(key_rows);
  const bool has_linear = p.combine != Combine::kSparse;

  Outputs out{.o = Array(in.q.shape),
              .lse = Array({1, p.batch, p.num_heads, p.num_queries}),
              .d_q = Array(in.q.shape),
              .d_k = Array(in.k.shape),
              .d_v = Array(in.v.shape),
              .d_weights = {
                  zeros_like(in.weights.proj_weight), zeros_like(in.weights.proj_bias),
                  zeros_like(in.weights.feature_weight_q), zeros_like(in.weights.feature_bias_q),
                  zeros_like(in.weights.feature_weight_k), zeros_like(in.weights.feature_bias_k)}};
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t h = 0; h < p.num_heads; ++h) {
      const int64_t g = h / group;
      std::vector<Features> key_features;
      for (int64_t c = 0; has_linear && c < p.num_keys; ++c) {
        key_features.emplace_back(p.feature_map, in.k.row(b, g, c), dim,
                                  head_row(in.weights.feature_weight_k, g, dim * dim),
                                  head_row(in.weights.feature_bias_k, g, dim));
      }
      std::vector<Vector> d_phi_k(key_features.size(),
                                  has_linear ? Vector(key_features[0].phi.size()) : Vector());

      for (int64_t r = 0; r < p.num_queries; ++r) {
        const Row& query = query_rows[r];
        const double* q = in.q.row(b, h, r);
        const double* d_o = in.d_o.row(b, h, r);
        double* d_q = out.d_q.row(b, h, r);

        // The two sets of keys.
        std::vector<int64_t> critical, linear;
        for (int64_t c = 0; c < p.num_keys; ++c) {
          const Row& key = key_rows[c];
          if (key.sequence != query.sequence) continue;
          int block_class = 1;
          if (p.has_block_map && !query.is_protected && !key.is_protected) {
            block_class =
                in.block_class[((b * p.num_heads + h) * query_blocks + query.block) * key_blocks +
                               key.block];
          }
          if (block_class == 1) critical.push_back(c);
          const bool in_scope = p.linear_scope == LinearScope::kAll ||
                                (p.linear_scope == LinearScope::kMarginal && block_class == 0) ||
                                (p.linear_scope == LinearScope::kComplement && block_class != 1);
          if (in_scope) linear.push_back(c);
        }
        const bool uses_sparse = p.combine != Combine::kLinear || query.is_protected;
        const bool uses_linear = has_linear && !query.is_protected;
        if (!uses_sparse) critical.clear();
        if (!uses_linear) linear.clear();

        // Sparse branch.
        Vector o_s(dim), probability(critical.size());
        double lse = -std::numeric_limits<double>::infinity();
        if (!critical.empty()) {
          Vector score;
          for (int64_t c : critical) score.push_back(scale * dot(q, in.k.row(b, g, c), dim));
          const double top = *std::max_element(score.begin(), score.end());
          double sum = 0.0;
          for (double s : score) sum += std::exp(s - top);
          lse = top + std::log(sum);
          for (size_t n = 0; n < critical.size(); ++n) {
            probability[n] = std::exp(score[n] - lse);
            add(o_s.data(), probability[n], in.v.row(b, g, critical[n]), dim);
          }
        }
        out.lse.row(0, b, h)[r] = lse;

        // Linear branch: the mean of v with weights phi(q).phi(k).
        Vector o_l(dim), weight(linear.size());
        const Features query_features(has_linear ? p.feature_map : FeatureMap::kIdentity, q, dim,
                                      head_row(in.weights.feature_weight_q, h, dim * dim),
                                      head_row(in.weights.feature_bias_q, h, dim));
        const auto features = static_cast<int64_t>(query_features.phi.size());
        double den = p.epsilon;
        for (size_t n = 0; n < linear.size(); ++n) {
          weight[n] = dot(query_features.phi.data(), key_features[linear[n]].phi.data(), features);
          den += weight[n];
        }
        if (linear.empty() || !(den > 0.0) || !std::isfinite(den)) linear.clear();
        for (size_t n = 0; n < linear.size(); ++n) {
          add(o_l.data(), weight[n] / den, in.v.row(b, g, linear[n]), dim);
        }

        // Combine, and the gradient of each branch.
        double* o = out.o.row(b, h, r);
        Vector d_o_l(dim);
        if (uses_sparse) add(o, 1.0, o_s.data(), dim);
        if (uses_linear && p.combine == Combine::kProjection) {
          const double* w = in.weights.proj_weight.data.data();
          for (int64_t a = 0; a < dim; ++a) {
            o[a] += dot(w + a * dim, o_l.data(), dim);
            add(d_o_l.data(), d_o[a], w + a * dim, dim);
            add(out.d_weights.proj_weight.data.data() + a * dim, d_o[a], o_l.data(), dim);
            if (!in.weights.proj_bias.empty()) {
              o[a] += in.weights.proj_bias.data[a];
              out.d_weights.proj_bias.data[a] += d_o[a];
            }
          }
        } else if (uses_linear) {
          add(o, 1.0, o_l.data(), dim);
          d_o_l.assign(d_o, d_o + dim);
        }

        // Sparse backward.
        const double delta = dot(d_o, o_s.data(), dim);
        for (size_t n = 0; n < critical.size(); ++n) {
          const int64_t c = critical[n];
          const double d_score =
              scale * probability[n] * (dot(d_o, in.v.row(b, g, c), dim) - delta);
          add(out.d_v.row(b, g, c), probability[n], d_o, dim);
          add(d_q, d_score, in.k.row(b, g, c), dim);
          add(out.d_k.row(b, g, c), d_score, q, dim);
        }

        // Linear backward: o_l is a mean, so a weight pulls by how far its v lies from o_l.
        Vector d_phi_q(features);
        const double pull = dot(d_o_l.data(), o_l.data(), dim);
        for (size_t n = 0; n < linear.size(); ++n) {
          const int64_t c = linear[n];
          const double d_weight = (dot(d_o_l.data(), in.v.row(b, g, c), dim) - pull) / den;
          add(out.d_v.row(b, g, c), weight[n] / den, d_o_l.data(), dim);
          add(d_phi_q.data(), d_weight, key_features[c].phi.data(), features);
          add(d_phi_k[c].data(), d_weight, query_features.phi.data(), features);
        }
        if (!linear.empty()) {
          query_features.backward(d_phi_q, d_q,
                                  head_row(out.d_weights.feature_weight_q, h, dim * dim),
                                  head_row(out.d_weights.feature_bias_q, h, dim));
        }
      }
      for (size_t c = 0; c < key_features.size(); ++c) {
        key_features[c].backward(d_phi_k[c], out.d_k.row(b, g, static_cast<int64_t>(c)),
                                 head_row(out.d_weights.feature_weight_k, g, dim * dim),
                                 head_row(out.d_weights.feature_bias_k, g, dim));
      }
    }
  }
  return out;
}

std::vector<double> route_scores(const Problem& p, const Array& q, const Array& k) {
  const int64_t dim = p.head_dim;
  const auto pool = [&](const Array& x, const std::vector<Row>& rows, int64_t b, int64_t h) {
    std::vector<Vector> pooled(static_cast<size_t>(num_blocks(rows)), Vector(dim));
    std::vector<int64_t> counts(pooled.size());
    for (size_t n = 0; n < rows.size(); ++n) {
      add(pooled[rows[n].block].data(), 1.0, x.row(b, h, static_cast<int64_t>(n)), dim);
      ++counts[rows[n].block];
    }
    for (size_t j = 0; j < pooled.size(); ++j) {
      for (double& value : pooled[j]) value /= static_cast<double>(counts[j]);
    }
    return pooled;
  };
  const auto query_rows = rows_of(p.query_segments, p.num_queries, p.block_q);
  const auto key_rows = rows_of(p.key_segments, p.num_keys, p.block_k);
  std::vector<double> scores;
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t h = 0; h < p.num_heads; ++h) {
      const auto pooled_k = pool(k, key_rows, b, h / (p.num_heads / p.num_kv_heads));
      for (const Vector& pooled_q : pool(q, query_rows, b, h)) {
        for (const Vector& key : pooled_k) scores.push_back(dot(pooled_q.data(), key.data(), dim));
      }
    }
  }
  return scores;
}

std::vector<int8_t> classify(const Problem& p, const RouteRule& rule,
                             const std::vector<double>& scores) {
  const auto query_rows = rows_of(p.query_segments, p.num_queries, p.block_q);
  const auto key_rows = rows_of(p.key_segments, p.num_keys, p.block_k);
  const int64_t query_blocks = num_blocks(query_rows);
  const int64_t key_blocks = num_blocks(key_rows);
  const auto count = [&](double ratio, int64_t total) {
    const double exact = ratio * static_cast<double>(total);
    if (rule.rounding == CountRounding::kFloor) return static_cast<int64_t>(std::floor(exact));
    if (rule.rounding == CountRounding::kRound) return static_cast<int64_t>(std::round(exact));
    return static_cast<int64_t>(std::ceil(exact));
  };
  std::vector<Row> query_of(query_blocks), key_of(key_blocks);
  for (const Row& row : query_rows) query_of[row.block] = row;
  for (const Row& row : key_rows) key_of[row.block] = row;

  std::vector<int8_t> classes(scores.size(), -1);
  for (int64_t at = 0; at < static_cast<int64_t>(scores.size()); at += key_blocks) {
    const Row& query = query_of[at / key_blocks % query_blocks];
    std::vector<int64_t> ranked;
    for (int64_t j = 0; j < key_blocks; ++j) {
      if (key_of[j].sequence != query.sequence) continue;
      if (query.is_protected || key_of[j].is_protected) {
        classes[at + j] = 1;
      } else {
        ranked.push_back(j);
      }
    }
    if (ranked.empty()) continue;
    std::stable_sort(ranked.begin(), ranked.end(), [&](int64_t x, int64_t y) {
      const double a = scores[at + x];
      const double b = scores[at + y];
      return std::isnan(b) ? !std::isnan(a) : a > b;
    });
    const auto total = static_cast<int64_t>(ranked.size());
    const int64_t num_critical = std::clamp<int64_t>(count(rule.critical_ratio, total), 1, total);
    const int64_t num_negligible =
        std::min(total - num_critical, count(rule.negligible_ratio, total));
    for (int64_t n = 0; n < total; ++n) {
      classes[at + ranked[n]] = static_cast<int8_t>(n < num_critical             ? 1
                                                    : n < total - num_negligible ? 0
                                                                                 : -1);
    }
  }
  return classes;
}

}  // namespace sparline::oracle
