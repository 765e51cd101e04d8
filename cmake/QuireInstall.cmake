# The library, its headers and its CMake package (find_package(quire) gives quire::quire), and the
# quire command.

include(CMakePackageConfigHelpers)
include(GNUInstallDirs)

set(package_dir "${CMAKE_INSTALL_LIBDIR}/cmake/quire")

install(
  TARGETS quire
  EXPORT quireTargets
  COMPONENT library)
install(
  DIRECTORY "${PROJECT_SOURCE_DIR}/include/quire"
  DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}"
  COMPONENT library
  FILES_MATCHING
  PATTERN "*.h")
install(
  EXPORT quireTargets
  NAMESPACE quire::
  DESTINATION "${package_dir}"
  COMPONENT library)

get_target_property(QUIRE_LIBRARY_TYPE quire TYPE)
configure_package_config_file(
  "${PROJECT_SOURCE_DIR}/cmake/quireConfig.cmake.in" "${PROJECT_BINARY_DIR}/quireConfig.cmake"
  INSTALL_DESTINATION "${package_dir}")
write_basic_package_version_file("${PROJECT_BINARY_DIR}/quireConfigVersion.cmake"
                                 COMPATIBILITY SameMinorVersion)
install(
  FILES "${PROJECT_BINARY_DIR}/quireConfig.cmake" "${PROJECT_BINARY_DIR}/quireConfigVersion.cmake"
  DESTINATION "${package_dir}"
  COMPONENT library)

if(TARGET quire_cli)
  install(TARGETS quire_cli COMPONENT command)
endif()
