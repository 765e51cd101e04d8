// What this build can do on this machine, as text: what `quire info` prints and
// `python -m quire_attn` shows. From the arrays that the library itself dispatches by.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "quire/quire.h"

namespace quire::cli {

// A yes-or-no property of a backend: its key in JSON, its name for people, where it is stored.
struct Feature {
  const char* key;
  const char* name;
  bool BackendCapabilities::*member;
};
std::span<const Feature> features();

template <class Enum>
std::vector<std::string> names_of(const std::vector<Enum>& values) {
  std::vector<std::string> names;
  names.reserve(values.size());
  for (const Enum value : values) {
    names.emplace_back(to_string(value));
  }
  return names;
}

// Version, threads, backends, and the supported table: one line a property, one column a backend.
// The table is the same on every machine; README.md shows it, and a test compares the two.
std::string info_text();

// The kernels of the build, each with the calls that it serves.
std::string kernels_text();

}  // namespace quire::cli
