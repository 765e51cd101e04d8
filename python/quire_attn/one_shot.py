"""Calls that bring their batch along: a plan is taken from a pool, updated, used and put back."""

from __future__ import annotations

import sys
import weakref
from dataclasses import dataclass
from typing import Any

from .arrays import Array, device_name, dtype_name, is_torch
from .core import Mask, PagedKvCache, Plan, Score, attention, write_kv_cache

# Plans by configuration, and on CUDA by stream: a plan's calls must be in one order, which one
# stream gives. A list's pop and append are atomic, so a plan serves one thread at a time.
MOST_KINDS = 64
_idle: dict[tuple[Any, ...], list[Plan]] = {}
_in_graphs: weakref.WeakSet[Plan] = weakref.WeakSet()
"""Plans that a call was captured with: a CUDA graph may use their memory."""


@dataclass(frozen=True)
class Band:
    """Which keys a row sees, by distance: `left` before its own position, `right` after.

    -1 is without end, as in FlashAttention's window_size. Positions are aligned at the ends of
    query and key.
    """

    left: int
    right: int

    @property
    def mask(self) -> Mask:
        """The layer's mask. Where `shift` is not 0, rows are that much later than they are."""
        if self.left < 0 and self.right < 0:
            return Mask.full()
        if self.left >= 0 and self.left == self.right:
            return Mask.sliding_window_both(self.left + 1)
        if self.left < 0:
            return Mask()
        return Mask.sliding_window(self.left + self.shift + 1)

    @property
    def shift(self) -> int:
        """How much later rows must be for a causal mask to end `right` after their position."""
        if self.left == self.right or self.right == 0:
            return 0
        return self.right if self.right > 0 else 1 << 29  # more than there are keys


def attend(
    query: Array,
    cache: PagedKvCache,
    output: Array,
    lse: Array | None,
    mask: Mask,
    score: Score,
    batch: dict[str, Any],
    write: tuple[Array, Array, Array] | None = None,
    **args: Any,
) -> None:
    """One attention call over a paged cache, plan included. `batch` goes to Plan.update().

    `write`: key, value and slot_mapping of tokens to store first, once the plan has been accepted.
    """
    key, plan = _take(query, cache, mask)
    try:
        plan.update(**batch)
        if write is not None:
            new_key, new_value, slots = write
            write_kv_cache(new_key, new_value, cache, slots)
        attention(plan, query, cache, output=output, lse=lse, score=score, **args)
        plan._batch = ()
    finally:
        _put_back(key, plan)


def _put_back(key: tuple[Any, ...], plan: Plan) -> None:
    _idle.setdefault(key, []).append(plan)
    if len(_idle) > MOST_KINDS:
        _drop_oldest(key)


def _drop_oldest(kept: tuple[Any, ...]) -> None:
    """Forgets a kind of plans, but none that a graph uses."""
    for kind in list(_idle):
        if kind == kept or any(plan in _in_graphs for plan in _idle.get(kind, ())):
            continue
        if kind[-2] != "cpu":
            cuda = sys.modules["torch"].cuda
            if cuda.is_current_stream_capturing():
                return
            cuda.synchronize(kind[-2])  # a plan must not go before its work is done
        _idle.pop(kind, None)
        return


def _take(query: Array, cache: PagedKvCache, mask: Mask) -> tuple[Any, Plan]:
    _, block_size, num_kv_heads, _ = cache.key.shape
    head_size, head_size_v = (_elements(x, cache.dtype) for x in (cache.key, cache.value))
    device = device_name(query)
    stream = 0
    if device != "cpu":
        torch = sys.modules["torch"]
        stream = torch.cuda.current_stream(query.device).cuda_stream
    key = (
        query.dtype, query.shape[-2], num_kv_heads, head_size, head_size_v, block_size,
        cache.dtype, mask, device, stream,
    )  # fmt: skip
    plans = _idle.get(key)
    capturing = device != "cpu" and sys.modules["torch"].cuda.is_current_stream_capturing()
    if plans:
        plan = plans.pop()
        if capturing:
            _in_graphs.add(plan)
        return key, plan
    if capturing:
        # Memory cannot be taken in a capture. A plan that was warmed up on another stream has what
        # it needs; nobody else gets it any more.
        for other, plans in _idle.items():
            if other[:-1] == key[:-1] and plans:
                plan = plans.pop()
                _in_graphs.add(plan)
                return key, plan
    plan = Plan(
        num_heads=query.shape[-2],
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        head_size_v=head_size_v,
        dtype=query.dtype,
        device=device,
        mask=mask,
        block_size=block_size,
        kv_cache_dtype=cache.dtype,
    )
    return key, plan


def _elements(rows: Array, cache_dtype: str) -> int:
    """How many elements a row of a cache holds."""
    return rows.shape[3] * (2 if cache_dtype == "int4_per_token_head" else 1)


def cache_dtype_of(key_cache: Array, query: Array) -> str:
    """Which kind of cache an array is by its element type, where nobody says."""
    if key_cache.dtype == query.dtype and dtype_name(query.dtype) != "float8_e4m3":
        return "auto"
    name = dtype_name(key_cache.dtype)
    return {"float8_e4m3": "fp8_e4m3", "float8_e5m2": "fp8_e5m2", "uint8": "fp8_e4m3"}.get(
        name, name
    )


def check_like(name: str, array: Array, query: Array, ndim: int, head_size: int | None) -> None:
    """Raises ValueError unless `array` is where the query is, and of that shape."""
    if array.ndim != ndim or (head_size is not None and array.shape[-1] != head_size):
        wanted = f"{ndim} dimensions" + (f", the last {head_size}" if head_size else "")
        raise ValueError(f"{name}: expected {wanted}, got shape {tuple(array.shape)}")
    if is_torch(array) != is_torch(query) or (is_torch(array) and array.device != query.device):
        raise ValueError(f"{name}: expected memory on {device_name(query)}, as the query's")
