"""The few things that depend on whose arrays they are: NumPy's, or torch's without importing it.

Arrays of other libraries can be passed wherever nothing has to be made of them.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import numpy as np

Array = Any
"""An array that DLPack can share: numpy.ndarray, torch.Tensor and others."""


def is_torch(array: Array) -> bool:
    """Whether it is a torch.Tensor or of a class derived from it."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def is_tracing(array: Array) -> bool:
    """Whether torch.compile is looking at this call instead of running it."""
    return is_torch(array) and sys.modules["torch"].compiler.is_compiling()


def refuse_gradients(*arrays: Array) -> None:
    """Raises ValueError where a gradient would be expected of the result: there is no backward."""
    torch = sys.modules.get("torch")
    # One question where engines run, in place of one for each tensor.
    if torch is None or not torch.is_grad_enabled():
        return
    for array in arrays:
        if getattr(array, "requires_grad", False):
            raise ValueError(
                "a tensor requires grad, and Quire computes no gradients: "
                "call it under torch.no_grad(), or pass tensor.detach()"
            )


def even_rows(array: Array) -> Array:
    """An array [batch, rows, ...] whose rows are at equal distances: itself, or else a copy."""
    if array.shape[0] > 1 and array.shape[1] > 1:
        return array.reshape(-1, *array.shape[2:])
    return array  # the binding sees to it


def tokens_as_blocks(name: str, cache: Array) -> Array:
    """The memory of a cache [rows, n, ...] as [rows * n, 1, ...]."""
    tokens = cache.reshape(-1, 1, *cache.shape[2:])
    if is_torch(cache):
        same = tokens.data_ptr() == cache.data_ptr()
    else:
        same = np.may_share_memory(tokens, cache)
    if not same:
        raise ValueError(f"{name}: with cache_leftpad expected rows that lie back to back")
    return tokens


def only_row(array: Array) -> Array | None:
    """The row that all array[i] are, as expand() makes them; None if they are not the same."""
    stride = array.stride(0) if is_torch(array) else array.strides[0]
    if array.shape[0] != 1 and stride != 0:
        return None
    return array[0] if is_torch(array) else array[0].copy()  # NumPy's are read-only


def empty_like(array: Array, shape: tuple[int, ...], dtype: str | None = None) -> Array:
    """An uninitialised array of the same library, on the same device."""
    if is_torch(array):
        torch = sys.modules["torch"]
        wanted = array.dtype if dtype is None else getattr(torch, dtype)
        return torch.empty(shape, dtype=wanted, device=array.device)
    if isinstance(array, np.ndarray):
        return np.empty(shape, dtype=array.dtype if dtype is None else dtype)
    raise TypeError(
        f"output: expected an array to write to, since Quire makes only NumPy's and torch's "
        f"and the input is a {type(array).__module__}.{type(array).__name__}"
    )


def device_name(array: Array) -> str:
    """As Plan takes it: "cpu", "cuda:0"."""
    return str(array.device) if is_torch(array) else "cpu"


@functools.lru_cache(maxsize=64)
def dtype_name(dtype: Any) -> str:
    """Quire's name of an element type: given by name, or as NumPy's or torch's object."""
    if not isinstance(dtype, str):
        dtype = dtype.__name__ if isinstance(dtype, type) else str(dtype).removeprefix("torch.")
    return {"float8_e4m3fn": "float8_e4m3"}.get(dtype, dtype)


def arange(like: Array, count: int, step: int = 1) -> Array:
    """int32 0, step, 2 * step, ...: `count` of them, where `like` is. Not to be written: shared."""
    if is_tracing(like):  # torch.compile keeps what it makes by itself
        torch = sys.modules["torch"]
        return torch.arange(count, dtype=torch.int32, device=like.device) * step
    return _arange(like.device if is_torch(like) else None, count, step)


@functools.lru_cache(maxsize=1024)
def _arange(device: Any, count: int, step: int) -> Array:
    if device is None:
        return np.arange(count, dtype=np.int32) * np.int32(step)
    torch = sys.modules["torch"]
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # It would lie in the graph's memory, and be kept here for calls outside of the graph.
        raise RuntimeError(
            "a CUDA graph is being captured: make the same call once before (warm up)"
        )
    return torch.arange(count, dtype=torch.int32, device=device) * step


def astype(array: Array, dtype: str) -> Array:
    """The array itself where it has that element type already."""
    if is_torch(array):
        return array.to(getattr(sys.modules["torch"], dtype))
    return array.astype(dtype, copy=False)


def full(like: Array, count: int, value: int) -> Array:
    """int32 [count], all `value`, where `like` is."""
    if is_torch(like):
        torch = sys.modules["torch"]
        return torch.full((count,), value, dtype=torch.int32, device=like.device)
    return np.full(count, value, dtype=np.int32)


def take_along_rows(table: Array, columns: Array) -> Array:
    """table[i, columns[i, j]], for int64 `columns`."""
    if is_torch(table):
        return table.gather(1, columns)
    return np.take_along_axis(table, columns, axis=1)


def where(condition: Array, value: Array, otherwise: int) -> Array:
    """Value, or a number where the condition does not hold."""
    if is_torch(condition):
        return value.masked_fill(~condition, otherwise)
    return np.where(condition, value, otherwise)


def float_array(values: Any, like: Array) -> Array:
    """float32 where `like` is: the same memory if it is that already, else a copy."""
    if is_torch(like):
        torch = sys.modules["torch"]
        return torch.as_tensor(values, dtype=torch.float32, device=like.device).detach()
    return np.asarray(values, np.float32)
