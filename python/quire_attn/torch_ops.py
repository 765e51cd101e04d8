"""Quire's functions as torch operators, for torch.compile: imported when that traces a call.

Calls outside of torch.compile do not go this way, which costs a few microseconds. The operators
run the same functions; `traced_...` are what those functions become while torch.compile looks at
them. Defined by torch.library.Library rather than torch.library.custom_op, which costs ten times
as much a call.
"""

from __future__ import annotations

from typing import Any

import torch

from . import core, flash, unified
from .core import PagedKvCache, Plan, Score

_library = torch.library.Library("quire_attn", "DEF")


def _define(schema: str, run: Any, fake: Any) -> None:
    name = schema.partition("(")[0]
    _library.define(schema)
    for key in ("CPU", "CUDA"):
        _library.impl(name, run, key)
    torch.library.register_fake(f"quire_attn::{name}", fake, lib=_library)


def _nothing(*args: Any) -> None:
    pass


def _split(scale: Any) -> tuple[float, torch.Tensor | None]:
    """A scale as two arguments: a number, and a tensor that counts if it is there."""
    return (1.0, scale) if isinstance(scale, torch.Tensor) else (float(scale), None)


def _join(number: float, tensor: torch.Tensor | None) -> Any:
    return number if tensor is None else tensor


# FlashAttention's functions. The cache is written only where tokens are appended.

_FLASH = (
    "Tensor? cache_seqlens, int cache_len, Tensor? cache_batch_idx, Tensor? block_table, "
    "Tensor? cache_leftpad, float softmax_scale, bool causal, int left, int right, float softcap, "
    "Tensor? alibi_slopes, Tensor? s_aux) -> (Tensor, Tensor)"
)


def _run_append(
    q, k_cache, v_cache, k, v, cache_seqlens, cache_len, cache_batch_idx, block_table,
    cache_leftpad, softmax_scale, causal, left, right, softcap, alibi_slopes, s_aux,
):  # fmt: skip
    if cache_seqlens is None:
        cache_seqlens = None if cache_len < 0 else cache_len
    return flash._with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens, cache_batch_idx, block_table, cache_leftpad,
        softmax_scale, causal, (left, right), softcap, alibi_slopes, s_aux, True,
    )  # fmt: skip


def _fake_append(q, k_cache, v_cache, *args):
    batch_size, query_len, num_heads, _ = q.shape
    lse = q.new_empty((num_heads, batch_size, query_len), dtype=torch.float32)
    return q.new_empty((batch_size, query_len, num_heads, v_cache.shape[3])), lse.swapaxes(0, 1)


_define(
    "flash_attn_append(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, "
    + _FLASH,
    _run_append,
    _fake_append,
)
_define(
    "flash_attn(Tensor q, Tensor k_cache, Tensor v_cache, " + _FLASH,
    lambda q, k_cache, v_cache, *args: _run_append(q, k_cache, v_cache, None, None, *args),
    _fake_append,
)


def traced_flash_attn(
    q, k_cache, v_cache, k, v, cache_seqlens, cache_batch_idx, block_table, cache_leftpad,
    softmax_scale, causal, window_size, softcap, alibi_slopes, s_aux,
):  # fmt: skip
    """flash_attn_func and flash_attn_with_kvcache; returns output and lse."""
    is_number = isinstance(cache_seqlens, int)
    rest = (
        None if is_number else cache_seqlens, cache_seqlens if is_number else -1, cache_batch_idx,
        block_table, cache_leftpad, softmax_scale or 0.0, causal, window_size[0], window_size[1],
        softcap, alibi_slopes, s_aux,
    )  # fmt: skip
    if k is None:
        return torch.ops.quire_attn.flash_attn(q, k_cache, v_cache, *rest)
    return torch.ops.quire_attn.flash_attn_append(q, k_cache, v_cache, k, v, *rest)


def _run_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, left,
    right, softcap, alibi_slopes, block_table, s_aux,
):  # fmt: skip
    return flash._varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal,
        (left, right), softcap, alibi_slopes, block_table, s_aux, True,
    )  # fmt: skip


def _fake_varlen(q, k, v, *args):
    num_tokens, num_heads, _ = q.shape
    lse = q.new_empty((num_heads, num_tokens), dtype=torch.float32)
    return q.new_empty((num_tokens, num_heads, v.shape[-1])), lse


_define(
    "flash_attn_varlen(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
    "int max_seqlen_q, int max_seqlen_k, float softmax_scale, bool causal, int left, int right, "
    "float softcap, Tensor? alibi_slopes, Tensor? block_table, Tensor? s_aux) -> (Tensor, Tensor)",
    _run_varlen,
    _fake_varlen,
)


def traced_flash_attn_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal,
    window_size, softcap, alibi_slopes, block_table, s_aux,
):  # fmt: skip
    """flash_attn_varlen_func; returns output and lse."""
    return torch.ops.quire_attn.flash_attn_varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale or 0.0,
        causal, window_size[0], window_size[1], softcap, alibi_slopes, block_table, s_aux,
    )  # fmt: skip


# vLLM's.


def _run_unified(
    q, k, v, out, cu_seqlens_q, max_seqlen_q, seqused_k, max_seqlen_k, softmax_scale, causal,
    causal_flags, left, block_table, softcap, q_descale, q_descale_tensor, k_descale,
    k_descale_tensor, v_descale, v_descale_tensor, alibi_slopes, has_output_scale, output_scale,
    output_scale_tensor, qq_bias, sinks, mm_prefix_range, use_alibi_sqrt, kv_quant_mode,
    k_scale_cache, v_scale_cache, chunk_lookback, rswa_prefix_lens, rswa_window, clamp,
):  # fmt: skip
    unified.unified_attention(
        q, k, v, out, cu_seqlens_q, max_seqlen_q, seqused_k, max_seqlen_k, softmax_scale,
        causal if causal_flags is None else causal_flags, (left, -1), block_table, softcap,
        _join(q_descale, q_descale_tensor), _join(k_descale, k_descale_tensor),
        _join(v_descale, v_descale_tensor), alibi_slopes=alibi_slopes,
        output_scale=_join(output_scale, output_scale_tensor) if has_output_scale else None,
        qq_bias=qq_bias, sinks=sinks, mm_prefix_range=mm_prefix_range,
        use_alibi_sqrt=use_alibi_sqrt, kv_quant_mode=kv_quant_mode, k_scale_cache=k_scale_cache,
        v_scale_cache=v_scale_cache, chunk_lookback=chunk_lookback,
        rswa_prefix_lens=rswa_prefix_lens, rswa_window=rswa_window,
        mm_prefix_clamp_sliding_window=clamp,
    )  # fmt: skip


_define(
    "unified_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) out, Tensor cu_seqlens_q, "
    "int max_seqlen_q, Tensor seqused_k, int max_seqlen_k, float softmax_scale, bool causal, "
    "Tensor? causal_flags, int left, Tensor block_table, float softcap, float q_descale, "
    "Tensor? q_descale_tensor, float k_descale, Tensor? k_descale_tensor, float v_descale, "
    "Tensor? v_descale_tensor, Tensor? alibi_slopes, bool has_output_scale, float output_scale, "
    "Tensor? output_scale_tensor, Tensor? qq_bias, Tensor? sinks, Tensor? mm_prefix_range, "
    "bool use_alibi_sqrt, int kv_quant_mode, Tensor? k_scale_cache, Tensor? v_scale_cache, "
    "int chunk_lookback, Tensor? rswa_prefix_lens, int rswa_window, bool clamp) -> ()",
    _run_unified,
    _nothing,
)


def traced_unified_attention(
    q, k, v, out, cu_seqlens_q, max_seqlen_q, seqused_k, max_seqlen_k, softmax_scale, causal,
    window_size, block_table, softcap, q_descale, k_descale, v_descale, alibi_slopes, output_scale,
    qq_bias, sinks, mm_prefix_range, use_alibi_sqrt, kv_quant_mode, k_scale_cache, v_scale_cache,
    chunk_lookback, rswa_prefix_lens, rswa_window, clamp,
):  # fmt: skip
    """unified_attention."""
    per_sequence = isinstance(causal, torch.Tensor)
    scales = [_split(1.0 if s is None else s) for s in (q_descale, k_descale, v_descale)]
    torch.ops.quire_attn.unified_attention(
        q, k, v, out, cu_seqlens_q, max_seqlen_q, seqused_k, max_seqlen_k, softmax_scale,
        True if per_sequence else causal, causal if per_sequence else None, window_size[0],
        block_table, softcap, *scales[0], *scales[1], *scales[2], alibi_slopes,
        output_scale is not None, *_split(1.0 if output_scale is None else output_scale), qq_bias,
        sinks, mm_prefix_range, use_alibi_sqrt, kv_quant_mode, k_scale_cache, v_scale_cache,
        chunk_lookback, rswa_prefix_lens, rswa_window, clamp,
    )  # fmt: skip


# Quire's own. Plans travel by number.

_CACHE = (
    "str cache_dtype, float k_scale, Tensor? k_scale_tensor, float v_scale, Tensor? v_scale_tensor"
)


def _cache(key, value, dtype, k_scale, k_tensor, v_scale, v_tensor, k_scale_cache, v_scale_cache):
    if key is None:
        return None
    scales = (_join(k_scale, k_tensor), _join(v_scale, v_tensor))
    return PagedKvCache(key, value, dtype, *scales, k_scale_cache, v_scale_cache)


def _run_attention(
    plan, query, key_cache, value_cache, cache_dtype, k_scale, k_tensor, v_scale, v_tensor,
    k_scale_cache, v_scale_cache, key, value, output, lse, own_score, softmax_scale, soft_cap,
    alibi_slopes, alibi_sqrt, sinks, q_scale, q_tensor, has_output_scale, output_scale,
    output_tensor, output_block_scale,
):  # fmt: skip
    core.attention(
        core.plan_of(plan),
        query,
        _cache(key_cache, value_cache, cache_dtype, k_scale, k_tensor, v_scale, v_tensor,
               k_scale_cache, v_scale_cache),
        key=key, value=value, output=output, lse=lse,
        score=Score(softmax_scale, soft_cap, alibi_slopes, alibi_sqrt, sinks) if own_score else
        None, q_scale=_join(q_scale, q_tensor),
        output_scale=_join(output_scale, output_tensor) if has_output_scale else None,
        output_block_scale=output_block_scale,
    )  # fmt: skip


_define(
    "attention(int plan, Tensor query, Tensor? key_cache, Tensor? value_cache, " + _CACHE + ", "
    "Tensor? k_scale_cache, Tensor? v_scale_cache, Tensor? key, Tensor? value, "
    "Tensor(a!) output, Tensor(b!)? lse, bool own_score, float softmax_scale, float soft_cap, "
    "Tensor? alibi_slopes, bool alibi_sqrt, Tensor? sinks, float q_scale, Tensor? q_tensor, "
    "bool has_output_scale, float output_scale, Tensor? output_tensor, "
    "Tensor(c!)? output_block_scale) -> ()",
    _run_attention,
    _nothing,
)


def traced_attention(
    plan: Plan, query, kv_cache, key, value, output, lse, score, q_scale, output_scale,
    output_block_scale,
):  # fmt: skip
    """attention(); returns the output."""
    if output is None:
        output = query.new_empty((query.shape[0], plan.num_heads, plan.head_size_v))
    cache = (None, None, "auto", 1.0, None, 1.0, None, None, None)
    if kv_cache is not None:
        cache = (
            kv_cache.key, kv_cache.value, kv_cache.dtype, *_split(kv_cache.k_scale),
            *_split(kv_cache.v_scale), kv_cache.k_scale_cache, kv_cache.v_scale_cache,
        )  # fmt: skip
    own_score = (False, 0.0, 0.0, None, False, None)
    if score is not None:
        own_score = (
            True, score.softmax_scale, score.soft_cap, score.alibi_slopes, score.alibi_sqrt,
            score.sinks,
        )  # fmt: skip
    torch.ops.quire_attn.attention(
        plan.number, query, *cache, key, value, output, lse, *own_score, *_split(q_scale),
        output_scale is not None, *_split(1.0 if output_scale is None else output_scale),
        output_block_scale,
    )  # fmt: skip
    return output


def _run_write(
    key, value, key_cache, value_cache, cache_dtype, k_scale, k_tensor, v_scale, v_tensor,
    k_scale_cache, v_scale_cache, slot_mapping, backend,
):  # fmt: skip
    cache = _cache(
        key_cache, value_cache, cache_dtype, k_scale, k_tensor, v_scale, v_tensor, k_scale_cache,
        v_scale_cache,
    )  # fmt: skip
    core.write_kv_cache(key, value, cache, slot_mapping, backend=backend)


_define(
    "write_kv_cache(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, "
    + _CACHE
    + ", Tensor(c!)? k_scale_cache, Tensor(d!)? v_scale_cache, Tensor slot_mapping, str backend)"
    " -> ()",
    _run_write,
    _nothing,
)


def traced_write_kv_cache(key, value, kv_cache, slot_mapping, backend):
    """write_kv_cache()."""
    torch.ops.quire_attn.write_kv_cache(
        key, value, kv_cache.key, kv_cache.value, kv_cache.dtype, *_split(kv_cache.k_scale),
        *_split(kv_cache.v_scale), kv_cache.k_scale_cache, kv_cache.v_scale_cache, slot_mapping,
        backend,
    )  # fmt: skip


def _run_merge(o_a, lse_a, o_b, lse_b, output, lse, backend):
    core.merge_states(o_a, lse_a, o_b, lse_b, output, lse, backend=backend)


_define(
    "merge_states(Tensor o_a, Tensor lse_a, Tensor o_b, Tensor lse_b, Tensor(a!) output, "
    "Tensor(b!) lse, str backend) -> ()",
    _run_merge,
    _nothing,
)


def traced_merge_states(o_a, lse_a, o_b, lse_b, output, lse, backend):
    """merge_states(); returns output and lse."""
    output = torch.empty_like(o_a) if output is None else output
    lse = torch.empty_like(lse_a) if lse is None else lse
    torch.ops.quire_attn.merge_states(o_a, lse_a, o_b, lse_b, output, lse, backend)
    return output, lse
