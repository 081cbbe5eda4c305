"""RebindCuts: everything behind a cut runs on the shortened chunk.

Of the values that cross a cut, those computed from positions alone (rotary tables, masks) are recomputed from the
reduced positions, so that runtimes still see the pattern they fuse; the hidden states were reduced by the cut itself;
whatever else has a token axis is gathered along it; sizes of the token axis become the new size.

What a cut drops may leave the caches of earlier layers as well. They run on it all the same: only what they hand on of
their caches is without it, and the places that they hand on.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx

from tvc.chunks import ENTERED
from tvc.errors import SiteError
from tvc.graphs import annotate, backward_closure, clone
from tvc.kernels.segments import follow
from tvc.passes.base import Pass
from tvc.passes.cuts import ChunkState, Cut, Parting, gather_tokens, mask_of
from tvc.program import Change, Component, Program, Stage

A = torch.ops.aten


class RebindCuts(Pass):
    """Rewires the decoder behind each inserted reduction."""

    needs = frozenset({"reductions-inserted"})
    gives = frozenset({"cuts-rebound"})
    may_be_idle = True  # a policy without a decoder step has no cut

    def run(self, program: Program) -> list[Change]:
        component = program.components["decoder"]
        changes: list[Change] = []
        borders = [*component.meta["cuts"], *component.meta["partings"]]
        for border in sorted(borders, key=lambda one: one.layer):
            if isinstance(border, Cut):
                changes += _Rebinding(component, border).run()
            else:
                changes += _parted(component, border)
        return changes + _StageOutputs(component, program.stages).write()


class _Rebinding:
    def __init__(self, component: Component, cut: Cut):
        self.graph: fx.Graph = component.draft.graph  # type: ignore[union-attr]
        self.cut, self.before, self.after = cut, cut.before, cut.after
        self.note = f"RebindCuts: {cut.where}"
        self.size = self.before.query_positions.meta["val"].shape[1]
        self.anchor = self.after.chosen  # the last node that the cut inserted

    def run(self) -> list[Change]:
        order = {node: index for index, node in enumerate(self.graph.nodes)}
        start = order[self.cut.first]
        end = len(order) if self.cut.restored is None else order[self.cut.restored]
        if self.cut.restored is not None:
            self._check_return(order, start, end)
        inserted = {n for n in self.graph.nodes if order[n] < start and _made_by_cut(n, self.after)}
        live = [
            node
            for node in self.graph.nodes
            if order[node] < start
            and node not in inserted
            and any(start <= order[u] < end and u.op != "output" for u in node.users)
        ]
        with self.graph.inserting_before(self.cut.first):
            new_size = self._note(self.graph.call_function(A.sym_size.int, (self.after.kept, 1)))
            new_size.meta["val"] = self.size
            self.known = self._known(new_size)
            rebound = {node: copy for node in live if (copy := self._reduced(node, new_size)) is not None}
        changes = []
        for node, copy in rebound.items():
            for user in list(node.users):
                if start <= order.get(user, -1) < end and user.op != "output":
                    user.replace_input_with(node, copy)
            how = "gathered" if copy.target is gather_tokens else "recomputed"
            changes.append(Change("decoder", node.name, f"{how} behind {self.cut.site}", self.cut.where))
        return changes

    def _check_return(self, order: dict[fx.Node, int], start: int, end: int) -> None:
        """Only the hidden states may lead from the layers that tokens pass by to those behind them."""
        for node in (node for node, place in order.items() if start <= place < end):
            later = [user for user in node.users if order[user] > end and user.op != "output"]
            value = node.meta.get("val")
            sizes = value.shape if isinstance(value, torch.Tensor) else (value,)
            if later and any(str(size) == str(self.size) for size in sizes):
                raise SiteError(
                    "a later layer reads what one has made that some tokens passed by",
                    where=self.cut.where,
                    got=f'"{node.name}", read by "{later[0].name}"',
                    want="layers that hand on hidden states alone",
                    fix="let the tokens come back earlier, or leave until out",
                    slug="no-return",
                )

    def _note(self, node: fx.Node) -> fx.Node:
        annotate(node, self.note)
        return node

    def _reduced(self, node: fx.Node, new_size: fx.Node) -> fx.Node | None:
        """The node that stands for `node` behind the cut; None where it has no token axis."""
        known = self.known
        if node is self.before.residual:
            return self.after.residual
        if node in known:
            return known[node]
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            if str(value) == str(self.size):
                return new_size
            if value.node.expr.free_symbols.isdisjoint(self.size.node.expr.free_symbols):
                return None
            # Batch times tokens, for instance, where a mixture of experts looks at all tokens in one row.
            return clone(backward_closure([node], stop=known), known, self.note)[node]
        if not isinstance(value, torch.Tensor):
            return None
        if node.target is torch.ops.tvc.attention_mask.default:
            return mask_of(node, self.after, self.note)
        axes = [axis for axis, size in enumerate(value.shape) if str(size) == str(self.size)]
        if not axes:
            return None
        closure = backward_closure([node], stop=known)
        if all(n.op != "placeholder" for n in closure):
            return clone(closure, known, self.note)[node]
        gathered = self._note(self.graph.call_function(gather_tokens, (node, self.after.kept, tuple(axes))))
        gathered.meta["val"] = value
        return gathered

    def _known(self, new_size: fx.Node) -> dict[fx.Node, fx.Node]:
        """What stands for the chunk's positions and indices; sizes of other axes stand for themselves."""
        names = ("position_ids", "query_positions", "text_index", "visual_index", "segment", "counts", "spans")
        pairs = {getattr(self.before, name): getattr(self.after, name) for name in names}
        for node in self.graph.nodes:
            value = node.meta.get("val")
            if node.target is A.sym_size.int and isinstance(value, torch.SymInt):
                pairs[node] = new_size if str(value) == str(self.size) else node
        return {node: copy for node, copy in pairs.items() if node is not None}


def _made_by_cut(node: fx.Node, state: ChunkState) -> bool:
    """Whether the node is one of the cut's own results."""
    return any(
        node is value for value in vars(state).values() if isinstance(value, fx.Node) and value.op != "placeholder"
    )


def _parted(component: Component, parting: Parting) -> list[Change]:
    """Masks behind a parting are made of the places that the caches there hold."""
    graph: fx.Graph = component.draft.graph  # type: ignore[union-attr]
    order = {node: index for index, node in enumerate(graph.nodes)}
    start, changes = order[parting.first], []
    for node in [n for n in order if n.target is torch.ops.tvc.attention_mask.default and order[n] < start]:
        users = [user for user in node.users if order[user] >= start]
        if not users:
            continue
        with graph.inserting_before(parting.first):
            mask = mask_of(node, parting.state, f"RebindCuts: {parting.where}")
        for user in users:
            user.replace_input_with(node, mask)
        changes.append(Change("decoder", node.name, f"recomputed from language.{parting.layer} on", parting.where))
    return changes


class _StageOutputs:
    """Every stage hands its key positions on, and its layers their caches: what was there and the chunk's, or, where
    later cuts evict what they drop, what these left of the chunk.
    """

    def __init__(self, component: Component, stages: list[Stage]):
        self.component, self.stages = component, stages
        self.graph: fx.Graph = component.draft.graph  # type: ignore[union-attr]
        self.output = next(node for node in self.graph.nodes if node.op == "output")
        outputs = self.output.args[0]
        self.values: dict[str, fx.Node] = dict(zip(component.outputs, outputs, strict=True))  # type: ignore[arg-type]
        self.cuts: list[Cut] = component.meta["cuts"]
        self.changes: list[Change] = []

    def write(self) -> list[Change]:
        places: dict[int, fx.Node] = {}
        left: list[ChunkState] = []
        entered: dict[str, fx.Node] = {}
        caches = [name for name in self.component.outputs if name.startswith(("key.", "value.", "state."))]
        opened: dict[int, Cut | Parting] = {id(cut.after): cut for cut in self.cuts}
        opened |= {id(parting.state): parting for parting in self.component.meta["partings"]}
        with self.graph.inserting_before(self.output):
            for stage, state in zip(self.stages, self.component.meta["stages"], strict=True):
                left.append(state)
                if stage.index in places:  # layers behind some that tokens passed by: caches as in front of those
                    continue
                border = opened.get(id(state))
                joined = self.values["key_positions.0"]
                if border is not None:
                    joined = self._call(border.where, A.cat.default, [state.key_positions, state.query_positions], 1)
                evicting = self._evicting(stage)
                if evicting:
                    joined = self._evict(stage, state, evicting, joined)
                    if stage.site is not None:
                        entered[f"{ENTERED}{stage.index}"] = state.query_positions
                    left[-1] = evicting[-1].after
                places[stage.index] = joined
        remembered = self.component.meta["remembered"]
        names = ("logits", *(f"key_positions.{s}" for s in places), *caches, *entered, *remembered)
        held = (self.values[name] for name in caches)
        values = (self.values["logits"], *places.values(), *held, *entered.values(), *remembered.values())
        self.component.meta["left"] = left  # the chunk as each stage's caches hold it
        self.output.args = (values,)
        self.component.outputs = names
        return self.changes

    def _evicting(self, stage: Stage) -> list[Cut]:
        """The cuts behind a stage that take what they drop out of its caches: from the nearest one on."""
        behind = [cut for cut in self.cuts if cut.layer >= stage.layers.stop]
        return [cut for cut in behind if cut.evicts is not None and cut.evicts <= stage.layers.start]

    def _evict(self, stage: Stage, state: ChunkState, evicting: list[Cut], places: fx.Node) -> fx.Node:
        """The stage's places without what is evicted; its caches go the same way."""
        where = evicting[-1].where
        kept: fx.Node = evicting[0].after.kept  # type: ignore[assignment]
        for cut in evicting[1:]:
            kept = self._call(where, follow, kept, cut.after.kept)

        def left(held: fx.Node) -> fx.Node:
            return self._call(where, torch.ops.tvc.evict.default, held, kept, state.query_positions)

        for layer in stage.layers:
            for name in (f"key.{layer}", f"value.{layer}"):
                if name in self.values:  # a layer may hold a state, or read another's cache
                    self.values[name] = left(self.values[name])
                    self.changes.append(Change("decoder", self.values[name].name, "without what is evicted", where))
        return left(places)

    def _call(self, where: str, function: Any, *arguments: Any) -> fx.Node:
        node = self.graph.call_function(function, arguments)
        annotate(node, f"RebindCuts: {where}")
        return node
