#!/usr/bin/env bash
# Runs a compiler command whose ptxas reports (-Xptxas -v), and fails if a kernel spills registers or if its
# wgmma products are serialised. The report is printed only then.
#
# usage: scripts/strict_ptxas.sh COMPILER ARGUMENT...
set -uo pipefail

report=$("$@" 2>&1)
status=$?
if [ "$status" -ne 0 ]; then
  printf '%s\n' "$report"
  exit "$status"
fi
# What is not ptxas's usual report is the compiler's and is passed on.
printf '%s' "$report" | grep -vE "^ptxas info|^ +[0-9]+ bytes stack frame|^$" && printf '\n'
bad=$(printf '%s\n' "$report" |
  grep -E "C75[0-9][0-9]|serialized|[1-9][0-9]* bytes spill (stores|loads)")
if [ -n "$bad" ]; then
  printf 'strict_ptxas: error: a kernel spills or its wgmma is serialised\n%s\n' "$report"
  exit 1
fi
exit 0
