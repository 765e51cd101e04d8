"""Decode context parallelism: ranks in threads, each with every n-th token of the cache."""

import threading

import numpy as np
import pytest
from quire_attn.backend import QuireAttentionImpl, QuireAttentionMetadataBuilder
from quire_attn.backend.context_parallel import ContextShard
from serving import common_metadata, new_tokens

from reference import Batch, check

torch = pytest.importorskip("torch")


class Group:
    """The collectives of a few threads."""

    def __init__(self, size):
        self.parts = [None] * size
        self.barrier = threading.Barrier(size)

    def of(self, rank):
        return Rank(self, rank)

    def exchange(self, rank, tensor):
        self.parts[rank] = tensor
        self.barrier.wait(timeout=30)
        parts = list(self.parts)
        self.barrier.wait(timeout=30)
        return parts


class Rank:
    def __init__(self, group, rank):
        self.group, self.rank = group, rank

    def all_gather(self, tensor, dim):
        return torch.cat(self.group.exchange(self.rank, tensor), dim)

    def reduce_scatter(self, tensor, dim):
        total = sum(self.group.exchange(self.rank, tensor))
        return total.chunk(len(self.group.parts), dim)[self.rank]


def run_rank(rank, group, size, batch, device, outputs, **layer_arguments):
    """One rank's step: writes its share of all tokens, then attends for its own heads."""
    heads = batch.num_heads // size
    own = slice(rank * heads, (rank + 1) * heads)
    sinks = layer_arguments.pop("sinks", None)

    def tensor(array):
        return torch.from_numpy(array).to(device)

    layer = QuireAttentionImpl(
        heads, batch.head_size, batch.head_size**-0.5, batch.num_kv_heads,
        sinks=None if sinks is None else tensor(sinks[own]), **layer_arguments,
    )  # fmt: skip
    shape = (*batch.key_cache.shape[:1], 2, *batch.key_cache.shape[1:])
    cache = torch.full(shape, torch.nan, device=device)
    slots = []
    for positions, mine in ((np.arange(len(s)), s) for s in batch.slots):
        # Token j of the rank's share lies where token j of the sequence would.
        local = np.full(len(mine), -1, np.int64)
        local[positions % size == rank] = mine[: len(mine[rank::size])]
        slots.append(local)
    key, value = (tensor(np.concatenate(x)) for x in (batch.k, batch.v))
    layer.do_kv_cache_update(None, key, value, cache, tensor(np.concatenate(slots)))
    common = common_metadata(batch, tensor)
    common.slot_mapping = torch.full_like(common.slot_mapping, -1)  # all are there already
    metadata = QuireAttentionMetadataBuilder(None, [], None, device).build(0, common)
    local_lens = tensor(np.array([len(s[rank::size]) for s in batch.slots], np.int32))
    metadata.context = ContextShard(group.of(rank), rank, size, local_lens)
    _, new_value, _ = new_tokens(batch)
    out = torch.full((batch.num_tokens, heads, batch.head_size), torch.nan, device=device)
    layer.forward(None, tensor(batch.q[:, own]), None, tensor(new_value), cache, metadata, out)
    outputs[rank] = out


def run(batch, size, device, **layer_arguments):
    group, outputs, errors = Group(size), [None] * size, []

    def guarded(rank):
        try:
            run_rank(rank, group, size, batch, device, outputs, **layer_arguments)
        except Exception as error:
            errors.append(error)
            group.barrier.abort()

    threads = [threading.Thread(target=guarded, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return torch.cat(outputs, 1)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_ranks_together_are_one(rng, device, size, window, has_sinks):
    """Decodes, drafts and a prefill in one batch; one sequence is shorter than the group."""
    batch = Batch(
        rng, num_heads=12, num_kv_heads=2, head_size=32,
        lens=[(1, 40), (4, 37), (20, 20), (1, 1), (2, 90)],
    )  # fmt: skip
    sinks = batch.draw(rng, 12) if has_sinks else None
    out = run(batch, size, device, sliding_window=window, sinks=sinks, logits_soft_cap=3.0)
    left = {} if window is None else {"left": window - 1}
    check(out, batch.expected(right=0, softcap=3.0, sinks=sinks, **left)[0])


def test_what_ranks_cannot_do(rng):
    batch = Batch(rng, num_heads=2, num_kv_heads=1, lens=[(1, 9)])
    with pytest.raises(NotImplementedError, match="alibi_slopes"):
        run(batch, 1, "cpu", alibi_slopes=[0.1, 0.2])
