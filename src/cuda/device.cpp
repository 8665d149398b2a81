// SPDX-License-Identifier: Apache-2.0
#include "cuda/device.h"

#ifdef SPARLINE_EMULATE_CUDA

#include <cstring>

#include "emulator/emulator.h"

namespace sparline::cuda {

std::vector<DeviceInfo> devices() { return {}; }

std::string why_no_device() { return "emulated"; }

int device_arch(int) { return 0; }

CurrentDevice current_device() {
  const int64_t shared_kib = emulator::arch() >= 90 ? 227 : 163;
  return {emulator::arch(), emulator::num_multiprocessors(), shared_kib * 1024};
}

void clear(void* data, int64_t bytes, void*) { std::memset(data, 0, static_cast<size_t>(bytes)); }

void copy_rows(void* to, int64_t to_stride_bytes, const void* from, int64_t from_stride_bytes,
               int64_t row_bytes, int64_t num_rows, void*) {
  for (int64_t n = 0; n < num_rows; ++n) {
    std::memcpy(static_cast<char*>(to) + n * to_stride_bytes,
                static_cast<const char*>(from) + n * from_stride_bytes,
                static_cast<size_t>(row_bytes));
  }
}

}  // namespace sparline::cuda

#else

#include <cuda_runtime_api.h>

#include <array>
#include <atomic>

#include "sparline/error.h"

namespace sparline::cuda {
namespace {

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw Error(ErrorCode::kInternal, std::string("CUDA: ") + what +
                                        " failed: " + cudaGetErrorString(status) +
                                        ". Please report it with the output of `sparline doctor`.");
}

int num_devices() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();  // no driver, or none that is new enough: not an error of anybody's call
  return 0;
}

int query_arch(int device_index) {
  if (device_index < 0 || device_index >= num_devices()) return 0;
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device_index),
        "asking a device for its compute capability");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device_index),
        "asking a device for its compute capability");
  return 10 * major + minor;
}

}  // namespace

std::vector<DeviceInfo> devices() {
  std::vector<DeviceInfo> all;
  for (int idx = 0; idx < num_devices(); ++idx) {
    cudaDeviceProp properties;
    check(cudaGetDeviceProperties(&properties, idx), "asking a device for its properties");
    all.push_back({.name = properties.name, .arch = device_arch(idx)});
  }
  return all;
}

std::string why_no_device() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  cudaGetLastError();
  return status == cudaSuccess ? "none is visible" : cudaGetErrorString(status);
}

int device_arch(int device_index) {
  static std::array<std::atomic<int>, 64> known{};  // 0: not asked yet
  const bool is_kept = device_index >= 0 && device_index < static_cast<int>(known.size());
  if (!is_kept) return query_arch(device_index);
  std::atomic<int>& entry = known[static_cast<size_t>(device_index)];
  int arch = entry.load(std::memory_order_relaxed);
  if (arch == 0) {
    arch = query_arch(device_index);
    entry.store(arch, std::memory_order_relaxed);
  }
  return arch;
}

CurrentDevice current_device() {
  int device = 0, num_multiprocessors = 0, shared_bytes = 0;
  check(cudaGetDevice(&device), "asking for the current device");
  check(cudaDeviceGetAttribute(&num_multiprocessors, cudaDevAttrMultiProcessorCount, device),
        "asking a device for its multiprocessors");
  check(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "asking a device for its shared memory");
  return {device_arch(device), num_multiprocessors, shared_bytes};
}

void clear(void* data, int64_t bytes, void* stream) {
  if (bytes == 0) return;
  check(cudaMemsetAsync(data, 0, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream)),
        "clearing memory");
}

void copy_rows(void* to, int64_t to_stride_bytes, const void* from, int64_t from_stride_bytes,
               int64_t row_bytes, int64_t num_rows, void* stream) {
  if (num_rows == 0 || row_bytes == 0) return;
  if (num_rows == 1) to_stride_bytes = from_stride_bytes = row_bytes;  // theirs may be anything
  check(cudaMemcpy2DAsync(to, static_cast<size_t>(to_stride_bytes), from,
                          static_cast<size_t>(from_stride_bytes), static_cast<size_t>(row_bytes),
                          static_cast<size_t>(num_rows), cudaMemcpyDeviceToDevice,
                          static_cast<cudaStream_t>(stream)),
        "copying rows");
}

}  // namespace sparline::cuda

#endif
