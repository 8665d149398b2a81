// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stdexcept>
#include <string>

namespace sparline {

enum class ErrorCode {
  kInvalidArgument,  // the call breaks a rule of the API: shapes, ranges, dtypes, null pointers
  kUnsupported,      // a legal problem that no compiled backend can run on the target
  kInternal,         // a broken invariant of the library: please report it
};

/// The one exception type of the library. The message has three parts, in the caller's words: the
/// rule, the value that was given, and the way out.
class Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& message) : std::runtime_error(message), code_(code) {}
  ErrorCode code() const noexcept { return code_; }

 private:
  ErrorCode code_;
};

}  // namespace sparline
