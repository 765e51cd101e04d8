"""Quire: paged attention for language-model serving, on CPUs and NVIDIA GPUs."""

from ._binding import version as _version
from .core import Mask, PagedKvCache, Plan, Score, attention, merge_states, write_kv_cache
from .flash import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from .unified import unified_attention

__version__ = str(_version())

__all__ = [
    "Mask",
    "PagedKvCache",
    "Plan",
    "Score",
    "attention",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "merge_states",
    "unified_attention",
    "write_kv_cache",
]
