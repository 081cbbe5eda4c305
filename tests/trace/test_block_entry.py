"""Blocks of an encoder that bring a value for each of its tokens: no cut in front of them is legal, as inspect says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

import support
from tvc.api import Prepared
from tvc.errors import SiteError

BOUND: dict[str, dict[str, Any]] = {
    "beit": {"use_relative_position_bias": True},  # made in the block
    "dinov3_vit": {},  # angles, handed to the block
    "idefics3_vision": {},  # a mask, handed to the block
}
MERGED = {
    "version": 1,
    "name": "merged-inside",
    "steps": [{"at": "vision.1", "merge": {"bipartite": {"keep": "70%"}}}],
}


def prepared(kind: str, settings: dict[str, Any]) -> Prepared:
    tower = {"model_type": kind, **settings}
    features = {"vision_feature_select_strategy": "full", "vision_feature_layer": -1}
    model = support.llava_around({"model_type": "llama"}, tower, 0.1, **features)
    return Prepared(model, inputs=support.asked_of_llava(16 if kind == "idefics3_vision" else 17))


@pytest.mark.parametrize("kind", BOUND)
def test_no_cut_in_front_of_blocks_that_run_on_all_tokens_alone(kind: str) -> None:
    model = prepared(kind, BOUND[kind])
    sites = {site.name: site for site in model.survey.layout.sites}
    for site in ("vision.0", "vision.2"):
        assert not sites[site].legal
        assert "vision.2 takes or makes a value for every token" in sites[site].reason
    with pytest.raises(SiteError, match="every token of the encoder"):
        model.compile(MERGED, "torch", verify=False)


def test_a_block_may_refuse_a_length_by_an_assertion(monkeypatch: pytest.MonkeyPatch) -> None:
    own = CLIPEncoderLayer.forward

    def bound(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        assert hidden_states.shape[1] == 17
        return own(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(CLIPEncoderLayer, "forward", bound)
    sites = prepared("clip_vision_model", {}).survey.layout.sites
    inside = [site for site in sites if site.name.startswith("vision.")]
    assert all(not site.legal and "a value for every token" in site.reason for site in inside)
    assert all(site.legal for site in sites if site.name.startswith("language."))


def test_cuts_of_blocks_that_run_on_any_length_stay_legal() -> None:
    # Its own code makes a mask for its blocks, which hides nothing.
    model = prepared("dinov2", {"mlp_ratio": 2})
    assert all(site.legal for site in model.survey.layout.sites if site.name.startswith("vision."))
    assert model.compile(MERGED, "torch").verification["passed"]
