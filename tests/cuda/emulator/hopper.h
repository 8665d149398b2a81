// SPDX-License-Identifier: Apache-2.0
//
// Hopper's own instructions under the emulator: every name of cuda/sm90/ptx.cuh, which includes
// this file in its place, and what kernels there may need next (bulk copies, products of two
// operands in shared memory, counters between blocks). What it checks, beside what emulator.h does,
// naming the thread and the line:
//   - Deadlocks: a barrier whose phase never ends, with what it misses; named barriers that too few
//     warps reach; counters that nobody counts up; more blocks that wait for each other than
//     multiprocessors (set_device).
//   - Barriers that were not initialised, not made known, initialised twice or overwritten;
//     arrivals that a barrier does not expect; threads that do not agree on a named barrier.
//   - Whole warps at wgmma_*, elect_one, named barriers and setmaxnreg, whole warpgroups with the
//     same operands at products; registers that the multiprocessor does not have.
//   - Products: shared memory that changes while they read it, registers of D that are written
//     meanwhile, no wgmma_fence since the last wait, addresses outside of shared memory.
//   - A block that ends with copies or products under way.
// And what makes wrong kernels give wrong results:
//   - What hardware does by itself happens as late as it may, one thing after another when no
//   thread
//     of the block can go on: all copies to one barrier for which a thread waits, or the products
//     for which a warp waits. In the order `reverse` products come first, at random either.
//   - A copy fills its destination with 0xff at once. It reads its source when it delivers.
//   - A product takes A from registers when it starts. It reads shared memory when it is waited
//   for;
//     D is NaN from its start until each warp has waited.
//   - elect_one picks lane 31 in the order `reverse`, any lane at random.
// Not seen: a missing fence, memory orders, and what ptxas makes of registers.
//
// Offsets within dynamic shared memory stand for its addresses, as if it began at a multiple of
// 1024.
#pragma once

#include <cuda.h>

#include <algorithm>

#include "cuda/common/platform.cuh"

namespace sparline::cuda {

// Barriers in shared memory -----------------------------------------------------------------------

using Barrier = uint64_t;

void init(Barrier& barrier, uint32_t num_arrivals);
void fence_barrier_init();
void arrive(Barrier& barrier);
void arrive_expecting(Barrier& barrier, uint32_t bytes);
void wait(Barrier& barrier, uint32_t parity);
/// Who polls looks again, before or after other warps go on.
void post(uint32_t& word, uint32_t value);
/// Lets others go on first: it is read in loops.
uint32_t posted(const uint32_t& word);
void sync_named(int idx, int num_threads);
void arrive_named(int idx, int num_threads);
inline void sync_named_warps(int idx, int num_threads) { sync_named(idx, num_threads); }
inline void arrive_named_warps(int idx, int num_threads) { arrive_named(idx, num_threads); }
uint32_t count_named(int idx, int num_threads, bool is_counted);

// Registers and lanes -----------------------------------------------------------------------------

namespace emulator {
void set_registers(bool takes, int num_registers);
}
template <int kRegisters>
__forceinline__ void give_back_registers() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0);
  emulator::set_registers(false, kRegisters);
}
template <int kRegisters>
__forceinline__ void take_registers() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0);
  emulator::set_registers(true, kRegisters);
}
bool elect_one();
inline void largest_as_integer(float& most, float x, float y) {
  most = __int_as_float(std::max({__float_as_int(most), __float_as_int(x), __float_as_int(y)}));
}

// The copy engine ---------------------------------------------------------------------------------

/// What encode_rows puts into a CUtensorMap here: sizes and strides in elements of 2 bytes.
struct EmulatedTensorMap {
  const unsigned char* data;
  int64_t sizes[4], strides[4];  // d, n, h, b
  int box_rows;
  bool is_cut;  // encode_cut_rows
};
static_assert(sizeof(EmulatedTensorMap) <= sizeof(CUtensorMap));

namespace emulator {
extern int64_t num_boxes;  // since the program began: whether Hopper's kernels ran
}
void load_box(void* shared, const CUtensorMap& map, Barrier& barrier, int32_t d, int32_t n,
              int32_t h, int32_t b);
void load_cut_box(void* shared, const CUtensorMap& map, Barrier& barrier, int32_t d, int32_t n,
                  int32_t num_rows, int32_t box_rows, int32_t h, int32_t b);
/// Of data that is read once: a hint.
__forceinline__ void load_box_once(void* shared, const CUtensorMap& map, Barrier& barrier,
                                   int32_t d, int32_t n, int32_t h, int32_t b) {
  load_box(shared, map, barrier, d, n, h, b);
}
/// `bytes` bytes, a multiple of 16 at multiples of 16.
void load_bytes(void* shared, const void* global, uint32_t bytes, Barrier& barrier);
inline void fence_async_shared() {}
inline void fence_async_global() {}

// Counters in global memory -----------------------------------------------------------------------

namespace emulator {
extern int64_t num_counts;  // since the program began: whether kernels ran whose blocks count
}
void count_up(uint32_t* counter);
inline void count_reads(uint32_t* counter) { count_up(counter); }
/// Lets all others go on first: it is read in loops.
uint32_t count_of(const uint32_t* counter);
void wait_for_count(const uint32_t* counter, uint32_t count);

// Products of a warpgroup -------------------------------------------------------------------------

void wgmma_fence();
void wgmma_commit();
namespace emulator {
void wait_for_products(int num_pending_groups);

/// What a thread brings to a product.
struct WgmmaCall {
  float* d;
  const uint32_t* a;  // of this thread; null: in shared memory
  uint32_t a_descriptor, b_descriptor;
  int num_columns;
  bool is_a_transposed, is_b_transposed, adds, is_bf16;
  const void* site = nullptr;
};
void start_product(WgmmaCall call);
}  // namespace emulator

template <int kPending>
__forceinline__ void wgmma_wait() {
  emulator::wait_for_products(kPending);
}

uint32_t matrix_descriptor(SharedAddress address, uint32_t column_stride_bytes);

template <class T, int kColumns, bool kIsTransposed, int kSize>
__forceinline__ void wgmma(float (&d)[kSize], const uint32_t* a, uint32_t descriptor, int adds) {
  static_assert(kColumns == 64 || kColumns == 128);
  static_assert(kSize >= kColumns / 2);
  emulator::start_product({.d = d,
                           .a = a,
                           .a_descriptor = 0,
                           .b_descriptor = descriptor,
                           .num_columns = kColumns,
                           .is_a_transposed = false,
                           .is_b_transposed = kIsTransposed,
                           .adds = adds != 0,
                           .is_bf16 = std::is_same_v<T, bf16>});
}
/// With A in shared memory as well: the 64 rows at its descriptor, or with kIsATransposed A^T the
/// 16 rows.
template <class T, int kColumns, bool kIsATransposed, bool kIsBTransposed, int kSize>
__forceinline__ void wgmma_shared(float (&d)[kSize], uint32_t a_descriptor, uint32_t b_descriptor,
                                  int adds) {
  static_assert(kColumns == 64 || kColumns == 128);
  static_assert(kSize >= kColumns / 2);
  emulator::start_product({.d = d,
                           .a = nullptr,
                           .a_descriptor = a_descriptor,
                           .b_descriptor = b_descriptor,
                           .num_columns = kColumns,
                           .is_a_transposed = kIsATransposed,
                           .is_b_transposed = kIsBTransposed,
                           .adds = adds != 0,
                           .is_bf16 = std::is_same_v<T, bf16>});
}

}  // namespace sparline::cuda
