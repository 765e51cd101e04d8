"""transformers with Quire against its own attention, in fp32: tokens must be equal.

QUIRE_TEST_MODEL names a folder with SmolLM2 (tests that need it are left out without).
"""

import os

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")

import pytest
import quire_attn.flash
import quire_attn.transformers
import torch
import transformers

IMPLEMENTATION = quire_attn.transformers.NAME


def pytest_configure():
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()


def pytest_report_header():
    return f"transformers {transformers.__version__}, torch {torch.__version__}"


@pytest.fixture(scope="session", autouse=True)
def registered():
    """Importing must not have done it."""
    assert IMPLEMENTATION not in transformers.AttentionInterface._global_mapping
    quire_attn.transformers.register()
    quire_attn.transformers.register()


@pytest.fixture(scope="session")
def model_folder():
    folder = os.environ.get("QUIRE_TEST_MODEL")
    if not folder:
        pytest.skip("QUIRE_TEST_MODEL is not set")
    return folder


@pytest.fixture
def calls(monkeypatch):
    """How often Quire was called, by what: "varlen", "rows" or "blocks"."""
    counts = {"varlen": 0, "rows": 0, "blocks": 0}
    varlen, with_kvcache = quire_attn.flash._varlen, quire_attn.flash._with_kvcache

    def count_varlen(*args):
        counts["varlen"] += 1
        return varlen(*args)

    def count_with_kvcache(*args):
        counts["rows" if args[7] is None else "blocks"] += 1
        return with_kvcache(*args)

    monkeypatch.setattr(quire_attn.flash, "_varlen", count_varlen)
    monkeypatch.setattr(quire_attn.flash, "_with_kvcache", count_with_kvcache)
    return counts


@pytest.fixture
def block_tables_on_cpus(monkeypatch):
    """transformers reads through block tables on GPUs only; the code is the same."""
    from transformers.generation.continuous_batching import initialization

    monkeypatch.setattr(initialization, "ensure_decode_fast_path_is_available", lambda *args: None)
