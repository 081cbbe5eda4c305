"""Retrace: a draft becomes an exported program again, with fresh shapes, guards and ranges.

Tracing is what compiling a model takes longest over: a draft is exported once, as late as what comes next allows.
"""

from __future__ import annotations

import operator

import torch

from tvc.chunks import batch_axis, sample_inputs, varying_axes
from tvc.errors import PassError
from tvc.graphs import drop_checks, drop_unused_attributes
from tvc.passes.base import Pass
from tvc.program import Change, Component, Program

AUTO = torch.export.Dim.AUTO
SAMPLED = 1024  # visual tokens; a part of them that is 0 or 1 tokens would pass for that number whatever they are


class Retrace(Pass):
    """Exports every draft, for passes that need the shapes behind a cut."""

    needs = frozenset({"cuts-rebound"})
    gives = frozenset({"retraced"})
    may_be_idle = True

    def run(self, program: Program) -> list[Change]:
        changes = []
        for component in program.components.values():
            if component.draft is None:
                continue
            retrace(component, program)
            changes.append(Change(component.name, component.name, "exported again", "shapes changed"))
        return changes


def retrace(component: Component, program: Program) -> None:
    """Exports the component's draft, on a sample that fits what the passes made of it."""
    if component.name == "decoder":
        _decoder_sample(component, program)
        _share_batch(component)
    export_draft(component)


def _decoder_sample(component: Component, program: Program) -> None:
    stage_of_layer = [stage.index for stage in program.stages for _ in stage.layers]
    shape = component.meta["shape"]
    component.sample = sample_inputs(
        component.inputs, shape, stage_of_layer, component.meta["tap_widths"], visual=SAMPLED
    )
    component.dynamic = tuple(dict.fromkeys(varying_axes(name, shape), AUTO) for name in component.inputs)


def _share_batch(component: Component) -> None:
    """States that all inputs hold the same number of samples, which a tracer does not conclude across a cut.

    Modelling code may take that number from one input and reshape by it what comes from another one (OPT's attention
    does): behind a cut whose size only the run tells, nothing could be said of the length that is left.
    """
    draft, shape = component.draft, component.meta["shape"]
    if draft is None:
        return
    inputs = [node for node in draft.graph.nodes if node.op == "placeholder"][-len(component.inputs) :]
    with draft.graph.inserting_before(inputs[-1].next):
        first, *others = (
            draft.graph.call_function(torch.ops.aten.sym_size.int, (node, batch_axis(name, shape)))
            for name, node in zip(component.inputs, inputs, strict=True)
        )
        for size in others:
            draft.graph.call_function(
                torch.ops.aten._assert_scalar.default, (draft.graph.call_function(operator.eq, (first, size)), "")
            )


def export_draft(component: Component) -> None:
    """Traces `component.draft` into `component.exported`; a size that the trace pins down is an error."""
    draft = component.draft
    if draft is None:
        return
    draft.graph.eliminate_dead_code()
    drop_unused_attributes(draft)
    draft.recompile()
    with torch.no_grad():
        exported = torch.export.export(
            draft,
            component.sample,
            dynamic_shapes=component.dynamic,
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )
    drop_checks(exported, bounded=component.name == "vision")
    component.exported, component.draft = exported, None
    _check_dynamic(component)


def _check_dynamic(component: Component) -> None:
    """Outside the vision path (whose image size may be fixed) every axis that may vary must have stayed symbolic."""
    if component.name == "vision":
        return
    specs = [n for n in component.exported.graph.nodes if n.op == "placeholder"]
    values = [n.meta["val"] for n in specs[len(specs) - len(component.inputs) :]]
    for name, value, axes in zip(component.inputs, values, component.dynamic, strict=True):
        fixed = [axis for axis in axes if not isinstance(value.shape[axis], torch.SymInt)]
        if fixed:
            raise PassError(
                "a size that varies from call to call became a constant of the graph",
                where=f"{component.name}, input {name}, axis {fixed[0]}",
                got=value.shape[fixed[0]],
                want="a symbolic size",
                fix="an op of the policy's steps branches on a size; write it with arithmetic",
                slug="size-pinned",
            )
