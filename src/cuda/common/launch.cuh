// SPDX-License-Identifier: Apache-2.0
//
// Kernel launches: one place that raises the shared memory limit and checks for errors.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <string>
#include <utility>

#include "sparline/error.h"

namespace sparline::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw Error(ErrorCode::kInternal, std::string("CUDA: ") + what +
                                        " failed: " + cudaGetErrorString(status) +
                                        ". Please report it with the output of `sparline doctor`.");
}

/// Whether kernels may be launched before the one ahead of them on the stream has finished: from
/// compute capability 9.0 on. A call is a sequence of up to some forty kernels of 10 to 20
/// microseconds, and this hides the launches between them.
bool can_launch_early();  // on the current device

struct LaunchShape {
  int64_t blocks = 1;  // at most 2^31 - 1, along x; nothing is launched for 0
  int threads = 128;
  int64_t shared_bytes = 0;  // dynamic
  // Whether blocks wait for each other: then all of them run at the same time, or the launch fails.
  // Without it those of two such grids, on two streams, may each hold what the other one waits for.
  bool is_cooperative = false;
};

template <class... Params>
void raise_shared_limit(void (*kernel)(Params...), const LaunchShape& shape) {
  constexpr int64_t kDefaultLimitBytes = 48 * 1024;
  if (shape.shared_bytes <= kDefaultLimitBytes) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shape.shared_bytes)),
        "raising the shared memory limit");
}

/// How many blocks of the kernel a multiprocessor of the current device holds at a time; shape's
/// own blocks do not matter.
template <class... Params>
int resident_blocks(void (*kernel)(Params...), const LaunchShape& shape) {
  raise_shared_limit(kernel, shape);
  int count = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, shape.threads,
                                                      static_cast<size_t>(shape.shared_bytes)),
        "asking how many blocks a multiprocessor holds");
  return count;
}

/// kernel<<<shape, stream>>>(args...)
template <class... Params, class... Args>
void launch(void (*kernel)(Params...), const LaunchShape& shape, void* stream, Args&&... args) {
  if (shape.blocks == 0) return;
  raise_shared_limit(kernel, shape);
  cudaLaunchAttribute attribute{};
  if (shape.is_cooperative) {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  } else {
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = shape.is_cooperative || can_launch_early() ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...), "launching a kernel");
}

}  // namespace sparline::cuda

/// The block's dynamic shared memory, aligned to 512 bytes: a row of 256 elements, so that the
/// chunks of a swizzled row have addresses that differ by an exclusive or (tile.cuh).
#define SPARLINE_DYNAMIC_SHARED(name) extern __shared__ __align__(512) unsigned char name[]
