"""Attention layers in the words of vLLM's v1 backends: backend, metadata, builder, impl.

    builder = QuireAttentionMetadataBuilder(kv_cache_spec, layer_names, vllm_config, device)
    layer = QuireAttentionImpl(num_heads, head_size, scale, num_kv_heads)
    metadata = builder.build(0, common_attn_metadata)                      # once a step
    layer.forward(None, query, key, value, kv_cache, metadata, output)     # once a layer

They need no vLLM: arrays are NumPy's or torch's. quire_attn.vllm makes vLLM's backends of them.
"""

from .backend import QuireAttentionBackend
from .cache import PER_TOKEN_HEAD, layer_cache, row_bytes
from .impl import QuireAttentionImpl
from .metadata import QuireAttentionMetadata, QuireAttentionMetadataBuilder
from .plans import LayerKind, StepPlans

__all__ = [
    "PER_TOKEN_HEAD",
    "LayerKind",
    "QuireAttentionBackend",
    "QuireAttentionImpl",
    "QuireAttentionMetadata",
    "QuireAttentionMetadataBuilder",
    "StepPlans",
    "layer_cache",
    "row_bytes",
]
