"""A cut in a graph: what the chunk looks like before and after it, as nodes; and the function that a cut computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx

from tvc.graphs import annotate
from tvc.kernels.segments import take_rows
from tvc.passes.reduction import decide


@dataclasses.dataclass
class ChunkState:
    """The nodes that describe the chunk within one stage."""

    residual: fx.Node | None
    position_ids: fx.Node
    query_positions: fx.Node
    text_index: fx.Node
    visual_index: fx.Node
    segment: fx.Node
    counts: fx.Node
    size: fx.Node
    origin: fx.Node  # [B, V] where each visual token stood among those that entered the decoder
    key_positions: fx.Node  # the placeholder of this stage's cached positions
    spans: fx.Node | None = None  # [B, S, 2] of each slot, where the model has spans
    chunks: fx.Node | None = None  # [B, S] of each slot, where tokens see those of some chunks alone
    kept: fx.Node | None = None  # [B, S'] slots of the stage before that make this one
    chosen: fx.Node | None = None  # [B, V'] visual tokens of the stage before that make this one's


@dataclasses.dataclass
class Cut:
    """One cut of the decoder: in front of `first` the chunk is as `before` says, behind it as `after` says.

    Where `restored` is given, the hidden states with the dropped tokens among them again, it is as `before` says from
    there on.
    """

    site: str
    where: str
    layer: int
    first: fx.Node
    before: ChunkState
    after: ChunkState
    evicts: int | None = None  # the first layer whose cache loses what is dropped here; None: no earlier one does
    restored: fx.Node | None = None


@dataclasses.dataclass
class Parting:
    """From `layer`, whose first node is `first`, on caches are of another length, though the chunk stays as it is."""

    where: str
    layer: int
    first: fx.Node
    state: ChunkState


SHORTENED = (
    "residual",
    "position_ids",
    "query_positions",
    "text_index",
    "visual_index",
    "segment",
    "counts",
    "origin",
)  # what `shorten` gives, in its order
RESULTS = (*SHORTENED, "size", "kept", "chosen")


def start_sizes(visual_index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Every visual token stands for itself, at its own place."""
    place = torch.arange(visual_index.shape[1], device=visual_index.device).expand(visual_index.shape[0], -1)
    return torch.ones_like(visual_index, dtype=torch.float32), place.clone()


def cut_function(step: Any, renumber: bool, name: str) -> Callable[..., tuple[torch.Tensor, ...]]:
    """The function that shortens a chunk as `step` says; its results are named in `RESULTS`."""

    def cut(
        residual: torch.Tensor,
        position_ids: torch.Tensor,
        query_positions: torch.Tensor,
        text_index: torch.Tensor,
        visual_index: torch.Tensor,
        segment: torch.Tensor,
        counts: torch.Tensor,
        size: torch.Tensor,
        origin: torch.Tensor,
        key_positions: torch.Tensor,
        scores: list[Any],
        taps: dict[str, Any],
    ) -> tuple[torch.Tensor, ...]:
        feature = take_rows(residual, visual_index)
        decision = decide(step, feature, size, segment, counts, scores, taps)
        places = (position_ids, query_positions, text_index, visual_index, segment, counts, origin)
        *parts, kept = torch.ops.tvc.shorten(decision.chosen, residual, decision.feature, *places)
        after = dict(zip(SHORTENED, parts, strict=True))
        if renumber:
            numbers = _renumbered(key_positions, after["query_positions"])
            after["position_ids"] = numbers.to(after["position_ids"].dtype)
        after |= {"size": decision.size, "kept": kept, "chosen": decision.chosen}
        return tuple(after[name] for name in RESULTS)

    cut.__name__ = cut.__qualname__ = name
    return cut


def mask_of(mask: fx.Node, state: ChunkState, note: str) -> fx.Node:
    """The mask `mask` for the chunk and the cache as `state` says they are; at the graph's insertion point."""
    graph, queries = mask.graph, state.query_positions
    keys = graph.call_function(torch.ops.aten.cat.default, ([state.key_positions, queries], 1))
    chunks = () if state.chunks is None else (state.chunks, mask.args[5])
    arguments = (queries, keys, mask.args[2], state.spans, *chunks)
    made = graph.call_function(torch.ops.tvc.attention_mask.default, arguments)
    made.meta["val"] = mask.meta["val"]
    for node in (keys, made):
        annotate(node, note)
    return made


def gather_tokens(values: torch.Tensor, kept: torch.Tensor, axes: tuple[int, ...]) -> torch.Tensor:
    """`values` with batch axis 0 gathered along each of `axes` by `kept` [B, S']."""
    for axis in axes:
        shape = [1] * values.dim()
        shape[0], shape[axis] = kept.shape
        index = kept.clamp(min=0).reshape(shape)
        sizes = [kept.shape[1] if d == axis else size for d, size in enumerate(values.shape)]
        values = values.gather(axis, index.expand(sizes))
    return values


def _renumbered(key_positions: torch.Tensor, query_positions: torch.Tensor) -> torch.Tensor:
    """[B, S'] running number of each slot among the tokens that the stage holds, its cache counted in."""
    held = torch.cat([key_positions, query_positions], 1) >= 0
    return (held.long().cumsum(1) - 1)[:, key_positions.shape[1] :].clamp(min=0)
