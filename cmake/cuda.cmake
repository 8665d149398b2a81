# SPDX-License-Identifier: Apache-2.0
# The CUDA backend, where a compiler for it is found. Its run-time library is linked in, and the driver is looked up when a
# device is first used, so that what is built here loads on machines without either.
set(
  SPARLINE_BUILD_CUDA
  AUTO
  CACHE STRING
  "Build the CUDA backend: AUTO (where nvcc is found), ON (or fail) or OFF"
)
set_property(CACHE SPARLINE_BUILD_CUDA PROPERTY STRINGS AUTO ON OFF)
# 80-real is machine code for every 8.x. PTX of the newest is what the driver makes code for later cards from.
set(
  SPARLINE_CUDA_ARCHITECTURES
  "80-real;90"
  CACHE STRING
  "What CUDA code is compiled for: numbers, of machine code and PTX, or with -real or -virtual of one of them"
)

set(SPARLINE_WITH_CUDA OFF)
if(NOT SPARLINE_BUILD_CUDA)
  return()
endif()

# Before the language is enabled: else it is tried, and kept, with the compiler's own idea of a device.
set(CMAKE_CUDA_ARCHITECTURES ${SPARLINE_CUDA_ARCHITECTURES})
include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(SPARLINE_BUILD_CUDA STREQUAL "AUTO")
    message(STATUS "sparline: no CUDA compiler found, so without the CUDA backend")
    return()
  endif()
  message(
    FATAL_ERROR
    "SPARLINE_BUILD_CUDA=ON needs nvcc, and none was found. "
    "Put it on PATH, set CUDACXX or CMAKE_CUDA_COMPILER to it, or set SPARLINE_BUILD_CUDA=OFF."
  )
endif()
foreach(arch IN LISTS SPARLINE_CUDA_ARCHITECTURES)
  if(NOT arch MATCHES "^[0-9]+[af]?(-real|-virtual)?$" OR arch LESS 80)
    message(
      FATAL_ERROR
      "SPARLINE_CUDA_ARCHITECTURES must hold numbers from 80 on, such as 80-real;90, got ${arch}. "
      "List the compute capabilities of your devices."
    )
  endif()
endforeach()
if(SPARLINE_CCACHE AND NOT CMAKE_CUDA_COMPILER_LAUNCHER)
  set(CMAKE_CUDA_COMPILER_LAUNCHER "${SPARLINE_CCACHE}")
endif()
enable_language(CUDA)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.4)
  message(
    FATAL_ERROR
    "sparline needs CUDA 12.4 or later, and ${CMAKE_CUDA_COMPILER} is ${CMAKE_CUDA_COMPILER_VERSION}. "
    "Point CUDACXX to a newer nvcc, or set SPARLINE_BUILD_CUDA=OFF."
  )
endif()
find_package(CUDAToolkit QUIET REQUIRED)
if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION) # not known to CMake 3.25
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
  set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
endif()
set(SPARLINE_WITH_CUDA ON)
message(STATUS "sparline: CUDA ${CMAKE_CUDA_COMPILER_VERSION} for ${SPARLINE_CUDA_ARCHITECTURES}")

# Kernels are objects of their own, so that what links the library needs no CUDA compiler to do so.
file(GLOB SPARLINE_CUDA_SOURCES CONFIGURE_DEPENDS src/cuda/*.cpp)
file(GLOB_RECURSE kernels CONFIGURE_DEPENDS src/cuda/*.cu)
file(GLOB kernels_sm90 CONFIGURE_DEPENDS src/cuda/sm90/*.cu)
list(REMOVE_ITEM kernels ${kernels_sm90})
# A spilled register costs a fast kernel more than most mistakes do, so it is an error, but in units where some kernel is
# short of a few of them outside its main loop, or serves head dims above 128, which are there to be right.
set(
  may_spill
  linear_bwd_key
  linear_bwd_key_256
  linear_bwd_key_hedgehog
  linear_bwd_query
  linear_bwd_query_256
  linear_bwd_query_hedgehog
  linear_fwd
  linear_state
  sparse_bwd_rows_128
  sparse_bwd_rows_64
  sparse_fwd_128
)
set(spills_are_errors "-Xptxas=--warn-on-spills,--warning-as-error")
function(sparline_add_kernels name)
  add_library(${name} OBJECT ${ARGN})
  target_include_directories(
    ${name}
    PRIVATE ${PROJECT_SOURCE_DIR}/include ${PROJECT_SOURCE_DIR}/src
  )
  target_compile_options(${name} PRIVATE --expt-relaxed-constexpr)
  set_target_properties(
    ${name}
    PROPERTIES CUDA_RUNTIME_LIBRARY Static CUDA_VISIBILITY_PRESET hidden
  )
endfunction()
sparline_add_kernels(sparline_kernels ${kernels})
set(SPARLINE_CUDA_OBJECTS $<TARGET_OBJECTS:sparline_kernels>)
foreach(file IN LISTS kernels)
  get_filename_component(unit ${file} NAME_WE)
  set(options "")
  if(NOT unit IN_LIST may_spill)
    set(options "${spills_are_errors}")
  endif()
  # Products of fp8 values exist from 8.9 on.
  if(file MATCHES "low_bit[^/]*\\.cu$" AND "80-real" IN_LIST SPARLINE_CUDA_ARCHITECTURES)
    list(APPEND options "--generate-code=arch=compute_89,code=[sm_89]")
  endif()
  set_source_files_properties(${file} PROPERTIES COMPILE_OPTIONS "${options}")
endforeach()
# Hopper's own instructions are code for 9.0 alone, of the architecture 90a.
if(SPARLINE_CUDA_ARCHITECTURES MATCHES "(^|;)90a?(-real)?(;|$)")
  sparline_add_kernels(sparline_kernels_sm90 ${kernels_sm90})
  target_compile_options(sparline_kernels_sm90 PRIVATE ${spills_are_errors})
  set_target_properties(sparline_kernels_sm90 PROPERTIES CUDA_ARCHITECTURES 90a-real)
  target_compile_definitions(sparline_kernels PRIVATE SPARLINE_WITH_SM90)
  list(APPEND SPARLINE_CUDA_OBJECTS $<TARGET_OBJECTS:sparline_kernels_sm90>)
endif()
