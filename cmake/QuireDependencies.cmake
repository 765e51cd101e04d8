# Third-party packages, all from the distribution. The versions are the oldest that we test with
# (Debian 12); docs/guide/building.md lists them. examples/llm finds what only it needs.

set(THREADS_PREFER_PTHREAD_FLAG ON)
find_package(Threads REQUIRED)
find_package(hwy 1.0.3 REQUIRED)

if(QUIRE_BUILD_CLI OR QUIRE_BUILD_EXAMPLES OR QUIRE_BUILD_TESTS)
  find_package(nlohmann_json 3.11 REQUIRED)
endif()
if(QUIRE_BUILD_CLI OR QUIRE_BUILD_EXAMPLES)
  find_package(CLI11 2.1 REQUIRED)
endif()
if(QUIRE_BUILD_TESTS)
  find_package(GTest 1.12 REQUIRED)
endif()
