// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

#include "sparline/attention.h"

namespace sparline::cpu {

// Each file compiles its kernels once per instruction set and picks one at run time. The workspace
// functions lay out exactly what the kernels take.

int64_t route_workspace_bytes(const Plan& plan);
int64_t forward_workspace_bytes(const Plan& plan);
int64_t backward_workspace_bytes(const Plan& plan);

void route(const Plan& plan, const RouteArgs& args, std::byte* workspace, const Stream& stream);
void forward(const Plan& plan, const ForwardArgs& args, std::byte* workspace, const Stream& stream);
void backward(const Plan& plan, const BackwardArgs& args, std::byte* workspace,
              const Stream& stream);
void soft_top_k(const Target& target, const SoftTopKArgs& args, const Stream& stream);
void soft_top_k_backward(const Target& target, const SoftTopKBackwardArgs& args,
                         const Stream& stream);

/// "AVX2", "AVX3", "NEON", ...
std::string simd_target();

}  // namespace sparline::cpu
