#!/usr/bin/env bash
# transformers 5.18, 5.23 and 5.24 with Quire as their attention, on a CPU: see conftest.py.
#
# usage: tests/hosts/transformers/run.sh FOLDER WHEEL MODEL [VERSION...]
#   FOLDER  where environments are made (tf518, ...; 5 GB of torch, shared where the file system has links)
#   WHEEL   quire_attn's; MODEL  a folder with SmolLM2 in float32; UV  the uv command, else PyPI's
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
folder=$1 wheel=$2 model=$3
shift 3
[ $# -gt 0 ] || set -- 5.18 5.23 5.24
mkdir -p "$folder"

if [ -z "${UV:-}" ]; then
  UV=$folder/uv/bin/uv
  [ -x "$UV" ] || { python3 -m venv "$folder/uv" && "$folder/uv/bin/pip" install --quiet uv; }
fi
export UV_CACHE_DIR=${UV_CACHE_DIR:-$folder/uv-cache}

for version in "$@"; do
  environment=$folder/tf${version/./}
  python=$environment/bin/python
  if [ ! -x "$python" ]; then
    "$UV" venv --quiet --python "${PYTHON:-python3}" "$environment"
  fi
  "$UV" pip install --quiet --python "$python" "transformers==$version.0" torch==2.13.0 accelerate pytest
  "$UV" pip install --quiet --python "$python" --reinstall-package quire-attn "$wheel"
  OMP_NUM_THREADS=1 QUIRE_TEST_MODEL=$model "$python" -m pytest -q "$here"
done
