"""ReselectKeys: decode steps attend to some of the cached visual tokens, from a layer on.

The attention of an earlier layer tells which. To the layers behind, the others look like padding: their masks are made
of the places of the keys, in which those that are not chosen have none. Caches hold all of them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx

from tvc.chunks import PAST_CHOSEN, PAST_POSITIONS, PAST_SEEN, PAST_VISUAL
from tvc.graphs import annotate, find_blocks, first_node, identifier, placeholders
from tvc.kernels.segments import mark
from tvc.passes.base import Pass
from tvc.passes.cuts import ChunkState
from tvc.passes.taps import last_rows
from tvc.program import Change, Component, Program

A, OP = torch.ops.aten, torch.ops.tvc
NOTE = "ReselectKeys"


def visual_keys(before: torch.Tensor, visual_index: torch.Tensor, query_positions: torch.Tensor) -> torch.Tensor:
    """[B, N] bool: the visual ones among cached keys, `before` [B, P] bool of them, and those of the chunk."""
    return torch.cat([before, mark(visual_index, query_positions.shape[1])], 1)


def is_step(query_positions: torch.Tensor, visual_index: torch.Tensor) -> torch.Tensor:
    """[B] bool: the samples whose chunk is one new token that is not visual."""
    return ((query_positions >= 0).sum(1) == 1) & ((visual_index >= 0).sum(1) == 0)


def paid(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor, scale: float, softcap: float
) -> torch.Tensor:
    """[B, N] float32: the attention that `rows` [B, 1] pay every key, mean over heads."""
    columns = torch.arange(key.shape[2], device=key.device).expand(key.shape[0], -1).unsqueeze(2)
    made: torch.Tensor = OP.attention_score(query, key, mask, rows, columns, scale, "mean", softcap)
    return made


def shown(key_positions: torch.Tensor, query_positions: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """[B, N] int64: the place of every key that is chosen, -1 for the others."""
    return torch.where(chosen, torch.cat([key_positions, query_positions], 1), -1)


def added_input(component: Component, name: str, behind: str, note: str) -> fx.Node:
    """A new input of the component's draft, behind the one of the name `behind`."""
    graph: fx.Graph = component.draft.graph  # type: ignore[union-attr]
    with graph.inserting_after(placeholders(graph)[identifier(behind)]):
        node = graph.placeholder(identifier(name))
    index = component.inputs.index(behind) + 1
    component.inputs = (*component.inputs[:index], name, *component.inputs[index:])
    annotate(node, note)
    return node


class ReselectKeys(Pass):
    """Gives the layers from a policy's `reselect` on masks of their own."""

    needs = frozenset({"cuts-rebound"})
    gives = frozenset({"keys-reselected"})

    def __init__(self, rule: Any):
        self.rule = rule

    def run(self, program: Program) -> list[Change]:
        self.component = program.components["decoder"]
        self.graph: fx.Graph = self.component.draft.graph  # type: ignore[union-attr]
        blocks = find_blocks(self.graph)
        stage, state = program.stages[-1].index, self.component.meta["stages"][-1]
        marks = {"visual": added_input(self.component, f"{PAST_VISUAL}{stage}", f"{PAST_POSITIONS}{stage}", NOTE)}
        marks["seen"] = added_input(self.component, f"{PAST_SEEN}{stage}", f"{PAST_VISUAL}{stage}", NOTE)
        if self.rule.alike and not self.rule.bug_compatible:
            marks["chosen"] = added_input(self.component, f"{PAST_CHOSEN}{stage}", f"{PAST_SEEN}{stage}", NOTE)
        with self.graph.inserting_before(first_node(self.graph, blocks[self.rule.first])):
            results, places = self._choice(blocks[self.rule.observed].attention, state, marks)
            changes = self._masks([block.attention for block in blocks[self.rule.first :]], places)
        output = next(node for node in self.graph.nodes if node.op == "output")
        output.args = ((*output.args[0], *results.values()),)  # type: ignore[misc]
        self.component.outputs = (*self.component.outputs, *(f"{name}.{stage}" for name in results))
        return changes

    def _choice(
        self, attention: Any, state: ChunkState, marks: dict[str, fx.Node]
    ) -> tuple[dict[str, fx.Node], fx.Node]:
        """What the stage hands on of its keys, by kind, and the places [B, N] of those that are attended to."""
        query, key, _, mask, scale, softcap = attention.args
        inputs = placeholders(self.graph)
        visual = self._call(visual_keys, marks["visual"], state.visual_index, state.query_positions)
        single = self._call(is_step, inputs["query_positions"], inputs["visual_index"])
        attended = self._call(paid, query, key, mask, self._call(last_rows, query), scale, softcap)
        given = (attended, marks["seen"], marks.get("chosen"), visual, single, *self.rule.keep.numbers, self.rule.alike)
        pair = self._call(OP.reselect.default, *given)
        chosen, seen = (self._call(part, pair) for part in (_first, _second))
        places = self._call(shown, state.key_positions, state.query_positions, chosen)
        return {"visual": visual, "seen": seen, "chosen": chosen}, places

    def _masks(self, attentions: list[Any], places: fx.Node) -> list[Change]:
        """Masks over `places` for each of `attentions`; those of one kind share theirs."""
        made: dict[fx.Node, fx.Node] = {}
        for node in (node for node in attentions if node is not None):
            mask = node.args[3]
            if mask not in made:
                made[mask] = self._call(mask.target, mask.args[0], places, *mask.args[2:])
                made[mask].meta["val"] = mask.meta["val"]
            node.update_arg(3, made[mask])
        return [
            Change("decoder", mask.name, f"made of chosen keys from {self.rule.at} on in decode steps", "reselect")
            for mask in made
        ]

    def _call(self, function: Any, *arguments: Any) -> fx.Node:
        node = self.graph.call_function(function, arguments)
        annotate(node, NOTE)
        return node


def _first(pair: tuple[Any, Any]) -> Any:
    return pair[0]


def _second(pair: tuple[Any, Any]) -> Any:
    return pair[1]
