"""Work on the OpenMP threads that the process has."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("torch")

SCRIPT = """
import os, sys, threading
import numpy as np
import torch
import quire_attn as qa
from quire_attn.core import use_openmp_threads

sys.path.insert(0, sys.argv[1])
from reference import Batch, check

def num_threads():
    return len(os.listdir("/proc/self/task"))

torch.randn(1000, 1000) @ torch.randn(1000, 1000)  # OpenMP has its threads
torch.randn(4_000_000).exp_()
batch = Batch(np.random.default_rng(1), lens=[(40, 900), (1, 700), (9, 9)], num_kv_heads=2)
cache = qa.PagedKvCache(np.empty_like(batch.key_cache), np.empty_like(batch.value_cache))
before = num_threads()
print(use_openmp_threads() == torch.get_num_threads())

def step():
    for k, v, slots in zip(batch.k, batch.v, batch.slots):
        qa.write_kv_cache(k, v, cache, slots)
    plan = qa.Plan(**batch.plan_arguments())
    plan.update(**batch.update_arguments(lambda array: array))
    out = np.full(batch.q.shape, np.nan, np.float32)
    check(qa.attention(plan, batch.q, cache, output=out), batch.expected(right=0)[0])

for _ in range(20):
    step()
print(num_threads() - before)
threads = [threading.Thread(target=step) for _ in range(3)]  # each brings a team of its own
[thread.start() for thread in threads], [thread.join() for thread in threads]
print(use_openmp_threads(False))
step()
print(num_threads() - before >= 4)
"""


def test_openmps_threads_are_used_and_no_others():
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "QUIRE_NUM_THREADS": "5"}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, os.path.dirname(__file__)],
        capture_output=True, text=True, env=environment, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["True", "0", "5", "True"], result.stdout
