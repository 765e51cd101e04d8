"""What a backend offers, in the words of vLLM's v1 backends."""

from __future__ import annotations

import functools
from typing import Any

from .. import _binding
from .impl import QuireAttentionImpl
from .metadata import QuireAttentionMetadata, QuireAttentionMetadataBuilder


@functools.lru_cache(maxsize=8)
def capabilities(name: str) -> dict[str, Any] | None:
    """What the backend "cpu", "cuda" or "reference" can do; None if this build has none so named.

    The members of quire::BackendCapabilities. Touches no device: vLLM asks before it forks, which
    CUDA does not survive.
    """
    try:
        found = _binding.capabilities(name)
    except ValueError:
        return None
    return {
        str(key): list(map(str, value)) if key.endswith("dtypes") else value
        for key, value in found.items()
    }


class QuireAttentionBackend:
    """The classes of attention layers and what they can do (TritonAttentionBackend)."""

    accept_output_buffer = True

    @staticmethod
    def get_name() -> str:
        """The backend's name."""
        return "QUIRE"

    @staticmethod
    def get_impl_cls() -> type[Any]:
        """The class of layers."""
        return QuireAttentionImpl

    @staticmethod
    def get_metadata_cls() -> type[Any]:
        """The class of a step's metadata."""
        return QuireAttentionMetadata

    @staticmethod
    def get_builder_cls() -> type[Any]:
        """The class that makes it."""
        return QuireAttentionMetadataBuilder

    @staticmethod
    def get_supported_dtypes() -> list[Any]:
        """Dtypes of the query: torch's where torch is installed, else their names."""
        names = ["float16", "bfloat16", "float32"]
        try:
            import torch
        except ImportError:
            return names
        return [getattr(torch, name) for name in names]

    @staticmethod
    def get_supported_kv_cache_dtypes() -> list[str]:
        """VLLM's names of what caches may hold."""
        return ["auto", "fp8", *capabilities("cpu")["kv_cache_dtypes"][1:]]

    @staticmethod
    def validate_head_size(head_size: int) -> None:
        """Raises ValueError, naming the sizes that work, on another."""
        _binding.validate_head_size("cpu", head_size)

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "auto",
    ) -> tuple[int, ...]:
        """[num_blocks, 2, block_size, num_kv_heads, head_size], K before V.

        Per-token-head kinds have rows that are 4 bytes longer, for their scales. Blocks may have
        any size.
        """
        return tuple(
            _binding.kv_cache_shape(
                "cpu", num_blocks, block_size, num_kv_heads, head_size, cache_dtype_str
            )
        )

    @staticmethod
    def use_cascade_attention(
        common_prefix_len: int = 0,
        query_lens: Any = (),
        num_query_heads: int = 0,
        num_kv_heads: int = 0,
        use_alibi: bool = False,
        use_sliding_window: bool = False,
        use_local_attention: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> bool:
        """Whether to announce a shared prefix to build(). False: plans find them themselves."""
        return False
