"""The peers of compare_peers.py: kernels of other projects, called as their users call them. Those
of CPUs are in peers_cpu.py.

A class a peer. The constructor imports it and raises ImportError where it is not installed.
prepare(batch) does what an engine does once a step and returns call(i), which attends with the
batch's cache i and returns the output; it raises Refused for what the peer cannot compute.
"""

import importlib
import importlib.metadata
import sys

import torch
import torch.nn.attention.bias

from paged_batch import DTYPE


class Refused(Exception):
    """Why a peer does not run a workload."""


def first_import(*names):
    """The first module of these that can be imported; ImportError with each one's reason."""
    reasons = []
    for name in names:
        try:
            return importlib.import_module(name)
        # A module that is there may fail in any way: built for another torch, without a GPU.
        except Exception as error:  # pylint: disable=broad-except
            reasons.append(f"{name}: {first_line(error)}")
    raise ImportError("; ".join(reasons))


def first_line(error):
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]


class VllmTriton:
    """vLLM's unified attention kernel in Triton, as TRITON_ATTN calls it."""

    name, paged = "vllm_triton", True

    def __init__(self):
        self.module = first_import("vllm.v1.attention.ops.triton_unified_attention",
                                   "vllm.attention.ops.triton_unified_attention",
                                   "triton_unified_attention")
        self.version = "vllm " + version_of("vllm")

    def prepare(self, batch):
        # As TritonAttentionMetadataBuilder sizes them.
        max_split_seqs = 128 // batch.num_kv_heads
        max_split_tokens = max_split_seqs * min(batch.max_query_len,
                                                getattr(self.module, "MAX_3D_QUERY_LEN", 1))
        segments = 16
        padded = 1 << (batch.head_size - 1).bit_length()

        def scratch(*shape):
            return torch.empty((max_split_tokens, batch.num_heads, segments, *shape),
                               dtype=torch.float32, device="cuda")

        arguments = {
            "cu_seqlens_q": batch.query_start_loc, "max_seqlen_q": batch.max_query_len,
            "seqused_k": batch.seq_lens_tensor, "max_seqlen_k": batch.max_seq_len,
            "softmax_scale": batch.scale, "causal": True,
            "window_size": (batch.window - 1, 0) if batch.window else (-1, -1),
            "block_table": batch.block_table, "softcap": batch.soft_cap,
            "q_descale": None, "k_descale": None, "v_descale": None,
            "seq_threshold_3D": max_split_seqs, "num_par_softmax_segments": segments,
            "softmax_segm_output": scratch(padded), "softmax_segm_max": scratch(),
            "softmax_segm_expsum": scratch(), "sinks": batch.sinks}

        def call(i):
            cache = batch.caches[i]
            self.module.unified_attention(q=batch.query, k=cache[:, 0], v=cache[:, 1],
                                          out=batch.output, **arguments)
            return batch.output

        return call


class FlashAttention3:
    """FlashAttention-3 with scheduler metadata: vLLM's build, else Dao-AILab's."""

    name, paged = "fa3", True

    def __init__(self):
        if torch.cuda.get_device_capability()[0] != 9:
            raise ImportError("FlashAttention-3 is for Hopper (compute capability 9.0)")
        try:
            self.module = first_import("vllm.vllm_flash_attn")
            if not self.module.is_fa_version_supported(3):
                raise ImportError("vllm.vllm_flash_attn: "
                                  + self.module.fa_version_unsupported_reason(3))
            self.of_vllm = True
            self.version = "vllm " + version_of("vllm")
        except ImportError as error:
            try:
                self.module = first_import("flash_attn_interface")
            except ImportError as other:
                raise ImportError(f"{error}; {other}") from other
            self.of_vllm = False
            self.version = "flash_attn_3 " + version_of("flash_attn_3")

    def prepare(self, batch):
        if batch.sinks is not None and not self.of_vllm:
            raise Refused("no attention sinks (vLLM's build has them)")
        window = (batch.window - 1, 0) if batch.window else (-1, -1)
        # Built anew each step and used by all layers.
        schedule = self.module.get_scheduler_metadata(
            batch_size=len(batch.seq_lens), max_seqlen_q=batch.max_query_len,
            max_seqlen_k=batch.max_seq_len, num_heads_q=batch.num_heads,
            num_heads_kv=batch.num_kv_heads, headdim=batch.head_size,
            cache_seqlens=batch.seq_lens_tensor, qkv_dtype=DTYPE,
            cu_seqlens_q=batch.query_start_loc, page_size=batch.block_size, causal=True,
            window_size=window, has_softcap=batch.soft_cap > 0.0)
        common = {"softmax_scale": batch.scale, "causal": True, "window_size": window,
                  "softcap": batch.soft_cap, "scheduler_metadata": schedule}

        def call_vllm(i):
            cache = batch.caches[i]
            return self.module.flash_attn_varlen_func(
                q=batch.query, k=cache[:, 0], v=cache[:, 1], out=batch.output,
                max_seqlen_q=batch.max_query_len, cu_seqlens_q=batch.query_start_loc,
                max_seqlen_k=batch.max_seq_len, seqused_k=batch.seq_lens_tensor,
                block_table=batch.block_table, fa_version=3, s_aux=batch.sinks, **common)

        def call_upstream(i):
            cache = batch.caches[i]
            return self.module.flash_attn_with_kvcache(
                q=batch.query, k_cache=cache[:, 0], v_cache=cache[:, 1],
                cache_seqlens=batch.seq_lens_tensor, page_table=batch.block_table,
                cu_seqlens_q=batch.query_start_loc, max_seqlen_q=batch.max_query_len, **common)

        return call_vllm if self.of_vllm else call_upstream


class FlashInfer:
    """FlashInfer's wrappers. As vLLM does with it, sequences of one row go to decode, the others
    to prefill (FA3 kernels on Hopper)."""

    name, paged = "flashinfer", True
    WORKSPACE_BYTES = 512 << 20

    def __init__(self):
        self.module = first_import("flashinfer")
        self.version = "flashinfer-python " + self.module.__version__
        self.workspace = torch.empty(self.WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")

    def prepare(self, batch):
        kinds = [query_len == 1 for query_len in batch.query_lens]
        # Consecutive sequences of a kind.
        bounds = [0] + [i for i in range(1, len(kinds)) if kinds[i] != kinds[i - 1]] + [len(kinds)]
        parts = [self.plan_part(batch, range(begin, end))
                 for begin, end in zip(bounds, bounds[1:])]

        def call(i):
            for attend in parts:
                attend(batch.caches[i])
            return batch.output

        return call

    def plan_part(self, batch, sequences):
        counts = [len(batch.blocks[s]) for s in sequences]
        block_starts = _cpu_int32(sum(counts[:i]) for i in range(len(counts) + 1))
        indices = _cpu_int32(block for s in sequences for block in batch.blocks[s]).cuda()
        last_lens = _cpu_int32((batch.seq_lens[s] - 1) % batch.block_size + 1 for s in sequences)
        begin, end = batch.starts[sequences[0]], batch.starts[sequences[-1] + 1]
        rows = _cpu_int32(batch.starts[s] - begin for s in [*sequences, sequences[-1] + 1])
        query, output = batch.query[begin:end], batch.output[begin:end]
        is_decode = batch.query_lens[sequences[0]] == 1
        shape = (batch.num_heads, batch.num_kv_heads, batch.head_size, batch.block_size)
        options = {"window_left": batch.window - 1, "logits_soft_cap": batch.soft_cap,
                   "sm_scale": batch.scale, "q_data_type": DTYPE, "kv_data_type": DTYPE}
        extra = ()
        if batch.sinks is not None:
            # For decode the kernels that its decode wrapper takes: FA3's are ten times as slow.
            wrapper = self.module.BatchAttentionWithAttentionSinkWrapper(
                self.workspace, "NHD", backend="fa2" if is_decode else "auto", q_data_type=DTYPE,
                kv_data_type=DTYPE, head_dim_qk=batch.head_size, head_dim_vo=batch.head_size,
                window_left=batch.window - 1)
            extra = (batch.sinks.float(), batch.scale)
        elif is_decode:
            # Tensor cores from a group of 4 on, as its documentation recommends.
            wrapper = self.module.BatchDecodeWithPagedKVCacheWrapper(
                self.workspace, "NHD",
                use_tensor_cores=batch.num_heads // batch.num_kv_heads >= 4)
            wrapper.plan(block_starts, indices, last_lens, *shape, **options)
            return lambda cache: wrapper.run(query, cache, out=output)
        else:
            wrapper = self.module.BatchPrefillWithPagedKVCacheWrapper(self.workspace, "NHD")
        wrapper.plan(rows, block_starts, indices, last_lens, *shape, causal=True, **options)
        return lambda cache: wrapper.run(query, cache, *extra, out=output)


class DenseAttention:
    """torch's scaled_dot_product_attention, over contiguous K and V: it knows no pages."""

    paged = False

    def prepare(self, batch):
        if batch.window:
            raise Refused("no sliding window")
        if batch.soft_cap:
            raise Refused("no soft cap")
        if batch.sinks is not None:
            raise Refused("no attention sinks")
        if not batch.is_uniform():
            raise Refused("no sequences of different lengths")
        query = batch.dense_query()
        caches = [batch.dense_cache(i) for i in range(len(batch.caches))]
        mask = self.mask_arguments(batch)

        def call(i):
            key, value = caches[i]
            with torch.nn.attention.sdpa_kernel(self.backends):
                output = torch.nn.functional.scaled_dot_product_attention(
                    query, key, value, scale=batch.scale, enable_gqa=True, **mask)
            return output.transpose(1, 2)

        return call

    def mask_arguments(self, batch):
        if batch.is_decode():
            return {}
        if batch.max_query_len == batch.max_seq_len:
            return {"is_causal": True}
        return self.mask_of_chunk(batch)


class TorchCudnn(DenseAttention):
    """cuDNN's attention, through torch."""

    name = "cudnn"

    def __init__(self):
        if not torch.backends.cudnn.is_available():
            raise ImportError("torch has no cuDNN")
        self.version = f"cudnn {torch.backends.cudnn.version()}, torch {torch.__version__}"
        self.backends = [torch.nn.attention.SDPBackend.CUDNN_ATTENTION]

    def mask_of_chunk(self, batch):
        del batch
        raise Refused("no causal mask with more keys than rows")


class TorchSdpa(DenseAttention):
    """What torch brings itself: FlashAttention-2, or the memory-efficient kernel."""

    name = "sdpa"

    def __init__(self):
        self.version = f"torch {torch.__version__}"
        backend = torch.nn.attention.SDPBackend
        self.backends = [backend.FLASH_ATTENTION, backend.EFFICIENT_ATTENTION]

    def mask_of_chunk(self, batch):
        bias = torch.nn.attention.bias.causal_lower_right(batch.max_query_len, batch.max_seq_len)
        return {"attn_mask": bias}


def _cpu_int32(values):
    return torch.tensor(list(values), dtype=torch.int32)


PEERS = [VllmTriton, FlashAttention3, FlashInfer, TorchCudnn, TorchSdpa]


def version_of(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # on the path, not installed
        return getattr(sys.modules.get(package), "__version__", "of unknown version")
