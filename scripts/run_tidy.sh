#!/usr/bin/env bash
# Runs clang-tidy 14 over the compiled sources of src/, cli/ and examples/ (checks: .clang-tidy).
#
# usage: scripts/run_tidy.sh BUILD_DIR [PATH_REGEX]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

build_dir=${1:?usage: run_tidy.sh BUILD_DIR [PATH_REGEX]}
pattern=${2:-"^$PWD/(src/|cli/|examples/llm/)"}
command -v clang-tidy-14 > /dev/null && command -v run-clang-tidy-14 > /dev/null || {
  echo "run_tidy: error: no clang-tidy-14; run scripts/bootstrap.sh lint" >&2
  exit 1
}
[ -f "$build_dir/compile_commands.json" ] || {
  echo "run_tidy: error: $build_dir is not configured (make build)" >&2
  exit 1
}
log=$build_dir/clang-tidy.log
if run-clang-tidy-14 -quiet -p "$build_dir" -j "$(nproc)" \
  -extra-arg=-Wno-unknown-warning-option "$pattern" > "$log" 2>&1; then
  echo "run_tidy: clean"
else
  # Findings and errors, without the commands and the counts of suppressed warnings.
  sed 's/\x1b\[[0-9;]*m//g' "$log" |
    grep -vE '^clang-tidy-14 |^[0-9]+ warnings? (generated|treated)|^$' | head -n 200 >&2
  echo "run_tidy: findings (all in $log)" >&2
  exit 1
fi
