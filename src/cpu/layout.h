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
/// that a product walks down share a few cache sets and evict each other (measured on AVX2: 57
/// against 80 GFLOP/s at 64 x 128 x 64).
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
