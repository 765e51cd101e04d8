#!/usr/bin/env bash
# The campaign: random cases of every size in every mode against float64, in many processes, for as
# long as there is time (docs/reliability.md says what is tested and keeps the log). Needs nothing but
# this file and a folder with the built command.
#
# usage: scripts/campaign.sh BIN_DIR cpu|cuda [options]
#   --cases N         cases in all (default 10,000)
#   --large-share P   of a hundred cases, how many are large (default 10)
#   --seed S          first seed; process i takes S + i (default 1)
#   --seconds T       end after this time, whatever is left
#   --jobs J          processes (default: one for each processor)
#   --isa "A B"       CPU: instruction sets by turns (default: all that this machine has)
#   --sanitize        CUDA: memcheck and racecheck over cases that fill the device, nothing else
#
# Prints a table of kinds, and for each failure the line that reproduces it. Exit status 1 if a case
# failed. Logs are kept in $OUT, or /tmp/quire_campaign.
set -uo pipefail

usage() {
  sed -n '2,17s/^# \{0,1\}//p' "$0"
  exit 2
}

[ $# -ge 2 ] || usage
bin=$(cd "$1" && pwd) || usage
device=$2
shift 2
cases=10000 share=10 seed=1 seconds=0 jobs=$(nproc) isas= sanitize=0
while [ $# -gt 0 ]; do
  case $1 in
    --cases) cases=$2 ;;
    --large-share) share=$2 ;;
    --seed) seed=$2 ;;
    --seconds) seconds=$2 ;;
    --jobs) jobs=$2 ;;
    --isa) isas=$2 ;;
    --sanitize) sanitize=1 && set -- "$1" "$@" ;;
    *) usage ;;
  esac
  [ $# -ge 2 ] || usage
  shift 2
done
logs=${OUT:-/tmp/quire_campaign}
mkdir -p "$logs"
export LD_LIBRARY_PATH="$bin${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
quire=$bin/quire
# The default pool of each process: threads of their own in every process, but few.
export QUIRE_NUM_THREADS=${QUIRE_NUM_THREADS:-2}

# Buffers of tens of megabytes come and go: their pages stay (glibc; the highest value it takes).
export MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=1073741824
# So do buffers on the device, where no sanitizer looks at their ends.
[ "$sanitize" = 1 ] || export QUIRE_REUSE_DEVICE_MEMORY=1

if [ "$sanitize" = 1 ]; then
  status=0
  # Each of the suite's cases by name fills the device; see tests/conformance/large_test.cc.
  for tool in memcheck racecheck; do
    log=$logs/sanitize_$tool.log start=$SECONDS
    timeout 900 compute-sanitizer --tool "$tool" --error-exitcode 9 "$bin/conformance_test" \
      --gtest_filter='*LargeBatchTest.ForSanitizers*/cuda' > "$log" 2>&1
    code=$?
    printf '%-10s %5d s  status %d  %s\n' "$tool" $((SECONDS - start)) "$code" \
      "$(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' "$log" | tail -n 1)"
    if [ "$code" -ne 0 ]; then
      status=1
      grep -E -A 3 '=========.*(Error|Invalid|hazard)|FAILED' "$log" | cut -c1-300 | head -n 20
    fi
  done
  exit "$status"
fi

if [ "$device" = cpu ] && [ -z "$isas" ]; then
  for isa in AVX3 AVX2 NEON SCALAR; do
    if "$quire" verify --device cpu --isa "$isa" --cases 0 > /dev/null 2>&1; then
      isas="$isas $isa"
    fi
  done
fi
[ "$device" = cpu ] || isas=none
read -r -a isa_list <<< "$isas"

# One process: its share of the cases. A case that crashes or hangs ends the process and is named;
# the next one goes on behind it.
worker() {
  local log=$1 seed=$2 count=$3 isa=$4 begin=$SECONDS first=0 left ran status=0 last args
  : > "$log"
  while :; do
    left=$((count - first))
    [ "$left" -gt 0 ] || break
    args=(--device "$device" --campaign --large-share "$share" --seed "$seed" --first "$first"
      --cases "$left")
    if [ "$seconds" -gt 0 ]; then
      ran=$((SECONDS - begin))
      [ "$ran" -lt "$seconds" ] || break
      args+=(--seconds $((seconds - ran)))
    fi
    [ "$isa" = none ] || args+=(--isa "$isa")
    "$quire" verify "${args[@]}" >> "$log" 2>&1
    status=$?
    [ "$status" -le 1 ] && break
    # Exit status 3: the case is named in the log's last line.
    last=$(grep -oE -- '--case [0-9]+' "$log" | tail -n 1 | cut -d' ' -f2)
    grep -q '^FAILED' "$log" && [ -n "$last" ] || { echo "FAILED ended with status $status" >> "$log"; break; }
    first=$((last + 1))
  done
}

echo "campaign on $device: $cases cases, $share % large, seeds $seed to $((seed + jobs - 1))," \
  "$jobs processes$([ "$device" = cpu ] && echo ", instruction sets ${isa_list[*]}")"
start=$SECONDS
rm -f "$logs"/"$device"_*.log
for ((i = 0; i < jobs; ++i)); do
  worker "$logs/${device}_$((seed + i)).log" $((seed + i)) $(((cases + jobs - 1) / jobs)) \
    "${isa_list[$((i % ${#isa_list[@]}))]}" &
done
wait
elapsed=$((SECONDS - start))

printf '%-7s %-10s %9s %9s %10s\n' size mode cases failures "s (sum)"
cat "$logs"/"$device"_*.log | awk -v elapsed="$elapsed" '
  /^ran / { key = $2 " " $3; cases[key] += $4; failed[key] += $6; time[key] += $8 }
  /^FAILED/ { failures++ }
  END {
    for (key in cases) {
      split(key, part, " ")
      printf "%-7s %-10s %9d %9d %10.1f\n", part[1], part[2], cases[key], failed[key], time[key] | "sort"
      all += cases[key]
      if (part[1] == "large") large += cases[key]
    }
    close("sort")
    printf "%d cases, %d of them large, %d failures, %d seconds\n", all, large, failures, elapsed
  }'
grep -h -A 2 '^FAILED' "$logs"/"$device"_*.log | cut -c1-600 | head -n 60
if [ "$device" = cpu ] && [ "${#isa_list[@]}" -gt 1 ]; then
  for isa in "${isa_list[@]}"; do
    echo "$isa: $(grep -l "on $isa\$" "$logs"/cpu_*.log | wc -l) processes"
  done
fi
! grep -q '^FAILED' "$logs"/"$device"_*.log
