// The OpenMP threads that the process already has (torch's), as a thread pool of Quire's.
#pragma once

#include "quire/types.h"

namespace quire::python {

// As many threads as OpenMP gives the caller now; null where no OpenMP runtime is loaded. Nothing is
// linked: the runtime that the process has is looked up, so that there is never a second one. One
// pool for the process, made by the first call.
ThreadPool* openmp_threads();

}  // namespace quire::python
