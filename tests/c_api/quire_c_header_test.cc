#include "quire/quire_c.h"
