"""Recorded cases of vLLM's Triton kernels: tests/golden/README.md says what they hold."""

import json
import os
from pathlib import Path

import numpy as np

FOLDERS = [Path(__file__).parents[2] / "tests" / "golden"]
if os.environ.get("QUIRE_GOLDEN_DIR"):
    FOLDERS.append(Path(os.environ["QUIRE_GOLDEN_DIR"]))

_DTYPES = {"F16": "float16", "F32": "float32", "I32": "int32", "U8": "uint8"}


def cases(kv_cache_dtype):
    """(name, fields, tensors as NumPy's) of each case over such a cache; none in bf16."""
    for folder in FOLDERS:
        for file in sorted(folder.glob("triton033*.safetensors")):
            data = file.read_bytes()
            start = 8 + int.from_bytes(data[:8], "little")
            header = json.loads(data[8:start])
            for case in json.loads(header["__metadata__"]["cases"]):
                if case["kv_cache_dtype"] == kv_cache_dtype and case["dtype"] != "bf16":
                    prefix = case["case"] + "."
                    tensors = {
                        name.removeprefix(prefix): _tensor(data, start, entry)
                        for name, entry in header.items()
                        if name.startswith(prefix)
                    }
                    yield f"{file.stem}-{case['case']}", case, tensors


def _tensor(data, start, entry):
    first, end = (start + offset for offset in entry["data_offsets"])
    return np.frombuffer(data[first:end], _DTYPES[entry["dtype"]]).reshape(entry["shape"]).copy()
