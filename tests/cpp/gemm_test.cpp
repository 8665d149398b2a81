// SPDX-License-Identifier: Apache-2.0
//
// The two products behind S^T = k q^T must agree bit for bit on int8 codes, whose sums float32
// holds exactly, on every SIMD target of the machine.
#include "cpu/targets.h"
// Targets first: it chooses what Highway compiles.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "gemm_test.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <random>
#include <vector>

#include "cpu/keys-inl.h"

HWY_BEFORE_NAMESPACE();
namespace sparline::cpu::HWY_NAMESPACE {

/// The number of elements of A (num_m x num_k) times B (num_k x num_n) that differ.
int64_t count_differences(int64_t num_m, int64_t num_n, int64_t num_k, uint64_t seed) {
  std::mt19937_64 dice(seed);
  // The largest sums of either sign, or anything.
  const auto code = [&] { return seed % 3 == 0 ? 127 : static_cast<int>(dice() % 255) - 127; };
  const int64_t ld_k = leading_dim(num_k), ld_n = leading_dim(num_n);
  std::vector<float> a(num_m * ld_k), b(num_k * ld_n), b_steps(ld_n, 1.0f);
  std::vector<float> want(num_m * ld_n), got(num_m * ld_n);
  std::vector<int16_t> codes(num_m * ld_k);
  std::vector<int32_t> pairs(num_k / 2 * ld_n);
  for (int64_t m = 0; m < num_m; ++m) {
    const int sign = m % 2 == 0 ? 1 : -1;
    for (int64_t k = 0; k < num_k; ++k) a[m * ld_k + k] = static_cast<float>(sign * code());
    std::copy_n(&a[m * ld_k], num_k, &codes[m * ld_k]);
  }
  for (int64_t k = 0; k < num_k; ++k) {
    for (int64_t n = 0; n < num_n; ++n) b[k * ld_n + n] = static_cast<float>(code());
  }
  for (int64_t n = 0; n < num_n; ++n) {
    b_steps[n] = 1.0f / static_cast<float>(n + 3);
    for (int64_t k = 0; k < num_k; k += 2) {
      const auto first = static_cast<int32_t>(b[k * ld_n + n]);
      const auto second = static_cast<int32_t>(b[(k + 1) * ld_n + n]);
      pairs[k / 2 * ld_n + n] = (first & 0xffff) | second * 0x10000;
    }
  }
  const float a_step = 0.3f;
  gemm<Into::kOverwrite>(num_m, pad(num_n), num_k, rows_of(a.data(), ld_k), b.data(), ld_n,
                         want.data(), ld_n);
  run_tiles(num_m, pad(num_n),
            Int8Tile{.num_k = num_k,
                     .a = codes.data(),
                     .lda = ld_k,
                     .a_step = a_step,
                     .b = pairs.data(),
                     .ldb = ld_n,
                     .b_steps = b_steps.data(),
                     .c = got.data(),
                     .ldc = ld_n});
  int64_t count = 0;
  for (int64_t m = 0; m < num_m; ++m) {
    for (int64_t n = 0; n < num_n; ++n) {
      const float step = b_steps[n] * a_step;
      count += want[m * ld_n + n] * step != got[m * ld_n + n];
    }
  }
  return count;
}

}  // namespace sparline::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include <gtest/gtest.h>

namespace sparline::cpu {
namespace {

HWY_EXPORT(count_differences);

TEST(Int8Gemm, IsTheFloatGemmBitForBit) {
  for (const int64_t target : hwy::SupportedAndGeneratedTargets()) {
    SCOPED_TRACE(hwy::TargetName(target));
    hwy::SetSupportedTargetsForTest(target);
    const auto check = [](int64_t num_m, int64_t num_n, int64_t num_k, uint64_t seed) {
      EXPECT_EQ(HWY_DYNAMIC_DISPATCH(count_differences)(num_m, num_n, num_k, seed), 0)
          << num_m << " x " << num_n << " x " << num_k << ", seed " << seed;
    };
    uint64_t seed = 0;
    for (int64_t num_k = 4; num_k <= 256; num_k += 2) {
      for (int n = 0; n < 4; ++n, ++seed)
        check(1 + seed * 37 % 128, 1 + seed * 53 % 128, num_k, seed);
    }
    for (int64_t rows = 1; rows <= 128; ++rows, ++seed) check(rows, 129 - rows, 64, seed);
  }
  hwy::SetSupportedTargetsForTest(0);
}

}  // namespace
}  // namespace sparline::cpu
#endif
