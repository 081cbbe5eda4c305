"""Selectors over as many visual tokens as only the run tells: what an exit or a threshold in front of them left."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tvc.kernels import OPS, PRIMITIVES
from tvc.kernels.greedy import Greedy
from tvc.kernels.op import Scope
from tvc.kernels.select_pairs import Pairs

SELECTORS = [
    pytest.param(kind, id=key, marks=() if key == "max_min" else pytest.mark.conformance)
    for key, kind in PRIMITIVES["select"].items()
    if issubclass(kind, (Greedy, Pairs))
]


class _Left(torch.nn.Module):
    """`apply` on the first tokens of each sample, as many as hold a positive number somewhere in the batch."""

    def __init__(self, chosen: Any):
        super().__init__()
        self.chosen = chosen

    def forward(self, feature: torch.Tensor, score: torch.Tensor) -> torch.Tensor:
        left = (score > 0).any(0).sum().item()
        torch._check(left >= 0)
        torch._check(left <= score.shape[1])
        first = torch.arange(left)
        feature, score = feature[:, first], score[:, first]
        segment = torch.zeros_like(score, dtype=torch.int64)
        scope = Scope(segment, torch.ones_like(segment).sum(1, keepdim=True), 1)
        given = {"feature": feature, "text": (feature.new_ones(2, 1, 8), torch.ones(2, 1, dtype=torch.bool))}
        taps = {name: given[name] for name in self.chosen.taps()}
        result: torch.Tensor = self.chosen.apply(score, scope, **taps)
        return result


@pytest.mark.parametrize("kind", SELECTORS)
def test_a_selector_is_lowered_without_a_promise_that_tokens_are_left(kind: Any) -> None:
    module = _Left(kind(keep="50%"))
    torch.manual_seed(0)
    feature, score = torch.randn(2, 9, 8), torch.rand(2, 9)
    axes = {1: torch.export.Dim.AUTO}
    exported = torch.export.export(module, (feature, score), dynamic_shapes=(axes, axes), strict=False)
    draft = exported.module(check_guards=False)
    lowerings = {entry.overload: entry.lowering for entry in OPS.values()}
    for node in draft.graph.nodes:
        node.target = lowerings.get(node.target, node.target)
    draft.recompile()
    lowered = torch.export.export(draft, (feature, score), dynamic_shapes=(axes, axes), strict=False)
    assert not any(str(node.target).startswith("tvc.") for node in lowered.graph.nodes)
    run = lowered.module(check_guards=False)
    for left in (9, 4, 1, 0):
        given = (feature, torch.where(torch.arange(9) < left, score, 0.0))
        assert torch.equal(run(*given), module(*given))
        assert run(*given).shape[1] == left // 2


class _Merged(torch.nn.Module):
    """Tiles of any length, of which two tokens are merged into others."""

    def forward(self, feature: torch.Tensor) -> tuple[torch.Tensor, ...]:
        batch, length = feature.shape[:2]
        size, segment = feature.new_ones(batch, length), torch.zeros(batch, length, dtype=torch.int64)
        counts, slots = torch.ones_like(segment).sum(1, keepdim=True), length - 2
        merge: Any = OPS["bipartite_merge"].overload
        made: tuple[torch.Tensor, ...] = merge(
            feature, feature, size, segment, counts, 0, 2, slots, "size_weighted", True
        )
        return made


def test_tiles_of_any_length_are_merged_in_a_loop() -> None:
    feature = torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(0))
    axes = {1: torch.export.Dim("length", min=4, max=4096)}
    exported = torch.export.export(_Merged(), (feature,), dynamic_shapes=(axes,), strict=False)
    draft = exported.module(check_guards=False)
    lowerings = {entry.overload: entry.lowering for entry in OPS.values()}
    for node in draft.graph.nodes:
        node.target = lowerings.get(node.target, node.target)
    draft.recompile()
    lowered = torch.export.export(draft, (feature,), dynamic_shapes=(axes,), strict=False)
    assert any("while_loop" in str(node.target) for node in lowered.graph.nodes)
    for length in (9, 16, 600):
        given = torch.randn(2, length, 8, generator=torch.Generator().manual_seed(length))
        torch.testing.assert_close(lowered.module(check_guards=False)(given), _Merged()(given))
