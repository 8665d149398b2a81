// SPDX-License-Identifier: Apache-2.0
#include "oracle.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <sstream>

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

bool bit(const std::vector<uint8_t>& bits, int64_t row, int64_t row_bytes, int64_t j) {
  return (bits[row * row_bytes + j / 8] >> (j % 8) & 1) != 0;
}

/// The step of a group of values, in float32 as the definition has it.
float step_of(double peak, double range) {
  const float step = static_cast<float>(peak) / static_cast<float>(range);
  return step > 0.0f ? step : 1.0f;
}
double int8_code(double x, float step) {
  return std::clamp(std::nearbyint(static_cast<float>(x) / step), -127.0f, 127.0f);
}

/// Values and steps of one head's q or k under low bit: `group_of` says which rows share a step.
struct Codes {
  std::vector<Vector> codes;
  Vector steps;
  template <class RowAt, class GroupOf>
  Codes(int64_t rows, int64_t dim, const RowAt& row_at, const GroupOf& group_of) {
    std::vector<double> peaks;
    for (int64_t n = 0; n < rows; ++n) {
      const int64_t group = group_of(n);
      if (group >= static_cast<int64_t>(peaks.size())) peaks.resize(group + 1);
      for (int64_t d = 0; d < dim; ++d)
        peaks[group] = std::max(peaks[group], std::abs(row_at(n)[d]));
    }
    for (int64_t n = 0; n < rows; ++n) {
      const float step = step_of(peaks[group_of(n)], 127.0);
      steps.push_back(step);
      codes.emplace_back();
      for (int64_t d = 0; d < dim; ++d) codes[n].push_back(int8_code(row_at(n)[d], step));
    }
  }
};

/// A key as one row sees it: position c, weight m of the sparse branch.
struct WeightedKey {
  int64_t c;
  double weight;
};

}  // namespace

double e4m3(double x) {
  static const std::vector<double> kValues = [] {
    std::vector<double> values;  // by code: 4 bits of exponent, 3 of mantissa; the last is NaN
    for (int code = 0; code < 127; ++code) {
      const int exponent = code >> 3, mantissa = code & 7;
      values.push_back(exponent == 0 ? std::ldexp(mantissa, -9)
                                     : std::ldexp(8 + mantissa, exponent - 10));
    }
    return values;
  }();
  size_t best = 0;
  for (size_t code = 1; code < kValues.size(); ++code) {
    const double closer =
        std::abs(kValues[best] - std::abs(x)) - std::abs(kValues[code] - std::abs(x));
    if (closer > 0.0 || (closer == 0.0 && code % 2 == 0)) best = code;
  }
  return std::copysign(kValues[best], x);
}

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
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const int64_t dim = p.head_dim;
  const int64_t group = p.num_heads / p.num_kv_heads;
  const double scale = p.softmax_scale == 0.0 ? 1.0 / std::sqrt(double(dim)) : p.softmax_scale;
  const auto query_rows = rows_of(p.query_segments, p.num_queries, p.block_q);
  const auto key_rows = rows_of(p.key_segments, p.num_keys, p.block_k);
  const int64_t query_blocks = num_blocks(query_rows);
  const int64_t key_blocks = num_blocks(key_rows);
  const int64_t row_bytes = (key_blocks + 7) / 8;
  const bool has_linear = p.combine != Combine::kSparse;
  const bool has_skip = p.skip.reference != SkipReference::kNone;
  const bool is_low_bit = p.low_bit.is_enabled;
  const bool is_soft = p.block_map == BlockMap::kSoft;

  // Positions become rows here, and only here.
  const auto query_at = [&](int64_t r) { return in.query_order.empty() ? r : in.query_order[r]; };
  const auto key_at = [&](int64_t c) { return in.key_order.empty() ? c : in.key_order[c]; };
  // Which of the bits of its block a row has.
  std::vector<int64_t> row_in_block(query_rows.size());
  for (size_t r = 1; r < query_rows.size(); ++r) {
    if (query_rows[r].block == query_rows[r - 1].block) row_in_block[r] = row_in_block[r - 1] + 1;
  }
  const int bit_rows = has_skip ? (p.skip.rows == 0 ? p.block_q : p.skip.rows) : p.bit_rows;
  const int64_t groups = bit_rows > 0 ? (p.block_q + bit_rows - 1) / bit_rows : 0;
  const auto group_of = [&](int64_t r) {
    return query_rows[r].block * groups + row_in_block[r] / bit_rows;
  };

  // The mean key of each sequence goes first.
  Array keys = in.k;
  const auto subtract_means = [&](Array& x) {
    for (int64_t b = 0; b < p.batch; ++b) {
      for (int64_t g = 0; g < p.num_kv_heads; ++g) {
        for (int64_t first = 0, next = 0; first < p.num_keys; first = next) {
          Vector sum(dim);
          for (next = first;
               next < p.num_keys && key_rows[next].sequence == key_rows[first].sequence; ++next) {
            add(sum.data(), 1.0, x.row(b, g, key_at(next)), dim);
          }
          for (int64_t c = first; c < next; ++c) {
            add(x.row(b, g, key_at(c)), -1.0 / double(next - first), sum.data(), dim);
          }
        }
      }
    }
  };
  if (p.smooth_k) subtract_means(keys);

  Outputs out{
      .o = Array(in.q.shape),
      .lse = Array({1, p.batch, p.num_heads, p.num_queries}),
      .d_q = Array(in.q.shape),
      .d_k = Array(in.k.shape),
      .d_v = Array(in.v.shape),
      .d_weights = {zeros_like(in.weights.proj_weight), zeros_like(in.weights.proj_bias),
                    zeros_like(in.weights.feature_weight_q), zeros_like(in.weights.feature_bias_q),
                    zeros_like(in.weights.feature_weight_k), zeros_like(in.weights.feature_bias_k),
                    zeros_like(in.weights.alpha_logit)},
      .d_soft_map = zeros_like(in.soft_map),
      .kept_bits = in.kept_bits,
      .row_votes = {},
      .most_row_votes = {},
      .contradictions = {}};
  if (has_skip) {
    out.row_votes = out.most_row_votes = Array({1, p.batch, p.num_heads, query_blocks});
  }
  Array d_k_linear(in.k.shape);
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t h = 0; h < p.num_heads; ++h) {
      const int64_t g = h / group, map = (b * p.num_heads + h) * query_blocks;
      const auto k_at = [&](int64_t c) { return keys.row(b, g, key_at(c)); };
      const auto v_at = [&](int64_t c) { return in.v.row(b, g, key_at(c)); };
      std::vector<Features> key_features;
      for (int64_t c = 0; has_linear && c < p.num_keys; ++c) {
        key_features.emplace_back(p.feature_map, k_at(c), dim,
                                  head_row(in.weights.feature_weight_k, g, dim * dim),
                                  head_row(in.weights.feature_bias_k, g, dim));
      }
      std::vector<Vector> d_phi_k(key_features.size(),
                                  has_linear ? Vector(key_features[0].phi.size()) : Vector());

      // Low-bit codes; v has a step for each sequence and channel.
      const int q_rows = p.low_bit.q_rows == 0 ? p.block_q : p.low_bit.q_rows;
      const Codes q_codes(
          is_low_bit ? p.num_queries : 0, dim,
          [&](int64_t r) { return in.q.row(b, h, query_at(r)); },
          [&](int64_t r) { return query_rows[r].block * p.block_q + row_in_block[r] / q_rows; });
      const Codes k_codes(is_low_bit ? p.num_keys : 0, dim, k_at,
                          [&](int64_t c) { return key_rows[c].block; });
      const auto v_step = [&](int32_t sequence, int64_t d) {
        double peak = 0.0;
        for (int64_t c = 0; c < p.num_keys; ++c) {
          if (key_rows[c].sequence == sequence) peak = std::max(peak, std::abs(v_at(c)[d]));
        }
        return step_of(peak, p.low_bit.v_range);
      };
      std::vector<std::pair<int32_t, std::vector<float>>> v_steps;
      for (int64_t c = 0; is_low_bit && c < p.num_keys; ++c) {
        if (c > 0 && key_rows[c].sequence == key_rows[c - 1].sequence) continue;
        v_steps.push_back({key_rows[c].sequence, {}});
        for (int64_t d = 0; d < dim; ++d) {
          v_steps.back().second.push_back(v_step(key_rows[c].sequence, d));
        }
      }

      // By how much the row of a group that is most against skipping a tile is against it.
      std::vector<Vector> objection(has_skip ? query_blocks * groups : 0,
                                    Vector(key_blocks, -kInfinity));

      for (int64_t r = 0; r < p.num_queries; ++r) {
        const Row& query = query_rows[r];
        const double* q = in.q.row(b, h, query_at(r));
        const double* d_o = in.d_o.row(b, h, query_at(r));
        double* d_q = out.d_q.row(b, h, query_at(r));
        const auto soft_at = [&](int64_t c) {
          return (map + query.block) * key_blocks + key_rows[c].block;
        };
        const auto is_forced = [&](int64_t c) {
          return query.is_protected || key_rows[c].is_protected;
        };

        // The two sets of keys, with their weights; the first by tiles, in the order of visits.
        std::vector<std::vector<WeightedKey>> tiles(key_blocks);
        std::vector<WeightedKey> linear;
        for (int64_t c = 0; c < p.num_keys; ++c) {
          const Row& key = key_rows[c];
          if (key.sequence != query.sequence) continue;
          double m = 1.0;
          int block_class = 1;
          bool is_visible = true;
          if (!is_forced(c)) {
            if (is_soft) m = in.soft_map.data[soft_at(c)];
            if (p.block_map == BlockMap::kClass) block_class = in.block_class[soft_at(c)];
            if (p.bit_rows > 0) {
              is_visible = bit(in.tile_bits, map * groups + group_of(r), row_bytes, key.block);
            }
          }
          if (block_class == 1 && is_visible) tiles[key.block].push_back({c, m});
          const bool in_scope = p.linear_scope == LinearScope::kAll || is_soft ||
                                (p.linear_scope == LinearScope::kMarginal && block_class == 0) ||
                                (p.linear_scope == LinearScope::kComplement && block_class != 1);
          if (in_scope) linear.push_back({c, is_soft ? 1.0 - m : 1.0});
        }
        const bool uses_sparse = p.combine != Combine::kLinear || query.is_protected;
        const bool uses_linear = has_linear && !query.is_protected;
        if (!uses_sparse) tiles.assign(key_blocks, {});
        if (!uses_linear) linear.clear();

        // Sparse branch, tile by tile: a running maximum and sum as the skip rule and the rounding
        // of P refer to them.
        Vector o_s(dim);
        double top = -kInfinity, sum = 0.0;
        std::vector<WeightedKey> critical;
        for (int64_t n = 0; n < key_blocks; ++n) {
          const int64_t j = in.tile_order.empty() ? n : in.tile_order[query.block * key_blocks + n];
          if (tiles[j].empty()) continue;
          Vector score;
          double tile_top = -kInfinity;
          for (const WeightedKey& key : tiles[j]) {
            score.push_back(is_low_bit
                                ? scale * q_codes.steps[r] * k_codes.steps[key.c] *
                                      dot(q_codes.codes[r].data(), k_codes.codes[key.c].data(), dim)
                                : scale * dot(q, k_at(key.c), dim));
            if (key.weight > 0.0)
              tile_top = std::max(tile_top, score.back() + std::log(key.weight));
          }
          if (has_skip) {
            const double reference =
                p.skip.reference == SkipReference::kRunningMax ? top : top + std::log(sum);
            double against = sum == 0.0 ? kInfinity : tile_top - reference - p.skip.log_threshold;
            if (p.skip.log_threshold == -kInfinity) against = kInfinity;
            const double slack = 1e-4 * (1.0 + std::abs(tile_top));
            if (is_forced(tiles[j][0].c)) {
              against = kInfinity;
            } else {
              out.row_votes.row(0, b, h)[query.block] += against < -slack ? 1.0 : 0.0;
              out.most_row_votes.row(0, b, h)[query.block] += against < slack ? 1.0 : 0.0;
            }
            double& most = objection[group_of(r)][j];
            most = std::max(most, against / slack);
            if (!bit(in.kept_bits, map * groups + group_of(r), row_bytes, j)) continue;
          }
          critical.insert(critical.end(), tiles[j].begin(), tiles[j].end());
          if (tile_top == -kInfinity) continue;
          const double new_top = std::max(top, tile_top), shrink = std::exp(top - new_top);
          for (double& value : o_s) value *= shrink;
          sum *= shrink;
          top = new_top;
          for (size_t at = 0; at < score.size(); ++at) {
            const auto& [c, m] = tiles[j][at];
            const double e = m * std::exp(score[at] - top);
            sum += e;
            if (!is_low_bit) {
              add(o_s.data(), e, v_at(c), dim);
              continue;
            }
            const auto steps = std::find_if(v_steps.begin(), v_steps.end(), [&](const auto& entry) {
              return entry.first == query.sequence;
            });
            const double code = e4m3(p.low_bit.p_range * e) / p.low_bit.p_range;
            for (int64_t d = 0; d < dim; ++d) {
              const float step = steps->second[d];
              o_s[d] += code * step * e4m3(static_cast<float>(v_at(c)[d]) / step);
            }
          }
        }
        const double lse = sum > 0.0 ? top + std::log(sum) : -kInfinity;
        for (double& value : o_s) value = sum > 0.0 ? value / sum : 0.0;
        if (!(sum > 0.0)) critical.clear();
        out.lse.row(0, b, h)[query_at(r)] = lse;

        // Linear branch: the mean of v with weights phi(q).phi(k).
        Vector o_l(dim), product(linear.size());
        const Features query_features(has_linear ? p.feature_map : FeatureMap::kIdentity, q, dim,
                                      head_row(in.weights.feature_weight_q, h, dim * dim),
                                      head_row(in.weights.feature_bias_q, h, dim));
        const auto features = static_cast<int64_t>(query_features.phi.size());
        double den = p.epsilon;
        for (size_t n = 0; n < linear.size(); ++n) {
          product[n] =
              dot(query_features.phi.data(), key_features[linear[n].c].phi.data(), features);
          den += linear[n].weight * product[n];
        }
        const bool has_members =
            std::ranges::any_of(linear, [](const WeightedKey& key) { return key.weight != 0.0; });
        if (!has_members || !(den > 0.0) || !std::isfinite(den)) linear.clear();
        for (size_t n = 0; n < linear.size(); ++n) {
          add(o_l.data(), linear[n].weight * product[n] / den, v_at(linear[n].c), dim);
        }

        // Combine, and the gradient of each branch.
        double* o = out.o.row(b, h, query_at(r));
        Vector d_o_s(d_o, d_o + dim), d_o_l(dim);
        if (uses_linear && p.combine == Combine::kBlend) {
          const double logit = in.weights.alpha_logit.row(0, b, h)[query_at(r)];
          const double a = linear.empty() ? 1.0 : 1.0 / (1.0 + std::exp(-logit));
          add(o, a, o_s.data(), dim);
          add(o, 1.0 - a, o_l.data(), dim);
          out.d_weights.alpha_logit.row(0, b, h)[query_at(r)] =
              a * (1.0 - a) * (dot(d_o, o_s.data(), dim) - dot(d_o, o_l.data(), dim));
          for (int64_t d = 0; d < dim; ++d) {
            d_o_s[d] = a * d_o[d];
            d_o_l[d] = (1.0 - a) * d_o[d];
          }
        } else {
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
        }

        // Sparse backward, from scores that no code was made of.
        const double delta = dot(d_o_s.data(), o_s.data(), dim);
        for (const auto& [c, m] : critical) {
          const double e = std::exp(scale * dot(q, k_at(c), dim) - lse);
          const double pull = dot(d_o_s.data(), v_at(c), dim) - delta;
          add(out.d_v.row(b, g, key_at(c)), m * e, d_o_s.data(), dim);
          add(d_q, scale * m * e * pull, k_at(c), dim);
          add(out.d_k.row(b, g, key_at(c)), scale * m * e * pull, q, dim);
          if (is_soft && !is_forced(c)) out.d_soft_map.data[soft_at(c)] += e * pull;
        }

        // Linear backward: o_l is a mean, so a weight pulls by how far its v lies from o_l.
        Vector d_phi_q(features);
        const double mean_pull = dot(d_o_l.data(), o_l.data(), dim);
        for (size_t n = 0; n < linear.size(); ++n) {
          const auto& [c, u] = linear[n];
          const double pull = (dot(d_o_l.data(), v_at(c), dim) - mean_pull) / den;
          add(out.d_v.row(b, g, key_at(c)), u * product[n] / den, d_o_l.data(), dim);
          add(d_phi_q.data(), u * pull, key_features[c].phi.data(), features);
          add(d_phi_k[c].data(), u * pull, query_features.phi.data(), features);
          if (is_soft && !is_forced(c)) out.d_soft_map.data[soft_at(c)] -= pull * product[n];
        }
        if (!linear.empty()) {
          query_features.backward(d_phi_q, d_q,
                                  head_row(out.d_weights.feature_weight_q, h, dim * dim),
                                  head_row(out.d_weights.feature_bias_q, h, dim));
        }
      }
      for (size_t c = 0; c < key_features.size(); ++c) {
        key_features[c].backward(d_phi_k[c], d_k_linear.row(b, g, key_at(static_cast<int64_t>(c))),
                                 head_row(out.d_weights.feature_weight_k, g, dim * dim),
                                 head_row(out.d_weights.feature_bias_k, g, dim));
      }
      for (size_t n = 0; n < objection.size(); ++n) {
        for (int64_t j = 0; j < key_blocks; ++j) {
          const bool is_kept = bit(in.kept_bits, map * groups + int64_t(n), row_bytes, j);
          const bool is_wrong = is_kept ? objection[n][j] < -1.0 : objection[n][j] > 1.0;
          if (!is_wrong) continue;
          std::ostringstream text;
          text << "head " << h << " of item " << b << ", group " << n << ", key block " << j
               << (is_kept ? " was kept" : " was skipped") << ", objection " << objection[n][j]
               << "\n";
          out.contradictions += text.str();
        }
      }
    }
  }
  // The mean takes its share of the whole gradient; the low-bit forward's is taken as published,
  // from the linear branch only (the other sums to zero but for the rounding of lse).
  if (p.smooth_k && is_low_bit) subtract_means(d_k_linear);
  add(out.d_k.data.data(), 1.0, d_k_linear.data.data(), static_cast<int64_t>(in.k.data.size()));
  if (p.smooth_k && !is_low_bit) subtract_means(out.d_k);
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
