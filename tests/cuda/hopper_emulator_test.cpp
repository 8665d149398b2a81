// SPDX-License-Identifier: Apache-2.0
//
// Hopper's instructions under the emulator: products and copies as cuda/sm90/ptx.cuh promises them,
// and that broken kernels show.
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "cuda/common/tile.cuh"
#include "cuda/sm90/ptx.cuh"
#include "cuda/sm90/tensor_map.h"

namespace sparline::cuda {
namespace {

using emulator::Order;

template <class T>
std::vector<T> random_values(int size, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<T> values(static_cast<size_t>(size));
  for (T& value : values) value = from_float<T>(normal(generator));
  return values;
}

template <class T>
CUtensorMap map_of(const std::vector<T>& values, int num_rows, int num_columns, int box_rows) {
  constexpr DType kDType = std::is_same_v<T, bf16> ? DType::kBF16 : DType::kF16;
  const Rows rows{
      .data = const_cast<T*>(values.data()), .stride_n = num_columns, .is_vectorised = true};
  CUtensorMap map{};
  EXPECT_TRUE(encode_rows(map, rows, kDType, 1, 1, num_rows, num_columns, box_rows));
  return map;
}

// What is computed -------------------------------------------------------------------------------

enum class A { kRegisters, kShared, kSharedTransposed };

/// d (64 x kColumns) = 2 A B, 64 deep. x lies in one box: A, or A^T. y: B^T, or with kIsTransposed
/// B in boxes of 64 columns.
template <class T, int kColumns, A kA, bool kIsTransposed>
__global__ void product_kernel(const __grid_constant__ CUtensorMap x,
                               const __grid_constant__ CUtensorMap y, float* out) {
  SPARLINE_DYNAMIC_SHARED_ALIGNED(shared, 1024);
  constexpr int kBytes = 64 * 128;
  unsigned char* const y_tile = shared + kBytes;
  auto& full = *reinterpret_cast<Barrier*>(y_tile + kColumns * 128);
  if (threadIdx.x == 0) {
    init(full, 1);
    fence_barrier_init();
  }
  __syncthreads();
  if (warp_index() == 1 && elect_one()) {
    arrive_expecting(full, kBytes + kColumns * 128);
    load_box(shared, x, full, 0, 0, 0, 0);
    load_box(y_tile, y, full, 0, 0, 0, 0);
    if (kIsTransposed && kColumns > 64) load_box(y_tile + kBytes, y, full, 64, 0, 0, 0);
  }
  wait(full, 0);
  const int lane = lane_index(), row = warp_index() * 16 + lane % 16;
  const uint32_t a_first = matrix_descriptor(shared_address(shared), 0);
  const uint32_t b_first = matrix_descriptor(shared_address(y_tile), kBytes);
  float d[kColumns / 2];
  for (int round = 0; round < 2; ++round) {  // the second one adds, in a group of its own
    wgmma_fence();
    for (int k = 0; k < 4; ++k) {
      const int adds = round > 0 || k > 0;
      const uint32_t b = b_first + ((kIsTransposed ? k * 16 * 128 : k * 32) >> 4);
      if constexpr (kA == A::kRegisters) {
        uint32_t a[4];
        ldmatrix_x4(a, shared_address(shared) + row * 128 + ((k * 2 + lane / 16) ^ row % 8) * 16);
        wgmma<T, kColumns, kIsTransposed>(d, a, b, adds);
      } else {
        constexpr bool kIsATransposed = kA == A::kSharedTransposed;
        const uint32_t a = a_first + ((kIsATransposed ? k * 16 * 128 : k * 32) >> 4);
        wgmma_shared<T, kColumns, kIsATransposed, kIsTransposed>(d, a, b, adds);
      }
    }
    wgmma_commit();
  }
  wgmma_wait<0>();
  for (int n = 0; n < kColumns / 2; ++n) {
    const int r = warp_index() * 16 + lane / 4 + n / 2 % 2 * 8;
    out[r * kColumns + n / 4 * 8 + lane % 4 * 2 + n % 2] = d[n];
  }
}

template <class T, int kColumns, A kA, bool kIsTransposed>
void expect_product() {
  constexpr int kRows = 61;  // of 64: the others are zeros
  const auto x = random_values<T>(kRows * 64, 1), y = random_values<T>(64 * kColumns, 2);
  const CUtensorMap x_map = map_of(x, kRows, 64, 64);
  const CUtensorMap y_map =
      kIsTransposed ? map_of(y, 64, kColumns, 64) : map_of(y, kColumns, 64, kColumns);
  for (const Order order : {Order::kForward, Order::kReverse, Order::kRandom}) {
    emulator::set_order(order, 5);
    std::vector<float> out(64 * kColumns, NAN);
    launch(product_kernel<T, kColumns, kA, kIsTransposed>,
           {.blocks = 2, .threads = 128, .shared_bytes = 64 * 128 + kColumns * 128 + 8}, nullptr,
           x_map, y_map, out.data());
    emulator::set_order(Order::kForward);
    for (int row = 0; row < 64; ++row) {
      for (int column = 0; column < kColumns; ++column) {
        double want = 0.0;
        for (int k = 0; k < 64; ++k) {
          const int x_row = kA == A::kSharedTransposed ? k : row;
          const int x_column = kA == A::kSharedTransposed ? row : k;
          if (x_row >= kRows) continue;
          want +=
              2.0 * to_float(x[static_cast<size_t>(x_row * 64 + x_column)]) *
              to_float(
                  y[static_cast<size_t>(kIsTransposed ? k * kColumns + column : column * 64 + k)]);
        }
        ASSERT_NEAR(out[static_cast<size_t>(row * kColumns + column)], want, 1e-4)
            << row << " " << column;
      }
    }
  }
}
TEST(HopperProducts, FromRegisters) {
  expect_product<bf16, 64, A::kRegisters, false>();
  expect_product<fp16, 64, A::kRegisters, true>();
  expect_product<fp16, 128, A::kRegisters, false>();
  expect_product<bf16, 128, A::kRegisters, true>();
}
TEST(HopperProducts, FromSharedMemory) {
  expect_product<bf16, 64, A::kShared, true>();
  expect_product<fp16, 128, A::kShared, false>();
  expect_product<bf16, 128, A::kSharedTransposed, true>();
  expect_product<fp16, 64, A::kSharedTransposed, false>();
}

/// A box of 16 rows and 64 columns at (d, n), and bytes behind it, as they come.
__global__ void copy_kernel(const __grid_constant__ CUtensorMap map, int d, int n,
                            const uint32_t* bytes, uint32_t* out) {
  SPARLINE_DYNAMIC_SHARED_ALIGNED(shared, 1024);
  auto& full = *reinterpret_cast<Barrier*>(shared + 2048 + 256);
  if (threadIdx.x == 0) {
    init(full, 1);
    arrive_expecting(full, 2048 + 256);
    load_box(shared, map, full, d, n, 0, 0);
    load_bytes(shared + 2048, bytes, 256, full);
    wait(full, 0);
    std::memcpy(out, shared, 2048 + 256);
  }
}
TEST(HopperCopies, AreSwizzledAndEndWithZeros) {
  constexpr int kRows = 20, kColumns = 72;
  std::vector<bf16> x(kRows * kColumns);
  for (size_t n = 0; n < x.size(); ++n) x[n] = std::bit_cast<bf16>(static_cast<uint16_t>(n + 1));
  alignas(16) uint32_t bytes[64];
  for (uint32_t n = 0; n < 64; ++n) bytes[n] = 7 * n;
  const CUtensorMap map = map_of(x, kRows, kColumns, 16);
  for (const int first_column : {0, 16}) {
    for (const int first_row : {-3, 0, 9}) {
      std::vector<uint32_t> out((2048 + 256) / 4);
      launch(copy_kernel, {.blocks = 1, .threads = 32, .shared_bytes = 2048 + 256 + 8}, nullptr,
             map, first_column, first_row, bytes, out.data());
      for (int r = 0; r < 16; ++r) {
        for (int c = 0; c < 64; ++c) {
          uint16_t got = 0;
          std::memcpy(&got,
                      reinterpret_cast<const char*>(out.data()) + r * 128 + (c / 8 ^ r % 8) * 16 +
                          c % 8 * 2,
                      2);
          const int row = first_row + r, column = first_column + c;
          const bool is_there = row >= 0 && row < kRows && column < kColumns;
          ASSERT_EQ(got, is_there ? row * kColumns + column + 1 : 0) << r << " " << c;
        }
      }
      for (uint32_t n = 0; n < 64; ++n) EXPECT_EQ(out[512 + n], 7 * n);
    }
  }
}

/// The first rows of a box of 16 rows at row n.
__global__ void cut_copy_kernel(const __grid_constant__ CUtensorMap map, int n, int num_rows,
                                unsigned char* out) {
  SPARLINE_DYNAMIC_SHARED_ALIGNED(shared, 1024);
  auto& full = *reinterpret_cast<Barrier*>(shared + 2048);
  if (threadIdx.x == 0) {
    init(full, 1);
    arrive_expecting(full, 2048);
    load_cut_box(shared, map, full, 0, n, num_rows, 16, 0, 0);
    wait(full, 0);
    std::memcpy(out, shared, 2048);
  }
}
TEST(HopperCopies, EndWhereTheyAreCut) {
  constexpr int kRows = 20;
  const auto x = random_values<bf16>(kRows * 64, 3);
  const Rows rows{.data = const_cast<bf16*>(x.data()), .stride_n = 64, .is_vectorised = true};
  CUtensorMap map{};
  ASSERT_TRUE(encode_cut_rows(map, rows, DType::kBF16, 1, 1, kRows, 64, 16));
  for (const int first : {0, 7, 16, 19}) {
    for (const int num_rows : {1, 4, 16}) {
      if (first + num_rows > kRows) continue;
      std::vector<unsigned char> out(2048);
      launch(cut_copy_kernel, {.blocks = 1, .threads = 32, .shared_bytes = 2048 + 8}, nullptr, map,
             first, num_rows, out.data());
      for (int r = 0; r < 16; ++r) {
        for (int c = 0; c < 64; ++c) {
          bf16 got{};
          std::memcpy(&got, out.data() + r * 128 + (c / 8 ^ r % 8) * 16 + c % 8 * 2, 2);
          const bool is_there = r < num_rows;
          const float want = is_there ? to_float(x[size_t(first + r) * 64 + size_t(c)]) : 0.0f;
          ASSERT_EQ(to_float(got), want) << first << " " << num_rows << " " << r << " " << c;
        }
      }
    }
  }
}

constexpr int kBlocks = 3;  // that have room beside each other

/// Block n waits for n counts of the others, in one of the two ways.
__global__ void counting_kernel(uint32_t* counter, uint32_t* out) {
  const bool is_second = blockIdx.x % 2 != 0;
  if (threadIdx.x < 32) {
    if (is_second) {
      while (__ballot_sync(kAllLanes, count_of(counter) < blockIdx.x) != 0) {
      }
    } else {
      wait_for_count(counter, blockIdx.x);
    }
    __syncwarp();
    if (threadIdx.x == 0) {
      out[blockIdx.x] = *counter;
      count_up(counter);
    }
  }
  __syncthreads();
}
TEST(HopperCounters, BlocksWaitForEachOther) {
  for (const Order order : {Order::kForward, Order::kReverse, Order::kRandom}) {
    emulator::set_order(order, 3);
    uint32_t counter = 0;
    std::vector<uint32_t> out(kBlocks);
    launch(counting_kernel, {.blocks = kBlocks, .threads = 64}, nullptr, &counter, out.data());
    emulator::set_order(Order::kForward);
    for (uint32_t n = 0; n < out.size(); ++n) EXPECT_EQ(out[n], n);
  }
}
TEST(HopperCountersDeathTest, BlocksThatHaveNoRoom) {
  uint32_t counter = 0;
  std::vector<uint32_t> out(100);
  const auto run = [&](int blocks) {
    emulator::set_order(Order::kReverse);
    launch(counting_kernel, {.blocks = blocks, .threads = 64}, nullptr, &counter, out.data());
  };
  EXPECT_DEATH(run(kBlocks + 1), "deadlock: blocks wait for others that have");
  counter = static_cast<uint32_t>(-1000);
  EXPECT_NO_FATAL_FAILURE(run(1));
}

/// Two warps tell each other numbers by turns; warp 0 polls with some of its lanes.
__global__ void posting_kernel(uint32_t* out) {
  SPARLINE_DYNAMIC_SHARED_ALIGNED(shared, 1024);
  auto* const words = reinterpret_cast<uint32_t*>(shared);
  if (threadIdx.x < 2) words[threadIdx.x] = 0;
  __syncthreads();
  const bool is_first = threadIdx.x < 32;
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (uint32_t n = 1; n <= 5; ++n) {
    if (is_first && lane == 0) post(words[0], n);
    const int num_lanes = is_first ? 8 : 32;
    uint32_t value = n;
    do {
      if (lane < num_lanes) value = posted(words[is_first ? 1 : 0]);
    } while (__any_sync(kAllLanes, value != n));
    if (!is_first && lane == 0) post(words[1], n);
  }
  if (threadIdx.x == 0) *out = posted(words[1]);
}
TEST(HopperWords, WarpsPollEachOther) {
  for (const Order order : {Order::kForward, Order::kReverse, Order::kRandom}) {
    emulator::set_order(order, 3);
    uint32_t out = 0;
    launch(posting_kernel, {.blocks = 1, .threads = 64, .shared_bytes = 1024}, nullptr, &out);
    emulator::set_order(Order::kForward);
    EXPECT_EQ(out, 5u);
  }
}

/// Warps 0 and 1 count by themselves, as do 2 and 3, round after round.
__global__ void voting_kernel(uint32_t* out) {
  const int pair = warp_index() / 2;
  uint32_t num_wrong = 0;
  for (int round = 0; round < 5; ++round) {
    const bool is_counted = (static_cast<int>(threadIdx.x) + pair) % 7 <= round;
    uint32_t want = 0;
    for (int thread = pair * 64; thread < pair * 64 + 64; ++thread) {
      want += (thread + pair) % 7 <= round;
    }
    num_wrong += count_named(3 + pair, 64, is_counted) != want;
  }
  out[threadIdx.x] = num_wrong;
}
TEST(HopperWords, WarpsCountTogether) {
  for (const Order order : {Order::kForward, Order::kReverse, Order::kRandom}) {
    emulator::set_order(order, 3);
    std::vector<uint32_t> out(128, 1);
    launch(voting_kernel, {.blocks = 1, .threads = 128, .shared_bytes = 0}, nullptr, out.data());
    emulator::set_order(Order::kForward);
    EXPECT_EQ(out, std::vector<uint32_t>(128, 0));
  }
}

// What goes wrong --------------------------------------------------------------------------------

enum class Mistake {
  kNone,
  // Of the one who loads
  kNoEmptyWait,
  kFewerBytes,
  kMoreBytes,
  kNobodyLoads,
  kAllLanesLoad,
  kStrayBox,
  kMisalignedBox,
  kNoSuchHead,
  kOneCopyMore,
  // Of those who multiply
  kNoFullWait,
  kWrongParity,
  kEarlyRelease,
  kNoRelease,
  kReleaseByAll,
  kEarlyRead,
  kEarlyWrite,
  kNoWaitAtTheEnd,
  kNoCommit,
  kNoFence,
  kPartOfAWarpgroup,
  kOtherTiles,
  kPartOfAWarp,
  // Of all
  kNoInit,
  kNoInitFence,
  kInitTwice,
  kOverwritten,
  kLateThread,
  kElectByOne,
  kNamedAlone,
  kNamedByLanes,
  kNamedCounts,
  kTooManyRegisters,
  kUnlikeRegisters,
};

/// out (64 x 64) = the sum of the tiles: one warp loads them into two slots, a warpgroup adds them
/// up, times the unit matrix.
__global__ void sum_kernel(Mistake mistake, const __grid_constant__ CUtensorMap map, int num_tiles,
                           float* out) {
  SPARLINE_DYNAMIC_SHARED_ALIGNED(shared, 1024);
  constexpr int kSlots = 2, kBytes = 64 * 128;
  auto* const full = reinterpret_cast<Barrier*>(shared + kSlots * kBytes);
  Barrier* const empty = full + kSlots;
  if (threadIdx.x == 0 && mistake != Mistake::kNoInit) {
    for (int n = 0; n < kSlots; ++n) {
      init(full[n], 1);
      init(empty[n], 4);
      if (mistake == Mistake::kInitTwice) init(full[n], 1);
    }
    if (mistake != Mistake::kNoInitFence) fence_barrier_init();
  }
  if (mistake == Mistake::kLateThread && threadIdx.x == 32) wait(full[0], 0);
  __syncthreads();
  if (mistake == Mistake::kOverwritten && threadIdx.x == 0) full[1] = 0;
  const int lane = lane_index();
  const bool loads = warp_index() < 4;  // the third warpgroup has nothing to do
  if (warp_index() >= 8) return;
  if (loads) {
    if (mistake != Mistake::kTooManyRegisters) give_back_registers<40>();
  } else if (mistake == Mistake::kUnlikeRegisters && warp_index() == 5) {
    take_registers<208>();
  } else {
    take_registers<216>();
  }
  if (mistake == Mistake::kNamedAlone && loads) sync_named(3, 256);
  if (mistake == Mistake::kNamedByLanes && lane < 16) sync_named(3, 256);
  if (mistake == Mistake::kNamedCounts) loads ? arrive_named(3, 192) : sync_named(3, 256);
  if (mistake == Mistake::kElectByOne && (lane > 0 || elect_one())) __syncwarp();
  // Those who multiply have it to themselves until those who load come, and the other way round.
  if (!loads) arrive_named(1, 256);
  if (loads) {
    sync_named(1, 256);
    if (warp_index() != 0 || mistake == Mistake::kNobodyLoads) return;
    for (int tile = 0; tile < num_tiles; ++tile) {
      const int slot = tile % kSlots;
      if (mistake != Mistake::kNoEmptyWait) wait(empty[slot], (tile / kSlots & 1) ^ 1);
      if (mistake == Mistake::kAllLanesLoad || elect_one()) {
        const int wrong = mistake == Mistake::kFewerBytes  ? 16
                          : mistake == Mistake::kMoreBytes ? -16
                                                           : 0;
        if (mistake == Mistake::kAllLanesLoad && lane > 0) {
        } else {
          arrive_expecting(full[slot], static_cast<uint32_t>(kBytes + wrong));
        }
        const int head = mistake == Mistake::kNoSuchHead ? 1 : 0;
        const int shift = mistake == Mistake::kStrayBox        ? 2 * kBytes
                          : mistake == Mistake::kMisalignedBox ? 128
                                                               : 0;
        load_box(shared + slot * kBytes + shift, map, full[slot], 0, tile * 64, head, 0);
      }
      __syncwarp();
    }
    if (mistake == Mistake::kOneCopyMore) {
      wait(empty[(num_tiles - 1) % kSlots], (num_tiles - 1) / kSlots & 1);
      if (elect_one()) load_box(shared, map, full[0], 0, 0, 0, 0);
    }
    return;
  }
  uint32_t a[4][4] = {};
  const int g = lane / 4, t = lane % 4, own = warp_index() % 4;
  constexpr uint32_t kOne = 0x3f80;
  a[own][0] = a[own][3] = (g == 2 * t ? kOne : 0) | (g == 2 * t + 1 ? kOne << 16 : 0);
  float d[32];
  for (float& x : d) x = 0.0f;
  if (mistake == Mistake::kPartOfAWarpgroup && own == 3) return;
  for (int tile = 0; tile < num_tiles; ++tile) {
    const int slot = tile % kSlots;
    uint32_t parity = tile / kSlots & 1;
    if (mistake == Mistake::kWrongParity) parity ^= 1;
    if (mistake != Mistake::kNoFullWait) wait(full[slot], parity);
    int from = slot * kBytes;
    if (mistake == Mistake::kOtherTiles && own == 2) from = (slot ^ 1) * kBytes;
    const uint32_t b = matrix_descriptor(shared_address(shared + from), 0);
    if (mistake != Mistake::kNoFence) wgmma_fence();
    if (mistake == Mistake::kPartOfAWarp && lane == 7) break;
    for (int k = 0; k < 4; ++k) wgmma<bf16, 64, true>(d, a[k], b + (k * 16 * 128 >> 4), 1);
    if (mistake != Mistake::kNoCommit) wgmma_commit();
    if (mistake == Mistake::kEarlyRelease && lane == 0) arrive(empty[slot]);
    const bool is_last = tile == num_tiles - 1;
    if (mistake == Mistake::kEarlyWrite) d[5] *= 2.0f;
    if (mistake == Mistake::kEarlyRead && is_last) out[0] = d[0];
    if (mistake != Mistake::kNoWaitAtTheEnd || !is_last) wgmma_wait<0>();
    if (mistake == Mistake::kEarlyRelease || mistake == Mistake::kNoRelease) continue;
    if (lane == 0 || mistake == Mistake::kReleaseByAll) arrive(empty[slot]);
  }
  for (int n = 0; n < 32; ++n) {
    if (mistake == Mistake::kEarlyRead && threadIdx.x == 128 && n == 0) continue;
    const int row = own * 16 + g + n / 2 % 2 * 8, column = n / 4 * 8 + t * 2 + n % 2;
    out[row * 64 + column] = d[n];
  }
}

/// Whether the sum is right.
bool sums_with(Mistake mistake, Order order) {
  constexpr int kTiles = 5;
  const auto x = random_values<bf16>(kTiles * 64 * 64, 4);
  const CUtensorMap map = map_of(x, kTiles * 64, 64, 64);
  std::vector<float> out(64 * 64, NAN);
  emulator::set_order(order, 9);
  launch(sum_kernel, {.blocks = 1, .threads = 384, .shared_bytes = 2 * 64 * 128 + 4 * 8}, nullptr,
         mistake, map, kTiles, out.data());
  emulator::set_order(Order::kForward);
  for (size_t n = 0; n < out.size(); ++n) {
    double want = 0.0;
    for (size_t tile = 0; tile < kTiles; ++tile) want += to_float(x[tile * 64 * 64 + n]);
    if (!(std::abs(out[n] - want) < 1e-4)) return false;
  }
  return true;
}

TEST(HopperMistakes, NoneIsSeenWhereThereIsNone) {
  for (const Order order : {Order::kForward, Order::kReverse, Order::kRandom}) {
    EXPECT_TRUE(sums_with(Mistake::kNone, order));
  }
}
TEST(HopperMistakes, EarlyReadsGiveNaN) {
  for (const Order order : {Order::kForward, Order::kReverse, Order::kRandom}) {
    EXPECT_FALSE(sums_with(Mistake::kEarlyRead, order));
  }
}

/// In each order of threads.
void expect_death(Mistake mistake, const char* message) {
  for (const Order order : {Order::kForward, Order::kReverse, Order::kRandom}) {
    EXPECT_DEATH(sums_with(mistake, order), message)
        << "mistake " << static_cast<int>(mistake) << ", order " << static_cast<int>(order);
  }
}
TEST(HopperMistakesDeathTest, OfTheOneWhoLoads) {
  expect_death(Mistake::kNoEmptyWait, "arrive: the mbarrier at byte 163(84|92) expects no more");
  expect_death(Mistake::kFewerBytes, "deadlock(.*\n)*.*wait, for .* 0 of 1 arrivals and 16 bytes");
  expect_death(Mistake::kMoreBytes, "deadlock(.*\n)*.*wait, for .* 0 of 1 arrivals and -16 bytes");
  expect_death(Mistake::kNobodyLoads,
               "deadlock(.*\n)*.*0xffffffff of warp 4 wait in wait, for the end of a phase of "
               "parity 0 of the mbarrier at byte 16384, .* lacks 1 of 1 arrivals and 0 bytes");
  expect_death(Mistake::kAllLanesLoad, "deadlock(.*\n)*.*-507904 bytes");
  expect_death(Mistake::kStrayBox, "load_box: byte .* is not in the 16416 bytes of dynamic shared");
  expect_death(Mistake::kMisalignedBox, "load_box: byte 128 .* not a multiple of 1024");
  expect_death(Mistake::kNoSuchHead, "load_box: the box at \\(0, 0, 1, 0\\) is of no head");
  expect_death(Mistake::kOneCopyMore, "the block has ended while a copy was under way");
}
TEST(HopperMistakesDeathTest, OfThoseWhoMultiply) {
  expect_death(Mistake::kNoFullWait, "arrive: the mbarrier at byte 16384 expects no more");
  expect_death(Mistake::kWrongParity, "arrive: the mbarrier at byte 16384 expects no more");
  expect_death(Mistake::kEarlyRelease, "shared memory of B has changed while a product was under");
  expect_death(Mistake::kNoRelease, "deadlock(.*\n)*.*warp 0 wait in wait, .* lacks 4 of 4 arriv");
  expect_death(Mistake::kReleaseByAll, "arrive: the mbarrier at byte .* expects no more arrivals");
  expect_death(Mistake::kEarlyWrite, "register 5 of D of thread .* was written while a product");
  expect_death(Mistake::kNoWaitAtTheEnd, "the block has ended without waiting for a product");
  expect_death(Mistake::kNoCommit, "the block has ended without committing a product");
  expect_death(Mistake::kNoFence, "no wgmma_fence before the first product to a D");
  expect_death(Mistake::kPartOfAWarpgroup, "deadlock(.*\n)*.*wgmma, for the other threads");
  expect_death(Mistake::kOtherTiles, "of a warpgroup start different products");
  expect_death(Mistake::kPartOfAWarp, "deadlock(.*\n)*.*wgmma, for the other threads");
}
TEST(HopperMistakesDeathTest, OfAll) {
  expect_death(Mistake::kNoInit, "nobody has initialised the mbarrier at byte 16(384|400)");
  expect_death(Mistake::kNoInitFence, "no fence_barrier_init since the mbarrier");
  expect_death(Mistake::kInitTwice, "init: the mbarrier at byte 16384 was initialised before");
  expect_death(Mistake::kOverwritten, "the mbarrier at byte 16392 was overwritten");
  expect_death(Mistake::kLateThread, "nobody has initialised|deadlock");
  expect_death(Mistake::kElectByOne, "different collectives: .*elect_one");
  expect_death(Mistake::kNamedAlone,
               "deadlock(.*\n)*.*a named barrier, 3, where 128 of 256 threads have arrived");
  expect_death(Mistake::kNamedByLanes, "different collectives: .*sync_named .30256.");
  expect_death(Mistake::kNamedCounts, "named barrier 3: some threads say it has (192|256) of them");
  expect_death(Mistake::kTooManyRegisters, "setmaxnreg: the block wants .* registers of 65536");
  expect_death(Mistake::kUnlikeRegisters, "warps of a warpgroup have different numbers");
}

}  // namespace
}  // namespace sparline::cuda
