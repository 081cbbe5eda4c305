"""LowerOps: every op becomes what its reference computes, except those that the target runs itself."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch.fx as fx
from torch.overrides import TorchFunctionMode

from tvc.errors import PassError
from tvc.graphs import fork, open_draft
from tvc.kernels.op import OPS
from tvc.passes.base import Pass
from tvc.passes.retrace import retrace
from tvc.program import Change, Program


class LowerOps(Pass):
    """Exports drafts, and graphs with ops, tracing through the references of `tvc::` ops."""

    needs = frozenset({"cuts-rebound"})
    gives = frozenset({"lowered"})
    may_be_idle = True  # a component may hold no op at all

    def __init__(self, keep: Iterable[str] = ()):
        self.keep = frozenset(keep)

    def run(self, program: Program) -> list[Change]:
        names = {op.overload: op.name for op in OPS.values() if op.name not in self.keep}
        changes = []
        for component in program.components.values():
            if component.draft is None:
                if not any(n.target in names for n in component.exported.graph.nodes):
                    continue
                component.draft = open_draft(component)
            else:  # another target may be made of the same draft
                component.draft = fork(component.draft)
            lowered = _Lowered({name: OPS[name].lowering for name in names.values()})
            for node in component.draft.graph.nodes:
                lowered.enter(node)
            retrace(component, program)
            changes += [
                Change(component.name, component.name, f"{name} lowered to its reference, {times} times", "target")
                for name, times in lowered.met.items()
            ]
            left = [n for n in component.exported.graph.nodes if n.target in names]
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


class _Lowered(TorchFunctionMode):
    """While it is entered, calls of ops are calls of what they are lowered to."""

    def __init__(self, lowerings: Mapping[str, Callable[..., Any]]):
        super().__init__()
        self.lowerings, self.met = lowerings, dict[str, int]()
        overloads = {OPS[name].overload: name for name in lowerings}
        self.names = overloads | {overload.overloadpacket: name for overload, name in overloads.items()}

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return self.lowered(func)(*args, **(kwargs or {}))

    def lowered(self, function: Any) -> Any:
        """What to call in the place of `function`."""
        name = self.names.get(function)
        if name is None:
            return function
        self.met[name] = self.met.get(name, 0) + 1
        return self.lowerings[name]

    def enter(self, node: fx.Node) -> None:
        """Makes a node that may call ops, being one or a function of the passes, one that is traced in this mode."""
        function = self.lowered(node.target)
        if isinstance(function, types.FunctionType):

            @functools.wraps(function)
            def entered(*args: Any, **kwargs: Any) -> Any:
                with self:
                    return function(*args, **kwargs)

            node.target = entered
