// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <vector>

#include "sparline/attention.h"

namespace sparline {

/// One way to run plans. Implementations are stateless singletons listed by name in plan.cpp: no
/// registration at load time.
class Backend {
 public:
  virtual ~Backend() = default;

  virtual const char* name() const = 0;
  /// What this backend would use on this machine, for `explain` and `doctor`: SIMD target, cores,
  /// devices.
  virtual std::string describe() const = 0;
  /// Empty if the (validated) problem can run on the target; otherwise the reason, as a clause.
  virtual std::string rejects(const Problem& problem, const Target& target) const = 0;
  /// Fills heads_per_wave and the three workspace sizes of a plan whose problem, target and blocks
  /// are set.
  virtual void complete(Plan& plan) const = 0;

  /// What `explain` adds about a completed plan: whole lines, or nothing.
  virtual std::string remarks(const Plan&) const { return ""; }

  virtual void route(const Plan& plan, const RouteArgs& args, std::span<std::byte> workspace,
                     Stream stream) const = 0;
  virtual void forward(const Plan& plan, const ForwardArgs& args, std::span<std::byte> workspace,
                       Stream stream) const = 0;
  virtual void backward(const Plan& plan, const BackwardArgs& args, std::span<std::byte> workspace,
                        Stream stream) const = 0;

  virtual void soft_top_k(const Target& target, const SoftTopKArgs& args, Stream stream) const = 0;
  virtual void soft_top_k_backward(const Target& target, const SoftTopKBackwardArgs& args,
                                   Stream stream) const = 0;
};

const Backend& cpu_backend();
const Backend& cuda_backend();  // in builds with SPARLINE_WITH_CUDA

}  // namespace sparline
