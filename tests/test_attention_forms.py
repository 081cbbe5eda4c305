"""Scores go by attention as a layer computes it: logits with a soft cap (Gemma 2), masks that add to them (Doge, BEiT).

The reference is what the untouched model says of its own attention, in its own eager code.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import support
import tvc
from tvc.api import Prepared

IMAGE, KEPT = support.LLAVA_IMAGE, 5
FORMS: dict[str, dict[str, Any]] = {
    "gemma2": {"attn_logit_softcapping": 1.0, "query_pre_attn_scalar": 1, "sliding_window": 64},
    "doge": {},
}
POLICY = {
    "version": 1,
    "name": "looked-at",
    "steps": [{"at": "language.2", "score": {"attention": {"of": "last"}}, "select": {"top": {"keep": KEPT}}}],
}


def build(kind: str, tower: dict[str, Any] | None = None, **changed: Any) -> Any:
    features = {"vision_feature_select_strategy": "full", "vision_feature_layer": -1} if tower else {}
    text = {"model_type": kind, "head_dim": 16, **FORMS[kind], **changed}
    return support.llava_around(text, tower or {}, 0.2, **features)


def looked_at(model: Any, inputs: dict[str, torch.Tensor]) -> list[list[int]]:
    """The visual tokens to which the last one pays most in layer 1, as places in the prompt."""
    before = model.config.text_config._attn_implementation
    model.set_attn_implementation({"text_config": "eager"})
    try:
        with torch.no_grad():
            paid = model(**inputs, output_attentions=True).attentions[1][:, :, -1].mean(1)
    finally:
        model.set_attn_implementation({"text_config": before})
    visual = paid.masked_fill(inputs["input_ids"] != IMAGE, -1.0)
    return [sorted(row) for row in visual.topk(KEPT).indices.tolist()]


def kept_of(compiled: Any, inputs: dict[str, torch.Tensor]) -> list[list[int]]:
    rows = compiled(**inputs).kept["language.2"].tolist()
    visual = (inputs["input_ids"] == IMAGE).tolist()
    return [[place for place in row if place >= 0 and one[place]] for row, one in zip(rows, visual, strict=True)]


@pytest.mark.parametrize("target", ["torch", pytest.param("ort", marks=pytest.mark.conformance)])
@pytest.mark.parametrize("kind", FORMS)
def test_what_stays_is_what_the_model_itself_looks_at(kind: str, target: str) -> None:
    model, inputs = build(kind), support.asked_of_llava()
    compiled = Prepared(model, inputs=inputs).compile(POLICY, target, verify=False)
    assert kept_of(compiled, inputs) == looked_at(model, inputs)
    assert tvc.verify(compiled, model, inputs, steps=2).passed


def test_an_encoder_that_adds_to_its_logits_is_asked_as_it_is() -> None:
    """BEiT adds a number for each head and each distance between places; its class token is a visual token here."""
    tower = {"model_type": "beit", "use_relative_position_bias": True}
    model = build("gemma2", tower, attn_logit_softcapping=None)
    inputs = support.asked_of_llava(support.LLAVA_TOKENS + 1)
    step = {"at": "language.2", "score": {"attention": {"of": "all", "layer": "vision.1"}}, "select": {"top": KEPT}}
    compiled = Prepared(model, inputs=inputs).compile({**POLICY, "steps": [step]}, verify=False)
    model.set_attn_implementation({"vision_config": "eager"})
    with torch.no_grad():
        paid = model.model.vision_tower(inputs["pixel_values"], output_attentions=True).attentions[1].mean((1, 2))
    model.set_attn_implementation({"vision_config": "sdpa"})
    starts = (inputs["input_ids"] == IMAGE).int().argmax(1, keepdim=True)
    wanted = (paid.topk(KEPT).indices + starts).sort().values
    assert kept_of(compiled, inputs) == wanted.tolist()
    assert tvc.verify(compiled, model, inputs, steps=1).passed


def test_a_soft_cap_changes_what_a_model_looks_at() -> None:
    """Without it, the same weights look elsewhere: the test above could fail."""
    inputs = support.asked_of_llava()
    assert looked_at(build("gemma2"), inputs) != looked_at(build("gemma2", attn_logit_softcapping=None), inputs)
