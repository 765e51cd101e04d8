"""Runs engines in one process of a host, one after the other; a line of JSON for each.

usage: vllm_worker.py RUNS.json RESULTS.jsonl MODELS own|quire

RUNS.json is a list of cases.Run as dictionaries. Imports vLLM, so that it starts in 30 seconds.
"""

import gc
import json
import os
import sys
import time
import traceback
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process, to look into

import rounding
import seeded  # noqa: F401 (registers itself)
import vllm.v1.kv_cache_interface
from poison import poison_free_blocks
from vllm import LLM, SamplingParams
from vllm.model_executor.models import registry
from vllm.v1.executor.uniproc_executor import UniProcExecutor

MAX_MODEL_LEN = 512
# vLLM looks at each model's class in a process that imports everything again, lest CUDA starts in
# its own. There is none here.
registry._run_in_subprocess = lambda look: look()


class Impls:
    """The classes whose attention ran, and how often."""

    def __init__(self, engine):
        """Counts from now on."""
        self.forwards = 0
        config = engine.llm_engine.vllm_config
        layers = config.compilation_config.static_forward_context.values()
        impls = [layer.impl for layer in layers if hasattr(layer, "impl")]
        self.classes = {type(impl) for impl in impls}
        for impl in self.classes:
            if not hasattr(impl, "quire_test_forward"):
                impl.quire_test_forward = impl.forward
            impl.forward = self._counting(impl.quire_test_forward)
        for impl in impls:
            # vLLM's own backend for CPUs took them in bf16 only, before 0.32. SeededLoader makes
            # such as bf16 can hold.
            if "cpu_attn" in type(impl).__module__ and getattr(impl, "sinks", None) is not None:
                impl.sinks = impl.sinks.bfloat16()

    def names(self):
        """Where they come from."""
        return sorted(f"{c.__module__}.{c.__qualname__}" for c in self.classes)

    def _counting(self, forward):
        def counted(impl, *args, **kwargs):
            self.forwards += 1
            return forward(impl, *args, **kwargs)

        return counted


def open_engine(run, models):
    """The engine of a run, its environment variables set before."""
    for name in ("VLLM_KV_CACHE_LAYOUT",):
        os.environ.pop(name, None)
    os.environ.update(run["env"])
    options = dict(run["options"])
    if run["model"].startswith("tiny-"):
        options.setdefault("load_format", "seeded")
    return LLM(
        model=str(Path(models, run["model"])),
        dtype="bfloat16" if "bf16" in run["model"] else "float32",
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=run["requests"]["concurrent"],
        enforce_eager=True,
        distributed_executor_backend=UniProcExecutor,  # 0.22 makes another process of "uni"
        seed=0,
        disable_log_stats=False,  # counts accepted drafts
        **options,
    )


def ask(engine, requests):
    """The answers of the last round, each a dictionary."""
    prompts = list(requests["prompts"])
    if requests["max_tokens"] == 0:
        outputs = engine.embed(prompts, use_tqdm=False)
        return [{"embedding": list(map(float, o.outputs.embedding))} for o in outputs]
    sampling = SamplingParams(
        temperature=0,
        max_tokens=requests["max_tokens"],
        ignore_eos=True,
        logprobs=5,
        prompt_logprobs=0 if requests["prompt_logprobs"] else None,
    )
    for _ in range(requests["rounds"]):
        outputs = engine.generate(prompts, sampling, use_tqdm=False)
    return [answer(output) for output in outputs]


def answer(output):
    """Of one request: the tokens, their logprobs and text."""
    completion = output.outputs[0]
    found = {
        "tokens": list(completion.token_ids),
        "text": completion.text,
        "cached": output.num_cached_tokens,
        "logprobs": [{int(t): p.logprob for t, p in step.items()} for step in completion.logprobs],
    }
    if output.prompt_logprobs:
        ids = output.prompt_token_ids
        steps = zip(ids[1:], output.prompt_logprobs[1:], strict=True)
        found["prompt_logprobs"] = [step[token].logprob for token, step in steps]
    return found


def counted(engine):
    """How many tokens came from speculation, how many requests lost their blocks."""
    metrics = {m.name: getattr(m, "value", None) for m in engine.get_metrics()}
    return {
        "accepted": metrics.get("vllm:spec_decode_num_accepted_tokens"),
        "preemptions": metrics.get("vllm:num_preemptions"),
    }


def close(engine):
    """Frees the engine's memory for the next one."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    del engine
    gc.collect()
    cleanup_dist_env_and_memory()
    gc.collect()


def layout_of(engine):
    """The axes of the cache from the one with the largest stride on, in vLLM's letters."""
    core = engine.llm_engine.engine_core.engine_core
    first, second, *_ = core.model_executor.driver_worker.worker.model_runner.kv_caches
    if first.dim() != 4 or "KVCacheLayout" not in dir(vllm.v1.kv_cache_interface):
        return None
    strides = dict(zip("BHNC", first.stride(), strict=True))
    strides["L"] = (second.data_ptr() - first.data_ptr()) // first.element_size()
    return "".join(sorted(strides, key=strides.get, reverse=True))


def result_of(run, models):
    """All that the driver compares."""
    start = time.monotonic()
    engine = open_engine(run, models)
    loaded = time.monotonic()
    impls = Impls(engine)
    try:
        if run["rounded_to"]:
            rounding.round_keys_and_values(impls.classes, run["rounded_to"])
        poisoned = poison_free_blocks(engine) if run["poison"] else None
        cache = engine.llm_engine.vllm_config.cache_config
        return {
            "answers": ask(engine, run["requests"]),
            **counted(engine),
            "impls": impls.names(),
            "forwards": impls.forwards,
            "block_size": cache.block_size,
            "cache_dtype": cache.cache_dtype,
            "layout": layout_of(engine) if "VLLM_KV_CACHE_LAYOUT" in run["env"] else None,
            "poisoned": poisoned.blocks if poisoned else 0,
            "seconds": [round(loaded - start, 1), round(time.monotonic() - loaded, 1)],
        }
    finally:
        rounding.undo(impls.classes)
        close(engine)


def main():
    """Every run, up to the first that fails: what that leaves behind could make others fail."""
    runs, results, models, side = sys.argv[1:]
    for run in json.loads(Path(runs).read_text()):
        try:
            result = result_of(run, models)
            ours = [name.startswith("quire") for name in result["impls"]]
            if not ours or any(o != (side == "quire") for o in ours):
                result["error"] = f"attention of {side} was asked for, ran {result['impls']}"
        except Exception as error:
            trace = traceback.format_exc().strip().splitlines()
            result = {"error": f"{type(error).__name__}: {error}", "trace": trace[-30:]}
        with open(results, "a") as file:
            file.write(json.dumps(result) + "\n")
        if "trace" in result:
            return


if __name__ == "__main__":
    main()
