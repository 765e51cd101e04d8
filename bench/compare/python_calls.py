#!/usr/bin/env python3
"""What a layer's calls cost in Python: the host's time for a cache write and attention.

    bench/compare/python_calls.py --device cuda          # needs torch and quire_attn

On a GPU calls are only queued, so this is what an engine without CUDA graphs pays on top of the
kernels, for each layer. Beside Quire, where vLLM can be imported: its Triton kernels, by the same two
calls. Prints a table; the fields are medians over rounds of 50 calls, in us.
"""

import argparse
import statistics
import time

import quire_attn as qa
import torch
from quire_attn.backend import QuireAttentionImpl, QuireAttentionMetadataBuilder

BLOCK_SIZE, NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE = 16, 32, 8, 128
NUM_LAYERS, CALLS, ROUNDS = 32, 50, 40


class Batch:
    """Decode of a few sequences; also what vLLM's builder calls common metadata."""

    def __init__(self, num_seqs, seq_len, device):
        self.device = device
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        blocks = -(-seq_len // BLOCK_SIZE)
        self.query, self.key, self.value = (
            torch.randn(num_seqs, heads, HEAD_SIZE, dtype=self.dtype, device=device)
            for heads in (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS))
        self.output = torch.empty_like(self.query)
        self.kv_cache = torch.zeros(num_seqs * blocks, 2, BLOCK_SIZE, NUM_KV_HEADS, HEAD_SIZE,
                                    dtype=self.dtype, device=device)
        self.query_start_loc = torch.arange(num_seqs + 1, dtype=torch.int32, device=device)
        self.seq_lens = torch.full((num_seqs,), seq_len, dtype=torch.int32, device=device)
        self.block_table_tensor = torch.arange(
            num_seqs * blocks, dtype=torch.int32, device=device).view(num_seqs, blocks)
        last = self.block_table_tensor[:, -1].long() * BLOCK_SIZE
        self.slot_mapping = last + (seq_len - 1) % BLOCK_SIZE
        self.num_actual_tokens = self.num_reqs = num_seqs
        self.max_query_len, self.max_seq_len = 1, seq_len


def functions(batch):
    """write_kv_cache and attention, over a plan."""
    plan = qa.Plan(num_heads=NUM_HEADS, num_kv_heads=NUM_KV_HEADS, head_size=HEAD_SIZE,
                   block_size=BLOCK_SIZE, dtype=batch.dtype, device=batch.device)
    update = {"query_start_loc": batch.query_start_loc, "seq_lens": batch.seq_lens,
              "block_table": batch.block_table_tensor,
              "num_actual_tokens": batch.num_actual_tokens, "max_query_len": 1,
              "max_seq_len": batch.max_seq_len}
    plan.update(**update)
    cache = qa.PagedKvCache.from_combined(batch.kv_cache)

    def write():
        qa.write_kv_cache(batch.key, batch.value, cache, batch.slot_mapping)

    def attend():
        qa.attention(plan, batch.query, cache, output=batch.output)

    def both():
        write()
        attend()

    return {"Plan.update": lambda: plan.update(**update), "write_kv_cache": write,
            "attention": attend, "write_kv_cache + attention": both}


def layers(batch):
    """A step as an engine runs it: metadata once, then forward() of each layer."""
    impls = [QuireAttentionImpl(NUM_HEADS, HEAD_SIZE, HEAD_SIZE**-0.5, NUM_KV_HEADS)
             for _ in range(NUM_LAYERS)]
    builder = QuireAttentionMetadataBuilder(None, ["layers"], None, batch.device)

    def step():
        metadata = builder.build(0, batch)
        for impl in impls:
            impl.forward(None, batch.query, batch.key, batch.value, batch.kv_cache, metadata,
                         batch.output)

    step.num_calls = NUM_LAYERS
    return {f"step of {NUM_LAYERS} layers, each": step}


def one_shot(batch):
    """Functions that plan on each call."""
    key, value = batch.kv_cache[:, 0], batch.kv_cache[:, 1]

    def unified():
        qa.unified_attention(
            batch.query, key, value, batch.output, batch.query_start_loc, 1, batch.seq_lens,
            batch.max_seq_len, HEAD_SIZE**-0.5, True, (-1, -1), batch.block_table_tensor, 0.0,
            None, None, None)

    def flash():
        qa.flash_attn_with_kvcache(
            batch.query[:, None], key, value, cache_seqlens=batch.seq_lens,
            block_table=batch.block_table_tensor, causal=True)

    return {"unified_attention": unified, "flash_attn_with_kvcache": flash}


def vllms(batch):
    """The same two calls of vLLM's Triton backend."""
    from vllm.v1.attention.ops.triton_reshape_and_cache_flash import triton_reshape_and_cache_flash
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention
    key_cache, value_cache = batch.kv_cache[:, 0], batch.kv_cache[:, 1]
    one = torch.ones((), device=batch.device)
    segments, threshold = 16, 128 // NUM_KV_HEADS
    scratch = [torch.empty((threshold, NUM_HEADS, segments, *shape), device=batch.device)
               for shape in ((HEAD_SIZE,), (), ())]

    def write():
        triton_reshape_and_cache_flash(batch.key, batch.value, key_cache, value_cache,
                                       batch.slot_mapping, "auto", one, one)

    def attend():
        unified_attention(
            q=batch.query, k=key_cache, v=value_cache, out=batch.output,
            cu_seqlens_q=batch.query_start_loc, max_seqlen_q=1, seqused_k=batch.seq_lens,
            max_seqlen_k=batch.max_seq_len, softmax_scale=HEAD_SIZE**-0.5, causal=True,
            window_size=(-1, -1), block_table=batch.block_table_tensor, softcap=0.0,
            q_descale=None, k_descale=None, v_descale=None, seq_threshold_3D=threshold,
            num_par_softmax_segments=segments, softmax_segm_output=scratch[0],
            softmax_segm_max=scratch[1], softmax_segm_expsum=scratch[2])

    def both():
        write()
        attend()

    return {"vLLM Triton: write": write, "vLLM Triton: attention": attend,
            "vLLM Triton: write + attention": both}


def measure(call, device):
    """Median us of a call; the GPU catches up between rounds, so that its queue never fills."""
    num_calls = getattr(call, "num_calls", 1)
    repeats = max(CALLS // num_calls, 1)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for _ in range(20):
        call()
    wait()
    times = []
    for _ in range(ROUNDS):
        begin = time.perf_counter_ns()
        for _ in range(repeats):
            call()
        times.append((time.perf_counter_ns() - begin) / repeats / num_calls / 1e3)
        wait()
    return statistics.median(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    name = torch.cuda.get_device_name() if on_gpu else qa._binding.instruction_set("cpu")
    print(f"{name}, torch {torch.__version__}: {NUM_HEADS} heads of {HEAD_SIZE}, "
          f"{NUM_KV_HEADS} KV heads")
    for num_seqs, seq_len in ((1, 20), (8, 500), (64, 500)) if on_gpu else ((1, 20),):
        batch = Batch(num_seqs, seq_len, args.device)
        print(f"{num_seqs} sequences of {seq_len} keys, {batch.dtype}")
        groups = [functions, layers, one_shot] + ([vllms] if on_gpu else [])
        for group in groups:
            try:
                calls = group(batch)
                for label, call in calls.items():
                    print(f"  {label:<48}{measure(call, args.device):8.1f} us", flush=True)
            except Exception as error:  # pylint: disable=broad-except
                print(f"  {group.__name__}: {type(error).__name__}: {str(error).splitlines()[:1]}")


if __name__ == "__main__":
    main()
