#!/usr/bin/env bash
# Checks (or with --fix rewrites) the layout of every tracked C and C++ file with clang-format 14;
# other versions format differently.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tool=$(command -v clang-format-14 || true)
[ -n "$tool" ] || {
  echo "check_format: error: no clang-format-14; run scripts/bootstrap.sh lint" >&2
  exit 1
}
# Not yet added files count too, so that the check says the same before and after the commit.
mapfile -t files < <(git ls-files --cached --others --exclude-standard -- \
  '*.h' '*.cc' '*.c' '*.cu' '*.cuh' | sort -u | while read -r f; do
  [ -f "$f" ] && printf '%s\n' "$f"
done)
if [ "${#files[@]}" -eq 0 ]; then
  echo "check_format: no files"
elif [ "${1:-}" = --fix ]; then
  "$tool" -i "${files[@]}"
elif "$tool" --dry-run --Werror "${files[@]}"; then
  echo "check_format: ${#files[@]} files are as clang-format wants them"
else
  echo "check_format: run 'make format'" >&2
  exit 1
fi
