#!/usr/bin/env bash
# Checks (or with --fix rewrites) the Python package with ruff: format and lint, as pyproject.toml says.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

version=0.17.6 # others format differently
folders=(python examples/python tests/hosts)
ruff=build/ruff/bin/ruff
if [ "$("$ruff" --version 2> /dev/null)" != "ruff $version" ]; then
  echo "check_python: installing ruff $version from PyPI"
  python3 -m venv build/ruff
  build/ruff/bin/python -m pip install --quiet --disable-pip-version-check "ruff==$version"
fi
if [ "${1:-}" = --fix ]; then
  "$ruff" check --quiet --fix "${folders[@]}"
  "$ruff" format --quiet "${folders[@]}"
else
  "$ruff" check --quiet "${folders[@]}" && "$ruff" format --check "${folders[@]}"
fi
