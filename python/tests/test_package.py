"""The package around the functions: version, command, types, imports."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import quire_attn as qa

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments):
    return subprocess.run(
        [sys.executable, *arguments], check=True, capture_output=True, text=True
    ).stdout


def test_version_is_the_library_s():
    header = (ROOT / "include/quire/version.h").read_text()
    assert f'QUIRE_VERSION_STRING "{qa.__version__}"' in header


def test_the_command_shows_what_quire_info_shows():
    """QUIRE_COMMAND: the quire command of a build with the same backends."""
    text = run("-m", "quire_attn")
    assert text.startswith(f"quire {qa.__version__}, ")
    assert re.search(r"^backend cpu: \w+$", text, re.MULTILINE)
    assert "| attention sinks" in text
    assert "| kernel " in run("-m", "quire_attn", "--kernels")
    command = os.environ.get("QUIRE_COMMAND")
    if not command:
        pytest.skip("no QUIRE_COMMAND to compare with")
    assert (
        text == subprocess.run([command, "info"], check=True, capture_output=True, text=True).stdout
    )


def test_types_are_marked():
    assert (Path(qa.__file__).parent / "py.typed").is_file()


def test_everything_is_exported():
    for name in qa.__all__:
        assert getattr(qa, name).__doc__, name


def test_numpy_s_users_load_no_torch_operators():
    """tvm_ffi itself imports torch where it is installed; scripts/test_wheel.sh has none."""
    code = (
        "import sys, numpy, quire_attn as qa; x = numpy.ones((1, 2, 2, 8), numpy.float32);"
        "qa.flash_attn_func(x, x, x); print('quire_attn.torch_ops' in sys.modules)"
    )
    assert run("-c", code) == "False\n"


def test_threads_share_plans_without_mixing(rng):
    """Many threads, calls of the same kind at once: each gets a plan of its own from the pool."""
    import threading

    import numpy as np

    from reference import attend, check

    cases = [
        [rng.standard_normal((1, rows, 2, 32)).astype(np.float32) for _ in "qkv"]
        for rows in (3, 30, 9, 50, 1, 70, 20, 40)
    ]
    outputs = [[] for _ in cases]

    def work(i):
        q, k, v = cases[i]
        table = np.zeros((1, 1), np.int32)
        cu_seqlens = np.array([0, q.shape[1]], np.int32)
        pages = [np.pad(x, ((0, 0), (0, 80 - x.shape[1]), (0, 0), (0, 0))) for x in (k, v)]
        for _ in range(50):  # one configuration: blocks of 80 tokens
            out = qa.flash_attn_varlen_func(
                q[0], *pages, cu_seqlens, cu_seqlens, 80, 80, causal=True, block_table=table
            )
            outputs[i].append(out[None])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(cases))]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    for (q, k, v), outs in zip(cases, outputs, strict=True):
        expected = attend(q[0], k[0], v[0], right=0)[0]
        assert len(outs) == 50
        for out in outs:
            check(out[0], expected)
