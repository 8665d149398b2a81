// SPDX-License-Identifier: Apache-2.0
//
// The emulator itself: fragments as ptx.cuh and tile.cuh promise them, collectives, and that broken
// kernels show.
#include <cuda_fp8.h>
#include <gtest/gtest.h>

#include <random>
#include <vector>

#include "cuda/common/tile.cuh"

namespace sparline::cuda {
namespace {

/// Element (row, col) of a C fragment 16x8, for register idx.
int c_row(int lane, int idx) { return lane / 4 + idx / 2 * 8; }
int c_col(int lane, int idx) { return lane % 4 * 2 + idx % 2; }

template <class T>
std::vector<T> random_tile(int size, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<T> values(static_cast<size_t>(size));
  for (T& value : values) value = from_float<T>(normal(generator));
  return values;
}

constexpr int kRows = 64, kCols = 128;

/// x, y (64 x 128) into shared memory, then the four products of their 16x16 parts at (16, 48) and
/// (32, 80) that the loaders of tile.cuh make: x y^T, x y, x^T y, x^T y^T.
template <class T>
__global__ void __launch_bounds__(64) products_kernel(Rows x, Rows y, float* products) {
  SPARLINE_DYNAMIC_SHARED(shared);
  using Tile = SharedTile<T, kRows, kCols>;
  const Tile x_tile{reinterpret_cast<T*>(shared)};
  const Tile y_tile{reinterpret_cast<T*>(shared + Tile::kBytes)};
  load_rows_async<64>(x_tile, x, x.head<T>(0, 0), 0, kRows, kCols);
  cp_async_commit();
  load_rows_async<64>(y_tile, y, y.head<T>(0, 0), 0, kRows, kCols);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  if (warp_index() != 0) return;
  const int lane = lane_index();
  uint32_t a[2][4], b[2][4];
  load_a(a[0], x_tile, 16, 48, lane);
  load_a_trans(a[1], x_tile, 16, 48, lane);
  load_b(b[0], y_tile, 32, 80, lane);
  load_b_trans(b[1], y_tile, 32, 80, lane);
  for (int m = 0; m < 2; ++m) {
    for (int n = 0; n < 2; ++n) {
      for (int half = 0; half < 2; ++half) {
        float c[4] = {1.0f, 1.0f, 1.0f, 1.0f};
        mma<T>(c, a[m], b[n][2 * half], b[n][2 * half + 1]);
        for (int idx = 0; idx < 4; ++idx) {
          const int row = c_row(lane, idx), col = 8 * half + c_col(lane, idx);
          products[(m * 2 + n) * 256 + row * 16 + col] = c[idx];
        }
      }
    }
  }
}

template <class T>
void expect_products() {
  const auto x = random_tile<T>(kRows * kCols, 1), y = random_tile<T>(kRows * kCols, 2);
  std::vector<float> products(4 * 256, NAN);
  for (const bool is_vectorised : {true, false}) {
    const Rows x_rows{const_cast<T*>(x.data()), 0, 0, kCols, nullptr, is_vectorised};
    const Rows y_rows{const_cast<T*>(y.data()), 0, 0, kCols, nullptr, is_vectorised};
    launch(products_kernel<T>, {.blocks = 1, .threads = 64, .shared_bytes = 2 * kRows * kCols * 2},
           nullptr, x_rows, y_rows, products.data());
    const auto x_at = [&](int r, int c) { return to_float(x[(16 + r) * kCols + 48 + c]); };
    const auto y_at = [&](int r, int c) { return to_float(y[(32 + r) * kCols + 80 + c]); };
    for (int row = 0; row < 16; ++row) {
      for (int col = 0; col < 16; ++col) {
        double expected[4] = {1.0, 1.0, 1.0, 1.0};
        for (int k = 0; k < 16; ++k) {
          expected[0] += x_at(row, k) * y_at(col, k);
          expected[1] += x_at(row, k) * y_at(k, col);
          expected[2] += x_at(k, row) * y_at(col, k);
          expected[3] += x_at(k, row) * y_at(k, col);
        }
        for (int idx = 0; idx < 4; ++idx) {
          EXPECT_NEAR(products[idx * 256 + row * 16 + col], expected[idx], 1e-5)
              << "product " << idx << " at (" << row << ", " << col << ")";
        }
      }
    }
  }
}
TEST(Fragments, Bf16) { expect_products<bf16>(); }
TEST(Fragments, Fp16) { expect_products<fp16>(); }

/// A 16x32, B 32x8 as ptx.cuh lays 8-bit operands out, straight from memory.
template <class D>
__global__ void product_8_bit_kernel(const uint8_t* a, const uint8_t* b, D* c) {
  const int lane = lane_index(), g = lane / 4, t = lane % 4;
  const auto four = [](const uint8_t* from, int step) {
    return static_cast<uint32_t>(from[0]) | static_cast<uint32_t>(from[step]) << 8 |
           static_cast<uint32_t>(from[2 * step]) << 16 |
           static_cast<uint32_t>(from[3 * step]) << 24;
  };
  const uint32_t a_regs[4] = {four(a + g * 32 + 4 * t, 1), four(a + (g + 8) * 32 + 4 * t, 1),
                              four(a + g * 32 + 4 * t + 16, 1),
                              four(a + (g + 8) * 32 + 4 * t + 16, 1)};
  const uint32_t b0 = four(b + 4 * t * 8 + g, 8), b1 = four(b + (4 * t + 16) * 8 + g, 8);
  D d[4] = {};
  if constexpr (std::is_same_v<D, int32_t>) {
    mma_int8(d, a_regs, b0, b1);
  } else {
    mma_e4m3(d, a_regs, b0, b1);
  }
  for (int idx = 0; idx < 4; ++idx) c[c_row(lane, idx) * 8 + c_col(lane, idx)] = d[idx];
}

template <class D, class Convert>
void expect_8_bit_product(Convert convert) {
  std::vector<uint8_t> a(16 * 32), b(32 * 8);
  std::mt19937 generator(3);
  for (auto* values : {&a, &b}) {
    for (uint8_t& value : *values) {
      do value = static_cast<uint8_t>(generator());
      while (std::isnan(static_cast<float>(convert(value))));
    }
  }
  std::vector<D> c(16 * 8);
  launch(product_8_bit_kernel<D>, {.blocks = 1, .threads = 32}, nullptr, a.data(), b.data(),
         c.data());
  for (int row = 0; row < 16; ++row) {
    for (int col = 0; col < 8; ++col) {
      double expected = 0.0, size = 0.0;
      for (int k = 0; k < 32; ++k) {
        const double term = static_cast<double>(convert(a[row * 32 + k])) * convert(b[k * 8 + col]);
        expected += term;
        size += std::abs(term);
      }
      EXPECT_NEAR(c[row * 8 + col], expected, size * 1e-6) << "at (" << row << ", " << col << ")";
    }
  }
}
TEST(Fragments, Int8) {
  expect_8_bit_product<int32_t>([](uint8_t bits) { return static_cast<int8_t>(bits); });
}
TEST(Fragments, E4m3) {
  expect_8_bit_product<float>([](uint8_t bits) {
    __nv_fp8_e4m3 value;
    value.__x = bits;
    return static_cast<float>(value);
  });
}

TEST(Fragments, PackPutsTheFirstLow) {
  EXPECT_EQ(pack<bf16>(1.0f, -2.0f), 0xc0003f80u);
  EXPECT_EQ(pack<fp16>(1.0f, -2.0f), 0xc0003c00u);
}

__global__ void collectives_kernel(int* out) {
  const int lane = lane_index();
  int* const mine = out + lane * 16;
  mine[0] = __shfl_sync(kAllLanes, lane, 5);
  mine[1] = __shfl_sync(kAllLanes, lane, lane + 1, 8);
  mine[2] = __shfl_xor_sync(kAllLanes, lane, 3);
  mine[3] = __shfl_up_sync(kAllLanes, lane, 2);
  mine[4] = __shfl_down_sync(kAllLanes, lane, 2, 16);
  mine[5] = static_cast<int>(__ballot_sync(kAllLanes, lane % 3 == 0));
  mine[6] = __any_sync(kAllLanes, lane == 7);
  mine[7] = __all_sync(kAllLanes, lane < 31);
  mine[8] = __reduce_add_sync(kAllLanes, -lane);
  mine[9] = __reduce_max_sync(kAllLanes, lane - 40);
  mine[10] = static_cast<int>(__reduce_or_sync(kAllLanes, 1u << lane));
  mine[11] = static_cast<int>(warp_max(static_cast<float>(lane)) + quad_sum(1.0f));
  // The halves of a warp may part.
  if (lane < 16) {
    mine[12] = __reduce_add_sync(0xffffu, lane);
  } else {
    mine[12] = static_cast<int>(__ballot_sync(0xffff0000u, lane < 20));
  }
  __syncwarp();
  mine[13] = __popc(0xf0u) + __ffs(8) + __clz(1);
}
TEST(Collectives, GiveWhatCudaGives) {
  std::vector<int> out(32 * 16);
  launch(collectives_kernel, {.blocks = 1, .threads = 32}, nullptr, out.data());
  for (int lane = 0; lane < 32; ++lane) {
    const int* const mine = out.data() + lane * 16;
    EXPECT_EQ(mine[0], 5);
    EXPECT_EQ(mine[1], lane / 8 * 8 + (lane + 1) % 8);
    EXPECT_EQ(mine[2], lane ^ 3);
    EXPECT_EQ(mine[3], lane < 2 ? lane : lane - 2);
    EXPECT_EQ(mine[4], lane % 16 >= 14 ? lane : lane + 2);
    EXPECT_EQ(static_cast<unsigned>(mine[5]), 0x49249249u);
    EXPECT_EQ(mine[6], 1);
    EXPECT_EQ(mine[7], 0);
    EXPECT_EQ(mine[8], -31 * 16);
    EXPECT_EQ(mine[9], -9);
    EXPECT_EQ(mine[10], -1);
    EXPECT_EQ(mine[11], 35);
    EXPECT_EQ(mine[12], lane < 16 ? 120 : 0xf0000);
    EXPECT_EQ(mine[13], 4 + 4 + 31);
  }
}

/// Sums the block's numbers through shared memory, with or without the barrier.
__global__ void sum_kernel(int* out, bool has_barrier) {
  __shared__ int values[128];
  values[threadIdx.x] = static_cast<int>(blockIdx.x + threadIdx.x);
  if (has_barrier) __syncthreads();
  int sum = 0;
  for (int idx = 0; idx < 128; ++idx) sum += values[idx];
  out[blockIdx.x * 128 + threadIdx.x] = sum;
  __syncthreads();
}
TEST(Barriers, AMissingOneShows) {
  using emulator::Order;
  const auto sums = [](Order order, bool has_barrier) {
    emulator::set_order(order, 7);
    std::vector<int> out(3 * 128);
    launch(sum_kernel, {.blocks = 3, .threads = 128}, nullptr, out.data(), has_barrier);
    emulator::set_order(Order::kForward);
    return out;
  };
  const auto expected = sums(Order::kForward, true);
  for (int idx = 0; idx < 3 * 128; ++idx) EXPECT_EQ(expected[idx], 127 * 64 + idx / 128 * 128);
  EXPECT_EQ(sums(Order::kReverse, true), expected);
  EXPECT_EQ(sums(Order::kRandom, true), expected);
  EXPECT_NE(sums(Order::kForward, false), sums(Order::kReverse, false));
  EXPECT_NE(sums(Order::kForward, false), sums(Order::kRandom, false));
}

template <int kPending>
__global__ void copy_kernel(const uint4* from, uint4* to) {
  SPARLINE_DYNAMIC_SHARED(shared);
  auto* const values = reinterpret_cast<uint4*>(shared);
  const int thread = static_cast<int>(threadIdx.x);
  for (int group = 0; group < 2; ++group) {
    cp_async_16(values + group * 32 + thread, from + group * 32 + thread, thread != 3);
    cp_async_commit();
  }
  cp_async_wait<kPending>();
  __syncthreads();
  for (int group = 0; group < 2; ++group) {
    to[group * 32 + thread] = values[group * 32 + (thread + 1) % 32];
  }
}
TEST(AsyncCopies, ArriveWhenWaitedFor) {
  std::vector<uint4> from(64), to(64);
  for (unsigned idx = 0; idx < 64; ++idx) from[idx] = {idx, idx, idx, idx};
  const auto expect = [&](int num_groups) {
    for (int group = 0; group < 2; ++group) {
      for (int thread = 0; thread < 32; ++thread) {
        const unsigned source = static_cast<unsigned>(group * 32 + (thread + 1) % 32);
        const unsigned expected = group >= num_groups ? 0xffffffffu
                                  : source % 32 == 3  ? 0u
                                                      : source;
        EXPECT_EQ(to[static_cast<size_t>(group * 32 + thread)].w, expected)
            << group << " " << thread;
      }
    }
  };
  const LaunchShape shape{.blocks = 1, .threads = 32, .shared_bytes = 1024};
  launch(copy_kernel<0>, shape, nullptr, from.data(), to.data());
  expect(2);
  launch(copy_kernel<1>, shape, nullptr, from.data(), to.data());
  expect(1);
  launch(copy_kernel<2>, shape, nullptr, from.data(), to.data());
  expect(0);
}

__global__ void read_shared_kernel(uint32_t* out, int at) {
  SPARLINE_DYNAMIC_SHARED(shared);
  out[threadIdx.x] = reinterpret_cast<const uint32_t*>(shared)[at];
}
TEST(SharedMemory, StartsPoisoned) {
  std::vector<uint32_t> out(32);
  launch(read_shared_kernel, {.blocks = 2, .threads = 32, .shared_bytes = 256}, nullptr, out.data(),
         63);
  EXPECT_EQ(out[31], 0xffffffffu);
}

enum class Mistake {
  kMissingLane,
  kReturnedLane,
  kDivergentBarrier,
  kOtherCollective,
  kForeignLane,
  kMisalignedCopy,
  kMisalignedSource,
  kStrayCopy,
  kStrayLdmatrix,
  kTrap,
};
__global__ void mistaken_kernel(Mistake mistake, const uint4* memory) {
  SPARLINE_DYNAMIC_SHARED(shared);
  const int lane = lane_index();
  uint32_t r[4];
  switch (mistake) {
    case Mistake::kMissingLane:
      if (lane != 3) __shfl_xor_sync(kAllLanes, lane, 1);
      __syncthreads();
      break;
    case Mistake::kReturnedLane:
      if (lane == 3) return;
      __syncwarp();
      break;
    case Mistake::kDivergentBarrier:
      if (warp_index() == 0 || lane < 16) __syncthreads();
      __ballot_sync(kAllLanes, 1);
      break;
    case Mistake::kOtherCollective:
      if (lane < 16) {
        __any_sync(kAllLanes, 1);
      } else {
        __all_sync(kAllLanes, 1);
      }
      break;
    case Mistake::kForeignLane: __shfl_sync(0xffu << (lane / 8 * 8), lane, 0); break;
    case Mistake::kMisalignedCopy: cp_async_16(shared + 8, memory, true); break;
    case Mistake::kMisalignedSource: {
      cp_async_16(shared, reinterpret_cast<const char*>(memory) + 2, true);
      break;
    }
    case Mistake::kStrayCopy: cp_async_16(shared + 1024, memory, true); break;
    case Mistake::kStrayLdmatrix: ldmatrix_x4(r, shared + 16 * lane + 1024 - 31 * 16); break;
    case Mistake::kTrap: __trap(); break;
  }
}
void make(Mistake mistake) {
  emulator::set_order(emulator::Order::kForward);
  const uint4 memory = {};
  launch(mistaken_kernel, {.blocks = 1, .threads = 64, .shared_bytes = 1024}, nullptr, mistake,
         &memory);
}
TEST(MistakesDeathTest, AreNamed) {
  EXPECT_DEATH(make(Mistake::kMissingLane), "deadlock.*\n.*0xfffffff7 of warp 0 .*__shfl_xor_sync");
  EXPECT_DEATH(make(Mistake::kReturnedLane), "deadlock(.*\n)*.*lanes 0x8 of warp 0 have returned");
  EXPECT_DEATH(make(Mistake::kDivergentBarrier), "deadlock(.*\n)*.*0xffff0000 of warp 1.*__ballot");
  EXPECT_DEATH(make(Mistake::kOtherCollective),
               "different collectives: lane 31 in __all_sync.*any");
  EXPECT_DEATH(make(Mistake::kForeignLane), "lane 8 reads lane 0, which is not in the mask 0xff00");
  EXPECT_DEATH(make(Mistake::kMisalignedCopy), "cp_async_16: the shared address .* multiple of 16");
  EXPECT_DEATH(make(Mistake::kMisalignedSource),
               "cp_async_16: the global address .* multiple of 16");
  EXPECT_DEATH(make(Mistake::kStrayCopy), "byte 1024 is not in the 1024 bytes of dynamic shared");
  EXPECT_DEATH(make(Mistake::kStrayLdmatrix), "thread 31: ldmatrix_x4: byte 1024 is not in");
  EXPECT_DEATH(make(Mistake::kTrap), "thread 0: __trap");
}
TEST(MistakesDeathTest, StrayReadsFault) {
  std::vector<uint32_t> out(32);
  EXPECT_DEATH(launch(read_shared_kernel, {.blocks = 1, .threads = 32, .shared_bytes = 512},
                      nullptr, out.data(), 128),
               "thread [0-9]+: signal 11 .*byte 512 of 512 bytes of dynamic shared memory");
}
TEST(Launches, RefuseWhatAGpuCannotRun) {
  std::vector<uint32_t> out(32);
  EXPECT_THROW(launch(read_shared_kernel, {.blocks = 1, .threads = 32, .shared_bytes = 1 << 20},
                      nullptr, out.data(), 0),
               Error);
  EXPECT_NO_THROW(launch(read_shared_kernel, {.blocks = 0, .threads = 32}, nullptr, out.data(), 0));
}

}  // namespace
}  // namespace sparline::cuda
