"""Graphs through `torch.compile`: the same answers, and no compilation for sizes of a kind that was seen before."""

from __future__ import annotations

import pytest
import torch

import tvc
from support import build, inputs


@pytest.mark.conformance
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_answers_stay_and_sizes_are_free(family: str) -> None:
    model, _ = build(family)
    plain = tvc.compile(model, "fastv", inputs=inputs(family, 2), verify=False)
    faster = plain.torch_compile()
    assert plain.engine.run is not faster.engine.run
    assert tvc.verify(faster, model, inputs(family, 1)).passed
    counted = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert counted > 0
    assert tvc.verify(faster, model, inputs(family, 1, seed=1)).passed
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == counted
    given = inputs(family, 3)
    wanted = plain.generate(**given, max_new_tokens=9, do_sample=False)
    assert faster.generate(**given, max_new_tokens=9, do_sample=False).tolist() == wanted.tolist()
