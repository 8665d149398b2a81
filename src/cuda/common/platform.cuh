// SPDX-License-Identifier: Apache-2.0
//
// What kernels are written in: CUDA C++ and the few PTX instructions of ptx.cuh. Under
// SPARLINE_EMULATE_CUDA the same sources compile as plain C++, and the emulator of tests/cuda runs
// their threads on the CPU; it provides every name of ptx.cuh and of launch.cuh.
#pragma once

#ifdef SPARLINE_EMULATE_CUDA
#include "emulator/emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "cuda/common/launch.cuh"
#include "cuda/common/ptx.cuh"
#endif
