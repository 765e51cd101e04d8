"""Mistakes are Python's exceptions with the library's text; nothing has been written."""

import numpy as np
import pytest
import quire_attn as qa

from reference import Batch


@pytest.fixture
def batch(rng):
    return Batch(rng, num_kv_heads=2, head_size=64, lens=[(3, 20), (1, 9)])


def attend(batch, **other):
    plan = qa.Plan(**batch.plan_arguments())
    plan.update(**batch.update_arguments(lambda array: array))
    cache = qa.PagedKvCache(
        other.pop("key_cache", batch.key_cache), batch.value_cache, other.pop("dtype", "auto")
    )
    return qa.attention(plan, other.pop("query", batch.q), cache, **other)


def test_wrong_dtype_is_a_type_error(batch):
    with pytest.raises(TypeError, match="query: expected float32, got float16"):
        attend(batch, query=batch.q.astype(np.float16))
    with pytest.raises(TypeError, match="query: expected a DLPack type that Quire knows"):
        attend(batch, query=batch.q.astype(np.float64))
    with pytest.raises(TypeError, match="seq_lens: expected int32, got int64"):
        batch.seq_lens = batch.seq_lens.astype(np.int64)
        attend(batch)


def test_what_is_no_array_is_a_type_error(batch):
    with pytest.raises(TypeError):
        attend(batch, query="query", output=batch.q.copy())
    with pytest.raises(TypeError, match="k_scale"):
        cache = qa.PagedKvCache(batch.key_cache, batch.value_cache, k_scale="one")
        qa.write_kv_cache(batch.k[0], batch.v[0], cache, batch.slots[0])


def test_wrong_shapes_and_strides_are_value_errors(batch):
    out = np.full(batch.q.shape, 7.0, np.float32)
    with pytest.raises(ValueError, match=r"query: expected shape \[\*, \d+, 64\]"):
        attend(batch, query=batch.q[:, :, :32], output=out)
    with pytest.raises(ValueError, match="kv_cache.value: expected the key's"):
        attend(batch, key_cache=batch.key_cache[:, :, :1], output=out)
    with pytest.raises(ValueError, match="query: expected unit stride in the last dimension"):
        attend(batch, query=np.repeat(batch.q, 2, axis=2)[:, :, ::2], output=out)
    with pytest.raises(ValueError, match="num_kv_heads: expected a divisor of num_heads 4, got 3"):
        qa.Plan(num_heads=4, num_kv_heads=3, head_size=64)
    with pytest.raises(ValueError, match="kv_cache: expected shape"):
        qa.PagedKvCache.from_combined(batch.key_cache)
    assert (out == 7.0).all()


def test_unknown_names_are_value_errors():
    sizes = {"num_heads": 4, "num_kv_heads": 2, "head_size": 64}
    for name, value in (
        ("dtype", "int4"), ("device", "tpu"), ("type", "decoders"), ("kv_cache_dtype", "fp9"),
        ("backend", "gpu"), ("mask", qa.Mask(window="right")),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=("window" if name == "mask" else name)):
            qa.Plan(**sizes, **{name: value})


def test_a_missing_device_is_not_implemented():
    with pytest.raises(NotImplementedError, match="device|backend"):
        qa.Plan(num_heads=4, num_kv_heads=2, head_size=64, device="cuda:63")


def test_an_append_that_cannot_be_attended_writes_nothing(rng):
    cache = np.full((2, 8, 2, 32), 7.0, np.float32)
    new = np.ones((2, 1, 2, 32), np.float32)
    lens = np.array([3, 3], np.int32)
    good = np.ones((2, 1, 4, 32), np.float32)
    for q, other in (
        (good[..., :16], {}),
        (good[:, :, :3], {}),
        (good[:, 0], {}),
        (good, {"s_aux": np.ones(3, np.float32)}),
        (good, {"alibi_slopes": np.ones(3, np.float32), "causal": True}),
        (good, {"softcap": -1.0}),
    ):
        with pytest.raises(ValueError):
            qa.flash_attn_with_kvcache(q, cache, cache, new, new, cache_seqlens=lens, **other)
    assert (cache == 7.0).all()


def test_wild_indices_are_found_on_request(batch):
    batch.block_table[0, 0] = 10**6
    plan = qa.Plan(**batch.plan_arguments())
    cache = qa.PagedKvCache(batch.key_cache, batch.value_cache)
    plan.update(**batch.update_arguments(lambda array: array), check_indices=True)
    with pytest.raises(ValueError, match=r"block_table\[0\]\[0\]"):
        qa.attention(plan, batch.q, cache, check_indices=True)


def test_a_read_only_array_is_never_written(batch):
    out = np.full(batch.q.shape, 7.0, np.float32)
    out.flags.writeable = False
    with pytest.raises((BufferError, ValueError, TypeError)):
        attend(batch, output=out)
    assert (out == 7.0).all()
