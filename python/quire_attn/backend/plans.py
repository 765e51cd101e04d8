"""The plans of a builder: one for each kind of layer, updated by the first such layer of a step."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from ..arrays import Array, astype, dtype_name
from ..core import Mask, Plan


@dataclass(frozen=True, eq=False)
class LayerKind:
    """What layers must have in common to share a plan; all of it goes to Plan().

    Made by layer_kind(), the same object for the same arguments: comparing and hashing them costs
    more than the rest of a call.
    """

    num_heads: int
    num_kv_heads: int
    head_size: int
    head_size_v: int
    dtype: Any
    device: str
    type: str
    mask: Mask
    block_size: int
    kv_cache_dtype: str

    @property
    def has_quantised_query(self) -> bool:
        """Whether the query is fp8, and has a scale."""
        return dtype_name(self.dtype) == "float8_e4m3"

    @property
    def paged(self) -> bool:
        """Whether keys and values are read from the cache."""
        return self.type in ("decoder", "encoder_decoder")


@functools.lru_cache(maxsize=1024)
def layer_kind(**arguments: Any) -> LayerKind:
    """The LayerKind of these arguments."""
    return LayerKind(**arguments)


class _Planned:
    """A plan, whose metadata it was updated with, and which layers have used it since."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.metadata: Any = None
        self.layers: set[int] = set()


class StepPlans:
    """What `scheduler_metadata` is.

    Plans are updated by the first layer that needs them rather than by build(): a builder does not
    know its layers, and in a CUDA graph the update is captured with the calls, so that a replay
    plans what the tensors hold then.
    """

    def __init__(self, *, batch_invariant: bool = False) -> None:
        """`batch_invariant`: of every plan."""
        self.batch_invariant = batch_invariant
        self._planned: dict[LayerKind, _Planned] = {}

    def plan(self, kind: LayerKind, layer: int, metadata: Any) -> Plan:
        """The plan of `metadata`'s batch for layers of that kind. `layer`: a number of its own.

        A layer that comes a second time begins another pass, in which the tensors may hold other
        values: a warm-up and then a capture, or the next token of a draft model in one graph.
        """
        planned = self._planned.get(kind)
        if planned is None:
            planned = self._planned[kind] = _Planned(self._make(kind))
        if planned.metadata is not metadata or layer in planned.layers:
            planned.metadata = None
            planned.plan.update(**_batch(metadata, kind.paged))
            planned.metadata = metadata
            planned.layers.clear()
        planned.layers.add(layer)
        return planned.plan

    def forget(self) -> None:
        """The batch has changed in place: every plan is updated before it is used again."""
        for planned in self._planned.values():
            planned.metadata = None

    def _make(self, kind: LayerKind) -> Plan:
        return Plan(
            num_heads=kind.num_heads,
            num_kv_heads=kind.num_kv_heads,
            head_size=kind.head_size,
            head_size_v=kind.head_size_v,
            dtype=kind.dtype,
            device=kind.device,
            type=kind.type,
            mask=kind.mask,
            block_size=kind.block_size,
            kv_cache_dtype=kind.kv_cache_dtype,
            batch_invariant=self.batch_invariant,
        )

    def __str__(self) -> str:
        """How the batch is cut into work, for each kind of layer that has run."""
        return "\n".join(f"{kind}\n{planned.plan}" for kind, planned in self._planned.items())


def _flags(causal: bool | Array) -> Array | None:
    """One flag a sequence, as the library takes them; None where the layer's mask says it."""
    if isinstance(causal, bool):
        return None
    name = dtype_name(causal.dtype)
    return causal if name in ("bool", "uint8") else astype(causal != 0, "uint8")


def _batch(metadata: Any, paged: bool) -> dict[str, Any]:
    """The arguments of Plan.update()."""
    batch = {
        "query_start_loc": metadata.query_start_loc,
        "num_actual_tokens": metadata.num_actual_tokens,
        "max_query_len": metadata.max_query_len,
    }
    if not paged:
        return batch
    batch.update(
        seq_lens=metadata.seq_lens,
        block_table=metadata.block_table,
        max_seq_len=metadata.max_seq_len,
        causal=_flags(metadata.causal),
        mm_prefix_range=metadata.mm_prefix_range,
        visible_prefix_lens=metadata.rswa_prefix_lens,
        qq_bias=metadata.qq_bias,
        common_prefix_len=metadata.common_prefix_len if metadata.use_cascade else 0,
    )
    if metadata.context is not None:
        batch.update(metadata.context.positions(metadata))
    return batch
