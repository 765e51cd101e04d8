"""Random cases: their seed is printed at the head of a run; QUIRE_TEST_SEED repeats one."""

import os
import zlib

import numpy as np
import pytest

SEED = int(os.environ.get("QUIRE_TEST_SEED") or np.random.SeedSequence().entropy % 2**31)


def pytest_report_header():
    return f"QUIRE_TEST_SEED={SEED}"


@pytest.fixture
def rng(request):
    """Random numbers of this test's own, the same whatever other tests run."""
    return np.random.default_rng([SEED, zlib.crc32(request.node.nodeid.encode())])


def as_numpy(array):
    return array


def as_torch(array):
    torch = pytest.importorskip("torch")
    return None if array is None else torch.from_numpy(array)


@pytest.fixture(params=[as_numpy, as_torch], ids=["numpy", "torch"])
def convert(request):
    """Makes the arrays that a test passes of NumPy's, sharing memory."""
    if request.param is as_torch:
        pytest.importorskip("torch")
    return request.param
