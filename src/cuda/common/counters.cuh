// SPDX-License-Identifier: Apache-2.0
//
// Counters in global memory, by which blocks of one grid share out work and wait for each other.
// All begin at 0.
#pragma once

#include "cuda/common/platform.cuh"

#ifndef SPARLINE_EMULATE_CUDA

namespace sparline::cuda {

/// Counts up; who waits for the count sees what this thread wrote or learned of before.
__device__ __forceinline__ void count_up(uint32_t* counter) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
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

/// 0, 1, ... over all who ask: the work that is next. Work that waits only for work of smaller
/// tickets waits for blocks that are running, whatever blocks the device holds at a time.
__device__ __forceinline__ uint32_t take_ticket(uint32_t* counter) {
  return atomicAdd(counter, 1u);
}

}  // namespace sparline::cuda

#endif
