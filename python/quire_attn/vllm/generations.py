"""What differs between the generations of vLLM's backend contract: how a cache comes about.

| vLLM | |
| --- | --- |
| to 0.25 | the backend says the cache's shape; the runner makes it as it says |
| 0.26 to 0.28 | the same, of a shape with K and V in one row; customize_spec() from 0.28 |
| from 0.29 | the runner makes a strided view, in the layout that the backend prefers |
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vllm.v1.attention.backend import AttentionBackend

from ..backend import row_bytes
from .layers import VllmQuireBackend


class ShapedBackend(VllmQuireBackend):
    """To 0.25: [num_blocks, 2, block_size, num_kv_heads, row]."""

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "auto",
    ) -> tuple[int, ...]:
        """K and V, each with its scales behind its rows where they have some."""
        return (num_blocks, 2, block_size, num_kv_heads, row_bytes(head_size, cache_dtype_str))


class SpecBackend(VllmQuireBackend):
    """From 0.28: the row of a token and head is a spec's."""

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """Per-token-head kinds have 4 more bytes a row of K and of V, for their scales."""
        mode = spec.kv_quant_mode
        if spec.state_content_bytes is not None or not mode.is_per_token_head:
            return spec
        half = 2 if "INT4" in mode.name else 1
        row = (spec.head_size + spec.head_size_v) // half * spec.dtype.itemsize
        return replace(spec, state_content_bytes=row + 8)


class PackedBackend(SpecBackend):
    """0.26 to 0.28: [num_blocks, num_kv_heads, block_size, rows of K and V]."""

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "auto",
    ) -> tuple[int, ...]:
        """K, then V in each row."""
        return (num_blocks, num_kv_heads, block_size, 2 * row_bytes(head_size, cache_dtype_str))


class StridedBackend(SpecBackend):
    """From 0.29. Any layout will do, which is what vLLM's default says."""

    @classmethod
    def set_head_size_v(cls, head_size_v: int) -> None:
        """Called where V's head size is not K's (TRITON_ATTN_DIFFKV). The cache's rows say it."""


def current() -> type[Any]:
    """The class for the vLLM that is installed, by what its own base class has."""
    if hasattr(AttentionBackend, "supported_kv_cache_layouts"):
        return StridedBackend
    if hasattr(AttentionBackend, "customize_spec"):
        return PackedBackend
    return ShapedBackend
