// SPDX-License-Identifier: Apache-2.0
//
// The only calls of the CUDA runtime outside kernels: what devices there are, and memory that is
// cleared or copied without one. Under SPARLINE_EMULATE_CUDA device memory is host memory.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace sparline::cuda {

struct DeviceInfo {
  std::string name;
  int arch = 0;  // 80, 90, ...
};

/// The devices of this process; none where there is no driver. Creates no context.
std::vector<DeviceInfo> devices();

/// What the driver says where devices() finds none.
std::string why_no_device();

/// 80, 90, ... of a device; 0 if there is none of this index. Asked once for each device.
int device_arch(int device_index);

/// The device that launches go to.
struct CurrentDevice {
  int arch, num_multiprocessors;
  int64_t shared_bytes;  // that a thread block may have, at most
};
CurrentDevice current_device();

/// Sets `bytes` bytes to zero, asynchronously on `stream`.
void clear(void* data, int64_t bytes, void* stream);

/// Copies `num_rows` rows of `row_bytes` bytes between two device arrays, asynchronously on
/// `stream`.
void copy_rows(void* to, int64_t to_stride_bytes, const void* from, int64_t from_stride_bytes,
               int64_t row_bytes, int64_t num_rows, void* stream);

}  // namespace sparline::cuda
