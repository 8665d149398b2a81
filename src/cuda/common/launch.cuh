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
  int cluster_blocks = 1;  // of neighbouring blocks, which share a part of the device
};

template <class... Params>
void raise_shared_limit(void (*kernel)(Params...), const LaunchShape& shape) {
  constexpr int64_t kDefaultLimitBytes = 48 * 1024;
  if (shape.shared_bytes <= kDefaultLimitBytes) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shape.shared_bytes)),
        "raising the shared memory limit");
}

/// A shape as the runtime wants it, which keeps pointers to what is in here.
class LaunchConfig {
 public:
  LaunchConfig(const LaunchShape& shape, void* stream) {
    config_.gridDim = dim3(static_cast<unsigned>(shape.blocks));
    config_.blockDim = dim3(static_cast<unsigned>(shape.threads));
    config_.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
    config_.stream = static_cast<cudaStream_t>(stream);
    config_.attrs = attributes_;
    if (shape.is_cooperative) {
      add(cudaLaunchAttributeCooperative).cooperative = 1;
    } else if (can_launch_early()) {
      add(cudaLaunchAttributeProgrammaticStreamSerialization)
          .programmaticStreamSerializationAllowed = 1;
    }
    if (shape.cluster_blocks > 1) {
      auto& dim = add(cudaLaunchAttributeClusterDimension).clusterDim;
      dim.x = static_cast<unsigned>(shape.cluster_blocks);
      dim.y = dim.z = 1;
    }
  }
  LaunchConfig(const LaunchConfig&) = delete;
  LaunchConfig& operator=(const LaunchConfig&) = delete;

  const cudaLaunchConfig_t* get() const { return &config_; }

 private:
  cudaLaunchAttributeValue& add(cudaLaunchAttributeID id) {
    cudaLaunchAttribute& attribute = attributes_[config_.numAttrs++];
    attribute.id = id;
    return attribute.val;
  }

  cudaLaunchAttribute attributes_[2] = {};
  cudaLaunchConfig_t config_{};
};

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
/// How many clusters of shape.cluster_blocks the device holds at a time, likewise.
template <class... Params>
int resident_clusters(void (*kernel)(Params...), LaunchShape shape) {
  raise_shared_limit(kernel, shape);
  shape.blocks = shape.cluster_blocks;
  int count = 0;
  const auto status =
      cudaOccupancyMaxActiveClusters(&count, kernel, LaunchConfig(shape, nullptr).get());
  if (status == cudaSuccess) return count;
  cudaGetLastError();  // it takes no such shape: not an error of anybody's call
  return 0;
}

/// kernel<<<shape, stream>>>(args...)
template <class... Params, class... Args>
void launch(void (*kernel)(Params...), const LaunchShape& shape, void* stream, Args&&... args) {
  if (shape.blocks == 0) return;
  raise_shared_limit(kernel, shape);
  check(cudaLaunchKernelEx(LaunchConfig(shape, stream).get(), kernel, std::forward<Args>(args)...),
        "launching a kernel");
}

}  // namespace sparline::cuda

/// The block's dynamic shared memory, aligned to 512 bytes: a row of 256 elements, so that the
/// chunks of a swizzled row have addresses that differ by an exclusive or (tile.cuh).
#define SPARLINE_DYNAMIC_SHARED(name) extern __shared__ __align__(512) unsigned char name[]
