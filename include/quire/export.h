/* QUIRE_API marks what libquire.so exports: the C ABI and the public C++ classes and functions.
 * Everything else is compiled with hidden visibility. C and C++. */
#ifndef QUIRE_EXPORT_H_
#define QUIRE_EXPORT_H_

#if defined(_WIN32)
#define QUIRE_API
#else
#define QUIRE_API __attribute__((visibility("default")))
#endif

#endif /* QUIRE_EXPORT_H_ */
