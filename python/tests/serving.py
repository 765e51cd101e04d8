"""Caches as vLLM lays them out, and batches as its runner hands them over."""

import copy
from types import SimpleNamespace

import numpy as np

# vLLM's six physical orders of layers, blocks, heads, slots (and a row's content last), from 0.29.
LAYOUTS = ("LBNHC", "LBHNC", "BLHNC", "BLNHC", "BHLNC", "LHBNC")
NUM_LAYERS = 2


def empty_cache(batch, layout, dtype="float32", row=None, poison=np.nan):
    """A layer's cache with poison in it: [num_blocks, 2, ...] for "5d", else [B, H, N, C]."""
    num_blocks, block_size, num_kv_heads, head_size = batch.key_cache.shape
    row = row or head_size
    if layout == "5d":
        return np.full((num_blocks, 2, block_size, num_kv_heads, row), poison, dtype)
    sizes = {"L": NUM_LAYERS, "B": num_blocks, "H": num_kv_heads, "N": block_size, "C": 2 * row}
    whole = np.full([sizes[name] for name in layout], poison, dtype)
    return whole.transpose([layout.index(name) for name in "LBHNC"])[1]


def cached(batch, cache):
    """Puts the context into the cache: all keys and values but this step's."""
    key, value = (cache[:, 0], cache[:, 1]) if cache.ndim == 5 else halves(cache)
    for s, (query_len, seq_len) in enumerate(batch.lens):
        slots = batch.slots[s][: seq_len - query_len]
        at = slots // batch.block_size, slots % batch.block_size
        key[at] = batch.k[s][: seq_len - query_len]
        value[at] = batch.v[s][: seq_len - query_len]
    return cache


def halves(cache):
    slots_first = cache.swapaxes(1, 2)
    return np.split(slots_first, 2, axis=-1)


def new_tokens(batch):
    """Key, value and slot_mapping of this step's tokens."""
    parts = [
        [array[seq_len - query_len :] for array in arrays]
        for arrays, (query_len, seq_len) in zip(
            zip(batch.k, batch.v, batch.slots, strict=True), batch.lens, strict=True
        )
    ]
    return tuple(np.concatenate(column) for column in zip(*parts, strict=True))


def common_metadata(batch, convert, **other):
    """vLLM's CommonAttentionMetadata, as far as a builder reads it."""
    fields = {
        "query_start_loc": convert(batch.query_start_loc),
        "seq_lens": convert(batch.seq_lens),
        "num_reqs": batch.num_seqs,
        "num_actual_tokens": batch.num_tokens,
        "max_query_len": batch.max_query_len,
        "max_seq_len": batch.max_seq_len,
        "block_table_tensor": convert(batch.block_table),
        "slot_mapping": convert(new_tokens(batch)[2]),
        "causal": True,
    }
    return SimpleNamespace(**{**fields, **other})


def shortened(batch, lens):
    """The same sequences when they were shorter."""
    short = copy.copy(batch)
    short.lens = lens
    short.seq_lens = np.array([n for _, n in lens], np.int32)
    for name in ("k", "v", "slots"):
        cut = [array[:n] for array, (_, n) in zip(getattr(batch, name), lens, strict=True)]
        setattr(short, name, cut)
    return short


def forward(layer, batch, convert, cache, metadata, *, scales=None, width=None, **other):
    """One call of a layer; the output was NaN, all of it must have been written."""
    key, value, _ = new_tokens(batch)
    shape = (batch.num_tokens, batch.num_heads, batch.head_size_v)
    out = np.full(shape, np.nan, np.float32)
    returned = layer.forward(
        scales, convert(batch.q), convert(key), convert(value), convert(cache), metadata,
        convert(out), **other,
    )  # fmt: skip
    assert returned.shape == shape
    return out
