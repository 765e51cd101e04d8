#!/usr/bin/env bash
# Checks the CPU backend's NEON code on an x86-64 Debian: builds the library and the `quire` command
# for 64-bit Arm in build/neon and runs random and golden cases there under qemu. Slow; not part of
# CI. The system gets a cross compiler and qemu; the Arm libraries stay in build/neon/sysroot.
#
# usage: [JOBS=N] scripts/check_neon.sh [CASES] [SEED]     default: 300 cases of seed 1
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

cases=${1:-300}
seed=${2:-1}
build=$PWD/build/neon
sysroot=$build/sysroot
triple=aarch64-linux-gnu

say() { printf 'check_neon: %s\n' "$*"; }
die() {
  printf 'check_neon: error: %s\n' "$*" >&2
  exit 1
}

scripts/bootstrap.sh neon

# Unpacked beside the build, by an apt with lists of its own: the system stays without a foreign
# architecture.
unpack_arm_packages() {
  local lists=$build/apt/lists cache=$build/apt/cache package
  mkdir -p "$lists/partial" "$cache/archives/partial" "$build/apt/packages"
  local options=(-q -o APT::Architecture=arm64 -o APT::Architectures=arm64
    -o Dir::State::lists="$lists" -o Dir::Cache="$cache" -o Dir::State::status=/dev/null
    -o APT::Sandbox::User="$(id -un)")
  (
    cd "$build/apt/packages" &&
      apt-get "${options[@]}" update && apt-get "${options[@]}" download "$@"
  ) > "$build/apt/log" 2>&1 || {
    tail -n 15 "$build/apt/log" >&2
    die "apt-get could not download the arm64 packages: $*"
  }
  for package in "$build"/apt/packages/*.deb; do
    dpkg -x "$package" "$sysroot"
  done
  touch "$sysroot/complete"
}

if [ ! -e "$sysroot/complete" ]; then
  say "downloading Highway and headers for arm64"
  rm -rf "$sysroot" "$build/apt"
  unpack_arm_packages libhwy1 libhwy-dev libcli11-dev nlohmann-json3-dev
fi

cmake -S . -B "$build" -G Ninja --log-level=WARNING -DCMAKE_BUILD_TYPE=Release \
  -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
  -DCMAKE_C_COMPILER="$triple-gcc" -DCMAKE_CXX_COMPILER="$triple-g++" \
  -DCMAKE_LIBRARY_ARCHITECTURE="$triple" -DCMAKE_FIND_ROOT_PATH="$sysroot" \
  -DCMAKE_FIND_ROOT_PATH_MODE_PROGRAM=NEVER -DCMAKE_FIND_ROOT_PATH_MODE_LIBRARY=ONLY \
  -DCMAKE_FIND_ROOT_PATH_MODE_INCLUDE=ONLY -DCMAKE_FIND_ROOT_PATH_MODE_PACKAGE=ONLY \
  -DQUIRE_BUILD_EXAMPLES=OFF -DQUIRE_BUILD_TESTS=OFF -DQUIRE_WERROR=ON > "$build/configure.log"
cmake --build "$build" -j "${JOBS:-$(nproc)}"

quire() {
  qemu-aarch64 -L "/usr/$triple" -E LD_LIBRARY_PATH="$sysroot/usr/lib/$triple" \
    "$build/bin/quire" "$@"
}
quire verify --device cpu --isa NEON --cases "$cases" --seed "$seed"
for golden in tests/golden/*.safetensors; do
  quire verify --device cpu --isa NEON --golden "$golden"
done
