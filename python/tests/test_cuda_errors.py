"""Mistakes, scales, full and failing devices, and a second GPU."""

import subprocess
import sys

import numpy as np
import pytest
import quire_attn as qa
from conftest import has_cuda

from reference import Batch, attend, check

if not has_cuda():
    pytest.skip("no torch with a GPU here", allow_module_level=True)

import torch  # noqa: E402
from cuda_step import DEVICE, LENS, SHAPE, Step, convert  # noqa: E402


@pytest.mark.parametrize("dtype", ["fp8", "fp8_e5m2", "int8_per_token_head"])
def test_narrow_caches_in_fp16(rng, dtype):
    """The kernels of 8-bit caches, with scales on the GPU and as numbers."""
    step = Step(rng, LENS)
    shape = step.batch.key_cache.shape
    scales = {"k_scale": torch.tensor(0.05, device=DEVICE), "v_scale": 0.05}
    if dtype.endswith("per_token_head"):
        scales = {
            f"{x}_scale_cache": torch.zeros(shape[:3], device=DEVICE) for x in "kv"
        }  # fmt: skip
    cache = qa.PagedKvCache(
        *(torch.zeros(shape, dtype=torch.uint8, device=DEVICE) for _ in range(2)), dtype, **scales
    )
    tokens = (convert(np.concatenate(x)) for x in (step.batch.k, step.batch.v))
    qa.write_kv_cache(*tokens, cache, convert(np.concatenate(step.batch.slots)))
    plan = qa.Plan(**step.batch.plan_arguments(convert), kv_cache_dtype=dtype)
    plan.update(**step.arguments)
    out = qa.attention(plan, step.query, cache).float().cpu().numpy()
    expected = step.batch.expected(right=0)[0]
    error = np.linalg.norm(out - expected) / np.linalg.norm(expected)
    assert error < {"fp8": 0.06, "fp8_e5m2": 0.12, "int8_per_token_head": 0.02}[dtype]


def test_scales_on_the_host_are_numbers(rng):
    """A GPU could not read them there."""
    step = Step(rng, [(3, 40)])
    key, value = (x.to(torch.float8_e4m3fn) for x in (step.cache.key, step.cache.value))
    plan = qa.Plan(**step.batch.plan_arguments(convert), kv_cache_dtype="fp8")
    plan.update(**step.arguments)
    outs = []
    for scale in (0.25, torch.tensor(0.25), np.array([0.25], np.float32)):
        cache = qa.PagedKvCache(key, value, "fp8", scale, scale)
        qa.write_kv_cache(step.key, step.value, cache, step.slots)
        outs.append(qa.attention(plan, step.query, cache))
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])
    with pytest.raises(ValueError, match="k_scale: expected memory on cpu"):
        scale = torch.tensor(0.25, device=DEVICE)
        qa.write_kv_cache(
            step.key.cpu(), step.value.cpu(),
            qa.PagedKvCache(key.cpu(), value.cpu(), "fp8", scale, scale), step.slots.cpu(),
        )  # fmt: skip


def test_mistakes_are_exceptions_and_nothing_is_written(rng):
    step = Step(rng, LENS)
    step.plan.update(**step.arguments)
    before = step.pages.clone()

    def expect(kind, text, call, *args, **kwargs):
        with pytest.raises(kind, match=text):
            call(*args, **kwargs)

    on_gpu = "expected memory on cuda:0"
    for name in ("query_start_loc", "seq_lens", "block_table"):
        wrong = {**step.arguments, name: step.arguments[name].cpu()}
        expect(ValueError, f"{name}: {on_gpu}", step.plan.update, **wrong)
    step.plan.update(**step.arguments)
    arguments = step.plan, step.query, step.cache
    expect(ValueError, f"query: {on_gpu}", qa.attention, step.plan, step.query.cpu(), step.cache,
           output=step.out)  # fmt: skip
    expect(ValueError, f"output: {on_gpu}", qa.attention, *arguments, output=step.out.cpu())
    expect(TypeError, "query: expected float16, got bfloat16", qa.attention, step.plan,
           step.query.bfloat16(), step.cache)  # fmt: skip
    expect(ValueError, "query: expected shape", qa.attention, step.plan, step.query[:, :4],
           step.cache, output=step.out)  # fmt: skip
    expect(ValueError, f"slot_mapping: {on_gpu}", qa.write_kv_cache, step.key, step.value,
           step.cache, step.slots.cpu())  # fmt: skip
    expect(TypeError, "slot_mapping", qa.write_kv_cache, step.key, step.value, step.cache,
           step.slots.int())  # fmt: skip
    expect(ValueError, "requires grad", qa.attention, step.plan,
           step.query.clone().requires_grad_(), step.cache)  # fmt: skip
    expect(ValueError, "k_cache", qa.flash_attn_func, step.query[None], step.key[None].cpu(),
           step.value[None])  # fmt: skip
    numpys = (np.zeros((1, 8, 128), np.float16), *arguments[2:])
    expect(ValueError, f"query: {on_gpu}", qa.attention, step.plan, *numpys)
    cpu_plan = qa.Plan(**step.batch.plan_arguments())
    expect(ValueError, "query_start_loc: expected memory on cpu", cpu_plan.update,
           **step.arguments)  # fmt: skip
    expect(NotImplementedError, "device", qa.Plan, **{
        **step.batch.plan_arguments(), "device": f"cuda:{torch.cuda.device_count()}"})  # fmt: skip
    assert step.out.isnan().all()
    assert torch.equal(before.nan_to_num(7.0), step.pages.nan_to_num(7.0))


def test_a_gpu_without_memory_is_a_memory_error(rng):
    """And works again when there is some."""
    step = Step(rng, [(2, 100)] * 3)
    held = []
    try:
        for size in (1 << 30, 1 << 24, 1 << 20):
            while torch.cuda.mem_get_info()[0] > size:
                try:
                    held.append(torch.empty(size, dtype=torch.uint8, device=DEVICE))
                except torch.OutOfMemoryError:
                    break
        with pytest.raises(MemoryError, match="workspace"):
            step.run()
    finally:
        held.clear()
        torch.cuda.empty_cache()
    step.run()
    step.check()


FAILING = """
import time, torch, quire_attn as qa
x = torch.ones(4, 2, 64, dtype=torch.float16, device="cuda")
cache = qa.PagedKvCache(*torch.ones(2, 1, 4, 2, 64, dtype=torch.float16, device="cuda"))
slots = torch.zeros(4, dtype=torch.int64, device="cuda")
qa.write_kv_cache(x, x, cache, slots)
torch.cuda.synchronize()
torch.ones(4, device="cuda")[torch.tensor([10**6], device="cuda")]  # a kernel that fails
time.sleep(1)
try:
    qa.write_kv_cache(x, x, cache, slots)
except RuntimeError as error:
    print("RuntimeError:", error)
"""


def test_a_device_that_failed_is_a_runtime_error():
    """An exception, and no end of the process."""
    done = subprocess.run(
        [sys.executable, "-c", FAILING], capture_output=True, text=True, timeout=120, check=False
    )
    assert "RuntimeError: CUDA: " in done.stdout, done.stdout + done.stderr
    assert done.returncode in (0, 1), done.stderr


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_gpu_that_is_not_the_current_one(rng):
    batch = Batch(rng, dtype="float16", lens=LENS, **SHAPE)

    def there(array):
        return torch.from_numpy(array).to("cuda:1")

    there.device = "cuda:1"
    with torch.cuda.device(0):
        plan = qa.Plan(**batch.plan_arguments(there))
        plan.update(**batch.update_arguments(there))
        cache = qa.PagedKvCache(there(batch.key_cache), there(batch.value_cache))
        out = qa.attention(plan, there(batch.q), cache)
        check(out, batch.expected(right=0)[0], "float16")
        with pytest.raises(ValueError, match="query: expected memory on cuda:1"):
            qa.attention(plan, convert(batch.q), cache, output=out)
        x = there(rng.standard_normal((1, 5, 4, 64)).astype(np.float32))
        out = qa.flash_attn_func(x, x, x, causal=True)
        check(out[0], attend(*[x[0].cpu().numpy()] * 3, right=0)[0])
        assert torch.cuda.current_device() == 0
