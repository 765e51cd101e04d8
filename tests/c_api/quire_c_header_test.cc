// The other one first; it brings quire_c.h along.
#include "quire/quire_c_backend.h"

using Forward = quire_status (*)(const quire_attention_impl*, const quire_forward_args*,
                                 const quire_context*);
