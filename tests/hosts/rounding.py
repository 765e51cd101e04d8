"""A quantised cache without one: the host's own backend over rounded keys and values."""

import torch

FP8_MAX = 448.0


def _by_token(x, largest, to_stored):
    """Per token and head: scale = largest magnitude / `largest`, in fp32."""
    scale = (x.float().abs().amax(-1, keepdim=True) / largest).clamp(min=1e-6)
    return (to_stored(x.float() / scale) * scale).to(x.dtype)


def _half_away(x):
    return torch.sign(x) * torch.floor(x.abs() + 0.5)


def _int8(x):
    return _half_away(x).clamp(-128, 127)


def _through(dtype, limit=None):
    def rounded(x):
        clamped = x if limit is None else x.clamp(-limit, limit)
        return clamped.to(dtype).to(x.dtype)

    return rounded


def _blocks(x):
    """X in blocks of a power of two, and what rotates each: (x * signs) @ hadamard."""
    size = x.shape[-1]
    block = size & -size
    x = x.float().reshape(*x.shape[:-1], size // block, block)
    hadamard = torch.ones(1, 1)
    while len(hadamard) < block:
        top, bottom = torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)
        hadamard = torch.cat([top, bottom])
    generator = torch.Generator().manual_seed(0x9E3779B9)
    signs = 2.0 * torch.bernoulli(torch.full((block,), 0.5), generator=generator) - 1.0
    return x, hadamard, signs


def _int4(x):
    """Rotated, in 16 steps from the smallest element to the largest, rotated back.

    As vLLM does it on a GPU: in bf16 before and after the rotation.
    """
    parts, hadamard, signs = _blocks(x.bfloat16())
    rotated = ((parts * signs) @ hadamard).bfloat16().float().reshape(x.shape)
    low = rotated.amin(-1, keepdim=True).clamp(max=0)
    high = rotated.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 15).clamp(min=1e-6)
    zero = _half_away(-low / scale).clamp(0, 15)
    steps = _half_away(rotated * (1 / scale) + zero).clamp(0, 15)
    # The zero point is kept in the scale's last four bits.
    stored = (scale.view(torch.int32) & -16 | zero.int()).view(torch.float32)
    back = ((steps - zero) * stored).reshape(parts.shape) @ hadamard * signs / len(signs)
    return back.reshape(x.shape).to(x.dtype)


_E4M3 = _through(torch.float8_e4m3fn, FP8_MAX)
ROUND = {
    "bfloat16": _through(torch.bfloat16),
    "fp8_e4m3": _E4M3,
    "fp8_e5m2": _through(torch.float8_e5m2, 57344.0),
    "fp8_per_token_head": lambda x: _by_token(x, FP8_MAX, _E4M3),
    "int4_per_token_head": _int4,
    "int8_per_token_head": lambda x: _by_token(x, 127.0, _int8),
}


def round_keys_and_values(impls, dtype):
    """From now on these classes see keys and values as a cache of `dtype` would hold them."""
    for impl in impls:
        for name in ("forward", "do_kv_cache_update"):
            original = getattr(impl, name, None)
            if original is not None:
                setattr(impl, f"exact_{name}", original)
                setattr(impl, name, _rounding(original, ROUND[dtype], name == "forward"))


def undo(impls):
    """As before."""
    for impl in impls:
        for name in ("forward", "do_kv_cache_update"):
            if hasattr(impl, f"exact_{name}"):
                setattr(impl, name, getattr(impl, f"exact_{name}"))
                delattr(impl, f"exact_{name}")


def _rounding(method, to_stored, with_query):
    def rounded(impl, layer, *tensors, **kwargs):
        before = tensors[:1] if with_query else ()
        key, value, *rest = tensors[len(before) :]
        if key is not None:
            key, value = to_stored(key), to_stored(value)
        return method(impl, layer, *before, key, value, *rest, **kwargs)

    return rounded
