#!/usr/bin/env python3
"""Attention over several devices: heads split, and context split.

    torchrun --nproc-per-node 2 examples/python/ranks.py                 # one CPU, gloo
    torchrun --nproc-per-node 2 examples/python/ranks.py --device cuda   # a GPU each, NCCL

docs/guide/distributed.md is the text to it.

Each rank also computes the whole batch alone and compares. Needs torch and quire_attn.
"""

import argparse
import os
import sys

import torch
import torch.distributed as dist
from quire_attn import Mask, PagedKvCache, Plan, attention, merge_states, write_kv_cache
from quire_attn.flash import flash_attn_varlen_func

NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, BLOCK_SIZE = 16, 4, 64, 16
WINDOW = 150  # tokens that a row sees: positions matter
# (new tokens, tokens after this step): decodes, drafts, a prompt, a prompt that goes on.
BATCH = [(1, 700), (1, 33), (4, 260), (48, 48), (100, 400)]


class Step:
    """A step of an engine: each sequence's tokens of earlier steps and its new ones."""

    def __init__(self, device, dtype):
        self.device, self.dtype = device, dtype
        self.query_lens = [new for new, _ in BATCH]
        self.seq_lens = [total for _, total in BATCH]
        self.num_tokens = sum(self.query_lens)
        self.starts = self.int32([sum(self.query_lens[:i]) for i in range(len(BATCH) + 1)])
        # The same numbers on every rank.
        generator = torch.Generator().manual_seed(0)

        def normal(*shape):
            return torch.randn(shape, generator=generator).to(device, dtype)

        self.query = normal(self.num_tokens, NUM_HEADS, HEAD_SIZE)
        self.key, self.value = (
            [normal(total, NUM_KV_HEADS, HEAD_SIZE) for total in self.seq_lens] for _ in range(2)
        )

    def int32(self, values):
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def new_tokens(self, tensors):
        """[num_tokens, ...] of this step's tokens."""
        parts = [x[len(x) - new :] for x, new in zip(tensors, self.query_lens, strict=True)]
        return torch.cat(parts)

    def earlier_tokens(self, tensors, rank=0, size=1):
        """A list: each sequence's tokens of earlier steps, of those each size-th from `rank` on."""
        return [
            x[: len(x) - new][rank::size] for x, new in zip(tensors, self.query_lens, strict=True)
        ]


def filled_cache(keys, values):
    """A cache that holds these tokens, [its sequences' lengths, block table, cache]."""
    device, dtype, heads = keys[0].device, keys[0].dtype, keys[0].shape[1]
    counts = [-(-len(x) // BLOCK_SIZE) for x in keys]
    firsts = [sum(counts[:i]) for i in range(len(counts))]
    table = torch.zeros(len(keys), max(*counts, 1), dtype=torch.int32)
    for s, (first, count) in enumerate(zip(firsts, counts, strict=True)):
        table[s, :count] = torch.arange(first, first + count)
    kv = torch.zeros(sum(counts) + 1, 2, BLOCK_SIZE, heads, HEAD_SIZE, dtype=dtype, device=device)
    cache = PagedKvCache.from_combined(kv)
    slots = [
        first * BLOCK_SIZE + torch.arange(len(x)) for first, x in zip(firsts, keys, strict=True)
    ]
    write_kv_cache(torch.cat(keys), torch.cat(values), cache, torch.cat(slots).to(device))
    lens = torch.tensor([len(x) for x in keys], dtype=torch.int32)
    return lens.to(device), table.to(device), cache


def attend(step, query, keys, values, lse=None, **positions):
    """Attention of this step's rows over a cache of these tokens."""
    seq_lens, block_table, cache = filled_cache(keys, values)
    plan = Plan(
        num_heads=query.shape[1], num_kv_heads=keys[0].shape[1], head_size=HEAD_SIZE,
        dtype=step.dtype, device=step.device, block_size=BLOCK_SIZE,
        mask=Mask.sliding_window(WINDOW),
    )  # fmt: skip
    plan.update(
        query_start_loc=step.starts, seq_lens=seq_lens, block_table=block_table,
        num_actual_tokens=step.num_tokens, max_query_len=max(step.query_lens), **positions,
    )  # fmt: skip
    return attention(plan, query, cache, lse=lse)


def split_heads(step, rank, size):
    """Tensor parallelism: a rank has some heads, their part of the cache, and no need to talk."""
    q = slice(rank * NUM_HEADS // size, (rank + 1) * NUM_HEADS // size)
    kv = slice(rank * NUM_KV_HEADS // size, (rank + 1) * NUM_KV_HEADS // size)
    keys, values = ([x[:, kv].contiguous() for x in y] for y in (step.key, step.value))
    return attend(step, step.query[:, q].contiguous(), keys, values)


def split_context(step, rank, size):
    """A rank has every size-th earlier token of all KV heads, and its part of the query heads."""
    own = slice(rank * NUM_HEADS // size, (rank + 1) * NUM_HEADS // size)
    query = step.query[:, own].contiguous()

    # 1. The queries of all heads, since each rank has a part of what each of them reads.
    parts = [torch.empty_like(query) for _ in range(size)]
    dist.all_gather(parts, query)
    everyones = torch.cat(parts, dim=1)

    # 2. Over this rank's tokens, at their true positions: rank, rank + size, ...
    earlier = [total - new for total, new in zip(step.seq_lens, step.query_lens, strict=True)]
    lse = torch.empty(NUM_HEADS, step.num_tokens, dtype=torch.float32, device=step.device)
    part = attend(
        step, everyones, step.earlier_tokens(step.key, rank, size),
        step.earlier_tokens(step.value, rank, size), lse,
        kv_offset=step.int32([rank] * len(BATCH)), kv_stride=step.int32([size] * len(BATCH)),
        q_offset=step.int32(earlier),
    )  # fmt: skip

    # 3. Combined by logsumexp, in fp32; each rank keeps its own heads.
    all_lse = [torch.empty_like(lse) for _ in range(size)]
    dist.all_gather(all_lse, lse)
    total = torch.logsumexp(torch.stack(all_lse), dim=0)
    share = torch.exp(lse - total).nan_to_num(0.0)  # -inf - -inf: nobody has a key for the row
    weighted = part.float() * share.t()[:, :, None]
    dist.all_reduce(weighted)
    earlier_out, earlier_lse = weighted[:, own].to(step.dtype).contiguous(), total[own].contiguous()

    # 4. The step's own tokens, which every rank has.
    q_per_kv = NUM_HEADS // NUM_KV_HEADS
    kv = slice(own.start // q_per_kv, -(-own.stop // q_per_kv))
    key, value = (step.new_tokens(x)[:, kv].contiguous() for x in (step.key, step.value))
    longest = max(step.query_lens)
    new_out, new_lse, _ = flash_attn_varlen_func(
        query, key, value, step.starts, step.starts, longest, longest, causal=True,
        window_size=(WINDOW - 1, 0), return_attn_probs=True,
    )  # fmt: skip
    return merge_states(earlier_out, earlier_lse, new_out, new_lse)[0]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    args = parser.parse_args()
    on_cuda = args.device == "cuda"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_cuda else torch.device("cpu")
    if on_cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_cuda else "gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    if NUM_KV_HEADS % size:
        sys.exit(f"ranks.py: expected a number of ranks that divides {NUM_KV_HEADS}, got {size}")
    step = Step(device, getattr(torch, args.dtype))
    alone = attend(step, step.query, step.key, step.value).float()
    own = slice(rank * NUM_HEADS // size, (rank + 1) * NUM_HEADS // size)
    limit = 1e-5 if args.dtype == "float32" else 2e-2
    failed = False
    for split in (split_heads, split_context):
        error = (split(step, rank, size).float() - alone[:, own]).abs().max().item()
        failed |= not error <= limit  # NaN too
        print(f"rank {rank} of {size}, {split.__name__}: off by {error:.1e}", flush=True)
    dist.destroy_process_group()
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
