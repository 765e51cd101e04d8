#!/usr/bin/env bash
# Configures build/<preset>. An up-to-date build folder is left to Ninja, which re-runs CMake when
# a CMake file changed. The preset cuda gets the nvcc that cuda_toolkit.sh finds or installs.
#
# usage: scripts/configure.sh PRESET
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

preset=$1
dir=build/$preset
if [ -f "$dir/build.ninja" ] && [ "$dir/build.ninja" -nt CMakePresets.json ]; then
  exit 0
fi
if [ "$preset" = cuda ]; then
  CUDACXX=$(scripts/cuda_toolkit.sh)
  export CUDACXX
fi
echo "configure: $dir${CUDACXX:+ with $CUDACXX}"
mkdir -p "$dir"
if ! cmake --preset "$preset" > "$dir/configure.log" 2>&1; then
  cat "$dir/configure.log" >&2
  echo "configure: error: cmake --preset $preset failed (its output is above)" >&2
  exit 1
fi
