"""From the cache tensors that vLLM's generations hand out to PagedKvCache."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..arrays import Array, is_torch
from ..core import PagedKvCache

PER_TOKEN_HEAD = ("int8_per_token_head", "fp8_per_token_head", "int4_per_token_head")

_SCALE_BYTES = 4


def row_bytes(head_size: int, cache_dtype: str) -> int:
    """Elements of one token's and head's K (or V) in the cache, an inline scale included."""
    stored = head_size // 2 if cache_dtype == "int4_per_token_head" else head_size
    return stored + (_SCALE_BYTES if cache_dtype in PER_TOKEN_HEAD else 0)


def layer_cache(
    kv_cache: Array,
    head_size: int,
    cache_dtype: str,
    k_scale: float | Array = 1.0,
    v_scale: float | Array = 1.0,
) -> PagedKvCache:
    """K and V of a layer's cache, of any strides but the last, which is 1.

    `kv_cache` is [num_blocks, 2, block_size, num_kv_heads, row] (vLLM up to about 0.25) or
    [num_blocks, num_kv_heads, block_size, rows of K and V]. Per-token-head kinds have each row's
    scale behind it: then the elements are bytes.
    """
    key_row = row_bytes(head_size, cache_dtype)
    if kv_cache.ndim == 5 and kv_cache.shape[1] == 2:
        rows = [kv_cache[:, 0], kv_cache[:, 1]]
    elif kv_cache.ndim == 4 and kv_cache.shape[3] > key_row:
        slots_first = kv_cache.swapaxes(1, 2)
        rows = [slots_first[..., :key_row], slots_first[..., key_row:]]
    else:
        raise ValueError(
            "kv_cache: expected [num_blocks, 2, block_size, num_kv_heads, row] or [num_blocks, "
            f"num_kv_heads, block_size, more than {key_row}], got {tuple(kv_cache.shape)}"
        )
    if rows[0].shape[-1] != key_row:
        raise ValueError(
            f"kv_cache: expected rows of {key_row} elements for head_size {head_size} and "
            f"{cache_dtype}, got {tuple(kv_cache.shape)}"
        )
    if cache_dtype not in PER_TOKEN_HEAD:
        return PagedKvCache(*rows, cache_dtype, k_scale, v_scale)
    data = [row[..., :-_SCALE_BYTES] for row in rows]
    scales = [_floats(row[..., -_SCALE_BYTES:]) for row in rows]
    return PagedKvCache(*data, cache_dtype, 1.0, 1.0, *scales)


def _floats(four_bytes: Array) -> Array:
    """float32 [...] in place of bytes [..., 4]."""
    try:
        if is_torch(four_bytes):
            import torch

            return four_bytes.view(torch.float32)[..., 0]
        if any(stride % _SCALE_BYTES for stride in four_bytes.strides[:-1]):
            raise ValueError(f"strides {four_bytes.strides}")
        return four_bytes.view(np.float32)[..., 0]
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"kv_cache: expected rows at multiples of 4 bytes, for the scales in them ({error})"
        ) from error


def scale_of(layer: Any, name: str) -> float | Array:
    """A scale that vLLM's attention layers carry; 1 where there is none."""
    scale = getattr(layer, name, None)
    return 1.0 if scale is None else scale
