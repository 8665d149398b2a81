// SPDX-License-Identifier: Apache-2.0
//
// The PTX of Hopper that CUDA C++ has no function for: mbarriers, the tensor copy engine, products
// of warpgroups. sm_90a only.
//
// Products (wgmma) are of a warpgroup, four warps: D 64xN (float32) += A 64x16 B 16xN. Each warp
// holds 16 rows of A and D, laid out as fragments of mma 16x8 (common/ptx.cuh): d[4 n + e] is
// element e of the n-th 16x8, a[0..3] the A fragment. B lies in shared memory.
//
// Under SPARLINE_EMULATE_CUDA the emulator of tests/cuda provides all of it.
#pragma once

#ifdef SPARLINE_EMULATE_CUDA
#include "emulator/hopper.h"
#else
#include <cuda.h>

#include "cuda/common/platform.cuh"

/// The block's dynamic shared memory, aligned: the copy engine's swizzled boxes want 1024 bytes.
#define SPARLINE_DYNAMIC_SHARED_ALIGNED(name, bytes) \
  extern __shared__ __align__(bytes)                 \
  unsigned char name[]

namespace sparline::cuda {

// Barriers in shared memory -----------------------------------------------------------------------

/// Counts arrivals and bytes on their way; a phase ends when none is missing.
using Barrier = uint64_t;

__device__ __forceinline__ void init(Barrier& barrier, uint32_t num_arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)),
               "r"(num_arrivals)
               : "memory");
}
/// After the last init, before the barrier of threads that makes them known to all.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void arrive(Barrier& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier))
               : "memory");
}
/// Arrives, and makes the phase wait for `bytes` more bytes of tensor copies.
__device__ __forceinline__ void arrive_expecting(Barrier& barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)),
      "r"(bytes)
      : "memory");
}
/// Waits until the phase of this parity has ended.
__device__ __forceinline__ void wait(Barrier& barrier, uint32_t parity) {
  const SharedAddress address = shared_address(&barrier);
  [[maybe_unused]] int num_polls = 0;
  uint32_t is_done = 0;
  do {
    asm volatile(
        "{ .reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p; }"
        : "=r"(is_done)
        : "r"(address), "r"(parity)
        : "memory");
#ifdef SPARLINE_WATCHDOG
    if (++num_polls > SPARLINE_WATCHDOG) __trap();
#endif
  } while (is_done == 0);
}

/// A word in shared memory that another warp polls, and what it holds by now: nothing is said of
/// other memory.
__device__ __forceinline__ void post(uint32_t& word, uint32_t value) {
  asm volatile("st.volatile.shared.u32 [%0], %1;" ::"r"(shared_address(&word)), "r"(value)
               : "memory");
}
__device__ __forceinline__ uint32_t posted(const uint32_t& word) {
  uint32_t value;
  asm volatile("ld.volatile.shared.u32 %0, [%1];"
               : "=r"(value)
               : "r"(shared_address(&word))
               : "memory");
  return value;
}

/// One of the barriers of threads beside that of __syncthreads, 1 to 15: `num_threads` threads
/// meet, of which some wait and others only arrive.
__device__ __forceinline__ void sync_named(int idx, int num_threads) {
  asm volatile("barrier.sync %0, %1;" ::"r"(idx), "r"(num_threads) : "memory");
}
__device__ __forceinline__ void arrive_named(int idx, int num_threads) {
  asm volatile("barrier.arrive %0, %1;" ::"r"(idx), "r"(num_threads) : "memory");
}
/// The same of whole warps whose lanes come together, which lets ptxas know that they do.
__device__ __forceinline__ void sync_named_warps(int idx, int num_threads) {
  asm volatile("barrier.sync.aligned %0, %1;" ::"r"(idx), "r"(num_threads) : "memory");
}
__device__ __forceinline__ void arrive_named_warps(int idx, int num_threads) {
  asm volatile("barrier.arrive.aligned %0, %1;" ::"r"(idx), "r"(num_threads) : "memory");
}
/// Waits for all, and tells of how many of them `is_counted` is true.
__device__ __forceinline__ uint32_t count_named(int idx, int num_threads, bool is_counted) {
  uint32_t count;
  asm volatile(
      "{ .reg .pred p;\n"
      "setp.ne.u32 p, %3, 0;\n"
      "barrier.red.popc.aligned.u32 %0, %1, %2, p; }"
      : "=r"(count)
      : "r"(idx), "r"(num_threads), "r"(is_counted ? 1u : 0u)
      : "memory");
  return count;
}

// Registers ---------------------------------------------------------------------------------------

/// All warps of a warpgroup, each warpgroup once, in a kernel of __launch_bounds__(threads, 1).
template <int kRegisters>
__device__ __forceinline__ void give_back_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

/// True for one lane of a warp, all of whose lanes call it.
__device__ __forceinline__ bool elect_one() {
  uint32_t is_elected;
  asm volatile(
      "{ .reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, p; }"
      : "=r"(is_elected));
  return is_elected != 0;
}

/// The largest of three numbers, as integers compare: of those above 0, if any is, with a NaN above
/// all. One instruction. Not in C++, where a number that is an integer too has two registers.
__device__ __forceinline__ void largest_as_integer(float& most, float x, float y) {
  asm volatile(
      "{\n.reg .s32 a, b, c;\nmov.b32 a, %0;\nmov.b32 b, %1;\nmov.b32 c, %2;\n"
      "max.s32 b, b, c;\nmax.s32 a, a, b;\nmov.b32 %0, a;\n}"
      : "+f"(most)
      : "f"(x), "f"(y));
}

// The tensor copy engine --------------------------------------------------------------------------

/// Starts copying the box at (d, n, h, b) of a (B, heads, N, D) tensor to shared memory; `barrier`
/// is told of its bytes. What lies past the end of the tensor arrives as zeros.
__device__ __forceinline__ void load_box(void* shared, const CUtensorMap& map, Barrier& barrier,
                                         int32_t d, int32_t n, int32_t h, int32_t b) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(d), "r"(n), "r"(h), "r"(b)
      : "memory");
}
/// The same for data that is read once: it is the first to leave L2.
__device__ __forceinline__ void load_box_once(void* shared, const CUtensorMap& map,
                                              Barrier& barrier, int32_t d, int32_t n, int32_t h,
                                              int32_t b) {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(d), "r"(n), "r"(h), "r"(b), "l"(policy)
      : "memory");
}
/// Of the box at (d, n, h, b) the first `num_rows` rows, at least one, and zeros for the others:
/// nothing else is read. Not for none: the card then may fault where the map begins, before the
/// tensor. `box_rows` and `map` as encode_cut_rows() was told.
__device__ __forceinline__ void load_cut_box(void* shared, const CUtensorMap& map, Barrier& barrier,
                                             int32_t d, int32_t n, int32_t num_rows,
                                             int32_t box_rows, int32_t h, int32_t b) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(d), "r"(box_rows - num_rows), "r"(n + num_rows),
      "r"(h), "r"(b)
      : "memory");
}
/// Starts copying `bytes` bytes, a multiple of 16 at multiples of 16.
__device__ __forceinline__ void load_bytes(void* shared, const void* global, uint32_t bytes,
                                           Barrier& barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(&barrier))
      : "memory");
}
/// Between ordinary accesses of this thread, or those it has learned of, and what products or the
/// copy engine do to the same memory. One fence for both memories would also wait until all stores
/// of this thread to global memory have been performed.
__device__ __forceinline__ void fence_async_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void fence_async_global() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

// Counters in global memory -----------------------------------------------------------------------

/// Counts up; who waits for the count sees what this thread wrote or learned of before.
__device__ __forceinline__ void count_up(uint32_t* counter) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}
/// Counts up without that: for copies of which a barrier of this block has told that they arrived.
/// What a release waits for is stores, of the whole multiprocessor and for thousands of clocks.
__device__ __forceinline__ void count_reads(uint32_t* counter) {
  asm volatile("red.relaxed.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}
__device__ __forceinline__ uint32_t count_of(const uint32_t* counter) {
  uint32_t count;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(count) : "l"(counter) : "memory");
  return count;
}
__device__ __forceinline__ void wait_for_count(const uint32_t* counter, uint32_t count) {
  [[maybe_unused]] int num_polls = 0;
  while (count_of(counter) < count) {
    __nanosleep(64);
#ifdef SPARLINE_WATCHDOG
    if (++num_polls > SPARLINE_WATCHDOG) __trap();
#endif
  }
}

// Products of a warpgroup -------------------------------------------------------------------------

/// Before the first product, and after registers that products use were written.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
/// Waits until at most kPending of the newest groups of products are still under way.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

/// How products find B in shared memory: rows of 64 elements (128 bytes) whose 16-byte chunks are
/// swizzled by row, as the copy engine writes them, in tiles of rows that begin at multiples of
/// 1024 bytes. `column_stride_bytes`: from a tile to that of the next 64 columns; read for
/// B = X (kIsTransposed), not for B = X^T. The lower half: the upper one is always the same, and
/// `bytes` further on is + bytes / 16.
__device__ __forceinline__ uint32_t matrix_descriptor(SharedAddress address,
                                                      uint32_t column_stride_bytes) {
  return column_stride_bytes >> 4 << 16 | address >> 4;
}

#define SPARLINE_D8(n)                                                                        \
  "+f"(d[n]), "+f"(d[n + 1]), "+f"(d[n + 2]), "+f"(d[n + 3]), "+f"(d[n + 4]), "+f"(d[n + 5]), \
      "+f"(d[n + 6]), "+f"(d[n + 7])
#define SPARLINE_D32(n) SPARLINE_D8(n), SPARLINE_D8(n + 8), SPARLINE_D8(n + 16), SPARLINE_D8(n + 24)
#define SPARLINE_WGMMA_64(type)                                                                 \
  asm volatile(                                                                                 \
      "{ .reg .pred p;\n"                                                                       \
      "setp.ne.b32 p, %37, 0;\n"                                                                \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                               \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "                      \
      "{%32, %33, %34, %35}, %36, p, 1, 1, %38; }"                                              \
      : SPARLINE_D32(0)                                                                         \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(adds), "n"(kIsTransposed))
#define SPARLINE_WGMMA_128(type)                                                                \
  asm volatile(                                                                                 \
      "{ .reg .pred p;\n"                                                                       \
      "setp.ne.b32 p, %69, 0;\n"                                                                \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                              \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "   \
      "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, "   \
      "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "                                \
      "{%64, %65, %66, %67}, %68, p, 1, 1, %70; }"                                              \
      : SPARLINE_D32(0), SPARLINE_D32(32)                                                       \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(adds), "n"(kIsTransposed))

/// Starts D += A B with A in registers; with `adds` 0, D = A B. B is the 16 rows (kIsTransposed),
/// or B^T the kColumns rows, at the descriptor. Elements of type T, bf16 or fp16. D is the
/// first kColumns / 2 of `d`.
template <class T, int kColumns, bool kIsTransposed, int kSize>
__device__ __forceinline__ void wgmma(float (&d)[kSize], const uint32_t* a, uint32_t descriptor,
                                      int adds) {
  static_assert(kColumns == 64 || kColumns == 128);
  static_assert(kSize >= kColumns / 2);
  constexpr uint32_t kEightRows = 1024 >> 4, kSwizzle128 = 1u << 30;
  const uint64_t b = uint64_t{kSwizzle128 | kEightRows} << 32 | descriptor;
  constexpr bool kIsBf16 = std::is_same_v<T, bf16>;
  if constexpr (kColumns == 64) {
    if constexpr (kIsBf16) {
      SPARLINE_WGMMA_64("bf16");
    } else {
      SPARLINE_WGMMA_64("f16");
    }
  } else {
    if constexpr (kIsBf16) {
      SPARLINE_WGMMA_128("bf16");
    } else {
      SPARLINE_WGMMA_128("f16");
    }
  }
}

#define SPARLINE_WGMMA_SHARED_64(type)                                                          \
  asm volatile(                                                                                 \
      "{ .reg .pred p;\n"                                                                       \
      "setp.ne.b32 p, %34, 0;\n"                                                                \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                               \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "                      \
      "%32, %33, p, 1, 1, %35, %36; }"                                                          \
      : SPARLINE_D32(0)                                                                         \
      : "l"(a), "l"(b), "r"(adds), "n"(kIsATransposed), "n"(kIsBTransposed))
#define SPARLINE_WGMMA_SHARED_128(type)                                                         \
  asm volatile(                                                                                 \
      "{ .reg .pred p;\n"                                                                       \
      "setp.ne.b32 p, %66, 0;\n"                                                                \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                              \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "   \
      "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, "   \
      "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "                                \
      "%64, %65, p, 1, 1, %67, %68; }"                                                          \
      : SPARLINE_D32(0), SPARLINE_D32(32)                                                       \
      : "l"(a), "l"(b), "r"(adds), "n"(kIsATransposed), "n"(kIsBTransposed))

/// The same with A in shared memory as well: the 64 rows at its descriptor, or with kIsATransposed
/// A^T the 16 rows.
template <class T, int kColumns, bool kIsATransposed, bool kIsBTransposed, int kSize>
__device__ __forceinline__ void wgmma_shared(float (&d)[kSize], uint32_t a_descriptor,
                                             uint32_t b_descriptor, int adds) {
  static_assert(kColumns == 64 || kColumns == 128);
  static_assert(kSize >= kColumns / 2);
  constexpr uint32_t kEightRows = 1024 >> 4, kSwizzle128 = 1u << 30;
  const uint64_t a = uint64_t{kSwizzle128 | kEightRows} << 32 | a_descriptor;
  const uint64_t b = uint64_t{kSwizzle128 | kEightRows} << 32 | b_descriptor;
  constexpr bool kIsBf16 = std::is_same_v<T, bf16>;
  if constexpr (kColumns == 64) {
    if constexpr (kIsBf16) {
      SPARLINE_WGMMA_SHARED_64("bf16");
    } else {
      SPARLINE_WGMMA_SHARED_64("f16");
    }
  } else {
    if constexpr (kIsBf16) {
      SPARLINE_WGMMA_SHARED_128("bf16");
    } else {
      SPARLINE_WGMMA_SHARED_128("f16");
    }
  }
}
#undef SPARLINE_WGMMA_SHARED_64
#undef SPARLINE_WGMMA_SHARED_128
#undef SPARLINE_WGMMA_64
#undef SPARLINE_WGMMA_128
#undef SPARLINE_D32
#undef SPARLINE_D8

}  // namespace sparline::cuda
#endif
