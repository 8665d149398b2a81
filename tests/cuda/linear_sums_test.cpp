// SPDX-License-Identifier: Apache-2.0
//
// The sums of states on Hopper by themselves, at more query blocks than a whole forward can have
// under the emulator: several tiles of them, which pairs of CTAs take together. Against sums in
// float64, and pairs against single CTAs bit by bit.
#include <gtest/gtest.h>

#include <cmath>
#include <cstddef>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#include "cuda/common/tile.cuh"
#include "cuda/kernels.h"
#include "emulator/hopper.h"

namespace sparline::cuda {
namespace {

using emulator::Order;

struct SumsCase {
  int64_t dim = 64;
  DType dtype = DType::kBF16;
  int num_blocks_q = 0, num_blocks_k = 0, block_k = 3;
  int num_heads = 1, num_kv_heads = 1;
  bool has_projection = false, has_mean = false;
  LinearScope scope = LinearScope::kMarginal;
};

std::string describe(const SumsCase& c) {
  return "D " + std::to_string(c.dim) + (c.dtype == DType::kBF16 ? ", bf16, " : ", fp16, ") +
         std::to_string(c.num_blocks_q) + " x " + std::to_string(c.num_blocks_k) + " blocks" +
         (c.has_projection ? ", projection" : "");
}

/// Memory that kernels see, which begins at a multiple of 1024 bytes.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size, int fill = 0xff)
      : data_(static_cast<T*>(std::aligned_alloc(1024, (size * sizeof(T) / 1024 + 1) * 1024)),
              &std::free),
        size_(static_cast<size_t>(size)) {
    std::memset(static_cast<void*>(data_.get()), fill, size_ * sizeof(T));
  }
  T* get() const { return data_.get(); }
  T& operator[](int64_t n) const { return data_.get()[n]; }
  bool is_same(const Buffer& other) const {
    return size_ == other.size_ && std::memcmp(get(), other.get(), size_ * sizeof(T)) == 0;
  }

 private:
  std::unique_ptr<T, void (*)(void*)> data_;
  size_t size_;
};

float element(DType dtype, bf16_t bits) {
  return dtype == DType::kBF16 ? to_float(std::bit_cast<bf16>(bits))
                               : to_float(std::bit_cast<fp16>(bits));
}
bf16_t bits_of(DType dtype, float x) {
  return dtype == DType::kBF16 ? std::bit_cast<bf16_t>(from_float<bf16>(x))
                               : std::bit_cast<bf16_t>(from_float<fp16>(x));
}
float rounded(DType dtype, float x) { return element(dtype, bits_of(dtype, x)); }

struct Sums {
  Buffer<bf16_t> o, ragged;
  Buffer<float> z;
  bool is_paired = false;
};

/// A case and its inputs. Query blocks have D rows, but for the last one, which has 5.
class Problem {
 public:
  explicit Problem(const SumsCase& c)
      : c_(c),
        num_queries_((c.num_blocks_q - 1) * c.dim + 5),
        num_keys_(int64_t{c.num_blocks_k} * c.block_k - c.block_k / 2),
        k_(c.num_kv_heads * num_keys_ * c.dim),
        v_(c.num_kv_heads * num_keys_ * c.dim),
        mean_(c.num_kv_heads * c.dim),
        weight_(c.dim * c.dim),
        map_(int64_t{c.num_heads} * c.num_blocks_q * c.num_blocks_k) {
    std::mt19937 generator(7);
    std::normal_distribution<float> normal;
    for (int64_t n = 0; n < c.num_kv_heads * num_keys_ * c.dim; ++n) {
      k_[n] = bits_of(c.dtype, normal(generator));
      v_[n] = bits_of(c.dtype, normal(generator));
    }
    for (int64_t n = 0; n < c.num_kv_heads * c.dim; ++n) mean_[n] = normal(generator) / 4;
    for (int64_t n = 0; n < c.dim * c.dim; ++n) weight_[n] = normal(generator) / 8;
    for (int64_t n = 0; n < int64_t{c.num_heads} * c.num_blocks_q * c.num_blocks_k; ++n) {
      map_[n] = static_cast<int8_t>(static_cast<int>(generator() % 3) - 1);
    }
    // A row without members.
    for (int64_t j = 0; j < c.num_blocks_k; ++j) map_[3 * c.num_blocks_k + j] = 1;
  }

  Sums run(int num_multiprocessors, Order order, uint64_t seed) const {
    Sums out{.o = Buffer<bf16_t>(c_.num_heads * num_queries_ * c_.dim),
             .ragged = Buffer<bf16_t>(c_.num_heads * c_.dim * c_.dim),
             .z = Buffer<float>(c_.num_heads * c_.num_blocks_q * c_.dim)};
    LinearParams p;
    p.frame = {.queries = {.length = static_cast<int32_t>(num_queries_),
                           .block_rows = static_cast<int32_t>(c_.dim),
                           .num_blocks = c_.num_blocks_q,
                           .num_other_blocks = c_.num_blocks_k},
               .keys = {.length = static_cast<int32_t>(num_keys_),
                        .block_rows = c_.block_k,
                        .num_blocks = c_.num_blocks_k,
                        .num_other_blocks = c_.num_blocks_q},
               .num_heads = c_.num_heads,
               .num_kv_heads = c_.num_kv_heads,
               .head_dim = static_cast<int32_t>(c_.dim)};
    p.wave.count = c_.num_kv_heads;
    p.dtype = c_.dtype;
    p.block_q = static_cast<int>(c_.dim);
    p.block_k = c_.block_k;
    p.combine = c_.has_projection ? Combine::kProjection : Combine::kSum;
    p.feature_map = FeatureMap::kRelu;
    p.scope = p.map.scope = c_.scope;
    const auto rows_of = [&](bf16_t* data, int64_t num_rows) {
      return Rows{
          .data = data, .stride_h = num_rows * c_.dim, .stride_n = c_.dim, .is_vectorised = true};
    };
    p.k = rows_of(k_.get(), num_keys_);
    p.v = rows_of(v_.get(), num_keys_);
    p.map.data = map_.get();
    p.map.stride_h = int64_t{c_.num_blocks_q} * c_.num_blocks_k;
    p.map.stride_i = c_.num_blocks_k;
    p.map.stride_j = 1;
    if (c_.has_mean) p.k_mean = mean_.get();
    if (c_.has_projection) p.proj_weight = weight_.get();
    LinearSums sums{
        .o = rows_of(out.o.get(), num_queries_), .ragged = out.ragged.get(), .z = out.z.get()};
    const int64_t before = emulator::num_shared_boxes;
    emulator::set_device(90, num_multiprocessors);
    emulator::set_order(order, seed);
    const Buffer<std::byte> workspace(linear_sums_sm90_bytes(p));
    EXPECT_TRUE(linear_sums_sm90(p, sums, workspace.get(), nullptr)) << describe(c_);
    emulator::set_order(Order::kForward);
    emulator::set_device(80);
    out.is_paired = emulator::num_shared_boxes > before;
    return out;
  }

  /// Of some query blocks: at the ends of tiles, and between them.
  void expect_right(const Sums& got) const {
    for (int h = 0; h < c_.num_heads; ++h) {
      const std::vector<float> states = states_of(h / (c_.num_heads / c_.num_kv_heads));
      for (int i = 0; i < c_.num_blocks_q; ++i) {
        const bool is_last = i == c_.num_blocks_q - 1;
        if (i % 128 > 3 && i % 128 < 127 && i % 17 != 5 && !is_last) continue;
        expect_block(got, h, i, is_last, states);
      }
    }
  }

 private:
  /// (T_n, D + 1, D): h_j, then z_j.
  std::vector<float> states_of(int head) const {
    const int64_t dim = c_.dim;
    std::vector<float> states(static_cast<size_t>(c_.num_blocks_k * (dim + 1) * dim));
    const auto as_bf16 = [](double x) { return rounded(DType::kBF16, static_cast<float>(x)); };
    std::vector<float> phi(static_cast<size_t>(dim)), value(static_cast<size_t>(dim));
    for (int j = 0; j < c_.num_blocks_k; ++j) {
      std::vector<double> sum(static_cast<size_t>((dim + 1) * dim));
      const int64_t end = std::min<int64_t>(num_keys_, int64_t{j + 1} * c_.block_k);
      for (int64_t n = int64_t{j} * c_.block_k; n < end; ++n) {
        const bf16_t* const k = k_.get() + (head * num_keys_ + n) * dim;
        const bf16_t* const v = v_.get() + (head * num_keys_ + n) * dim;
        for (int64_t d = 0; d < dim; ++d) {
          const float x = element(c_.dtype, k[d]) - (c_.has_mean ? mean_[head * dim + d] : 0.0f);
          phi[static_cast<size_t>(d)] = as_bf16(std::max(x, 0.0f));
          double y = element(c_.dtype, v[d]);
          if (c_.has_projection) {
            y = 0.0;
            for (int64_t e = 0; e < dim; ++e) {
              y += double{element(c_.dtype, v[e])} * rounded(c_.dtype, weight_[d * dim + e]);
            }
          }
          value[static_cast<size_t>(d)] = as_bf16(y);
        }
        for (int64_t f = 0; f < dim; ++f) {
          const double x = phi[static_cast<size_t>(f)];
          for (int64_t d = 0; d < dim; ++d) {
            sum[static_cast<size_t>(f * dim + d)] += x * value[static_cast<size_t>(d)];
          }
          sum[static_cast<size_t>(dim * dim + f)] += x;
        }
      }
      for (size_t n = 0; n < sum.size(); ++n) {
        states[static_cast<size_t>(j) * sum.size() + n] = as_bf16(sum[n]);
      }
    }
    return states;
  }

  void expect_block(const Sums& got, int h, int i, bool is_last,
                    const std::vector<float>& states) const {
    const int64_t dim = c_.dim;
    const auto width = static_cast<size_t>((dim + 1) * dim);
    std::vector<double> want(width);
    bool is_empty = true;
    for (int j = 0; j < c_.num_blocks_k; ++j) {
      const int value = map_[(int64_t{h} * c_.num_blocks_q + i) * c_.num_blocks_k + j];
      const bool is_member = c_.scope == LinearScope::kMarginal ? value == 0 : value != 1;
      if (c_.scope != LinearScope::kAll && !is_member) continue;
      is_empty = false;
      for (size_t n = 0; n < width; ++n) want[n] += states[static_cast<size_t>(j) * width + n];
    }
    double largest = 1e-3, worst = 0.0;
    for (size_t n = 0; n < static_cast<size_t>(dim * dim); ++n) {
      largest = std::max(largest, std::abs(want[n]));
      const auto at = static_cast<int64_t>(n);
      const bf16_t bits =
          is_last ? got.ragged[h * dim * dim + at] : got.o[(h * num_queries_ + i * dim) * dim + at];
      const double difference = std::abs(element(DType::kBF16, bits) - want[n]);
      worst = std::isnan(difference) ? INFINITY : std::max(worst, difference);
    }
    EXPECT_LT(worst / largest, 5e-3) << describe(c_) << ": H of head " << h << ", block " << i;
    for (int64_t f = 0; f < dim; ++f) {
      const float z = got.z[(int64_t{h} * c_.num_blocks_q + i) * dim + f];
      const double x = want[static_cast<size_t>(dim * dim + f)];
      if (is_empty) {
        EXPECT_TRUE(std::isnan(z)) << describe(c_) << ": Z of block " << i;
      } else {
        EXPECT_NEAR(z, x, 3e-3 * std::abs(x) + 1e-3) << describe(c_) << ": Z of block " << i;
      }
    }
  }

  SumsCase c_;
  int64_t num_queries_, num_keys_;
  Buffer<bf16_t> k_, v_;
  Buffer<float> mean_, weight_;
  Buffer<int8_t> map_;
};

void expect_same(const Sums& got, const Sums& want, const std::string& what) {
  EXPECT_TRUE(got.o.is_same(want.o)) << what << ": o";
  EXPECT_TRUE(got.ragged.is_same(want.ragged)) << what << ": ragged";
  EXPECT_TRUE(got.z.is_same(want.z)) << what << ": z";
}

/// Pairs on even numbers of multiprocessors, in every order of threads.
void check_pairs(const SumsCase& c, const std::vector<int>& pairs_of = {2, 6, 4}) {
  const Problem problem(c);
  const Sums want = problem.run(3, Order::kForward, 0);
  EXPECT_FALSE(want.is_paired) << describe(c);
  problem.expect_right(want);
  int turn = 0;
  for (const int num_multiprocessors : pairs_of) {
    const auto order = static_cast<Order>(turn++ % 3);
    const Sums got = problem.run(num_multiprocessors, order, 11);
    const auto what = describe(c) + ", " + std::to_string(num_multiprocessors) + " CTAs, order " +
                      std::to_string(static_cast<int>(order));
    EXPECT_TRUE(got.is_paired) << what;
    expect_same(got, want, what);
  }
}

/// Even and odd numbers of tiles, whole chunks of states and one that is cut.
TEST(HopperSumsInPairs, SameBitsAsAlone) {
  int turn = 0;
  for (const int64_t dim : {64, 128}) {
    for (const DType dtype : {DType::kBF16, DType::kF16}) {
      for (const bool has_projection : {false, true}) {
        // 258 query blocks: three tiles, and with D 128 only two, for the time it takes.
        const bool is_odd = dim == 64 && turn % 2 == 0;
        check_pairs({.dim = dim,
                     .dtype = dtype,
                     .num_blocks_q = is_odd ? 258 : 130,
                     .num_blocks_k = turn % 3 == 0 ? 128 : 69,
                     .has_projection = has_projection,
                     .has_mean = turn % 2 == 1,
                     .scope = turn % 3 == 2 ? LinearScope::kAll : LinearScope::kMarginal});
        ++turn;
      }
    }
  }
}
TEST(HopperSumsInPairs, NothingBesideTheLastTile) {
  check_pairs({.dim = 128, .num_blocks_q = 257, .num_blocks_k = 70, .has_projection = true});
}
/// Five tiles, more slots' turns than slots, two query heads of the same states.
TEST(HopperSumsInPairs, ManyTilesOfGroupedHeads) {
  check_pairs({.num_blocks_q = 520,
               .num_blocks_k = 300,
               .block_k = 2,
               .num_heads = 2,
               .scope = LinearScope::kComplement});
}
/// The states of one head's keys take the place of those of another when the sums of all tiles are
/// done, of which the last has nothing beside it.
TEST(HopperSumsInPairs, StatesTakeThePlaceOfOthers) {
  check_pairs({.dim = 128,
               .num_blocks_q = 260,
               .num_blocks_k = 342,  // 11 MiB of states for each head: two find room
               .block_k = 2,
               .num_heads = 3,
               .num_kv_heads = 3},
              {4, 2});
}
/// One tile, or a multiprocessor that no pair would use.
TEST(HopperSumsInPairs, NotWhereTheyDoNotPay) {
  const Problem one_tile({.num_blocks_q = 128, .num_blocks_k = 5});
  EXPECT_FALSE(one_tile.run(2, Order::kForward, 0).is_paired);
  const Problem two_tiles({.num_blocks_q = 129, .num_blocks_k = 5});
  EXPECT_FALSE(two_tiles.run(5, Order::kForward, 0).is_paired);
  EXPECT_TRUE(two_tiles.run(4, Order::kForward, 0).is_paired);
}

}  // namespace
}  // namespace sparline::cuda
