# SPDX-License-Identifier: Apache-2.0
# find_package(sparline): headers, library and package files; component "cpp". The Python package takes "python" only.
include(CMakePackageConfigHelpers)
set(SPARLINE_CONFIG_DIR ${CMAKE_INSTALL_LIBDIR}/cmake/sparline)

install(
  TARGETS sparline
  EXPORT sparline-targets
  ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT cpp
  LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT cpp NAMELINK_COMPONENT cpp
)
install(
  DIRECTORY ${PROJECT_SOURCE_DIR}/include/sparline
  DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}
  COMPONENT cpp
)
install(
  EXPORT sparline-targets
  NAMESPACE sparline::
  DESTINATION ${SPARLINE_CONFIG_DIR}
  COMPONENT cpp
)
configure_package_config_file(
  ${PROJECT_SOURCE_DIR}/cmake/sparline-config.cmake.in
  ${PROJECT_BINARY_DIR}/sparline-config.cmake
  INSTALL_DESTINATION ${SPARLINE_CONFIG_DIR}
)
write_basic_package_version_file(
  ${PROJECT_BINARY_DIR}/sparline-config-version.cmake
  COMPATIBILITY SameMinorVersion
)
install(
  FILES
    ${PROJECT_BINARY_DIR}/sparline-config.cmake
    ${PROJECT_BINARY_DIR}/sparline-config-version.cmake
  DESTINATION ${SPARLINE_CONFIG_DIR}
  COMPONENT cpp
)
