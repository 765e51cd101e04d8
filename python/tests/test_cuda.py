"""What is CUDA's own: streams, graphs, no waiting, memory."""

import threading
import time

import numpy as np
import pytest
import quire_attn as qa
from conftest import has_cuda
from quire_attn.backend import QuireAttentionImpl, QuireAttentionMetadataBuilder
from serving import common_metadata

if not has_cuda():
    pytest.skip("no torch with a GPU here", allow_module_level=True)

import torch  # noqa: E402
from cuda_step import DEVICE, LENS, Step, convert, flash, one_shot  # noqa: E402

LONG = 10**8  # cycles that keep a GPU busy for 50 ms and more


def test_calls_go_to_the_stream_that_is_current(rng):
    """What is queued on it before has been done, and after."""
    step = Step(rng, LENS)
    query, new = step.query.clone(), step.key.clone()
    step.query.fill_(torch.nan)
    step.key.fill_(torch.nan)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG)
        step.query.copy_(query)
        step.key.copy_(new)
        step.run()
        result = step.out.clone()
        step.out.fill_(torch.nan)
    stream.synchronize()
    step.out.copy_(result)
    step.check()


@pytest.mark.parametrize("call", [one_shot, flash])
def test_functions_that_plan_for_themselves_on_another_stream(rng, call):
    step = Step(rng, LENS)
    qa.write_kv_cache(step.key, step.value, step.cache, step.slots)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG)
        call(step)
    stream.synchronize()
    step.check()


@pytest.mark.parametrize("way", ["planned", "calls only", "unified_attention", "layers"])
def test_a_graph_serves_batches_that_come_after_it(rng, way):
    """Lengths, block tables, slots and tokens are other ones at each replay."""
    batches = [
        [(1, 700), (1, 33), (5, 260), (1, 1)],
        [(1, 20), (5, 900), (1, 650), (1, 16)],
        [(2, 2), (1, 400), (1, 1000), (4, 77)],
    ]
    num_blocks = 200
    steps = [Step(rng, lens) for lens in batches]
    width = max(step.arguments["block_table"].shape[1] for step in steps)
    pages = torch.full((num_blocks, 2, 16, 2, 128), torch.nan, dtype=torch.float16, device=DEVICE)
    fixed = Step(rng, batches[0])
    fixed.pages, fixed.cache = pages, qa.PagedKvCache.from_combined(pages)
    fixed.arguments["block_table"] = torch.zeros(4, width, dtype=torch.int32, device=DEVICE)

    def load(step):
        """Copies a batch into the tensors that the graph knows."""
        pages.fill_(torch.nan)
        pages[: step.pages.shape[0]].copy_(step.pages)
        for name in ("query_start_loc", "seq_lens"):
            fixed.arguments[name].copy_(step.arguments[name])
        table = step.arguments["block_table"]
        fixed.arguments["block_table"].fill_(-1)[:, : table.shape[1]].copy_(table)
        for name in ("query", "key", "value", "slots"):
            getattr(fixed, name).copy_(getattr(step, name))

    layers = [QuireAttentionImpl(8, 128, 128**-0.5, 2) for _ in range(2)]
    fixed.batch.max_query_len, fixed.batch.max_seq_len = 5, 1024
    common = common_metadata(fixed.batch, convert)
    common.query_start_loc = fixed.arguments["query_start_loc"]
    common.seq_lens = fixed.arguments["seq_lens"]
    common.block_table_tensor = fixed.arguments["block_table"]
    common.slot_mapping = fixed.slots
    metadata = QuireAttentionMetadataBuilder(None, [], None, DEVICE).build(0, common)

    def all_layers():
        for layer in layers:
            layer.forward(None, fixed.query, fixed.key, fixed.value, pages, metadata, fixed.out)

    def unified():
        qa.write_kv_cache(fixed.key, fixed.value, fixed.cache, fixed.slots)
        one_shot(fixed)

    captured = {
        "planned": fixed.run, "calls only": fixed.layer, "unified_attention": unified,
        "layers": all_layers,
    }[way]  # fmt: skip
    load(steps[0])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        fixed.plan.update(**fixed.arguments)
        captured()  # takes the memory
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured()
    for step in (*steps, steps[0]):
        load(step)
        fixed.out.fill_(torch.nan)
        if way == "calls only":
            fixed.plan.update(**fixed.arguments)
        graph.replay()
        torch.cuda.synchronize()
        step.out.copy_(fixed.out)
        step.check()


def test_metadata_for_a_capture(rng):
    """vLLM captures with lengths of 1, and padded batches: sequences and tokens of none."""
    step = Step(rng, [(1, 300), (1, 20), (1, 5)])
    num_seqs, width = 8, step.arguments["block_table"].shape[1]
    table = torch.zeros(num_seqs, width, dtype=torch.int32, device=DEVICE)
    starts = torch.arange(num_seqs + 1, dtype=torch.int32, device=DEVICE)
    seq_lens = torch.full((num_seqs,), 400, dtype=torch.int32, device=DEVICE)
    slots = torch.full((num_seqs,), -1, dtype=torch.int64, device=DEVICE)
    query, key, value = (
        torch.zeros(num_seqs, heads, 128, dtype=torch.float16, device=DEVICE) for heads in (8, 2, 2)
    )
    out = torch.zeros_like(query)
    common = common_metadata(step.batch, convert)
    common.query_start_loc, common.seq_lens, common.block_table_tensor = starts, seq_lens, table
    common.slot_mapping, common.num_reqs, common.num_actual_tokens = slots, num_seqs, num_seqs
    common.max_query_len, common.max_seq_len = 1, 400
    builder = QuireAttentionMetadataBuilder(None, [], None, DEVICE)
    metadata = builder.build_for_cudagraph_capture(common)
    layer = QuireAttentionImpl(8, 128, 128**-0.5, 2)
    layer.forward(None, query, key, value, step.pages, metadata, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer.forward(None, query, key, value, step.pages, metadata, out)
    starts[4:] = 3  # three sequences, and five of padding
    seq_lens[:] = 0
    seq_lens[:3].copy_(step.arguments["seq_lens"])
    table[:3].copy_(step.arguments["block_table"])
    slots[:3].copy_(step.slots)
    for mine, theirs in ((query, step.query), (key, step.key), (value, step.value)):
        mine.fill_(torch.nan)[:3].copy_(theirs)
    graph.replay()
    step.out.copy_(out[:3])
    step.check()


def test_nothing_waits_for_the_gpu(rng):
    """Planning, writing and attending are queued behind work that takes longer than they do."""
    step = Step(rng, LENS)
    layer = QuireAttentionImpl(8, 128, 128**-0.5, 2)
    builder = QuireAttentionMetadataBuilder(None, [], None, DEVICE)
    common = common_metadata(step.batch, convert)

    def everything():
        step.run()
        one_shot(step)
        flash_out = qa.flash_attn_with_kvcache(
            step.query[:1, None], step.cache.key, step.cache.value, cache_seqlens=tokens,
            block_table=step.arguments["block_table"][:1], causal=True,
        )  # fmt: skip
        metadata = builder.build(0, common)
        layer.forward(None, step.query, step.key, step.value, step.pages, metadata, step.out)
        return flash_out

    tokens = step.arguments["seq_lens"][:1].clone()
    for _ in range(3):
        everything()
    torch.cuda.synchronize()
    busy = torch.cuda.Event()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(10 * LONG)
        busy.record()
        everything()
        assert not busy.query(), "a call came back only when the GPU was idle"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    step.check()


def test_steady_state_takes_no_memory(rng):
    step = Step(rng, LENS)
    step.run()
    torch.cuda.synchronize()
    held, free = step.plan.workspace_bytes, torch.cuda.mem_get_info()[0]
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(5):
        step.run()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    torch.cuda.synchronize()
    assert torch.cuda.mem_get_info()[0] == free
    assert step.plan.workspace_bytes == held > 0
    assert step.plan.backend_name == "cuda"


def test_threads_on_streams_of_their_own(rng):
    steps = [Step(rng, LENS), Step(rng, [(1, 3000)] * 20), Step(rng, [(300, 300)])]
    torch.cuda.synchronize()
    failed = []

    def work(step):
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(20):
                    step.run()
                    one_shot(step)
                torch.cuda.current_stream().synchronize()
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(step,)) for step in steps]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    for step in steps:
        step.check()


def test_plans_come_and_go_while_another_stream_is_captured(rng):
    step, other = Step(rng, LENS), Step(rng, LENS)
    step.run()
    dropped = qa.Plan(**other.batch.plan_arguments(convert))
    dropped.update(**other.arguments)
    torch.cuda.synchronize()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()

    def elsewhere():
        with torch.cuda.stream(stream):
            other.run()

    thread = threading.Thread(target=elsewhere)
    with torch.cuda.graph(graph):
        del dropped
        thread.start()
        thread.join()
        step.run()
    graph.replay()
    torch.cuda.synchronize()
    step.check()
    other.check()


def test_a_capture_that_was_not_warmed_up_is_refused(rng):
    step = Step(rng, LENS)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with (
        pytest.raises(ValueError, match="stream: expected .*warm up first"),
        torch.cuda.graph(graph),
    ):
        step.run()
    step.run()  # nothing is left of it
    step.check()


def test_compiled_with_graphs(rng):
    """torch.compile's own CUDA graphs; the plan is updated outside of them."""
    step = Step(rng, LENS)
    step.run()

    @torch.compile(fullgraph=True, mode="reduce-overhead")
    def layer(query):
        return qa.attention(step.plan, query * 2, step.cache) * 0.5

    step.batch.q = step.batch.q * np.float16(2)
    step.batch.v = [v * np.float16(0.5) for v in step.batch.v]
    for _ in range(4):
        step.plan.update(**step.arguments)
        step.out.copy_(layer(step.query))
        step.check()


def test_what_a_call_costs_is_microseconds(rng):
    """A bound that a copy, an allocation or a wait would break; docs/performance.md has figures."""
    step = Step(rng, [(1, 20)])
    step.plan.update(**step.arguments)
    for _ in range(20):
        step.layer()
    torch.cuda.synchronize()
    best = 1.0
    for _ in range(20):
        begin = time.perf_counter()
        for _ in range(10):
            step.layer()
        best = min(best, (time.perf_counter() - begin) / 10)
        torch.cuda.synchronize()
    assert best < 100e-6
