"""The metadata of a step, and its builder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..arrays import Array, full, is_torch
from .context_parallel import ContextShard
from .plans import StepPlans


@dataclass
class QuireAttentionMetadata:
    """TritonAttentionMetadata's fourteen fields, and what Quire's batches may have beyond them.

    Made by the builder, or by hand: then scheduler_metadata may be None. A plain dataclass: vLLM
    copies its fields into classes derived from it, and assigns some.
    """

    num_actual_tokens: int
    max_query_len: int
    query_start_loc: Array
    """int32 [num_seqs + 1]."""
    max_seq_len: int
    """May be an upper bound."""
    seq_lens: Array
    """int32 [num_seqs], tokens after this step."""
    block_table: Array
    """int32 [num_seqs, max_blocks]."""
    slot_mapping: Array
    """int64; negative: not written."""

    use_cascade: bool = False
    """Whether all sequences begin with the same `common_prefix_len` tokens, in the same blocks."""
    common_prefix_len: int = 0
    cu_prefix_query_lens: Array | None = None
    prefix_kv_lens: Array | None = None
    suffix_kv_lens: Array | None = None

    scheduler_metadata: StepPlans | None = None
    prefix_scheduler_metadata: StepPlans | None = None
    """With use_cascade the same object: one plan covers prefix and suffixes."""

    causal: bool | Array = True
    """Or a flag of any integer type for each sequence."""
    mm_prefix_range: Array | None = None
    """int32 [num_seqs, num_ranges, 2]: positions that see each other, ends included."""
    rswa_prefix_lens: Array | None = None
    """int32 [num_seqs]: keys that escape the window of rswa_window."""
    rswa_window: int | None = None
    qq_bias: Array | None = None
    """float32 [m, m] or [num_seqs, m, m] (tree attention)."""
    context: ContextShard | None = None
    """With context parallelism: what of the sequences this rank's cache has."""


class QuireAttentionMetadataBuilder:
    """Makes the metadata of a step for all layers of one KV cache group.

    All that build() keeps for the layers are the plans: one builder serves one step at a time.
    """

    metadata_cls: type[QuireAttentionMetadata] = QuireAttentionMetadata
    batch_invariant = False

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any
    ) -> None:
        """Of `vllm_config` only model_config.rswa_window is read; it may be None."""
        self.kv_cache_spec = kv_cache_spec
        self.layer_names = layer_names
        self.vllm_config = vllm_config
        self.device = device
        model_config = getattr(vllm_config, "model_config", None)
        self.rswa_window: int | None = getattr(model_config, "rswa_window", None)
        self.plans = StepPlans(batch_invariant=self.batch_invariant)

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> Any:
        """The metadata of a batch.

        `common_attn_metadata` has vLLM's names: query_start_loc, seq_lens, num_actual_tokens,
        max_query_len, max_seq_len, block_table_tensor, slot_mapping, and where they are there
        causal, mm_req_doc_ranges, rswa_prefix_lens, qq_bias. `fast_build` changes nothing.
        """
        common = common_attn_metadata
        metadata = self.metadata_cls(
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            query_start_loc=common.query_start_loc,
            max_seq_len=common.max_seq_len,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
            scheduler_metadata=self.plans,
            causal=getattr(common, "causal", True),
            qq_bias=getattr(common, "qq_bias", None),
        )
        self.plans.forget()
        if common_prefix_len > 0 and not self.batch_invariant:
            _set_cascade(metadata, common_prefix_len)
        ranges = getattr(common, "mm_req_doc_ranges", None)
        if ranges:
            metadata.mm_prefix_range = ranges_array(ranges, common.seq_lens)
        prefix_lens = getattr(common, "rswa_prefix_lens", None)
        if self.rswa_window is not None and prefix_lens is not None:
            metadata.rswa_prefix_lens = self._prefix_lens(prefix_lens, common.seq_lens)
            metadata.rswa_window = self.rswa_window
        return metadata

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> Any:
        """Metadata to capture a graph with. Work is planned inside of the graph, at each replay."""
        metadata = self.build(0, common_attn_metadata)
        # Sequences as long as the model allows would make the warm-up slow.
        if is_torch(metadata.seq_lens):
            metadata.seq_lens.fill_(1)
        else:
            metadata.seq_lens.fill(1)
        return metadata

    def _prefix_lens(self, prefix_lens: Array, seq_lens: Array) -> Array:
        return _int32_like(prefix_lens, seq_lens)[: seq_lens.shape[0]]


def _set_cascade(metadata: QuireAttentionMetadata, common_prefix_len: int) -> None:
    seq_lens = metadata.seq_lens
    metadata.use_cascade = True
    metadata.common_prefix_len = common_prefix_len
    metadata.cu_prefix_query_lens = full(seq_lens, 2, 0)
    metadata.cu_prefix_query_lens[1] = metadata.num_actual_tokens
    metadata.prefix_kv_lens = full(seq_lens, 1, common_prefix_len)
    metadata.suffix_kv_lens = (seq_lens - common_prefix_len).clip(0)
    metadata.prefix_scheduler_metadata = metadata.scheduler_metadata


def ranges_array(ranges: dict[int, list[tuple[int, int]]], seq_lens: Array) -> Array:
    """int32 [num_seqs, num_ranges, 2] of what is given by sequence; (0, 0) where one has fewer."""
    num_seqs = seq_lens.shape[0]
    most = max((len(own) for own in ranges.values()), default=0)
    flat = full_host(num_seqs, max(most, 1))
    for seq, own in ranges.items():
        for i, (start, end) in enumerate(own):
            flat[seq][i] = [int(start), int(end)]
    return _int32_like(flat, seq_lens)


def full_host(num_seqs: int, num_ranges: int) -> list[list[list[int]]]:
    """Empty ranges."""
    return [[[0, 0] for _ in range(num_ranges)] for _ in range(num_seqs)]


def _int32_like(values: Any, like: Array) -> Array:
    """An int32 array of these values where `like` is."""
    if is_torch(like):
        import torch

        return torch.as_tensor(values).to(device=like.device, dtype=torch.int32)
    import numpy as np

    return np.asarray(values, np.int32)
