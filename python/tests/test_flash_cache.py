"""flash_attn_with_kvcache: rotary embedding and padding on the left of a cache."""

import numpy as np
import pytest
import quire_attn as qa

from reference import attend, check, host

NONE = (-1, -1)


def draw(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def rotated(x, angles, interleaved):
    """By complex numbers: x [tokens, heads, head size], angles [tokens, rotary size / 2]."""
    x = x.astype(np.float64)
    half = angles.shape[1]
    front = x[..., : 2 * half]
    pairs = front.reshape(*x.shape[:2], half, 2) if interleaved else np.stack(
        [front[..., :half], front[..., half:]], -1
    )  # fmt: skip
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles)[:, None]
    pairs = np.stack([turned.real, turned.imag], -1)
    front = pairs.reshape(front.shape) if interleaved else np.concatenate(
        [pairs[..., 0], pairs[..., 1]], -1
    )  # fmt: skip
    return np.concatenate([front, x[..., 2 * half :]], -1)


class Cache:
    """Two sequences in a cache of 3 rows of 24 tokens, or in pages of 8; NaN where no token is."""

    def __init__(self, rng, paged, leftpad=(0, 0)):
        self.lens = np.array([11, 17], np.int32)
        self.leftpad = np.array(leftpad, np.int32)
        self.rows = np.array([2, 0], np.int32)
        self.k, self.v = (
            [draw(rng, n - pad, 2, 32) for n, pad in zip(self.lens, leftpad, strict=True)]
            for _ in range(2)
        )
        self.caches = [np.full((3, 24, 2, 32), np.nan, np.float32) for _ in range(2)]
        for b, row in enumerate(self.rows):
            for cache, tokens in zip(self.caches, (self.k, self.v), strict=True):
                cache[row, leftpad[b] : self.lens[b]] = tokens[b]
        self.table = None
        if paged:
            self.caches = [cache.reshape(9, 8, 2, 32) for cache in self.caches]
            self.table = self.rows[:, None] * 3 + np.arange(3, dtype=np.int32)

    def arguments(self, convert):
        where = {"block_table": self.table} if self.table is not None else {
            "cache_batch_idx": self.rows
        }  # fmt: skip
        where["cache_seqlens"] = self.lens
        return {name: convert(array) for name, array in where.items()}

    def at(self, which, b, first, end):
        return self.caches[which].reshape(3, 24, 2, 32)[self.rows[b], first:end]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize(("causal", "window"), [(True, NONE), (False, NONE), (False, (6, 2))])
def test_rotary_embedding(rng, convert, interleaved, paged, causal, window):
    cache = Cache(rng, paged)
    q, k, v = draw(rng, 2, 3, 4, 32), draw(rng, 2, 3, 2, 32), draw(rng, 2, 3, 2, 32)
    angles = rng.uniform(0, 6, (30, 10))
    tables = (convert(f(angles).astype(np.float32)) for f in (np.cos, np.sin))
    out = qa.flash_attn_with_kvcache(
        convert(q), *map(convert, cache.caches), convert(k), convert(v), *tables,
        causal=causal, window_size=window, rotary_interleaved=interleaved,
        **cache.arguments(convert),
    )  # fmt: skip
    left, right = (window[0], 0) if causal else window
    for b, n in enumerate(cache.lens):
        new = angles[n : n + 3]
        own = new if causal or window != NONE else np.repeat(new[:1], 3, 0)
        keys = np.concatenate([cache.k[b], rotated(k[b], new, interleaved)])
        values = np.concatenate([cache.v[b], v[b]])
        expected, _ = attend(rotated(q[b], own, interleaved), keys, values, left=left, right=right)
        check(out[b], expected)
        np.testing.assert_allclose(cache.at(0, b, n, n + 3), keys[n:], rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(cache.at(1, b, n, n + 3), v[b])


@pytest.mark.parametrize("appended", [0, 2])
@pytest.mark.parametrize("window", [NONE, (4, 0)])
def test_padding_on_the_left(rng, convert, appended, window):
    cache = Cache(rng, paged=False, leftpad=(5, 0))
    q = draw(rng, 2, 2, 4, 32)
    k, v = (draw(rng, 2, appended, 2, 32) for _ in range(2))
    new = (convert(k), convert(v)) if appended else (None, None)
    out, lse = qa.flash_attn_with_kvcache(
        convert(q), *map(convert, cache.caches), *new, causal=True, window_size=window,
        cache_leftpad=convert(cache.leftpad), return_softmax_lse=True, **cache.arguments(convert),
    )  # fmt: skip
    for b, n in enumerate(cache.lens):
        keys, values = (np.concatenate([old[b], x[b]]) for old, x in ((cache.k, k), (cache.v, v)))
        expected, expected_lse = attend(q[b], keys, values, left=window[0], right=0)
        check(out[b], expected)
        check(lse[b], expected_lse, what="lse")
        np.testing.assert_array_equal(cache.at(0, b, n, n + appended), k[b])
        np.testing.assert_array_equal(cache.at(1, b, n, n + appended), v[b])
        assert np.isnan(cache.at(0, b, 0, cache.leftpad[b])).all()


def test_padded_sequences_have_places_by_the_padding_too(rng, convert):
    """As in FlashAttention: a token's angle is that of its place in the row."""
    cache = Cache(rng, paged=False, leftpad=(5, 2))
    q, k, v = draw(rng, 2, 1, 4, 32), draw(rng, 2, 1, 2, 32), draw(rng, 2, 1, 2, 32)
    angles = rng.uniform(0, 6, (24, 16))
    out = qa.flash_attn_with_kvcache(
        convert(q), *map(convert, cache.caches), convert(k), convert(v),
        *(convert(f(angles).astype(np.float32)) for f in (np.cos, np.sin)), causal=True,
        cache_leftpad=convert(cache.leftpad), rotary_interleaved=False, **cache.arguments(convert),
    )  # fmt: skip
    for b, n in enumerate(cache.lens):
        own = angles[n : n + 1]
        keys = np.concatenate([cache.k[b], rotated(k[b], own, False)])
        values = np.concatenate([cache.v[b], v[b]])
        check(out[b], attend(rotated(q[b], own, False), keys, values)[0])


def test_appended_tokens_do_not_run_into_the_next_row(rng, convert):
    caches = [np.zeros((2, 4, 1, 8), np.float32) for _ in range(2)]
    x = np.ones((1, 3, 1, 8), np.float32)
    qa.flash_attn_with_kvcache(
        convert(x), *map(convert, caches), convert(x), convert(x),
        cache_seqlens=convert(np.array([2], np.int32)),
        cache_leftpad=convert(np.array([1], np.int32)),
    )  # fmt: skip
    for cache in caches:
        np.testing.assert_array_equal(cache[:, :, 0, 0], [[0, 0, 1, 1], [0, 0, 0, 0]])


def test_sequences_that_are_not_there(convert):
    """Padded batches have a length of -1: nothing is written, and the output is 0."""
    caches = [np.zeros((2, 4, 1, 8), np.float32) for _ in range(2)]
    x = np.ones((2, 1, 1, 8), np.float32)
    out = qa.flash_attn_with_kvcache(
        convert(x), *map(convert, caches), convert(x), convert(x), causal=True,
        cache_seqlens=convert(np.array([1, -1], np.int32)),
        block_table=convert(np.array([[1], [-1]], np.int32)),
    )  # fmt: skip
    weight = np.exp(8**0.5) / (1 + np.exp(8**0.5))  # the key before is 0
    np.testing.assert_allclose(host(out)[:, 0, 0, 0], [weight, 0], rtol=1e-5)
    np.testing.assert_array_equal(caches[0][:, :, 0, 0], [[0, 0, 0, 0], [0, 1, 0, 0]])


def test_bad_arguments_are_named(convert):
    x = np.ones((1, 2, 2, 8), np.float32)
    angles = np.ones((2, 4), np.float32)
    table = np.zeros((1, 1), np.int32)

    def expect(name, *new, **arguments):
        given = {n: convert(a) if isinstance(a, np.ndarray) else a for n, a in arguments.items()}
        caches = (convert(arguments.pop("cache", x)) for _ in range(2))
        given.pop("cache", None)
        with pytest.raises(ValueError, match=name):
            qa.flash_attn_with_kvcache(convert(x), *caches, *map(convert, new), **given)

    both = {"rotary_cos": angles, "rotary_sin": angles}
    expect("rotary_cos: expected with k, v and cache_seqlens", cache_seqlens=1, **both)
    expect("rotary_cos: expected with k, v and cache_seqlens", x, x, **both)
    expect("rotary_sin", x, x, cache_seqlens=0, rotary_cos=angles)
    expect("rotary_cos", x, x, cache_seqlens=0, rotary_sin=angles)
    wide = np.ones((2, 5), np.float32)
    expect("at most head_size / 2 = 4", x, x, cache_seqlens=0, rotary_cos=wide, rotary_sin=wide)
    expect("each of the 2 positions", x, x, cache_seqlens=0, rotary_cos=angles[:1],
           rotary_sin=angles)  # fmt: skip
    expect("cache_leftpad", cache_leftpad=table[0], block_table=table)
    apart = np.ones((2, 4, 2, 8), np.float32)[:, :2]
    expect("k_cache: with cache_leftpad", cache=apart, cache_leftpad=table[0])
