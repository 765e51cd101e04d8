"""What is run in vLLM, and what it is compared with. Read by the driver and by its workers."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

VLLM_HOSTS = ("v32", "v33", "v28", "v22")
CACHES = {
    "bfloat16": ("v32", "v28", "v22"),  # 0.33 refuses it where the model is in fp32
    "fp8_e4m3": VLLM_HOSTS,
    "fp8_e5m2": VLLM_HOSTS,
    "int8_per_token_head": VLLM_HOSTS,
    "fp8_per_token_head": VLLM_HOSTS,
    "int4_per_token_head": ("v32", "v33", "v28"),
}
LAYOUTS = ("LBNHC", "LBHNC", "BLNHC", "BLHNC", "BHLNC", "LHBNC")

SHORT = (
    "The capital of France is",
    "Write a haiku about the sea.",
    "In 1969, the first human landed on the",
    "Explain in one sentence why the sky is blue:",
)
_STORY = (
    "Once upon a time there was a small robot who lived in a library. Every day it sorted the "
    "books by colour, by size, and by the number of times the word river appeared. "
)
LONG = tuple(f"{(_STORY * 8)[: 200 + 97 * i]} Item {i}:" for i in range(6))
# Its every token's logprob is compared, however the tokens before would have been chosen.
TEXT = (
    "The river rises in the hills to the north, where rain falls on most days of the year. It "
    "runs south through beech woods and past three mills, of which only one still grinds corn. In "
    "1843 a railway company bought the valley and built a viaduct of nineteen arches across it; "
    "the engineer had promised ten, but the clay would not carry them. Trains crossed it until "
    "1966. Since then people walk over it, and on a clear day they can see the cathedral, the "
    "power station and, far beyond both, the sea. Every spring the school takes its youngest "
    "class there to count the swallows. Last year they counted 214, which was eleven more than "
    "the year before. "
)


@dataclass(frozen=True)
class Requests:
    """What is asked of an engine."""

    prompts: tuple
    max_tokens: int = 0  # 0: the prompts' embeddings
    prompt_logprobs: bool = False  # of each token of the prompts, with none generated to speak of
    rounds: int = 1  # the same again: from the cache of prefixes
    concurrent: int = 6


FOUR = Requests(SHORT, 8)
TEN = Requests(SHORT + LONG, 24)
SCORE = Requests((TEXT,), 1, prompt_logprobs=True)
EMBED = Requests((SHORT[0], SHORT[3], LONG[1]))
TINY = Requests((SHORT[0], LONG[0], LONG[4]), 12)


@dataclass(frozen=True)
class Run:
    """One engine and what it is asked; `options` go to vllm.LLM."""

    requests: Requests
    model: str = "hf-f32"
    options: dict = field(default_factory=dict)
    env: dict = field(default_factory=dict)
    poison: bool = False  # NaN into every block that no sequence holds
    rounded_to: str | None = None  # the cache dtype that keys and values are rounded to beforehand

    def key(self):
        """Changes with everything that the host's own result depends on."""
        files = ("rounding.py",) if self.rounded_to else ()
        files += ("models.py", "seeded.py") if self.model.startswith("tiny-") else ()
        parts = [Path(__file__).with_name(name).read_text() for name in files]
        parts.append(json.dumps(asdict(self), sort_keys=True))
        return hashlib.sha256("".join(parts).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    name: str
    run: Run  # with Quire
    compare: str  # how: a function of compare.py
    own: tuple = ()  # with the host's own backend
    limit: float | None = None  # of the differences of logprobs
    hosts: tuple = VLLM_HOSTS
    script: str = "vllm_worker.py"


# What the host's own backend runs with: pages that it likes, nothing clever.
_PLAIN = {"block_size": 128, "enable_prefix_caching": False}
_CHUNKED = {"max_num_batched_tokens": 64, "enable_chunked_prefill": True}
# As many as the longest request may have, and one that none gets. Ten at a time begin with
# fewer, and end with more.
_FEW_BLOCKS = {"num_gpu_blocks_override": 33, **_CHUNKED}
_PREFIXES = {"enable_prefix_caching": True}
_NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_max": 3,
    "prompt_lookup_min": 1,
}

OWN_TEN = Run(TEN, options=_PLAIN)
OWN_SCORE = Run(SCORE, options=_PLAIN)


def _served(name, requests=TEN, compare="tokens", own=(OWN_TEN,), limit=1e-3, hosts=None, **run):
    options = {"block_size": 16, "enable_prefix_caching": False, **run.pop("options", {})}
    hosts = hosts or VLLM_HOSTS
    return Case(name, Run(requests, options=options, **run), compare, own, limit, hosts)


def _cache(dtype, model, compare, limit, hosts=None):
    """A cache of another dtype, against the host's own backend over keys and values so rounded."""
    own = tuple(Run(SCORE, model, _PLAIN, rounded_to=rounded) for rounded in (dtype, None))
    options = {"kv_cache_dtype": dtype, **_CHUNKED}
    name = f"cache-{dtype}" + ("-1-layer" if model == "tiny-llama" else "")
    return _served(name, SCORE, compare, own, limit, hosts, model=model, options=options)


def _tiny(model, requests=TINY, compare="tokens", name=None, **run):
    pooling = {"runner": "pooling"} if requests is EMBED else {}
    own = (Run(requests, model=f"tiny-{model}", options={**_PLAIN, **pooling}),)
    options = {**pooling, **run.pop("options", {})}
    run = {**run, "model": f"tiny-{model}", "options": options}
    return _served(name or model, requests, compare, own, **run)


def vllm_cases():
    """All of them; those of one engine lie together."""
    again = Requests(TEN.prompts, TEN.max_tokens, rounds=2)
    crowd = Requests(TEN.prompts, TEN.max_tokens, concurrent=10)
    bf16 = Run(SCORE, model="hf-bf16", options=_PLAIN)
    # A layout and a block size that vLLM's own backend for CPUs refuses: if it serves, Quire does.
    served = Run(TEN, options={"block_size": 16, **_CHUNKED}, env={"VLLM_KV_CACHE_LAYOUT": "BHLNC"})
    older = Run(TEN, options={"block_size": 16, **_CHUNKED})
    return [
        _served("greedy"),
        _served("chunked-prefill", options=_CHUNKED),
        _served("prefix-caching", again, "cached", options={**_CHUNKED, **_PREFIXES}),
        _served("nan-in-free-blocks", poison=True, options=_CHUNKED),
        _served("preemption", crowd, "preempted", poison=True, options=_FEW_BLOCKS),
        Case("bf16", bf16, "no_worse", (bf16, OWN_SCORE), 1.25),
        *(_served(f"block-{n}", FOUR, options={"block_size": n}) for n in (8, 16, 48, 128)),
        *(
            _served(
                f"layout-{name}", FOUR, "laid_out", hosts=hosts, env={"VLLM_KV_CACHE_LAYOUT": name}
            )
            for names, hosts in ((LAYOUTS, ("v32", "v33")), (("NHD", "HND"), ("v28", "v22")))
            for name in names
        ),
        *(_cache(dtype, "hf-f32", "no_worse", 1.25, hosts) for dtype, hosts in CACHES.items()),
        # Of int4 two roundings to bf16 are part, which the last bit can turn as well.
        *(
            _cache(dtype, "tiny-llama", "rounded", 0.05 if "int4" in dtype else 0.01, hosts)
            for dtype, hosts in CACHES.items()
        ),
        _tiny("gemma2"),
        _tiny("gemma2", name="gemma2-evicted", options=_CHUNKED, poison=True),
        _tiny("gemma3", name="gemma3-evicted", options=_CHUNKED, poison=True),
        _tiny("bloom", options=_CHUNKED),
        _tiny("gpt-oss", name="gpt-oss-evicted", options=_CHUNKED, poison=True),
        _tiny("bert", EMBED, "embeddings", limit=1e-5),
        # The last one of its process: it imports Numba, over which vLLM 0.32 stumbles when the next
        # engine starts and it looks for Triton's kernels in all modules.
        _served("ngram-speculation", compare="drafted", options={"speculative_config": _NGRAM}),
        *(
            Case("serve-openai", run, "texts", (OWN_TEN,), None, hosts, "serve_worker.py")
            for run, hosts in ((served, ("v32", "v33")), (older, ("v28", "v22")))
        ),
    ]
