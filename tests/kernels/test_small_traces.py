"""Graphs that were traced on fewer tokens than they run on: a size that was 1 in the trace is any size in the graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tvc.graphs import drop_checks, open_draft
from tvc.kernels import OPS, PRIMITIVES
from tvc.kernels.op import Scope
from tvc.passes.retrace import export_draft
from tvc.program import Component

WIDTH, TRACED = 8, 5
STEPS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "cluster": ("rest", "cluster", {"pool": "100%", "per": 10}),
    "cluster-pairs": ("rest", "cluster", {"pool": "60%", "per": 2}),
    "max_min": ("select", "max_min", {"keep": "50%"}),
    "max_sum": ("select", "max_sum", {"keep": "50%"}),
    "coverage": ("select", "coverage", {"keep": "50%"}),
    "log_det": ("select", "log_det", {"keep": "50%"}),
    "density": ("select", "density", {"keep": "70%", "cutoff": 0.9}),
    "medoids": ("select", "medoids", {"keep": "40%", "rounds": 4}),
    "outliers": ("select", "outliers", {"keep": "50%"}),
    "pairs": ("select", "pairs", {"keep": "30%"}),
    "spectral": ("select", "spectral", {"keep": "40%"}),
    "bipartite": ("merge", "bipartite", {"keep": "60%"}),
    "merge": ("rest", "merge", {"targets": "kept"}),
    "absorb": ("rest", "absorb", {"neighbours": 3, "extra": True}),
    "fold": ("rest", "fold", {}),
    "recycle": ("rest", "recycle", {"neighbours": 2, "around": 3}),
}
LOOPS = ("cluster", "max_min", "bipartite")  # the others in the lane of the long tests


class OneLess(torch.nn.Module):
    """A step of a policy on all tokens but the first."""

    def __init__(self, kind: str, key: str, fields: dict[str, Any]):
        super().__init__()
        self.part: Any = PRIMITIVES[kind][key](**fields)
        self.keep: Any = PRIMITIVES["select"]["top"](keep="30%")

    def forward(self, feature: torch.Tensor, score: torch.Tensor) -> tuple[torch.Tensor, ...]:
        feature, score = feature[:, 1:], score[:, 1:]
        size, segment = torch.ones_like(score), torch.zeros_like(score, dtype=torch.int64)
        scope = Scope(segment, torch.ones_like(segment).sum(1, keepdim=True), 1)
        text = (feature.new_ones(2, 3, WIDTH), torch.ones(2, 3, dtype=torch.bool))
        given = {"feature": feature, "metric": feature, "text": text}
        taps = {name: given[name] for name in self.part.taps()}
        if self.part.kind == "select":
            return (self.part.apply(score, scope, **taps),)
        if self.part.kind == "merge":
            made: tuple[torch.Tensor, ...] = self.part.apply(feature, size, scope, **taps)
        else:
            made = self.part.apply(feature, size, self.keep.apply(score, scope), score, scope, **taps)
        return made


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in LOOPS else pytest.mark.conformance) for n in STEPS])
def test_a_graph_runs_on_more_tokens_than_it_was_traced_on(name: str) -> None:
    module = OneLess(*STEPS[name])
    axes = {1: torch.export.Dim.AUTO}
    sample = (torch.randn(2, TRACED, WIDTH), torch.rand(2, TRACED))
    exported = torch.export.export(module, sample, dynamic_shapes=(axes, axes), strict=False)
    drop_checks(exported, bounded=False)
    names = ("feature", "score")
    component = Component("decoder", exported, names, ("made",), sample, (axes, axes))
    component.draft = open_draft(component)
    lowerings = {entry.overload: entry.lowering for entry in OPS.values()}
    for node in component.draft.graph.nodes:
        node.target = lowerings.get(node.target, node.target)
    export_draft(component)
    lowered = component.exported
    assert not any(str(node.target).startswith("tvc.") for node in lowered.graph.nodes)
    run = lowered.module(check_guards=False)
    for length in (2, 3, 12, 41, 300):
        feature = torch.randn(2, length, WIDTH, generator=torch.Generator().manual_seed(length))
        score = torch.rand(2, length, generator=torch.Generator().manual_seed(length))
        for got, want in zip(run(feature, score), module(feature, score), strict=True):
            torch.testing.assert_close(got, want)
