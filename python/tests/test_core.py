"""Plan, attention, write_kv_cache and merge_states against the reference."""

import numpy as np
import pytest
import quire_attn as qa

from reference import Batch, attend, check, host

MASKS = {
    "causal": (qa.Mask(), {"right": 0}),
    "full": (qa.Mask.full(), {}),
    "left": (qa.Mask.sliding_window(7), {"left": 6, "right": 0}),
    "both": (qa.Mask.sliding_window_both(7), {"left": 6, "right": 6}),
}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("mask", MASKS)
def test_random_batches(rng, convert, mask, dtype):
    for _ in range(5):
        batch = Batch(rng, dtype=dtype)
        quire_mask, band = MASKS[mask]
        plan = qa.Plan(mask=quire_mask, **batch.plan_arguments(convert))
        plan.update(**batch.update_arguments(convert))
        cache = qa.PagedKvCache(convert(batch.key_cache), convert(batch.value_cache))
        out = np.full((batch.num_tokens, batch.num_heads, batch.head_size), np.nan, dtype)
        lse = np.full((batch.num_heads, batch.num_tokens), np.nan, np.float32)
        output = convert(out)
        assert (
            qa.attention(plan, convert(batch.q), cache, output=output, lse=convert(lse)) is output
        )
        expected, expected_lse = batch.expected(**band)
        check(out, expected, dtype)  # the array that was given has the result: nothing was copied
        check(lse, expected_lse, dtype, "lse")
        if batch.num_tokens:
            check(qa.attention(plan, convert(batch.q), cache), expected, dtype)


@pytest.mark.parametrize("mine", ["plan", "call"])
def test_score_of_plan_and_of_call(rng, convert, mine):
    batch = Batch(rng)
    slopes = batch.draw(rng, batch.num_heads) * np.float32(0.1)
    sinks = batch.draw(rng, batch.num_heads)
    score = qa.Score(0.3, 2.0, convert(slopes), sinks=convert(sinks))
    plan = qa.Plan(**batch.plan_arguments(convert), score=score if mine == "plan" else qa.Score())
    plan.update(**batch.update_arguments(convert))
    cache = qa.PagedKvCache(convert(batch.key_cache), convert(batch.value_cache))
    out = qa.attention(plan, convert(batch.q), cache, score=score if mine == "call" else None)
    expected, _ = batch.expected(right=0, scale=0.3, softcap=2.0, slopes=slopes, sinks=sinks)
    check(out, expected)


def test_masks_of_the_batch(rng, convert):
    batch = Batch(rng, lens=[(5, 30), (4, 12), (6, 6), (1, 40)])
    causal = np.array([True, False, True, True])
    ranges = np.array([[[26, 29]], [[0, 0]], [[1, 4]], [[0, 0]]], np.int32)
    bias = batch.draw(rng, (6, 6))
    plan = qa.Plan(**batch.plan_arguments(convert))
    plan.update(
        **batch.update_arguments(convert), causal=convert(causal),
        mm_prefix_range=convert(ranges), qq_bias=convert(bias),
    )  # fmt: skip
    cache = qa.PagedKvCache(convert(batch.key_cache), convert(batch.value_cache))
    out = qa.attention(plan, convert(batch.q), cache)
    visible, biases = [], []
    for s, (m, n) in enumerate(batch.lens):
        p, j = np.arange(n - m, n)[:, None], np.arange(n)[None, :]
        start, end = ranges[s, 0]
        in_range = (start < end) & (p >= start) & (p <= end) & (j >= start) & (j <= end)
        visible.append((j <= p) | (not causal[s]) | in_range)
        own = np.zeros((m, n))
        own[:, n - m :] = bias[:m, :m]
        biases.append(own)
    expected, _ = batch.expected(visible=visible, bias=biases)
    check(out, expected)


def test_positions_and_merge(rng, convert):
    """Two halves of the keys, attended with their positions and merged, are attention over all."""
    batch = Batch(rng, block_size=16, lens=[(4, 60), (1, 50)])
    plan = qa.Plan(**batch.plan_arguments(convert))
    cache = qa.PagedKvCache(convert(batch.key_cache), convert(batch.value_cache))
    parts = []
    for first, last in ((0, 32), (32, 64)):
        lens = np.clip(batch.seq_lens - first, 0, last - first).astype(np.int32)
        plan.update(
            query_start_loc=convert(batch.query_start_loc),
            seq_lens=convert(lens),
            block_table=convert(np.ascontiguousarray(batch.block_table[:, first // 16 :])),
            num_actual_tokens=batch.num_tokens,
            kv_offset=convert(np.full(2, first, np.int32)),
            q_offset=convert(np.array([56, 49], np.int32)),
        )
        lse = convert(np.full((batch.num_heads, batch.num_tokens), np.nan, np.float32))
        parts += [qa.attention(plan, convert(batch.q), cache, lse=lse), lse]
    out, lse = qa.merge_states(*parts)
    expected, expected_lse = batch.expected(right=0)
    check(out, expected)
    check(lse, expected_lse, what="lse")


@pytest.mark.parametrize("layout", ["combined", "packed", "separate"])
def test_write_and_attend(rng, convert, layout):
    batch = Batch(rng)
    num_blocks, block_size, num_kv_heads, head_size = batch.key_cache.shape
    combined = np.full((num_blocks, 2, block_size, num_kv_heads, head_size), np.nan, np.float32)
    packed = np.full((num_blocks, num_kv_heads, block_size, 2 * head_size), np.nan, np.float32)
    cache = {
        "combined": lambda: qa.PagedKvCache.from_combined(convert(combined)),
        "packed": lambda: qa.PagedKvCache.from_packed(convert(packed), head_size),
        "separate": lambda: qa.PagedKvCache(convert(combined[:, 0]), convert(combined[:, 1])),
    }[layout]()
    slots = np.concatenate([*batch.slots, np.array([-1, -7])])  # negative: skipped
    keys = np.concatenate([*batch.k, batch.draw(rng, (2, num_kv_heads, head_size))])
    values = np.concatenate([*batch.v, batch.draw(rng, (2, num_kv_heads, head_size))])
    qa.write_kv_cache(convert(keys), convert(values), cache, convert(slots))
    np.testing.assert_array_equal(host(cache.key), batch.key_cache)
    np.testing.assert_array_equal(host(cache.value), batch.value_cache)
    if layout == "packed":  # K first in each row
        slots_first = packed.swapaxes(1, 2)
        np.testing.assert_array_equal(slots_first[..., :head_size], batch.key_cache)
    plan = qa.Plan(**batch.plan_arguments(convert))
    plan.update(**batch.update_arguments(convert))
    check(qa.attention(plan, convert(batch.q), cache), batch.expected(right=0)[0])


def test_int8_cache_with_a_scale_for_each_token_and_head(rng, convert):
    batch = Batch(rng)
    shape = batch.key_cache.shape
    key, value = np.full(shape, 99, np.int8), np.full(shape, 99, np.int8)
    k_scales, v_scales = (np.full(shape[:3], np.nan, np.float32) for _ in range(2))
    cache = qa.PagedKvCache(
        convert(key), convert(value), "int8_per_token_head",
        k_scale_cache=convert(k_scales), v_scale_cache=convert(v_scales),
    )  # fmt: skip
    qa.write_kv_cache(
        convert(np.concatenate(batch.k)), convert(np.concatenate(batch.v)), cache,
        convert(np.concatenate(batch.slots)),
    )  # fmt: skip
    for s, slots in enumerate(batch.slots):  # what the cache holds, read back
        at = slots // batch.block_size, slots % batch.block_size
        np.testing.assert_allclose(key[at] * k_scales[at][..., None], batch.k[s], atol=0.03)
        batch.k[s] = key[at] * k_scales[at][..., None]
        batch.v[s] = value[at] * v_scales[at][..., None]
    plan = qa.Plan(**batch.plan_arguments(convert), kv_cache_dtype="int8_per_token_head")
    plan.update(**batch.update_arguments(convert))
    check(qa.attention(plan, convert(batch.q), cache), batch.expected(right=0)[0])


@pytest.mark.parametrize("cache_dtype", ["fp8", "fp8_e5m2"])
def test_fp8_cache_with_scales(rng, convert, cache_dtype):
    batch = Batch(rng)
    key, value = (np.full(batch.key_cache.shape, 0x7F, np.uint8) for _ in range(2))  # NaN
    k_scale, v_scale = np.array([0.25], np.float32), 0.5
    cache = qa.PagedKvCache(convert(key), convert(value), cache_dtype, convert(k_scale), v_scale)
    keys, values = np.concatenate(batch.k), np.concatenate(batch.v)
    slots = convert(np.concatenate(batch.slots))
    qa.write_kv_cache(convert(keys), convert(values), cache, slots)
    plan = qa.Plan(**batch.plan_arguments(convert), kv_cache_dtype=cache_dtype)
    plan.update(**batch.update_arguments(convert))
    for s, slots in enumerate(batch.slots):
        at = slots // batch.block_size, slots % batch.block_size
        batch.k[s] = fp8_values(key[at], cache_dtype) * 0.25
        batch.v[s] = fp8_values(value[at], cache_dtype) * 0.5
    check(qa.attention(plan, convert(batch.q), cache), batch.expected(right=0)[0])


def fp8_values(codes, cache_dtype):
    """What finite codes of an fp8 type mean."""
    mantissa_bits, bias = (2, 15) if cache_dtype == "fp8_e5m2" else (3, 7)
    mantissa = (codes & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    exponent = ((codes & 0x7F) >> mantissa_bits).astype(int)
    size = np.where(
        exponent > 0, (1 + mantissa) * 2.0 ** (exponent - bias), mantissa * 2.0 ** (1 - bias)
    )
    return np.where(codes & 0x80, -size, size)


def test_encoder_attention_reads_key_and_value(rng, convert):
    q, k, v = (rng.standard_normal((9, 4, 32)).astype(np.float32) for _ in range(3))
    start = np.array([0, 2, 9], np.int32)
    plan = qa.Plan(num_heads=4, num_kv_heads=4, head_size=32, dtype=np.float32, type="encoder_only",
                   device=convert.device)  # fmt: skip
    plan.update(query_start_loc=convert(start), num_actual_tokens=9)
    out = qa.attention(plan, convert(q), key=convert(k), value=convert(v))
    check(out, np.concatenate([attend(q[a:b], k[a:b], v[a:b])[0] for a, b in ((0, 2), (2, 9))]))


def test_the_reference_backend_and_what_a_plan_tells(rng):
    batch = Batch(rng)
    plan = qa.Plan(**batch.plan_arguments(), backend="reference", batch_invariant=True)
    plan.update(**batch.update_arguments(lambda array: array), check_indices=True)
    assert plan.backend_name == "reference"
    assert plan.workspace_bytes >= 0
    assert "reference" in str(plan)
    cache = qa.PagedKvCache(batch.key_cache, batch.value_cache)
    check(qa.attention(plan, batch.q, cache), batch.expected(right=0)[0])


def test_a_plan_keeps_its_batch_alive(rng):
    batch = Batch(rng, lens=[(1, 100), (3, 70)])
    plan = qa.Plan(**batch.plan_arguments())
    plan.update(**batch.update_arguments(lambda array: array.copy()))  # nobody else has the copies
    junk = [np.full((64, 1024), -1, np.int32) for _ in range(8)]
    cache = qa.PagedKvCache(batch.key_cache, batch.value_cache)
    check(qa.attention(plan, batch.q, cache), batch.expected(right=0)[0])
    assert len(junk) == 8
    assert [array is not None for array in plan._batch[:3]] == [True] * 3
