// Everything public. Each header is the manual of its concept.
#pragma once

#include "quire/attention.h"  // IWYU pragma: export
#include "quire/backend.h"    // IWYU pragma: export
#include "quire/kv_cache.h"   // IWYU pragma: export
#include "quire/mask.h"       // IWYU pragma: export
#include "quire/metadata.h"   // IWYU pragma: export
#include "quire/score.h"      // IWYU pragma: export
#include "quire/types.h"      // IWYU pragma: export
#include "quire/version.h"    // IWYU pragma: export
