"""Exits decided at run time: they fire for one sample and not for another, in every runtime."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import support
import tvc
from tvc import api, compiler
from tvc.policy import load_policy, resolve
from tvc.trace.load import load
from tvc.trace.survey import survey

LAYER = 2


@pytest.fixture(scope="module")
def setting() -> tuple[Any, Any, dict[str, torch.Tensor], float, list[bool]]:
    """A threshold between the samples' scores, read off the untouched model's own attention."""
    model, processor = support.build("llava")
    inputs = support.inputs("llava", 3)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        rows = model(**inputs, output_attentions=True).attentions[LAYER - 1].mean(1)[:, -1]
    model.set_attn_implementation("sdpa")
    scores = (rows * support.visual_mask("llava", inputs["input_ids"])).sum(1)
    low, high = scores.sort().values[[0, 2]].tolist()
    threshold = (low + high) / 2
    fires = (scores > threshold).tolist()
    assert {True, False} == set(fires)
    return model, processor, inputs, threshold, fires


@pytest.mark.parametrize(
    "target", ["ort", *(pytest.param(name, marks=pytest.mark.conformance) for name in ("torch", "torchscript"))]
)
def test_an_exit_fires_for_one_sample_and_not_for_another(setting: Any, target: str) -> None:
    model, processor, inputs, threshold, fires = setting
    policy = {
        "version": 1,
        "name": "leave-when-seen",
        "steps": [
            {
                "at": f"language.{LAYER}",
                "exit": {"when": {"score": {"attention": {"of": "last"}}, "reduce": "sum", "above": threshold}},
            }
        ],
    }
    surveyed = survey(load(model, processor=processor).meta, processor)
    resolved = resolve(load_policy(policy), surveyed.layout)
    program = compiler.reduce(compiler.trace(model, surveyed, resolved, _quiet), resolved, _quiet)
    source = load(model, processor=processor)
    compiled = api.finish(source, survey(source.meta, processor), resolved, program, target)
    visual = support.visual_mask("llava", inputs["input_ids"])
    kept = compiled(**inputs).kept[f"language.{LAYER}"]
    for sample, fired in enumerate(fires):
        staying = kept[sample][kept[sample] >= 0]
        text = (~visual[sample] & inputs["attention_mask"][sample].bool()).nonzero()[:, 0]
        assert set(text.tolist()) <= set(staying.tolist())
        assert int(visual[sample][staying].sum()) == (0 if fired else 16)
    # A batch in which all leave is shorter from there on.
    alone = {name: value[[fires.index(True)]] for name, value in inputs.items()}
    lengths = [layer.keys.shape[2] for layer in compiled(**alone).past_key_values.layers]
    assert lengths[LAYER - 1] - lengths[LAYER] >= 16
    assert tvc.verify(compiled, model, inputs, steps=3).passed


def _quiet(_line: str) -> None:
    return None
