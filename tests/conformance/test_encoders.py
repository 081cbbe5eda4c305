"""LLaVA around encoders of many kinds: scores, cuts inside them and cuts behind them agree with their definition."""

from __future__ import annotations

from typing import Any

import pytest

import support
from tvc.api import Prepared
from tvc.errors import SiteError, TvcError
from tvc.verification.check import compare

PLACES = {"use_relative_position_bias": True}
REGISTERS = {"num_register_tokens": 4}
SQUARE = {"image_size": [56, 56], "patch_size": [14, 14]}
# What a kind's configuration needs, and the visual tokens of its "full" features.
FREE: dict[str, tuple[dict[str, Any], int]] = {
    "aimv2_vision_model": ({"use_head": False, "qkv_bias": False}, 16),
    "beit": ({}, 17),
    "chinese_clip_vision_model": ({}, 17),
    "clip_vision_model": ({}, 17),
    "deit": ({}, 18),
    "dinov2": ({"mlp_ratio": 2}, 17),
    "dinov2_with_registers": ({"mlp_ratio": 2, **REGISTERS}, 21),
    "ijepa": ({}, 16),
    "internvl_vision": (SQUARE, 17),
    "siglip_vision_model": ({"vision_use_head": False}, 16),
    "vit": ({}, 17),
    "vit_msn": ({}, 17),
}
# Their blocks bring a value for every token, which a cut inside the encoder would not shorten.
BOUND: dict[str, tuple[dict[str, Any], int]] = {
    "beit": (PLACES, 17),
    "dinov3_vit": (REGISTERS, 21),
    "idefics3_vision": ({}, 16),
    "mlcd_vision_model": ({}, 17),
}
UNSEEN = {"data2vec-vision": (PLACES, 17)}  # attention in code of its own
INSIDE = {"at": "vision.1", "merge": {"bipartite": {"keep": "70%"}}}
BEHIND = [
    {
        "at": "language.0",
        "score": {"attention": {"of": ["cls", "all"], "layer": "vision.1"}},
        "select": {"top": {"keep": "60%"}},
    },
    {"at": "language.2", "score": {"attention": {"of": "last"}}, "select": {"top": {"keep": "50%"}}},
]
TARGETS = ("torch", "ort")


def prepared(kind: str, settings: dict[str, Any], tokens: int) -> tuple[Prepared, Any, dict[str, Any]]:
    features = {"vision_feature_select_strategy": "full", "vision_feature_layer": -1}
    model = support.llava_around({"model_type": "llama"}, {"model_type": kind, **settings}, 0.08, **features)
    inputs = support.asked_of_llava(tokens)
    return Prepared(model, inputs=inputs), model, inputs


def differing(kind: str, entry: tuple[dict[str, Any], int], steps: list[dict[str, Any]], target: str) -> list[Any]:
    """What a compiled model gives that the untouched one does not, of all that is compared."""
    ready, model, inputs = prepared(kind, *entry)
    compiled = ready.compile({"version": 1, "name": "tried", "steps": steps}, target, verify=False)
    report = compare(compiled, model, inputs, steps=3)
    assert report.comparisons
    return [row for row in report.comparisons if not row.passed]


@pytest.mark.conformance
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", FREE)
def test_cuts_inside_and_behind_an_encoder_agree(kind: str, target: str) -> None:
    assert differing(kind, FREE[kind], [INSIDE, BEHIND[1]], target) == []
    assert differing(kind, FREE[kind], BEHIND, target) == []


@pytest.mark.conformance
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", BOUND)
def test_an_encoder_bound_to_its_length_is_cut_behind_it_alone(kind: str, target: str) -> None:
    assert differing(kind, BOUND[kind], BEHIND, target) == []
    with pytest.raises(SiteError, match="every token of the encoder"):
        differing(kind, BOUND[kind], [INSIDE], target)


@pytest.mark.conformance
@pytest.mark.parametrize("kind", UNSEEN)
def test_attention_that_no_graph_shows_is_refused_as_a_score(kind: str) -> None:
    assert differing(kind, UNSEEN[kind], BEHIND[1:], "torch") == []
    with pytest.raises(TvcError, match="unseen-attention"):
        differing(kind, UNSEEN[kind], BEHIND, "torch")
