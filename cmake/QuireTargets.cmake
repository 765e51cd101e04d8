# Helpers that declare Quire's own targets.

include(GoogleTest)

# quire_add_subdirectory_if_present(dir): parts of the tree that a source package may leave out.
function(quire_add_subdirectory_if_present dir)
  if(EXISTS "${CMAKE_CURRENT_SOURCE_DIR}/${dir}/CMakeLists.txt")
    add_subdirectory(${dir})
  endif()
endfunction()

# quire_set_shared_properties(target): name, version and exports of the shared library. Before 1.0
# every minor version may change the ABI, so the SOVERSION has both numbers: libquire.so.0.1.
function(quire_set_shared_properties target)
  set(map "${PROJECT_SOURCE_DIR}/cmake/quire.map")
  set_target_properties(
    ${target}
    PROPERTIES VERSION "${PROJECT_VERSION}"
               SOVERSION "${PROJECT_VERSION_MAJOR}.${PROJECT_VERSION_MINOR}"
               DEFINE_SYMBOL "" # nobody reads it, and objects are the same in both kinds of build
               LINK_DEPENDS "${map}")
  target_link_options(${target} PRIVATE "LINKER:--version-script=${map}")
endfunction()

# quire_add_test(name [SOURCES a.cc...] [INTERNAL_SOURCES b.cc...] [LIBRARIES lib...] [SERIAL]): a
# GoogleTest program; each of its cases is a test of its own in ctest. The library, the headers of
# src/ and tests/, and gtest_main come with it. QUIRE_SOURCE_DIR is defined as the repository's root,
# for test data. INTERNAL_SOURCES call what libquire.so does not export and are left out where that is
# what is built. SERIAL: never beside another test (timings).
function(quire_add_test name)
  cmake_parse_arguments(PARSE_ARGV 1 arg "SERIAL" "" "SOURCES;INTERNAL_SOURCES;LIBRARIES")
  if(arg_UNPARSED_ARGUMENTS)
    message(FATAL_ERROR "quire_add_test(${name}): unknown arguments ${arg_UNPARSED_ARGUMENTS}")
  endif()
  if(NOT BUILD_SHARED_LIBS)
    list(APPEND arg_SOURCES ${arg_INTERNAL_SOURCES})
  endif()
  if(NOT QUIRE_BUILD_TESTS OR NOT arg_SOURCES)
    return()
  endif()
  add_executable(${name} ${arg_SOURCES})
  target_link_libraries(${name} PRIVATE quire::quire ${arg_LIBRARIES} GTest::gmock
                                        GTest::gtest_main)
  target_include_directories(${name} PRIVATE "${PROJECT_SOURCE_DIR}" "${PROJECT_SOURCE_DIR}/src")
  target_compile_definitions(${name} PRIVATE "QUIRE_SOURCE_DIR=\"${PROJECT_SOURCE_DIR}\"")
  quire_set_warnings(${name})
  set(properties TIMEOUT 600)
  if(arg_SERIAL)
    list(APPEND properties RUN_SERIAL ON)
  endif()
  gtest_discover_tests(
    ${name}
    TEST_PREFIX "${name}/"
    NO_PRETTY_VALUES # a parameter's name names the test, not its bytes
    DISCOVERY_MODE PRE_TEST
    DISCOVERY_TIMEOUT 60
    PROPERTIES ${properties})
endfunction()

# quire_add_fuzzer(name SOURCES a.cc... [LIBRARIES lib...]): a libFuzzer program, built by the
# preset `fuzz` only, as part of the target `fuzzers`. .ci/run runs every bin/fuzz_* for a while,
# from the seeds in tests/fuzz/corpus/<name>, and fails where there are none: call it fuzz_<what>.
function(quire_add_fuzzer name)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "" "SOURCES;LIBRARIES")
  if(NOT name MATCHES "^fuzz_")
    message(FATAL_ERROR "quire_add_fuzzer(${name}): the name must start with fuzz_")
  endif()
  if(NOT QUIRE_FUZZ)
    return()
  endif()
  add_executable(${name} ${arg_SOURCES})
  target_link_libraries(${name} PRIVATE quire::quire ${arg_LIBRARIES})
  target_include_directories(${name} PRIVATE "${PROJECT_SOURCE_DIR}" "${PROJECT_SOURCE_DIR}/src")
  target_link_options(${name} PRIVATE -fsanitize=fuzzer)
  quire_set_warnings(${name})
  if(NOT TARGET fuzzers)
    add_custom_target(fuzzers)
  endif()
  add_dependencies(fuzzers ${name})
endfunction()
