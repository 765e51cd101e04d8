# QUIRE_SANITIZE=address;undefined or thread: compiles and links everything with these sanitizers.
# Every finding ends the program (-fno-sanitize-recover), so a test with a finding fails.

if(QUIRE_SANITIZE)
  list(JOIN QUIRE_SANITIZE "," sanitizers)
  add_compile_options(-fsanitize=${sanitizers} -fno-sanitize-recover=all -fno-omit-frame-pointer)
  add_link_options(-fsanitize=${sanitizers})
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    # Instrumentation hides from g++ what it needs to know for these: they fire on correct code.
    add_compile_options(-Wno-maybe-uninitialized -Wno-stringop-overflow -Wno-array-bounds
                        -Wno-restrict)
  endif()
endif()

# quire_compile_unoptimized(): for folders whose own code takes no time in the sanitized runs but a third of
# the time to build them for.
macro(quire_compile_unoptimized)
  if(QUIRE_SANITIZE)
    add_compile_options(-O0)
  endif()
endmacro()

# With Clang's libFuzzer the whole library reports its coverage, so that the fuzzer sees into it.
if(QUIRE_FUZZ)
  if(NOT CMAKE_CXX_COMPILER_ID MATCHES "Clang")
    message(FATAL_ERROR "QUIRE_FUZZ=ON needs Clang (preset fuzz); the compiler is "
                        "${CMAKE_CXX_COMPILER_ID}")
  endif()
  add_compile_options(-fsanitize=fuzzer-no-link)
endif()
