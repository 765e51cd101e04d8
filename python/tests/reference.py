"""Attention in float64 NumPy, plain loops; and paged caches with poison."""

import numpy as np

RTOL = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}


def attend(
    q, k, v, *, left=-1, right=-1, scale=None, softcap=0.0, slopes=None, sinks=None, visible=None,
    bias=None,
):  # fmt: skip
    """One sequence: q [m, H, D], k [n, G, D], v [n, G, Dv]; row i at position n - m + i.

    left, right: how far a row sees, -1 without end. visible: bool [m, n] in place of that. Returns
    out [m, H, Dv] and lse [H, m].
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    (m, num_heads, head_size), (n, num_kv_heads, _) = q.shape, k.shape
    distance = np.arange(n)[None, :] - (np.arange(m)[:, None] + n - m)  # j - p
    if visible is None:
        visible = np.ones((m, n), bool)
        if left >= 0:
            visible &= distance >= -left
        if right >= 0:
            visible &= distance <= right
    out = np.zeros((m, num_heads, v.shape[2]))
    lse = np.full((num_heads, m), -np.inf)
    for h in range(num_heads):
        g = h // (num_heads // num_kv_heads)
        score = q[:, h] @ k[:, g].T * (head_size**-0.5 if scale is None else scale)
        if softcap:
            score = softcap * np.tanh(score / softcap)
        if slopes is not None:
            score = score + float(slopes[h]) * distance
        if bias is not None:
            score = score + bias
        score = np.where(visible, score, -np.inf)
        extra = np.full((m, 1), -np.inf if sinks is None else float(sinks[h]))
        highest = np.max(np.concatenate([score, extra], 1), 1, keepdims=True)
        seen = np.isfinite(highest[:, 0])
        weight = np.exp(score[seen] - highest[seen])
        total = weight.sum(1) + np.exp(extra[seen, 0] - highest[seen, 0])
        out[seen, h] = weight @ v[:, g] / total[:, None]
        lse[h, seen] = highest[seen, 0] + np.log(total)
    return out, lse


def host(array):
    """NumPy's array of it, from wherever it is."""
    return np.asarray(array.cpu() if hasattr(array, "cpu") else array)


def check(actual, expected, dtype="float32", what="output"):
    """Relative error of the whole and of each element, so that one wrong row cannot hide."""
    actual = host(actual).astype(np.float64)
    rtol = RTOL[dtype]
    assert actual.shape == expected.shape
    assert not np.isnan(actual).any(), f"{what} has NaN"
    infinite = np.isinf(expected)
    np.testing.assert_array_equal(actual[infinite], expected[infinite])
    actual, expected = actual[~infinite], expected[~infinite]
    size = np.linalg.norm(expected)
    assert np.linalg.norm(actual - expected) <= rtol * size + 1e-30, f"{what} is off as a whole"
    typical = size / max(expected.size, 1) ** 0.5
    np.testing.assert_array_less(
        abs(actual - expected), 10 * rtol * (abs(expected) + typical) + 1e-30
    )


class Batch:
    """Random sequences over a paged cache. Slots and blocks that are not theirs hold NaN."""

    def __init__(
        self, rng, *, dtype="float32", num_heads=None, num_kv_heads=None, head_size=None,
        head_size_v=None, block_size=None, lens=None,
    ):  # fmt: skip
        self.num_kv_heads = num_kv_heads or int(rng.integers(1, 4))
        self.num_heads = num_heads or self.num_kv_heads * int(rng.integers(1, 6))
        self.head_size = head_size or int(rng.choice([8, 33, 64, 80, 128]))
        self.head_size_v = head_size_v or self.head_size
        self.block_size = block_size or int(rng.choice([1, 5, 16, 32]))
        if lens is None:
            lens = []
            for _ in range(rng.integers(1, 6)):
                query_len = int(rng.choice([0, 1, 1, 3, 17, 60]))
                lens.append((query_len, query_len + int(rng.integers(0, 120))))
        self.lens = lens
        self.num_seqs = len(lens)
        self.num_tokens = sum(m for m, _ in lens)
        self.q = self.draw(rng, (self.num_tokens, self.num_heads, self.head_size), dtype)
        self.k = [self.draw(rng, (n, self.num_kv_heads, self.head_size), dtype) for _, n in lens]
        self.v = [self.draw(rng, (n, self.num_kv_heads, self.head_size_v), dtype) for _, n in lens]
        self.query_start_loc = np.cumsum([0] + [m for m, _ in lens], dtype=np.int32)
        self.seq_lens = np.array([n for _, n in lens], np.int32)
        self.max_query_len = max([m for m, _ in lens], default=0)
        self.max_seq_len = max([n for _, n in lens], default=0)
        self._page(rng, dtype)

    @staticmethod
    def draw(rng, shape, dtype="float32"):
        return rng.standard_normal(shape).astype(dtype)

    def _page(self, rng, dtype):
        blocks = [-(-n // self.block_size) for _, n in self.lens]
        num_blocks = sum(blocks) + 3
        order = rng.permutation(num_blocks).astype(np.int32)
        # Entries behind a sequence's blocks may hold anything.
        self.block_table = rng.integers(
            -5, 2**31, (self.num_seqs, max(blocks, default=0) + 2), dtype=np.int64
        ).astype(np.int32)
        shape = (num_blocks, self.block_size, self.num_kv_heads)
        self.key_cache = np.full((*shape, self.head_size), np.nan, dtype)
        self.value_cache = np.full((*shape, self.head_size_v), np.nan, dtype)
        first = 0
        self.slots = []
        for s, (_, n) in enumerate(self.lens):
            self.block_table[s, : blocks[s]] = order[first : first + blocks[s]]
            first += blocks[s]
            j = np.arange(n)
            block, offset = self.block_table[s][j // self.block_size], j % self.block_size
            self.key_cache[block, offset] = self.k[s]
            self.value_cache[block, offset] = self.v[s]
            self.slots.append(block.astype(np.int64) * self.block_size + offset)

    def rows(self, array):
        """The part of a [num_tokens, ...] array that is each sequence's."""
        return np.split(array, self.query_start_loc[1:-1]) if self.num_seqs else []

    def expected(self, **arguments):
        """Output [num_tokens, H, Dv], lse [H, num_tokens]. A list gives each sequence its own."""
        out, lse = (
            [np.zeros((0, self.num_heads, self.head_size_v))],
            [np.zeros((self.num_heads, 0))],
        )
        for s, q in enumerate(self.rows(self.q)):
            own = {n: a[s] if isinstance(a, list) else a for n, a in arguments.items()}
            o, e = attend(q, self.k[s], self.v[s], **own)
            out.append(o)
            lse.append(e)
        return np.concatenate(out), np.concatenate(lse, 1)

    def plan_arguments(self, convert=None):
        return {
            "device": getattr(convert, "device", "cpu"),
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "head_size": self.head_size,
            "head_size_v": self.head_size_v,
            "block_size": self.block_size,
            "dtype": self.q.dtype.name,
        }

    def update_arguments(self, convert):
        return {
            "query_start_loc": convert(self.query_start_loc),
            "seq_lens": convert(self.seq_lens),
            "block_table": convert(self.block_table),
            "num_actual_tokens": self.num_tokens,
        }
