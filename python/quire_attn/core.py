"""The functional core: plan a batch once a step, then attend over it once a layer.

The C++ headers quire/attention.h, kv_cache.h, mask.h, score.h and metadata.h are the manual of what
each argument means; names are the same. Errors carry the library's text: ValueError for a wrong
argument, TypeError for a wrong dtype, NotImplementedError for what a backend cannot do.
"""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass
from typing import Any

from . import _binding
from .arrays import Array, dtype_name, empty_like, is_tracing, refuse_gradients


@dataclass(frozen=True)
class Mask:
    """Which keys a row may see (quire::Mask). `window` is "none", "left", "both" or "chunked"."""

    causal: bool = True
    window: str = "none"
    window_size: int = 0
    chunk_lookback: int = 0
    clamp_ranges: bool = False

    @staticmethod
    def full() -> Mask:
        """Every row sees every key."""
        return Mask(causal=False)

    @staticmethod
    def sliding_window(size: int) -> Mask:
        """Causal; a row sees `size` keys, itself included."""
        return Mask(window="left", window_size=size)

    @staticmethod
    def sliding_window_both(size: int) -> Mask:
        """Not causal; keys less than `size` away."""
        return Mask(causal=False, window="both", window_size=size)

    @staticmethod
    def chunked(chunk_size: int, lookback: int = 0) -> Mask:
        """Causal within a chunk and `lookback` chunks before it."""
        return Mask(window="chunked", window_size=chunk_size, chunk_lookback=lookback)


@dataclass(frozen=True, eq=False)
class Score:
    """How a score is made from a dot product (quire::Score)."""

    softmax_scale: float = 0.0
    """0 means 1 / sqrt(head_size)."""
    soft_cap: float = 0.0
    alibi_slopes: Array | None = None
    """float32 [num_heads]."""
    alibi_sqrt: bool = False
    sinks: Array | None = None
    """float32 [num_heads]."""


@dataclass(frozen=True, eq=False)
class PagedKvCache:
    """A paged cache of one layer (quire::PagedKvCache): views over arrays of the caller's.

    `key` is [num_blocks, block_size, num_kv_heads, head_size], `value` the same with head_size_v,
    of any strides but the last, which is 1. `dtype` is one of vLLM's names.
    """

    key: Array
    value: Array
    dtype: str = "auto"
    k_scale: float | Array = 1.0
    v_scale: float | Array = 1.0
    k_scale_cache: Array | None = None
    """Per-token-head kinds: float32 [num_blocks, block_size, num_kv_heads]."""
    v_scale_cache: Array | None = None

    @staticmethod
    def from_combined(kv_cache: Array, dtype: str = "auto", **rest: Any) -> PagedKvCache:
        """Of vLLM's default layout, [num_blocks, 2, block_size, num_kv_heads, head_size]."""
        if kv_cache.ndim != 5 or kv_cache.shape[1] != 2:
            raise ValueError(
                "kv_cache: expected shape [*, 2, *, *, *] (num_blocks, K and V, block_size, "
                f"num_kv_heads, head_size), got {tuple(kv_cache.shape)}"
            )
        return PagedKvCache(kv_cache[:, 0], kv_cache[:, 1], dtype, **rest)

    @staticmethod
    def from_packed(
        kv_cache: Array, head_size: int, dtype: str = "auto", **rest: Any
    ) -> PagedKvCache:
        """Of vLLM's packed layout, K before V in each row.

        [num_blocks, num_kv_heads, block_size, head_size + head_size_v], int4 half of that in bytes.
        """
        if dtype == "int4_per_token_head":
            head_size //= 2
        if kv_cache.ndim != 4 or kv_cache.shape[3] <= head_size:
            raise ValueError(
                f"kv_cache: expected 4 dimensions, the last more than head_size {head_size}, "
                f"got {tuple(kv_cache.shape)}"
            )
        slots_first = kv_cache.swapaxes(1, 2)
        return PagedKvCache(
            slots_first[..., :head_size], slots_first[..., head_size:], dtype, **rest
        )


class Plan:
    """How a batch is cut into work (quire::Plan).

    Made once for layers of one configuration, updated once a step. It keeps the arrays of its batch
    alive until the next update. On CUDA it works on the stream that torch has as current; graphs
    can be captured as quire/attention.h says at Plan, after a warm-up with the same plan.
    """

    def __init__(
        self,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        head_size_v: int = 0,
        dtype: Any = "bfloat16",
        device: Any = "cpu",
        type: str = "decoder",  # noqa: A002
        mask: Mask = Mask(),  # noqa: B008
        score: Score = Score(),  # noqa: B008
        block_size: int = 16,
        kv_cache_dtype: str = "auto",
        batch_invariant: bool = False,
        auto_cascade: bool = True,
        backend: str = "",
    ) -> None:
        """The arguments are the members of quire::AttentionConfig, by their names.

        `dtype` may be a name or NumPy's or torch's object; `device` is "cpu", "cuda", "cuda:1" or a
        torch.device. `type` is "decoder", "encoder", "encoder_only" or "encoder_decoder".
        """
        kind, _, index = str(device).partition(":")
        if kind not in ("cpu", "cuda"):
            raise ValueError(f"device: expected cpu or cuda, got '{device}'")
        self.number = next(_numbers)  # by which torch's operators name it
        _plans[self.number] = self
        self.num_heads = num_heads
        self.head_size_v = head_size_v or head_size
        self._score = score  # its arrays must live as long as the plan
        self._batch: tuple[Any, ...] = ()
        self._object = _binding.plan_create(
            kind == "cuda",
            int(index or 0),
            dtype_name(dtype),
            type,
            num_heads,
            num_kv_heads,
            head_size,
            head_size_v,
            mask.causal,
            mask.window,
            mask.window_size,
            mask.chunk_lookback,
            mask.clamp_ranges,
            score.softmax_scale,
            score.soft_cap,
            score.alibi_slopes,
            score.alibi_sqrt,
            score.sinks,
            block_size,
            kv_cache_dtype,
            batch_invariant,
            auto_cascade,
            backend,
        )

    def update(
        self,
        *,
        query_start_loc: Array,
        seq_lens: Array | None = None,
        block_table: Array | None = None,
        num_actual_tokens: int,
        max_query_len: int = 0,
        max_seq_len: int = 0,
        causal: Array | None = None,
        mm_prefix_range: Array | None = None,
        visible_prefix_lens: Array | None = None,
        qq_bias: Array | None = None,
        kv_start_loc: Array | None = None,
        kv_offset: Array | None = None,
        kv_stride: Array | None = None,
        q_offset: Array | None = None,
        common_prefix_len: int = 0,
        check_indices: bool = False,
    ) -> None:
        """Plans a batch. The arguments are the members of quire::CommonAttentionMetadata."""
        _binding.plan_update(
            self._object,
            query_start_loc,
            seq_lens,
            block_table,
            num_actual_tokens,
            max_query_len,
            max_seq_len,
            causal,
            mm_prefix_range,
            visible_prefix_lens,
            qq_bias,
            kv_start_loc,
            kv_offset,
            kv_stride,
            q_offset,
            common_prefix_len,
            check_indices,
        )
        self._batch = (
            query_start_loc,
            seq_lens,
            block_table,
            causal,
            mm_prefix_range,
            visible_prefix_lens,
            qq_bias,
            kv_start_loc,
            kv_offset,
            kv_stride,
            q_offset,
        )

    @property
    def backend_name(self) -> str:
        """The backend that serves it, "cpu", "cuda" or "reference"."""
        return str(_binding.plan_backend_name(self._object))

    @property
    def workspace_bytes(self) -> int:
        """Bytes of workspace held now."""
        return _binding.plan_workspace_bytes(self._object)

    def __str__(self) -> str:
        """How the batch is cut into work, for people."""
        return str(_binding.plan_to_string(self._object))


def use_openmp_threads(use: bool = True) -> int:
    """Runs what is on the CPU on the OpenMP threads of the process (torch's), or on Quire's again.

    For engines whose threads are bound to CPUs and stay awake between calls: a second pool would be
    in their way. Returns how many threads there are; 0, and nothing changes, where no OpenMP
    runtime is loaded.
    """
    return int(_binding.use_openmp_threads(use))


_numbers = itertools.count()
_plans: weakref.WeakValueDictionary[int, Plan] = weakref.WeakValueDictionary()


def plan_of(number: int) -> Plan:
    """The plan with that number."""
    plan = _plans.get(number)
    if plan is None:
        raise ValueError("plan: expected one that is alive, got one that was deleted")
    return plan


_CACHE_DTYPES: dict[str, int] = {}


def cache_dtype_number(name: str) -> int:
    """The number of a cache dtype's name, asked of the library once."""
    number = _CACHE_DTYPES.get(name)
    if number is None:
        number = _CACHE_DTYPES[name] = _binding.kv_cache_dtype(name)
    return number


_NO_SCORE = (False, 0.0, 0.0, None, False, None)


def attention(
    plan: Plan,
    query: Array,
    kv_cache: PagedKvCache | None = None,
    *,
    key: Array | None = None,
    value: Array | None = None,
    output: Array | None = None,
    lse: Array | None = None,
    score: Score | None = None,
    q_scale: float | Array = 1.0,
    output_scale: float | Array | None = None,
    output_block_scale: Array | None = None,
    check_indices: bool = False,
) -> Array:
    """Attention of one layer over the planned batch; the members of quire::AttentionArgs.

    Returns `output`. Where none is given it is [num_tokens, num_heads, head_size_v] of the query's
    dtype, uninitialised in rows that belong to no sequence.
    """
    if is_tracing(query):
        from . import torch_ops

        return torch_ops.traced_attention(
            plan, query, kv_cache, key, value, output, lse, score, q_scale, output_scale,
            output_block_scale,
        )  # fmt: skip
    refuse_gradients(query, key, value, output)
    if output is None:
        output = empty_like(query, (query.shape[0], plan.num_heads, plan.head_size_v))
    if kv_cache is None:
        cache = (None, None, 0, 1.0, 1.0, None, None)
    else:
        refuse_gradients(kv_cache.key, kv_cache.value)
        cache = (
            kv_cache.key,
            kv_cache.value,
            cache_dtype_number(kv_cache.dtype),
            kv_cache.k_scale,
            kv_cache.v_scale,
            kv_cache.k_scale_cache,
            kv_cache.v_scale_cache,
        )
    own_score = _NO_SCORE
    if score is not None:
        own_score = (
            True,
            score.softmax_scale,
            score.soft_cap,
            score.alibi_slopes,
            score.alibi_sqrt,
            score.sinks,
        )
    _binding.attention(
        plan._object,
        query,
        *cache,
        key,
        value,
        output,
        lse,
        q_scale,
        output_scale,
        output_block_scale,
        *own_score,
        check_indices,
    )
    return output


def write_kv_cache(
    key: Array,
    value: Array,
    kv_cache: PagedKvCache,
    slot_mapping: Array,
    *,
    backend: str = "",
    check_indices: bool = False,
) -> None:
    """Writes the K and V of new tokens into the cache (quire::write_kv_cache).

    `key` and `value` are [num_tokens, num_kv_heads, head_size], `slot_mapping` int64 [num_slots];
    negative slots are skipped.
    """
    if is_tracing(key):
        from . import torch_ops

        torch_ops.traced_write_kv_cache(key, value, kv_cache, slot_mapping, backend)
        return
    refuse_gradients(key, value, kv_cache.key, kv_cache.value)
    _binding.write_kv_cache(
        key,
        value,
        kv_cache.key,
        kv_cache.value,
        cache_dtype_number(kv_cache.dtype),
        kv_cache.k_scale,
        kv_cache.v_scale,
        kv_cache.k_scale_cache,
        kv_cache.v_scale_cache,
        slot_mapping,
        backend,
        check_indices,
    )


def merge_states(
    o_a: Array,
    lse_a: Array,
    o_b: Array,
    lse_b: Array,
    output: Array | None = None,
    lse: Array | None = None,
    *,
    backend: str = "",
) -> tuple[Array, Array]:
    """Merges two attention results over disjoint keys (quire::merge_states).

    o: [num_tokens, num_heads, head_size_v], lse: float32 [num_heads, num_tokens]. Returns output
    and lse, made where they are not given.
    """
    if is_tracing(o_a):
        from . import torch_ops

        return torch_ops.traced_merge_states(o_a, lse_a, o_b, lse_b, output, lse, backend)
    refuse_gradients(o_a, lse_a, o_b, lse_b, output, lse)
    if output is None:
        output = empty_like(o_a, tuple(o_a.shape))
    if lse is None:
        lse = empty_like(lse_a, tuple(lse_a.shape))
    _binding.merge_states(o_a, lse_a, o_b, lse_b, output, lse, backend)
    return output, lse
