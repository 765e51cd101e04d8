"""vLLM's plugin: Quire as one of its attention backends. docs/guide/vllm.md is the manual.

vLLM finds register() by the entry point group vllm.general_plugins and calls it in each of its
processes. Nothing here imports vLLM before that.
"""

from __future__ import annotations

import logging
import os

TESTED = ("0.22.1", "0.28.0", "0.32.0", "0.33.0")
"""Versions of vLLM that served models with this plugin, on CPUs."""

SLOTS_VARIABLE = "QUIRE_VLLM_SLOTS"
DEFAULT_SLOTS = "CUSTOM,CPU_ATTN"


def register() -> None:
    """Puts Quire into vLLM's registry of attention backends; called by vLLM.

    Whatever goes wrong is a warning: vLLM then runs with its own backends.
    """
    try:
        _register()
    except Exception as error:
        logging.getLogger("vllm.quire_attn").warning(
            "Quire is not available as an attention backend: %s: %s", type(error).__name__, error
        )


def slots() -> list[str]:
    """Names of vLLM's backends whose place Quire takes, by the environment."""
    text = os.environ.get(SLOTS_VARIABLE, DEFAULT_SLOTS)
    return [name.strip().upper() for name in text.split(",") if name.strip()]


def _register() -> None:
    wanted = slots()
    if not wanted:
        return
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    for slot in wanted:
        if slot not in AttentionBackendEnum.__members__:
            known = ", ".join(AttentionBackendEnum.__members__)
            raise ValueError(f"{SLOTS_VARIABLE}: expected some of {known}, got '{slot}'")
    for slot in wanted:
        register_backend(AttentionBackendEnum[slot], f"{__name__}.slots.{slot}")
    _warn_of_untested_version()


def _warn_of_untested_version() -> None:
    import vllm

    version = str(getattr(vllm, "__version__", "unknown"))
    if version.split(".")[:2] not in [tested.split(".")[:2] for tested in TESTED]:
        logging.getLogger("vllm.quire_attn").warning(
            "Quire was tested with vLLM %s, not with %s", ", ".join(TESTED), version
        )
