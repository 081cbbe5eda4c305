"""`scope: frame`: every frame of a video has a budget of its own, an image being one frame."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import support
import tvc
from tvc.api import Prepared
from tvc.errors import SiteError

video_tokens, with_kinds = support.by_hand.video_tokens, support.by_hand.with_kinds
# Frames of 8 tokens and of 4, and the image that the tests' model is traced with.
GRIDS = ((3, 4, 8), (2, 4, 4))


def policy(*steps: dict[str, Any]) -> dict[str, Any]:
    common = {"rest": "drop", "scope": "frame"}
    return {"version": 1, "name": "by-frame", "steps": [common | step for step in steps]}


COUNT = {"at": "language.1", "score": {"attention": {"of": "last"}}, "select": {"top": {"keep": 3}}}
SHARE = {"at": "language.3", "score": "norm", "select": {"top": {"keep": "67%"}}}
BOTH = policy(COUNT, SHARE)


@pytest.fixture(scope="module")
def model() -> Any:
    return support.build_model("qwen2_5_vl")


@pytest.fixture(scope="module")
def prepared(model: Any) -> Prepared:
    return Prepared(model, inputs=support.inputs("qwen2_5_vl", 2))


def given(model: Any) -> dict[str, torch.Tensor]:
    """A sample with a video of three frames, and one with a video of two."""
    made, extra = video_tokens(model, list(GRIDS))
    return with_kinds(model, [[1, 105, 106, *made[0], 130], [1, 107, *made[1], 132, 133]], extra)


def by_frame(model: Any, inputs: dict[str, torch.Tensor], kept: torch.Tensor) -> list[list[int]]:
    """How many tokens of each frame are among those kept, per sample."""
    found = []
    for row, (frames, height, width) in enumerate(GRIDS):
        size = height * width // 4
        video = (inputs["input_ids"][row] == model.config.video_token_id).nonzero().flatten().tolist()
        stays = {place for place in kept[row].tolist() if place >= 0}
        found.append([len(stays & set(video[n * size : (n + 1) * size])) for n in range(frames)])
    return found


@pytest.mark.parametrize("target", ["torch", pytest.param("ort", marks=pytest.mark.conformance)])
def test_each_frame_keeps_its_own(model: Any, prepared: Prepared, target: str) -> None:
    compiled, inputs = prepared.compile(BOTH, target, verify=False), given(model)
    kept = compiled(**inputs).kept
    assert by_frame(model, inputs, kept["language.1"]) == [[3, 3, 3], [3, 3]]
    assert by_frame(model, inputs, kept["language.3"]) == [[2, 2, 2], [2, 2]]
    assert tvc.verify(compiled, model, inputs, steps=2).passed
    text = {"input_ids": torch.tensor([[1, 105, 106, 107]]), "attention_mask": torch.ones(1, 4, dtype=torch.int64)}
    torch.testing.assert_close(compiled(**text).logits, model(**text).logits[:, -1:], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("target", ["torch", pytest.param("ort", marks=pytest.mark.conformance)])
def test_shares_are_rounded_frame_by_frame(model: Any, prepared: Prepared, target: str) -> None:
    """30% are 2.4 of 8 and 1.2 of 4."""
    up = {**COUNT, "select": {"top": {"keep": {"share": "30%", "round": "up"}}}}
    compiled, inputs = prepared.compile(policy(up), target, verify=False), given(model)
    assert by_frame(model, inputs, compiled(**inputs).kept["language.1"]) == [[3, 3, 3], [2, 2]]
    assert tvc.verify(compiled, model, inputs, steps=2).passed


@pytest.mark.conformance
def test_an_image_is_one_frame(prepared: Prepared) -> None:
    images = support.inputs("qwen2_5_vl", 2)
    own = prepared.compile({**BOTH, "steps": [step | {"scope": "image"} for step in BOTH["steps"]]}, verify=False)
    made = prepared.compile(BOTH, verify=False)
    for site, kept in own(**images).kept.items():
        assert kept.tolist() == made(**images).kept[site].tolist()


@pytest.mark.conformance
def test_where_positions_tell_no_frames_each_picture_is_one() -> None:
    model, processor = support.build("llava")
    compiled = tvc.compile(model, policy(COUNT), processor=processor, verify=False)
    inputs, second = support.two_images()
    (kept,) = compiled(**inputs).kept["language.1"]
    visual = support.visual_mask("llava", inputs["input_ids"])[0]
    chosen = [place for place in kept.tolist() if place >= 0 and visual[place]]
    assert (sum(place < second for place in chosen), sum(place >= second for place in chosen)) == (3, 3)
    assert tvc.verify(compiled, model, inputs, steps=1).passed


def test_a_clip_is_a_whole_video(model: Any) -> None:
    made = [tvc.plan(model, policy({**COUNT, "scope": scope}), frames=4) for scope in ("clip", "image")]
    assert made[0] == made[1]
    assert [layer.visual for layer in made[0].layers][1:] == [3] * 5


def test_a_plan_counts_by_frame(model: Any) -> None:
    made = tvc.plan(model, BOTH, frames=4)
    (size,) = {count // 4 for count in made.visual_tokens}
    assert [layer.visual for layer in made.layers] == [4 * size, *[12] * 2, *[8] * 3]
    assert made.exact


@pytest.mark.parametrize("site", ["projector", "vision.2"])
def test_frames_are_those_of_the_decoder(site: str) -> None:
    model, processor = support.build("llava")
    with pytest.raises(SiteError, match="no-frames") as problem:
        tvc.plan(model, policy({**SHARE, "at": site}), processor=processor)
    assert "steps[0].scope" in problem.value.where
