# SPDX-License-Identifier: Apache-2.0
# What the core links: Highway (run-time choice of SIMD target) and OpenMP (the default executor).
find_package(hwy 1.0.3 CONFIG QUIET)
if(NOT hwy_FOUND)
  message(
    FATAL_ERROR
    "sparline needs Highway 1.0.3 or later, and none was found. "
    "Install libhwy-dev (Debian, Ubuntu), or set hwy_DIR to the folder that has hwy-config.cmake."
  )
endif()

find_package(OpenMP QUIET COMPONENTS CXX)
if(NOT OpenMP_CXX_FOUND)
  message(
    FATAL_ERROR
    "sparline needs OpenMP, and ${CMAKE_CXX_COMPILER} has none. "
    "Use g++ (package g++ on Debian, Ubuntu), or install libomp-dev for clang."
  )
endif()
