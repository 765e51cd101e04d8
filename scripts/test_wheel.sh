#!/usr/bin/env bash
# Installs the wheel of build/wheel into a fresh environment of every Python from 3.10 on that this
# machine has (on PATH, and in pyenv) and runs a ten-line script and `python -m quire_attn` in each.
#
# usage: scripts/test_wheel.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

wheel=$PWD/$(ls build/wheel/quire_attn-*-manylinux_2_28_x86_64.whl)
script=$PWD/python/tests/ten_lines.py
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# One of each version; a shim that fails is none.
declare -A pythons
for python in $(compgen -c python3 | grep -E '^python3(\.[0-9]+)?$' | sort -u) \
  "${PYENV_ROOT:-$HOME/.pyenv}"/versions/*/bin/python3; do
  version=$("$python" -c 'import sys
if sys.version_info >= (3, 10): print("%d.%d" % sys.version_info[:2])' 2> /dev/null || true)
  [ -z "$version" ] || pythons[$version]=${pythons[$version]:-$python}
done

for version in $(printf '%s\n' "${!pythons[@]}" | sort -V); do
  venv=$work/$version
  "${pythons[$version]}" -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check "$wheel"
  (cd "$work" && "$venv/bin/python" -I -m quire_attn) > "$work/info"
  grep -q "^backend cpu: " "$work/info"
  said=$(cd "$work" && "$venv/bin/python" -I "$script")
  echo "test_wheel: Python $version: $said"
done
