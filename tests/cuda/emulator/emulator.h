// SPDX-License-Identifier: Apache-2.0
//
// Runs CUDA kernels on the CPU, one block after another, every thread a fiber: for tests of kernels
// on machines without a GPU, and for finding what a GPU would only sometimes show. With
// SPARLINE_EMULATE_CUDA a .cu file is plain C++, and cuda/common/platform.cuh includes this file in
// place of launch.cuh and ptx.cuh. Memory of the device is memory of the host; streams mean
// nothing.
//
//   g++ -std=c++20 -O2 -g1 -fno-strict-aliasing -Wall -Wno-unknown-pragmas
//     -DSPARLINE_EMULATE_CUDA -Iinclude -Isrc -Itests/cuda -I/usr/local/cuda/include
//     -x c++ kernel.cu test.cpp tests/cuda/emulator/emulator.cpp -lgtest -lgtest_main -o test
//
// (and emulator/hopper.cpp for kernels of cuda/sm90. -g1 gives lines in messages. No CUDA library
// is linked; the headers cuda_bf16.h, cuda_fp16.h and cuda_fp8.h are the toolkit's.) What it
// checks, ending the process with a message that names kernel, block, thread and line:
//   - Deadlocks: lanes that wait for a lane named in the mask that has left or waits elsewhere,
//     barriers that some threads never reach; lanes that meet with different collectives or masks.
//   - cp.async and ldmatrix: addresses that are not aligned or not in shared memory.
//   - Dynamic shared memory has what was asked for, to the next 512 bytes: it ends at a page that
//     cannot be touched. A fault in a kernel names the thread.
// And what makes wrong kernels give wrong results:
//   - A block starts with dynamic shared memory full of 0xff bytes: NaN as bf16, fp16 and float32.
//   - cp.async reads its source at once, fills its destination with 0xff and delivers at the
//     cp_async_wait that covers its group.
//   - A warp runs until all its lanes are at a barrier, wait for something else or have returned,
//     lanes one after another until they meet. SPARLINE_EMULATOR_ORDER=forward, reverse or a number
//     (the seed of random orders) picks the order of blocks, warps and lanes: a result that depends
//     on it lacks a __syncthreads or __syncwarp.
// A block runs to its end before the next one begins, but for blocks that wait for counters in
// global memory (hopper.h): the next one then begins beside it. Static __shared__ arrays become
// static variables: they keep their values from block to block, and blocks side by side share them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "sparline/error.h"

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __constant__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

// The machine -------------------------------------------------------------------------------------

namespace sparline::cuda::emulator {

enum class Op {
  kSyncWarp,
  kShuffle,
  kShuffleUp,
  kShuffleDown,
  kShuffleXor,
  kBallot,
  kAny,
  kAll,
  kReduceAdd,
  kReduceMin,
  kReduceMax,
  kReduceMinSigned,
  kReduceMaxSigned,
  kReduceAnd,
  kReduceOr,
  kReduceXor,
  kLdmatrix,
  kLdmatrixTrans,
  kMmaBf16,
  kMmaFp16,
  kMmaInt8,
  kMmaE4m3,
  kTogether,
};

/// What one lane brings to a warp collective, and takes away.
struct Call {
  Op op;
  uint32_t mask = 0xffffffffu;
  uint64_t value = 0;         // shuffles, votes, reductions
  uint32_t lane_or_step = 0;  // shuffles
  uint32_t width = 32;        // shuffles
  uint64_t result = 0;
  const void* row = nullptr;  // ldmatrix
  const uint32_t* a = nullptr;
  uint32_t b[2] = {0, 0};
  void* d = nullptr;  // mma: in and out; ldmatrix: out
  // Something of one of the instruction sets beside this file's: all lanes bring the same `what`
  // and `value`, and the last one does it.
  const char* what = nullptr;
  void (*action)(uint64_t value) = nullptr;
  const void* site = nullptr;
};

/// Waits until all lanes in the mask are here; the last one does the work for all.
void meet(Call& call);
/// __syncthreads.
void barrier();
/// A cp.async of 4 or 16 bytes.
void copy_async(void* shared, const void* global, int bytes, bool is_valid);
void commit_copies();
void wait_for_copies(int num_pending_groups);
unsigned char* dynamic_shared();
/// Prints where the running thread is, and aborts.
[[noreturn]] void fail(const std::string& message);
/// Of something that began at a return address, and of no thread that runs.
[[noreturn]] void fail_at(const std::string& message, const void* site);

// For instructions that wait for more than the lanes of a warp (hopper.cpp).

/// What a thread waits for.
struct Wait {
  int kind;
  const void* at = nullptr;
  uint64_t value = 0;
  const void* site = nullptr;
};
/// Until another thread or the instructions wake it.
void park(const Wait& wait);
/// Lets threads of the block go on that wait for something that `is_over`.
void wake(const std::function<bool(const Wait&, int thread)>& is_over);
/// Until no other thread of the block can go on, and the other blocks had their turn.
void let_others_go_on(const void* site);
/// Threads of the block that have let others go on may look again.
void let_polling_go_on();
/// Something has happened that a thread of another block may wait for.
void note_progress();

/// The threads of the block that wait.
struct Waiting {
  const Wait* wait;
  int thread;
};
std::vector<Waiting> waiting();

/// Called by the scheduler, on its own stack.
struct Instructions {
  void (*end_block)();
  /// No thread of the block can go on: makes one thing happen that hardware does by itself, and
  /// wakes who waited for it. False if nothing is under way.
  bool (*finish_something)();
  std::string (*describe)(const Wait& wait);
};
void add_instructions(const Instructions& instructions);

/// The emulated device, for the launches that follow: 80, or 90 for Hopper's own kernels, and as
/// many thread blocks as a kernel made to stay on its multiprocessor is launched with. The fewer,
/// the more each of them has to do. `resident_blocks`: how many a multiprocessor is said to hold.
void set_device(int arch, int num_multiprocessors = 3, int resident_blocks = 1);
int arch();
int num_multiprocessors();
int resident_blocks();

enum class Order { kForward, kReverse, kRandom };
/// For the launches that follow; first, the environment decides.
void set_order(Order order, uint64_t seed = 0);
Order order();
/// This warp of every block goes on only when no other one can; -1: none does.
void set_late_warp(int warp);
uint64_t random_number();
/// Of the running block.
size_t dynamic_shared_bytes();

/// Runs `thread(context)` in every thread of the grid.
void run(const void* kernel, int64_t blocks, int threads, int64_t shared_bytes,
         void (*thread)(void*), void* context);

template <class T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}
template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(static_cast<void*>(&value), &bits, sizeof(T));
  return value;
}

template <class T>
inline __attribute__((always_inline)) T shuffle(Op op, uint32_t mask, T value, int lane_or_step,
                                                int width) {
  Call call{.op = op,
            .mask = mask,
            .value = to_bits(value),
            .lane_or_step = static_cast<uint32_t>(lane_or_step),
            .width = static_cast<uint32_t>(width)};
  meet(call);
  return from_bits<T>(call.result);
}
inline __attribute__((always_inline)) uint32_t vote(Op op, uint32_t mask, uint32_t value) {
  Call call{.op = op, .mask = mask, .value = value};
  meet(call);
  return static_cast<uint32_t>(call.result);
}
inline __attribute__((always_inline)) void multiply(Op op, void* d, const uint32_t* a, uint32_t b0,
                                                    uint32_t b1) {
  Call call{.op = op, .a = a, .b = {b0, b1}, .d = d};
  meet(call);
}

}  // namespace sparline::cuda::emulator

// CUDA C++ ----------------------------------------------------------------------------------------

using std::max;
using std::min;

__forceinline__ void __syncthreads() { sparline::cuda::emulator::barrier(); }
__forceinline__ void __syncwarp(unsigned mask = 0xffffffffu) {
  sparline::cuda::emulator::vote(sparline::cuda::emulator::Op::kSyncWarp, mask, 0);
}
template <class T>
__forceinline__ T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  return sparline::cuda::emulator::shuffle(sparline::cuda::emulator::Op::kShuffle, mask, value,
                                           lane, width);
}
template <class T>
__forceinline__ T __shfl_up_sync(unsigned mask, T value, unsigned step, int width = 32) {
  return sparline::cuda::emulator::shuffle(sparline::cuda::emulator::Op::kShuffleUp, mask, value,
                                           static_cast<int>(step), width);
}
template <class T>
__forceinline__ T __shfl_down_sync(unsigned mask, T value, unsigned step, int width = 32) {
  return sparline::cuda::emulator::shuffle(sparline::cuda::emulator::Op::kShuffleDown, mask, value,
                                           static_cast<int>(step), width);
}
template <class T>
__forceinline__ T __shfl_xor_sync(unsigned mask, T value, int step, int width = 32) {
  return sparline::cuda::emulator::shuffle(sparline::cuda::emulator::Op::kShuffleXor, mask, value,
                                           step, width);
}
__forceinline__ unsigned __ballot_sync(unsigned mask, int is_true) {
  return sparline::cuda::emulator::vote(sparline::cuda::emulator::Op::kBallot, mask, is_true != 0);
}
__forceinline__ int __any_sync(unsigned mask, int is_true) {
  return static_cast<int>(
      sparline::cuda::emulator::vote(sparline::cuda::emulator::Op::kAny, mask, is_true != 0));
}
__forceinline__ int __all_sync(unsigned mask, int is_true) {
  return static_cast<int>(
      sparline::cuda::emulator::vote(sparline::cuda::emulator::Op::kAll, mask, is_true != 0));
}

#define SPARLINE_EMULATE_REDUCE(name, type, op)                                                   \
  __forceinline__ type name(unsigned mask, type value) {                                          \
    return static_cast<type>(sparline::cuda::emulator::vote(sparline::cuda::emulator::Op::op,     \
                                                            mask, static_cast<uint32_t>(value))); \
  }
SPARLINE_EMULATE_REDUCE(__reduce_add_sync, unsigned, kReduceAdd)
SPARLINE_EMULATE_REDUCE(__reduce_add_sync, int, kReduceAdd)
SPARLINE_EMULATE_REDUCE(__reduce_min_sync, unsigned, kReduceMin)
SPARLINE_EMULATE_REDUCE(__reduce_min_sync, int, kReduceMinSigned)
SPARLINE_EMULATE_REDUCE(__reduce_max_sync, unsigned, kReduceMax)
SPARLINE_EMULATE_REDUCE(__reduce_max_sync, int, kReduceMaxSigned)
SPARLINE_EMULATE_REDUCE(__reduce_and_sync, unsigned, kReduceAnd)
SPARLINE_EMULATE_REDUCE(__reduce_or_sync, unsigned, kReduceOr)
SPARLINE_EMULATE_REDUCE(__reduce_xor_sync, unsigned, kReduceXor)
#undef SPARLINE_EMULATE_REDUCE

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline unsigned __brev(unsigned x) {
  unsigned result = 0;
  for (int bit = 0; bit < 32; ++bit) result |= (x >> bit & 1u) << (31 - bit);
  return result;
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
  unsigned result = 0;
  for (int byte = 0; byte < 4; ++byte) {
    const unsigned pick = selector >> (4 * byte);
    unsigned value = static_cast<unsigned>(bytes >> (8 * (pick & 7u)) & 0xffu);
    if (pick & 8u) value = value & 0x80u ? 0xffu : 0u;
    result |= value << (8 * byte);
  }
  return result;
}

// Threads of a block never run at the same time, so that plain arithmetic is atomic.
template <class T>
T atomicAdd(T* at, std::type_identity_t<T> value) {
  static_assert(std::is_integral_v<T>, "float sums must not depend on the order of threads");
  const T old = *at;
  *at = static_cast<T>(old + value);
  return old;
}
template <class T>
T atomicMax(T* at, std::type_identity_t<T> value) {
  return std::exchange(*at, std::max(*at, value));
}
template <class T>
T atomicMin(T* at, std::type_identity_t<T> value) {
  return std::exchange(*at, std::min(*at, value));
}
template <class T>
T atomicOr(T* at, std::type_identity_t<T> value) {
  return std::exchange(*at, *at | value);
}
template <class T>
T atomicAnd(T* at, std::type_identity_t<T> value) {
  return std::exchange(*at, *at & value);
}
template <class T>
T atomicXor(T* at, std::type_identity_t<T> value) {
  return std::exchange(*at, *at ^ value);
}
template <class T>
T atomicExch(T* at, std::type_identity_t<T> value) {
  return std::exchange(*at, value);
}
template <class T>
T atomicCAS(T* at, std::type_identity_t<T> compare, std::type_identity_t<T> value) {
  const T old = *at;
  if (old == compare) *at = value;
  return old;
}

template <class T>
T __ldg(const T* at) {
  return *at;
}
template <class T>
T __ldcg(const T* at) {
  return *at;
}
template <class T>
void __stcs(T* at, T value) {
  *at = value;
}
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }

/// NaN becomes 0, what is too large the nearest integer, as on the GPU.
template <class T>
T emulated_to_integer(float x) {
  if (std::isnan(x)) return 0;
  const double limited =
      std::clamp<double>(x, std::numeric_limits<T>::min(), std::numeric_limits<T>::max());
  return static_cast<T>(limited);
}
inline int __float2int_rn(float x) { return emulated_to_integer<int>(std::nearbyint(x)); }
inline int __float2int_rz(float x) { return emulated_to_integer<int>(std::trunc(x)); }
inline int __float2int_rd(float x) { return emulated_to_integer<int>(std::floor(x)); }
inline int __float2int_ru(float x) { return emulated_to_integer<int>(std::ceil(x)); }
inline unsigned __float2uint_rn(float x) {
  return emulated_to_integer<unsigned>(std::nearbyint(x));
}
inline unsigned __float2uint_rz(float x) { return emulated_to_integer<unsigned>(std::trunc(x)); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
[[noreturn]] inline void __trap() { sparline::cuda::emulator::fail("__trap() was called"); }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) {}

// What launch.cuh and ptx.cuh provide; see there
// ----------------------------------------------------

#define SPARLINE_DYNAMIC_SHARED(name) \
  unsigned char* const name = ::sparline::cuda::emulator::dynamic_shared()
#define SPARLINE_DYNAMIC_SHARED_ALIGNED(name, bytes) SPARLINE_DYNAMIC_SHARED(name)

namespace sparline::cuda {

using bf16 = __nv_bfloat16;
using fp16 = __half;

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw Error(ErrorCode::kInternal, std::string("CUDA: ") + what + " failed");
}

struct LaunchShape {
  int64_t blocks = 1;
  int threads = 128;
  int64_t shared_bytes = 0;
  bool is_cooperative = false;
};

template <class... Params>
int resident_blocks(void (*)(Params...), const LaunchShape&) {
  return emulator::resident_blocks();
}

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), const LaunchShape& shape, void* /*stream*/, Args&&... args) {
  struct Context {
    void (*kernel)(Params...);
    std::tuple<std::remove_cv_t<Params>...> params;
  } context{kernel, {std::forward<Args>(args)...}};
  const auto thread = [](void* data) {
    const auto& context = *static_cast<const Context*>(data);
    std::apply(context.kernel, context.params);
  };
  emulator::run(reinterpret_cast<const void*>(kernel), shape.blocks, shape.threads,
                shape.shared_bytes, thread, &context);
}

/// Kernels run one after another here.
__forceinline__ void await_last_kernel() {}
__forceinline__ void admit_next_kernel() {}
__forceinline__ void begin_kernel() {}

__forceinline__ uint4 load_once(const void* global) { return *static_cast<const uint4*>(global); }

using SharedAddress = uintptr_t;
__forceinline__ SharedAddress shared_address(const void* shared) {
  return reinterpret_cast<SharedAddress>(shared);
}

__forceinline__ void cp_async_16(void* shared, const void* global, bool is_valid) {
  emulator::copy_async(shared, global, 16, is_valid);
}
__forceinline__ void cp_async_16(SharedAddress shared, const void* global) {
  emulator::copy_async(reinterpret_cast<void*>(shared), global, 16, true);
}
__forceinline__ void cp_async_4(SharedAddress shared, const void* global) {
  emulator::copy_async(reinterpret_cast<void*>(shared), global, 4, true);
}
__forceinline__ void cp_async_commit() { emulator::commit_copies(); }
template <int kPending>
__forceinline__ void cp_async_wait() {
  emulator::wait_for_copies(kPending);
}

__forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row) {
  emulator::Call call{.op = emulator::Op::kLdmatrix, .row = shared_row, .d = r};
  emulator::meet(call);
}
__forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared_row) {
  emulator::Call call{.op = emulator::Op::kLdmatrixTrans, .row = shared_row, .d = r};
  emulator::meet(call);
}
__forceinline__ void ldmatrix_x4(uint32_t (&r)[4], SharedAddress row) {
  ldmatrix_x4(r, reinterpret_cast<const void*>(row));
}
__forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], SharedAddress row) {
  ldmatrix_x4_trans(r, reinterpret_cast<const void*>(row));
}

template <class T>
__forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, fp16>);
  constexpr auto kOp = std::is_same_v<T, bf16> ? emulator::Op::kMmaBf16 : emulator::Op::kMmaFp16;
  emulator::multiply(kOp, d, a, b0, b1);
}
__forceinline__ void mma_int8(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::multiply(emulator::Op::kMmaInt8, d, a, b0, b1);
}
__forceinline__ void mma_e4m3(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::multiply(emulator::Op::kMmaE4m3, d, a, b0, b1);
}

inline float exp2_approx(float x) {
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0.0f : y;
}

template <class T>
uint32_t pack(float low, float high) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, fp16>);
  const auto bits = [](float x) -> uint32_t {
    if constexpr (std::is_same_v<T, bf16>) {
      return std::bit_cast<uint16_t>(__float2bfloat16_rn(x));
    } else {
      return std::bit_cast<uint16_t>(__float2half_rn(x));
    }
  };
  return bits(high) << 16 | bits(low);
}

}  // namespace sparline::cuda
