"""Quantised caches and outputs of vLLM's backend classes, without vLLM."""

from types import SimpleNamespace

import numpy as np
import pytest
import quire_attn as qa
from quire_attn.backend import layer_cache
from serving import LAYOUTS, empty_cache, forward, halves, new_tokens
from test_backend import build, make_layer
from test_core import fp8_values

from reference import Batch, check, host

KINDS = {"int8_per_token_head": 0.02, "fp8_per_token_head": 0.07, "int4_per_token_head": 0.35}


def fill(batch, convert, cache, cache_dtype, **scales):
    """Writes the context, and returns the layer's views of the cache, NumPy's."""
    views = layer_cache(convert(cache), batch.head_size, cache_dtype,
                        **{name: convert(scale) for name, scale in scales.items()})  # fmt: skip
    for s, (query_len, seq_len) in enumerate(batch.lens):
        n = seq_len - query_len
        new = (convert(x[s][:n]) for x in (batch.k, batch.v))
        qa.write_kv_cache(*new, views, convert(batch.slots[s][:n]))
    return layer_cache(cache, batch.head_size, cache_dtype)


@pytest.mark.parametrize("layout", ["5d", "LBNHC", "BHLNC", "LHBNC"])
@pytest.mark.parametrize("cache_dtype", KINDS)
def test_scales_behind_each_row(rng, convert, cache_dtype, layout):
    """The bytes are those of a cache with its scales elsewhere, and nothing else is touched."""
    batch = Batch(rng, head_size=64)
    stored = 32 if cache_dtype == "int4_per_token_head" else 64
    cache = empty_cache(batch, layout, np.uint8, stored + 4, 0x5A)
    fill(batch, convert, cache, cache_dtype)
    out = forward(
        make_layer(batch, kv_cache_dtype=cache_dtype), batch, convert, cache, build(batch, convert)
    )

    shape = (*batch.key_cache.shape[:3], stored)
    poison = np.frombuffer(b"ZZZZ", np.float32)
    apart = {
        "key": np.full(shape, 0x5A, np.uint8), "value": np.full(shape, 0x5A, np.uint8),
        "k_scale_cache": np.full(shape[:3], poison), "v_scale_cache": np.full(shape[:3], poison),
    }  # fmt: skip
    other = qa.PagedKvCache(
        dtype=cache_dtype, **{name: convert(array) for name, array in apart.items()}
    )
    tokens = (np.concatenate(x) for x in (batch.k, batch.v))
    qa.write_kv_cache(*map(convert, tokens), other, convert(np.concatenate(batch.slots)))
    rows = (cache[:, 0], cache[:, 1]) if layout == "5d" else halves(cache)  # [K, scale], [V, scale]
    for row, side in zip(rows, ("key", "value"), strict=True):
        np.testing.assert_array_equal(row[..., :stored], apart[side], side)
        scales = np.ascontiguousarray(row[..., stored:]).view(np.float32)[..., 0]
        np.testing.assert_array_equal(scales, apart[f"{side[0]}_scale_cache"], side)
    plan = qa.Plan(**batch.plan_arguments(convert), kv_cache_dtype=cache_dtype)
    plan.update(**batch.update_arguments(convert))
    np.testing.assert_array_equal(out, host(qa.attention(plan, convert(batch.q), other)))
    expected = batch.expected(right=0)[0]
    size = np.linalg.norm(expected)
    assert np.linalg.norm(out - expected) <= KINDS[cache_dtype] * size


def test_rows_whose_scales_are_not_aligned(rng, convert):
    batch = Batch(rng, head_size=33)
    cache = empty_cache(batch, "5d", np.uint8, 37, 0)
    with pytest.raises(ValueError, match="multiples of 4 bytes"):
        forward(
            make_layer(batch, kv_cache_dtype="int8_per_token_head"), batch, convert, cache,
            build(batch, convert),
        )  # fmt: skip


@pytest.mark.parametrize("layout", ["5d", *LAYOUTS[:2]])
@pytest.mark.parametrize("cache_dtype", ["fp8", "fp8_e4m3", "fp8_e5m2"])
def test_fp8_with_the_layers_scales(rng, convert, cache_dtype, layout):
    batch = Batch(rng)
    scales = {"k_scale": np.array(0.5, np.float32), "v_scale": np.array(0.25, np.float32)}
    cache = empty_cache(batch, layout, np.uint8, poison=0x7F)  # NaN
    views = fill(batch, convert, cache, cache_dtype, **scales)
    layer = SimpleNamespace(
        _k_scale=convert(scales["k_scale"]), _v_scale=convert(scales["v_scale"]), _q_scale=None
    )
    impl = make_layer(batch, kv_cache_dtype=cache_dtype)
    out = forward(impl, batch, convert, cache, build(batch, convert), scales=layer)
    for s, slots in enumerate(batch.slots):
        at = slots // batch.block_size, slots % batch.block_size
        for mine, view, scale in ((batch.k, views.key, 0.5), (batch.v, views.value, 0.25)):
            read_back = fp8_values(view[at], cache_dtype) * scale
            np.testing.assert_allclose(read_back, mine[s], rtol=0.13, atol=0.01)
            mine[s] = read_back
    check(out, batch.expected(right=0)[0])


def test_new_scales_are_noticed(rng, convert):
    batch = Batch(rng, lens=[(3, 3)])
    impl = make_layer(batch, kv_cache_dtype="fp8")
    cache = empty_cache(batch, "5d", np.uint8, poison=0x7F)
    shared = convert(cache)
    for scale in (0.5, 2.0):
        layer = SimpleNamespace(_k_scale=1.0, _v_scale=scale)
        forward(impl, batch, lambda a: shared if a is cache else convert(a), cache,
                build(batch, convert), scales=layer)  # fmt: skip
        at = batch.slots[0] // batch.block_size, batch.slots[0] % batch.block_size
        values = fp8_values(cache[:, 1][at], "fp8") * scale
        np.testing.assert_allclose(values, batch.v[0], rtol=0.07, atol=0.01)


@pytest.mark.parametrize("attn_type", ["decoder", "encoder_only"])
def test_fp8_outputs(rng, tensors, attn_type):
    import torch

    batch = Batch(rng, num_heads=6, num_kv_heads=2, head_size=64, lens=[(5, 5), (9, 9)])
    layer = make_layer(batch, attn_type=attn_type)
    metadata = build(batch, tensors)
    key, value, _ = (tensors(array) for array in new_tokens(batch))
    cache = tensors(empty_cache(batch, "5d"))
    expected = batch.expected(**({"right": 0} if attn_type == "decoder" else {}))[0]
    q = tensors(batch.q)
    out = torch.zeros(14, 6, 64, dtype=torch.float8_e4m3fn, device=tensors.device)
    scale = torch.tensor(0.01, device=tensors.device)
    layer.forward(None, q, key, value, cache, metadata, out, scale)
    np.testing.assert_allclose(host(out.float()) * 0.01, expected, rtol=0.07, atol=1e-3)

    out = torch.zeros(14, 384, dtype=torch.float8_e4m3fn, device=tensors.device)
    scales = torch.full((14, 3), torch.nan, device=tensors.device)
    layer.forward(None, q, key, value, cache, metadata, out, output_block_scale=scales)
    groups = expected.reshape(14, 3, 128)
    np.testing.assert_allclose(host(scales), abs(groups).max(-1) / 448, rtol=1e-5)
    read_back = out.float().reshape(14, 3, 128) * scales[..., None]
    np.testing.assert_allclose(host(read_back), groups, rtol=0.07, atol=1e-3)


@pytest.mark.parametrize("output_dtype", ["float32", "float8_e4m3fn"])
def test_fp8_queries(rng, tensors, output_dtype):
    import torch

    batch = Batch(rng, head_size=64)
    cache = empty_cache(batch, "LBNHC", np.uint8, poison=0x7F)
    context, batch.lens = batch.lens, [(0, n) for _, n in batch.lens]
    views = fill(batch, tensors, cache, "fp8")  # all tokens, the step's own too
    batch.lens = context
    for s, slots in enumerate(batch.slots):
        at = slots // batch.block_size, slots % batch.block_size
        batch.k[s], batch.v[s] = (fp8_values(x[at], "fp8") for x in (views.key, views.value))
    query = tensors(batch.q).mul(4).to(torch.float8_e4m3fn)
    batch.q = host(query.float()) * 0.25
    q_scale, output_scale = (torch.tensor(x, device=tensors.device) for x in (0.25, 0.01))
    layer = SimpleNamespace(_k_scale=1.0, _v_scale=1.0, _q_scale=q_scale)
    out = torch.zeros(batch.q.shape, dtype=getattr(torch, output_dtype), device=tensors.device)
    make_layer(batch, kv_cache_dtype="fp8").forward(
        layer, query, None, None, tensors(cache), build(batch, tensors), out,
        None if output_dtype == "float32" else output_scale,
    )  # fmt: skip
    expected = batch.expected(right=0)[0]
    if output_dtype == "float32":
        # A GPU multiplies fp8 with fp8 in bf16.
        check(out, expected, "float32" if tensors.device == "cpu" else "bfloat16")
        return
    # Weights may be rounded to bf16, each by 2^-9 of itself.
    batch.v = [abs(v) for v in batch.v]
    bound = 0.07 * abs(expected) + 1e-3 + 2.0**-9 * batch.expected(right=0)[0]
    np.testing.assert_array_less(abs(host(out.float()) * 0.01 - expected), bound)
