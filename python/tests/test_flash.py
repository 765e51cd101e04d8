"""FlashAttention's functions against the reference."""

import numpy as np
import pytest
import quire_attn as qa

from reference import Batch, attend, check, host

WINDOWS = [(-1, -1), (-1, 0), (5, 0), (5, 5), (4, 2), (0, 9), (3, -1), (-1, 3), (0, 0)]


def draw(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", WINDOWS)
def test_func(rng, convert, window, causal):
    batch_size, rows, keys = rng.integers(1, 4), rng.integers(1, 20), rng.integers(1, 40)
    q = draw(rng, batch_size, rows, 6, 40)
    k, v = (draw(rng, batch_size, keys, 2, 40) for _ in range(2))
    sinks = draw(rng, 6)
    out, lse, nothing = qa.flash_attn_func(
        convert(q), convert(k), convert(v), causal=causal, window_size=window, softcap=3.0,
        s_aux=convert(sinks), return_attn_probs=True,
    )  # fmt: skip
    assert nothing is None
    left, right = (window[0], 0) if causal else window
    for b in range(batch_size):
        expected, expected_lse = attend(
            q[b], k[b], v[b], left=left, right=right, softcap=3.0, sinks=sinks
        )
        check(out[b], expected)
        check(lse[b], expected_lse, what="lse")


def test_func_alibi_scale_and_strided_query(rng, convert):
    qkv = draw(rng, 2, 9, 3, 4, 32)
    slopes = np.array([0.5, 0.25, 0.125, 0.0625], np.float32)
    q, k, v = (convert(qkv)[:, :, i] for i in range(3))
    out = qa.flash_attn_func(q, k, v, 0.0, 0.2, True, alibi_slopes=convert(slopes))
    for b in range(2):
        expected, _ = attend(
            qkv[b, :, 0], qkv[b, :, 1], qkv[b, :, 2], right=0, scale=0.2, slopes=slopes
        )
        check(out[b], expected)


def test_alibi_slopes_expanded_to_a_batch(rng, convert):
    q, k, v = draw(rng, 2, 3, 4, 32), draw(rng, 2, 9, 4, 32), draw(rng, 2, 9, 4, 32)
    slopes = np.array([0.5, 0.25, 0.125, 0.0625], np.float32)
    expanded = convert(slopes)[None]
    if not isinstance(expanded, np.ndarray):
        expanded = expanded.expand(2, 4)
    else:
        expanded = np.broadcast_to(expanded, (2, 4))
    out = qa.flash_attn_func(convert(q), convert(k), convert(v), causal=True, alibi_slopes=expanded)
    for b in range(2):
        check(out[b], attend(q[b], k[b], v[b], right=0, slopes=slopes)[0])


def test_func_takes_queries_of_any_strides(rng, convert):
    q, k, v = draw(rng, 5, 2, 4, 32), draw(rng, 2, 7, 4, 32), draw(rng, 2, 7, 4, 32)
    out = qa.flash_attn_func(convert(q).swapaxes(0, 1), convert(k), convert(v), causal=True)
    for b in range(2):
        check(out[b], attend(q[:, b], k[b], v[b], right=0)[0])


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (5, 0), (4, 2), (3, -1)])
def test_varlen(rng, convert, window, paged):
    for _ in range(3):
        batch = Batch(rng)
        k, v, table = np.concatenate(batch.k), np.concatenate(batch.v), None
        if paged:
            k, v, table = batch.key_cache, batch.value_cache, convert(batch.block_table)
        cu_seqlens_k = np.cumsum([0, *batch.seq_lens], dtype=np.int32)
        sinks = draw(rng, batch.num_heads)
        out, lse, _ = qa.flash_attn_varlen_func(
            convert(batch.q), convert(k), convert(v), convert(batch.query_start_loc),
            convert(cu_seqlens_k), batch.max_query_len, batch.max_seq_len, window_size=window,
            s_aux=convert(sinks), block_table=table, return_attn_probs=True,
        )  # fmt: skip
        expected, expected_lse = batch.expected(left=window[0], right=window[1], sinks=sinks)
        check(out, expected)
        check(lse, expected_lse, what="lse")


@pytest.mark.parametrize("appended", [0, 1, 6])
@pytest.mark.parametrize("paged", [False, True])
def test_with_kvcache(rng, convert, paged, appended):
    """The cache holds NaN wherever no token is; the new tokens' places too, before the call."""
    for causal in (False, True):
        rows = appended or 3
        lens = [(rows, rows + int(n)) for n in rng.integers(0, 90, rng.integers(1, 5))]
        batch = Batch(rng, lens=lens, head_size=64)
        size = batch.num_seqs
        if paged:
            k_cache, v_cache, table = batch.key_cache, batch.value_cache, batch.block_table
        else:
            shape = (size + 2, batch.max_seq_len + 3, batch.num_kv_heads, 64)
            k_cache, v_cache = (np.full(shape, np.nan, np.float32) for _ in range(2))
            table = None
        batch_idx = rng.permutation(size + 2)[:size].astype(np.int32)
        for s, (_, n) in enumerate(lens):
            if not paged:
                k_cache[batch_idx[s], :n], v_cache[batch_idx[s], :n] = batch.k[s], batch.v[s]
            if paged and appended:
                at = batch.slots[s][n - appended :]
                k_cache[at // batch.block_size, at % batch.block_size] = np.nan
                v_cache[at // batch.block_size, at % batch.block_size] = np.nan
            elif appended:
                k_cache[batch_idx[s], n - appended : n] = np.nan
        new_k, new_v = (
            convert(np.stack([x[n - appended :] for x, (_, n) in zip(kv, lens, strict=True)]))
            if appended
            else None
            for kv in (batch.k, batch.v)
        )
        out, lse = qa.flash_attn_with_kvcache(
            convert(batch.q.reshape(size, rows, *batch.q.shape[1:])),
            convert(k_cache), convert(v_cache), new_k, new_v,
            cache_seqlens=convert(batch.seq_lens - np.int32(appended)),
            cache_batch_idx=None if paged else convert(batch_idx),
            block_table=convert(table) if paged else None,
            causal=causal, return_softmax_lse=True,
        )  # fmt: skip
        expected, expected_lse = batch.expected(right=0 if causal else -1)
        check(host(out).reshape(expected.shape), expected)
        lse = host(lse).swapaxes(0, 1).reshape(expected_lse.shape)
        check(lse, expected_lse, what="lse")
        for s, (_, n) in enumerate(lens):  # and the new tokens are in the cache
            if paged:
                at = batch.slots[s] // batch.block_size, batch.slots[s] % batch.block_size
            else:
                at = batch_idx[s], slice(0, n)
            np.testing.assert_array_equal(k_cache[at], batch.k[s])
            np.testing.assert_array_equal(v_cache[at], batch.v[s])


def test_appended_tokens_past_the_cache_are_dropped(rng, convert):
    k_cache, v_cache = (draw(rng, 2, 8, 1, 16) for _ in range(2))
    before = k_cache.copy()
    q, k, v = (draw(rng, 1, 3, 1, 16) for _ in range(3))
    table = np.array([[1]], np.int32)
    qa.flash_attn_with_kvcache(
        convert(q), convert(k_cache), convert(v_cache), convert(k), convert(v),
        cache_seqlens=convert(np.array([6], np.int32)), block_table=convert(table),
    )  # fmt: skip
    np.testing.assert_array_equal(k_cache[1, 6:], k[0, :2])
    np.testing.assert_array_equal(k_cache[0], before[0])


def test_cache_seqlens_may_be_a_number_or_missing(rng, convert):
    q, k, v = draw(rng, 2, 1, 4, 32), draw(rng, 2, 12, 2, 32), draw(rng, 2, 12, 2, 32)
    for given, count in ((None, 12), (7, 7)):
        out = qa.flash_attn_with_kvcache(convert(q), convert(k), convert(v), cache_seqlens=given)
        for b in range(2):
            check(out[b], attend(q[b], k[b, :count], v[b, :count])[0])


def test_plans_that_are_kept_are_bounded():
    """Keys of another length are a cache of other blocks, so another kind of plan."""
    from quire_attn import one_shot

    for keys in range(1, one_shot.MOST_KINDS + 30):
        x = np.ones((1, keys, 1, 8), np.float32)
        qa.flash_attn_func(x, x, x)
    assert len(one_shot._idle) <= one_shot.MOST_KINDS


def test_plans_on_gpus_are_bounded_too_but_for_those_in_graphs(monkeypatch):
    """generate() has another length, so another kind of plan, each step."""
    torch = pytest.importorskip("torch")
    from quire_attn import one_shot

    class Plan:
        pass

    synchronized, idle, capturing = [], {}, False
    monkeypatch.setattr(one_shot, "_idle", idle)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronized.append)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    first = Plan()
    one_shot._in_graphs.add(first)
    one_shot._put_back((0, "cuda:0", 7), first)
    for i in range(1, one_shot.MOST_KINDS + 10):
        one_shot._put_back((i, "cuda:0", 7), Plan())
    assert len(idle) == one_shot.MOST_KINDS
    assert idle[(0, "cuda:0", 7)] == [first]
    assert synchronized == ["cuda:0"] * 10
    capturing = True
    one_shot._put_back((-1, "cuda:0", 7), Plan())
    assert len(synchronized) == 10
    assert len(idle) == one_shot.MOST_KINDS + 1


def test_rows_that_see_nothing(convert):
    """More rows than keys, causal: the first rows are before the first key."""
    ones = np.ones((1, 2, 1, 8), np.float32)
    q = np.ones((1, 5, 1, 8), np.float32)
    out, lse, _ = qa.flash_attn_func(
        convert(q), convert(ones), convert(ones), causal=True, return_attn_probs=True
    )
    np.testing.assert_array_equal(host(out)[0, :, 0, 0], [0, 0, 0, 1, 1])
    assert np.isneginf(host(lse)[0, 0, :3]).all()


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"dropout_p": 0.1}, "dropout_p"),
        ({"alibi_slopes": np.ones(2, np.float32)}, "alibi_slopes"),
        ({"alibi_slopes": np.ones((2, 2), np.float32), "causal": True}, "alibi_slopes"),
    ],
)
def test_what_is_not_supported_is_refused(arguments, name):
    x = np.ones((1, 2, 2, 8), np.float32)
    with pytest.raises(NotImplementedError, match=name):
        qa.flash_attn_func(x, x, x, **arguments)
