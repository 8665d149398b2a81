// SPDX-License-Identifier: Apache-2.0
//
// Every rule is broken once, and the message is held to its three parts.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>

#include "core/backend.h"
#include "core/validate.h"
#include "error_text.h"

namespace sparline {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();

Problem good_problem() {
  return {.batch = 2,
          .num_heads = 4,
          .num_kv_heads = 2,
          .num_queries = 50,
          .num_keys = 70,
          .head_dim = 8,
          .block_q = 16,
          .block_k = 16};
}

// Problems ---------------------------------------------------------------------------------------

struct BadProblem {
  const char* message;
  std::function<void(Problem&)> damage;
};

TEST(ValidateProblem, NamesTheRuleTheValueAndTheWayOut) {
  const BadProblem cases[] = {
      {"plan: batch must be at least 1, got 0. ", [](Problem& p) { p.batch = 0; }},
      {"plan: num_kv_heads must be at least 1, got -1. ", [](Problem& p) { p.num_kv_heads = -1; }},
      {"plan: num_heads must be a positive multiple of num_kv_heads = 2, got 3. ",
       [](Problem& p) { p.num_heads = 3; }},
      {"plan: num_heads must be a positive multiple of num_kv_heads = 2, got 0. ",
       [](Problem& p) { p.num_heads = 0; }},
      {"plan: num_queries must be at least 1, got 0. ", [](Problem& p) { p.num_queries = 0; }},
      {"plan: num_keys must be at least 1, got 0. ", [](Problem& p) { p.num_keys = 0; }},
      {"plan: head_dim must be even and from 4 to 256, got 2. ",
       [](Problem& p) { p.head_dim = 2; }},
      {"plan: head_dim must be even and from 4 to 256, got 7. ",
       [](Problem& p) { p.head_dim = 7; }},
      {"plan: head_dim must be even and from 4 to 256, got 258. ",
       [](Problem& p) { p.head_dim = 258; }},
      {"plan: dtype must be float32, bfloat16 or float16, got int8. ",
       [](Problem& p) { p.dtype = DType::kI8; }},
      {"plan: block_q must be from 16 to 128, got 8. ", [](Problem& p) { p.block_q = 8; }},
      {"plan: block_k must be from 16 to 128, got 129. ", [](Problem& p) { p.block_k = 129; }},
      {"plan: softmax_scale must be finite and not negative, got nan. ",
       [](Problem& p) { p.softmax_scale = kNan; }},
      {"plan: softmax_scale must be finite and not negative, got inf. ",
       [](Problem& p) { p.softmax_scale = kInf; }},
      {"plan: softmax_scale must be finite and not negative, got -0.5. ",
       [](Problem& p) { p.softmax_scale = -0.5; }},
      {"plan: epsilon must be finite and not negative, got -1e-05. ",
       [](Problem& p) { p.epsilon = -1e-5; }},
      {"plan: epsilon must be finite and not negative, got nan. ",
       [](Problem& p) { p.epsilon = kNan; }},
      {"plan: dtype must be float32, bfloat16 or float16, got uint8. ",
       [](Problem& p) { p.dtype = DType::kU8; }},
      {"plan: bit_rows must be from 0 to block_q = 16, got 17. ",
       [](Problem& p) { p.bit_rows = 17; }},
      {"plan: bit_rows must be from 0 to block_q = 16, got -1. ",
       [](Problem& p) { p.bit_rows = -1; }},
      {"plan: linear_scope must be complement with a soft block map, got marginal. ",
       [](Problem& p) {
         p.block_map = BlockMap::kSoft;
         p.combine = Combine::kBlend;
       }},
      {"plan: a soft block map must come without a skip rule, got both. ",
       [](Problem& p) {
         p.block_map = BlockMap::kSoft;
         p.skip = {SkipReference::kKeptLse, -1.0, 0};
       }},
      {"plan: a soft block map must come without low_bit, got both. ",
       [](Problem& p) {
         p.block_map = BlockMap::kSoft;
         p.low_bit.is_enabled = true;
       }},
      {"plan: skip.log_threshold must be negative, got 0. ",
       [](Problem& p) { p.skip = {SkipReference::kKeptLse, 0.0, 0}; }},
      {"plan: skip.log_threshold must be negative, got nan. ",
       [](Problem& p) { p.skip = {SkipReference::kRunningMax, kNan, 0}; }},
      {"plan: skip.rows must be 0, block_q = 16 or a smaller multiple of 16, got 8. ",
       [](Problem& p) { p.skip = {SkipReference::kRunningMax, -1.0, 8}; }},
      {"plan: bit_rows must be 0 with a skip rule, got 4. ",
       [](Problem& p) {
         p.bit_rows = 4;
         p.skip = {SkipReference::kRunningMax, -1.0, 0};
       }},
      {"plan: low_bit.q_rows must be 0, block_q = 16 or a smaller multiple of 16, got 32. ",
       [](Problem& p) { p.low_bit = {.is_enabled = true, .q_rows = 32}; }},
      {"plan: low_bit.p_range must be above 0 and at most 448, got 449. ",
       [](Problem& p) { p.low_bit = {.is_enabled = true, .p_range = 449.0}; }},
      {"plan: low_bit.v_range must be above 0 and at most 448, got nan. ",
       [](Problem& p) { p.low_bit = {.is_enabled = true, .v_range = kNan}; }},
      {"plan: a tensor must have at most 2^40 elements, got ",
       [](Problem& p) { p.num_queries = int64_t{1} << 40; }},
      {"plan: a tensor must have at most 2^40 elements, got ",
       [](Problem& p) { p.batch = std::numeric_limits<int64_t>::max(); }},
      {"query_segments: a segment must not end before it begins, got segment 0 = [10, 0) of "
       "sequence 0. ",
       [](Problem& p) { p.query_segments = {{10, 0, 0, false}}; }},
      {"query_segments: a segment must begin where the one before it ends, here at 0, got segment "
       "0 = [1, 50) of sequence 0. ",
       [](Problem& p) { p.query_segments = {{1, 50, 0, false}}; }},
      {"key_segments: a segment must begin where the one before it ends, here at 40, got segment 1 "
       "= [30, 70) of sequence 1. ",
       [](Problem& p) { p.key_segments = {{0, 40, 0, false}, {30, 70, 1, false}}; }},
      {"key_segments: sequence numbers must not decrease, got segment 1 = [40, 70) of sequence 0. ",
       [](Problem& p) { p.key_segments = {{0, 40, 1, false}, {40, 70, 0, false}}; }},
      {"key_segments: the segments must cover all 70 rows, got segment 0 = [0, 60) of sequence 0. ",
       [](Problem& p) { p.key_segments = {{0, 60, 0, false}}; }},
      {"query_segments: the segments must cover all 50 rows, got segment 0 = [0, 51) of sequence "
       "0. ",
       [](Problem& p) { p.query_segments = {{0, 51, 0, false}}; }},
  };
  for (const BadProblem& bad : cases) {
    Problem problem = good_problem();
    bad.damage(problem);
    const std::string text =
        error_text(ErrorCode::kInvalidArgument, [&] { plan(problem, {.num_threads = 1}); });
    EXPECT_CONTAINS(text, bad.message);
    EXPECT_TRUE(text.ends_with('.')) << text;
  }
}

TEST(ValidateProblem, AcceptsEmptySegmentsAndUnusualOnes) {
  Problem problem = good_problem();
  problem.query_segments = {{0, 0, -3, true}, {0, 50, 7, false}, {50, 50, 9, false}};
  problem.key_segments = {{0, 70, 7, true}};
  EXPECT_NO_THROW(plan(problem, {.num_threads = 1}));
}

TEST(ValidateTarget, NeedsAThread) {
  EXPECT_CONTAINS(
      error_text(ErrorCode::kInvalidArgument, [] { plan(good_problem(), {.num_threads = 0}); }),
      "plan: num_threads must be at least 1, got 0. ");
}

// Arguments --------------------------------------------------------------------------------------

/// A legal call of each kind, to be damaged. Memory is real but nothing is computed: validate()
/// only looks.
class ValidateArguments : public ::testing::Test {
 protected:
  ValidateArguments() : plan_(make_plan()) {
    forward_ = {.q = queries(0),
                .k = keys(0),
                .v = keys(1),
                .block_map = classes(),
                .weights = weights(0),
                .o = queries(1),
                .lse = lse()};
    backward_ = {.d_o = queries(2),
                 .q = queries(0),
                 .k = keys(0),
                 .v = keys(1),
                 .o = queries(1),
                 .lse = lse(),
                 .block_map = classes(),
                 .weights = weights(0),
                 .d_q = queries(3),
                 .d_k = keys(2),
                 .d_v = keys(3),
                 .d_weights = weights(1)};
    route_ = {.q = queries(0), .k = keys(0), .rule = {}, .block_class = classes()};
  }

  static Plan make_plan() {
    Problem problem = good_problem();
    problem.combine = Combine::kProjection;
    problem.feature_map = FeatureMap::kHedgehog;
    problem.block_map = BlockMap::kClass;
    Plan plan = sparline::plan(problem, {.num_threads = 1});
    // Sizes of its own, so that the messages do not depend on the backend.
    plan.route_workspace_bytes = 64;
    plan.forward_workspace_bytes = 1024;
    plan.backward_workspace_bytes = 2048;
    return plan;
  }

  void* memory(int slot) { return memory_.data() + slot * kSlotBytes; }
  TensorView queries(int n) { return contiguous_view(memory(n), DType::kF32, {2, 4, 50, 8}); }
  TensorView keys(int n) { return contiguous_view(memory(4 + n), DType::kF32, {2, 2, 70, 8}); }
  TensorView lse() { return contiguous_view(memory(8), DType::kF32, {1, 2, 4, 50}); }
  TensorView classes() { return contiguous_view(memory(9), DType::kI8, {2, 4, 4, 5}); }
  Weights weights(int n) {
    const int slot = 10 + 6 * n;
    return {.proj_weight = contiguous_view(memory(slot), DType::kF32, {1, 1, 8, 8}),
            .proj_bias = contiguous_view(memory(slot + 1), DType::kF32, {1, 1, 1, 8}),
            .feature_weight_q = contiguous_view(memory(slot + 2), DType::kF32, {1, 4, 8, 8}),
            .feature_bias_q = contiguous_view(memory(slot + 3), DType::kF32, {1, 1, 4, 8}),
            .feature_weight_k = contiguous_view(memory(slot + 4), DType::kF32, {1, 2, 8, 8}),
            .feature_bias_k = contiguous_view(memory(slot + 5), DType::kF32, {1, 1, 2, 8})};
  }
  std::span<std::byte> workspace() {
    return {reinterpret_cast<std::byte*>(memory(22)), kSlotBytes};
  }

  std::string route_error() {
    return error_text(ErrorCode::kInvalidArgument, [&] { validate(plan_, route_, workspace()); });
  }
  std::string forward_error() {
    return error_text(ErrorCode::kInvalidArgument, [&] { validate(plan_, forward_, workspace()); });
  }
  std::string backward_error() {
    return error_text(ErrorCode::kInvalidArgument,
                      [&] { validate(plan_, backward_, workspace()); });
  }

  static constexpr size_t kSlotBytes = 16384;
  struct alignas(64) Line {
    std::byte bytes[64];
  };
  struct Memory {
    std::vector<Line> lines{23 * kSlotBytes / 64};
    std::byte* data() { return lines[0].bytes; }
  } memory_;
  Plan plan_;
  ForwardArgs forward_;
  BackwardArgs backward_;
  RouteArgs route_;
};

TEST_F(ValidateArguments, AcceptsLegalCalls) {
  EXPECT_NO_THROW(validate(plan_, route_, workspace()));
  EXPECT_NO_THROW(validate(plan_, forward_, workspace()));
  EXPECT_NO_THROW(validate(plan_, backward_, workspace()));
}

TEST_F(ValidateArguments, NullPointers) {
  forward_.v = {};
  EXPECT_CONTAINS(forward_error(), "forward: v must be present, got a null pointer. ");
}

TEST_F(ValidateArguments, Dtypes) {
  forward_.k.dtype = DType::kBF16;
  EXPECT_CONTAINS(forward_error(), "forward: k must have dtype float32, got bfloat16. ");
  forward_.k.dtype = DType::kF32;
  forward_.lse.dtype = DType::kF16;
  EXPECT_CONTAINS(forward_error(), "forward: lse must have dtype float32, got float16. ");
}

TEST_F(ValidateArguments, Shapes) {
  forward_.o.shape[2] = 49;
  EXPECT_CONTAINS(forward_error(), "forward: o must have shape (2, 4, 50, 8), got (2, 4, 49, 8). ");
  backward_.block_map.shape[3] = 4;
  EXPECT_CONTAINS(backward_error(),
                  "backward: block_map must have shape (2, 4, 4, 5), got (2, 4, 4, 4). ");
}

TEST_F(ValidateArguments, Alignment) {
  forward_.q.data = static_cast<char*>(forward_.q.data) + 2;
  EXPECT_CONTAINS(forward_error(), "forward: q must be aligned to its element size");
}

TEST_F(ValidateArguments, Strides) {
  forward_.q.stride[2] = -8;
  EXPECT_CONTAINS(forward_error(), "forward: q must have no negative stride");
  forward_.q.stride = {1600, 400, 1, 50};
  EXPECT_CONTAINS(forward_error(),
                  "forward: q must have unit stride in its last dimension, got (1600, 400, 1, 50)");
  forward_.q.stride = {int64_t{1} << 60, 400, 8, 1};
  EXPECT_CONTAINS(forward_error(), "forward: q must span at most 2^56 elements");
  forward_.q.stride = {0, 0, 0, 1};  // an input may be broadcast
  EXPECT_NO_THROW(validate(plan_, forward_, workspace()));
  forward_.block_map.stride = {0, 0, 5, 1};
  EXPECT_NO_THROW(validate(plan_, forward_, workspace()));
}

TEST_F(ValidateArguments, OutputsHaveNoOverlapInThemselves) {
  forward_.o.stride = {1600, 0, 8, 1};
  EXPECT_CONTAINS(forward_error(), "forward: o is written, so its elements must not overlap");
  forward_.o.stride = {1600, 8, 32, 1};  // (batch, length, heads, head_dim)
  EXPECT_NO_THROW(validate(plan_, forward_, workspace()));
}

TEST_F(ValidateArguments, OutputsShareNoMemoryWithAnythingElse) {
  forward_.o = forward_.q;
  EXPECT_CONTAINS(forward_error(), "forward: o is written, so it must not overlap q, got shared");
  backward_.d_v = backward_.d_k;
  EXPECT_CONTAINS(backward_error(), "backward: d_k is written, so it must not overlap d_v");
}

TEST_F(ValidateArguments, SlicesOfOneFusedTensorDoNotOverlap) {
  // (batch, length, three, heads, head_dim), as one projection makes it.
  Problem problem = good_problem();
  problem.num_kv_heads = 4;
  problem.num_keys = 50;
  plan_ = sparline::plan(problem, {.num_threads = 1});
  plan_.backward_workspace_bytes = 0;
  const auto slice = [&](int slot, int64_t part) {
    return TensorView{.data = static_cast<float*>(memory(slot)) + part * 32,
                      .dtype = DType::kF32,
                      .shape = {2, 4, 50, 8},
                      .stride = {50 * 96, 8, 96, 1}};
  };
  BackwardArgs args{.d_o = queries(3),
                    .q = slice(10, 0),
                    .k = slice(10, 1),
                    .v = slice(10, 2),
                    .o = queries(1),
                    .lse = lse(),
                    .d_q = slice(14, 0),
                    .d_k = slice(14, 1),
                    .d_v = slice(14, 2)};
  EXPECT_NO_THROW(validate(plan_, args, workspace()));
  args.d_v = slice(14, 1);
  EXPECT_CONTAINS(
      error_text(ErrorCode::kInvalidArgument, [&] { validate(plan_, args, workspace()); }),
      "d_k is written, so it must not overlap d_v");
}

TEST_F(ValidateArguments, TheWorkspaceIsLargeEnoughAlignedAndApart) {
  const auto error = [&](std::span<std::byte> scratch) {
    return error_text(ErrorCode::kInvalidArgument, [&] { validate(plan_, forward_, scratch); });
  };
  EXPECT_CONTAINS(error({}), "forward: workspace must be present, got a null pointer. ");
  EXPECT_CONTAINS(error(workspace().first(1023)),
                  "forward: workspace must hold the plan's 1024 bytes, got 1023. ");
  EXPECT_CONTAINS(error(workspace().subspan(32)),
                  "forward: workspace must be aligned to 64 bytes, got an address 32 past");
  EXPECT_CONTAINS(error({static_cast<std::byte*>(forward_.v.data), 4096}),
                  "forward: v must not overlap the workspace");
}

TEST_F(ValidateArguments, BlockClassIsThereExactlyWhenTheProblemHasAMap) {
  forward_.block_map = {};
  EXPECT_CONTAINS(forward_error(), "forward: block_map must be present");
  plan_.problem.block_map = BlockMap::kNone;
  EXPECT_NO_THROW(validate(plan_, forward_, workspace()));
  EXPECT_CONTAINS(backward_error(),
                  "backward: block_map must be absent when the problem has no block map");
}

TEST_F(ValidateArguments, ASoftMapIsFloatAndHasAGradient) {
  plan_.problem.block_map = BlockMap::kSoft;
  EXPECT_CONTAINS(forward_error(), "forward: block_map must have dtype float32, got int8");
  backward_.block_map.dtype = DType::kF32;
  EXPECT_CONTAINS(backward_error(), "backward: d_block_map must be present");
  backward_.block_map = classes();
  plan_.problem.block_map = BlockMap::kClass;
  backward_.d_block_map = contiguous_view(memory(22), DType::kF32, {2, 4, 4, 5});
  EXPECT_CONTAINS(backward_error(),
                  "backward: d_block_map must be absent unless the block map is soft, got");
}

TEST_F(ValidateArguments, TileBitsAreThereExactlyWhenTheProblemHasThem) {
  plan_.problem.bit_rows = 5;
  EXPECT_CONTAINS(forward_error(), "forward: tile_bits must be present");
  forward_.tile_bits = contiguous_view(memory(22), DType::kU8, {2, 4, 4, 1});
  EXPECT_CONTAINS(forward_error(),
                  "forward: tile_bits must have shape (2, 4, 16, 1), got (2, 4, 4, 1). ");
  plan_.problem.bit_rows = 0;
  EXPECT_CONTAINS(forward_error(), "forward: tile_bits must be absent when bit_rows is 0");
}

TEST_F(ValidateArguments, SkippingHasOutputsThatTheBackwardTakes) {
  forward_.kept_bits = contiguous_view(memory(22), DType::kU8, {2, 4, 4, 1});
  EXPECT_CONTAINS(forward_error(), "forward: kept_bits must be absent unless the problem has a sk");
  plan_.problem.skip = {SkipReference::kKeptLse, -1.0, 16};
  forward_.row_votes =
      contiguous_view(static_cast<char*>(memory(22)) + 4096, DType::kF32, {1, 2, 4, 4});
  plan_.forward_workspace_bytes = plan_.backward_workspace_bytes = 0;
  EXPECT_NO_THROW(validate(plan_, forward_, {}));
  EXPECT_CONTAINS(backward_error(), "backward: tile_bits must be present");
  backward_.tile_bits = forward_.kept_bits;
  EXPECT_NO_THROW(validate(plan_, backward_, {}));
  forward_.kept_bits = {};
  EXPECT_CONTAINS(forward_error(), "forward: kept_bits must be present");
}

TEST_F(ValidateArguments, OrdersArePermutations) {
  std::vector<int32_t> queries(50), keys(70);
  for (int n = 0; n < 50; ++n) queries[n] = (n * 7) % 50;
  for (int n = 0; n < 70; ++n) keys[n] = (n * 3) % 70;
  const auto set_orders = [&](auto& args) {
    args.query_order = contiguous_view(queries.data(), DType::kI32, {1, 1, 1, 50});
    args.key_order = contiguous_view(keys.data(), DType::kI32, {1, 1, 1, 70});
  };
  set_orders(route_);
  set_orders(forward_);
  set_orders(backward_);
  const auto expect_all_to_say = [&](const std::string& error) {
    EXPECT_CONTAINS(route_error(), "route: " + error);
    EXPECT_CONTAINS(forward_error(), "forward: " + error);
    EXPECT_CONTAINS(backward_error(), "backward: " + error);
  };
  EXPECT_NO_THROW(validate(plan_, route_, workspace()));
  EXPECT_NO_THROW(validate(plan_, forward_, workspace()));
  EXPECT_NO_THROW(validate(plan_, backward_, workspace()));
  queries[3] = 50;
  expect_all_to_say("query_order must be a permutation of 0 .. 49, got 50. Name every position");
  queries[3] = queries[0];
  expect_all_to_say("query_order must be a permutation of 0 .. 49, got 0 twice. ");
  queries[3] = 21;
  keys[69] = -1;
  expect_all_to_say("key_order must be a permutation of 0 .. 69, got -1. ");
  keys[69] = keys[68];
  expect_all_to_say("key_order must be a permutation of 0 .. 69, got 64 twice. ");
  forward_.key_order.shape[3] = 69;
  EXPECT_CONTAINS(forward_error(),
                  "forward: key_order must have shape (1, 1, 1, 70), got (1, 1, 1, 69). ");
}

TEST_F(ValidateArguments, EveryRowOfTileOrderIsAPermutation) {
  std::vector<int32_t> visits(4 * 5);
  for (int n = 0; n < 4 * 5; ++n) visits[n] = (n * 3) % 5;
  forward_.tile_order = contiguous_view(visits.data(), DType::kI32, {1, 1, 4, 5});
  EXPECT_CONTAINS(forward_error(), "forward: tile_order must be absent unless the problem has a s");
  plan_.problem.low_bit.is_enabled = true;
  EXPECT_NO_THROW(validate(plan_, forward_, workspace()));
  std::swap(visits[4], visits[5]);  // each number still stands there four times
  EXPECT_CONTAINS(forward_error(),
                  "forward: tile_order must be a permutation of 0 .. 4, got 0 twice. ");
  forward_.tile_order.stride[2] = 0;  // one order for all
  EXPECT_CONTAINS(forward_error(),
                  "forward: tile_order must be a permutation of 0 .. 4, got 0 twice. ");
  std::swap(visits[4], visits[5]);
  visits[5] = 5;  // in a row that is not read
  EXPECT_NO_THROW(validate(plan_, forward_, workspace()));
}

TEST_F(ValidateArguments, MeanKeysAreThereOnlyWhereKeysAreSmoothed) {
  const auto means = [&](std::array<int64_t, 4> shape) {
    return contiguous_view(memory(22), DType::kF32, shape);
  };
  plan_.route_workspace_bytes = plan_.forward_workspace_bytes = plan_.backward_workspace_bytes = 0;
  const auto set_means = [&](const TensorView& k_mean) {
    route_.k_mean = forward_.k_mean = backward_.k_mean = k_mean;
  };
  const auto expect_all_to_say = [&](const std::string& error) {
    EXPECT_CONTAINS(route_error(), "route: k_mean must " + error);
    EXPECT_CONTAINS(forward_error(), "forward: k_mean must " + error);
    EXPECT_CONTAINS(backward_error(), "backward: k_mean must " + error);
  };
  set_means(means({2, 2, 1, 8}));
  route_.rule.smooth_k = false;
  expect_all_to_say("be absent unless smooth_k is on, got a tensor. Drop it, or ");
  route_.rule.smooth_k = plan_.problem.smooth_k = true;
  EXPECT_NO_THROW(validate(plan_, route_, workspace()));
  EXPECT_NO_THROW(validate(plan_, forward_, workspace()));
  EXPECT_NO_THROW(validate(plan_, backward_, workspace()));
  plan_.problem.key_segments = {{0, 30, 0, false}, {30, 70, 2, false}};
  expect_all_to_say("have shape (2, 2, 2, 8), got (2, 2, 1, 8). ");
  plan_.problem.query_segments = {{0, 50, 1, false}};  // without keys
  set_means(means({2, 2, 3, 8}));
  EXPECT_NO_THROW(validate(plan_, forward_, workspace()));
  TensorView bad = means({2, 2, 3, 8});
  bad.dtype = DType::kBF16;
  set_means(bad);
  expect_all_to_say("have dtype float32, got bfloat16. ");
  bad = means({2, 2, 3, 8});
  bad.stride[2] = 9;
  set_means(bad);
  expect_all_to_say("be row-major without gaps, got (48, 24, 9, 1). Make it contiguous.");
  bad = means({2, 2, 3, 8});
  bad.data = static_cast<char*>(bad.data) + 4;
  set_means(bad);
  expect_all_to_say("be aligned to 8 bytes, got an address 4 past such a one. ");
  set_means(contiguous_view(route_.k.data, DType::kF32, {2, 2, 3, 8}));
  EXPECT_CONTAINS(route_error(), "route: k_mean is written, so it must not overlap k, got shared");
}

TEST_F(ValidateArguments, ABlendHasItsLogits) {
  plan_.problem.combine = Combine::kBlend;
  forward_.weights.proj_weight = forward_.weights.proj_bias = {};
  EXPECT_CONTAINS(forward_error(), "forward: alpha_logit must be present");
  forward_.weights.alpha_logit = contiguous_view(memory(22), DType::kF32, {1, 2, 4, 50});
  plan_.forward_workspace_bytes = 0;
  EXPECT_NO_THROW(validate(plan_, forward_, {}));
  plan_.problem.combine = Combine::kSum;
  EXPECT_CONTAINS(forward_error(), "forward: alpha_logit must be absent unless combine is blend");
}

TEST_F(ValidateArguments, WeightsAreThereExactlyWhenTheyAreUsed) {
  forward_.weights.proj_bias = {};  // the one optional weight
  EXPECT_NO_THROW(validate(plan_, forward_, workspace()));
  forward_.weights.feature_bias_k = {};
  EXPECT_CONTAINS(forward_error(), "forward: feature_bias_k must be present");
  plan_.problem.feature_map = FeatureMap::kElu1;
  EXPECT_CONTAINS(forward_error(),
                  "forward: feature_weight_q must be absent unless a linear branch has a hedgehog");
  plan_.problem.combine = Combine::kSum;
  EXPECT_CONTAINS(forward_error(),
                  "forward: proj_weight must be absent unless combine is projection");
}

TEST_F(ValidateArguments, WeightsArePackedFloat32) {
  forward_.weights.proj_weight.stride[2] = 9;
  EXPECT_CONTAINS(forward_error(), "forward: proj_weight must be row-major without gaps");
  forward_.weights = weights(0);
  forward_.weights.proj_bias.dtype = DType::kBF16;
  EXPECT_CONTAINS(forward_error(), "forward: proj_bias must have dtype float32, got bfloat16");
}

TEST_F(ValidateArguments, WeightGradientsFollowTheWeights) {
  backward_.d_weights.proj_bias = {};
  EXPECT_CONTAINS(backward_error(), "backward: d_proj_bias must be present");
  backward_.weights.proj_bias = {};
  EXPECT_NO_THROW(validate(plan_, backward_, workspace()));
  backward_.d_weights = weights(1);
  EXPECT_CONTAINS(backward_error(),
                  "backward: d_proj_bias must be absent where the forward had no proj_bias");
}

TEST_F(ValidateArguments, RatiosAreFractions) {
  route_.rule.critical_ratio = 5.0;
  EXPECT_CONTAINS(route_error(), "route: critical_ratio must be from 0 to 1, got 5. 5 % is 0.05.");
  route_.rule.critical_ratio = kNan;
  EXPECT_CONTAINS(route_error(), "route: critical_ratio must be from 0 to 1, got nan");
  route_.rule.critical_ratio = 0.05;
  route_.rule.negligible_ratio = -0.1;
  EXPECT_CONTAINS(route_error(), "route: negligible_ratio must be from 0 to 1, got -0.1");
}

}  // namespace
}  // namespace sparline
