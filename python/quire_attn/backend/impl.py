"""One attention layer, in the words of vLLM's v1 backends."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

from ..arrays import Array, device_name, empty_like, float_array, is_torch
from ..core import Mask, PagedKvCache, Score, attention, cache_dtype_number, write_kv_cache
from .cache import layer_cache, scale_of
from .context_parallel import attend_shard
from .plans import LayerKind, StepPlans, layer_kind

ATTN_TYPES = ("decoder", "encoder", "encoder_only", "encoder_decoder")

_numbers = itertools.count()


class QuireAttentionImpl:
    """A layer (TritonAttentionImpl). Keeps nothing of a step but views of its cache."""

    forward_includes_kv_cache_update = True
    """Whether forward() writes key and value; vLLM since 0.20 calls do_kv_cache_update() before."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | Array | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        sinks: Array | None = None,
        *,
        use_alibi_sqrt: bool = False,
        chunk_lookback: int = -1,
    ) -> None:
        """All arguments are vLLM's.

        sliding_window: keys that a row sees, itself included; on both sides in encoders.
        kv_sharing_target_layer_name: the layer whose cache this one reads and never writes.
        sinks: [num_heads], which may be filled later: see process_weights_after_loading().
        chunk_lookback: at least 0, chunks of sliding_window // (chunk_lookback + 1) tokens.
        """
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.alibi_slopes = alibi_slopes
        self.sliding_window = sliding_window
        self.kv_cache_dtype = kv_cache_dtype
        self.logits_soft_cap = float(logits_soft_cap or 0.0)
        self.attn_type = str(getattr(attn_type, "value", attn_type))  # vLLM's is an enumeration
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.sinks = sinks
        self.use_alibi_sqrt = bool(use_alibi_sqrt)
        self.chunk_lookback = chunk_lookback
        self._check()
        self.number = next(_numbers)  # by which plans know the layer
        self.paged = self.attn_type in ("decoder", "encoder_decoder")
        self._score: Score | None = None
        self._kinds: dict[tuple[Any, ...], LayerKind] = {}
        self._own_plans = StepPlans()  # for metadata that no builder made
        self._known: Any = None  # a weak reference to the cache that _views are of
        self._views: Any = None

    def _check(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads: expected a divisor of num_heads {self.num_heads}, "
                f"got {self.num_kv_heads}"
            )
        if self.attn_type not in ATTN_TYPES:
            raise ValueError(
                f"attn_type: expected one of {', '.join(ATTN_TYPES)}, got '{self.attn_type}'"
            )
        for name in ("alibi_slopes", "sinks"):
            values = getattr(self, name)
            if values is not None and len(values) != self.num_heads:
                raise ValueError(f"{name}: expected {self.num_heads}, got {len(values)}")
        if self.use_alibi_sqrt and self.alibi_slopes is None:
            raise ValueError("use_alibi_sqrt: expected alibi_slopes to go with it, got none")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window: expected at least 1, got {self.sliding_window}")
        if self.chunk_lookback >= 0 and self.sliding_window is None:
            raise ValueError("chunk_lookback: expected a sliding_window to go with it, got none")
        cache_dtype_number(self.kv_cache_dtype)  # ValueError naming those that are known

    def process_weights_after_loading(self, act_dtype: Any = None) -> None:
        """To be called when the sinks have been filled, or filled anew.

        Sinks in float32 are read where they are; of others a copy is made here.
        """
        self._score = None

    def forward(
        self,
        layer: Any,
        query: Array,
        key: Array | None,
        value: Array | None,
        kv_cache: Array | None,
        attn_metadata: Any,
        output: Array | None = None,
        output_scale: float | Array | None = None,
        output_block_scale: Array | None = None,
    ) -> Array:
        """Attention of this step's tokens; writes their key and value first (see the class).

        query: [num_tokens, num_heads, head_size]; key, value: [num_tokens, num_kv_heads,
        head_size], or None where they are in the cache already. `layer` has the scales _q_scale,
        _k_scale and _v_scale, or is None. Returns `output`, [num_tokens, num_heads * head_size] or
        3-D, made where it is not given. output_scale: of an fp8 output. output_block_scale:
        receives such scales, float32 [num_tokens, num_heads * head_size / 128]. Without metadata
        (a profiling run) the output is filled with 0.
        """
        if output is None:
            width = self.head_size if value is None else value.shape[-1]
            output = empty_like(query, (query.shape[0], self.num_heads * width))
        if attn_metadata is None:
            output.fill_(0) if is_torch(output) else output.fill(0)
            return output
        if self.paged:
            write = (key, value) if self.forward_includes_kv_cache_update else (None, None)
            if attn_metadata.context is not None and self.attn_type == "decoder":
                _refuse_scales(output_scale, output_block_scale)
                self.do_kv_cache_update(layer, *write, kv_cache, attn_metadata.slot_mapping)
                attend_shard(self, layer, query, kv_cache, attn_metadata, output)
            else:
                self.attend_rows(
                    layer, query, kv_cache, attn_metadata, output, output_scale,
                    output_block_scale, write=write,
                )  # fmt: skip
            return output
        kind = self.kind(layer, query, attn_metadata, value.shape[-1], 16)
        attention(
            self._plan(kind, attn_metadata),
            query,
            key=key,
            value=value,
            output=output,
            score=self.score(query),
            output_scale=output_scale,
            output_block_scale=output_block_scale,
        )
        return output

    def attend_rows(
        self,
        layer: Any,
        query: Array,
        kv_cache: Array,
        attn_metadata: Any,
        output: Array,
        output_scale: float | Array | None = None,
        output_block_scale: Array | None = None,
        lse: Array | None = None,
        write: tuple[Array | None, Array | None] = (None, None),
    ) -> None:
        """Attention over the cache, of all heads that `query` has.

        With `lse`, float32 [num_heads, num_tokens], sinks and slopes stay out of it. `write`: key
        and value to store first, once the batch has been accepted.
        """
        cache = self.cache(layer, kv_cache)
        _, block_size, _, head_size_v = cache.value.shape
        if self.kv_cache_dtype == "int4_per_token_head":
            head_size_v *= 2
        kind = self.kind(layer, query, attn_metadata, head_size_v, block_size)
        plan = self._plan(kind, attn_metadata)
        self.do_kv_cache_update(layer, *write, kv_cache, attn_metadata.slot_mapping)
        score = self.score(query)
        attention(
            plan,
            query,
            cache,
            output=output,
            lse=lse,
            score=score if lse is None else Score(score.softmax_scale, score.soft_cap),
            q_scale=scale_of(layer, "_q_scale") if kind.has_quantised_query else 1.0,
            output_scale=output_scale,
            output_block_scale=output_block_scale,
        )

    def do_kv_cache_update(
        self,
        layer: Any,
        key: Array | None,
        value: Array | None,
        kv_cache: Array,
        slot_mapping: Array,
    ) -> None:
        """Writes key and value at `slot_mapping`, nothing where the layer has no cache to write."""
        if not self.paged or self.kv_sharing_target_layer_name is not None:
            return
        if key is None or value is None or 0 in kv_cache.shape:
            return
        write_kv_cache(key, value, self.cache(layer, kv_cache), slot_mapping)

    def _plan(self, kind: LayerKind, metadata: Any) -> Any:
        plans = metadata.scheduler_metadata or self._own_plans
        return plans.plan(kind, self.number, metadata)

    def cache(self, layer: Any, kv_cache: Array) -> PagedKvCache:
        """K and V in `kv_cache`: made once for a tensor, and forgotten with it."""
        k_scale = v_scale = 1.0
        if self.kv_cache_dtype in ("fp8", "fp8_e4m3", "fp8_e5m2"):
            k_scale, v_scale = scale_of(layer, "_k_scale"), scale_of(layer, "_v_scale")
        if not is_torch(kv_cache):  # NumPy's views are cheap, and would keep the array alive
            return layer_cache(kv_cache, self.head_size, self.kv_cache_dtype, k_scale, v_scale)
        views = self._views if self._known is not None and self._known() is kv_cache else None
        if views is None or views.k_scale is not k_scale or views.v_scale is not v_scale:
            views = layer_cache(
                kv_cache.detach(), self.head_size, self.kv_cache_dtype, k_scale, v_scale
            )
            # The views are of a detached alias: so the tensor itself can go, and they go with it.
            self._known = weakref.ref(kv_cache, self._forget_cache)
            self._views = views
        return views

    def _forget_cache(self, dropped: Any) -> None:
        if self._known is dropped:
            self._known = self._views = None

    def score(self, query: Array) -> Score:
        """Scale, cap, slopes and sinks, on the query's device."""
        if self._score is None:
            slopes, sinks = (
                None if values is None else float_array(values, query)
                for values in (self.alibi_slopes, self.sinks)
            )
            self._score = Score(
                self.scale, self.logits_soft_cap, slopes, self.use_alibi_sqrt, sinks
            )
        return self._score

    def kind(
        self, layer: Any, query: Array, metadata: Any, head_size_v: int, block_size: int
    ) -> LayerKind:
        """What a plan for this layer must be made for."""
        causal = metadata.causal is not False
        clamp = bool(getattr(layer, "mm_prefix_clamp_sliding_window", False))
        heads = query.shape[1]
        key = (query.dtype, heads, causal, clamp, metadata.rswa_window, head_size_v, block_size)
        kind = self._kinds.get(key)
        if kind is None:
            kind = self._kinds[key] = layer_kind(
                num_heads=heads,
                num_kv_heads=self.num_kv_heads,
                head_size=self.head_size,
                head_size_v=head_size_v,
                dtype=query.dtype,
                device=device_name(query),
                type=self.attn_type,
                mask=self.mask(causal, metadata.rswa_window, clamp),
                block_size=block_size,
                kv_cache_dtype=self.kv_cache_dtype if self.paged else "auto",
            )
        return kind

    def mask(self, causal: bool, rswa_window: int | None, clamp_ranges: bool) -> Mask:
        """Which keys a row of this layer sees."""
        window = self.sliding_window
        if not self.paged:
            return Mask.full() if window is None else Mask.sliding_window_both(window)
        causal = causal and self.attn_type == "decoder"
        if rswa_window:
            if window is not None:
                raise NotImplementedError(
                    f"rswa_window: expected none in a layer with a sliding_window of {window}, "
                    f"got {rswa_window}"
                )
            window = rswa_window
        if window is None:
            return Mask(causal=causal)
        if self.chunk_lookback >= 0:
            size = window // (self.chunk_lookback + 1)
            return Mask(causal, "chunked", size, self.chunk_lookback)
        return Mask(causal, "left", window, clamp_ranges=clamp_ranges)


def _refuse_scales(output_scale: Any, output_block_scale: Any) -> None:
    for name, value in (("output_scale", output_scale), ("output_block_scale", output_block_scale)):
        if value is not None:
            raise NotImplementedError(f"{name}: expected none with context parallelism")
