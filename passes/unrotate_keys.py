"""UnrotateKeys: text reads visual keys as if it stood where they stand, without the turn that their places give.

Query and key before they are turned are those of a token at position 0: what a layer makes of positions is made once
more for zeros. Caches hold the keys of visual tokens raw, as every later token reads them; while a chunk is read, its
own visual tokens read each other turned. So that the two kinds can be told in a cache, each stage hands on which of its
tokens are visual.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.fx as fx

from tvc.chunks import PAST_POSITIONS, PAST_VISUAL
from tvc.errors import TraceError
from tvc.graphs import Block, annotate, backward_closure, clone, find_blocks, first_node
from tvc.kernels.segments import mark
from tvc.passes.base import Pass
from tvc.passes.cuts import ChunkState
from tvc.passes.reselect_keys import added_input, visual_keys
from tvc.program import Change, Program, Stage

A, OP = torch.ops.aten, torch.ops.tvc
NOTE = "UnrotateKeys"


def raw_pairs(visual: torch.Tensor, visual_index: torch.Tensor, query_positions: torch.Tensor) -> torch.Tensor:
    """[B, 1, S, N] bool: the keys that each slot reads unrotated: visual ones, by text; those in the cache by all.

    Args:
        visual: [B, N] bool which keys are visual, those of the chunk behind the cached ones.
    """
    slots = query_positions.shape[1]
    text = ~mark(visual_index, slots)[:, None, :, None]
    cached = torch.arange(visual.shape[1], device=visual.device) < visual.shape[1] - slots
    return visual[:, None, None, :] & (text | cached)


class UnrotateKeys(Pass):
    """Rewrites the attention of every decoder layer whose queries and keys are turned, and what it caches of keys."""

    needs = frozenset({"cuts-rebound"})
    gives = frozenset({"keys-unrotated"})

    def run(self, program: Program) -> list[Change]:
        self.component = program.components["decoder"]
        self.graph: fx.Graph = self.component.draft.graph  # type: ignore[union-attr]
        blocks = find_blocks(self.graph)
        output = next(node for node in self.graph.nodes if node.op == "output")
        values = dict(zip(self.component.outputs, output.args[0], strict=True))  # type: ignore[arg-type]
        changes: list[Change] = []
        for stage, state in zip(program.stages, self.component.meta["stages"], strict=True):
            known, pairs, visual = self._opened(stage, state, blocks)
            tables = _of_positions(state.position_ids)
            values[f"visual.{stage.index}"] = visual
            for layer in stage.layers:
                node = blocks[layer].attention
                if node is None:
                    continue
                made = self._rewritten(blocks[layer], node, tables, known, (state.visual_index, pairs))
                if made is not None:
                    values[f"key.{layer}"] = made
                    changes.append(Change("decoder", node.name, "text reads visual keys unrotated", "attention"))
        output.args = (tuple(values.values()),)
        self.component.outputs = tuple(values)
        return changes

    def _opened(
        self, stage: Stage, state: ChunkState, blocks: list[Block]
    ) -> tuple[dict[fx.Node, fx.Node], fx.Node, fx.Node]:
        """Where a stage begins: what stands for its positions, the pairs that are unrotated, which keys are visual."""
        past = added_input(self.component, f"{PAST_VISUAL}{stage.index}", f"{PAST_POSITIONS}{stage.index}", NOTE)
        with self.graph.inserting_before(first_node(self.graph, blocks[stage.layers.start])):
            visual = self._call(visual_keys, past, state.visual_index, state.query_positions)
            pairs = self._call(raw_pairs, visual, state.visual_index, state.query_positions)
            known = {state.position_ids: self._call(torch.zeros_like, state.position_ids)}
        return known, pairs, visual

    def _rewritten(
        self,
        block: Block,
        node: fx.Node,
        tables: set[fx.Node],
        known: dict[fx.Node, fx.Node],
        told: tuple[fx.Node, fx.Node],
    ) -> fx.Node | None:
        """The layer's keys [B, G, N, d] as they are cached; None where its queries and keys are not turned.

        Args:
            tables: what is made of positions alone.
            known: what stands for them at position 0, which layers may share; it gets what is new.
            told: the slots of visual tokens, and the pairs that are unrotated.
        """
        visual_index, pairs = told
        query, key, value, mask, scale, softcap = cast("tuple[Any, ...]", node.args)
        past, own = _joined(key, block)
        turned = _turned([query, own], tables, block)
        if query not in turned and own not in turned:
            return None
        with self.graph.inserting_before(node):
            copies = clone(turned, known, NOTE)
            known |= copies
            keys = self._call(OP.unrotated_keys.default, own, copies.get(own, own), visual_index)
            cached = self._call(A.cat.default, [past, keys], *key.args[1:])
            raw_query = copies.get(query, query)
            given = (query, key, value, mask, raw_query, cached, pairs, scale, softcap)
            made = self._call(OP.unrotated_attention.default, *given)
        node.replace_all_uses_with(made)
        self.graph.erase_node(node)
        return cached

    def _call(self, function: Any, *arguments: Any) -> fx.Node:
        node = self.graph.call_function(function, arguments)
        annotate(node, NOTE)
        return node


def _joined(key: Any, block: Block) -> tuple[fx.Node, fx.Node]:
    """The cached keys and the chunk's own, of which `key` is made.

    Raises:
        TraceError: the layer makes its keys in another way.
    """
    parts: Any = key.args[0] if key.target is A.cat.default else ()
    if len(parts) == 2 and parts[0].op == "placeholder":
        return parts[0], parts[1]
    raise TraceError(
        "a layer's keys are not those of its cache and of the chunk",
        where=f'decoder, layer {block.index}, node "{key.name}"',
        got=str(key.target),
        want="cached keys, and new ones behind them",
        fix="leave attention: {unrotated: visual} out",
        slug="unknown-keys",
    )


def _of_positions(position_ids: fx.Node) -> set[fx.Node]:
    """What is made of `position_ids`, constants and sizes alone: tables of rotations."""
    constant, made = set[fx.Node](), {position_ids}
    for node in position_ids.graph.nodes:
        if node.op in ("placeholder", "output") or node in made:
            continue
        values = [one for one in node.all_input_nodes if not isinstance(one.meta.get("val"), torch.SymInt)]
        if all(one in constant for one in values):
            constant.add(node)
        elif all(one in constant or one in made for one in values):
            made.add(node)
    return made - {position_ids}


def _turned(roots: list[fx.Node], tables: set[fx.Node], block: Block) -> list[fx.Node]:
    """What `roots` are made of that hangs on positions, in the graph's order: `tables`, and nodes of the block.

    What enters a block hangs on positions as well, through the blocks before it, and stays as it is.
    """
    found: dict[fx.Node, None] = {}
    for node in backward_closure(roots):
        if node in tables or (block.holds(node) and any(one in found for one in node.all_input_nodes)):
            found[node] = None
    return list(found)
