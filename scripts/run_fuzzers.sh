#!/usr/bin/env bash
# Runs every libFuzzer target of a build for a while, from its seeds in tests/fuzz/corpus/<target>/; a
# target without seeds is an error, since from nothing it would not get behind a file's header. What a
# target found stays in BUILD_DIR/fuzzing/<target>/, inputs that failed included.
#
# usage: scripts/run_fuzzers.sh BUILD_DIR SECONDS_EACH
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

build_dir=${1:?usage: run_fuzzers.sh BUILD_DIR SECONDS_EACH}
seconds=${2:?usage: run_fuzzers.sh BUILD_DIR SECONDS_EACH}
shopt -s nullglob
targets=("$build_dir"/bin/fuzz_*)
[ "${#targets[@]}" -gt 0 ] || {
  echo "run_fuzzers: error: no bin/fuzz_* in $build_dir (cmake --preset fuzz, then build it)" >&2
  exit 1
}
status=0
for target in "${targets[@]}"; do
  name=$(basename "$target")
  dir=$build_dir/fuzzing/$name
  seeds=("tests/fuzz/corpus/$name"/*)
  if [ "${#seeds[@]}" -eq 0 ]; then
    echo "run_fuzzers: error: $name has no seeds in tests/fuzz/corpus/$name" >&2
    status=1
    continue
  fi
  mkdir -p "$dir/corpus"
  if "$target" -max_total_time="$seconds" -timeout=20 -rss_limit_mb=4096 -print_final_stats=1 \
    -artifact_prefix="$dir/" "$dir/corpus" "tests/fuzz/corpus/$name" > "$dir/log" 2>&1; then
    runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$dir/log")
    echo "run_fuzzers: $name: $runs runs from ${#seeds[@]} seeds, nothing found"
  else
    tail -n 60 "$dir/log" >&2
    echo "run_fuzzers: $name FAILED; the input is in $dir" >&2
    status=1
  fi
done
exit "$status"
