"""FlashAttention's functions, by its argument names, on Quire: no backward, no dropout."""

from __future__ import annotations

import math
from typing import Any

from .arrays import (
    Array,
    arange,
    astype,
    empty_like,
    even_rows,
    full,
    is_tracing,
    only_row,
    refuse_gradients,
    take_along_rows,
    tokens_as_blocks,
    where,
)
from .core import PagedKvCache, Score
from .one_shot import Band, attend, cache_dtype_of, check_like
from .rotary import rotate


def flash_attn_func(
    q: Array,
    k: Array,
    v: Array,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    s_aux: Array | None = None,
) -> Any:
    """Attention over k and v, [batch, seqlen_k, kv heads, head_size].

    q is [batch, seqlen_q, heads, head_size]. Its row i sits at position seqlen_k - seqlen_q + i.
    `s_aux`, float32 [heads], are attention sinks. Returns the output, with return_attn_probs
    (output, lse [batch, heads, seqlen_q], None).
    """
    _refuse(dropout_p=dropout_p)
    if is_tracing(q):
        from . import torch_ops

        out, lse = torch_ops.traced_flash_attn(
            q, k, v, None, None, None, None, None, None, softmax_scale, causal, window_size,
            softcap, alibi_slopes, s_aux,
        )  # fmt: skip
    else:
        out, lse = _with_kvcache(
            q, k, v, None, None, None, None, None, None, softmax_scale, causal, window_size,
            softcap, alibi_slopes, s_aux, return_attn_probs,
        )  # fmt: skip
    return (out, lse, None) if return_attn_probs else out


def flash_attn_with_kvcache(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    k: Array | None = None,
    v: Array | None = None,
    rotary_cos: Array | None = None,
    rotary_sin: Array | None = None,
    cache_seqlens: int | Array | None = None,
    cache_batch_idx: Array | None = None,
    cache_leftpad: Array | None = None,
    block_table: Array | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Array | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    s_aux: Array | None = None,
) -> Any:
    """Attention over a cache, to which k and v are appended first where they are given.

    q: [batch, seqlen_q, heads, head_size]. k_cache, v_cache: [blocks, block size, kv heads, head
    size] with a `block_table` int32 [batch, n], else [batch of the cache, seqlen, kv heads,
    head_size], whose rows `cache_batch_idx` picks. `cache_seqlens` int32 [batch] counts the tokens
    in the cache without k's; none means that it is full. `cache_leftpad` int32 [batch], without a
    block_table: so many of these are not there.

    rotary_cos and rotary_sin [positions, rotary size / 2] rotate k, and q, before anything else: a
    token at its place in the cache's row, q all at the place of the first new token where neither
    causal nor a window is asked for. Returns the output, with return_softmax_lse also lse [batch,
    heads, seqlen_q].
    """
    if rotary_cos is not None:
        rows = 1 if block_table is None else block_table.shape[1]
        one_position = not causal and tuple(window_size) == (-1, -1)
        q, k = rotate(
            q, k, rotary_cos, rotary_sin, cache_seqlens, rows * k_cache.shape[1],
            rotary_interleaved, one_position,
        )  # fmt: skip
    elif rotary_sin is not None:
        raise ValueError("rotary_cos: expected with rotary_sin")
    if is_tracing(q):
        from . import torch_ops

        out, lse = torch_ops.traced_flash_attn(
            q, k_cache, v_cache, k, v, cache_seqlens, cache_batch_idx, block_table, cache_leftpad,
            softmax_scale, causal, window_size, softcap, alibi_slopes, s_aux,
        )  # fmt: skip
    else:
        out, lse = _with_kvcache(
            q, k_cache, v_cache, k, v, cache_seqlens, cache_batch_idx, block_table, cache_leftpad,
            softmax_scale, causal, window_size, softcap, alibi_slopes, s_aux, return_softmax_lse,
        )  # fmt: skip
    return (out, lse) if return_softmax_lse else out


def flash_attn_varlen_func(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Array | None = None,
    *,
    s_aux: Array | None = None,
) -> Any:
    """Attention of sequences that lie back to back: q [total_q, heads, head_size].

    k and v are [total_k, kv heads, head_size], or with `block_table` a paged cache [blocks, block
    size, kv heads, head_size]. cu_seqlens: int32 [batch + 1], offsets of the sequences. Returns
    the output, with return_attn_probs (output, lse [heads, total_q], None).
    """
    _refuse(dropout_p=dropout_p)
    if is_tracing(q):
        from . import torch_ops

        out, lse = torch_ops.traced_flash_attn_varlen(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal,
            window_size, softcap, alibi_slopes, block_table, s_aux,
        )  # fmt: skip
    else:
        out, lse = _varlen(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal,
            window_size, softcap, alibi_slopes, block_table, s_aux, return_attn_probs,
        )  # fmt: skip
    return (out, lse, None) if return_attn_probs else out


def _refuse(**arguments: Any) -> None:
    for name, value in arguments.items():
        if value is not None and not (isinstance(value, float) and value == 0.0):
            raise NotImplementedError(f"{name}: Quire does not support it")


def _band(causal: bool, window_size: tuple[int, int], alibi_slopes: Array | None) -> Band:
    left, right = window_size
    band = Band(left, 0 if causal else right)
    if alibi_slopes is not None and band.right != 0:
        raise NotImplementedError(
            "alibi_slopes: supported with causal=True only (FlashAttention's bias of keys behind "
            "the row has another sign than Quire's)"
        )
    return band


def _score(
    q: Array,
    softmax_scale: float | None,
    softcap: float,
    alibi_slopes: Array | None,
    s_aux: Array | None,
) -> Score:
    num_heads = q.shape[-2]
    if not 0.0 <= softcap < math.inf:
        raise ValueError(f"softcap: expected a finite cap of at least 0, got {softcap}")
    if softmax_scale is not None and not math.isfinite(softmax_scale):
        raise ValueError(f"softmax_scale: expected a finite scale, got {softmax_scale}")
    if alibi_slopes is not None and alibi_slopes.ndim == 2:
        alibi_slopes = only_row(alibi_slopes)
        if alibi_slopes is None:
            raise NotImplementedError(
                "alibi_slopes: one slope a head is supported, the same for all sequences (as "
                "expand() makes them [batch, heads])"
            )
    if alibi_slopes is not None:
        check_like("alibi_slopes", alibi_slopes, q, 1, num_heads)
    if s_aux is not None:
        check_like("s_aux", s_aux, q, 1, num_heads)
        s_aux = astype(s_aux, "float32")
    return Score(softmax_scale or 0.0, softcap, alibi_slopes, False, s_aux)


def _positions(
    band: Band, query_lens: Array | int, seq_lens: Array, max_query_len: int
) -> dict[str, Array]:
    """Positions of rows that are `shift` later; all are moved on so that none is negative."""
    if band.shift == 0:
        return {}
    count = seq_lens.shape[0]
    return {
        "q_offset": seq_lens - query_lens + (band.shift + max_query_len),
        "kv_offset": full(seq_lens, count, max_query_len),
    }


def _with_kvcache(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    k: Array | None,
    v: Array | None,
    cache_seqlens: int | Array | None,
    cache_batch_idx: Array | None,
    block_table: Array | None,
    cache_leftpad: Array | None,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: Array | None,
    s_aux: Array | None,
    want_lse: bool,
) -> tuple[Array, Array | None]:
    refuse_gradients(q, k_cache, v_cache, k, v)
    check_like("q", q, q, 4, None)
    check_like("k_cache", k_cache, q, 4, q.shape[3])
    check_like("v_cache", v_cache, q, 4, None)
    batch_size, query_len, num_heads, _ = q.shape
    band = _band(causal, window_size, alibi_slopes)
    score = _score(q, softmax_scale, softcap, alibi_slopes, s_aux)
    if cache_seqlens is None:
        cache_seqlens = (1 if block_table is None else block_table.shape[1]) * k_cache.shape[1]
    if isinstance(cache_seqlens, int):
        cache_seqlens = full(q, batch_size, cache_seqlens)
    if block_table is None:
        rows = arange(q, batch_size) if cache_batch_idx is None else cache_batch_idx
        rows = astype(rows, "int32")[:, None]
        if cache_leftpad is None:
            block_table = rows  # each row of the cache is one block
        else:
            block_table = _table_past_padding(rows, cache_leftpad, k_cache.shape[1])
            k_cache = tokens_as_blocks("k_cache", k_cache)
            v_cache = tokens_as_blocks("v_cache", v_cache)
            cache_seqlens = cache_seqlens - cache_leftpad
    elif cache_batch_idx is not None or cache_leftpad is not None:
        raise ValueError("cache_batch_idx, cache_leftpad: expected none with a block_table")
    cache = PagedKvCache(k_cache, v_cache, cache_dtype_of(k_cache, q))
    seq_lens = cache_seqlens
    write = None
    if k is not None:
        check_like("k", k, q, 4, q.shape[3])
        check_like("v", v, q, 4, v_cache.shape[3])
        seq_lens = cache_seqlens + k.shape[1]
        slots = _slots(block_table, cache_seqlens, k.shape[1], k_cache.shape[1])
        write = even_rows(k), even_rows(v), slots
    out = empty_like(q, (batch_size, query_len, num_heads, v_cache.shape[3]))
    lse = empty_like(q, (num_heads, batch_size * query_len), "float32") if want_lse else None
    batch = {
        "query_start_loc": arange(q, batch_size + 1, query_len),
        "seq_lens": seq_lens,
        "block_table": block_table,
        "num_actual_tokens": batch_size * query_len,
        "max_query_len": query_len,
        **_positions(band, query_len, seq_lens, query_len),
    }
    attend(even_rows(q), cache, out, lse, band.mask, score, batch, write)
    if want_lse:
        lse = lse.reshape(num_heads, batch_size, query_len).swapaxes(0, 1)
    return out, lse


def _table_past_padding(rows: Array, leftpad: Array, row_len: int) -> Array:
    """A block table of blocks of one token: the tokens of each row from `leftpad` on."""
    token = astype(leftpad, "int32")[:, None] + arange(rows, row_len)[None, :]
    return where((token >= 0) & (token < row_len), rows * row_len + token, -1)


def _slots(block_table: Array, cache_seqlens: Array, new_tokens: int, block_size: int) -> Array:
    """int64 [batch * new_tokens]: slots of the tokens behind; -1 outside of the table."""
    position = astype(cache_seqlens, "int64")[:, None] + arange(block_table, new_tokens)[None, :]
    end = block_table.shape[1] * block_size
    inside = (position >= 0) & (position < end)
    position = where(inside, position, 0)
    block = take_along_rows(astype(block_table, "int64"), position // block_size)
    return where(inside, block * block_size + position % block_size, -1).reshape(-1)


def _varlen(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: Array | None,
    block_table: Array | None,
    s_aux: Array | None,
    want_lse: bool,
) -> tuple[Array, Array | None]:
    refuse_gradients(q, k, v)
    check_like("q", q, q, 3, None)
    ndim = 3 if block_table is None else 4
    check_like("k", k, q, ndim, q.shape[2])
    check_like("v", v, q, ndim, None)
    num_tokens, num_heads, _ = q.shape
    band = _band(causal, window_size, alibi_slopes)
    score = _score(q, softmax_scale, softcap, alibi_slopes, s_aux)
    seq_lens = cu_seqlens_k[1:] - cu_seqlens_k[:-1]
    if block_table is None:  # each token is one block
        k, v = k[:, None], v[:, None]
        block_table = cu_seqlens_k[:-1, None] + arange(q, max(int(max_seqlen_k), 1))[None, :]
    cache = PagedKvCache(k, v, cache_dtype_of(k, q))
    out = empty_like(q, (num_tokens, num_heads, v.shape[3]))
    lse = empty_like(q, (num_heads, num_tokens), "float32") if want_lse else None
    query_lens = cu_seqlens_q[1:] - cu_seqlens_q[:-1]
    batch = {
        "query_start_loc": cu_seqlens_q,
        "seq_lens": seq_lens,
        "block_table": block_table,
        "num_actual_tokens": num_tokens,
        "max_query_len": int(max_seqlen_q),
        "max_seq_len": int(max_seqlen_k),
        **_positions(band, query_lens, seq_lens, int(max_seqlen_q)),
    }
    attend(q, cache, out, lse, band.mask, score, batch)
    return out, lse
