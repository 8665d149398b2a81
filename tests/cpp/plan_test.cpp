// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <utility>

#include "error_text.h"
#include "sparline/attention.h"

namespace sparline {
namespace {

Problem small_problem() {
  return {.num_heads = 4, .num_kv_heads = 2, .num_queries = 100, .num_keys = 130, .head_dim = 64};
}

bool has_cuda() { return !compiled_cuda_archs().empty(); }

/// The compiled backends, as messages list them.
std::string names() { return has_cuda() ? "cuda, cpu" : "cpu"; }

/// Sets SPARLINE_BACKEND for one scope.
class ForcedBackend {
 public:
  explicit ForcedBackend(const char* name) { setenv("SPARLINE_BACKEND", name, 1); }
  ~ForcedBackend() { unsetenv("SPARLINE_BACKEND"); }
};

class PlanTest : public ::testing::Test {
 protected:
  PlanTest() { unsetenv("SPARLINE_BACKEND"); }
};

TEST_F(PlanTest, FillsInWhatTheProblemLeavesOpen) {
  const Plan p = plan(small_problem(), {.num_threads = 2});
  EXPECT_NE(p.backend, nullptr);
  EXPECT_DOUBLE_EQ(p.problem.softmax_scale, 1.0 / std::sqrt(64.0));
  ASSERT_EQ(p.problem.key_segments.size(), 1U);
  EXPECT_EQ(p.problem.key_segments[0].end, 130);
  EXPECT_EQ(p.query_blocks.size(), 1U);  // 128 rows
  EXPECT_EQ(p.key_blocks.size(), 3U);    // 64 rows
  EXPECT_GE(p.heads_per_wave, 1);
  EXPECT_EQ(p.rejected.size(), has_cuda() ? 1U : 0U);  // "cuda: it runs on CUDA tensors only"
}

TEST_F(PlanTest, IsPure) {
  const Plan a = plan(small_problem(), {.num_threads = 3});
  const Plan b = plan(small_problem(), {.num_threads = 3});
  EXPECT_EQ(explain(a), explain(b));
  EXPECT_EQ(a.forward_workspace_bytes, b.forward_workspace_bytes);
  EXPECT_EQ(a.backward_workspace_bytes, b.backward_workspace_bytes);
}

TEST_F(PlanTest, WorkspaceGrowsWithTheSequenceAndNotWithItsSquare) {
  Problem problem = small_problem();
  problem.block_q = problem.block_k = 64;
  problem.combine = Combine::kProjection;
  problem.block_map = BlockMap::kClass;
  const auto bytes = [&](int64_t length) {
    problem.num_queries = problem.num_keys = length;
    const Plan p = plan(problem, {.num_threads = 2});
    return static_cast<double>(p.forward_workspace_bytes + p.backward_workspace_bytes);
  };
  EXPECT_LT(bytes(65536) / bytes(16384), 4.5);
}

TEST_F(PlanTest, NoBackendForCudaGivesAPlanThatSaysWhy) {
  const Plan p = plan(small_problem(), {.device = Device::kCUDA, .cuda_arch = 90});
  EXPECT_EQ(p.backend, nullptr);
  EXPECT_EQ(p.rejected.size(), 2U);
  EXPECT_CONTAINS(p.reason, "no compiled backend runs this problem on CUDA");
  EXPECT_CONTAINS(p.reason, has_cuda() ? "cuda: it stores bfloat16 and float16 only"
                                       : "cuda: this build has no CUDA backend");
  EXPECT_CONTAINS(explain(p), "backend: none");
  EXPECT_CONTAINS(error_text(ErrorCode::kUnsupported, [&] { forward(p, {}, {}); }), p.reason);
}

TEST_F(PlanTest, ABackendCanBeAskedForByName) {
  EXPECT_NE(plan(small_problem(), {.backend = "cpu"}).backend, nullptr);
  EXPECT_CONTAINS(explain(plan(small_problem(), {.backend = "cpu"})), "asked for by name");
  EXPECT_CONTAINS(
      error_text(ErrorCode::kInvalidArgument, [] { plan(small_problem(), {.backend = "abacus"}); }),
      "backend must name a compiled backend (" + names() + "), got \"abacus\". Leave it empty");
}

TEST_F(PlanTest, TheEnvironmentOverridesTheTarget) {
  {
    const ForcedBackend forced("abacus");
    EXPECT_CONTAINS(
        error_text(ErrorCode::kInvalidArgument, [] { plan(small_problem(), {.backend = "cpu"}); }),
        "SPARLINE_BACKEND must name a compiled backend (" + names() + "), got \"abacus\". Unset");
  }
  {
    const ForcedBackend forced("cpu");
    EXPECT_NE(plan(small_problem(), {.backend = "abacus"}).backend, nullptr);
  }
  {
    const ForcedBackend forced("");
    EXPECT_NE(plan(small_problem(), {}).backend, nullptr);
  }
}

TEST_F(PlanTest, ExplainNamesEverythingThatWasDecided) {
  Problem problem = small_problem();
  problem.combine = Combine::kProjection;
  problem.block_map = BlockMap::kClass;
  const std::string text = explain(plan(problem, {.num_threads = 2}));
  for (const char* part :
       {"backend: cpu (", "4 heads over 2 kv heads", "100 queries x 130 keys", "head_dim 64",
        "float32", "1 x 3 of 128 x 64 rows", "classes from a block map", "projection", "softmax",
        "marginal", "workspace_bytes: route ", "threads: 2"}) {
    EXPECT_CONTAINS(text, part);
  }
}

TEST_F(PlanTest, ExplainNamesTheFeaturesInUse) {
  Problem problem = small_problem();
  const std::string plain = explain(plan(problem, {}));
  for (const char* part : {"a bit for", "skip:", "low_bit:", "mean key"}) {
    EXPECT_EQ(plain.find(part), std::string::npos) << plain;
  }
  problem.combine = Combine::kBlend;
  problem.smooth_k = true;
  problem.skip = {SkipReference::kKeptLse, -6.0, 32};
  problem.low_bit.is_enabled = true;
  const std::string text = explain(plan(problem, {}));
  for (const char* part :
       {"all critical", "blend", "skip: tiles below kept_lse + -6, decided by 32",
        "a step for every 128 query rows", "less the mean key"}) {
    EXPECT_CONTAINS(text, part);
  }
  problem.skip = {};
  problem.low_bit = {};
  problem.block_map = BlockMap::kSoft;
  problem.linear_scope = LinearScope::kComplement;
  problem.bit_rows = 1;
  EXPECT_CONTAINS(explain(plan(problem, {})),
                  "weights from a soft block map, a bit for every 1 query rows");
}

TEST_F(PlanTest, APlannedProblemCanBePlannedAgain) {
  Problem problem = small_problem();
  problem.block_q = 33;
  problem.skip = {SkipReference::kRunningMax, -1.0, 0};
  problem.low_bit.is_enabled = true;
  const Plan once = plan(problem, {});
  EXPECT_EQ(once.problem.skip.rows, 33);
  EXPECT_EQ(once.problem.low_bit.q_rows, 33);
  EXPECT_EQ(explain(plan(once.problem, {})), explain(once));
}

TEST_F(PlanTest, WhatIsOffTakesNoWorkspace) {
  Problem problem = small_problem();
  const Plan plain = plan(problem, {});
  problem.smooth_k = true;
  const Plan smooth = plan(problem, {});
  EXPECT_GT(smooth.forward_workspace_bytes, plain.forward_workspace_bytes);
  EXPECT_GT(smooth.backward_workspace_bytes, plain.backward_workspace_bytes);
  problem.low_bit.is_enabled = true;
  const Plan low_bit = plan(problem, {});
  EXPECT_GT(low_bit.forward_workspace_bytes, smooth.forward_workspace_bytes);
  EXPECT_EQ(low_bit.backward_workspace_bytes, smooth.backward_workspace_bytes);
}

TEST_F(PlanTest, CompiledBackendsDescribeTheMachine) {
  const auto backends = compiled_backends();
  ASSERT_EQ(backends.size(), has_cuda() ? 2U : 1U);
  EXPECT_TRUE(backends.back().starts_with("cpu: ")) << backends.back();
  if (has_cuda()) {
    EXPECT_TRUE(backends[0].starts_with("cuda: compiled for sm_")) << backends[0];
  }
}

// Plans for CUDA need no device.

class CudaPlanTest : public PlanTest {
 protected:
  void SetUp() override {
    if (!has_cuda()) GTEST_SKIP() << "this build has no CUDA backend";
  }

  static Problem cuda_problem() {
    Problem problem = small_problem();
    problem.dtype = DType::kBF16;
    return problem;
  }
  static Plan cuda_plan(const Problem& problem, int arch = 90) {
    return plan(problem, {.device = Device::kCUDA, .cuda_arch = arch});
  }
};

TEST_F(CudaPlanTest, DevicesThatItRunsOnAndThoseThatItDoesNot) {
  for (const int arch : {0, 80, 86, 89, 90, 100, 120}) {
    const Plan p = cuda_plan(cuda_problem(), arch);
    ASSERT_NE(p.backend, nullptr) << arch << ": " << p.reason;
    EXPECT_CONTAINS(explain(p), "backend: cuda (compiled for ");
    EXPECT_CONTAINS(explain(p), arch == 0 ? "device: any" : "device: sm_" + std::to_string(arch));
  }
  EXPECT_CONTAINS(cuda_plan(cuda_problem(), 75).reason,
                  "it needs a device of compute capability 8.0 or later, and this one is sm_75");
}

TEST_F(CudaPlanTest, EveryTargetHasItsOwnBackend) {
  EXPECT_CONTAINS(explain(plan(cuda_problem(), {})),
                  "rejected: cuda: it runs on CUDA tensors only");
  EXPECT_CONTAINS(plan(cuda_problem(), {.backend = "cuda"}).reason, "cpu: cuda was asked for");
  EXPECT_NE(plan(cuda_problem(), {.device = Device::kCUDA, .backend = "cuda"}).backend, nullptr);
}

TEST_F(CudaPlanTest, SizesThat32BitsDoNotCountAreRefused) {
  Problem problem = cuda_problem();
  problem.batch = int64_t{1} << 26;
  problem.head_dim = 4;
  EXPECT_CONTAINS(cuda_plan(problem).reason, "it counts the blocks of all heads in 32 bits");
}

TEST_F(CudaPlanTest, LowBitSaysWhatADeviceLacks) {
  Problem problem = cuda_problem();
  problem.low_bit.is_enabled = true;
  EXPECT_CONTAINS(explain(cuda_plan(problem, 86)), "sm_86 multiplies no fp8");
  EXPECT_EQ(explain(cuda_plan(problem, 89)).find("fp8"), std::string::npos);
}

TEST_F(CudaPlanTest, ExplainsWhichForwardRunsOnHopper) {
  Problem problem = cuda_problem();
  problem.head_dim = 128;
  problem.block_q = 128;
  EXPECT_CONTAINS(explain(cuda_plan(problem, 90)), "forward: Hopper's own kernel");
  EXPECT_EQ(explain(cuda_plan(problem, 80)).find("Hopper"), std::string::npos);
  problem.skip = {SkipReference::kKeptLse, -3.0, 64};
  EXPECT_CONTAINS(explain(cuda_plan(problem, 90)), "forward: Hopper's own kernel");
  problem.skip.rows = 32;
  EXPECT_CONTAINS(explain(cuda_plan(problem, 90)),
                  "because rows that skip apart by other numbers than 64 have no other");
  // Lists of key blocks lie in shared memory.
  const int64_t num_keys = problem.num_keys;
  for (const auto& [rows, most] : {std::pair{64, 1184}, std::pair{0, 2048}, std::pair{-1, 3392}}) {
    problem.skip = {};
    if (rows >= 0) problem.skip = {SkipReference::kKeptLse, -3.0, rows};
    problem.num_keys = int64_t{most} * problem.block_k;
    EXPECT_CONTAINS(explain(cuda_plan(problem, 90)), "forward: Hopper's own kernel");
    problem.num_keys += 1;
    EXPECT_CONTAINS(explain(cuda_plan(problem, 90)),
                    "the portable kernel, because its lists have no room for so many key blocks");
  }
  problem.num_keys = int64_t{16384} * problem.block_k;
  problem.skip = {};
  problem.block_q = 64;
  EXPECT_CONTAINS(explain(cuda_plan(problem, 90)), "forward: Hopper's own kernel");
  problem.num_keys += 1;
  EXPECT_CONTAINS(explain(cuda_plan(problem, 90)), "have no room for so many key blocks");
  problem.num_keys = num_keys;
  problem.skip = {SkipReference::kKeptLse, -3.0, 0};
  EXPECT_CONTAINS(explain(cuda_plan(problem, 90)),
                  "because skip rules have no other where block_q is below 65");
  problem.skip = {};
  problem.block_q = 128;
  problem.combine = Combine::kSum;
  EXPECT_EQ(explain(cuda_plan(problem, 90)).find("portable"), std::string::npos);
  problem.block_q = 96;
  EXPECT_CONTAINS(explain(cuda_plan(problem, 90)),
                  "the portable ones for the linear branch, because block_q is below head_dim");
  problem.block_q = 128;
  problem.block_k = 80;
  EXPECT_CONTAINS(explain(cuda_plan(problem, 90)),
                  "the portable ones for the linear branch, because block_k is above 64");
  problem.block_k = 64;
  problem.query_segments = {{.begin = 0, .end = 50}, {.begin = 50, .end = 100}};
  EXPECT_CONTAINS(explain(cuda_plan(problem, 90)),
                  "because a sequence has blocks of fewer rows than head_dim");
  problem.query_segments.clear();
  problem.head_dim = 96;
  EXPECT_CONTAINS(explain(cuda_plan(problem, 90)),
                  "forward: the portable kernel, because head_dim is neither 64 nor 128");
}

TEST_F(CudaPlanTest, HopperTakesNoWorkspaceWhereItsKernelsDoNotRun) {
  Problem problem = cuda_problem();
  problem.head_dim = 128;
  problem.num_queries = problem.num_keys = 4096;
  problem.combine = Combine::kSum;
  const auto forward_bytes = [&](int arch) {
    return cuda_plan(problem, arch).forward_workspace_bytes;
  };
  EXPECT_NE(forward_bytes(90), forward_bytes(80));
  EXPECT_EQ(forward_bytes(90), forward_bytes(0));  // any device
  problem.block_q = 64;
  problem.skip = {SkipReference::kKeptLse, -3.0, 0};
  EXPECT_EQ(forward_bytes(90), forward_bytes(80));
  problem.block_q = 128;
  problem.skip = {};
  problem.bit_rows = 128;
  EXPECT_EQ(forward_bytes(90), forward_bytes(80));
}

TEST_F(CudaPlanTest, WavesKeepTheWorkspaceBelowTheTensors) {
  Problem problem = cuda_problem();
  problem.batch = 2;
  problem.num_heads = problem.num_kv_heads = 12;
  problem.num_queries = problem.num_keys = 32760;
  problem.head_dim = 128;
  problem.block_map = BlockMap::kClass;
  const double q_bytes = 2.0 * 24 * 32760 * 128;
  const double row_bytes = 3.0 * 4 * 24 * 32760;
  for (const Combine combine : {Combine::kSparse, Combine::kProjection, Combine::kBlend}) {
    problem.combine = combine;
    const Plan p = cuda_plan(problem);
    EXPECT_LE(static_cast<double>(p.backward_workspace_bytes), 3.21 * q_bytes + row_bytes)
        << explain(p);
    EXPECT_GE(p.heads_per_wave, 1);
    EXPECT_LE(p.heads_per_wave, 24);
  }
  problem.num_queries = problem.num_keys = 256;  // few bytes: all heads in one wave
  EXPECT_EQ(cuda_plan(problem).heads_per_wave, 24);
}

/// All that a forward takes beside its inputs and o: workspace, map, lse, and alpha of every row.
TEST_F(CudaPlanTest, ForwardTakesHalfOfTheQueriesBytes) {
  Problem problem = cuda_problem();
  problem.block_map = BlockMap::kClass;
  problem.block_q = 128;
  problem.block_k = 64;
  struct Shape {
    int num_heads, num_tokens, head_dim;
  };
  for (const auto& [num_heads, num_tokens, head_dim] :
       {Shape{12, 32760, 128}, Shape{12, 65536, 128}, Shape{12, 131072, 128},
        Shape{24, 119056, 128}, Shape{40, 75600, 128}, Shape{48, 17776, 64}, Shape{10, 131072, 128},
        Shape{12, 16384, 128}, Shape{24, 4608, 128}}) {
    problem.num_heads = problem.num_kv_heads = num_heads;
    problem.num_queries = problem.num_keys = num_tokens;
    problem.head_dim = head_dim;
    const double rows = 1.0 * num_heads * num_tokens;
    for (const Combine combine : {Combine::kSparse, Combine::kProjection, Combine::kBlend}) {
      problem.combine = combine;
      problem.smooth_k = combine == Combine::kBlend;
      for (const int arch : {80, 90}) {
        const Plan p = cuda_plan(problem, arch);
        const double map_bytes =
            1.0 * num_heads * ((num_tokens + 127) / 128) * ((num_tokens + 63) / 64);
        const double row_bytes = combine == Combine::kBlend ? 8.0 * rows : 4.0 * rows;
        EXPECT_LE(static_cast<double>(p.forward_workspace_bytes) + map_bytes + row_bytes,
                  0.5 * 2.0 * rows * head_dim)
            << explain(p);
      }
    }
  }
}

/// Every block of fewer rows than features has a matrix of its own beside o.
TEST_F(CudaPlanTest, PackedSequencesKeepTheWorkspaceBelowTheTensors) {
  Problem problem = cuda_problem();
  problem.batch = 2;
  problem.num_heads = problem.num_kv_heads = 12;
  problem.num_queries = problem.num_keys = 32760;
  problem.head_dim = 128;
  problem.block_map = BlockMap::kClass;
  problem.combine = Combine::kProjection;
  const double q_bytes = 2.0 * 24 * 32760 * 128;
  for (const int64_t length : {40, 168, 520, 4095}) {
    problem.query_segments.clear();
    for (int64_t begin = 0; begin < problem.num_queries; begin += length) {
      problem.query_segments.push_back({.begin = begin,
                                        .end = std::min(begin + length, problem.num_queries),
                                        .sequence = static_cast<int32_t>(begin / length)});
    }
    problem.key_segments = problem.query_segments;
    const Plan p = cuda_plan(problem);
    EXPECT_LE(static_cast<double>(p.forward_workspace_bytes), 0.5 * q_bytes) << explain(p);
  }
}

TEST(DefaultExecutor, CallsEveryIndexOnce) {
  for (const int num_threads : {0, 1, 2, 5}) {
    const Executor executor = default_executor(num_threads);
    EXPECT_GE(executor.num_threads, 1);
    EXPECT_TRUE(num_threads == 0 || executor.num_threads == num_threads);
    std::vector<int> calls(100);
    executor.parallel_for(
        executor.num_threads, 100,
        [](void* context, int64_t idx) { ++(*static_cast<std::vector<int>*>(context))[idx]; },
        &calls);
    EXPECT_EQ(calls, std::vector<int>(100, 1));
  }
}

TEST(Version, HasThreeParts) { EXPECT_EQ(std::string(version()), "0.1.0"); }

}  // namespace
}  // namespace sparline
