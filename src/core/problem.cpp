// SPDX-License-Identifier: Apache-2.0
//
// What follows from a Problem alone.
#include <algorithm>
#include <set>

#include "sparline/attention.h"

namespace sparline {

bool has_linear_branch(const Problem& problem) { return problem.combine != Combine::kSparse; }

bool has_feature_weights(const Problem& problem) {
  return has_linear_branch(problem) && (problem.feature_map == FeatureMap::kHedgehog ||
                                        problem.feature_map == FeatureMap::kHedgehogExp);
}

int64_t feature_dim(const Problem& problem) {
  const bool is_hedgehog = problem.feature_map == FeatureMap::kHedgehog ||
                           problem.feature_map == FeatureMap::kHedgehogExp;
  return is_hedgehog ? 2 * problem.head_dim : problem.head_dim;
}

int64_t bit_groups(const Problem& problem, int rows) {
  return rows == 0 ? 1 : (problem.block_q + rows - 1) / rows;
}

std::vector<int32_t> sequence_numbers(const Problem& problem) {
  std::set<int32_t> numbers;
  for (const auto* segments : {&problem.query_segments, &problem.key_segments}) {
    if (segments->empty()) numbers.insert(Segment{}.sequence);
    for (const Segment& segment : *segments) numbers.insert(segment.sequence);
  }
  return {numbers.begin(), numbers.end()};
}

std::vector<Block> make_blocks(std::span<const Segment> segments, int64_t length, int block_rows) {
  const Segment whole{.begin = 0, .end = length};
  if (segments.empty()) segments = {&whole, 1};
  std::vector<Block> blocks;
  for (const Segment& segment : segments) {
    for (int64_t begin = segment.begin; begin < segment.end; begin += block_rows) {
      const int64_t rows = std::min<int64_t>(block_rows, segment.end - begin);
      blocks.push_back({.begin = begin,
                        .rows = static_cast<int32_t>(rows),
                        .sequence = segment.sequence,
                        .is_protected = segment.is_protected});
    }
  }
  return blocks;
}

}  // namespace sparline
