"""Plans of policies whose budgets are matters of frames: of a video, of frames that come as images, and of an image."""

from __future__ import annotations

import dataclasses
import pathlib

import pytest

import tvc
from tvc.errors import ArgumentError, SiteError
from tvc.policy import load_policy
from tvc.program import Layer, Layout, Site, spread
from tvc.report.cost import one_image, shown
from tvc.report.plan import Plan
from tvc.report.schedule import plan_policy

LAYERS = 8
FOR_ALL = {"keep": 100, "together": True}
LAYER = Layer(1000, 4, 2, 16)
# A frame is 196 tokens of a tile of 27 x 27 patches, as in LLaVA-OneVision.
IMAGE = Layout(
    model_type="test",
    hidden_size=64,
    vocabulary=100,
    language=(LAYER,) * LAYERS,
    vision=(Layer(500, 2, 2, 8),) * 4,
    prefix_tokens=0,
    group=3,
    tiles=1,
    tile_tokens=729,
    visual_tokens=(196,),
    patch_linear=588,
    projector_linear=90,
    head_linear=6400,
    element_size=2,
    sites=tuple(Site(f"language.{i}", True) for i in range(LAYERS)),
)
TOLD = dataclasses.replace(IMAGE, serial=True, spatial=True)  # positions tell the frames of a video
PACKED = dataclasses.replace(TOLD, group=4, tile_tokens=784, in_order=False)
SQUARE = dataclasses.replace(TOLD, group=1, tile_tokens=196)  # no token in front of a tile


def planned(name: str, layout: Layout, *settings: str) -> Plan:
    return plan_policy(load_policy(name, set=list(settings)), layout)


def behind(plan: Plan) -> list[int]:
    return [layer.visual for layer in plan.layers]


@pytest.mark.parametrize(
    ("preset", "left"),
    [
        # Eight whole frames of 32 and, as the last group is half done, the last but one; 58 of the 23 others.
        ("dycoke", 9 * 196 + 23 * 58),
        ("evs", 32 * 196 // 4),
        ("stc", 32 * 60),
        ("frame-stride", 8 * 196),
    ],
)
@pytest.mark.parametrize("layout", [TOLD, PACKED])
def test_a_video_keeps_what_its_presets_say(preset: str, left: int, layout: Layout) -> None:
    plan = planned(preset, shown(layout, 32))
    assert plan.visual_tokens == (6272,)
    assert behind(plan) == [left] * LAYERS
    assert plan.compiled.kv_bytes == LAYERS * 2 * 2 * 16 * 2 * (left + 64)
    assert (plan.fired, plan.alone, plan.exact, plan.frames) == (None, (), True, 32)
    assert "6272 visual + 64 text tokens, video of 32 frames" in plan.text()


def test_counts_of_presets_are_those_of_their_golden_runs() -> None:
    """3098 is what dycoke's op leaves of 32 frames of 196 tokens; see tests/policy/test_presets_video.py."""
    lefts = [behind(planned(name, shown(TOLD, 32)))[0] for name in ("dycoke", "evs", "stc")]
    assert lefts == [3098, 1568, 1920]


@pytest.mark.parametrize("frames", [1, 2, 3, 5, 31, 32])
def test_whole_frames_stay_in_steps(frames: int) -> None:
    stays = len(range(0, frames, 5))
    assert behind(planned("frame-stride", shown(TOLD, frames), "every=5")) == [stays * 196] * LAYERS
    # Without axes of rows and columns frames come as images, which that preset takes for one video.
    plan = planned("frame-stride", shown(IMAGE, frames), "every=5")
    assert behind(plan) == [stays * 196] * LAYERS
    assert plan.visual_tokens == (196,) * frames


def test_of_images_each_is_a_frame_of_its_own() -> None:
    plan = planned("dycoke", shown(IMAGE, 32))
    assert behind(plan) == [6272] * LAYERS
    assert (plan.fired, plan.alone) == (None, ("language.0",))
    assert "32 x 196 visual" in plan.text()
    assert "language.0: about the frames of a video, and each image is one; with scope: sequence" in plan.text()
    together = planned("dycoke", shown(IMAGE, 32), "steps.0.scope=sequence")
    assert behind(together) == [3098] * LAYERS
    assert together.alone == ()


def test_an_image_keeps_all_and_the_plan_says_why() -> None:
    plan = planned("evs", TOLD)
    assert behind(plan) == [196] * LAYERS
    assert plan.fired is None
    assert "language.0: about the frames of a video, and an image is one; plan a video with --frames N" in plan.text()
    assert plan.to_json()["alone"] == ("language.0",)
    assert "--frames" not in planned("fastv", TOLD).text()


@pytest.mark.parametrize(("preset", "layout"), [("prunevid", TOLD), ("holitom", TOLD), ("fastvid", IMAGE)])
def test_what_content_decides_is_planned_as_a_bound(preset: str, layout: Layout) -> None:
    plan = planned(preset, shown(layout, 32))
    most = {"prunevid": 32 * 98, "holitom": 627 + 32 + 16, "fastvid": 32 * 12 + 32 * 7}[preset]
    assert plan.layers[0].visual == most
    assert plan.fired is not None
    assert plan.fired.layers[0].visual < most
    assert "decided at run time: the counts above are the most" in plan.text()


def test_windows_over_frames_are_counted_where_rows_are_known() -> None:
    """Windows of two by two over four of ten frames of 14 x 14."""
    written = ("steps.0.merge.frame_windows.columns=14",)
    assert behind(planned("pool-3d", shown(TOLD, 10), *written)) == [3 * 49] * LAYERS
    assert planned("pool-3d", shown(TOLD, 10), *written).fired is None
    assert planned("pool-3d", shown(TOLD, 10)).fired is not None


def test_caches_hold_means_of_the_frames_of_a_video() -> None:
    """Ten frames in chunks of four: the first chunk and the last, of two frames, stay; of the others 49 of 196."""
    policy = {"version": 1, "cache": {"pool": {"tokens": 4, "chunk": 4, "first": 1, "last": 1}}}
    plan = plan_policy(load_policy(policy), shown(TOLD, 10))
    assert [layer.held for layer in plan.layers] == [6 * 196 + 4 * 49 + 64] * LAYERS
    assert (plan.exact, plan.alone) == (True, ())
    assert plan_policy(load_policy(policy), TOLD).alone == ("cache",)
    # Behind a choice among the tokens of the video only the run tells how many each of its frames has.
    steps = [{"at": "language.2", "score": "norm", "select": {"top": "50%"}}]
    chosen = plan_policy(load_policy({**policy, "steps": steps}), shown(TOLD, 10))
    assert behind(chosen) == [1960] * 2 + [980] * 6
    assert not chosen.exact
    assert "frames of a video share one budget" in chosen.text()
    assert plan_policy(load_policy({"version": 1, "steps": steps}), shown(TOLD, 10)).exact


def test_what_passes_layers_by_leaves_frames_whole() -> None:
    past = {"at": "language.1", "score": "norm", "select": {"top": "50%"}, "until": "language.3"}
    late = {"at": "language.4", "select": {"every": 4}}
    plan = plan_policy(load_policy({"version": 1, "steps": [past, late]}), shown(TOLD, 10))
    assert behind(plan) == [1960, 980, 980, 1960] + [3 * 196] * 4


@pytest.mark.parametrize("layout", [IMAGE, TOLD, PACKED, SQUARE])
def test_frames_cost_the_encoder_as_much_as_images(layout: Layout) -> None:
    """An encoder attends within a frame, whether it packs all of them or is given one at a time."""
    video = shown(layout, 7)
    assert planned("fastv", video).dense.vision == 7 * planned("fastv", layout).dense.vision
    assert sum(video.visual_tokens) == 7 * 196
    assert shown(layout, 4).columns("language") == layout.columns("language")
    assert shown(layout, 1) == layout
    if layout.serial:
        assert one_image(video) == video


@pytest.mark.parametrize(
    "steps",
    [
        [{"at": "vision.2", "score": "norm", "select": {"top": "30%"}}],
        [{"at": "language.0", "score": {"attention": {"of": "all", "layer": "vision.-2"}}, "select": {"top": "30%"}}],
        [{"at": "language.0", "select": {"regions": "30%"}}],
    ],
)
def test_steps_that_no_video_is_given_to_are_planned_for_images_alone(steps: list[dict[str, object]]) -> None:
    """Neither cuts of the encoder nor looks at it or at pixels; frames that come as images have them."""
    policy, sites = load_policy({"version": 1, "steps": steps}), (*SQUARE.sites, Site("vision.2", True))
    model = dataclasses.replace(SQUARE, sites=sites)
    with pytest.raises(SiteError) as caught:
        plan_policy(policy, shown(model, 5))
    assert caught.value.slug == "video-inside-encoder"
    plan = plan_policy(policy, shown(dataclasses.replace(model, serial=False), 5))
    assert plan.layers[0].visual in (5 * 58, 5 * 196)


def test_a_video_without_frames_is_refused() -> None:
    with pytest.raises(ArgumentError, match="a video has no frames"):
        shown(TOLD, 0)


def test_a_budget_of_a_video_is_solved_by_its_frames() -> None:
    """The largest average that is no more than asked for: windows keep one frame of four whole."""
    sizes = shown(TOLD, 8)
    plan = plan_policy(load_policy("dycoke", set=["bug_compatible=false"]), sizes, average_tokens=2 * 196 + 6 * 30)
    assert behind(plan) == [2 * 196 + 6 * 30] * LAYERS
    again = load_policy("dycoke", set=["bug_compatible=false", *(f"{key}={value}" for key, value in plan.settings)])
    assert behind(plan_policy(again, sizes)) == behind(plan)


def test_a_share_of_a_prompt_is_one_of_all_its_frames() -> None:
    """A quarter of nine images that are one video: 324 tokens, where the count that the policy names leaves 144."""
    model = pathlib.Path(__file__).parents[2] / "examples" / "models" / "tiny-llava"
    steps = [{"at": "language.0", "scope": "sequence", "score": "change", "select": {"frames": FOR_ALL}}]
    policy = {"version": 1, "name": "shared", "steps": steps}
    assert behind(tvc.plan(model, policy, frames=9))[0] == 144  # a frame's worth at least
    assert behind(tvc.plan(model, policy, frames=9, budget="25%"))[0] == 9 * 144 // 4
    assert behind(tvc.plan(model, policy))[0] == 144


def test_numbers_are_divided_in_proportion() -> None:
    assert spread(10, [1, 1, 1]) == [3, 3, 4]
    assert spread(7, [0, 6, 0, 8]) == [0, 3, 0, 4]
    assert spread(0, [3, 4]) == spread(5, [0, 0]) == [0, 0]
