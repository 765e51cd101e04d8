"""int4 caches in Python: vLLM's bytes and outputs, as its Triton kernels left them."""

import golden
import numpy as np
import pytest
import quire_attn as qa

from reference import Batch, check, host

CASES = list(golden.cases("int4_pth"))


@pytest.fixture(params=CASES, ids=[name for name, _, _ in CASES])
def case(request):
    return request.param[1:]


def cache_of(kv_cache, k_scales, v_scales):
    return qa.PagedKvCache.from_combined(
        kv_cache, "int4_per_token_head", k_scale_cache=k_scales, v_scale_cache=v_scales
    )


def call(convert, out, query, kv_cache, k_scales, v_scales, case, **other):
    k, v = (convert(kv_cache)[:, i] for i in range(2))
    arguments = {
        "cu_seqlens_q": convert(case["query_start_loc"]),
        "max_seqlen_q": int(np.diff(case["query_start_loc"]).max()),
        "seqused_k": convert(case["seq_lens"]),
        "max_seqlen_k": int(case["seq_lens"].max()),
        "causal": True,
        "window_size": (-1, -1),
        "block_table": convert(case["block_table"]),
        "softcap": 0.0,
        "q_descale": None,
        "k_descale": None,
        "v_descale": None,
        "kv_quant_mode": 4,
        "k_scale_cache": convert(k_scales),
        "v_scale_cache": convert(v_scales),
        **other,
    }
    qa.unified_attention(convert(query), k, v, convert(out), **arguments)


def test_unified_attention_gives_vllms_outputs(case, convert):
    fields, t = case
    out = np.full(t["output"].shape, np.nan, t["output"].dtype)
    call(
        convert, out, t["query"], t["kv_cache"], t["k_scale_cache"], t["v_scale_cache"], t,
        softmax_scale=fields["softmax_scale"],
    )  # fmt: skip
    out, expected = (x.astype(np.float64) for x in (out, t["output"]))
    assert np.linalg.norm(out - expected) <= 6e-3 * np.linalg.norm(expected)


def test_written_bytes_are_vllms(case, convert):
    _, t = case
    if "key" not in t:
        pytest.skip("a case without its write")
    kv_cache = np.zeros_like(t["kv_cache"])
    scales = [np.zeros_like(t[name]) for name in ("k_scale_cache", "v_scale_cache")]
    slots = np.arange(t["key"].shape[0], dtype=np.int64)
    qa.write_kv_cache(
        convert(t["key"]), convert(t["value"]), cache_of(convert(kv_cache), *map(convert, scales)),
        convert(slots),
    )  # fmt: skip
    for actual, name in zip(scales, ("k_scale_cache", "v_scale_cache"), strict=True):
        steps = (x.view(np.uint32) & ~np.uint32(15) for x in (actual, t[name]))
        np.testing.assert_array_equal(*steps)
    codes, expected = (np.stack([x & 15, x >> 4]).astype(int) for x in (kv_cache, t["kv_cache"]))
    # Triton divides with an approximate instruction.
    assert (codes != expected).mean() < 0.005
    assert abs(codes - expected).max() <= 1


def rounding_error(batch, k_scales, v_scales, softmax_scale):
    """The norm that outputs are off by where each code is off by up to half a step, at random."""
    total = 0.0
    for q, k, v, slots in zip(batch.rows(batch.q), batch.k, batch.v, batch.slots, strict=True):
        q = q.astype(np.float64)
        # Variance of an element: of its rotated vector's codes, which is sqrt(size) times as long.
        of_k, of_v = (
            scales.reshape(-1, batch.num_kv_heads)[slots] ** 2 / 12 / x.shape[2]
            for scales, x in ((k_scales, k), (v_scales, v))
        )
        visible = np.arange(len(k)) <= np.arange(len(q))[:, None] + len(k) - len(q)
        for h in range(batch.num_heads):
            g = h * batch.num_kv_heads // batch.num_heads
            weight = np.where(visible, np.exp(q[:, h] @ k[:, g].T * softmax_scale), 0.0)
            weight /= weight.sum(1, keepdims=True)
            # A score that is off moves the output along v - output.
            far = ((v[:, g] - (weight @ v[:, g])[:, None]) ** 2).sum(2)
            of_scores = softmax_scale**2 * (q[:, h] ** 2).sum(1)[:, None] * of_k[:, g]
            total += (weight**2 * (of_scores * far + v.shape[2] * of_v[:, g])).sum()
    return total**0.5


def test_packed_rows_and_other_sizes_of_values(rng, convert):
    """As close to exact attention as 16 steps get; K and V side by side, V half as long."""
    batch = Batch(rng, num_kv_heads=2, head_size=64, head_size_v=32, block_size=16)
    blocks = batch.key_cache.shape[0]
    packed = np.zeros((blocks, 2, 16, 32 + 16), np.uint8)
    scales = [np.zeros((blocks, 16, 2), np.float32) for _ in range(2)]
    cache = qa.PagedKvCache.from_packed(
        convert(packed), 64, "int4_per_token_head",
        k_scale_cache=convert(scales[0]), v_scale_cache=convert(scales[1]),
    )  # fmt: skip
    keys, values, slots = (np.concatenate(x) for x in (batch.k, batch.v, batch.slots))
    qa.write_kv_cache(convert(keys), convert(values), cache, convert(slots))
    out = np.full((batch.num_tokens, batch.num_heads, 32), np.nan, np.float32)
    arguments = {
        "cu_seqlens_q": batch.query_start_loc, "seqused_k": batch.seq_lens,
        "block_table": batch.block_table,
    }  # fmt: skip
    qa.unified_attention(
        convert(batch.q), cache.key, cache.value, convert(out),
        **{name: convert(array) for name, array in arguments.items()},
        max_seqlen_q=batch.max_query_len, max_seqlen_k=batch.max_seq_len, softmax_scale=0.125,
        causal=True, window_size=(-1, -1), softcap=0.0, q_descale=None, k_descale=None,
        v_descale=None, kv_quant_mode=4, k_scale_cache=convert(scales[0]),
        v_scale_cache=convert(scales[1]),
    )  # fmt: skip
    expected, _ = batch.expected(right=0, scale=0.125)
    assert np.isfinite(out).all()
    # 200 seeds: 0.78 to 1.30 of it.
    assert np.linalg.norm(out - expected) <= 1.6 * rounding_error(batch, *scales, 0.125)
    # and no different from the planned call over the same bytes
    plan = qa.Plan(
        **batch.plan_arguments(convert), score=qa.Score(0.125), kv_cache_dtype="int4_per_token_head"
    )
    plan.update(**batch.update_arguments(convert))
    check(out, host(qa.attention(plan, convert(batch.q), cache)).astype(np.float64))


def test_the_mode_is_checked(convert):
    x = np.ones((1, 1, 8), np.float32)
    cache, one = np.zeros((1, 2, 4, 1, 4), np.uint8), np.ones(1, np.int32)
    batch = {
        "query_start_loc": np.array([0, 1], np.int32), "seq_lens": one, "block_table": one[:, None],
    }  # fmt: skip
    scales = np.ones((1, 4, 1), np.float32)
    with pytest.raises(NotImplementedError, match="kv_quant_mode"):
        call(
            convert, x, x, cache, scales, scales, batch, softmax_scale=1.0, kv_quant_mode=5
        )  # fmt: skip
    with pytest.raises(ValueError, match="k_scale_cache"):
        call(convert, x, x, cache, scales[:, :2], scales, batch, softmax_scale=1.0)
