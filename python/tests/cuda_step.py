"""A batch on a GPU in fp16, as an engine would hold it: for tests of what is CUDA's own."""

import numpy as np
import quire_attn as qa
import torch
from serving import new_tokens

from reference import Batch, check

DEVICE = torch.device("cuda", 0)
SHAPE = {"num_heads": 8, "num_kv_heads": 2, "head_size": 128, "block_size": 16}


def convert(array):
    return torch.from_numpy(array).to(DEVICE)


convert.device = "cuda:0"


class Step:
    """A batch on the GPU in fp16, its cache, and what attention over it must be."""

    def __init__(self, rng, lens, **other):
        self.batch = Batch(rng, dtype="float16", lens=lens, **SHAPE, **other)
        self.key, self.value, self.slots = map(convert, new_tokens(self.batch))
        self.pages = torch.zeros(
            self.batch.key_cache.shape[0], 2, *self.batch.key_cache.shape[1:],
            dtype=torch.float16, device=DEVICE,
        )  # fmt: skip
        # NaN is where no token is; this step's own come with write_kv_cache().
        self.cache = qa.PagedKvCache.from_combined(self.pages)
        self.cache.key.copy_(convert(self.batch.key_cache))
        self.cache.value.copy_(convert(self.batch.value_cache))
        for pages in (self.cache.key, self.cache.value):
            pages.flatten(0, 1)[self.slots] = torch.nan
        self.query = convert(self.batch.q)
        self.out = torch.full_like(self.query, torch.nan)
        self.plan = qa.Plan(**self.batch.plan_arguments(convert))
        self.arguments = self.batch.update_arguments(convert)

    def run(self):
        self.plan.update(**self.arguments)
        self.layer()

    def layer(self):
        qa.write_kv_cache(self.key, self.value, self.cache, self.slots)
        qa.attention(self.plan, self.query, self.cache, output=self.out)

    def check(self):
        check(self.out, self.batch.expected(right=0)[0], "float16")


LENS = [(1, 700), (1, 33), (5, 260), (48, 48), (100, 400)]


def one_shot(step):
    batch = step.batch
    qa.unified_attention(
        step.query, step.cache.key, step.cache.value, step.out, step.arguments["query_start_loc"],
        batch.max_query_len, step.arguments["seq_lens"], batch.max_seq_len, 128**-0.5, True,
        (-1, -1), step.arguments["block_table"], 0.0, None, None, None,
    )  # fmt: skip


def flash(step):
    batch = step.batch
    step.out = qa.flash_attn_varlen_func(
        step.query, step.cache.key, step.cache.value, step.arguments["query_start_loc"],
        convert(np.cumsum([0, *batch.seq_lens], dtype=np.int32)), batch.max_query_len,
        batch.max_seq_len, causal=True, block_table=step.arguments["block_table"],
    )  # fmt: skip
