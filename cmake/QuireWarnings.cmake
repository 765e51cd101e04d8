# quire_set_warnings(target): the warnings that all of Quire's own code is compiled with.

function(quire_set_warnings target)
  set(cxx_warnings
      -Wall
      -Wextra
      -Wpedantic
      -Wshadow
      -Wvla
      -Wformat=2
      -Wno-format-nonliteral
      -Wimplicit-fallthrough
      -Wextra-semi
      -Wno-missing-field-initializers # designated initialisers leave out what has a default
      -Wnon-virtual-dtor
      -Woverloaded-virtual
      -Wcast-align
      -Wpointer-arith)
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    list(APPEND cxx_warnings -Wduplicated-cond -Wduplicated-branches -Wlogical-op)
    if(CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
      # These fire on std::string and std::vector at -O3 (GCC bug 105329 and its like).
      list(APPEND cxx_warnings -Wno-restrict -Wno-stringop-overflow -Wno-stringop-overread)
    endif()
  endif()
  set(c_warnings -Wall -Wextra -Wpedantic -Wshadow -Wstrict-prototypes)
  set(cuda_warnings -Xcompiler=-Wall,-Wextra)
  if(QUIRE_WERROR)
    list(APPEND cuda_warnings -Werror=all-warnings)
    list(APPEND cxx_warnings -Werror)
    list(APPEND c_warnings -Werror)
  endif()
  target_compile_options(${target} PRIVATE "$<$<COMPILE_LANGUAGE:CXX>:${cxx_warnings}>"
                                           "$<$<COMPILE_LANGUAGE:C>:${c_warnings}>"
                                           "$<$<COMPILE_LANGUAGE:CUDA>:${cuda_warnings}>")
endfunction()
