// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include "sparline/attention.h"

namespace sparline {
namespace {

TEST(MakeBlocks, OneSequenceWithoutSegments) {
  const auto blocks = make_blocks({}, 130, 64);
  ASSERT_EQ(blocks.size(), 3U);
  EXPECT_EQ(blocks[0].begin, 0);
  EXPECT_EQ(blocks[0].rows, 64);
  EXPECT_EQ(blocks[2].begin, 128);
  EXPECT_EQ(blocks[2].rows, 2);
  EXPECT_FALSE(blocks[2].is_protected);
}

TEST(MakeBlocks, LengthBelowOneBlock) {
  const auto blocks = make_blocks({}, 5, 64);
  ASSERT_EQ(blocks.size(), 1U);
  EXPECT_EQ(blocks[0].rows, 5);
}

TEST(MakeBlocks, NeverStraddleASegmentBorder) {
  const std::vector<Segment> segments{{0, 20, 0, true}, {20, 20, 0, false}, {20, 70, 1, false}};
  const auto blocks = make_blocks(segments, 70, 32);
  ASSERT_EQ(blocks.size(), 3U);  // the empty segment makes none
  EXPECT_EQ(blocks[0].rows, 20);
  EXPECT_TRUE(blocks[0].is_protected);
  EXPECT_EQ(blocks[1].begin, 20);
  EXPECT_EQ(blocks[1].rows, 32);
  EXPECT_EQ(blocks[1].sequence, 1);
  EXPECT_EQ(blocks[2].begin, 52);
  EXPECT_EQ(blocks[2].rows, 18);
  EXPECT_FALSE(blocks[2].is_protected);
}

TEST(Problem, HedgehogMapsHaveTwoFeaturesForEachDimension) {
  Problem problem{.head_dim = 64};
  EXPECT_EQ(feature_dim(problem), 64);
  problem.feature_map = FeatureMap::kHedgehog;
  EXPECT_EQ(feature_dim(problem), 128);
  problem.feature_map = FeatureMap::kHedgehogExp;
  EXPECT_EQ(feature_dim(problem), 128);
}

TEST(Problem, FeatureWeightsBelongToALinearBranch) {
  Problem problem{.combine = Combine::kSparse, .feature_map = FeatureMap::kHedgehog};
  EXPECT_FALSE(has_linear_branch(problem));
  EXPECT_FALSE(has_feature_weights(problem));
  problem.combine = Combine::kSum;
  EXPECT_TRUE(has_linear_branch(problem));
  EXPECT_TRUE(has_feature_weights(problem));
  problem.feature_map = FeatureMap::kSoftmax;
  EXPECT_FALSE(has_feature_weights(problem));
}

TEST(Sequences, AreThoseThatEitherAxisNames) {
  Problem problem{.num_queries = 50, .num_keys = 70};
  EXPECT_EQ(sequence_numbers(problem), std::vector<int32_t>{0});
  problem.query_segments = {{0, 20, -3, true}, {20, 20, 4, false}, {20, 50, 7, false}};
  EXPECT_EQ(sequence_numbers(problem), (std::vector<int32_t>{-3, 0, 4, 7}));
  problem.key_segments = {{0, 30, 4, false}, {30, 70, 4, true}, {70, 70, 9, false}};
  EXPECT_EQ(sequence_numbers(problem), (std::vector<int32_t>{-3, 4, 7, 9}));
}

TEST(BitGroups, CoverTheQueryBlock) {
  const Problem problem{.block_q = 33};
  EXPECT_EQ(bit_groups(problem, 0), 1);
  EXPECT_EQ(bit_groups(problem, 33), 1);
  EXPECT_EQ(bit_groups(problem, 16), 3);
  EXPECT_EQ(bit_groups(problem, 1), 33);
}

}  // namespace
}  // namespace sparline
