"""Random cases: their seed is printed at the head of a run; QUIRE_TEST_SEED repeats one."""

import functools
import os
import zlib

import numpy as np
import pytest
import quire_attn as qa
from quire_attn.backend import QuireAttentionImpl

SEED = int(os.environ.get("QUIRE_TEST_SEED") or np.random.SeedSequence().entropy % 2**31)

# All that writes to arrays it is given.
WRITERS = (
    *((qa, name) for name in ("attention", "write_kv_cache", "merge_states", "unified_attention",
                              "flash_attn_func", "flash_attn_varlen_func",
                              "flash_attn_with_kvcache")),
    *((QuireAttentionImpl, name) for name in ("forward", "do_kv_cache_update", "attend_rows")),
)  # fmt: skip


def has_cuda():
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


needs_cuda = pytest.mark.skipif(not has_cuda(), reason="no torch with a GPU here")


def pytest_report_header():
    return f"QUIRE_TEST_SEED={SEED}"


@pytest.fixture
def rng(request):
    """Random numbers of this test's own, the same whatever other tests run."""
    return np.random.default_rng([SEED, zlib.crc32(request.node.nodeid.encode())])


class AsNumpy:
    device = "cpu"

    def __call__(self, array):
        return array


class AsTorch:
    device = "cpu"

    def __call__(self, array):
        import torch

        return None if array is None else torch.from_numpy(array)


class AsCuda:
    """Tensors on a GPU with NumPy's values and strides. What is written to them comes back."""

    device = "cuda:0"

    def __init__(self):
        self.made = []  # array, an alias of its tensor, the bytes that both held last

    def __call__(self, array):
        import torch

        if array is None:
            return None
        host = torch.from_numpy(array)
        tensor = torch.empty_strided(
            host.shape, host.stride(), dtype=host.dtype, device=self.device
        ).copy_(host)
        self.made.append((array, tensor.detach(), array.tobytes()))
        return tensor

    def bring_back(self):
        for i, (array, tensor, known) in enumerate(self.made):
            now = tensor.cpu().numpy()
            if now.tobytes() != known:
                array[...] = now
                self.made[i] = (array, tensor, now.tobytes())

    def then_bring_back(self, function):
        @functools.wraps(function)
        def called(*args, **kwargs):
            try:
                return function(*args, **kwargs)
            finally:
                self.bring_back()

        return called


def converter(kind, monkeypatch):
    if kind == "numpy":
        return AsNumpy()
    pytest.importorskip("torch")
    if kind == "torch":
        return AsTorch()
    convert = AsCuda()
    for owner, name in WRITERS:
        monkeypatch.setattr(owner, name, convert.then_bring_back(getattr(owner, name)))
    return convert


@pytest.fixture(params=["numpy", "torch", pytest.param("cuda", marks=needs_cuda)])
def convert(request, monkeypatch):
    """Makes the arrays that a test passes of NumPy's: what is written to them is in NumPy's too.

    `convert.device` is where they are.
    """
    return converter(request.param, monkeypatch)


@pytest.fixture(params=["torch", pytest.param("cuda", marks=needs_cuda)])
def tensors(request, monkeypatch):
    """The same, for tests of torch alone."""
    return converter(request.param, monkeypatch)


@pytest.fixture(params=["cpu", pytest.param("cuda:0", marks=needs_cuda)])
def device(request):
    """Where a test's tensors are, where nothing has to come back."""
    pytest.importorskip("torch")
    return request.param
