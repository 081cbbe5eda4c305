"""Presets that divide a video into scenes: their steps on films of numbers against the papers' formulas."""

from __future__ import annotations

import itertools

import numpy
import pytest
import torch
from policy_cases import layout
from policy_formulas_scenes import Film, fastvid, holitom, prunevid, refine, saved, scenes_by_clusters, spans

from tvc.kernels.merge_scenes import scenes_of
from tvc.kernels.op import Attention, Scope
from tvc.passes.reduction import Decision, decide
from tvc.policy import Step, load_policy, resolve


def steps_of(name: str, *settings: str) -> tuple[Step, ...]:
    return resolve(load_policy(name, set=list(settings)), layout(language=32)).steps


def film(frames: int, places: int, seed: int, width: int = 6, moving: float = 0.4, noise: float = 0.05) -> Film:
    """Places that jump now and then, some of them seldom; scenes change where all of them jump."""
    draw = numpy.random.default_rng(seed)
    rare = draw.random(places) * moving
    jumps = (draw.random((frames, places)) < rare) | (draw.random((frames, 1)) < 0.15)
    steps = draw.normal(size=(frames, places, width)) * jumps[:, :, None]
    return (draw.normal(size=(1, places, width)) + steps.cumsum(0) + noise * draw.normal(size=steps.shape)).astype("f4")


def chunk(x: Film) -> tuple[torch.Tensor, Scope, tuple[torch.Tensor, torch.Tensor]]:
    frames, places, _ = x.shape
    at = torch.arange(frames * places)[None]
    scope = Scope(torch.zeros_like(at), torch.tensor([[frames * places]]), 1)
    return torch.from_numpy(x).flatten(0, 1)[None], scope, (at // places, at % places)


def run(step: Step, x: Film) -> Decision:
    feature, scope, frames = chunk(x)
    size = torch.ones(feature.shape[:2])
    return decide(step, feature, size, scope.segment, scope.counts, [], {"merge": {"frames": frames}})


def agree(decision: Decision, want: dict[int, tuple[numpy.ndarray, int]]) -> None:
    """Which tokens are left, what they are, and how many each stands for."""
    there = decision.chosen[0] >= 0
    assert decision.chosen[0][there].tolist() == sorted(want)
    values = numpy.stack([want[i][0] for i in sorted(want)])
    assert decision.feature is not None
    torch.testing.assert_close(decision.feature[0][there], torch.from_numpy(values).float(), rtol=1e-4, atol=1e-5)
    assert decision.size[0][there].tolist() == [want[i][1] for i in sorted(want)]


# PruneVID -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "lengths"),
    [
        ([0, 0, 0, 1, 1, 1], [3, 3]),
        ([0, 0, 1, 1, 1, 0, 0], [2, 3, 2]),  # both runs of a cluster are its longest
        ([0, 1, 0, 1], [4]),  # none is left
        ([0, 0, 0, 1, 2, 2], [4, 2]),  # a frame alone joins the longer neighbour
        ([0, 0, 1, 2, 2], [3, 2]),  # the earlier one of equals
        ([1, 0, 0, 2, 2, 2, 0], [3, 4]),  # at both ends
        ([0, 0, 1, 0, 2, 2, 2, 2], [2, 6]),
    ],
)
def test_the_reference_refines_by_hand(labels: list[int], lengths: list[int]) -> None:
    assert refine(labels) == lengths


def lengths_of(scene: torch.Tensor, places: int) -> list[int]:
    return [len(list(group)) // places for _, group in itertools.groupby(scene[0].tolist())]


@pytest.mark.parametrize(("frames", "places", "seed"), [(16, 20, 0), (16, 33, 1), (9, 40, 2), (4, 18, 3), (1, 17, 4)])
def test_prunevid_merges(frames: int, places: int, seed: int) -> None:
    x = film(frames, places, seed)
    step, _ = steps_of("prunevid")
    feature, scope, at = chunk(x)
    assert lengths_of(scenes_of(step.merge.by, 0.8, feature, scope, at), places) == scenes_by_clusters(x)
    want = prunevid(x, 0.8)
    assert 0 < len(want) < frames * places
    agree(run(step, x), want)


def test_prunevid_of_a_still_film_leaves_half_a_frame() -> None:
    """16 frames of 144 tokens that stand still: one scene, of whose 144 places half stay."""
    x = numpy.repeat(film(1, 144, 5), 16, 0)
    step, _ = steps_of("prunevid")
    decision = run(step, x)
    assert int((decision.chosen >= 0).sum()) == 72
    assert decision.chosen.max() < 144
    assert decision.size.sum() == 16 * 144


def test_prunevid_of_a_film_of_noise_leaves_half_of_each_frame() -> None:
    x = numpy.random.default_rng(0).normal(size=(16, 144, 8)).astype("f4")
    step, _ = steps_of("prunevid")
    places = run(step, x).chosen[0] // 144
    assert torch.bincount(places, minlength=16).tolist() == [72] * 16


def test_prunevid_asks_the_head_and_the_word_that_look_hardest() -> None:
    _, step = steps_of("prunevid")
    assert (step.at, step.evict) == ("language.11", "language.0")
    torch.manual_seed(0)
    query, key = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8)
    given = Attention(query, key, None, torch.tensor([[6, 7, 8]]), torch.arange(6)[None, :, None], 8**-0.5)
    paid = ((query @ key.repeat_interleave(2, 1).transpose(2, 3)) * 8**-0.5).softmax(-1)
    want = paid[:, :, 6:, :6].amax((1, 2))
    torch.testing.assert_close(step.score[0].primitive.apply(given), want)
    feature, ones, counts = torch.randn(1, 6, 4), torch.ones(1, 6), torch.tensor([[6]])
    kept = decide(step, feature, ones, torch.zeros(1, 6, dtype=torch.int64), counts, [want], {}).chosen[0]
    assert kept.tolist() == sorted(want[0].topk(6 * 40 // 100).indices.tolist())


# HoliTom --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("frames", "places", "seed"), [(9, 12, 0), (10, 21, 1), (7, 30, 2), (2, 25, 3), (1, 19, 4)])
@pytest.mark.parametrize("share", ["10%", "25%"])
def test_holitom(frames: int, places: int, seed: int, share: str) -> None:
    x = film(frames, places, seed)
    policy = load_policy("holitom")
    still = policy.budgets[share]["still"]
    step = resolve(policy.with_settings(policy.budgets[share]), layout(language=32)).steps[0]
    feature, scope, at = chunk(x)
    windows = lengths_of(scenes_of(step.merge.by, still, feature, scope, at), places)
    # No division into windows saves more: all of them, a bit for each pair of frames that is divided.
    divisions = [
        [len(run) for run in "".join("ab"[bit] for bit in bits).replace("b", "b ").split()] if frames > 1 else [1]
        for bits in ([*cut, 0] for cut in itertools.product((0, 1), repeat=frames - 1))
    ]
    assert all(sum(division) == frames for division in divisions)
    best = max(
        sum(saved(x, *span, still) for span in spans(division) if span[1] - span[0] > 1) for division in divisions
    )
    assert sum(saved(x, *span, still) for span in spans(windows) if span[1] - span[0] > 1) == best
    agree(run(step, x), holitom(x, windows, still, int(share[:-1]) / 100, 0.6))


def test_holitom_counts() -> None:
    """12 frames of 196 tokens: of noise each frame keeps a tenth, rounded up; of a still film all of one frame."""
    step, inside = steps_of("holitom")
    noise = numpy.random.default_rng(0).normal(size=(12, 196, 64)).astype("f4")
    assert torch.bincount(run(step, noise).chosen[0] // 196, minlength=12).tolist() == [20] * 12
    still = numpy.repeat(noise[:1], 12, 0)
    assert run(step, still).chosen[0].tolist() == list(range(196))
    # Half of the places stand still: 98 + 12 * 98 tokens are left, a tenth of 2352 is a share of 0.1846 of them.
    mixed = numpy.where(numpy.arange(196)[None, :, None] % 2 == 0, still, noise)
    counts = torch.bincount(run(step, mixed).chosen[0] // 196, minlength=12).tolist()
    assert counts == [18 + 19, *[19] * 11]
    assert inside.at == "language.20"  # 65% of 32; of 28 it is 18
    assert resolve(load_policy("holitom"), layout(language=28)).steps[1].at == "language.18"
    assert inside.select.kept([627, 625]) == [314, 312]  # round(n / 2), which goes to the even one of two


def test_holitom_halves_inside_the_decoder() -> None:
    """Each dropped token goes to the kept one it is most like, one after another."""
    _, step = steps_of("holitom")
    torch.manual_seed(1)
    x, score = torch.randn(1, 12, 5), torch.rand(1, 12)
    segment, counts = torch.zeros(1, 12, dtype=torch.int64), torch.tensor([[12]])
    got = decide(step, x, torch.ones(1, 12), segment, counts, [score], {})
    kept = sorted(score[0].topk(6).indices.tolist())
    near = torch.nn.functional.normalize(x[0], dim=1)
    want = {i: x[0, i] for i in kept}
    for i in range(12):
        if i not in kept:
            goal = max(kept, key=lambda j, i=i: float(near[i] @ near[j]))
            want[goal] = (want[goal] + x[0, i]) / 2
    assert got.chosen[0].tolist() == kept
    torch.testing.assert_close(got.feature[0], torch.stack([want[i] for i in kept]), rtol=1e-5, atol=1e-6)


# FastVID --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("frames", "places", "seed"), [(16, 60, 0), (9, 60, 1), (5, 90, 2), (1, 60, 3)])
def test_fastvid(frames: int, places: int, seed: int) -> None:
    x, attention = film(frames, places, seed), numpy.random.default_rng(seed).random((frames, places))
    (step,) = steps_of("fastvid", "scenes=3")
    feature, _, at = chunk(x)
    score = torch.from_numpy(attention).float().flatten()[None]
    taps = {"select": {"frames": at}, "rest": {"frames": at}}
    # An image a frame, as a prompt holds them.
    counts = torch.full((1, frames), places)
    got = decide(step, feature, torch.ones(score.shape), at[0], counts, [score], taps)
    want = fastvid(x, attention, 3, 0.9, places * 62 // 1000, places * 36 // 1000)
    there = got.chosen[0] >= 0
    assert got.chosen[0][there].tolist() == sorted(want)
    values = torch.from_numpy(numpy.stack([want[i][0] for i in sorted(want)])).float()
    torch.testing.assert_close(got.feature[0][there], values, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.size[0][there], torch.tensor([want[i][1] for i in sorted(want)]), rtol=1e-5, atol=0)
    assert float(got.size.sum()) == pytest.approx(frames * places)


@pytest.mark.parametrize("frames", [8, 16])
def test_fastvid_leaves_19_of_196_tokens_of_each_frame_of_a_scene(frames: int) -> None:
    """12 salient ones and 7 in anchors, which stand together in every fourth frame: 9.7%."""
    x = numpy.repeat(numpy.random.default_rng(0).normal(size=(1, 196, 16)), frames, 0)
    x = (x + 0.01 * numpy.random.default_rng(1).normal(size=x.shape)).astype("f4")
    (step,) = steps_of("fastvid", "scenes=1")
    feature, _, at = chunk(x)
    taps = {"select": {"frames": at}, "rest": {"frames": at}}
    score = torch.rand(feature.shape[:2], generator=torch.Generator().manual_seed(0))
    got = decide(step, feature, torch.ones_like(score), at[0], torch.full((1, frames), 196), [score], taps)
    assert torch.bincount(got.chosen[0] // 196, minlength=frames).tolist() == [12, 12, 12, 12 + 28] * (frames // 4)
    assert got.chosen.shape[1] == 19 * frames
