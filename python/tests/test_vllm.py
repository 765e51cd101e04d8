"""Quire's classes inside vLLM's own: needs vLLM, any of the tested versions (guide/vllm.md)."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from serving import cached, common_metadata, empty_cache, forward, new_tokens, shortened

from reference import Batch, check

pytest.importorskip("vllm")
torch = pytest.importorskip("torch")

import quire_attn.vllm as plugin  # noqa: E402
from vllm.v1.attention import backend as host  # noqa: E402
from vllm.v1.attention.backends.registry import AttentionBackendEnum  # noqa: E402

plugin.register()
BACKEND = AttentionBackendEnum.CPU_ATTN.get_class()
CONFIG = SimpleNamespace(
    model_config=SimpleNamespace(rswa_window=None),
    parallel_config=SimpleNamespace(decode_context_parallel_size=1),
    scheduler_config=SimpleNamespace(max_num_seqs=16),
)


def host_metadata(batch, **other):
    """vLLM's own CommonAttentionMetadata."""
    fields = vars(common_metadata(batch, torch.from_numpy, **other))
    fields["query_start_loc_cpu"] = fields["query_start_loc"]
    fields["seq_lens_cpu_upper_bound"] = fields["seq_lens"]
    fields["_seq_lens_cpu"] = fields["seq_lens"]  # to 0.29
    fields["_num_computed_tokens_cpu"] = fields["seq_lens"] - (
        fields["query_start_loc"][1:] - fields["query_start_loc"][:-1]
    )
    known = {field.name for field in dataclasses.fields(host.CommonAttentionMetadata)}
    return host.CommonAttentionMetadata(**{n: v for n, v in fields.items() if n in known})


def make_layer(batch, backend=BACKEND, **other):
    return backend.get_impl_cls()(
        batch.num_heads, batch.head_size, batch.head_size**-0.5, batch.num_kv_heads, None,
        other.pop("sliding_window", None), "auto", None, other.pop("attn_type", "decoder"), None,
        **other,
    )  # fmt: skip


def build(batch, backend=BACKEND, block_size=None, **other):
    spec = SimpleNamespace(block_size=block_size or batch.block_size)
    builder = backend.get_builder_cls()(spec, ["layer"], CONFIG, torch.device("cpu"))
    return builder.build(0, host_metadata(batch, **other))


def serve(layer, batch, cache, metadata):
    key, value, slots = (torch.from_numpy(array) for array in new_tokens(batch))
    layer.do_kv_cache_update(None, key, value, torch.from_numpy(cache), slots)
    return forward(layer, batch, torch.from_numpy, cache, metadata)


def test_slots_have_their_names():
    assert BACKEND.get_name() == "CPU_ATTN"
    assert AttentionBackendEnum.CUSTOM.get_class().get_name() == "CUSTOM"
    assert AttentionBackendEnum.CPU_ATTN.get_class() is BACKEND
    assert BACKEND.full_cls_name() == ("quire_attn.vllm.slots", "CPU_ATTN")
    assert issubclass(BACKEND, host.AttentionBackend)
    assert issubclass(BACKEND.get_impl_cls(), host.AttentionImpl)
    assert issubclass(BACKEND.get_builder_cls(), host.AttentionMetadataBuilder)
    assert not getattr(BACKEND, "__abstractmethods__", None)


def test_what_it_says_it_can_do():
    for name in ("sink", "alibi_sqrt", "mm_prefix", "non_causal", "batch_invariance"):
        assert getattr(BACKEND, f"supports_{name}")() is True, name
    for size in (8, 33, 64, 80, 256, 576):
        assert BACKEND.supports_head_size(size)
    assert not BACKEND.supports_head_size(577)
    for size in (None, 1, 5, 8, 16, 48, 544):
        assert BACKEND.supports_block_size(size)
    for dtype in ("auto", "bfloat16", "fp8", "fp8_e5m2", "int8_per_token_head"):
        assert BACKEND.supports_kv_cache_dtype(dtype)
    assert not BACKEND.supports_kv_cache_dtype("nvfp4")
    for attn_type in host.AttentionType:
        assert BACKEND.supports_attn_type(attn_type)


def test_how_much_graphs_can_serve():
    """Ranges of an image come from the host, which no graph does again."""
    levels = host.AttentionCGSupport

    def support(is_mm_prefix_lm, *layers):
        config = SimpleNamespace(
            model_config=SimpleNamespace(is_mm_prefix_lm=is_mm_prefix_lm),
            compilation_config=SimpleNamespace(static_forward_context=dict(enumerate(layers))),
        )
        return BACKEND.get_builder_cls().get_cudagraph_support(config, None)

    plain = SimpleNamespace(sliding_window=None)
    clamped = SimpleNamespace(sliding_window=8, mm_prefix_clamp_sliding_window=True)
    wide = SimpleNamespace(sliding_window=8, mm_prefix_clamp_sliding_window=False)
    assert support(False, plain, wide) == levels.ALWAYS
    assert support(True, plain, clamped) == levels.UNIFORM_SINGLE_TOKEN_DECODE
    assert support(True, plain, wide) == levels.NEVER


def test_a_wheel_without_cuda_says_so_where_there_is_a_gpu():
    from quire_attn.backend.backend import capabilities

    if capabilities("cuda") is not None:
        pytest.skip("this build has CUDA")
    reasons = AttentionBackendEnum.CUSTOM.get_class().validate_configuration(
        head_size=64, dtype=torch.bfloat16, kv_cache_dtype="auto", block_size=16, use_mla=False,
        has_sink=True, use_sparse=False, use_mm_prefix=True, use_per_head_quant_scales=False,
        device_capability=None, attn_type="decoder", use_batch_invariant=True,
    )  # fmt: skip
    assert reasons == ["this build of quire_attn has no CUDA backend"]
    older = SimpleNamespace(major=7, minor=5)
    assert not BACKEND.supports_compute_capability(older)


@pytest.mark.parametrize("sinks", [False, True])
def test_a_step(rng, sinks):
    for _ in range(3):
        batch = Batch(rng)
        own = batch.draw(rng, batch.num_heads) if sinks else None
        layer = make_layer(batch, sinks=torch.from_numpy(own) if sinks else None)
        layer.process_weights_after_loading(torch.float32)
        cache = cached(batch, empty_cache(batch, "LBNHC"))
        out = serve(layer, batch, cache, build(batch))
        check(out, batch.expected(right=0, sinks=own)[0])


def test_the_cache_as_this_vllm_makes_it(rng):
    """Shapes of older vLLMs' hook, and the bytes that newer ones ask a spec for."""
    batch = Batch(rng, head_size=64, block_size=16)
    if hasattr(BACKEND, "supported_kv_cache_layouts"):
        assert BACKEND.supported_kv_cache_layouts() is None
        shape = (batch.key_cache.shape[0], batch.num_kv_heads, 16, 128)
    else:
        shape = BACKEND.get_kv_cache_shape(batch.key_cache.shape[0], 16, batch.num_kv_heads, 64)
    cache = cached(batch, np.full(shape, np.nan, np.float32))
    check(serve(make_layer(batch), batch, cache, build(batch)), batch.expected(right=0)[0])
    if not hasattr(BACKEND, "customize_spec"):
        return
    from vllm.v1.kv_cache_interface import FullAttentionSpec, get_kv_quant_mode

    rows = {"auto": None, "fp8": None, "int8_per_token_head": 136, "int4_per_token_head": 72}
    for name, row in rows.items():
        spec = FullAttentionSpec(
            block_size=16, num_kv_heads=2, head_size=64, dtype=torch.int8,
            kv_quant_mode=get_kv_quant_mode(name),
        )  # fmt: skip
        assert BACKEND.customize_spec(spec).state_content_bytes == row


def test_another_head_size_for_v(rng):
    """Rows of K and V of different sizes in one cache (TRITON_ATTN_DIFFKV)."""
    if not hasattr(BACKEND, "set_head_size_v"):
        pytest.skip("this vLLM makes caches by a shape of one head size")
    BACKEND.set_head_size_v(32)
    batch = Batch(rng, head_size=48, head_size_v=32, lens=[(5, 5), (20, 20)])
    num_blocks, block_size, num_kv_heads, _ = batch.key_cache.shape
    cache = np.full((num_blocks, num_kv_heads, block_size, 80), np.nan, np.float32)
    check(serve(make_layer(batch), batch, cache, build(batch)), batch.expected(right=0)[0])


def test_chunked_local_attention(rng):
    """vLLM cuts a batch into one sequence for each chunk (Llama 4)."""
    from vllm.model_executor.layers.attention import chunked_local_attention as chunked

    batch = Batch(rng, block_size=16, lens=[(5, 60), (1, 33), (40, 40)])
    batch.block_table = np.ascontiguousarray(batch.block_table.clip(0, None))
    backend = chunked.create_chunked_local_attention_backend(BACKEND, 16)
    cache = cached(batch, empty_cache(batch, "LBHNC"))
    out = serve(make_layer(batch, backend), batch, cache, build(batch, backend))
    visible = []
    for m, n in batch.lens:
        p, j = np.arange(n - m, n)[:, None], np.arange(n)[None, :]
        visible.append((j <= p) & (p // 16 == j // 16))
    check(out, batch.expected(visible=visible)[0])


def test_encoder_only_attention(rng):
    from vllm.model_executor.layers.attention import encoder_only_attention as encoder

    batch = Batch(rng, lens=[(5, 5), (20, 20)])
    backend = encoder.create_encoder_only_attention_backend(BACKEND)
    layer = make_layer(batch, backend, attn_type=host.AttentionType.ENCODER_ONLY)
    out = serve(layer, batch, np.zeros(0, np.float32), build(batch, backend))
    check(out, batch.expected()[0])


def test_cross_attention(rng):
    """The encoder's keys are written by the first decoder step, by slots of the builder's own."""
    from vllm.model_executor.layers.attention import cross_attention as cross

    batch = Batch(rng, block_size=16, lens=[(2, 30), (1, 17)])
    backend = cross.create_cross_attention_backend(BACKEND)
    encoder_lens = torch.tensor([30, 17], dtype=torch.int32)
    common = {
        "encoder_seq_lens": encoder_lens,
        "encoder_seq_lens_cpu": encoder_lens.numpy(),
        "seq_lens": torch.from_numpy(np.diff(batch.query_start_loc)),  # the decoder's own
        "block_table_tensor": torch.from_numpy(batch.block_table.clip(0, None)),
    }
    metadata = build(batch, backend, **common)
    layer = make_layer(batch, backend, attn_type=host.AttentionType.ENCODER_DECODER)
    cache = empty_cache(batch, "LBHNC")
    key, value = (torch.from_numpy(np.concatenate(part)) for part in (batch.k, batch.v))
    scales = SimpleNamespace(kv_sharing_target_layer_name=None)
    for k, v in ((key, value), (None, None)):
        out = torch.full((3, batch.num_heads, batch.head_size), torch.nan)
        layer.forward(
            scales, torch.from_numpy(batch.q), k, v, torch.from_numpy(cache), metadata, out
        )
        check(out.numpy(), batch.expected()[0])


def test_fast_prefill_of_layers_that_share_a_cache(rng):
    from vllm.v1.attention.backends import utils

    batch = Batch(rng, lens=[(5, 60), (3, 33)])
    backend = utils.create_fast_prefill_custom_backend("Fast", BACKEND)
    last = np.cumsum([m for m, _ in batch.lens]) - 1
    metadata = build(
        batch, backend, logits_indices_padded=torch.from_numpy(last), num_logits_indices=2,
        max_logits_per_req=1,
    )  # fmt: skip
    cache = cached(batch, empty_cache(batch, "LBHNC"))
    layer = make_layer(batch)
    everything = serve(layer, batch, cache, build(batch))
    rows = torch.from_numpy(batch.q[last])
    out = torch.full(tuple(rows.shape), torch.nan)
    layer.forward(None, rows, None, None, torch.from_numpy(cache), metadata, out)
    np.testing.assert_allclose(out.numpy(), everything[last], rtol=1e-4, atol=1e-5)


def test_what_a_draft_model_does_in_a_graph(rng):
    """Lengths change in place between two forward passes; nothing is built again."""
    batch = Batch(rng, lens=[(1, 200), (1, 33)])
    short = shortened(batch, [(1, 11), (1, 32)])
    spec = SimpleNamespace(block_size=batch.block_size)
    builder = BACKEND.get_builder_cls()(spec, ["layer"], CONFIG, torch.device("cpu"))
    assert builder.supports_draft_decode_metadata_update
    metadata = builder.build_for_drafting(host_metadata(short), 0)
    cache = cached(batch, empty_cache(batch, "LBHNC"))
    check(serve(make_layer(batch), short, cache, metadata), short.expected(right=0)[0])
    short.seq_lens[:] = batch.seq_lens
    builder.update_draft_decode_metadata(metadata)
    other = make_layer(batch)  # not the layer that ran before: the hook alone makes it plan again
    check(serve(other, batch, cache, metadata), batch.expected(right=0)[0])


def test_batch_invariance(rng, monkeypatch):
    """A sequence's bits are the same alone and among others."""
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    batch = Batch(rng, lens=[(1, 300), (1, 90), (30, 70)], head_size=64)
    alone = Batch(rng, lens=batch.lens[:1], num_heads=batch.num_heads, head_size=64,
                  num_kv_heads=batch.num_kv_heads, block_size=batch.block_size)  # fmt: skip
    for name in ("k", "v"):
        getattr(alone, name)[0][:] = getattr(batch, name)[0]
    alone.q[:] = batch.q[:1]
    outputs = []
    for one in (batch, alone):
        cache = cached(one, empty_cache(one, "LBHNC"))
        outputs.append(serve(make_layer(one), one, cache, build(one)))
        assert build(one).scheduler_metadata.batch_invariant
    np.testing.assert_array_equal(outputs[0][0], outputs[1][0])
