// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <vector>

#include "sparline/attention.h"

namespace sparline::cpu {

constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;

/// Tile rows are padded to whole vectors of the widest instruction set.
constexpr int64_t kPadFloats = 16;
constexpr int64_t pad(int64_t num) { return (num + kPadFloats - 1) / kPadFloats * kPadFloats; }

/// Distance between tile rows: an odd number of cache lines, because at a power of two the 64 rows
/// that a product walks down share a few cache sets and evict each other.
constexpr int64_t leading_dim(int64_t num) {
  return pad(num) / kPadFloats % 2 == 1 ? pad(num) : pad(num) + kPadFloats;
}

/// A half-open range of blocks.
struct BlockRange {
  int64_t begin = 0;
  int64_t end = 0;
};

/// The blocks of one sequence.
inline BlockRange blocks_of_sequence(const std::vector<Block>& blocks, int32_t sequence) {
  const auto before = [](const Block& block, int32_t number) { return block.sequence < number; };
  const auto begin = std::lower_bound(blocks.begin(), blocks.end(), sequence, before);
  const auto end = std::lower_bound(begin, blocks.end(), sequence + 1, before);
  return {begin - blocks.begin(), end - blocks.begin()};
}

/// The rows of a k_mean, one for each sequence.
class SequenceRows {
 public:
  explicit SequenceRows(const Problem& problem) : numbers_(sequence_numbers(problem)) {}
  int64_t operator[](int32_t sequence) const {
    return std::lower_bound(numbers_.begin(), numbers_.end(), sequence) - numbers_.begin();
  }

 private:
  std::vector<int32_t> numbers_;
};

/// Part `part` of `num_parts` even parts of [0, count).
constexpr BlockRange share(int64_t count, int64_t part, int64_t num_parts) {
  return {count * part / num_parts, count * (part + 1) / num_parts};
}

/// Where rows of an axis lie in memory: position n at row order[n], or at row n without an order.
class RowOrder {
 public:
  RowOrder() = default;
  explicit RowOrder(const TensorView& order) : order_(static_cast<const int32_t*>(order.data)) {}
  int64_t operator[](int64_t position) const {
    return order_ == nullptr ? position : order_[position];
  }

 private:
  const int32_t* order_ = nullptr;
};

/// The rows of a query block that take part in a tile, as runs of whole vectors: a row outside is
/// not even computed.
struct RowRuns {
  static constexpr int64_t kMaxRuns = 128 / kPadFloats / 2;
  std::array<BlockRange, kMaxRuns> run{};
  int count = 0;
  bool is_partial = false;  // some row inside the runs takes no part: a list of 0 and 1 says which

  const BlockRange* begin() const { return run.data(); }
  const BlockRange* end() const { return run.data() + count; }
};

inline RowRuns all_rows(int64_t num_rows) { return {.run = {{{0, num_rows}}}, .count = 1}; }

/// The runs that cover the rows whose entry in `visible` is 1 (others: 0).
inline RowRuns runs_of(const float* visible, int64_t num_rows) {
  RowRuns runs;
  for (int64_t begin = 0; begin < num_rows; begin += kPadFloats) {
    const int64_t end = std::min(begin + kPadFloats, num_rows);
    const int64_t num_visible = std::count(visible + begin, visible + end, 1.0f);
    if (num_visible == 0) continue;
    if (num_visible < end - begin) runs.is_partial = true;
    if (runs.count > 0 && runs.run[runs.count - 1].end == begin) {
      runs.run[runs.count - 1].end = end;
    } else {
      runs.run[runs.count++] = {begin, end};
    }
  }
  return runs;
}

/// What the caller's block map and tile bits say of a block pair, overridden by protected spans.
class BlockPairs {
 public:
  /// `bit_rows`: rows of a query block that share one of the bits; unused without bits.
  BlockPairs(const Plan& plan, const TensorView& block_map, const TensorView& tile_bits,
             int bit_rows)
      : plan_(plan), map_(block_map), bits_(tile_bits), bit_rows_(bit_rows) {
    if (bits_) bit_groups_ = bit_groups(plan.problem, bit_rows);
  }

  bool is_protected(int64_t i, int64_t j) const {
    return plan_.query_blocks[i].is_protected || plan_.key_blocks[j].is_protected;
  }

  /// What exp(S) is multiplied by: m of a soft map, else 1 for a critical block and 0 for others.
  float sparse_weight(int64_t b, int64_t h, int64_t i, int64_t j) const {
    if (!map_ || is_protected(i, j)) return 1.0f;
    if (is_soft()) return soft(b, h, i, j);
    return block_class(b, h, i, j) == 1 ? 1.0f : 0.0f;
  }

  /// What phi(q) phi(k) is multiplied by: 1 - m, or 1 for the members of E_i. Protected queries
  /// have no linear branch.
  float linear_weight(int64_t b, int64_t h, int64_t i, int64_t j) const {
    const LinearScope scope = plan_.problem.linear_scope;
    if (plan_.query_blocks[i].is_protected) return 0.0f;
    if (scope == LinearScope::kAll) return 1.0f;
    if (!map_ || is_protected(i, j)) return 0.0f;
    if (is_soft()) return 1.0f - soft(b, h, i, j);
    const int value = block_class(b, h, i, j);
    return (scope == LinearScope::kMarginal ? value == 0 : value != 1) ? 1.0f : 0.0f;
  }

  /// The rows of query block i that see key block j. If some of them do not, `visible` (block_q
  /// floats, padded) tells them apart.
  RowRuns rows(int64_t b, int64_t h, int64_t i, int64_t j, float* visible) const {
    const int64_t num_rows = plan_.query_blocks[i].rows;
    if (!bits_ || is_protected(i, j)) return all_rows(num_rows);
    std::fill_n(visible, pad(num_rows), 0.0f);
    for (int64_t g = 0; g * bit_rows_ < num_rows; ++g) {
      const uint8_t byte =
          bits_.row<const uint8_t>(b, h, i * bit_groups_ + g)[j / 8 * bits_.stride[3]];
      if ((byte >> (j % 8) & 1) == 0) continue;
      std::fill(visible + g * bit_rows_, visible + std::min((g + 1) * bit_rows_, num_rows), 1.0f);
    }
    return runs_of(visible, num_rows);
  }

 private:
  bool is_soft() const { return map_.dtype == DType::kF32; }
  float soft(int64_t b, int64_t h, int64_t i, int64_t j) const {
    return map_.row<const float>(b, h, i)[j * map_.stride[3]];
  }
  int block_class(int64_t b, int64_t h, int64_t i, int64_t j) const {
    return map_.row<const int8_t>(b, h, i)[j * map_.stride[3]];
  }

  const Plan& plan_;
  const TensorView& map_;
  const TensorView& bits_;
  const int64_t bit_rows_;
  int64_t bit_groups_ = 0;
};

/// Floats of the block states (h_j, z_j) of `num_blocks` blocks, feature by feature: h as (F,
/// num_blocks, leading_dim(D)), then z as (num_blocks, leading_dim(F)). This is the layout of a
/// state that is summed over blocks.
constexpr int64_t states_floats(int64_t num_blocks, int64_t num_features, int64_t head_dim) {
  return num_blocks * (num_features * leading_dim(head_dim) + leading_dim(num_features));
}

/// Floats of one block's sum (H_i, Z_i): H (F x leading_dim(D)), then Z (pad(F)). This is the
/// layout of a state that is multiplied with.
constexpr int64_t sum_floats(int64_t num_features, int64_t head_dim) {
  return num_features * leading_dim(head_dim) + pad(num_features);
}

/// Parts into which the features of a head are cut to sum states in parallel.
constexpr int64_t kFeatureSlices = 16;

/// The sizes that the kernels derive from a plan. `ld`, `ld_rows`, `ld_phi`, `ld_mask`: leading
/// dimensions of tiles whose rows hold D values, block_q queries, F features, T_n key blocks.
struct Dims {
  explicit Dims(const Plan& plan)
      : head_dim(plan.problem.head_dim),
        num_features(feature_dim(plan.problem)),
        num_query_blocks(static_cast<int64_t>(plan.query_blocks.size())),
        num_key_blocks(static_cast<int64_t>(plan.key_blocks.size())),
        num_heads(plan.problem.num_heads),
        num_kv_heads(plan.problem.num_kv_heads),
        group(num_heads / num_kv_heads),
        max_rows(std::max(plan.problem.block_q, plan.problem.block_k)),
        ld(leading_dim(head_dim)),
        ld_rows(leading_dim(plan.problem.block_q)),
        ld_phi(leading_dim(num_features)),
        ld_mask(leading_dim(num_key_blocks)),
        ld_sum(sum_floats(num_features, head_dim)),
        is_linear(has_linear_branch(plan.problem)),
        has_projection(plan.problem.combine == Combine::kProjection),
        has_skip(plan.problem.skip.reference != SkipReference::kNone),
        has_row_mask(has_skip || plan.problem.bit_rows > 0),
        is_hedgehog(has_feature_weights(plan.problem)) {}

  int64_t head_dim, num_features, num_query_blocks, num_key_blocks;
  int64_t num_heads, num_kv_heads, group, max_rows;
  int64_t ld, ld_rows, ld_phi, ld_mask, ld_sum;
  bool is_linear, has_projection, has_skip, has_row_mask, is_hedgehog;
};

/// One head's hedgehog map y = x W^T + b as tiles.
struct FeatureWeights {
  const float* weight = nullptr;    // W (D x ld)
  const float* weight_t = nullptr;  // W^T (D x ld)
  const float* bias = nullptr;      // b (pad(D)); null: none
};

/// The hedgehog maps of all heads: query heads first, then key heads.
struct FeatureWeightTiles {
  static int64_t num_floats(const Dims& dims) {
    return dims.is_hedgehog ? (dims.num_heads + dims.num_kv_heads) * head_floats(dims) : 0;
  }
  static int64_t head_floats(const Dims& dims) {
    return 2 * dims.head_dim * dims.ld + pad(dims.head_dim);
  }

  FeatureWeights query(int64_t h) const { return of(h, has_query_bias); }
  FeatureWeights key(int64_t h_kv) const { return of(dims.num_heads + h_kv, has_key_bias); }

  const Dims& dims;
  float* data;
  bool has_query_bias, has_key_bias;

 private:
  FeatureWeights of(int64_t head, bool has_bias) const {
    if (!dims.is_hedgehog) return {};
    const int64_t matrix = dims.head_dim * dims.ld;
    const float* tile = data + head * head_floats(dims);
    return {tile, tile + matrix, has_bias ? tile + 2 * matrix : nullptr};
  }
};

/// Runs body(task, worker) for every task; worker numbers index scratch memory and stay below the
/// target's num_threads.
template <class Body>
void run_tasks(const Target& target, const Stream& stream, int64_t num_tasks, const Body& body) {
  struct Shared {
    const Body* body;
    int64_t num_tasks;
    std::atomic<int64_t> next{0};
  } shared{&body, num_tasks};
  const Executor& executor = *stream.executor;
  const int64_t num_workers =
      std::min<int64_t>({target.num_threads, executor.num_threads, num_tasks});
  if (num_workers <= 1) {
    for (int64_t task = 0; task < num_tasks; ++task) body(task, int64_t{0});
    return;
  }
  const auto work = [](void* context, int64_t worker) {
    Shared& all = *static_cast<Shared*>(context);
    for (int64_t task; (task = all.next.fetch_add(1, std::memory_order_relaxed)) < all.num_tasks;)
      (*all.body)(task, worker);
  };
  executor.parallel_for(static_cast<int>(num_workers), num_workers, work, &shared);
}

template <class Body>
void run_tasks(const Plan& plan, const Stream& stream, int64_t num_tasks, const Body& body) {
  run_tasks(plan.target, stream, num_tasks, body);
}

}  // namespace sparline::cpu
