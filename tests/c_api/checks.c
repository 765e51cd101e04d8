#include "tests/c_api/checks.h"

#include <stdio.h>
#include <string.h>

static int num_failures = 0;

void check_at(const char* file, int line, int condition, const char* what) {
  if (condition) return;
  printf("%s:%d: %s\n  last error: %s (%s)\n", file, line, what, quire_last_error(),
         quire_last_error_argument());
  ++num_failures;
}

void expect_invalid_at(const char* file, int line, quire_status status, const char* argument) {
  check_at(file, line, status == QUIRE_INVALID_ARGUMENT, "status is QUIRE_INVALID_ARGUMENT");
  check_at(file, line, strcmp(quire_last_error_argument(), argument) == 0, argument);
  check_at(file, line, strstr(quire_last_error(), argument) != NULL, "the text names the argument");
}

int num_failed_checks(void) { return num_failures; }
