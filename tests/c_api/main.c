/* The C ABI from C: one program, a file for each part of the header. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "quire/quire_c.h"
#include "tests/c_api/checks.h"
#include "tests/c_api/parts.h"

int main(void) {
  CHECK(strcmp(quire_last_error(), "") == 0);
  CHECK(strlen(quire_version()) >= 5);
  test_tensors();
  test_kv_caches();
  test_core();
  test_backends();
  test_serving();
  if (num_failed_checks() > 0) {
    printf("%d checks failed\n", num_failed_checks());
    return EXIT_FAILURE;
  }
  puts("C ABI: every check passed");
  return EXIT_SUCCESS;
}
