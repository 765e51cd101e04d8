"""Quire as the attention of Hugging Face transformers, under the name "flash_quire_3".

    quire_attn.transformers.register()
    AutoModelForCausalLM.from_pretrained(..., attn_implementation="flash_quire_3")

generate() and generate_batch() both take it. Importing this module registers nothing.

transformers knows what an implementation can do by its name: "flash" for continuous batching, and a
2 or 3 behind it for block tables. But it takes every such name for a package or a kernel of the
hub's. So what loads these is told of our name, and gets FlashAttention's functions of this package;
transformers' own code around them (masks, padding, paged caches) is used as it is. What differs
between versions of transformers is looked for, not told from the version.
"""

from __future__ import annotations

import functools
import inspect
import re
import warnings
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import AttentionInterface, PreTrainedModel
from transformers import modeling_flash_attention_utils as flash_utils
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from .flash import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

NAME = "flash_quire_3"
TESTED = ("5.18", "5.23", "5.24")


def register() -> None:
    """Makes NAME an attention implementation of transformers; again, nothing.

    Warns where transformers is older or newer than what this was tested with.
    """
    if NAME in AttentionInterface._global_mapping:
        return
    _warn_if_untested(transformers.__version__)
    flash_utils._lazy_imports = _load_ours(flash_utils._lazy_imports)
    PreTrainedModel._check_and_adjust_attn_implementation = _check_model(
        PreTrainedModel._check_and_adjust_attn_implementation
    )
    AttentionInterface.register(NAME, flash_attention_forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"])
    if _functions_write_the_cache():
        AttentionInterface.register(f"paged|{NAME}", _paged_attention_forward)


def _warn_if_untested(version: str) -> None:
    minor = tuple(int(x) for x in re.findall(r"\d+", version)[:2])
    oldest, newest = (tuple(int(x) for x in TESTED[i].split(".")) for i in (0, -1))
    if not oldest <= minor <= newest:
        warnings.warn(
            f"quire_attn was tested with transformers {', '.join(TESTED)}; this is {version}",
            stacklevel=3,
        )


def _is_ours(implementation: str | None) -> bool:
    return implementation is not None and implementation.split("|")[-1] == NAME


def _load_ours(load: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load)
    def wrapped(implementation: str | None, *args: Any, **kwargs: Any) -> Any:
        if not _is_ours(implementation):
            return load(implementation, *args, **kwargs)
        return (
            flash_attn_func,
            flash_attn_varlen_func,
            flash_attn_with_kvcache,
            flash_utils._pad_input,
            flash_utils._unpad_input,
        )

    return wrapped


def _check_model(check: Callable[..., Any]) -> Callable[..., Any]:
    """What transformers checks of a model: it would replace a kernel that it does not know."""

    @functools.wraps(check)
    def wrapped(model: Any, implementation: str | None, *args: Any, **kwargs: Any) -> Any:
        if _is_ours(implementation):
            name = type(model).__name__
            if not model._supports_flash_attn:
                raise ValueError(
                    f"{NAME}: {name} does not support FlashAttention's functions, on which it runs"
                )
            compatible = getattr(model, "_compatible_flash_implementations", None)
            if compatible is not None and NAME not in compatible:
                # Models with sinks name the FlashAttentions that have them. Other kernels do
                # something else (sparse attention).
                if not any(re.search(r"flash.att(entio)?n.?\d", other) for other in compatible):
                    raise ValueError(f"{NAME}: {name} runs on its own kernels only, {compatible}")
                model._compatible_flash_implementations = [*compatible, NAME]
        return check(model, implementation, *args, **kwargs)

    return wrapped


def _functions_write_the_cache() -> bool:
    """Up to 5.18 "paged|NAME" is another function, which updates the cache itself."""
    return "read_index" in inspect.signature(PagedAttentionCache.update).parameters


def _paged_attention_forward(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    *,
    cache: PagedAttentionCache,
    cu_seq_lens_q: Any,
    cu_seq_lens_k: Any,
    max_seqlen_q: int,
    max_seqlen_k: Any,
    block_table: Any = None,
    read_index: Any = None,
    write_index: Any = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Any = None,
    **_: Any,
) -> tuple[Any, None]:
    """Of one batch of generate_batch(); query, key, value: [1, heads, tokens, head size].

    transformers' own function of this kind leaves softcap out, and Mistral's window.
    """
    if isinstance(cu_seq_lens_k, dict):
        layer_type = "sliding_attention" if sliding_window else "full_attention"
        cu_seq_lens_k, max_seqlen_k = cu_seq_lens_k[layer_type], max_seqlen_k[layer_type]
    score = {
        "softmax_scale": module.scaling if scaling is None else scaling,
        "causal": True,
        "window_size": (sliding_window - 1, 0) if sliding_window else (-1, -1),
        "softcap": softcap or 0.0,
        "s_aux": s_aux,
    }
    head_size, head_size_v = key.shape[-1], value.shape[-1]
    if head_size_v < head_size:  # the cache has rows of one size
        value = torch.nn.functional.pad(value, (0, head_size - head_size_v))
    query = query[0].transpose(0, 1)
    if block_table is None:
        key, value = cache.update(
            key_states=key, value_states=value, layer_idx=module.layer_idx,
            read_index=read_index, write_index=write_index,
        )  # fmt: skip
        out = flash_attn_varlen_func(
            query, key, value, cu_seq_lens_q, cu_seq_lens_k, max_seqlen_q, max_seqlen_k, **score
        )
        return out[..., :head_size_v], None
    index, key_cache, value_cache = cache.get_cache_for_block_table(module.layer_idx)
    # One new token a sequence.
    key, value = (x[0].transpose(0, 1)[:, None] for x in (key, value))
    count = key.shape[0]
    out = flash_attn_with_kvcache(
        query[:, None], key_cache, value_cache, key, value,
        cache_seqlens=cu_seq_lens_k[1 : count + 1] - cu_seq_lens_k[:count] - 1,
        block_table=block_table[index], **score,
    )  # fmt: skip
    return out[:, 0, :, :head_size_v], None
