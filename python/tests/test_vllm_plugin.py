"""The plugin's registration, without vLLM: whatever happens, vLLM goes on."""

import enum
import importlib.metadata
import logging
import sys
import types

import pytest
import quire_attn.vllm as plugin


@pytest.fixture
def fake_vllm(monkeypatch):
    """A vLLM of a registry and a version; returns what was registered."""
    registered = {}

    class AttentionBackendEnum(enum.Enum):
        TRITON_ATTN = "triton"
        CPU_ATTN = "cpu"
        CUSTOM = None

    names = ["vllm", "vllm.v1", "vllm.v1.attention", "vllm.v1.attention.backends"]
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["vllm"].__version__ = "0.32.0"
    registry = types.ModuleType(names[-1] + ".registry")
    registry.AttentionBackendEnum = AttentionBackendEnum
    registry.register_backend = lambda slot, path: registered.__setitem__(slot.name, path)
    monkeypatch.setitem(sys.modules, registry.__name__, registry)
    monkeypatch.delenv(plugin.SLOTS_VARIABLE, raising=False)
    registry.registered = registered
    return registry


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_vllm_finds_it():
    (entry,) = importlib.metadata.entry_points(group="vllm.general_plugins", name="quire")
    assert entry.load() is plugin.register


def test_the_slots_that_are_taken(fake_vllm, monkeypatch, caplog):
    plugin.register()
    plugin.register()  # vLLM calls it in each of its processes, and may in one twice
    assert fake_vllm.registered == {
        "CUSTOM": "quire_attn.vllm.slots.CUSTOM",
        "CPU_ATTN": "quire_attn.vllm.slots.CPU_ATTN",
    }
    fake_vllm.registered.clear()
    monkeypatch.setenv(plugin.SLOTS_VARIABLE, " triton_attn , CUSTOM,")
    plugin.register()
    assert sorted(fake_vllm.registered) == ["CUSTOM", "TRITON_ATTN"]
    fake_vllm.registered.clear()
    monkeypatch.setenv(plugin.SLOTS_VARIABLE, "")
    plugin.register()
    assert fake_vllm.registered == {}
    assert warnings_of(caplog) == []


def test_a_slot_that_vllm_does_not_have(fake_vllm, monkeypatch, caplog):
    monkeypatch.setenv(plugin.SLOTS_VARIABLE, "CUSTOM,FLASH")
    plugin.register()
    assert fake_vllm.registered == {}
    (text,) = warnings_of(caplog)
    assert "QUIRE_VLLM_SLOTS: expected some of TRITON_ATTN, CPU_ATTN, CUSTOM, got 'FLASH'" in text


def test_a_failure_is_a_warning(fake_vllm, caplog):
    def broken(slot, path):
        raise RuntimeError("another contract")

    fake_vllm.register_backend = broken
    plugin.register()
    (text,) = warnings_of(caplog)
    assert "Quire is not available" in text
    assert "RuntimeError: another contract" in text


def test_no_vllm_at_all(monkeypatch, caplog):
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.delenv(plugin.SLOTS_VARIABLE, raising=False)
    plugin.register()
    assert len(warnings_of(caplog)) == 1


@pytest.mark.parametrize(
    ("version", "warns"),
    [("0.22.1", False), ("0.33.0", False), ("0.32.1.dev3+gabc", False), ("0.41.0", True)],
)
def test_versions_that_were_not_tested(fake_vllm, caplog, version, warns):
    sys.modules["vllm"].__version__ = version
    plugin.register()
    assert "CUSTOM" in fake_vllm.registered
    texts = warnings_of(caplog)
    assert len(texts) == warns
    if warns:
        assert "tested with vLLM 0.22.1, 0.28.0, 0.32.0, 0.33.0, not with 0.41.0" in texts[0]
