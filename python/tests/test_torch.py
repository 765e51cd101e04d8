"""What is torch's own: gradients, element types, torch.compile."""

import numpy as np
import pytest
import quire_attn as qa

from reference import Batch, attend, check, host

torch = pytest.importorskip("torch")


@pytest.fixture
def convert(device):
    """Tensors of NumPy's arrays, for tests that look at what a call returns."""

    def to_device(array):
        return torch.from_numpy(array).to(device)

    to_device.device = device
    return to_device


def test_gradients_are_refused(rng, convert):
    x = torch.randn(1, 4, 2, 16, requires_grad=True, device=convert.device)
    y = x.detach()
    for arguments in ((x, y, y), (y, x, y), (y, y, x)):
        with pytest.raises(ValueError, match="requires grad"):
            qa.flash_attn_func(*arguments)
    with torch.no_grad():  # parameters of a model that serves
        qa.flash_attn_func(x, x, x)
    batch = Batch(rng)
    plan = qa.Plan(**batch.plan_arguments(convert))
    plan.update(**batch.update_arguments(convert))
    cache = qa.PagedKvCache(convert(batch.key_cache), convert(batch.value_cache))
    with pytest.raises(ValueError, match="requires grad"):
        qa.attention(plan, convert(batch.q).requires_grad_(), cache)
    with torch.inference_mode():
        check(qa.attention(plan, convert(batch.q), cache), batch.expected(right=0)[0])


def test_bfloat16(rng, convert):
    for _ in range(4):
        batch = Batch(rng)
        rounded = {}
        for name in ("q", "key_cache", "value_cache"):
            rounded[name] = convert(getattr(batch, name)).bfloat16()
        batch.q = host(rounded["q"].float())
        batch.k = [host(convert(k).bfloat16().float()) for k in batch.k]
        batch.v = [host(convert(v).bfloat16().float()) for v in batch.v]
        plan = qa.Plan(**{**batch.plan_arguments(convert), "dtype": torch.bfloat16})
        plan.update(**batch.update_arguments(convert))
        cache = qa.PagedKvCache(rounded["key_cache"], rounded["value_cache"])
        out = qa.attention(plan, rounded["q"], cache)
        assert out.dtype == torch.bfloat16
        check(out.float(), batch.expected(right=0)[0], "bfloat16")


def test_float8_query_cache_and_output(rng, convert):
    batch = Batch(rng, lens=[(4, 30), (1, 20)])
    fp8 = torch.float8_e4m3fn

    def rounded(array):
        return host(convert(array).to(fp8).float())

    cache = qa.PagedKvCache(
        convert(batch.key_cache).to(fp8), convert(batch.value_cache).to(fp8), "fp8"
    )
    q = convert(batch.q).to(fp8)
    batch.q = rounded(batch.q)
    batch.k, batch.v = [rounded(k) for k in batch.k], [rounded(v) for v in batch.v]
    plan = qa.Plan(**{**batch.plan_arguments(convert), "dtype": fp8}, kv_cache_dtype="fp8")
    plan.update(**batch.update_arguments(convert))
    out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    expected = batch.expected(right=0)[0]
    check(qa.attention(plan, q, cache, output=out), expected, "bfloat16")
    coded = torch.empty(q.shape, dtype=fp8, device=q.device)
    qa.attention(plan, q, cache, output=coded, output_scale=0.01)
    np.testing.assert_allclose(host(coded.float()) * 0.01, expected, rtol=0.08, atol=1e-3)


def test_arrays_of_two_libraries_do_not_mix(convert):
    x = np.ones((1, 2, 2, 8), np.float32)
    with pytest.raises(ValueError, match="k_cache"):
        qa.flash_attn_func(convert(x), x, x)


def draw(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def test_compiled_flash_functions(rng, convert):
    q = rng.standard_normal((2, 5, 4, 32)).astype(np.float32)
    k, v = (rng.standard_normal((2, 11, 2, 32)).astype(np.float32) for _ in range(2))

    def func(q, k, v):
        out, lse, _ = qa.flash_attn_func(q * 2, k, v, causal=True, return_attn_probs=True)
        return out + 1, lse

    out, lse = compiled(func)(convert(q), convert(k), convert(v))
    for b in range(2):
        expected, expected_lse = attend(q[b] * 2, k[b], v[b], right=0)
        check(out[b] - 1, expected)
        check(lse[b], expected_lse)

    cu_q, cu_k = (convert(np.arange(3, dtype=np.int32) * np.int32(n)) for n in (5, 11))

    def varlen(q, k, v):
        return qa.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 5, 11, causal=True) * 3

    out = compiled(varlen)(*(convert(x.reshape(-1, *x.shape[2:])) for x in (q, k, v)))
    for b in range(2):
        check(out[b * 5 : b * 5 + 5] / 3, attend(q[b], k[b], v[b], right=0)[0])


def test_compiled_append_writes_the_cache(rng, convert):
    k_cache, v_cache = (convert(np.full((2, 16, 2, 32), np.nan, np.float32)) for _ in range(2))
    q, k, v = (convert(draw(rng, 2, 4, 2, 32)) for _ in "qkv")

    def step(q, k_cache, v_cache, k, v, lens):
        return qa.flash_attn_with_kvcache(
            q, k_cache, v_cache, k + 1, v, cache_seqlens=lens, causal=True
        )

    out = compiled(step)(q, k_cache, v_cache, k, v, convert(np.zeros(2, np.int32)))
    assert torch.equal(k_cache[:, :4], k + 1)
    assert torch.equal(v_cache[:, :4], v)
    assert k_cache[:, 4:].isnan().all()
    for b in range(2):
        own = (host(x[b]) for x in (q, k + 1, v))
        check(out[b], attend(*own, right=0)[0])


def test_compiled_rotary_embedding_and_padding(rng, convert):
    """The same as without torch.compile."""
    q, k, v = (convert(draw(rng, 2, 3, 2, 32)) for _ in range(3))
    table = convert(draw(rng, 16, 8))
    lens, pads = (convert(np.array(x, np.int32)) for x in ([7, 9], [2, 0]))

    def step(q, k_cache, v_cache, k, v):
        return qa.flash_attn_with_kvcache(
            q, k_cache, v_cache, k, v, table, table + 1, lens, cache_leftpad=pads, causal=True
        )

    caches = [convert(draw(rng, 2, 16, 2, 32)) for _ in range(2)]
    copies = [x.clone() for x in caches]
    out = step(q, *caches, k, v)
    torch.testing.assert_close(compiled(step)(q, *copies, k, v), out)
    for actual, expected in zip(copies, caches, strict=True):
        torch.testing.assert_close(actual, expected)


def test_compiled_layer_over_a_plan(rng, convert):
    """Cache write, attention and merge with a plan that was made and updated outside."""
    batch = Batch(rng, lens=[(3, 3), (8, 8)])
    plan = qa.Plan(**batch.plan_arguments(convert))
    plan.update(**batch.update_arguments(convert))
    shape = (batch.key_cache.shape[0], 2, *batch.key_cache.shape[1:])
    combined = convert(np.full(shape, np.nan, np.float32))
    slots = convert(np.concatenate(batch.slots))

    def layer(q, k, v, combined):
        cache = qa.PagedKvCache.from_combined(combined)
        qa.write_kv_cache(k, v, cache, slots)
        lse = q.new_empty((q.shape[1], q.shape[0]))
        out = qa.attention(plan, q * 1, cache, lse=lse, score=qa.Score(0.3))
        merged, both = qa.merge_states(out, lse, out, lse)
        return out, lse, merged, both

    arguments = [convert(x) for x in (batch.q, np.concatenate(batch.k), np.concatenate(batch.v))]
    out, lse, merged, both = compiled(layer)(*arguments, combined)
    expected, expected_lse = batch.expected(right=0, scale=0.3)
    check(out, expected)
    check(merged, expected)
    check(lse, expected_lse)
    check(both, expected_lse + np.log(2))
    np.testing.assert_array_equal(host(combined)[:, 0], batch.key_cache)


def test_compiled_unified_attention(rng, convert):
    batch = Batch(rng, lens=[(3, 30), (1, 9)])
    out = convert(np.full(batch.q.shape, np.nan, np.float32))
    lens, starts = convert(batch.seq_lens), convert(batch.query_start_loc)

    def layer(q, k, v, out, table):
        qa.unified_attention(
            q * 1, k, v, out, starts, 3, lens, 30, 0.2, True, (7, 0), table, 0.0, None, None, None
        )
        return out + 1

    result = compiled(layer)(
        *(convert(x) for x in (batch.q, batch.key_cache, batch.value_cache)), out,
        convert(batch.block_table),
    )  # fmt: skip
    expected, _ = batch.expected(left=7, right=0, scale=0.2)
    check(out, expected)
    check(result - 1, expected)
