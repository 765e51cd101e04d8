"""The backend classes, one for each slot of vLLM's registry, made when vLLM asks for them.

vLLM takes a backend by module and name, and wants get_name() to be the slot's.
"""

from __future__ import annotations

import logging
from typing import Any


def __getattr__(name: str) -> Any:
    """The backend for the slot of that name."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if name not in AttentionBackendEnum.__members__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .generations import current

    def get_name() -> str:
        return name

    members = {"__module__": __name__, "__qualname__": name, "get_name": staticmethod(get_name)}
    globals()[name] = type(name, (current(),), members)
    _say_who_serves(name)
    return globals()[name]


def _say_who_serves(slot: str) -> None:
    from .. import __version__, _binding
    from ..backend.backend import capabilities

    devices = "CPU: " + str(_binding.instruction_set("cpu"))
    if capabilities("cuda") is not None:
        devices += ", CUDA"  # more would have to ask the GPU: too early, see capabilities()
    logging.getLogger("vllm.quire_attn").info(
        "Quire %s is the attention backend %s (%s)", __version__, slot, devices
    )
