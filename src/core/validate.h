// SPDX-License-Identifier: Apache-2.0
//
// Every rule of the public API, checked once, on the host, before anything is launched. Each
// function throws Error{kInvalidArgument} with the rule, the value and the way out; backends may
// rely on what passed.
#pragma once

#include "sparline/attention.h"

namespace sparline {

void validate(const Problem& problem);
void validate(const Target& target);
void validate(const Plan& plan, const RouteArgs& args, std::span<const std::byte> workspace);
void validate(const Plan& plan, const ForwardArgs& args, std::span<const std::byte> workspace);
void validate(const Plan& plan, const BackwardArgs& args, std::span<const std::byte> workspace);
void validate(const SoftTopKArgs& args);
void validate(const SoftTopKBackwardArgs& args);

}  // namespace sparline
