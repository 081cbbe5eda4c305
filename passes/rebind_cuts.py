"""RebindCuts: everything behind a cut runs on the shortened chunk.

Of the values that cross a cut, those computed from positions alone (rotary tables, masks) are recomputed from the
reduced positions, so that runtimes still see the pattern they fuse; the hidden states were reduced by the cut itself;
whatever else has a token axis is gathered along it; sizes of the token axis become the new size.
"""

from __future__ import annotations

import torch
import torch.fx as fx

from tvc.graphs import annotate, backward_closure, clone
from tvc.passes.base import Pass
from tvc.passes.cuts import ChunkState, Cut, gather_tokens
from tvc.program import Change, Component, Program

A = torch.ops.aten


class RebindCuts(Pass):
    """Rewires the decoder behind each inserted reduction."""

    needs = frozenset({"reductions-inserted"})
    gives = frozenset({"cuts-rebound"})
    may_be_idle = True  # a policy without a decoder step has no cut

    def run(self, program: Program) -> list[Change]:
        component = program.components["decoder"]
        changes: list[Change] = []
        for cut in component.meta["cuts"]:
            changes += _Rebinding(component, cut).run()
        _stage_outputs(component)
        return changes


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
        inserted = {n for n in self.graph.nodes if order[n] < start and _made_by_cut(n, self.after)}
        live = [
            node
            for node in self.graph.nodes
            if order[node] < start
            and node not in inserted
            and any(order[u] >= start and u.op != "output" for u in node.users)
        ]
        with self.graph.inserting_before(self.cut.first):
            new_size = self._note(self.graph.call_function(A.sym_size.int, (self.after.kept, 1)))
            new_size.meta["val"] = self.size
            self.known = self._known(new_size)
            rebound = {node: copy for node in live if (copy := self._reduced(node, new_size)) is not None}
        changes = []
        for node, copy in rebound.items():
            for user in list(node.users):
                if order.get(user, -1) >= start and user.op != "output":
                    user.replace_input_with(node, copy)
            how = "gathered" if copy.target is gather_tokens else "recomputed"
            changes.append(Change("decoder", node.name, f"{how} behind {self.cut.site}", self.cut.where))
        return changes

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
            return self._mask(node)
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

    def _mask(self, node: fx.Node) -> fx.Node:
        keys = self._note(
            self.graph.call_function(A.cat.default, ([self.after.key_positions, self.after.query_positions], 1))
        )
        mask = self._note(
            self.graph.call_function(
                torch.ops.tvc.attention_mask.default,
                (self.after.query_positions, keys, node.args[2], self.after.spans),
            )
        )
        mask.meta["val"] = node.meta["val"]
        return mask


def _made_by_cut(node: fx.Node, state: ChunkState) -> bool:
    """Whether the node is one of the cut's own results."""
    return any(
        node is value for value in vars(state).values() if isinstance(value, fx.Node) and value.op != "placeholder"
    )


def _stage_outputs(component: Component) -> None:
    """Every stage hands its key positions on: the cached ones and the chunk's."""
    graph: fx.Graph = component.draft.graph  # type: ignore[union-attr]
    output = next(node for node in graph.nodes if node.op == "output")
    values = dict(zip(component.outputs, output.args[0], strict=True))  # type: ignore[arg-type]
    stages: list[fx.Node] = [values["key_positions.0"]]
    with graph.inserting_before(output):
        for cut in component.meta["cuts"]:
            joined = graph.call_function(A.cat.default, ([cut.after.key_positions, cut.after.query_positions], 1))
            annotate(joined, f"RebindCuts: {cut.where}")
            if cut.layer == 0:
                stages[-1] = joined
            else:
                stages.append(joined)
    layers = [name for name in component.outputs if name.startswith(("key.", "value.", "state."))]
    names = ("logits", *(f"key_positions.{s}" for s in range(len(stages))), *layers)
    output.args = ((values["logits"], *stages, *(values[name] for name in layers)),)
    component.outputs = names
