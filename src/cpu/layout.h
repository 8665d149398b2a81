// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

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

/// Part `part` of `num_parts` even parts of [0, count).
constexpr BlockRange share(int64_t count, int64_t part, int64_t num_parts) {
  return {count * part / num_parts, count * (part + 1) / num_parts};
}

/// The class of a block pair: the caller's map, overridden by protected spans.
class BlockClasses {
 public:
  BlockClasses(const Plan& plan, const TensorView& block_class) : plan_(plan), map_(block_class) {}

  int operator()(int64_t b, int64_t h, int64_t i, int64_t j) const {
    if (!map_ || plan_.query_blocks[i].is_protected || plan_.key_blocks[j].is_protected) return 1;
    return map_.row<const int8_t>(b, h, i)[j * map_.stride[3]];
  }

 private:
  const Plan& plan_;
  const TensorView& map_;
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
        is_hedgehog(has_feature_weights(plan.problem)) {}

  int64_t head_dim, num_features, num_query_blocks, num_key_blocks;
  int64_t num_heads, num_kv_heads, group, max_rows;
  int64_t ld, ld_rows, ld_phi, ld_mask, ld_sum;
  bool is_linear, has_projection, is_hedgehog;
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
/// plan's num_threads.
template <class Body>
void run_tasks(const Plan& plan, const Stream& stream, int64_t num_tasks, const Body& body) {
  struct Shared {
    const Body* body;
    int64_t num_tasks;
    std::atomic<int64_t> next{0};
  } shared{&body, num_tasks};
  const Executor& executor = *stream.executor;
  const int64_t num_workers =
      std::min<int64_t>({plan.target.num_threads, executor.num_threads, num_tasks});
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

}  // namespace sparline::cpu
