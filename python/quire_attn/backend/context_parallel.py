"""Decode context parallelism: each rank holds every n-th token of the cache.

All ranks of a group have the same KV heads and different query heads. A rank gathers the queries of
all, attends its own tokens, which have their true positions there, and the results are merged by
their logsumexp; each rank keeps its own heads'. torch only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..arrays import Array


@dataclass(frozen=True, eq=False)
class ContextShard:
    """Which tokens of a step's sequences this rank has: position rank, rank + size, ..."""

    group: Any
    """Has all_gather(tensor, dim) and reduce_scatter(tensor, dim), as vLLM's groups."""
    rank: int
    size: int
    seq_lens: Array
    """int32 [num_seqs]: how many of each sequence's tokens, this step's included."""

    def positions(self, metadata: Any) -> dict[str, Any]:
        """The arguments of Plan.update() that differ from those of the whole cache."""
        import torch

        start, seq_lens = metadata.query_start_loc, metadata.seq_lens
        # A padded sequence has no length: its rows may count as any.
        first_row = (seq_lens - (start[1:] - start[:-1])).clamp(min=0)
        return {
            "seq_lens": self.seq_lens,
            "kv_offset": torch.full_like(seq_lens, self.rank),
            "kv_stride": torch.full_like(seq_lens, self.size),
            "q_offset": first_row.to(torch.int32),
        }

    def merge(self, output: Array, lse: Array) -> tuple[Array, Array]:
        """From this rank's part for all heads to the result for its own heads.

        output [num_tokens, heads of all, head_size], lse float32 [heads of all, num_tokens].
        """
        import torch

        parts = self.group.all_gather(lse[None].contiguous(), 0)
        total = torch.logsumexp(parts, 0)
        share = torch.exp(lse - total).masked_fill(lse == -torch.inf, 0.0)
        weighted = (output * share.t()[..., None]).to(output.dtype)
        # What lies in rows of no sequence, and NaN * 0, stays in those rows.
        own = self.group.reduce_scatter(weighted.contiguous(), 1)
        heads = lse.shape[0] // self.size
        return own, total[self.rank * heads : (self.rank + 1) * heads]


def attend_shard(
    layer: Any, scales: Any, query: Array, kv_cache: Array, metadata: Any, output: Array
) -> None:
    """QuireAttentionImpl.attend() of a rank; `layer` is that, `scales` what carries the scales."""
    import torch

    shard = metadata.context
    if layer.alibi_slopes is not None:
        raise NotImplementedError(
            "alibi_slopes: expected none with context parallelism, where a rank attends for heads "
            "whose slopes it does not have"
        )
    gathered = shard.group.all_gather(query.contiguous(), 1)
    num_tokens, num_heads, _ = gathered.shape
    width = output.shape[-1] // (1 if output.ndim == 3 else layer.num_heads)
    part = gathered.new_empty(num_tokens, num_heads, width)
    lse = gathered.new_empty((num_heads, num_tokens), dtype=torch.float32)
    layer.attend_rows(scales, gathered, kv_cache, metadata, part, lse=lse)
    own, own_lse = shard.merge(part, lse)
    sinks = layer.score(query).sinks
    if sinks is not None:  # one more key, that no rank has
        own = own * torch.sigmoid(own_lse - sinks[:, None]).t()[..., None]
    output.view_as(own).copy_(own)
