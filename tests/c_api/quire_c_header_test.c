#include "quire/quire_c.h"

/* Strict C has no empty files. */
typedef quire_status (*quire_c_header_is_c99)(const quire_batch*);
