#!/usr/bin/env bash
# Installs the wheel of build/wheel with pytest, NumPy and torch into build/python-tests and runs
# python/tests. torch from PyPI is a CUDA build of 2 GB; it runs on CPUs.
#
# usage: scripts/test_python.sh [PYTEST ARGUMENT...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=build/python-tests
packages=(numpy==2.4.6 pytest==9.2.0 torch==2.13.0)
if [ "$(cat "$venv/packages" 2> /dev/null)" != "${packages[*]}" ]; then
  echo "test_python: installing from PyPI: ${packages[*]}"
  python3 -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check "${packages[@]}"
  echo "${packages[*]}" > "$venv/packages"
fi
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --force-reinstall --no-deps \
  build/wheel/quire_attn-*-manylinux_2_28_x86_64.whl
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check 'apache-tvm-ffi>=0.1.11,<0.2'

# The command of a build with the same backends, for a test that compares the two.
if [ -z "${QUIRE_COMMAND:-}" ] && [ -x build/release/bin/quire ] && [ ! -d build/wheel/cuda ]; then
  export QUIRE_COMMAND=$PWD/build/release/bin/quire
fi
"$venv/bin/python" -m pytest -q "$@"
