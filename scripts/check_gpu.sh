#!/usr/bin/env bash
# Everything a change to src/cuda must pass on a machine with a GPU, from a build that was made
# anywhere: correctness on small cases first, then on many, then the sanitizers. One line a step;
# the first step that fails ends it, so that a kernel that hangs costs its own limit only.
#
# usage: scripts/check_gpu.sh BIN_DIR [quick|full]     BIN_DIR: build/cuda/bin or a copy of it
# QUIRE_GOLDEN_DIR names stored outputs of vLLM's kernel (tests/golden); QUIRE_GPU_CASES the
# number of random cases (20,000; quick: 1,000). Logs are kept in $OUT or /tmp.
set -uo pipefail

bin=$(cd "$1" && pwd)
mode=${2:-quick}
logs=${OUT:-/tmp}
cases=${QUIRE_GPU_CASES:-$([ "$mode" = full ] && echo 20000 || echo 1000)}
export LD_LIBRARY_PATH="$bin${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"

# step NAME SECONDS COMMAND...: within the limit, or it counts as hung.
step() {
  local name=$1 limit=$2 log=$logs/gpu_$1.log start=$SECONDS status
  shift 2
  timeout "$limit" "$@" > "$log" 2>&1
  status=$?
  printf '%-12s %4d s  %s\n' "$name" "$((SECONDS - start))" \
    "$(grep -E 'passed,|PASSED|ERROR SUMMARY' "$log" | tail -n 1)"
  [ "$status" -eq 0 ] && return
  [ "$status" -eq 124 ] && echo "$name: no end within $limit s (does a kernel hang?)"
  { grep -E -A 2 'FAILED|Failure|=========.*(Error|Invalid|hazard)' "$log" || tail -n 3 "$log"; } |
    cut -c1-300 | head -n 20
  echo "log: $log"
  exit 1
}

# The random cases, in as many processes as there are processors: most of the time goes into the
# reference on the host. A log of an earlier run must not count.
random_cases() {
  local pids=() status=0 seed count
  count=$(nproc)
  rm -f "$logs"/gpu_seed*.log
  for seed in $(seq "$count"); do
    "$bin/quire" verify --device cuda --cases $(((cases + count - 1) / count)) --seed "$seed" \
      > "$logs/gpu_seed$seed.log" 2>&1 &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || status=1; done
  grep -h -A 2 FAILED "$logs"/gpu_seed*.log
  awk '/ passed, / { passed += $1; failed += $3 } END { print passed " passed, " failed " failed" }' \
    "$logs"/gpu_seed*.log
  return "$status"
}
export -f random_cases
export bin logs cases

step covering 60 "$bin/quire" verify --device cuda --covering
if [ -n "${QUIRE_GOLDEN_DIR:-}" ]; then
  step golden 30 "$bin/quire" verify --device cuda --golden "$QUIRE_GOLDEN_DIR"/*.safetensors
fi
for test in cuda_test api_test; do
  if [ -x "$bin/$test" ]; then step "$test" 90 "$bin/$test" --gtest_brief=1; fi
done
if [ -x "$bin/conformance_test" ]; then
  step conformance 120 "$bin/conformance_test" --gtest_filter='*/cuda' --gtest_brief=1
fi
step random $((60 + cases / 10 / $(nproc))) bash -c random_cases
[ "$mode" = full ] || exit 0
# Side by side: they are slow on the host.
pids=()
for tool in memcheck racecheck initcheck synccheck; do
  step "$tool" 400 compute-sanitizer --tool "$tool" --error-exitcode 9 \
    "$bin/quire" verify --device cuda --covering &
  pids+=($!)
done
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=1; done
exit "$status"
