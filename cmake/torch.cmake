# SPDX-License-Identifier: Apache-2.0
# The PyTorch operators: one shared module on LibTorch's stable ABI, loaded with torch.ops.load_library. It includes no
# Python.h, so one binary serves every Python and every torch >= 2.10, with and without CUDA.
if(BUILD_SHARED_LIBS)
  message(
    FATAL_ERROR
    "SPARLINE_BUILD_TORCH makes one file that holds the core, so it needs BUILD_SHARED_LIBS=OFF. "
    "Build libsparline.so in a build folder of its own."
  )
endif()
find_package(Python 3.10 REQUIRED COMPONENTS Interpreter)
execute_process(
  COMMAND
    ${Python_EXECUTABLE} -c
    "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0], end='')"
  OUTPUT_VARIABLE SPARLINE_TORCH_DIR
  RESULT_VARIABLE status
  ERROR_QUIET
)
if(NOT status EQUAL 0 OR NOT EXISTS "${SPARLINE_TORCH_DIR}/include/torch/csrc/stable/library.h")
  message(
    FATAL_ERROR
    "SPARLINE_BUILD_TORCH needs torch >= 2.10 in ${Python_EXECUTABLE}, and it has none. "
    "Install it there, pass -DPython_EXECUTABLE=/path/to/another/python, or set SPARLINE_BUILD_TORCH=OFF."
  )
endif()

add_library(
  sparline_torch
  MODULE
  ${PROJECT_SOURCE_DIR}/src/torch/device.cpp
  ${PROJECT_SOURCE_DIR}/src/torch/ops.cpp
  ${PROJECT_SOURCE_DIR}/src/torch/spec.cpp
  ${PROJECT_SOURCE_DIR}/src/torch/views.cpp
)
# Functions newer than torch 2.10 are not declared, so they cannot be used by mistake.
target_compile_definitions(
  sparline_torch
  PRIVATE
    TORCH_TARGET_VERSION=0x020a000000000000ULL
    SPARLINE_COMPILER="${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}"
)
target_include_directories(sparline_torch PRIVATE ${PROJECT_SOURCE_DIR}/src)
target_include_directories(sparline_torch SYSTEM PRIVATE ${SPARLINE_TORCH_DIR}/include)
# Without libtorch_cpu among the needed libraries its symbols stay invisible to the module.
target_link_libraries(
  sparline_torch
  PRIVATE sparline::sparline ${SPARLINE_TORCH_DIR}/lib/libtorch_cpu.so ${CMAKE_DL_LIBS}
)
if(NOT APPLE) # nor anything of the core or of CUDA's run-time library
  target_link_options(sparline_torch PRIVATE LINKER:--exclude-libs,ALL)
endif()
set_target_properties(
  sparline_torch
  PROPERTIES
    PREFIX ""
    OUTPUT_NAME _C
    BUILD_WITH_INSTALL_RPATH ON # torch has loaded its own libraries before this one
    CXX_VISIBILITY_PRESET hidden
    VISIBILITY_INLINES_HIDDEN ON
)
if(SPARLINE_INPLACE)
  set_target_properties(
    sparline_torch
    PROPERTIES LIBRARY_OUTPUT_DIRECTORY ${PROJECT_SOURCE_DIR}/python/sparline
  )
else()
  install(TARGETS sparline_torch LIBRARY DESTINATION sparline COMPONENT python)
endif()
