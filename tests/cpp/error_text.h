// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <string>

#include "sparline/error.h"

namespace sparline {

/// The message of the Error with this code that `call` throws; anything else fails the test.
template <class Call>
std::string error_text(ErrorCode code, Call call) {
  try {
    call();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), code) << error.what();
    return error.what();
  }
  ADD_FAILURE() << "no error was thrown";
  return "";
}

#define EXPECT_CONTAINS(text, part)                          \
  EXPECT_NE(std::string(text).find(part), std::string::npos) \
      << "in:   " << std::string(text) << "\nmissing: " << std::string(part)

}  // namespace sparline
