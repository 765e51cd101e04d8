"""vLLM's backend, builder and impl over quire_attn.backend, in what all its versions share."""

from __future__ import annotations

import os
from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    MultipleOf,
)

from ..backend import (
    QuireAttentionBackend,
    QuireAttentionImpl,
    QuireAttentionMetadata,
    QuireAttentionMetadataBuilder,
)
from ..backend.backend import capabilities
from ..backend.context_parallel import ContextShard
from ..core import use_openmp_threads


class VllmQuireImpl(QuireAttentionImpl, AttentionImpl):
    """A layer. vLLM calls do_kv_cache_update() before forward()."""

    forward_includes_kv_cache_update = False
    supports_dcp = True
    can_return_lse_for_decode = True

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        """Whether forward() may be given an fp8 output and its scale."""
        from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8StaticTensorSym

        return quant_key == kFp8StaticTensorSym and self.dcp_world_size == 1


class VllmQuireBuilder(QuireAttentionMetadataBuilder, AttentionMetadataBuilder):
    """Makes a step's metadata; one for each KV cache group."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.ALWAYS
    supports_draft_decode_metadata_update = True

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        """As vLLM calls it."""
        AttentionMetadataBuilder.__init__(self, kv_cache_spec, layer_names, vllm_config, device)
        self.batch_invariant = os.environ.get("VLLM_BATCH_INVARIANT", "0") not in ("", "0")
        QuireAttentionMetadataBuilder.__init__(
            self, kv_cache_spec, layer_names, vllm_config, device
        )
        self._dcp_group = _dcp_group(kv_cache_spec, vllm_config)
        if torch.device(device).type == "cpu" and not os.environ.get("QUIRE_NUM_THREADS"):
            # vLLM binds the OpenMP threads of a worker to its CPUs, and the main thread to one.
            use_openmp_threads()
        self._prefix_buffer: torch.Tensor | None = None
        if self.rswa_window is not None:
            # The prefixes come from the host each step, which no graph does again.
            self.supports_draft_decode_metadata_update = False
            most = vllm_config.scheduler_config.max_num_seqs
            self._prefix_buffer = torch.zeros(most, dtype=torch.int32, device=device)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """Any batch, but for models with ranges of tokens (images) that see each other.

        Ranges come from the host. A graph that was captured without them serves what sees none:
        single tokens, if no window would hide from them what a range shows.
        """
        if not getattr(getattr(vllm_config, "model_config", None), "is_mm_prefix_lm", False):
            return cls._cudagraph_support
        for layer in vllm_config.compilation_config.static_forward_context.values():
            windowed = getattr(layer, "sliding_window", None) is not None
            if windowed and not getattr(layer, "mm_prefix_clamp_sliding_window", False):
                return AttentionCGSupport.NEVER
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> QuireAttentionMetadata:
        """A step's metadata, with this rank's part of the context where it is split."""
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        if self._dcp_group is not None:
            metadata.context = ContextShard(
                self._dcp_group,
                self._dcp_group.rank_in_group,
                self._dcp_group.world_size,
                common_attn_metadata.dcp_local_seq_lens,
            )
        return metadata

    def update_draft_decode_metadata(self, metadata: QuireAttentionMetadata) -> None:
        """The batch's tensors have new values: the next layer plans them, in the graph too."""
        self.plans.forget()

    def _prefix_lens(self, prefix_lens: torch.Tensor, seq_lens: torch.Tensor) -> torch.Tensor:
        """In memory that stays, for captured graphs."""
        assert self._prefix_buffer is not None
        buffer = self._prefix_buffer[: seq_lens.shape[0]]
        buffer.copy_(prefix_lens[: seq_lens.shape[0]])
        return buffer


def _dcp_group(kv_cache_spec: Any, vllm_config: Any) -> Any:
    """The ranks that share this cache's tokens; None if each has all of them."""
    parallel = vllm_config.parallel_config
    sharded = getattr(kv_cache_spec, "dcp_sharded", True)  # a draft model's may be whole
    if parallel.decode_context_parallel_size == 1 or not sharded:
        return None
    interleave = getattr(parallel, "cp_kv_cache_interleave_size", 1)
    if interleave != 1:
        raise NotImplementedError(
            f"cp_kv_cache_interleave_size: expected 1 with Quire, got {interleave}"
        )
    from vllm.distributed.parallel_state import get_dcp_group

    return get_dcp_group()


class VllmQuireBackend(QuireAttentionBackend, AttentionBackend):
    """What Quire can do, as vLLM asks for it."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = [
        name for name in QuireAttentionBackend.get_supported_kv_cache_dtypes() if name != "float32"
    ]  # vLLM has no such cache dtype: fp32 models have "auto"
    forward_includes_kv_cache_update: bool = False
    supports_kv_cache_update_bypass: bool = True  # key and value may be None once they are written

    @staticmethod
    def get_impl_cls() -> type[Any]:
        """The class of layers."""
        return VllmQuireImpl

    @staticmethod
    def get_builder_cls() -> type[Any]:
        """The class of builders."""
        return VllmQuireBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(*args: Any) -> list[Any]:
        """Any."""
        return [MultipleOf(1)]

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """8 to 576."""
        caps = capabilities("cpu")
        return caps["min_head_size"] <= head_size <= caps["max_head_size"]

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        """All."""
        return attn_type in (
            AttentionType.DECODER,
            AttentionType.ENCODER,
            AttentionType.ENCODER_ONLY,
            AttentionType.ENCODER_DECODER,
        )

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        """From 8.0 on."""
        return capability is None or capability.major >= 8

    @classmethod
    def supports_combination(cls, *args: Any, **kwargs: Any) -> str | None:
        """What a GPU needs further; vLLM asks only where there is one."""
        if capabilities("cuda") is None:
            return "this build of quire_attn has no CUDA backend"
        return None


def _yes(cls: type[Any]) -> bool:
    return True


# What vLLM asks by name. Those that an older vLLM does not ask do no harm there.
for _name in (
    "supports_sink",
    "supports_alibi_sqrt",
    "supports_mm_prefix",
    "supports_sliding_window",
    "supports_rswa",
    "supports_non_causal",
    "supports_batch_invariance",
):
    setattr(VllmQuireBackend, _name, classmethod(_yes))
