"""vLLM's backend classes on Quire, without vLLM, against the reference."""

import dataclasses

import numpy as np
import pytest
import quire_attn as qa
from quire_attn.backend import (
    QuireAttentionBackend,
    QuireAttentionImpl,
    QuireAttentionMetadata,
    QuireAttentionMetadataBuilder,
)
from serving import (
    LAYOUTS,
    cached,
    common_metadata,
    empty_cache,
    forward,
    halves,
    new_tokens,
    shortened,
)

from reference import Batch, check, host


def make_layer(batch, **other):
    return QuireAttentionImpl(
        batch.num_heads, batch.head_size, batch.head_size**-0.5, batch.num_kv_heads, **other
    )


def build(batch, convert, common_prefix_len=0, **other):
    builder = QuireAttentionMetadataBuilder(None, ["layer"], None, "cpu")
    return builder.build(common_prefix_len, common_metadata(batch, convert, **other))


@pytest.mark.parametrize("layout", ["5d", *LAYOUTS])
def test_forward_writes_and_attends_in_every_layout(rng, convert, layout):
    for _ in range(3):
        batch = Batch(rng)
        cache = cached(batch, empty_cache(batch, layout))
        out = forward(make_layer(batch), batch, convert, cache, build(batch, convert))
        check(out, batch.expected(right=0)[0])
        key, value = (cache[:, 0], cache[:, 1]) if layout == "5d" else halves(cache)
        np.testing.assert_array_equal(key, batch.key_cache)  # NaN where nothing was written
        np.testing.assert_array_equal(value, batch.value_cache)


@pytest.mark.parametrize("layer_kind", ["plain", "window", "chunked", "alibi", "sqrt", "sinks"])
def test_kinds_of_layers(rng, convert, layer_kind):
    batch = Batch(rng, lens=[(5, 60), (1, 33), (17, 17)])
    slopes = 0.1 * np.arange(1, batch.num_heads + 1)
    sinks = batch.draw(rng, batch.num_heads)
    p = [np.arange(n - m, n)[:, None] for m, n in batch.lens]
    j = [np.arange(n)[None, :] for _, n in batch.lens]
    pairs = list(zip(p, j, strict=True))
    arguments, expected = {
        "plain": ({}, {"right": 0}),
        "window": ({"sliding_window": 9}, {"left": 8, "right": 0}),
        "chunked": (
            {"sliding_window": 16, "chunk_lookback": 1},
            {"visible": [(b <= a) & (a // 8 - b // 8 <= 1) for a, b in pairs]},
        ),
        "alibi": ({"alibi_slopes": slopes.tolist()}, {"right": 0, "slopes": slopes}),
        "sqrt": (
            {"alibi_slopes": [0.3] * batch.num_heads, "use_alibi_sqrt": True},
            {"right": 0, "bias": [np.where(b <= a, -0.3 * abs(a - b) ** 0.5, 0) for a, b in pairs]},
        ),
        "sinks": ({"sinks": convert(sinks)}, {"right": 0, "sinks": sinks}),
    }[layer_kind]
    layer = make_layer(batch, logits_soft_cap=4.0, **arguments)
    cache = cached(batch, empty_cache(batch, "5d"))
    out = forward(layer, batch, convert, cache, build(batch, convert))
    check(out, batch.expected(softcap=4.0, **expected)[0])


def test_sinks_that_are_loaded_later_in_another_dtype(rng, tensors):
    import torch

    batch = Batch(rng)
    zeros = torch.zeros(batch.num_heads, dtype=torch.float16, device=tensors.device)
    sinks = torch.nn.Parameter(zeros)
    layer = make_layer(batch, sinks=sinks)
    cache = cached(batch, empty_cache(batch, "5d"))
    metadata = build(batch, tensors)
    with torch.inference_mode():
        forward(layer, batch, tensors, cache, metadata)
        values = batch.draw(rng, batch.num_heads, "float16")
        sinks.data.copy_(torch.from_numpy(values))
        layer.process_weights_after_loading(torch.float32)
        out = forward(layer, batch, tensors, cache, metadata)
    check(out, batch.expected(right=0, sinks=values)[0])


def test_masks_of_the_batch(rng, convert):
    batch = Batch(rng, lens=[(6, 50), (4, 12), (9, 9), (1, 40)])
    cache = cached(batch, empty_cache(batch, "LBNHC"))
    p = [np.arange(n - m, n)[:, None] for m, n in batch.lens]
    j = [np.arange(n)[None, :] for _, n in batch.lens]
    pairs = list(zip(p, j, strict=True))

    def expect(visible, *, layer=None, scales=None, **common):
        layer = layer or make_layer(batch)
        metadata = build(batch, convert, **common)
        out = forward(layer, batch, convert, cache, metadata, scales=scales)
        check(out, batch.expected(visible=visible)[0])
        return metadata

    expect([np.ones((m, n), bool) for m, n in batch.lens], causal=False)
    windowed = make_layer(batch, sliding_window=5)
    expect([abs(a - b) < 5 for a, b in pairs], layer=windowed, causal=False)
    flags = np.array([1, 0, 1, 1], np.int32)
    each = [(b <= a) | (not flag) for (a, b), flag in zip(pairs, flags, strict=True)]
    expect(each, causal=convert(flags))

    ranges = {0: [(44, 47), (48, 49)], 2: [(2, 7)]}
    both = []
    for s, (a, b) in enumerate(pairs):
        inside = np.zeros(np.broadcast(a, b).shape, bool)
        for first, last in ranges.get(s, []):
            inside |= (a >= first) & (a <= last) & (b >= first) & (b <= last)
        both.append(inside)
    joined = [(b <= a) | r for (a, b), r in zip(pairs, both, strict=True)]
    metadata = expect(joined, mm_req_doc_ranges=ranges)
    assert metadata.mm_prefix_range.shape == (4, 2, 2)
    wide = [((b <= a) & (a - b < 5)) | r for (a, b), r in zip(pairs, both, strict=True)]
    expect(wide, layer=windowed, mm_req_doc_ranges=ranges)
    clamped = [(a - b < 5) & ((b <= a) | r) for (a, b), r in zip(pairs, both, strict=True)]
    gemma4 = type("Layer", (), {"mm_prefix_clamp_sliding_window": True})()
    expect(clamped, layer=windowed, scales=gemma4, mm_req_doc_ranges=ranges)


def test_reference_sliding_window(rng, convert):
    batch = Batch(rng, lens=[(6, 50), (4, 12), (1, 40)])
    prefix = np.array([10, 0, 3], np.int64)
    config = type("Config", (), {"model_config": type("Model", (), {"rswa_window": 7})})
    builder = QuireAttentionMetadataBuilder(None, [], config, "cpu")
    metadata = builder.build(0, common_metadata(batch, convert, rswa_prefix_lens=convert(prefix)))
    cache = cached(batch, empty_cache(batch, "5d"))
    visible = []
    for (m, n), r in zip(batch.lens, prefix, strict=True):
        p, j = np.arange(n - m, n)[:, None], np.arange(n)[None, :]
        visible.append((j <= p) & ((p - j < 7) | (j < r)))
    out = forward(make_layer(batch), batch, convert, cache, metadata)
    check(out, batch.expected(visible=visible)[0])
    with pytest.raises(NotImplementedError, match="rswa_window"):
        forward(make_layer(batch, sliding_window=3), batch, convert, cache, metadata)


@pytest.mark.parametrize("attn_type", ["encoder", "encoder_only"])
def test_encoders_have_no_cache(rng, convert, attn_type):
    batch = Batch(rng, lens=[(5, 5), (20, 20)])
    metadata = build(batch, convert)
    layer = make_layer(batch, attn_type=attn_type, sliding_window=4)
    out = forward(layer, batch, convert, np.zeros(0, np.float32), metadata)
    check(out, batch.expected(left=3, right=3)[0])


def test_cross_attention(rng, convert):
    """Keys are the encoder's: written once, more than there are query rows, and read later."""
    batch = Batch(rng, lens=[(2, 30), (1, 7)])
    layer = make_layer(batch, attn_type="encoder_decoder")
    metadata = build(batch, convert)
    cache = empty_cache(batch, "5d")
    metadata.slot_mapping = convert(np.concatenate(batch.slots))
    out = np.empty((3, batch.num_heads * batch.head_size), np.float32)
    arrays = [convert(np.concatenate(part)) for part in (batch.k, batch.v)]
    for key, value in (arrays, (None, None)):
        out.fill(np.nan)
        layer.forward(None, convert(batch.q), key, value, convert(cache), metadata, convert(out))
        check(out.reshape(3, batch.num_heads, -1), batch.expected()[0])


def test_a_shared_cache_is_read_only(rng, convert):
    batch = Batch(rng)
    cache = empty_cache(batch, "5d")
    metadata = build(batch, convert)
    forward(make_layer(batch), batch, convert, cached(batch, cache), metadata)
    before = cache.copy()
    layer = make_layer(batch, kv_sharing_target_layer_name="layers.0")
    batch.k, batch.v = [x + 0 for x in batch.k], [x + 0 for x in batch.v]
    expected = batch.expected(right=0)[0]
    for array in (*batch.k, *batch.v):
        array += 1  # what this layer is handed, and must not look at
    check(forward(layer, batch, convert, cache, metadata), expected)
    np.testing.assert_array_equal(cache, before)


def test_without_metadata_the_output_is_zero(rng, convert):
    batch = Batch(rng)
    layer = make_layer(batch)
    assert not forward(layer, batch, convert, np.zeros(0, np.float32), None).any()
    made = layer.forward(None, convert(batch.q), None, None, None, None)
    assert made.shape == (batch.num_tokens, batch.num_heads * batch.head_size)
    assert not host(made).any()


def test_the_output_is_made_where_none_is_given(rng, convert):
    batch = Batch(rng)
    cache = convert(cached(batch, empty_cache(batch, "5d")))
    key, value, _ = (convert(array) for array in new_tokens(batch))
    made = make_layer(batch).forward(
        None, convert(batch.q), key, value, cache, build(batch, convert)
    )
    assert made.shape == (batch.num_tokens, batch.num_heads * batch.head_size)
    check(host(made).reshape(batch.q.shape), batch.expected(right=0)[0])


def test_fourteen_fields_and_their_defaults(rng):
    fields = dataclasses.fields(QuireAttentionMetadata)[:14]
    assert [field.name for field in fields] == [
        "num_actual_tokens", "max_query_len", "query_start_loc", "max_seq_len", "seq_lens",
        "block_table", "slot_mapping", "use_cascade", "common_prefix_len", "cu_prefix_query_lens",
        "prefix_kv_lens", "suffix_kv_lens", "scheduler_metadata", "prefix_scheduler_metadata",
    ]  # fmt: skip
    assert [field.default for field in fields[:7]] == [dataclasses.MISSING] * 7
    assert [field.default for field in fields[7:]] == [False, 0, None, None, None, None, None]
    batch = Batch(rng)
    by_hand = QuireAttentionMetadata(
        batch.num_tokens, batch.max_query_len, batch.query_start_loc, batch.max_seq_len,
        batch.seq_lens, batch.block_table, new_tokens(batch)[2],
    )  # fmt: skip
    cache = cached(batch, empty_cache(batch, "5d"))
    out = forward(make_layer(batch), batch, lambda array: array, cache, by_hand)
    check(out, batch.expected(right=0)[0])


def test_fields_can_be_copied_into_a_class_derived_from_it(rng, convert):
    """As vLLM does for layers that share a cache (fast prefill)."""
    batch = Batch(rng)

    class Copy(QuireAttentionMetadata):
        def __init__(self, metadata):
            for field in dataclasses.fields(metadata):
                setattr(self, field.name, getattr(metadata, field.name))

    cache = cached(batch, empty_cache(batch, "5d"))
    out = forward(make_layer(batch), batch, convert, cache, Copy(build(batch, convert)))
    check(out, batch.expected(right=0)[0])


def test_cascade_is_announced(rng, convert):
    batch = Batch(rng, block_size=16, lens=[(1, 70), (2, 50), (1, 64)])
    for s in (1, 2):  # the first two blocks are shared
        batch.block_table[s, :2] = batch.block_table[0, :2]
        batch.k[s][:32], batch.v[s][:32] = batch.k[0][:32], batch.v[0][:32]
        batch.slots[s][:32] = batch.slots[0][:32]
    metadata = build(batch, convert, common_prefix_len=32)
    assert (metadata.use_cascade, metadata.common_prefix_len) == (True, 32)
    assert metadata.prefix_scheduler_metadata is metadata.scheduler_metadata is not None
    assert metadata.cu_prefix_query_lens.tolist() == [0, 4]
    assert metadata.prefix_kv_lens.tolist() == [32]
    assert metadata.suffix_kv_lens.tolist() == [38, 18, 32]
    cache = cached(batch, empty_cache(batch, "5d"))
    check(forward(make_layer(batch), batch, convert, cache, metadata), batch.expected(right=0)[0])


def test_work_is_planned_once_a_step_for_each_kind_of_layer(rng, convert, monkeypatch):
    batch = Batch(rng)
    cache = cached(batch, empty_cache(batch, "5d"))
    updates = []
    update = qa.Plan.update
    monkeypatch.setattr(qa.Plan, "update", lambda *a, **k: updates.append(a) or update(*a, **k))
    builder = QuireAttentionMetadataBuilder(None, [], None, "cpu")
    layers = [make_layer(batch, sliding_window=window) for window in (None, 5, None, 5, None)]
    for _ in range(3):
        updates.clear()
        metadata = builder.build(0, common_metadata(batch, convert))
        for layer in layers:
            forward(layer, batch, convert, cache, metadata)
        assert len(updates) == 2


def test_another_pass_plans_what_the_tensors_hold_then(rng, convert):
    """A draft model's next token: lengths are changed in place, as in a captured graph."""
    batch = Batch(rng, lens=[(1, 200), (1, 33)])
    short = shortened(batch, [(1, 11), (1, 32)])
    layers = [make_layer(batch), make_layer(batch)]
    metadata = build(short, convert)
    cache = cached(batch, empty_cache(batch, "5d"))
    for layer in layers:
        check(forward(layer, short, convert, cache, metadata), short.expected(right=0)[0])
    metadata.seq_lens[:] = convert(batch.seq_lens)
    metadata.slot_mapping = convert(new_tokens(batch)[2])
    for layer in layers:
        check(forward(layer, batch, convert, cache, metadata), batch.expected(right=0)[0])


def test_metadata_of_two_steps_may_alternate(rng, convert):
    builder = QuireAttentionMetadataBuilder(None, [], None, "cpu")
    shape = {"num_heads": 4, "num_kv_heads": 2, "head_size": 32, "block_size": 16}
    batches = [Batch(rng, **shape), Batch(rng, **shape)]
    steps = [builder.build(0, common_metadata(batch, convert)) for batch in batches]
    layers = [make_layer(batches[0]) for _ in range(2)]
    caches = [cached(batch, empty_cache(batch, "5d")) for batch in batches]
    for layer in layers:
        for batch, metadata, cache in zip(batches, steps, caches, strict=True):
            check(forward(layer, batch, convert, cache, metadata), batch.expected(right=0)[0])


def test_metadata_for_a_capture(rng, convert):
    batch = Batch(rng, lens=[(1, 20), (1, 33)])
    builder = QuireAttentionMetadataBuilder(None, [], None, "cpu")
    metadata = builder.build_for_cudagraph_capture(common_metadata(batch, convert))
    assert metadata.seq_lens.tolist() == [1, 1]
    assert not metadata.use_cascade


def test_views_of_a_cache_go_with_it(rng, convert):
    batch = Batch(rng)
    layer = make_layer(batch)
    metadata = build(batch, convert)
    for _ in range(2):  # a cache at whatever address, with the same object's number perhaps
        cache = cached(batch, empty_cache(batch, "5d"))
        check(forward(layer, batch, convert, cache, metadata), batch.expected(right=0)[0])
    assert layer._views is None  # the array that was passed is gone


def test_what_the_backend_offers():
    backend = QuireAttentionBackend
    assert backend.get_impl_cls() is QuireAttentionImpl
    assert backend.get_metadata_cls() is QuireAttentionMetadata
    assert backend.get_builder_cls() is QuireAttentionMetadataBuilder
    assert backend.get_kv_cache_shape(7, 5, 3, 64) == (7, 2, 5, 3, 64)
    assert backend.get_kv_cache_shape(7, 16, 3, 64, "fp8") == (7, 2, 16, 3, 64)
    assert backend.get_kv_cache_shape(7, 16, 3, 64, "int8_per_token_head") == (7, 2, 16, 3, 68)
    assert backend.get_kv_cache_shape(7, 16, 3, 64, "int4_per_token_head") == (7, 2, 16, 3, 36)
    assert backend.use_cascade_attention(64, [1, 1], 8, 8) is False
    backend.validate_head_size(80)
    assert [str(dtype).removeprefix("torch.") for dtype in backend.get_supported_dtypes()] == [
        "float16", "bfloat16", "float32",
    ]  # fmt: skip
    assert set(backend.get_supported_kv_cache_dtypes()) >= {"auto", "fp8", "int4_per_token_head"}
    with pytest.raises(ValueError, match="head_size: expected 8 to 576, got 1000"):
        backend.validate_head_size(1000)
    with pytest.raises(ValueError, match="block_size"):
        backend.get_kv_cache_shape(7, 0, 3, 64)
    with pytest.raises(ValueError, match="cache_dtype_str"):
        backend.get_kv_cache_shape(7, 16, 3, 64, "nvfp4")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"attn_type": "both"}, "attn_type: expected one of decoder"),
        ({"num_kv_heads": 3}, "num_kv_heads: expected a divisor of num_heads 4, got 3"),
        ({"alibi_slopes": [1.0]}, "alibi_slopes: expected 4, got 1"),
        ({"sinks": np.zeros(3, np.float32)}, "sinks: expected 4, got 3"),
        ({"use_alibi_sqrt": True}, "use_alibi_sqrt"),
        ({"sliding_window": 0}, "sliding_window: expected at least 1, got 0"),
        ({"chunk_lookback": 1}, "chunk_lookback"),
        ({"kv_cache_dtype": "nvfp4"}, "kv_cache_dtype"),
    ],
)
def test_wrong_layers(arguments, text):
    with pytest.raises(ValueError, match=text):
        QuireAttentionImpl(4, 64, 0.125, **{"num_kv_heads": 2, **arguments})


def test_a_wrong_batch_writes_nothing(rng, convert):
    batch = Batch(rng, lens=[(3, 30)])
    metadata = build(batch, convert)
    metadata.seq_lens = convert(batch.seq_lens.astype(np.int64))
    cache = empty_cache(batch, "5d")
    with pytest.raises(TypeError, match="seq_lens: expected int32, got int64"):
        forward(make_layer(batch), batch, convert, cache, metadata)
    assert np.isnan(cache).all()


def test_wrong_caches(rng):
    batch = Batch(rng, head_size=32)
    layer = make_layer(batch)
    metadata = build(batch, lambda array: array)
    for shape in ((3, 16, 2, 32), (3, 3, 16, 2, 32), (3, 2, 16, 2, 48)):
        with pytest.raises(ValueError, match="kv_cache: expected"):
            layer.attend_rows(
                None, batch.q, np.zeros(shape, np.float32), metadata, np.empty_like(batch.q)
            )
