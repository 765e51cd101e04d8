"""A workload in memory as `quire bench` lays it out, and what its rows should be."""

import random

import torch

DTYPE = torch.bfloat16
SINK = 0.5  # the logit of every head's sink, as kSink in bench/layer.h
SAMPLED_ROWS = 12


class PagedBatch:
    """Blocks of all sequences in random order; `num_caches` caches that calls take turns on."""

    def __init__(self, workload, model, block_size, num_caches, device="cuda", seed=1):
        self.device = device
        self.name = workload["name"]
        self.num_heads, self.num_kv_heads = model["num_heads"], model["num_kv_heads"]
        self.head_size = model["head_size"]
        self.window = model["sliding_window"] or 0
        self.soft_cap = model["soft_cap"]
        self.block_size = block_size
        self.scale = self.head_size**-0.5
        self.query_lens = [query_len for query_len, _ in workload["batch"]]
        self.seq_lens = [seq_len for _, seq_len in workload["batch"]]
        self.num_tokens = sum(self.query_lens)
        self.max_query_len, self.max_seq_len = max(self.query_lens), max(self.seq_lens)
        self.starts = [sum(self.query_lens[:i]) for i in range(len(self.query_lens) + 1)]

        shared = workload.get("shared_prefix", 0) // block_size
        self.blocks, num_blocks = self._place_blocks(shared, random.Random(seed))
        width = max(len(blocks) for blocks in self.blocks)
        table = [blocks + [0] * (width - len(blocks)) for blocks in self.blocks]
        self.block_table = self._int32(table)
        self.query_start_loc = self._int32(self.starts)
        self.seq_lens_tensor = self._int32(self.seq_lens)
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape):
            return torch.randn(shape, dtype=DTYPE, device=device, generator=generator)

        self.query = normal(self.num_tokens, self.num_heads, self.head_size)
        self.output = torch.empty_like(self.query)
        self.sinks = (torch.full((self.num_heads,), SINK, dtype=DTYPE, device=device)
                      if model["sinks"] else None)
        # [num_blocks, K or V, block_size, num_kv_heads, head_size]
        cache = normal(num_blocks, 2, block_size, self.num_kv_heads, self.head_size)
        self.caches = [cache] + [cache.clone() for _ in range(num_caches - 1)]

    def _place_blocks(self, num_shared, rng):
        """Each sequence's blocks, behind those that all share. Those in front of every window do
        not exist, as engines free them: their entries name any other block."""
        counts = [-(-seq_len // self.block_size) for seq_len in self.seq_lens]
        firsts = [0] * len(counts)  # the first block of each sequence's own
        if self.window:
            firsts = [max(0, seq_len - query_len - self.window + 1) // self.block_size
                      for query_len, seq_len in zip(self.query_lens, self.seq_lens)]
        elif num_shared:
            firsts = [num_shared] * len(counts)
        num_blocks = num_shared + sum(counts) - sum(firsts)
        order = list(range(num_blocks))
        rng.shuffle(order)
        blocks, used = [], num_shared
        for count, first in zip(counts, firsts):
            front = [rng.choice(order) for _ in range(first)] if self.window else order[:first]
            blocks.append(front + order[used:used + count - first])
            used += count - first
        return blocks, num_blocks

    def is_decode(self):
        return self.max_query_len == 1

    def is_uniform(self):
        """All sequences have the same lengths: the batch is a dense tensor."""
        return len(set(zip(self.query_lens, self.seq_lens))) == 1

    def dense_query(self):
        """[num_seqs, num_heads, query_len, head_size], of a uniform batch."""
        shape = (len(self.seq_lens), self.max_query_len, self.num_heads, self.head_size)
        return self.query.view(shape).transpose(1, 2)

    def dense_cache(self, index):
        """K and V as [num_seqs, num_kv_heads, seq_len, head_size], of a uniform batch."""
        shape = (len(self.seq_lens), -1, self.num_kv_heads, self.head_size)
        blocks = self.caches[index][self.block_table.long()]
        return [blocks[:, :, i].reshape(shape)[:, :self.max_seq_len].transpose(1, 2)
                for i in (0, 1)]

    def sample(self, seed=2):
        """(sequence, row) pairs: of the first, last, longest and shortest sequence, of that with
        the most rows and of some others; the first row, the last and one between."""
        rng = random.Random(seed)
        num_seqs = len(self.seq_lens)
        by_length = sorted(range(num_seqs), key=lambda s: self.seq_lens[s])
        most_rows = max(range(num_seqs), key=lambda s: self.query_lens[s])
        chosen = [0, num_seqs - 1, by_length[0], by_length[-1], most_rows]
        chosen += [rng.randrange(num_seqs) for _ in range(SAMPLED_ROWS)]
        rows = {}  # an ordered set
        for sequence in chosen:
            last = self.query_lens[sequence] - 1
            for row in (0, last, rng.randint(0, last)):
                rows[sequence, row] = None
        return list(rows)[:SAMPLED_ROWS]

    def expected(self, sequence, row):
        """The output of one query row, [num_heads, head_size], in float32 from cache 0."""
        position = self.seq_lens[sequence] - self.query_lens[sequence] + row
        first = max(0, position - self.window + 1) if self.window else 0
        positions = torch.arange(first, position + 1, device=self.device)
        blocks = self.block_table[sequence, positions // self.block_size].long()
        rows = self.caches[0][blocks, :, positions % self.block_size].float()
        keys, values = rows[:, 0], rows[:, 1]
        query = self.query[self.starts[sequence] + row].float()
        query = query.view(self.num_kv_heads, -1, self.head_size)
        logits = self.scale * torch.einsum("hgd,nhd->hgn", query, keys)
        if self.soft_cap:
            logits = self.soft_cap * torch.tanh(logits / self.soft_cap)
        if self.sinks is not None:
            sinks = self.sinks.float().view(self.num_kv_heads, -1, 1)
            logits = torch.cat([logits, sinks], dim=2)
        weights = torch.softmax(logits, dim=2)[:, :, :len(positions)]
        return torch.einsum("hgn,nhd->hgd", weights, values).reshape(-1, self.head_size)

    def _int32(self, values):
        return torch.tensor(values, dtype=torch.int32, device=self.device)
