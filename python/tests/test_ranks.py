"""examples/python/ranks.py: heads and context split over processes equal one device."""

import os
import pathlib
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torch.distributed.run")
EXAMPLE = pathlib.Path(__file__).parents[2] / "examples" / "python" / "ranks.py"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_two_ranks_are_one(device, dtype):
    """Each rank compares with the whole batch, and ends with 1 where it differs."""
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               "2", str(EXAMPLE), "--device", device, "--dtype", dtype]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("split_heads: off by") == 2
    assert done.stdout.count("split_context: off by") == 2
