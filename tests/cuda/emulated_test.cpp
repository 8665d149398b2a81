// SPDX-License-Identifier: Apache-2.0
//
// The CUDA backend, its kernels run by the emulator, against the oracle and against the CPU
// backend.
//   SPARLINE_CASES=n            random cases of each kind (default 40 to 96)
//   SPARLINE_SEED=s             only the case of this seed
//   SPARLINE_EMULATOR_ORDER=o   emulator/emulator.h
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <iostream>
#include <limits>
#include <optional>
#include <random>

#include "case.h"
#include "emulator/emulator.h"
#include "emulator/hopper.h"
#include "laws.h"

namespace sparline::testing {
namespace {

using cuda::emulator::Order;
using cuda::emulator::set_order;
using oracle::Array;
using oracle::Inputs;
using oracle::Outputs;

int64_t from_environment(const char* name, int64_t fallback) {
  const char* value = std::getenv(name);
  return value != nullptr ? std::atoll(value) : fallback;
}

uint64_t num_cases(int64_t fallback) {
  return static_cast<uint64_t>(from_environment("SPARLINE_CASES", fallback));
}

/// The case on CUDA, which has no float32.
Case on_cuda(Case c) {
  c.device = Device::kCUDA;
  if (c.problem.dtype == DType::kF32) c.problem.dtype = c.seed % 2 ? DType::kF16 : DType::kBF16;
  return c;
}

Outputs check_inputs(const Case& c, Inputs inputs, double slack = 1.0) {
  std::string misuse;
  const Outputs got = run(c, inputs, &misuse);
  inputs.kept_bits = got.kept_bits;
  EXPECT_EQ(misuse, "") << describe(c);
  const Outputs want = oracle::attend(c.problem, inputs);
  EXPECT_EQ(compare(c, got, want, slack), "") << describe(c);
  // The rounding of o, in delta, comes out of d_block_map magnified by 1 / m: m of it is compared.
  Array got_map = got.d_soft_map, want_map = want.d_soft_map;
  for (size_t n = 0; n < want_map.data.size(); ++n) {
    got_map.data[n] *= inputs.soft_map.data[n];
    want_map.data[n] *= inputs.soft_map.data[n];
  }
  // Where a row has one or two key blocks little is left of it, against the bf16 of the states.
  EXPECT_LT(error(got_map, want_map, 1.0), 0.1 * slack) << describe(c);
  return got;
}

void check_case(const Case& c, double slack = 1.0) { check_inputs(c, random_inputs(c), slack); }

Case plain_case() {
  Case c{.seed = 1};
  c.problem = {.num_heads = 2,
               .num_kv_heads = 1,
               .num_queries = 90,
               .num_keys = 100,
               .head_dim = 16,
               .dtype = DType::kBF16,
               .block_q = 32,
               .block_k = 16,
               .combine = Combine::kProjection,
               .block_map = BlockMap::kClass};
  c.device = Device::kCUDA;
  return c;
}

// Against the oracle -----------------------------------------------------------------------------

TEST(Oracle, RandomCases) {
  const int64_t seed = from_environment("SPARLINE_SEED", -1);
  if (seed >= 0) return check_case(on_cuda(random_case(static_cast<uint64_t>(seed))));
  for (uint64_t n = 0; n < num_cases(96); ++n) check_case(on_cuda(random_case(n)));
}

TEST(Oracle, EveryFeatureMapScopeAndCombination) {
  for (int map = 0; map < 6; ++map) {
    for (int scope = 0; scope < 3; ++scope) {
      for (int combine = 0; combine < 5; ++combine) {
        Case c = plain_case();
        c.seed = static_cast<uint64_t>(100 * map + 10 * scope + combine);
        c.problem.num_queries = 50;
        c.problem.num_keys = 60;
        c.problem.feature_map = static_cast<FeatureMap>(map);
        c.problem.linear_scope = static_cast<LinearScope>(scope);
        c.problem.combine = static_cast<Combine>(combine);
        check_case(c);
      }
    }
  }
}

TEST(Oracle, EveryHeadDimension) {
  for (const int64_t dim : {4, 6, 8, 14, 18, 24, 40, 62, 64, 66, 72, 96, 126, 128, 130, 256}) {
    Case c = plain_case();
    c.seed = static_cast<uint64_t>(dim);
    c.problem.num_queries = 37;
    c.problem.num_keys = 45;
    c.problem.head_dim = dim;
    c.problem.dtype = dim % 4 == 0 ? DType::kF16 : DType::kBF16;
    check_case(c);
  }
}

TEST(Oracle, EveryBlockSize) {
  for (int block = 16; block <= 128; block += block < 34 ? 3 : 19) {
    for (const bool is_query : {false, true}) {
      Case c = plain_case();
      c.seed = static_cast<uint64_t>(block);
      c.problem.num_heads = 1;
      c.problem.num_queries = c.problem.num_keys = 140;
      c.problem.block_q = is_query ? block : 64;
      c.problem.block_k = is_query ? 64 : block;
      check_case(c);
    }
  }
}

TEST(Oracle, EveryShortLength) {
  for (int64_t length = 1; length <= 34; ++length) {
    Case c = plain_case();
    c.seed = static_cast<uint64_t>(length);
    c.problem.num_queries = length;
    c.problem.num_keys = 35 - length;
    c.problem.block_q = 16;
    check_case(c);
  }
}

/// The sizes that the kernels are made for.
TEST(Oracle, FastSizes) {
  for (const DType dtype : {DType::kBF16, DType::kF16}) {
    for (const int64_t dim : {64, 128}) {
      for (const int block_q : {64, 128}) {
        Case c = plain_case();
        c.problem.num_heads = 1;
        c.problem.num_queries = 2 * block_q + 1;
        c.problem.num_keys = 300;
        c.problem.head_dim = dim;
        c.problem.dtype = dtype;
        c.problem.block_q = block_q;
        c.problem.block_k = 64;
        check_case(c);
      }
    }
  }
}

// Hopper's own forward -----------------------------------------------------------------------

/// Hopper's kernels for as long as it lives.
struct OnHopper {
  explicit OnHopper(int num_multiprocessors = 3, int resident_blocks = 1) {
    cuda::emulator::set_device(90, num_multiprocessors, resident_blocks);
  }
  ~OnHopper() { cuda::emulator::set_device(80); }
};

/// A random case that Hopper's forward serves.
Case hopper_case(uint64_t seed) {
  Case c = on_cuda(random_case(seed));
  Problem& p = c.problem;
  std::mt19937_64 engine(seed);
  p.head_dim = engine() % 2 ? 64 : 128;
  p.block_q = 16 + static_cast<int>(engine() % 113);
  if (engine() % 2) p.block_q = engine() % 2 ? 64 : 128;
  if (engine() % 2) p.block_k = 64;
  if (p.block_map == BlockMap::kSoft) p.block_map = BlockMap::kClass;
  p.bit_rows = 0;
  p.skip = {};
  p.low_bit = {};
  c.has_query_order = c.has_key_order = c.has_tile_order = false;
  if (c.layout == Layout::kPadded) c.layout = Layout::kBNHD;
  return c;
}

TEST(Hopper, RandomCases) {
  int64_t num_served = 0;
  for (uint64_t seed = 4000; seed < 4000 + num_cases(24); ++seed) {
    const OnHopper on_hopper(1 + static_cast<int>(seed % 3));
    const int64_t before = cuda::emulator::num_boxes;
    check_case(hopper_case(seed));
    num_served += cuda::emulator::num_boxes > before;
  }
  EXPECT_GT(num_served, static_cast<int64_t>(num_cases(24)) * 3 / 4);
}

/// A random case whose linear branch is made and combined by Hopper's kernels.
Case fused_case(uint64_t seed) {
  Case c = hopper_case(seed);
  Problem& p = c.problem;
  std::mt19937_64 engine(~seed);
  const auto pick = [&](auto... choices) {
    const std::common_type_t<decltype(choices)...> all[] = {choices...};
    return all[engine() % sizeof...(choices)];
  };
  p.combine = pick(Combine::kSum, Combine::kProjection, Combine::kBlend, Combine::kLinear);
  p.feature_map = pick(FeatureMap::kSoftmax, FeatureMap::kSoftmax, FeatureMap::kElu1,
                       FeatureMap::kRelu, FeatureMap::kIdentity);
  p.block_k = std::min(p.block_k, 64);
  p.block_q = std::max<int>(p.block_q, p.head_dim);  // rows for H_i
  // Smoothed keys have both signs, and so has the denominator of the identity.
  p.smooth_k = pick(false, true) && p.feature_map != FeatureMap::kIdentity;
  if (p.query_segments.empty()) p.num_queries += pick(0, 130);
  return c;
}

/// Whether the case gave sums of states to Hopper's kernels.
bool check_fused(const Case& c) {
  const int64_t before = cuda::emulator::num_counts;
  check_case(c);
  return cuda::emulator::num_counts > before;
}

/// Every order of threads in turn, where the environment asks for none.
struct OrderByTurns {
  explicit OrderByTurns(uint64_t seed) {
    if (std::getenv("SPARLINE_EMULATOR_ORDER") == nullptr) {
      set_order(static_cast<Order>(seed % 3), seed);
    }
  }
  ~OrderByTurns() {
    if (std::getenv("SPARLINE_EMULATOR_ORDER") == nullptr) set_order(Order::kForward);
  }
};

TEST(HopperLinear, RandomCases) {
  const int64_t only = from_environment("SPARLINE_SEED", -1);
  const uint64_t num = only >= 0 ? 1 : num_cases(16);
  int64_t num_served = 0;
  for (uint64_t n = 0; n < num; ++n) {
    const uint64_t seed = only >= 0 ? static_cast<uint64_t>(only) : 5000 + n;
    const OnHopper on_hopper(1 + static_cast<int>(seed % 4));
    const OrderByTurns order(seed);
    num_served += check_fused(fused_case(seed));
  }
  // Not where a sequence has two blocks of fewer rows than features.
  EXPECT_GT(num_served, static_cast<int64_t>(num) / 2);
}

/// SLA, SLA2 and SLA as its module's main branch has it.
TEST(HopperLinear, MethodsAtTheSizesThatItIsMadeFor) {
  uint64_t seed = 0;
  for (const DType dtype : {DType::kBF16, DType::kF16}) {
    for (const int64_t dim : {64, 128}) {
      for (const Combine combine : {Combine::kProjection, Combine::kBlend}) {
        for (const LinearScope scope : {LinearScope::kMarginal, LinearScope::kAll}) {
          const OnHopper on_hopper(2);
          const OrderByTurns order(++seed);
          Case c = plain_case();
          Problem& p = c.problem;
          p.num_queries = 2 * 128 + 1;
          p.num_keys = 6 * 64 + 9;
          p.head_dim = dim;
          p.dtype = dtype;
          p.block_q = dim == 64 && seed % 2 != 0 ? 64 : 128;
          p.block_k = 64;
          p.combine = combine;
          p.linear_scope = scope;
          if (scope == LinearScope::kAll) p.epsilon = 1e-5;
          if (combine == Combine::kBlend) {
            p.linear_scope = LinearScope::kComplement;
            p.smooth_k = true;
            c.brings_k_mean = scope == LinearScope::kAll;
          }
          EXPECT_TRUE(check_fused(c)) << describe(c);
        }
      }
    }
  }
}

/// Several tiles of query blocks and chunks of key blocks, which sequences only partly share: 140
/// sequences of two queries and three keys; 60 at head_dim 128, where more are left to the portable
/// kernels.
TEST(HopperLinear, ManySequences) {
  for (const int64_t dim : {64, 128}) {
    const OnHopper on_hopper;
    const OrderByTurns order(static_cast<uint64_t>(dim / 64));
    Case c = plain_case();
    Problem& p = c.problem;
    p.num_heads = 1;
    p.head_dim = dim;
    p.block_q = 128;
    const int64_t num_sequences = dim == 64 ? 140 : 60;
    p.num_queries = 2 * num_sequences;
    p.num_keys = 3 * num_sequences;
    for (int n = 0; n < num_sequences; ++n) {
      p.query_segments.push_back({2 * n, 2 * n + 2, n, n % 9 == 4});
      p.key_segments.push_back({3 * n, 3 * n + 3, n, n % 7 == 3});
    }
    EXPECT_TRUE(check_fused(c)) << describe(c);
  }
}

/// The states of one head's keys take the place of those of another, which other blocks may still
/// add up.
TEST(HopperLinear, StatesTakeThePlaceOfOthers) {
  const OnHopper on_hopper;
  const OrderByTurns order(2);
  Case c = plain_case();
  Problem& p = c.problem;
  p.num_heads = p.num_kv_heads = 3;
  p.num_queries = 130;
  p.num_keys = 342 * 16;  // 11 MiB of states for each head: two find room
  p.head_dim = 128;
  p.block_q = 128;
  p.block_k = 16;
  EXPECT_TRUE(check_fused(c)) << describe(c);
}

/// More chunks of key blocks than a warp asks for at once.
TEST(HopperLinear, ManyKeys) {
  const OnHopper on_hopper(2);
  const OrderByTurns order(2);
  Case c = plain_case();
  Problem& p = c.problem;
  p.num_heads = 1;
  p.num_queries = 70;
  p.num_keys = (32 * 64 + 70) * 16;
  p.head_dim = 64;
  p.block_q = 128;
  EXPECT_TRUE(check_fused(c)) << describe(c);
}

/// What comes after a key block of few rows lies in the same copy. Here it is NaN, and no sum but
/// that of the last sequence has a part of it: without critical blocks the linear branch alone
/// reads values.
TEST(HopperLinear, RowsOfOtherBlocksAreNotRead) {
  uint64_t seed = 0;
  for (const DType dtype : {DType::kF16, DType::kBF16}) {
    for (const Combine combine : {Combine::kLinear, Combine::kProjection}) {
      const OnHopper on_hopper(2);
      const OrderByTurns order(++seed);
      constexpr int64_t kLast = 10, kRows = 3;
      Case c = plain_case();
      Problem& p = c.problem;
      p.num_heads = 1;
      p.num_queries = kLast + 1;
      for (int64_t n = 0; n <= kLast; ++n) {
        const auto sequence = static_cast<int32_t>(n);
        p.query_segments.push_back({n, n + 1, sequence, false});
        if (n < kLast / 2) continue;  // no keys
        const int64_t begin = (n - kLast / 2) * kRows;
        p.key_segments.push_back({begin, begin + kRows, sequence, false});
      }
      p.num_keys = p.key_segments.back().end;
      p.head_dim = 64;
      p.dtype = dtype;
      p.block_q = 128;
      p.block_k = 64;
      p.combine = combine;
      p.linear_scope = LinearScope::kAll;
      Inputs inputs = random_inputs(c);
      std::fill(inputs.block_class.begin(), inputs.block_class.end(), int8_t{0});
      std::string misuse;
      const Outputs want = run(c, inputs, &misuse);
      for (int64_t n = p.num_keys - kRows; n < p.num_keys; ++n) {
        std::fill_n(inputs.v.row(0, 0, n), p.head_dim, n % 2 ? std::nan("") : HUGE_VAL);
      }
      const int64_t before = cuda::emulator::num_counts;
      const Outputs got = run(c, inputs, &misuse);
      EXPECT_GT(cuda::emulator::num_counts, before) << describe(c);
      EXPECT_EQ(misuse, "") << describe(c);
      EXPECT_TRUE(std::equal(got.o.row(0, 0, 0), got.o.row(0, 0, kLast), want.o.row(0, 0, 0)))
          << describe(c);
      EXPECT_TRUE(std::isnan(got.o.row(0, 0, kLast)[0])) << describe(c);
    }
  }
}

/// Whether two arrays are the same in rows [begin, end) of all heads.
bool is_same_in_rows(const Array& a, const Array& b, int64_t begin, int64_t end) {
  for (int64_t item = 0; item < a.shape[0]; ++item) {
    for (int64_t h = 0; h < a.shape[1]; ++h) {
      for (int64_t n = begin; n < end; ++n) {
        if (!std::equal(a.row(item, h, n), a.row(item, h, n) + a.shape[3], b.row(item, h, n))) {
          return false;
        }
      }
    }
  }
  return true;
}

/// Packed sequences, whose blocks lie in the same copies, tiles of sums and chunks of states: NaN
/// or infinity in the keys and values of one of them reaches no other.
TEST(Hopper, PackedSequencesDoNotMeet) {
  uint64_t seed = 0;
  for (const int64_t dim : {64, 128}) {
    for (const Combine combine :
         {Combine::kSparse, Combine::kSum, Combine::kProjection, Combine::kBlend}) {
      for (const double poison : {std::nan(""), HUGE_VAL}) {
        const OnHopper on_hopper(2);
        const OrderByTurns order(++seed);
        Case c = plain_case();
        c.seed = seed;
        Problem& p = c.problem;
        p.num_heads = 1;
        p.head_dim = dim;
        p.dtype = seed % 4 < 2 ? DType::kBF16 : DType::kF16;
        p.block_q = 128;
        p.block_k = seed % 3 == 0 ? 40 : 64;
        p.combine = combine;
        p.linear_scope = seed % 5 < 3 ? LinearScope::kAll : LinearScope::kMarginal;
        constexpr int64_t kEnds[] = {0, 70, 180, 320};
        p.num_queries = p.num_keys = kEnds[3];
        for (int n = 0; n < 3; ++n) {
          p.query_segments.push_back({kEnds[n], kEnds[n + 1], n, false});
          p.key_segments.push_back({kEnds[n], kEnds[n + 1], n, false});
        }
        const Inputs clean = random_inputs(c);
        std::string misuse;
        const int64_t before = cuda::emulator::num_boxes;
        const Outputs want = run(c, clean, &misuse);
        EXPECT_GT(cuda::emulator::num_boxes, before) << describe(c);
        for (const bool is_key : {false, true}) {
          Inputs inputs = clean;
          Array& target = is_key ? inputs.k : inputs.v;
          for (int64_t n = kEnds[1]; n < kEnds[2]; ++n) {
            std::fill_n(target.row(0, 0, n), dim, poison);
          }
          const Outputs got = run(c, inputs, &misuse);
          const auto what = describe(c) + (is_key ? ", keys" : ", values");
          for (int n : {0, 2}) {
            EXPECT_TRUE(is_same_in_rows(got.o, want.o, kEnds[n], kEnds[n + 1])) << what;
            for (int64_t r = kEnds[n]; r < kEnds[n + 1]; ++r) {
              EXPECT_EQ(got.lse.row(0, 0, 0)[r], want.lse.row(0, 0, 0)[r]) << what;
            }
          }
          if (!is_key && combine != Combine::kSparse && p.linear_scope == LinearScope::kAll) {
            EXPECT_FALSE(std::isfinite(got.o.row(0, 0, kEnds[1])[0])) << what;
          }
        }
        EXPECT_EQ(misuse, "") << describe(c);
      }
    }
  }
}

/// Nor does it leave a block that is not critical.
TEST(Hopper, ValuesOfOtherBlocksAreNotRead) {
  uint64_t seed = 0;
  for (const int64_t dim : {64, 128}) {
    for (const int block_k : {24, 24, 48, 48, 64, 64, 100, 100, 128, 128}) {
      const OnHopper on_hopper(2);
      const OrderByTurns order(++seed);
      Case c = plain_case();
      Problem& p = c.problem;
      p.num_heads = p.num_kv_heads = 1;
      p.num_queries = p.block_q = seed % 2 != 0 ? 64 : 128;
      p.num_keys = 5 * block_k - 3;
      p.head_dim = dim;
      p.block_k = block_k;
      p.combine = Combine::kSparse;
      Inputs inputs = random_inputs(c);
      inputs.block_class = {1, 0, 1, 0, 1};
      std::string misuse;
      const Outputs want = run(c, inputs, &misuse);
      for (const int64_t j : {1, 3}) {
        for (int64_t n = j * block_k; n < (j + 1) * block_k; ++n) {
          std::fill_n(inputs.v.row(0, 0, n), dim, n % 2 ? std::nan("") : HUGE_VAL);
          std::fill_n(inputs.k.row(0, 0, n), dim, n % 2 ? HUGE_VAL : std::nan(""));
        }
      }
      const int64_t before = cuda::emulator::num_boxes;
      const Outputs got = run(c, inputs, &misuse);
      EXPECT_GT(cuda::emulator::num_boxes, before) << describe(c);
      EXPECT_TRUE(is_same_bits(got.o, want.o)) << describe(c);
      EXPECT_TRUE(is_same_bits(got.lse, want.lse)) << describe(c);
      EXPECT_EQ(misuse, "") << describe(c);
    }
  }
}

/// Blocks that wait for each other must all have room.
TEST(HopperLinear, PortableWhereNoBlockFits) {
  const OnHopper on_hopper(3, 0);
  Case c = plain_case();
  c.problem.head_dim = 64;
  c.problem.block_q = 128;
  EXPECT_FALSE(check_fused(c)) << describe(c);
}

/// A dense call that Hopper's forward serves: whether it did, with the right result.
bool is_served_by_hopper() {
  const OnHopper on_hopper;
  Case c = plain_case();
  c.problem.head_dim = 64;
  c.problem.block_q = 128;
  c.problem.block_map = BlockMap::kNone;
  c.problem.combine = Combine::kSparse;
  const int64_t before = cuda::emulator::num_boxes;
  check_case(c);
  return cuda::emulator::num_boxes > before;
}
/// The variable is read once in a process: each value has one of its own.
TEST(HopperForced, PortableKernelsServe) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const auto serve = [](const char* arch) {
    setenv("SPARLINE_CUDA_ARCH", arch, 1);
    const bool is_hopper = is_served_by_hopper();
    std::_Exit(::testing::Test::HasFailure() ? 2 : is_hopper ? 90 : 80);
  };
  EXPECT_EXIT(serve("80"), ::testing::ExitedWithCode(80), "");
  EXPECT_EXIT(serve(""), ::testing::ExitedWithCode(90), "");
}
TEST(HopperForced, OtherKernelsAreRefused) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const auto serve = [] {
    setenv("SPARLINE_CUDA_ARCH", "70", 1);
    try {
      is_served_by_hopper();
    } catch (const Error& error) {
      std::cerr << error.what();
      std::_Exit(1);
    }
    std::_Exit(0);
  };
  EXPECT_EXIT(serve(), ::testing::ExitedWithCode(1),
              "SPARLINE_CUDA_ARCH must be 80, .* got 70. Unset it");
}

TEST(HopperLinear, ResultsDoNotDependOnTheOrderOfThreads) {
  for (uint64_t seed = 5100; seed < 5104; ++seed) {
    const Case c = fused_case(seed);
    const Inputs inputs = random_inputs(c);
    std::string misuse;
    set_order(Order::kForward);
    Outputs want;
    {
      const OnHopper on_hopper(1);
      want = run(c, inputs, &misuse);
    }
    for (const Order order : {Order::kReverse, Order::kRandom}) {
      const OnHopper on_hopper(order == Order::kRandom ? 5 : 2);
      set_order(order, seed);
      expect_same_bits(run(c, inputs, &misuse), want, describe(c));
    }
    set_order(Order::kForward);
    EXPECT_EQ(misuse, "") << describe(c);
  }
}

/// All tiles of a block in one stream, several times around the slots.
TEST(Hopper, SizesThatItIsMadeFor) {
  const OnHopper on_hopper(1);
  for (const DType dtype : {DType::kBF16, DType::kF16}) {
    for (const int64_t dim : {64, 128}) {
      for (const Combine combine : {Combine::kSparse, Combine::kProjection}) {
        for (const int block_q : {64, 128}) {
          Case c = plain_case();
          c.problem.num_queries = 2 * 128 + 1;
          c.problem.num_keys = 12 * 64 + 9;
          c.problem.head_dim = dim;
          c.problem.dtype = dtype;
          c.problem.combine = combine;
          c.problem.block_q = block_q;
          c.problem.block_k = 64;
          const int64_t before = cuda::emulator::num_boxes;
          check_case(c);
          EXPECT_GT(cuda::emulator::num_boxes, before) << describe(c);
        }
      }
    }
  }
}

/// The same bits in every order of threads.
void check_orders(const Case& c, const Inputs& inputs, uint64_t seed) {
  std::string misuse;
  set_order(Order::kForward);
  const Outputs want = run(c, inputs, &misuse);
  for (const Order order : {Order::kReverse, Order::kRandom}) {
    set_order(order, seed);
    expect_same_bits(run(c, inputs, &misuse), want, describe(c));
  }
  set_order(Order::kForward);
  EXPECT_EQ(misuse, "") << describe(c);
}

TEST(Hopper, ResultsDoNotDependOnTheOrderOfThreads) {
  const OnHopper on_hopper;
  for (uint64_t seed = 4100; seed < 4104; ++seed) {
    const Case c = hopper_case(seed);
    check_orders(c, random_inputs(c), seed);
  }
}

// With a skip rule ---------------------------------------------------------------------------

/// A random case of a skip rule that Hopper's forward serves.
Case skip_case(uint64_t seed) {
  Case c = hopper_case(seed);
  Problem& p = c.problem;
  std::mt19937_64 engine(seed * 7);
  const auto pick = [&](auto... choices) {
    const std::common_type_t<decltype(choices)...> all[] = {choices...};
    return all[engine() % sizeof...(choices)];
  };
  if (p.block_q <= 64) p.block_q += 64;
  p.skip = {.reference = pick(SkipReference::kRunningMax, SkipReference::kKeptLse),
            .log_threshold = pick(-0.2, -1.0, -2.0, -3.0, -HUGE_VAL),
            .rows = pick(0, p.block_q)};
  if (pick(false, true)) p.block_map = BlockMap::kNone;
  if (pick(false, true)) p.combine = Combine::kSparse;
  if (p.key_segments.empty()) p.num_keys += pick(0, 100, 500);
  c.wants_row_votes = pick(false, true);
  return c;
}

/// One by which every 64 rows decide for themselves.
Case apart_case(uint64_t seed) {
  Case c = skip_case(seed);
  c.problem.skip.rows = 64;
  return c;
}

/// Keys of which some blocks say little to all queries.
Inputs skip_inputs(const Case& c) {
  Inputs inputs = random_inputs(c);
  std::mt19937_64 engine(c.seed * 11);
  constexpr double kFactors[] = {0.02, 0.02, 0.3, 1.0, 2.5};
  for (int64_t b = 0; b < c.problem.batch; ++b) {
    for (int64_t h = 0; h < c.problem.num_kv_heads; ++h) {
      double factor = 1.0;
      for (int64_t n = 0; n < c.problem.num_keys; ++n) {
        if (n % c.problem.block_k == 0) factor = kFactors[engine() % 5];
        double* const row = inputs.k.row(b, h, n);
        for (int64_t d = 0; d < c.problem.head_dim; ++d) row[d] *= factor;
      }
    }
  }
  inputs.k = rounded(inputs.k, c.problem.dtype);
  return inputs;
}

int64_t num_bits(const std::vector<uint8_t>& bytes) {
  int64_t num = 0;
  for (const uint8_t byte : bytes) num += __builtin_popcount(byte);
  return num;
}

void check_skip_cases(uint64_t first_seed, Case (*make_case)(uint64_t seed)) {
  const int64_t only = from_environment("SPARLINE_SEED", -1);
  const uint64_t num = only >= 0 ? 1 : num_cases(32);
  int64_t num_served = 0;
  for (uint64_t n = 0; n < num; ++n) {
    const uint64_t seed = only >= 0 ? static_cast<uint64_t>(only) : first_seed + n;
    const OnHopper on_hopper(1 + static_cast<int>(seed % 3));
    const OrderByTurns order(seed);
    const Case c = make_case(seed);
    const int64_t before = cuda::emulator::num_boxes;
    check_inputs(c, skip_inputs(c));
    num_served += cuda::emulator::num_boxes > before;
  }
  EXPECT_GT(num_served, static_cast<int64_t>(num) / 2);
}
TEST(HopperSkip, RandomCases) { check_skip_cases(6000, skip_case); }
TEST(HopperSkipApart, RandomCases) { check_skip_cases(6300, apart_case); }

/// Rows of 21 key blocks, of which a rule skips some; `rows` of a query block decide together.
Case long_rows_case(uint64_t seed, int64_t num_queries, int64_t head_dim, int block_k,
                    SkipReference reference, int rows) {
  Case c = plain_case();
  c.seed = seed;
  c.layout = seed % 2 ? Layout::kBNHD : Layout::kBHND;
  Problem& p = c.problem;
  p.num_queries = num_queries;
  p.num_keys = 21 * block_k - 5;
  p.head_dim = head_dim;
  p.dtype = seed % 4 < 2 ? DType::kBF16 : DType::kF16;
  p.block_q = 128;
  p.block_k = block_k;
  p.block_map = BlockMap::kNone;
  p.combine = Combine::kSparse;
  p.skip = {reference, reference == SkipReference::kRunningMax ? -1.0 : -3.5, rows};
  return c;
}

/// Long rows of key blocks, in every order of threads, with counts of what was copied: keys of all
/// blocks, values of those that stay.
TEST(HopperSkip, ValuesOfSkippedBlocksAreNotLoaded) {
  uint64_t seed = 0;
  for (const SkipReference reference : {SkipReference::kRunningMax, SkipReference::kKeptLse}) {
    for (const int64_t dim : {64, 128}) {
      for (const int block_k : {32, 64, 100, 128}) {
        const OnHopper on_hopper(2);
        const OrderByTurns order(++seed);
        const Case c = long_rows_case(seed, 128 + 70, dim, block_k, reference, 0);
        const Problem& p = c.problem;
        const int64_t before = cuda::emulator::num_boxes;
        const Outputs got = check_inputs(c, skip_inputs(c));
        const int64_t num_slices = dim / 64;
        int64_t num_boxes = 0;  // of the forward: the backward has none
        for (int64_t row = 0; row < 2 * p.num_heads; ++row) {
          num_boxes += 1 + 21 * (block_k > 64 ? 2 : 1);  // queries, keys
          for (int64_t j = 0; j < 21; ++j) {
            if ((got.kept_bits[static_cast<size_t>(row * 3 + j / 8)] >> (j % 8) & 1) == 0) continue;
            num_boxes += block_k > 64 ? 2 : 1;
          }
        }
        EXPECT_EQ(cuda::emulator::num_boxes - before, num_boxes * num_slices) << describe(c);
        const int64_t num_kept = num_bits(got.kept_bits), num_all = 2 * p.num_heads * 21;
        EXPECT_GT(num_kept, num_all / 8) << describe(c);
        EXPECT_LT(num_kept, num_all * 7 / 8) << describe(c);
      }
    }
  }
}

/// Rows of more key blocks than the lists of tiles of one run have room for, and than any has: the
/// kernel of two runs a tile, and the portable one, take their place.
TEST(HopperSkip, ManyKeyBlocks) {
  uint64_t seed = 40;
  for (const int num_blocks : {1280, 1281, 2048, 2049}) {
    const OnHopper on_hopper(1);
    const OrderByTurns order(++seed);
    Case c = long_rows_case(seed, 128, 128, 16, SkipReference::kKeptLse, 0);
    c.problem.batch = c.problem.num_heads = c.problem.num_kv_heads = 1;
    c.problem.num_keys = num_blocks * 16 - 3;
    const int64_t before = cuda::emulator::num_boxes;
    check_inputs(c, skip_inputs(c));
    EXPECT_EQ(cuda::emulator::num_boxes > before, num_blocks <= 2048) << describe(c);
  }
}

/// A place for a query block's counts serves many blocks of one CTA.
TEST(HopperSkip, ManyQueryBlocks) {
  uint64_t seed = 50;
  for (const int64_t dim : {64, 128}) {
    const OnHopper on_hopper(1);
    const OrderByTurns order(++seed);
    Case c = long_rows_case(seed, 20 * 128 - 30, dim, 32, SkipReference::kRunningMax, 0);
    c.problem.batch = 1;
    const int64_t before = cuda::emulator::num_boxes;
    check_inputs(c, skip_inputs(c));
    EXPECT_GT(cuda::emulator::num_boxes, before) << describe(c);
  }
}

/// Whoever is late, nobody laps it: votes and places in rings wait for the last who needs them.
/// Between the first key block and the last one nothing stays that would make others wait.
void check_late_warps(int rows) {
  uint64_t seed = 80;
  for (const int64_t dim : {64, 128}) {
    for (int warp = 0; warp < 12; ++warp) {
      const OnHopper on_hopper(1);
      const OrderByTurns order(++seed);
      Case c = long_rows_case(seed, 2 * 128, dim, 16, SkipReference::kRunningMax, rows);
      Problem& p = c.problem;
      p.batch = p.num_heads = p.num_kv_heads = 1;
      p.num_keys = 61 * 16;
      Inputs inputs = random_inputs(c);
      for (int64_t n = 0; n < p.num_keys; ++n) {
        const double factor = n < 16 ? 20.0 : (n < 60 * 16 ? 0.01 : 30.0);
        for (int64_t d = 0; d < dim; ++d) inputs.k.row(0, 0, n)[d] *= factor;
      }
      inputs.k = rounded(inputs.k, p.dtype);
      cuda::emulator::set_late_warp(warp);
      const int64_t before = cuda::emulator::num_boxes;
      const Outputs got = check_inputs(c, inputs);
      cuda::emulator::set_late_warp(-1);
      EXPECT_GT(cuda::emulator::num_boxes, before) << describe(c);
      EXPECT_LT(num_bits(got.kept_bits), 4 * (rows == 64 ? 4 : 2)) << describe(c);
    }
  }
}
TEST(HopperSkip, LateWarps) { check_late_warps(0); }
TEST(HopperSkipApart, LateWarps) { check_late_warps(64); }

/// Query blocks of one tile of one run each: whoever does not have to wait is blocks ahead.
TEST(HopperSkip, ShortPackedSequences) {
  constexpr int32_t kLength = 40, kNumSequences = 30;
  uint64_t seed = 60;
  for (const bool is_protected : {false, true}) {
    const OnHopper on_hopper(1);
    const OrderByTurns order(++seed);
    Case c = long_rows_case(seed, kLength * kNumSequences, 128, 64, SkipReference::kKeptLse, 0);
    Problem& p = c.problem;
    p.batch = 1;
    p.num_keys = p.num_queries;
    for (int32_t n = 0; n < kNumSequences; ++n) {
      const Segment segment{n * kLength, (n + 1) * kLength, n, is_protected};
      p.query_segments.push_back(segment);
      p.key_segments.push_back(segment);
    }
    const Inputs inputs = skip_inputs(c);
    const int64_t before = cuda::emulator::num_boxes;
    check_inputs(c, inputs);
    EXPECT_GT(cuda::emulator::num_boxes, before) << describe(c);
    check_orders(c, inputs, seed);
  }
}

/// The same where each 64 rows decide: a block is copied at most once, for one half or both.
TEST(HopperSkipApart, ValuesThatNeitherHalfWantsAreNotLoaded) {
  uint64_t seed = 0;
  for (const SkipReference reference : {SkipReference::kRunningMax, SkipReference::kKeptLse}) {
    for (const int64_t dim : {64, 128}) {
      for (const int block_k : {32, 64, 100, 128}) {
        const OnHopper on_hopper(2);
        const OrderByTurns order(++seed);
        const Case c = long_rows_case(seed, 2 * 128 + 40, dim, block_k, reference, 64);
        const Problem& p = c.problem;
        const int64_t before = cuda::emulator::num_boxes;
        const Outputs got = check_inputs(c, skip_inputs(c));
        const auto stays = [&](int64_t row, int64_t j) {
          return got.kept_bits[static_cast<size_t>(row * 3 + j / 8)] >> (j % 8) & 1;
        };
        int64_t num_either = 0, num_one = 0, num_blocks = 3 * p.num_heads;
        for (int64_t row = 0; row < 2 * num_blocks; row += 2) {
          for (int64_t j = 0; j < 21; ++j) {
            num_either += stays(row, j) | stays(row + 1, j);
            num_one += stays(row, j) ^ stays(row + 1, j);
          }
        }
        // Queries, keys, and values; of a second run also where only limits before the first one
        // ask for it.
        const int64_t num_runs = block_k > 64 ? 2 : 1, num_slices = dim / 64;
        const int64_t least = num_blocks * (1 + 21 * num_runs) + num_either * num_runs;
        const int64_t most = block_k > 64 ? least : least + 2 * num_blocks;
        const int64_t num_boxes = (cuda::emulator::num_boxes - before) / num_slices;
        EXPECT_GE(num_boxes, least) << describe(c);
        EXPECT_LE(num_boxes, most) << describe(c);
        EXPECT_GT(num_one, 0) << describe(c);
        EXPECT_GT(num_either, num_blocks * 21 / 8) << describe(c);
        EXPECT_LT(num_either, num_blocks * 21 * 7 / 8) << describe(c);
      }
    }
  }
}

/// The portable kernel decides as Hopper's does, tile by tile; where scores are far from a limit.
void check_same_decisions(uint64_t first_seed, Case (*make_case)(uint64_t seed)) {
  for (uint64_t seed = first_seed; seed < first_seed + 8; ++seed) {
    Case c = make_case(seed);
    const Inputs inputs = skip_inputs(c);
    std::string misuse;
    const Outputs want = run(c, inputs, &misuse);
    const OnHopper on_hopper;
    const Outputs got = run(c, inputs, &misuse);
    EXPECT_EQ(misuse, "") << describe(c);
    EXPECT_EQ(got.kept_bits, want.kept_bits) << describe(c);
    EXPECT_TRUE(is_same_bits(got.row_votes, want.row_votes)) << describe(c);
  }
}
TEST(HopperSkip, KeepsWhatThePortableKernelKeeps) { check_same_decisions(6100, skip_case); }
TEST(HopperSkipApart, KeepsWhatThePortableKernelKeeps) { check_same_decisions(6400, apart_case); }

TEST(HopperSkip, ResultsDoNotDependOnTheOrderOfThreads) {
  for (uint64_t seed = 6200; seed < 6206; ++seed) {
    const OnHopper on_hopper(1 + static_cast<int>(seed % 3));
    const Case c = skip_case(seed);
    check_orders(c, skip_inputs(c), seed);
  }
}
TEST(HopperSkipApart, ResultsDoNotDependOnTheOrderOfThreads) {
  for (uint64_t seed = 6500; seed < 6506; ++seed) {
    const OnHopper on_hopper(1 + static_cast<int>(seed % 3));
    const Case c = apart_case(seed);
    check_orders(c, skip_inputs(c), seed);
  }
}

// Laws -------------------------------------------------------------------------------------------

/// A barrier too few, and the order of threads would show.
TEST(Law, ResultsDoNotDependOnTheOrderOfThreads) {
  for (uint64_t seed = 2000; seed < 2016; ++seed) {
    const Case c = on_cuda(random_case(seed));
    const Inputs inputs = random_inputs(c);
    std::string misuse;
    set_order(Order::kForward);
    const Outputs want = run(c, inputs, &misuse);
    const auto want_classes = run_route(c, inputs.q, inputs.k, &misuse);
    for (const Order order : {Order::kReverse, Order::kRandom}) {
      set_order(order, seed);
      expect_same_bits(run(c, inputs, &misuse), want, describe(c));
      EXPECT_EQ(run_route(c, inputs.q, inputs.k, &misuse), want_classes) << describe(c);
    }
    set_order(Order::kForward);
    EXPECT_EQ(misuse, "") << describe(c);
  }
}

TEST(Law, TheMeanKeysOfTheRouterGiveTheSameBits) {
  for (uint64_t seed = 2300; seed < 2300 + num_cases(12); ++seed) {
    std::optional<OnHopper> on_hopper;
    if (seed % 3 == 0) on_hopper.emplace(2);
    check_router_means(on_hopper ? fused_case(seed) : on_cuda(random_case(seed)));
  }
}

TEST(Law, LayoutsGiveTheSameBits) {
  for (uint64_t seed = 2200; seed < 2208; ++seed) {
    Case c = on_cuda(random_case(seed));
    const Inputs inputs = random_inputs(c);
    std::string misuse;
    c.layout = Layout::kBHND;
    const Outputs packed = run(c, inputs, &misuse);
    for (const Layout layout : {Layout::kBNHD, Layout::kPadded}) {
      c.layout = layout;
      expect_same_bits(run(c, inputs, &misuse), packed, describe(c));
    }
  }
}

/// Heads in one wave or in many: each head's results are the same bits, gradients of shared weights
/// the same sums.
TEST(Law, ResultsDoNotDependOnTheWaves) {
  for (uint64_t seed = 2300; seed < 2316; ++seed) {
    Case c = on_cuda(random_case(seed));
    c.problem.batch = 2;
    const Inputs inputs = random_inputs(c);
    std::string misuse;
    const Outputs together = run(c, inputs, &misuse);
    for (const int64_t heads : {1, 3}) {
      c.heads_per_wave = heads;
      Outputs apart = run(c, inputs, &misuse);
      EXPECT_EQ(misuse, "") << describe(c);
      auto& got = apart.d_weights;
      const auto& want = together.d_weights;
      const auto expect_near = [&](Array& sum, const Array& wanted) {
        EXPECT_LT(error(sum, wanted), 1e-5) << describe(c);
        sum = wanted;
      };
      expect_near(got.proj_weight, want.proj_weight);
      expect_near(got.proj_bias, want.proj_bias);
      expect_near(got.feature_weight_q, want.feature_weight_q);
      expect_near(got.feature_bias_q, want.feature_bias_q);
      expect_near(got.feature_weight_k, want.feature_weight_k);
      expect_near(got.feature_bias_k, want.feature_bias_k);
      expect_same_bits(apart, together, describe(c));
    }
  }
}

/// A NaN or infinity in one head reaches no other head and no other batch item.
TEST(Law, NanStaysInItsHead) {
  for (const Combine combine :
       {Combine::kSparse, Combine::kLinear, Combine::kSum, Combine::kBlend}) {
    for (const char* where : {"q", "k", "v", "d_o"}) {
      for (const double poison : {std::nan(""), HUGE_VAL}) {
        Case c = plain_case();
        c.problem.batch = 2;
        c.problem.num_queries = 50;
        c.problem.num_keys = 60;
        c.problem.combine = combine;
        c.problem.linear_scope = LinearScope::kAll;
        c.problem.num_kv_heads = 2;
        if (combine == Combine::kBlend) {
          c.problem.smooth_k = c.problem.low_bit.is_enabled = true;
          c.problem.skip = {SkipReference::kKeptLse, -1.0, 16};
        }
        const Inputs clean = random_inputs(c);
        Inputs inputs = clean;
        Array& target = where[0] == 'q'   ? inputs.q
                        : where[0] == 'k' ? inputs.k
                        : where[0] == 'v' ? inputs.v
                                          : inputs.d_o;
        target.row(0, 1, 20)[3] = poison;
        std::string misuse;
        Outputs got = run(c, inputs, &misuse);
        Outputs want = run(c, clean, &misuse);
        EXPECT_EQ(misuse, "");
        for (Outputs* out : {&got, &want}) {  // what batch item 0, head 1 holds is free
          for (Array* array : {&out->o, &out->d_q, &out->d_k, &out->d_v}) {
            double* const begin = array->row(0, 1, 0);
            std::fill(begin, begin + array->shape[2] * array->shape[3], 0.0);
          }
          std::vector<Array*> rows{&out->lse};
          if (combine == Combine::kBlend) {
            rows.insert(rows.end(), {&out->row_votes, &out->d_weights.alpha_logit});
            const size_t head_bytes = out->kept_bits.size() / 4;
            std::fill_n(out->kept_bits.begin() + head_bytes, head_bytes, uint8_t{0});
          }
          for (Array* array : rows) std::fill_n(array->row(0, 0, 1), array->shape[3], 0.0);
        }
        expect_same_bits(got, want, std::string(where) + " with " + std::to_string(poison));
      }
    }
  }
}

/// Nor does one in a packed sequence reach another one, neither forward nor backward: sums of
/// states whose tiles and vectors hold blocks of several.
TEST(Law, NanStaysInItsSequence) {
  constexpr int64_t kEnds[] = {0, 70, 180, 240};
  uint64_t seed = 0;
  for (const Combine combine :
       {Combine::kSparse, Combine::kLinear, Combine::kSum, Combine::kProjection, Combine::kBlend}) {
    for (const BlockMap map : {BlockMap::kClass, BlockMap::kSoft}) {
      Case c = plain_case();
      c.seed = ++seed;
      Problem& p = c.problem;
      p.dtype = seed % 4 < 2 ? DType::kBF16 : DType::kF16;
      p.combine = combine;
      p.block_map = map;
      p.linear_scope = map == BlockMap::kSoft || seed % 3 == 0 ? LinearScope::kComplement
                                                               : LinearScope::kMarginal;
      p.num_queries = p.num_keys = kEnds[3];
      for (int n = 0; n < 3; ++n) {
        p.query_segments.push_back({kEnds[n], kEnds[n + 1], n, false});
        p.key_segments.push_back({kEnds[n], kEnds[n + 1], n, false});
      }
      const Inputs clean = random_inputs(c);
      std::string misuse, of_poison;  // a NaN that is written looks like one that is not
      const Outputs want = run(c, clean, &misuse);
      EXPECT_EQ(misuse, "") << describe(c);
      for (Array Inputs::* const where : {&Inputs::q, &Inputs::k, &Inputs::v, &Inputs::d_o}) {
        const double poison = seed % 2 == 0 ? std::nan("") : HUGE_VAL;
        Inputs inputs = clean;
        Array& target = inputs.*where;
        for (int64_t h = 0; h < target.shape[1]; ++h) {
          double* const begin = target.row(0, h, kEnds[1]);
          std::fill(begin, target.row(0, h, kEnds[2]), poison);
        }
        const Outputs got = run(c, inputs, &of_poison);
        for (Array Outputs::* const what :
             {&Outputs::o, &Outputs::d_q, &Outputs::d_k, &Outputs::d_v}) {
          for (const int n : {0, 2}) {
            EXPECT_TRUE(is_same_in_rows(got.*what, want.*what, kEnds[n], kEnds[n + 1]))
                << (what == &Outputs::o     ? "o"
                    : what == &Outputs::d_q ? "d_q"
                    : what == &Outputs::d_k ? "d_k"
                                            : "d_v")
                << " where " << poison << " is in "
                << (where == &Inputs::q   ? "q"
                    : where == &Inputs::k ? "k"
                    : where == &Inputs::v ? "v"
                                          : "d_o")
                << ": " << describe(c);
          }
        }
      }
    }
  }
}

TEST(Law, AMeanKeyOfZeroLeavesTheKeys) { check_zero_means(plain_case()); }

// Routing, against the CPU backend ---------------------------------------------------------------

Array random_array(std::mt19937_64& engine, std::array<int64_t, 4> shape, double deviation,
                   DType dtype) {
  std::normal_distribution<double> normal(0.0, deviation);
  Array array(shape);
  for (double& value : array.data) value = rounded(normal(engine), dtype);
  return array;
}

/// The classes of a random rule on one of the backends.
std::vector<int8_t> route_classes(const Case& c, const Inputs& in, const Array& proj_q,
                                  const Array& proj_k) {
  const Problem& p = c.problem;
  const Plan plan = sparline::plan(p, {.device = c.device});
  const GuardedTensor q(p.dtype, in.q, c.layout), k(p.dtype, in.k, c.layout);
  const auto weights = [](const Array& array) {
    return array.empty() ? GuardedTensor() : GuardedTensor(DType::kF32, array);
  };
  const auto order = [](const std::vector<int32_t>& rows) {
    return rows.empty() ? TensorView()
                        : contiguous_view(const_cast<int32_t*>(rows.data()), DType::kI32,
                                          {1, 1, 1, static_cast<int64_t>(rows.size())});
  };
  const GuardedTensor weights_q = weights(proj_q), weights_k = weights(proj_k);
  const GuardedTensor block_class(
      DType::kI8,
      {p.batch, p.num_heads, int64_t(plan.query_blocks.size()), int64_t(plan.key_blocks.size())},
      c.layout);
  GuardedWorkspace space(plan.route_workspace_bytes);
  route(plan,
        {.q = q.view(),
         .k = k.view(),
         .rule = c.rule,
         .proj_q = weights_q.view(),
         .proj_k = weights_k.view(),
         .query_order = order(in.query_order),
         .key_order = order(in.key_order),
         .block_class = block_class.view()},
        space.span());
  EXPECT_EQ(block_class.misuse() + space.misuse(), "") << describe(c);
  std::vector<int8_t> classes;
  for (const double value : block_class.load().data) {
    classes.push_back(static_cast<int8_t>(value));
  }
  return classes;
}

/// With `is_exact` pooled scores have no rounding, so that ties are ties; else there are none, but
/// for what float32 cannot tell apart (none of these seeds has such a pair).
void expect_the_classes_of_the_cpu(uint64_t seed, bool is_exact) {
  Case c = on_cuda(random_case(seed));
  std::mt19937_64 engine(seed);
  const auto pick = [&](auto... choices) {
    const std::common_type_t<decltype(choices)...> all[] = {choices...};
    return all[engine() % sizeof...(choices)];
  };
  Problem& p = c.problem;
  p.bit_rows = 0;
  p.skip = {};
  p.low_bit = {};
  p.num_keys = p.num_keys * 2;
  p.key_segments.clear();
  p.query_segments.clear();
  if (!is_exact && seed % 2 == 0) {
    p.query_segments = {{0, p.num_queries / 2, 0, false},
                        {p.num_queries / 2, p.num_queries, 2, seed % 4 == 0}};
    p.key_segments = {{0, p.num_keys / 3, 0, false},
                      {p.num_keys / 3, p.num_keys / 2, 0, true},
                      {p.num_keys / 2, p.num_keys, 2, false}};
  }
  c.rule.selection =
      pick(Selection::kTopK, Selection::kTopP, Selection::kUnion, Selection::kIntersection);
  c.rule.critical_count = pick(0, 0, 0, 1, 3, 1000);
  c.rule.critical_mass = pick(0.0, 0.13, 0.47, 0.91, 1.0);
  c.rule.is_longest_prefix = pick(false, true);
  c.rule.min_similarity = pick(-1.0, -1.0, 0.031, 0.073);
  if (is_exact) {
    p.block_q = p.block_k = 16;
    p.num_queries = (p.num_queries + 15) / 16 * 16;
    p.num_keys = (p.num_keys + 15) / 16 * 16;
    c.rule.smooth_k = false;
  }
  Inputs in = random_inputs(c);
  if (is_exact) {
    for (Array* array : {&in.q, &in.k}) {
      for (double& value : array->data) value = std::clamp(std::round(value), -2.0, 2.0);
    }
  }
  Array proj_q, proj_k;
  if (!is_exact && pick(false, true)) {
    const double deviation = 1.0 / std::sqrt(static_cast<double>(p.head_dim));
    const int64_t dim = p.head_dim;
    proj_q =
        random_array(engine, {1, pick(int64_t{1}, p.num_heads), dim, dim}, deviation, DType::kF32);
    proj_k =
        random_array(engine, {1, pick(int64_t{1}, p.num_heads), dim, dim}, deviation, DType::kF32);
  }
  const auto got = route_classes(c, in, proj_q, proj_k);
  c.device = Device::kCPU;
  EXPECT_EQ(got, route_classes(c, in, proj_q, proj_k))
      << "seed " << seed << " selection " << static_cast<int>(c.rule.selection) << " ratio "
      << c.rule.critical_ratio << " count " << c.rule.critical_count << " mass "
      << c.rule.critical_mass << " longest " << c.rule.is_longest_prefix << " similarity "
      << c.rule.min_similarity << " smooth_k " << c.rule.smooth_k << " projections "
      << proj_q.shape[1] << " " << proj_k.shape[1] << " " << describe(c);
}
TEST(Route, RandomCalls) {
  for (uint64_t seed = 0; seed < num_cases(40); ++seed) expect_the_classes_of_the_cpu(seed, false);
}
TEST(Route, TiesAreTies) {
  for (uint64_t seed = 0; seed < num_cases(40); ++seed) expect_the_classes_of_the_cpu(seed, true);
}

/// Rows that one warp holds, that shared memory does, that neither does; whole tiles of query
/// blocks and not; scores without rounding, so that ties are ties (some are no numbers), with the
/// mean key, of packed sequences.
TEST(Route, LongRows) {
  for (const int arch : {80, 90}) {
    for (const int64_t num_key_blocks : {1, 65, 511, 513, 1190, 1300, 1900, 2045, 2100}) {
      for (const int variant : {0, 1, 2}) {
        cuda::emulator::set_device(arch, /*num_multiprocessors=*/num_key_blocks % 2 ? 3 : 132);
        Case c = plain_case();
        Problem& p = c.problem;
        p.batch = p.num_heads = variant == 1 ? 2 : 1;
        p.num_kv_heads = 1;
        p.head_dim = num_key_blocks == 511 || num_key_blocks == 2045 ? 128 : 32;
        p.block_q = p.block_k = 16;
        p.num_queries = 16 * (variant == 2 ? 24 : 51);
        p.num_keys = 16 * num_key_blocks;
        c.rule.smooth_k = variant == 1;
        c.rule.critical_count = variant == 1 ? 0 : 5;
        c.rule.min_similarity = variant == 2 ? 0.05 : -1.0;
        if (variant == 2) {
          p.query_segments = {{0, 7 * 16, 0, false}, {7 * 16, p.num_queries, 1, false}};
          p.key_segments = {{0, p.num_keys / 3, 0, false},
                            {p.num_keys / 3, p.num_keys / 2, 1, true},
                            {p.num_keys / 2, p.num_keys, 1, false}};
        }
        Inputs in = random_inputs(c);
        if (variant == 0) {
          for (Array* array : {&in.q, &in.k}) {
            for (double& value : array->data) value = std::clamp(std::round(value), -2.0, 2.0);
          }
          in.k.row(0, 0, p.num_keys / 2)[3] = std::nan("");
          in.k.row(0, 0, p.num_keys / 3)[5] = HUGE_VAL;
        }
        const auto got = route_classes(c, in, {}, {});
        c.device = Device::kCPU;
        const auto want = route_classes(c, in, {}, {});
        size_t num_wrong = 0;
        for (size_t n = 0; n < want.size(); ++n) num_wrong += got[n] != want[n];
        // Where scores are rounded, two that float32 cannot tell apart may change places.
        EXPECT_LE(num_wrong, variant == 0 ? 0u : want.size() / 20000 * 2)
            << num_key_blocks << " key blocks, variant " << variant << ", arch " << arch;
      }
    }
  }
  cuda::emulator::set_device(80);
}

/// Projections of every width that a tile of query blocks folds, one for each head and one for all,
/// by both sizes of tiles: scores without rounding, so that ties are ties.
TEST(Route, ProjectsEveryWidth) {
  std::mt19937_64 engine(11);
  for (const int head_dim : {16, 40, 64, 128, 136, 256}) {
    for (const int variant : {0, 1, 2, 3}) {
      cuda::emulator::set_device(90, /*num_multiprocessors=*/variant < 2 ? 3 : 132);
      Case c = plain_case();
      Problem& p = c.problem;
      p.batch = p.num_heads = 2;
      p.num_kv_heads = 1;
      p.head_dim = head_dim;
      p.block_q = p.block_k = 16;
      p.num_queries = 16 * 51;
      p.num_keys = 16 * (variant == 3 ? 530 : 70);
      c.rule.smooth_k = false;
      c.rule.critical_count = 5;
      c.rule.selection = Selection::kTopK;
      Inputs in = random_inputs(c);
      for (Array* array : {&in.q, &in.k}) {
        for (double& value : array->data) value = std::clamp(std::round(value), -2.0, 2.0);
      }
      const auto projections = [&](int64_t num_matrices) {
        Array array({1, num_matrices, head_dim, head_dim});
        for (int64_t row = 0; row < num_matrices * head_dim; ++row) {
          for (const double x : {1.0, -1.0, 1.0}) {
            array.data[static_cast<size_t>(row * head_dim) +
                       engine() % static_cast<uint64_t>(head_dim)] = x;
          }
        }
        return array;
      };
      const Array proj_q = projections(variant % 2 == 0 ? 1 : 2), proj_k = projections(1);
      const auto got = route_classes(c, in, proj_q, proj_k);
      c.device = Device::kCPU;
      EXPECT_EQ(got, route_classes(c, in, proj_q, proj_k))
          << "head_dim " << head_dim << ", variant " << variant;
    }
  }
  cuda::emulator::set_device(80);
}

/// Scores that fill the range between the best and the worst evenly and not, up to all in one
/// place: a score is the sum of two numbers, without rounding.
TEST(Route, ScoresOfAnySpread) {
  std::mt19937_64 engine(7);
  std::normal_distribution<double> normal;
  const auto equals = [](double) { return 0.75; };
  const auto outlier = [&](double x) { return engine() % 64 == 0 ? 1e5 * x : x; };
  const auto no_number = [&](double x) {
    const uint64_t kind = engine() % 8;
    return kind == 0 ? std::nan("") : kind == 1 ? HUGE_VAL : kind == 2 ? -HUGE_VAL : x;
  };
  const std::pair<const char*, std::function<double(double)>> shapes[] = {
      {"normal", [](double x) { return x; }},
      {"heavy tails", [](double x) { return x * std::exp(6.0 * x); }},
      {"outliers", outlier},
      {"far from 0", [](double x) { return 512.0 + x; }},
      {"few values", [](double x) { return std::round(3.0 * x) / 4.0; }},
      {"two crowds", [](double x) { return (x > 0.8 ? 1.0 : 0.0) + x / 4096.0; }},
      {"two values", [](double x) { return x < 1.6 ? -1.0 : 1.0; }},
      {"equal", equals},
      {"tiny", [](double x) { return std::ldexp(x, -120); }},
      {"huge", [](double x) { return std::ldexp(x, 115); }},
      {"no numbers", no_number},
  };
  for (const int64_t num_key_blocks : {2, 45, 512, 700, 1400}) {
    for (const auto& [name, shape] : shapes) {
      Case c = plain_case();
      Problem& p = c.problem;
      p.num_heads = 1;
      p.block_q = p.block_k = 16;
      p.num_queries = 16 * 20;
      p.num_keys = 16 * num_key_blocks;
      c.rule.smooth_k = false;
      Inputs in = random_inputs(c);
      const auto set = [&](Array& array, int64_t block, double high, double low) {
        for (int64_t n = 16 * block; n < 16 * (block + 1); ++n) {
          double* const row = array.row(0, 0, n);
          std::fill_n(row, p.head_dim, 0.0);
          row[0] = rounded(high, p.dtype);
          row[1] = rounded(low, p.dtype);
        }
      };
      for (int64_t j = 0; j < num_key_blocks; ++j) {
        const double score = shape(normal(engine));
        const double high = rounded(score, p.dtype), rest = score - high;
        set(in.k, j, high, engine() % 8 == 0 || !std::isfinite(rest) ? 0.0 : rest);
      }
      for (int64_t i = 0; i < 20; ++i) {
        const double factor = std::array{1.0, -1.0, 0.5, 0.0}[engine() % 4];
        set(in.q, i, factor, factor);
      }
      for (const auto& [critical, negligible] :
           {std::pair{0.05, 0.1}, {0.05, 0.0}, {0.5, 0.4}, {1.0, 0.0}, {0.1, 0.95}}) {
        c.rule.critical_ratio = critical;
        c.rule.negligible_ratio = negligible;
        c.device = Device::kCUDA;
        const auto got = route_classes(c, in, {}, {});
        c.device = Device::kCPU;
        EXPECT_EQ(got, route_classes(c, in, {}, {}))
            << name << ", " << num_key_blocks << " key blocks, ratios " << critical << " and "
            << negligible;
      }
    }
  }
}

TEST(Route, GivesTheMeanKeys) {
  for (uint64_t seed = 0; seed < 30; ++seed) check_mean_keys(on_cuda(random_case(seed)), seed);
}

// SoftTop-k, against the CPU backend -------------------------------------------------------------

Array run_soft_top_k(Device device, const Array& scores, std::vector<float> kappa,
                     double temperature, Layout layout) {
  const GuardedTensor x(DType::kF32, scores, layout), m(DType::kF32, scores.shape, layout);
  soft_top_k({.device = device},
             {.scores = x.view(),
              .kappa = contiguous_view(kappa.data(), DType::kF32, {1, 1, 1, int64_t(kappa.size())}),
              .temperature = temperature,
              .soft_map = m.view()});
  EXPECT_EQ(m.misuse(), "");
  return m.load();
}
Array run_soft_top_k_backward(Device device, const Array& d_soft_map, const Array& soft_map,
                              double temperature, Layout layout) {
  const GuardedTensor d_m(DType::kF32, d_soft_map, layout), m(DType::kF32, soft_map, layout);
  const GuardedTensor d_x(DType::kF32, soft_map.shape, layout);
  soft_top_k_backward({.device = device}, {.d_soft_map = d_m.view(),
                                           .soft_map = m.view(),
                                           .temperature = temperature,
                                           .d_scores = d_x.view()});
  EXPECT_EQ(d_x.misuse(), "");
  return d_x.load();
}
TEST(SoftTopK, RandomMaps) {
  for (uint64_t seed = 0; seed < num_cases(60); ++seed) {
    std::mt19937_64 engine(seed);
    const auto up_to = [&](int64_t most) { return static_cast<int64_t>(engine() % most) + 1; };
    const std::array<int64_t, 4> shape{up_to(2), up_to(3), up_to(12), up_to(seed % 3 ? 70 : 1200)};
    Array scores = random_array(engine, shape, std::pow(10.0, double(up_to(4)) - 2.0), DType::kF32);
    for (double& x : scores.data) {
      if (seed % 2 && up_to(3) == 1) x = -std::numeric_limits<double>::infinity();
    }
    std::vector<float> kappa;
    for (int64_t row = 0; row < shape[0] * shape[1] * shape[2]; ++row) {
      kappa.push_back(static_cast<float>(up_to(1000)) * 1.1e-3f * static_cast<float>(shape[3]));
    }
    const Array d_soft_map = random_array(engine, shape, 1.0, DType::kF32);
    const double temperature = seed % 5 ? 0.1 : 1.0;
    const auto layout = static_cast<Layout>(seed % 3);
    const Array got = run_soft_top_k(Device::kCUDA, scores, kappa, temperature, layout);
    const Array want = run_soft_top_k(Device::kCPU, scores, kappa, temperature, layout);
    // Either may miss kappa by 2e-5 of it, and a single m may hold all of that.
    const float most = *std::max_element(kappa.begin(), kappa.end());
    EXPECT_LT(error(got, want), 4e-5 * std::max(1.0f, most)) << "seed " << seed;
    EXPECT_LT(error(run_soft_top_k_backward(Device::kCUDA, d_soft_map, want, temperature, layout),
                    run_soft_top_k_backward(Device::kCPU, d_soft_map, want, temperature, layout)),
              2e-5)
        << "seed " << seed;
  }
}

}  // namespace
}  // namespace sparline::testing
