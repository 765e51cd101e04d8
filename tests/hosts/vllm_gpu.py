#!/usr/bin/env python3
"""vLLM on a GPU without its compiled code: Quire beside vLLM's own Triton attention.

    python tests/hosts/vllm_gpu.py FOLDER                 # all cases; makes FOLDER
    python tests/hosts/vllm_gpu.py FOLDER --only speed

vLLM's Python files, its dependencies and the wheel of quire_attn must be importable. The operations
of vLLM's binaries that a Llama model needs are PyTorch's here (native_operations), so that its
release and torch's need not be a pair. Models have seeded or dummy weights. Prints a line a case;
nothing is downloaded. docs/guide/hosts_tests.md says what was seen.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {
    "small": {
        "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "head_dim": 64,
        "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 32000,
    },
    # Eight of Llama 3 8B's 32 layers.
    "large": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 8, "head_dim": 128,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    },
}  # fmt: skip
BACKENDS = ("TRITON_ATTN", "CUSTOM")
# name: model, dtype, CUDA graphs, what is asked
CASES = {
    "fp32-eager": ("small", "float32", False, "tokens"),
    "fp32-graphs": ("small", "float32", True, "tokens"),
    "bf16-eager": ("small", "bfloat16", False, "tokens"),
    "bf16-graphs": ("small", "bfloat16", True, "tokens"),
    "speed-eager": ("large", "bfloat16", False, "speed"),
    "speed-graphs": ("large", "bfloat16", True, "speed"),
}
PROMPT_LENS = (5, 17, 64, 130, 300, 700, 33, 1)
NUM_TOKENS = 48


def native_operations():
    """What vLLM's compiled module registers, by PyTorch's operations; before vLLM is imported."""
    import torch

    def rms_norm(out, x, weight, epsilon):
        norm = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + epsilon)
        out.copy_(norm if weight is None else norm.to(x.dtype) * weight)

    def fused_add_rms_norm(x, residual, weight, epsilon):
        residual.add_(x)
        rms_norm(x, residual, weight, epsilon)

    def silu_and_mul(out, x):
        gate, up = x.chunk(2, -1)
        out.copy_(torch.nn.functional.silu(gate) * up)

    class Pinned:
        """Memory of the host, for a GPU to look into."""

        def __init__(self, tensor):
            self.tensor = tensor
            array = tensor.numpy().__array_interface__
            self.__cuda_array_interface__ = {
                name: array[name] for name in ("shape", "typestr", "data", "strides")
            } | {"version": 3}

    def get_cuda_view_from_cpu_tensor(tensor):
        return torch.as_tensor(Pinned(tensor), device="cuda")

    for operation in (rms_norm, fused_add_rms_norm, silu_and_mul, get_cuda_view_from_cpu_tensor):
        setattr(torch.ops._C, operation.__name__, operation)
    torch.ops._C.weak_ref_tensor = lambda tensor: tensor
    for what in ("cutlass_scaled_mm_supports_fp8", "cutlass_scaled_mm_supports_block_fp8",
                 "cutlass_group_gemm_supported"):  # fmt: skip
        setattr(torch.ops._C, what, lambda *args: False)
    for name in ("_C_stable_libtorch", "_moe_C_stable_libtorch", "vllm_flash_attn"):
        sys.modules[f"vllm.{name}"] = types.ModuleType(f"vllm.{name}")
    # Imported by name, and never called with the backends here.
    flash = sys.modules["vllm.vllm_flash_attn"]
    flash.flash_attn_varlen_func = flash.get_scheduler_metadata = None
    flash.compile_flash_attn_varlen_func_from_specs = None


def open_engine(folder, model, dtype, graphs, backend):
    """An engine in this process."""
    from vllm import LLM
    from vllm.model_executor.models import registry

    # vLLM looks at models in a process of their own, which would import everything again.
    registry._run_in_subprocess = lambda look: look()
    compilation = {"mode": 0, "custom_ops": ["none"]}
    if graphs:
        compilation |= {
            "cudagraph_mode": "FULL", "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64],
        }  # fmt: skip
    options = {} if backend == "CPU_ATTN" else {"attention_backend": backend}
    if backend != "CPU_ATTN":
        options |= {
            "compilation_config": compilation,
            # Several engines share the GPU: nobody measures what is left.
            "gpu_memory_utilization": 0.1,
            "kv_cache_memory_bytes": (1 if model == "small" else 16) << 30,
        }  # fmt: skip
    return LLM(
        model=str(folder / model),
        skip_tokenizer_init=True,
        dtype=dtype,
        load_format="seeded" if model == "small" else "dummy",
        max_model_len=2048,
        max_num_seqs=32,
        enforce_eager=not graphs,
        seed=0,
        **options,
    )


def prompt(length, vocabulary, seed):
    """Token ids that are the same everywhere."""
    ids = [(seed * 7919 + i * i * 31 + i) % vocabulary for i in range(length)]
    return {"prompt_token_ids": ids}


def ask_tokens(engine, vocabulary):
    """Greedy tokens of requests of all lengths at once, and logprobs of their prompts."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, detokenize=False, prompt_logprobs=0
    )
    prompts = [prompt(n, vocabulary, i) for i, n in enumerate(PROMPT_LENS)]
    outputs = engine.generate(prompts, sampling, use_tqdm=False)
    logprobs = []
    for output in outputs:
        steps = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
        logprobs.append([step[token].logprob for token, step in steps])
    return {"tokens": [list(o.outputs[0].token_ids) for o in outputs], "logprobs": logprobs}


def ask_speed(engine, vocabulary):
    """Tokens a second of 4 and of 32 requests."""
    from vllm import SamplingParams

    print("ready", flush=True)
    sys.stdin.readline()  # our turn
    found = {}
    for num_requests, length, new in ((4, 1024, 64), (32, 512, 64), (32, 1024, 1)):
        sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        seconds = []
        for run in range(3):  # the first warms up
            prompts = [prompt(length, vocabulary, run * 100 + i) for i in range(num_requests)]
            begin = time.perf_counter()
            engine.generate(prompts, sampling, use_tqdm=False)
            seconds.append(time.perf_counter() - begin)
        found[f"{num_requests} x ({length} + {new})"] = round(min(seconds[1:]), 4)
    return found


def work(folder, case, backend):
    """One engine, in a process of its own; the result is a file."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0",
        # Triton multiplies fp32 in tf32 by default, with three digits.
        "TRITON_F32_DEFAULT": "ieee",
    }  # fmt: skip
    native_operations()
    import seeded  # noqa: F401 (registers itself)

    model, dtype, graphs, what = CASES[case]
    engine = open_engine(folder, model, dtype, graphs, backend)
    config = engine.llm_engine.vllm_config
    layers = config.compilation_config.static_forward_context.values()
    impls = sorted({type(layer.impl).__module__ for layer in layers if hasattr(layer, "impl")})
    ask = ask_tokens if what == "tokens" else ask_speed
    result = {"impls": impls, **ask(engine, MODELS[model]["vocab_size"])}
    (folder / f"{case}-{backend}.json").write_text(json.dumps(result))


def compared(case, results, truth):
    """A line about two results."""
    theirs, mine = results
    if "tokens" not in mine:
        return ", ".join(
            f"{name}: {theirs[name]:.3f} s own, {mine[name]:.3f} s Quire"
            for name in mine if name != "impls"
        )  # fmt: skip
    equal = sum(a == b for a, b in zip(theirs["tokens"], mine["tokens"], strict=True))
    text = f"{equal} of {len(PROMPT_LENS)} requests have equal tokens"
    flat = [[x for one in r["logprobs"] for x in one] for r in (theirs, mine, truth or mine)]
    apart = max(abs(a - b) for a, b in zip(flat[0], flat[1], strict=True))
    text += f"; logprobs of {len(flat[0])} prompt tokens within {apart:.1e}"
    if truth is not None:
        off = [sum(abs(a - b) for a, b in zip(x, flat[2], strict=True)) / len(x) for x in flat[:2]]
        text += f"; on average {off[0]:.2e} (own) and {off[1]:.2e} (Quire) from fp32's"
    return text


def main():
    """Runs the cases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="", help="cases with this in the name")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.folder = args.folder.absolute()
    if args.worker:
        work(args.folder, *args.worker)
        return 0
    for name, model in MODELS.items():
        (args.folder / name).mkdir(parents=True, exist_ok=True)
        (args.folder / name / "config.json").write_text(json.dumps(LLAMA | model))
    cases = [case for case in CASES if args.only in case]
    failed = run(args.folder, [(case, backend) for case in cases for backend in BACKENDS])
    exact = None
    for case in cases:
        if any((case, backend) in failed for backend in BACKENDS):
            print(f"{case}: failed; see the logs in the folder", flush=True)
            continue
        results = [
            json.loads((args.folder / f"{case}-{backend}.json").read_text()) for backend in BACKENDS
        ]
        ran = [result["impls"] for result in results]
        if not ran[1] or not all(name.startswith("quire") for name in ran[1]):
            failed.add((case, "CUSTOM"))
        if case == "fp32-eager":
            exact = results[1]
        print(f"{case} ({ran[0]} and {ran[1]}): ", end="")
        print(compared(case, results, exact if case.startswith("bf16") else None), flush=True)
    return 1 if failed else 0


def run(folder, jobs):
    """All of these at once, but measured one after the other; returns those that failed."""
    started = {}
    for case, backend in jobs:
        command = [sys.executable, __file__, str(folder), "--worker", case, backend]
        with open(folder / f"{case}-{backend}.log", "w") as log:
            started[case, backend] = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT
            )
    failed = set()
    for case, backend in sorted(jobs, key=lambda job: CASES[job[0]][3] == "speed"):
        process = started[case, backend]
        process.communicate(b"\n")
        if process.returncode != 0:
            failed.add((case, backend))
    return failed


if __name__ == "__main__":
    sys.exit(main())
