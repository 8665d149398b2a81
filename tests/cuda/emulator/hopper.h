// SPDX-License-Identifier: Apache-2.0
//
// Hopper's own instructions under the emulator: every name of cuda/sm90/ptx.cuh, which includes
// this file in its place. What it checks, beside what emulator.h does:
//   - Barriers that are waited for in vain, arrivals that a barrier does not expect, copies that do
//     not lie as the copy engine wants them, products that nobody waited for.
// And what makes wrong kernels give wrong results:
//   - A copy fills its destination with 0xff at once, and reads its source and delivers only when a
//     thread that waits for its barrier has nothing else to wait for.
//   - A product takes A when it starts; B it reads, and D it writes, in the wgmma_wait that covers
//     its group: a tile given back before that is the next tile, or 0xff.
// Offsets within dynamic shared memory stand for its addresses, as if it began at a multiple of
// 1024.
#pragma once

#include <cuda.h>

#include <array>
#include <cstring>
#include <vector>

#include "cuda/common/platform.cuh"

namespace sparline::cuda {

// Barriers in shared memory -----------------------------------------------------------------------

using Barrier = uint64_t;

namespace emulator {

/// What a Barrier holds.
struct BarrierState {
  uint16_t num_arrivals;      // of a phase
  uint16_t num_missing : 15;  // in this one
  uint16_t parity : 1;
  int32_t missing_bytes;
};
static_assert(sizeof(BarrierState) == sizeof(Barrier));

/// A box on its way: rows of 128 bytes.
struct Box {
  Barrier* barrier;
  unsigned char* to;
  const unsigned char* from;
  int64_t row_stride_bytes;
  int32_t num_rows;
  int32_t first, end;  // rows of it that the tensor has
};

inline std::vector<Box> boxes;
inline int64_t num_boxes = 0;  // since the program began: whether Hopper's kernels ran

inline void change(Barrier& barrier, int num_arrivals, int bytes) {
  auto state = std::bit_cast<BarrierState>(barrier);
  if (num_arrivals > state.num_missing) fail("mbarrier: an arrival that it does not expect");
  state.num_missing = static_cast<uint16_t>(state.num_missing - num_arrivals);
  state.missing_bytes += bytes;
  if (state.num_missing == 0 && state.missing_bytes == 0) {
    state.num_missing = state.num_arrivals;
    state.parity ^= 1;
  }
  barrier = std::bit_cast<Barrier>(state);
}

inline bool has_ended(Barrier barrier, uint32_t parity) {
  return std::bit_cast<BarrierState>(barrier).parity != parity;
}

inline void deliver(const Box& box) {
  for (int r = 0; r < box.num_rows; ++r) {
    for (int chunk = 0; chunk < 8; ++chunk) {
      unsigned char* const to = box.to + r * 128 + (chunk ^ r % 8) * 16;
      if (r >= box.first && r < box.end) {
        std::memcpy(to, box.from + r * box.row_stride_bytes + chunk * 16, 16);
      } else {
        std::memset(to, 0, 16);
      }
    }
  }
  change(*box.barrier, 0, -box.num_rows * 128);
}
/// All boxes of a barrier, so that the lanes of a warp that wait for it go on together.
inline void deliver(const Barrier& barrier) {
  std::vector<Box> others;
  for (const Box& box : boxes) {
    if (box.barrier == &barrier) {
      deliver(box);
    } else {
      others.push_back(box);
    }
  }
  boxes = std::move(others);
}

/// Waits, with all threads of the block, until `is_done()`.
template <class IsDone, class Help>
void poll(const char* what, IsDone is_done, Help help) {
  constexpr int kMostPolls = 20'000;
  for (int n = 0; !is_done(); ++n) {
    if (n == kMostPolls) fail(std::string("deadlock: waits for ever at ") + what);
    if (n > 0) help();
    if (!is_done()) barrier();
  }
}

// Products ---------------------------------------------------------------------------------------

/// One lane's part of a product: two rows of D.
struct Product {
  float* d;
  std::array<std::array<float, 16>, 2> a;
  uint32_t b, column_stride;  // bytes
  int num_columns;
  bool is_transposed, adds, is_bf16;
};
/// Of a thread: groups that are under way, the last one not yet committed.
struct Products {
  std::vector<std::vector<Product>> groups{1};
};
inline std::array<Products, 1024> products;

inline float to_float(uint32_t bits, bool is_bf16) {
  if (is_bf16) return std::bit_cast<float>(bits << 16);
  return __half2float(std::bit_cast<__half>(static_cast<uint16_t>(bits)));
}

inline void finish(const Product& p) {
  const auto lane = static_cast<int>(threadIdx.x % 32);
  for (int n = 0; n < p.num_columns / 4; ++n) {
    const int column = n / 2 * 8 + lane % 4 * 2 + n % 2;
    float sums[2] = {0.0f, 0.0f};
    for (int k = 0; k < 16; ++k) {
      uint32_t at = p.is_transposed
                        ? p.b + k * 128 + column / 64 * p.column_stride + column % 64 * 2
                        : p.b + column * 128 + k * 2;
      at ^= (at >> 7 & 7) << 4;
      uint16_t bits = 0;
      std::memcpy(&bits, dynamic_shared() + at, sizeof(bits));
      const float b = to_float(bits, p.is_bf16);
      for (int half = 0; half < 2; ++half) sums[half] += p.a[half][k] * b;
    }
    for (int half = 0; half < 2; ++half) {
      float& d = p.d[n / 2 * 4 + half * 2 + n % 2];
      d = p.adds ? d + sums[half] : sums[half];
    }
  }
}

}  // namespace emulator

inline void init(Barrier& barrier, uint32_t num_arrivals) {
  std::erase_if(emulator::boxes, [&](const emulator::Box& box) { return box.barrier == &barrier; });
  for (emulator::Products& own : emulator::products) {
    if (own.groups.size() > 1 || !own.groups.back().empty()) {
      emulator::fail("wgmma: a block has ended without waiting for its products");
    }
  }
  const auto count = static_cast<uint16_t>(num_arrivals);
  barrier = std::bit_cast<Barrier>(emulator::BarrierState{count, count, 0, 0});
}
inline void fence_barrier_init() {}
inline void arrive(Barrier& barrier) { emulator::change(barrier, 1, 0); }
inline void arrive_expecting(Barrier& barrier, uint32_t bytes) {
  emulator::change(barrier, 1, static_cast<int>(bytes));
}
inline void wait(Barrier& barrier, uint32_t parity) {
  emulator::poll(
      "an mbarrier", [&] { return emulator::has_ended(barrier, parity); },
      [&] { emulator::deliver(barrier); });
}

namespace emulator {
struct NamedBarrier {
  int num_arrived = 0;
  uint32_t num_phases = 0;
};
inline std::array<NamedBarrier, 16> named_barriers;
}  // namespace emulator

inline void arrive_named(int idx, int num_threads) {
  emulator::NamedBarrier& own = emulator::named_barriers[static_cast<size_t>(idx)];
  if (++own.num_arrived == num_threads) {
    own.num_arrived = 0;
    ++own.num_phases;
  }
}
inline void sync_named(int idx, int num_threads) {
  emulator::NamedBarrier& own = emulator::named_barriers[static_cast<size_t>(idx)];
  const uint32_t phase = own.num_phases;
  arrive_named(idx, num_threads);
  emulator::barrier();  // so that all lanes of a warp have arrived before one goes on
  emulator::poll("a named barrier", [&] { return own.num_phases != phase; }, [] {});
}

// Registers, lanes, copies ------------------------------------------------------------------------

template <int kRegisters>
void give_back_registers() {}
template <int kRegisters>
void take_registers() {}

inline bool elect_one() { return threadIdx.x % 32 == 0; }

/// What encode_rows puts into a CUtensorMap here: sizes and strides in elements of 2 bytes.
struct EmulatedTensorMap {
  const unsigned char* data;
  int64_t sizes[4], strides[4];  // d, n, h, b
  int box_rows;
};
static_assert(sizeof(EmulatedTensorMap) <= sizeof(CUtensorMap));

inline void load_box(void* shared, const CUtensorMap& encoded, Barrier& barrier, int32_t d,
                     int32_t n, int32_t h, int32_t b) {
  EmulatedTensorMap map;
  std::memcpy(&map, &encoded, sizeof(map));
  auto* const to = static_cast<unsigned char*>(shared);
  if ((to - emulator::dynamic_shared()) % 1024 != 0) {
    emulator::fail("load_box: the box must lie at a multiple of 1024 bytes");
  }
  if (d < 0 || d + 64 > map.sizes[0] || h < 0 || h >= map.sizes[2] || b < 0 || b >= map.sizes[3]) {
    emulator::fail("load_box: a box outside of its tensor");
  }
  const int64_t first = d + n * map.strides[1] + h * map.strides[2] + b * map.strides[3];
  const auto end = static_cast<int32_t>(map.sizes[1] - n);
  emulator::boxes.push_back({.barrier = &barrier,
                             .to = to,
                             .from = map.data + first * 2,
                             .row_stride_bytes = map.strides[1] * 2,
                             .num_rows = map.box_rows,
                             .first = -n,
                             .end = end});
  ++emulator::num_boxes;
  std::memset(to, 0xff, static_cast<size_t>(map.box_rows) * 128);
}

// Products of a warpgroup -------------------------------------------------------------------------

inline void wgmma_fence() { __syncwarp(); }
inline void wgmma_commit() { emulator::products[threadIdx.x].groups.emplace_back(); }

template <int kPending>
void wgmma_wait() {
  // Time for the others to fill slots that were given back too early.
  for (int n = 0; n < 4; ++n) emulator::barrier();
  auto& groups = emulator::products[threadIdx.x].groups;
  while (groups.size() > kPending + 1) {
    for (const emulator::Product& product : groups.front()) emulator::finish(product);
    groups.erase(groups.begin());
  }
  __syncwarp();
}

inline uint32_t matrix_descriptor(SharedAddress address, uint32_t column_stride_bytes) {
  const auto base = reinterpret_cast<SharedAddress>(emulator::dynamic_shared());
  return column_stride_bytes >> 4 << 16 | static_cast<uint32_t>(address - base) >> 4;
}

template <class T, int kColumns, bool kIsTransposed, int kSize>
void wgmma(float (&d)[kSize], const uint32_t* a, uint32_t descriptor, int adds) {
  static_assert(kColumns == 64 || kColumns == 128);
  static_assert(kSize >= kColumns / 2);
  constexpr bool kIsBf16 = std::is_same_v<T, bf16>;
  emulator::Product product{.d = d,
                            .a = {},
                            .b = (descriptor & 0xffff) * 16,
                            .column_stride = (descriptor >> 16) * 16,
                            .num_columns = kColumns,
                            .is_transposed = kIsTransposed,
                            .adds = adds != 0,
                            .is_bf16 = kIsBf16};
  const auto group = static_cast<int>(threadIdx.x % 32 / 4);
  for (int lane = 0; lane < 4; ++lane) {
    for (int n = 0; n < 4; ++n) {
      const uint32_t pair = __shfl_sync(0xffffffffu, a[n], group * 4 + lane);
      float* const to = product.a[n % 2].data() + n / 2 * 8 + lane * 2;
      to[0] = emulator::to_float(pair & 0xffff, kIsBf16);
      to[1] = emulator::to_float(pair >> 16, kIsBf16);
    }
  }
  emulator::products[threadIdx.x].groups.back().push_back(product);
}

}  // namespace sparline::cuda
