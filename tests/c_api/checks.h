/* Checks in C: each failure is printed and counted. */
#ifndef QUIRE_TESTS_C_API_CHECKS_H_
#define QUIRE_TESTS_C_API_CHECKS_H_

#include "quire/quire_c.h"

#define CHECK(condition) check_at(__FILE__, __LINE__, (condition) != 0, #condition)

/* The call returns QUIRE_INVALID_ARGUMENT and names the argument. */
#define EXPECT_INVALID(call, argument) expect_invalid_at(__FILE__, __LINE__, call, argument)

void check_at(const char* file, int line, int condition, const char* what);
void expect_invalid_at(const char* file, int line, quire_status status, const char* argument);

/* Of all checks so far. */
int num_failed_checks(void);

#endif /* QUIRE_TESTS_C_API_CHECKS_H_ */
