"""LowerOps: every op becomes what its reference computes, except those that the target runs itself."""

from __future__ import annotations

from collections.abc import Iterable

from tvc.errors import PassError
from tvc.graphs import open_draft
from tvc.kernels.op import OPS
from tvc.passes.base import Pass
from tvc.passes.retrace import export_draft
from tvc.program import Change, Program


class LowerOps(Pass):
    """Replaces `tvc::` nodes by their references and traces through them."""

    needs = frozenset({"retraced"})
    gives = frozenset({"lowered"})
    may_be_idle = True  # a component may hold no op at all

    def __init__(self, keep: Iterable[str] = ()):
        self.keep = frozenset(keep)

    def run(self, program: Program) -> list[Change]:
        references = {op.overload: op for op in OPS.values() if op.name not in self.keep}
        changes = []
        for component in program.components.values():
            if component.draft is None:  # else a fusion has opened it
                if not any(n.target in references for n in component.exported.graph.nodes):
                    continue
                component.draft = open_draft(component)
            for node in component.draft.graph.nodes:
                op = references.get(node.target)
                if op is not None:
                    what = f"lowered to the reference of {op.name}"
                    changes.append(Change(component.name, node.name, what, "target"))
                    node.target = op.lowering
            export_draft(component)
            left = [n for n in component.exported.graph.nodes if n.target in references]
            if left:
                raise PassError(
                    "an op is still there after lowering",
                    where=f'{component.name}, node "{left[0].name}"',
                    got=str(left[0].target),
                    want="aten operators",
                    fix="report this with the policy",
                    slug="not-lowered",
                )
        return changes
