# SPDX-License-Identifier: Apache-2.0
# Installs the library into WORK_DIR, then configures, builds and runs EXAMPLE_DIR against it.
file(REMOVE_RECURSE ${WORK_DIR})
execute_process(
  COMMAND ${CMAKE_COMMAND} --install ${BUILD_DIR} --component cpp --prefix ${WORK_DIR}/prefix
  COMMAND_ERROR_IS_FATAL ANY
)
execute_process(
  COMMAND
    ${CMAKE_COMMAND} -S ${EXAMPLE_DIR} -B ${WORK_DIR}/build -DCMAKE_PREFIX_PATH=${WORK_DIR}/prefix
    -DCMAKE_CXX_COMPILER=${CXX_COMPILER} -DCMAKE_CXX_FLAGS=${CXX_FLAGS} -DCMAKE_BUILD_TYPE=Release
  COMMAND_ERROR_IS_FATAL ANY
)
execute_process(COMMAND ${CMAKE_COMMAND} --build ${WORK_DIR}/build COMMAND_ERROR_IS_FATAL ANY)
execute_process(COMMAND ${WORK_DIR}/build/sla COMMAND_ERROR_IS_FATAL ANY)
