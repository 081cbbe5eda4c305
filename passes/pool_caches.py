"""PoolCaches: once a prompt has been read, one entry of each cache stands for several neighbours in a frame.

The prompt itself is read with everything there. Only what layers hand on is shorter: keys and values, as positions have
turned them, are means, and the place of an entry is that of its first token.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx as fx

from tvc.chunks import ENTERED
from tvc.graphs import annotate
from tvc.kernels.score_cosine import cosine_score
from tvc.kernels.segments import follow
from tvc.passes.base import Pass
from tvc.passes.cuts import ChunkState
from tvc.passes.taps import text_behind, visual_rows
from tvc.policy.options import Pool
from tvc.program import Change, Program

OP = torch.ops.tvc


class PoolCaches(Pass):
    """Rewrites what the decoder hands on of its caches."""

    needs = frozenset({"cuts-rebound"})
    gives = frozenset({"caches-pooled"})

    def __init__(self, rule: Pool):
        self.rule = rule

    def run(self, program: Program) -> list[Change]:
        decoder = program.components["decoder"]
        graph: fx.Graph = decoder.draft.graph  # type: ignore[union-attr]
        output = next(node for node in graph.nodes if node.op == "output")
        values: dict[str, fx.Node] = dict(zip(decoder.outputs, output.args[0], strict=True))  # type: ignore[arg-type]
        frames, whole = decoder.meta["frames"]
        changes: list[Change] = []

        def call(function: Any, *arguments: Any) -> fx.Node:
            node = graph.call_function(function, arguments)
            annotate(node, "PoolCaches")
            return node

        with graph.inserting_before(output):
            for stage, state, left in zip(program.stages, decoder.meta["stages"], decoder.meta["left"], strict=True):
                pair = call(entries, frames, whole, *_of(left), self.rule.tokens)
                entry, kept = (call(operator.getitem, pair, number) for number in range(2))
                places = f"key_positions.{stage.index}"
                values[places] = call(OP.evict.default, values[places], kept, left.query_positions)
                if stage.site is not None:
                    values[f"{ENTERED}{stage.index}"] = state.query_positions
                for layer in stage.layers:
                    for name in (f"key.{layer}", f"value.{layer}"):
                        if name in values:  # a layer may hold a state, or read another's cache
                            values[name] = call(OP.pool_cache.default, values[name], entry, kept)
                            what = f"means of {self.rule.tokens} neighbours in a frame"
                            changes.append(Change("decoder", values[name].name, what, "cache"))
        output.args = (tuple(values.values()),)
        decoder.outputs = tuple(values)
        return changes


def _of(state: ChunkState) -> tuple[fx.Node, ...]:
    return state.query_positions, state.visual_index, state.segment, state.origin


def relevance(residual: torch.Tensor, visual_index: torch.Tensor, text_index: torch.Tensor) -> torch.Tensor:
    """[B, V] float32: the cosine of each visual token with the mean of the text behind all of them."""
    text, asked = text_behind(residual, text_index, visual_index)
    made: torch.Tensor = cosine_score.overload(visual_rows(residual, visual_index), text, asked)
    return made


def entries(
    frames: tuple[torch.Tensor, torch.Tensor],
    whole: torch.Tensor,
    query_positions: torch.Tensor,
    visual_index: torch.Tensor,
    segment: torch.Tensor,
    origin: torch.Tensor,
    tokens: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `pool_entries` makes of the chunk as it is in a stage.

    Args:
        frames: frame and place of every visual token that entered the decoder.
        whole: [B, V] bool which of these stay as they are.
        origin: [B, V'] int64 which of them the stage's visual tokens are.
    """
    number = torch.where(segment < 0, -1, origin)
    stays = follow(whole.long(), number) > 0
    pair: tuple[torch.Tensor, torch.Tensor] = OP.pool_entries(
        query_positions, visual_index, follow(frames[0], number), stays, tokens
    )
    return pair
