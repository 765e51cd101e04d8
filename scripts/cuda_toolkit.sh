#!/usr/bin/env bash
# Prints the path of the nvcc that builds the CUDA backend: $CUDACXX, the one on PATH, or the one in
# /usr/local/cuda/bin, if it is 12 or newer. Where there is none, installs NVIDIA's packages of it
# from PyPI into .venv (a few seconds; no driver, no GPU needed), and is quick the next time.
#
# usage: scripts/cuda_toolkit.sh [--here]     --here: install nothing; fail quietly if there is none
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

packages=(nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88
  nvidia-cuda-cccl==13.0.85 nvidia-cuda-runtime==13.0.96)
oldest=12

say() { printf 'cuda_toolkit: %s\n' "$*" >&2; }
die() {
  printf 'cuda_toolkit: error: %s\n' "$*" >&2
  exit 1
}

# The major version of an nvcc; fails if it cannot run.
major_version() {
  "$1" --version 2> /dev/null | sed -n 's/^Cuda compilation tools, release \([0-9]*\).*/\1/p' |
    grep .
}

new_enough() {
  local version
  version=$(major_version "$1") && [ "$version" -ge "$oldest" ]
}

if [ -n "${CUDACXX:-}" ]; then
  new_enough "$CUDACXX" || die "CUDACXX=$CUDACXX is no nvcc of version $oldest or newer"
  command -v "$CUDACXX"
  exit 0
fi
for nvcc in "$(command -v nvcc || true)" /usr/local/cuda/bin/nvcc; do
  if [ -n "$nvcc" ] && new_enough "$nvcc"; then
    echo "$nvcc"
    exit 0
  fi
done

installed() { compgen -G '.venv/lib/python3*/site-packages/nvidia/cu13/bin/nvcc' || true; }

if [ -z "$(installed)" ] || ! new_enough "$(installed)"; then
  [ "${1:-}" != --here ] || exit 1
  say "no nvcc $oldest or newer on PATH or in /usr/local/cuda: installing one from PyPI (100 MB)"
  log=$(mktemp)
  trap 'rm -f "$log"' EXIT
  if ! { [ -x .venv/bin/python ] || python3 -m venv .venv; } > "$log" 2>&1 ||
    ! .venv/bin/python -m pip install --quiet --disable-pip-version-check --only-binary=:all: \
      "${packages[@]}" > "$log" 2>&1; then
    tail -n 8 "$log" >&2
    die "the CUDA toolkit is missing and could not be installed from PyPI (last lines above)." \
      "Install CUDA $oldest or newer and put its nvcc on PATH, or build without" \
      "(-DQUIRE_CUDA=OFF, the default)"
  fi
fi
nvcc=$PWD/$(installed)
new_enough "$nvcc" || die "the nvcc that PyPI's packages installed does not run: $nvcc"
# Where CMake's FindCUDAToolkit looks for libraries.
root=${nvcc%/bin/nvcc}
ln -sfn lib "$root/lib64"
ln -sfn libcudart.so.13 "$root/lib/libcudart.so"
echo "$nvcc"
