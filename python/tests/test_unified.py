"""unified_attention, with vLLM's argument names, against the reference."""

import numpy as np
import pytest
import quire_attn as qa

from reference import Batch, check, host


def call(batch, convert, out, **other):
    arguments = {
        "q": convert(batch.q),
        "k": convert(batch.key_cache),
        "v": convert(batch.value_cache),
        "out": convert(out),
        "cu_seqlens_q": convert(batch.query_start_loc),
        "max_seqlen_q": batch.max_query_len,
        "seqused_k": convert(batch.seq_lens),
        "max_seqlen_k": batch.max_seq_len,
        "softmax_scale": 0.2,
        "causal": True,
        "window_size": (-1, -1),
        "block_table": convert(batch.block_table),
        "softcap": 0.0,
        "q_descale": None,
        "k_descale": None,
        "v_descale": None,
    }
    assert qa.unified_attention(**{**arguments, **other}) is None


def poisoned_output(batch):
    return np.full((batch.num_tokens, batch.num_heads, batch.head_size), np.nan, np.float32)


@pytest.mark.parametrize("window", [-1, 8])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_random_batches(rng, convert, window, softcap):
    for _ in range(4):
        batch = Batch(rng)
        sinks = batch.draw(rng, batch.num_heads)
        slopes = batch.draw(rng, batch.num_heads) * np.float32(0.1)
        out = poisoned_output(batch)
        call(
            batch, convert, out, window_size=(window, 0) if window >= 0 else (-1, -1),
            softcap=softcap, sinks=convert(sinks), alibi_slopes=convert(slopes),
        )  # fmt: skip
        expected, _ = batch.expected(
            left=window, right=0, scale=0.2, softcap=softcap, sinks=sinks, slopes=slopes
        )
        check(out, expected)


def test_masks_of_vllm_033(rng, convert):
    """Causality by sequence, chunks with lookback, a visible prefix, ranges cut at the window."""
    batch = Batch(rng, lens=[(7, 50), (3, 33), (1, 64)])
    p = [np.arange(n - m, n)[:, None] for m, n in batch.lens]
    j = [np.arange(n)[None, :] for _, n in batch.lens]
    both = list(zip(p, j, strict=True))

    def expect(visible, **arguments):
        out = poisoned_output(batch)
        call(batch, convert, out, **arguments)
        check(out, batch.expected(visible=visible, scale=0.2)[0])

    flags = np.array([1, 0, 1], np.uint8)
    window = [
        (abs(a - b) < 9) & ((b <= a) | (f == 0)) for (a, b), f in zip(both, flags, strict=True)
    ]
    expect(window, causal=convert(flags), window_size=(8, 0))
    chunks = [(b <= a) & (a // 8 - b // 8 <= 1) for a, b in both]
    expect(chunks, window_size=(15, 0), chunk_lookback=1)
    prefix = np.array([5, 0, 12], np.int32)
    rswa = [(b <= a) & ((a - b < 10) | (b < r)) for (a, b), r in zip(both, prefix, strict=True)]
    expect(rswa, rswa_prefix_lens=convert(prefix), rswa_window=10)
    ranges = np.array([[[40, 49]], [[2, 32]], [[0, 0]]], np.int32)
    clamped = []
    for (a, b), (start, end) in zip(both, ranges[:, 0], strict=True):
        in_range = (start < end) & (a >= start) & (a <= end) & (b >= start) & (b <= end)
        clamped.append((a - b < 12) & ((b <= a) | in_range))
    expect(
        clamped, mm_prefix_range=convert(ranges), window_size=(11, 0),
        mm_prefix_clamp_sliding_window=True,
    )  # fmt: skip


def test_fp8_cache_with_expanded_scales(rng, tensors):
    """vLLM gives scales expanded to [num_seqs, num_kv_heads]: one number all the same."""
    import torch

    batch = Batch(rng)
    key, value = (np.zeros(batch.key_cache.shape, np.uint8) for _ in range(2))
    scale = tensors(np.array([0.5], np.float32))
    cache = qa.PagedKvCache(tensors(key), tensors(value), "fp8", scale, scale)
    keys, values, slots = (np.concatenate(x) for x in (batch.k, batch.v, batch.slots))
    qa.write_kv_cache(tensors(keys), tensors(values), cache, tensors(slots))
    plan = qa.Plan(**batch.plan_arguments(tensors), score=qa.Score(0.2), kv_cache_dtype="fp8")
    plan.update(**batch.update_arguments(tensors))
    expected = host(qa.attention(plan, tensors(batch.q), cache))
    out = poisoned_output(batch)
    expanded = torch.tensor(0.5, device=tensors.device).expand(batch.num_seqs, batch.num_kv_heads)
    batch.key_cache, batch.value_cache = key, value
    call(batch, tensors, out, kv_quant_mode=1, k_descale=expanded, v_descale=expanded)
    np.testing.assert_array_equal(out, expected)
    with pytest.raises(ValueError, match="k_scale"):
        call(
            batch, tensors, out, kv_quant_mode=1, k_descale=torch.ones(2, 3), v_descale=expanded
        )  # fmt: skip
