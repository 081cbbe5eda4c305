"""Merges between exact twins: whichever of them the compiled model takes is followed, and what is wrong is found."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import support
import tvc
from tvc.trace.observe import replaced
from tvc.verification import check

MERGE = {"merge": {"bipartite": {"remove": 1, "by": "feature_cosine"}}}
TWINS = {"version": 1, "name": "twins", "steps": [{"at": "language.0", "scope": "sequence", **MERGE}]}


@pytest.fixture(scope="module")
def twins() -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """(compiled model, untouched model, inputs): a prompt that shows one photo twice."""
    model, processor = support.build("llava")
    inputs = support.inputs("llava", 1, images=2)
    inputs["pixel_values"][1] = inputs["pixel_values"][0]
    return tvc.compile(model, TWINS, inputs=inputs, processor=processor, verify=False), model, inputs


def spoiled(compiled: Any, noise: float, error: float = 0.0) -> Any:
    """Features off by as little as another order of sums makes them; values of a layer off by `error`."""
    run = compiled.engine.run

    def between(component: str, given: Any) -> Any:
        made = run(component, given)
        if component == "vision":
            generator = torch.Generator().manual_seed(0)
            features = made["visual_features"]
            made["visual_features"] = features * (1 + noise * torch.randn(features.shape, generator=generator))
        if component == "decoder":
            made["value.3"] = made["value.3"] + error
        return made

    return replaced(compiled.engine, "run", between)


def test_a_choice_between_twins_is_followed(twins: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, model, inputs = twins
    with spoiled(compiled, 3e-7):
        report = check.compare(compiled, model, inputs, steps=2)
        assert report.passed, report.text()
        monkeypatch.setattr(check.Run, "values", lambda *_: None)
        assert not check.compare(compiled, model, inputs, steps=2).passed  # it is another choice indeed


@pytest.mark.parametrize("noise", [0.0, 3e-7])
def test_a_small_error_behind_twins_is_found(twins: Any, noise: float) -> None:
    """Four times what is allowed, which is less than a merge of another twin would make of it."""
    compiled, model, inputs = twins
    with spoiled(compiled, noise, error=3e-4):
        report = check.compare(compiled, model, inputs, steps=2)
    wrong = {(row.name, row.output) for row in report.comparisons if not row.passed}
    assert wrong >= {("batch 1", "value.3"), ("padded batch 3", "value.3")}
    assert not {output for _, output in wrong} & {"value.0", "value.1", "value.2"}
