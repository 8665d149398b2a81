// SPDX-License-Identifier: Apache-2.0
#include "torch/device.h"

#include <dlfcn.h>
#include <torch/csrc/stable/ops.h>

#include <string>

namespace sparline::binding {

using torch::stable::Tensor;

namespace {

using CurrentStream = int32_t (*)(int32_t device_index, void** stream);

/// torch's own way to its current stream. It lives in libtorch_cuda.so, which is loaded where there
/// are CUDA tensors, but is no dependency of this module: one binary serves torch with and without
/// CUDA.
CurrentStream find_current_stream() {
  constexpr const char* kName = "aoti_torch_get_current_cuda_stream";
  void* found = dlsym(RTLD_DEFAULT, kName);
  if (found == nullptr) {
    void* const library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    if (library != nullptr) found = dlsym(library, kName);
  }
  return reinterpret_cast<CurrentStream>(found);
}

void* current_stream(int32_t device_index) {
  static const CurrentStream call = find_current_stream();
  void* stream = nullptr;
  if (call == nullptr || call(device_index, &stream) != 0) {
    throw Error(
        ErrorCode::kUnsupported,
        "sparline: torch must tell its current CUDA stream, and this build of torch does "
        "not. Install a CUDA build of torch 2.10 or later, or move the tensors to the CPU.");
  }
  return stream;
}

}  // namespace

Target target_of(const Tensor& tensor, const std::string& backend) {
  Target target{.device = tensor.is_cuda() ? Device::kCUDA : Device::kCPU,
                .num_threads = static_cast<int>(torch::stable::get_num_threads()),
                .backend = backend};
  if (target.device == Device::kCUDA) target.cuda_arch = device_arch(tensor.get_device_index());
  return target;
}

DeviceScope::DeviceScope(const Tensor& tensor) {
  if (!tensor.is_cuda()) return;
  const int32_t device_index = tensor.get_device_index();
  if (device_arch(device_index) == 0 && !compiled_cuda_archs().empty()) {
    throw Error(
        ErrorCode::kUnsupported,
        "sparline: the CUDA driver must be as new as the CUDA version that sparline was "
        "built with, and it shows this build no device " +
            std::to_string(device_index) +
            ". Update the driver or build with an older CUDA; `sparline doctor` says more.");
  }
  guard_.emplace(device_index);
  cuda_stream_ = current_stream(device_index);
}

}  // namespace sparline::binding
