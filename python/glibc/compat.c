/* What Debian 12's libstdc++.a wants of a glibc newer than 2.28, for the Python binding
 * (QUIRE_GLIBC_STUBS). */
#define _DEFAULT_SOURCE /* syscall() */
#include <stddef.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

#define HIDDEN __attribute__((visibility("hidden")))

/* glibc 2.32: 1 lets libstdc++ leave out atomic operations. 0, "there may be threads", is always
 * right. */
HIDDEN char __libc_single_threaded = 0;

/* glibc 2.36: std::random_device. */
HIDDEN uint32_t arc4random(void);
HIDDEN uint32_t arc4random(void) {
  uint32_t value = 0;
  (void)syscall(SYS_getrandom, &value, sizeof value, 0);
  return value;
}

/* glibc 2.33: file streams. The kernel's struct stat is x86-64's struct stat64. */
HIDDEN int fstat64(int fd, void* status);
HIDDEN int fstat64(int fd, void* status) { return (int)syscall(SYS_fstat, fd, status); }
