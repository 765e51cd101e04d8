"""The peers of compare_peers.py on CPUs, as those of peers.py are on GPUs."""

import torch

from peers import Refused, TorchSdpa, first_import, version_of


class VllmCpu:
    """vLLM's CPU attention, as its CPU_ATTN backend calls it: over its own arrangement of pages."""

    name, paged = "vllm_cpu", True

    def __init__(self):
        self.ops = first_import("vllm._custom_ops")
        self.envs = first_import("vllm.envs")
        self.backend = first_import("vllm.v1.attention.backends.cpu_attn")
        first_import("vllm.platforms").current_platform.import_kernels()
        if not hasattr(torch.ops._C, "cpu_attention_with_kv_cache"):
            raise ImportError("this vLLM is not built for CPUs")
        self.version = "vllm-cpu " + version_of("vllm-cpu")

    def prepare(self, batch):
        if batch.block_size % 32 != 0:
            raise Refused("pages of other than multiples of 32 tokens")
        isa = self.backend._get_attn_isa(torch.bfloat16, batch.block_size, batch.head_size, "auto")
        caches = [self.cache_of(batch, cache, isa) for cache in batch.caches]
        window = batch.window or -1
        # Built anew each step and used by all layers.
        schedule = self.ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(batch.seq_lens), num_heads=batch.num_heads,
            num_kv_heads=batch.num_kv_heads, head_dim=batch.head_size,
            seq_lens=batch.seq_lens_tensor, dtype=torch.bfloat16,
            query_start_loc=batch.query_start_loc, causal=True, sliding_window_size=window,
            isa=isa, enable_kv_split=self.envs.VLLM_CPU_ATTN_SPLIT_KV)

        def call(i):
            key_cache, value_cache = caches[i]
            self.ops.cpu_attention_with_kv_cache(
                query=batch.query, key_cache=key_cache, value_cache=value_cache,
                output=batch.output, query_start_loc=batch.query_start_loc,
                seq_lens=batch.seq_lens_tensor, scale=batch.scale, causal=True,
                alibi_slopes=None, sliding_window=window, block_table=batch.block_table,
                softcap=batch.soft_cap, scheduler_metadata=schedule, s_aux=batch.sinks)
            return batch.output

        return call

    def cache_of(self, batch, cache, isa):
        """K and V of a cache as vLLM keeps them, written by its own operator."""
        num_blocks = cache.shape[0]
        pages = torch.zeros((num_blocks, batch.num_kv_heads, 2 * batch.block_size,
                             batch.head_size), dtype=cache.dtype)
        key_cache, value_cache = pages.chunk(2, dim=2)
        key, value = (cache[:, i].reshape(-1, batch.num_kv_heads, batch.head_size).contiguous()
                      for i in (0, 1))
        slots = torch.arange(num_blocks * batch.block_size)
        self.ops.cpu_attn_reshape_and_cache(key, value, key_cache, value_cache, slots, isa)
        return key_cache, value_cache


class TorchCpu(TorchSdpa):
    """torch's scaled_dot_product_attention on the CPU, which has other kernels there."""

    def __init__(self):
        super().__init__()
        backend = torch.nn.attention.SDPBackend
        self.backends = [backend.FLASH_ATTENTION, backend.MATH]


CPU_PEERS = [VllmCpu, TorchCpu]
