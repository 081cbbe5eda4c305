"""Videos that pass through the vision path of images: verified, kept by their own budgets, or refused by name."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import support
import tvc
from tvc.api import Prepared
from tvc.chunks import TAP
from tvc.errors import InputError
from tvc.report.cost import one_image
from tvc.report.schedule import plan_policy
from tvc.trace.layout import meta_model
from tvc.trace.observe import replaced
from tvc.trace.route import video_departs
from tvc.trace.survey import survey
from tvc.verification import samples

video_tokens, with_kinds = support.by_hand.video_tokens, support.by_hand.with_kinds
SLOW = pytest.mark.conformance
FAMILIES = (pytest.param("qwen2_vl", marks=SLOW), "qwen2_5_vl")
HALF = {
    "version": 1,
    "name": "half",
    "steps": [
        {
            "at": "language.2",
            "score": {"attention": {"of": "last"}},
            "select": {"top": {"keep": "50%"}},
            "scope": "image",
            "rest": "drop",
        }
    ],
}
# Blocks 0 and 2 of Qwen2.5-VL attend inside windows, the others over whole images.
SCORES = (
    {"attention": {"of": "all", "layer": "vision.2", "heads": "sum"}},
    {"attention": {"of": "visual", "layer": "vision.1", "heads": "max"}},
    {"global": {"above": 1.05, "layer": "vision.2"}},
    {"global": {"above": 1.05, "layer": "vision.3"}},
)
INSIDE = {
    **HALF,
    "steps": [
        {
            "at": "language.2",
            "score": [{**score, "weight": 1.0, "normalize": "none"} for score in SCORES],
            "select": {"threshold": {"above": 0.1}},
            "rest": "drop",
        }
    ],
}


@pytest.fixture(scope="module")
def prepared():
    """`prepared(family)`: (model, what policies are compiled for)."""
    made: dict[str, tuple[Any, Prepared]] = {}

    def get(family: str) -> tuple[Any, Prepared]:
        if family not in made:
            model = support.build_model(family)
            made[family] = (model, Prepared(model, inputs=support.inputs(family, 2)))
        return made[family]

    return get


@pytest.fixture(scope="module")
def half(prepared):
    """`half(family)`: (model, compiled model)."""
    made: dict[str, tuple[Any, Any]] = {}

    def get(family: str) -> tuple[Any, Any]:
        if family not in made:
            model, traced = prepared(family)
            made[family] = (model, traced.compile(HALF, verify=False))
        return made[family]

    return get


def frames(model: Any, tokens: int) -> dict[str, torch.Tensor]:
    """A prompt with that many placeholders and a video of eight frames of noise."""
    ids = torch.tensor([[1, 105, *[model.config.video_token_id] * tokens, 130, 131]])
    pixels = torch.randn(1, 8, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values_videos": pixels}


def two_videos(model: Any) -> dict[str, torch.Tensor]:
    made, extra = video_tokens(model, [(2, 4, 4), (3, 4, 8)])
    return with_kinds(model, [[1, 105, 106, *made[0], 130, 131], [1, 107, *made[1], 132, 133, 134]], extra)


def image_and_video(family: str, model: Any, image_first: bool) -> dict[str, torch.Tensor]:
    """Two samples: one of an image and a video, one of an image alone."""
    config = model.config
    made, extra = video_tokens(model, [(3, 4, 4)])
    given = support.inputs(family, 2)
    counts = (given["image_grid_thw"].prod(1) // config.vision_config.spatial_merge_size**2).tolist()
    pictures = [
        [config.vision_start_token_id, *[config.image_token_id] * n, config.vision_end_token_id] for n in counts
    ]
    parts = [pictures[0], made[0]] if image_first else [made[0], pictures[0]]
    rows = [[1, 105, *parts[0], 106, *parts[1], 130, 131], [1, 107, *pictures[1], 132]]
    images = {name: given[name] for name in ("pixel_values", "image_grid_thw")}
    return with_kinds(model, rows, {**images, **extra})


@pytest.mark.parametrize("family", FAMILIES)
def test_videos_equal_the_untouched_model_under_masks(half: Any, family: str) -> None:
    model, compiled = half(family)
    assert tvc.verify(compiled, model, two_videos(model)).passed


@pytest.mark.parametrize("family", FAMILIES)
def test_each_video_keeps_its_share(half: Any, family: str) -> None:
    model, compiled = half(family)
    inputs = two_videos(model)
    kept = compiled(**inputs).kept["language.2"]
    for row, places in enumerate(kept):
        video = inputs["input_ids"][row] == model.config.video_token_id
        text = inputs["attention_mask"][row].bool() & ~video
        chosen = [place for place in places.tolist() if place >= 0]
        assert len(chosen) == len(set(chosen))
        assert int(video[chosen].sum()) == int(video.sum()) // 2
        assert int(text[chosen].sum()) == int(text.sum())


@pytest.mark.parametrize("image_first", (True, False))
@pytest.mark.parametrize("family", FAMILIES)
def test_image_and_video_of_one_prompt(half: Any, family: str, image_first: bool) -> None:
    """Each of the two keeps half of its own tokens, whichever comes first."""
    model, compiled = half(family)
    inputs = image_and_video(family, model, image_first)
    kept = compiled(**inputs).kept["language.2"]
    for row, places in enumerate(kept):
        chosen = [place for place in places.tolist() if place >= 0]
        for token in (model.config.image_token_id, model.config.video_token_id):
            own = inputs["input_ids"][row] == token
            assert sum(bool(own[place]) for place in chosen) == int(own.sum()) // 2
    assert tvc.verify(compiled, model, inputs, steps=3).passed


def test_videos_that_have_as_many_tokens_as_the_image_are_no_part_of_it(half: Any) -> None:
    """An image of 12 tokens beside videos of 3 and of 9: each keeps half of its own."""
    model, compiled = half("qwen2_5_vl")
    config = model.config
    made, extra = video_tokens(model, [(3, 2, 2), (3, 6, 2)])
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(48, extra["pixel_values_videos"].shape[1], generator=generator)
    image = {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 12]])}
    picture = [config.vision_start_token_id, *[config.image_token_id] * 12, config.vision_end_token_id]
    inputs = with_kinds(model, [[1, 105, *made[0], 106, *made[1], *picture, 130]], {**image, **extra})
    (kept,) = compiled(**inputs).kept["language.2"].tolist()
    shown = (inputs["input_ids"][0] == config.image_token_id) | (inputs["input_ids"][0] == config.video_token_id)
    columns = shown.nonzero().flatten().tolist()
    left = [sum(column in kept for column in part) for part in (columns[:3], columns[3:12], columns[12:])]
    assert left == [1, 4, 6]
    assert tvc.verify(compiled, model, inputs, steps=2).passed


@pytest.mark.parametrize(
    ("preset", "settings", "left"),
    [
        # Of eight frames of 6 tokens and five of 8; of two frames of 4 tokens and three of 8.
        pytest.param("dycoke", {}, [[23, 14], [5, 10]], marks=SLOW),
        pytest.param("evs", {}, [[12, 10], [4, 8]], marks=SLOW),
        pytest.param("stc", {"keep": 3}, [[24, 15], [6, 9]], marks=SLOW),
        pytest.param("framefusion", {"above": 0.1, "cost": "50%"}, [[24, 20], [5, 13]], marks=SLOW),
        pytest.param("prunevid", {"depth": 2, "scenes": "50%"}, [[48, 40], [8, 24]], marks=SLOW),
        # Nearly all places pass for still ones.
        pytest.param("holitom", {"depth": 4, "still": -0.2, "keep": "30%"}, [[6, 12], [2, 7]], marks=SLOW),
    ],
)
def test_video_presets_see_frames(prepared: Any, preset: str, settings: dict[str, Any], left: list[list[int]]) -> None:
    model, traced = prepared("qwen2_5_vl")
    policy = tvc.load_policy(preset, set=settings)
    compiled = traced.compile(policy, verify=False)
    made, extra = video_tokens(model, [(8, 4, 6), (5, 4, 8)])
    longer = with_kinds(model, [[1, 105, 106, *made[0], 130, 131], [1, 107, *made[1], 132, 133, 134]], extra)
    for inputs, numbers in zip((longer, two_videos(model)), left, strict=True):
        kept = compiled(**inputs).kept["language.0"]
        for row, places in enumerate(kept):
            video = inputs["input_ids"][row] == model.config.video_token_id
            assert int(video[places[places >= 0]].sum()) == numbers[row]
    for frames_each, tokens, number in (
        (8, 48, left[0][0]),
        (5, 40, left[0][1]),
        (2, 8, left[1][0]),
        (3, 24, left[1][1]),
    ):
        one = dataclasses.replace(one_image(traced.survey.layout), visual_tokens=(tokens,), frames=frames_each)
        plan = plan_policy(policy, one)
        assert plan.layers[0].visual == number or (plan.fired is not None and plan.layers[0].visual > number)
    for inputs in (longer, image_and_video("qwen2_5_vl", model, image_first=False)):
        assert tvc.verify(compiled, model, inputs, steps=2).passed


def test_what_a_step_affords_counts_every_layer_in_front(prepared: Any) -> None:
    """Six layers that hold 50% on average: two whole ones, one of 60%, and what is left for the last three."""
    model, traced = prepared("qwen2_5_vl")
    steps = [
        {"at": "language.2", "score": "norm", "select": {"top": "60%"}},
        {"at": "language.3", "score": "norm", "select": {"afford": "50%"}},
    ]
    compiled = traced.compile({"version": 1, "steps": steps}, verify=False)
    inputs = two_videos(model)
    kept = compiled(**inputs).kept
    for row, places in enumerate(kept["language.3"]):
        video = inputs["input_ids"][row] == model.config.video_token_id
        whole = int(video.sum())
        first = whole * 60 // 100
        assert int(video[kept["language.2"][row]][kept["language.2"][row] >= 0].sum()) == first
        assert int(video[places[places >= 0]].sum()) == (3 * whole - 2 * whole - first) // 3


@pytest.fixture(scope="module")
def inside(prepared: Any) -> tuple[Any, Any]:
    model, traced = prepared("qwen2_5_vl")
    return model, traced.compile(INSIDE, verify=False)


def test_scores_of_packed_images_are_those_of_each_image_alone(inside: Any) -> None:
    """Their magnitude, which thresholds and sums of scores read; the untouched model under masks agrees."""
    model, compiled = inside
    inputs = support.inputs("qwen2_5_vl", 3)
    lengths = samples.image_lengths(model, inputs)
    together, answer = _scores(compiled, inputs)
    start = visual = 0
    for row, (one, length) in enumerate(zip(samples.singles(model, inputs, lengths), lengths, strict=True)):
        alone, single = _scores(compiled, one)
        for name, want in alone.items():
            got = together[name][start : start + length]
            torch.testing.assert_close(got, want, rtol=1e-5, atol=0, msg=lambda text, name=name: f"{name}: {text}")
        start += length
        left = int((answer.kept["language.2"][row] >= 0).sum())
        assert left == int((single.kept["language.2"] >= 0).sum())
        visual += left - (one["input_ids"].shape[1] - length)
    assert len(together) == len(SCORES)
    assert start == len(together[name])
    assert 0 < visual < start
    assert tvc.verify(compiled, model, inputs, steps=2).passed


def _scores(compiled: Any, inputs: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], Any]:
    """What the vision graph says of each visual token, by score; and the answer."""
    seen: dict[str, torch.Tensor] = {}
    run = compiled.engine.run

    def noting(component: str, given: Any) -> Any:
        out = run(component, given)
        seen.update({name: value for name, value in out.items() if component == "vision" and name.startswith(TAP)})
        return out

    with replaced(compiled.engine, "run", noting):
        answer = compiled(**inputs)
    return seen, answer


def test_a_video_beside_scores_of_the_encoder_is_refused(inside: Any) -> None:
    model, compiled = inside
    assert compiled(**support.inputs("qwen2_5_vl", 1)).kept["language.2"].shape[1] > 0
    with pytest.raises(InputError) as caught:
        compiled(**two_videos(model))
    assert caught.value.slug == "video-inside-encoder"


def test_a_family_whose_videos_go_another_way_is_refused(half: Any) -> None:
    model, compiled = half("video_llava")
    ids = torch.tensor([[1, 105, *[model.config.video_token_index] * 34, 130, 131]])
    pixels = torch.randn(1, 2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values_videos": pixels}
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()
    with pytest.raises(InputError) as caught:
        compiled(**inputs)
    assert caught.value.slug == "no-video"
    assert "pixel_values_videos" in caught.value.got


@pytest.mark.conformance
@pytest.mark.parametrize("tokens", (32, 128))
def test_a_family_that_pools_its_videos_is_refused(half: Any, tokens: int) -> None:
    """8 frames of 16 tokens, pooled to 4 each: the right number of placeholders, and what would fit unpooled."""
    model, compiled = half("llava_next_video")
    inputs = frames(model, tokens)
    with torch.no_grad():
        if tokens == 32:
            assert model(**inputs).logits.isfinite().all()
        else:
            with pytest.raises(ValueError, match="do not match"):
                model(**inputs)
    with pytest.raises(InputError) as caught:
        compiled(**inputs)
    assert caught.value.slug == "no-video"
    assert "multi_modal_projector" in caught.value.got


@pytest.mark.parametrize(("family", "same"), (("llava_onevision", True), ("llava_next_video", False)))
def test_the_way_of_videos_is_compared_with_that_of_images(family: str, same: bool) -> None:
    """One pools behind the projector, which the vision graph leaves to the family's code; the other before it."""
    surveyed = survey(meta_model(support.build_model(family).config), support.build_processor(family))
    departs = video_departs(surveyed.host, {"pixel_values_videos": torch.randn(1, 8, 3, 56, 56)})
    assert (departs == "") == same


@pytest.mark.conformance
def test_a_video_that_is_pooled_behind_the_projector_equals_the_untouched_model(half: Any) -> None:
    model, compiled = half("llava_onevision")
    assert tvc.verify(compiled, model, frames(model, 33)).passed
