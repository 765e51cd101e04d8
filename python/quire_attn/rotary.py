"""Rotary embedding as flash_attn_with_kvcache has it, by NumPy's or torch's own operations.

FlashAttention does this within its kernel. Here it costs a few passes over q and the new k, which
are small beside the cache.
"""

from __future__ import annotations

from .arrays import Array, arange, astype, empty_like, full, where
from .one_shot import check_like


def rotate(
    q: Array,
    k: Array | None,
    cos: Array,
    sin: Array | None,
    cache_seqlens: int | Array | None,
    capacity: int,
    interleaved: bool,
    one_position: bool,
) -> tuple[Array, Array]:
    """Rotated copies of q and k, [batch, tokens, heads, head size].

    cos and sin are [positions, rotary size / 2], for at least the `capacity` of the cache. Token i
    sits at cache_seqlens + i, or all of q at cache_seqlens (`one_position`), padding included.
    """
    check_like("rotary_cos", cos, q, 2, None)
    if sin is None:
        raise ValueError("rotary_sin: expected with rotary_cos")
    check_like("rotary_sin", sin, q, 2, cos.shape[1])
    if k is None or cache_seqlens is None:
        raise ValueError("rotary_cos: expected with k, v and cache_seqlens only")
    if 2 * cos.shape[1] > q.shape[3]:
        raise ValueError(
            f"rotary_cos: expected at most head_size / 2 = {q.shape[3] // 2} columns, "
            f"got {cos.shape[1]}"
        )
    if min(cos.shape[0], sin.shape[0]) < capacity:
        raise ValueError(
            f"rotary_cos: expected a row for each of the {capacity} positions of the cache, "
            f"got {min(cos.shape[0], sin.shape[0])}"
        )
    if isinstance(cache_seqlens, int):
        cache_seqlens = full(q, q.shape[0], cache_seqlens)
    first = astype(cache_seqlens, "int64")[:, None]
    at_q = first + arange(q, q.shape[1], 0 if one_position else 1)
    at_k = first + arange(q, k.shape[1])
    return tuple(
        _rotated(x, cos, sin, where((at >= 0) & (at < capacity), at, 0), interleaved)
        for x, at in ((q, at_q), (k, at_k))
    )


def _rotated(x: Array, cos: Array, sin: Array, positions: Array, interleaved: bool) -> Array:
    half = cos.shape[1]
    c, s = (astype(table[positions], "float32")[:, :, None] for table in (cos, sin))
    if interleaved:
        parts = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    else:
        parts = slice(0, half), slice(half, 2 * half)
    a, b = (astype(x[..., part], "float32") for part in parts)
    out = empty_like(x, tuple(x.shape))
    out[..., parts[0]] = a * c - b * s
    out[..., parts[1]] = a * s + b * c
    out[..., 2 * half :] = x[..., 2 * half :]
    return out
