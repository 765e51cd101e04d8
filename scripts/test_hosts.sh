#!/usr/bin/env bash
# Runs real hosts (several versions of vLLM and transformers) with Quire as their attention, on this
# machine's CPU. Puts 14 GB from PyPI into build/hosts, or the folder that QUIRE_HOSTS_DIR names,
# which the next run uses again. docs/guide/hosts_tests.md tells more.
#
# usage: scripts/test_hosts.sh [-k WORDS]... [--list]
#   QUIRE_HOSTS_WHEEL   the wheel to test; without, the one that scripts/build_wheel.sh --cpu builds
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

wheel=${QUIRE_HOSTS_WHEEL:-}
if [ -z "$wheel" ] && [[ " $* " != *" --list "* ]]; then
  scripts/build_wheel.sh --cpu
  wheel=$(ls build/wheel/quire_attn-*-manylinux_2_28_x86_64.whl)
fi
exec python3 tests/hosts/run.py --root "${QUIRE_HOSTS_DIR:-build/hosts}" --wheel "$wheel" "$@"
