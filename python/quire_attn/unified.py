"""vLLM's unified_attention, by its argument names, on Quire."""

from __future__ import annotations

from typing import Any

from .arrays import Array, dtype_name, is_tracing, refuse_gradients
from .core import Mask, PagedKvCache, Score
from .one_shot import attend, cache_dtype_of, check_like


def unified_attention(
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    cu_seqlens_q: Array,
    max_seqlen_q: int,
    seqused_k: Array,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool | Array,
    window_size: tuple[int, int],
    block_table: Array,
    softcap: float,
    q_descale: float | Array | None,
    k_descale: float | Array | None,
    v_descale: float | Array | None,
    seq_threshold_3D: Any = None,  # noqa: N803
    num_par_softmax_segments: Any = None,
    softmax_segm_output: Any = None,
    softmax_segm_max: Any = None,
    softmax_segm_expsum: Any = None,
    alibi_slopes: Array | None = None,
    output_scale: float | Array | None = None,
    qq_bias: Array | None = None,
    sinks: Array | None = None,
    mm_prefix_range: Array | None = None,
    use_alibi_sqrt: bool = False,
    kv_quant_mode: int = 0,
    k_scale_cache: Array | None = None,
    v_scale_cache: Array | None = None,
    chunk_lookback: int = -1,
    rswa_prefix_lens: Array | None = None,
    rswa_window: int = 0,
    mm_prefix_clamp_sliding_window: bool = False,
) -> None:
    """Attention of a batch over a paged cache, into `out`.

    q: [num_tokens, num_heads, head_size]; k, v: [num_blocks, block_size, num_kv_heads, head_size].
    `causal` may be an array, bool or uint8 [num_seqs]. window_size[0] + 1 is the window, -1 none.
    The scratch space of Triton's kernels (seq_threshold_3D to softmax_segm_expsum) is not used.
    kv_quant_mode: vLLM's KVQuantMode, 0 none, 1 fp8, 2 int8, 3 fp8 and 4 int4 with a scale for each
    token and head, which are in k_scale_cache and v_scale_cache. int4: k and v are bytes, head_size
    / 2 in a row, as write_kv_cache() and vLLM write them; queries and outputs are rotated in here.
    """
    if is_tracing(q):
        from . import torch_ops

        torch_ops.traced_unified_attention(
            q, k, v, out, cu_seqlens_q, max_seqlen_q, seqused_k, max_seqlen_k, softmax_scale,
            causal, window_size, block_table, softcap, q_descale, k_descale, v_descale,
            alibi_slopes, output_scale, qq_bias, sinks, mm_prefix_range, use_alibi_sqrt,
            kv_quant_mode, k_scale_cache, v_scale_cache, chunk_lookback, rswa_prefix_lens,
            rswa_window, mm_prefix_clamp_sliding_window,
        )  # fmt: skip
        return
    refuse_gradients(q, k, v, out)
    check_like("k", k, q, 4, None)
    check_like("v", v, q, 4, None)
    per_sequence = not isinstance(causal, bool)
    cache = PagedKvCache(
        k,
        v,
        _cache_dtype(k, q, int(kv_quant_mode)),
        1.0 if k_descale is None else k_descale,
        1.0 if v_descale is None else v_descale,
        k_scale_cache,
        v_scale_cache,
    )
    batch = {
        "query_start_loc": cu_seqlens_q,
        "seq_lens": seqused_k,
        "block_table": block_table,
        "num_actual_tokens": q.shape[0],
        "max_query_len": max_seqlen_q,
        "max_seq_len": max_seqlen_k,
        "causal": causal if per_sequence else None,
        "mm_prefix_range": mm_prefix_range,
        "visible_prefix_lens": rswa_prefix_lens if rswa_window else None,
        "qq_bias": qq_bias,
    }
    window = rswa_window or window_size[0] + 1
    mask = _mask(per_sequence or causal, window, chunk_lookback, mm_prefix_clamp_sliding_window)
    attend(
        q,
        cache,
        out,
        None,
        mask,
        Score(softmax_scale, softcap, alibi_slopes, use_alibi_sqrt, sinks),
        batch,
        q_scale=1.0 if q_descale is None else q_descale,
        output_scale=output_scale,
    )


def _mask(causal: bool, window: int, chunk_lookback: int, clamp_ranges: bool) -> Mask:
    if window <= 0:
        return Mask(causal=causal)
    if chunk_lookback >= 0:
        return Mask(causal, "chunked", window // (chunk_lookback + 1), chunk_lookback)
    return Mask(causal, "left", window, clamp_ranges=clamp_ranges)


def _cache_dtype(key_cache: Array, query: Array, kv_quant_mode: int) -> str:
    kinds = {2: "int8_per_token_head", 3: "fp8_per_token_head", 4: "int4_per_token_head"}
    if kv_quant_mode in kinds:
        return kinds[kv_quant_mode]
    if kv_quant_mode not in (0, 1):
        raise NotImplementedError(f"kv_quant_mode: expected 0 to 4, got {kv_quant_mode}")
    if kv_quant_mode == 1 and dtype_name(key_cache.dtype) == "float8_e5m2":
        return "fp8_e5m2"
    return "fp8_e4m3" if kv_quant_mode == 1 else cache_dtype_of(key_cache, query)
