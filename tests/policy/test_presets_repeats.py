"""FrameFusion: its steps on films of numbers, layer after layer, against the paper's formulas."""

from __future__ import annotations

import math

import numpy
import pytest
import torch
from policy_cases import layout
from policy_formulas_video import Tokens, merged, upper

from tvc.errors import PolicyError, SiteError
from tvc.kernels.allowance import allowance
from tvc.kernels.budget import Budget
from tvc.kernels.merge_repeats import Repeats
from tvc.kernels.op import Scope
from tvc.kernels.select_afford import Afford
from tvc.passes.reduction import decide
from tvc.passes.taps import token_layers
from tvc.policy import load_policy, resolve

LAYERS = 28


def steps_of(*settings: str, layers: int = LAYERS):
    return resolve(load_policy("framefusion", set=list(settings)), layout(language=layers)).steps


def film(frames: int, places: int, seed: int, width: int = 6) -> numpy.ndarray:
    draw = numpy.random.default_rng(seed)
    jumps = draw.random((frames, places)) < draw.random(places) * 0.8
    steps = draw.normal(size=(frames, places, width)) * jumps[:, :, None]
    drift = 0.2 * draw.normal(size=steps.shape).cumsum(0)
    return draw.normal(size=(1, places, width)) + steps.cumsum(0) + drift


def cosine(a: numpy.ndarray, b: numpy.ndarray) -> float:
    return float(a @ b / numpy.linalg.norm(a) / numpy.linalg.norm(b))


@pytest.mark.parametrize(("frames", "places", "seed"), [(8, 12, 0), (16, 9, 1), (5, 21, 2), (1, 7, 3)])
@pytest.mark.parametrize("cost", [30, 12, 60])
def test_framefusion(frames: int, places: int, seed: int, cost: int) -> None:
    """Three layers that merge, each changing the tokens a bit, and the cut by attention behind them."""
    x, total = film(frames, places, seed), frames * places
    want: Tokens = {(p, t): (x[t, p], 1) for t in range(frames) for p in range(places)}
    at = torch.arange(total)[None]
    frame, place, size = at // places, at % places, torch.ones(1, total)
    feature = torch.from_numpy(x).flatten(0, 1)[None]
    ratios: list[float] = []
    held: list[int] = []  # tokens in each layer so far
    for layer, step in enumerate(steps_of(f"cost={cost}%")):
        assert step.at == f"language.{layer}"
        ordered = sorted(want, key=lambda token: (token[1], token[0]))
        counts = torch.tensor([[len(ordered)]])
        spent = (torch.tensor([[total]]), torch.tensor([[sum(held)]]))
        segment = torch.zeros(1, len(ordered), dtype=torch.int64)
        may_stay = len(ordered) * (1 - upper(ratios, cost / 100, layer, LAYERS)) + 1e-9
        if layer < 3:
            given = {"merge": {"frames": (frame, place), "spent": spent}}
            got = decide(step, feature, size, segment, counts, [], given)
            want = merged(want, 0.6, len(ordered) - max(1, math.floor(may_stay)))
            ratios.append(1 - len(want) / len(ordered))
        else:
            score = torch.rand(1, len(ordered), generator=torch.Generator().manual_seed(0))
            got = decide(step, feature, size, segment, counts, [score], {"select": {"spent": spent}})
            best = score[0].argsort(descending=True)[: max(1, math.floor(may_stay))].tolist()
            want = {ordered[i]: want[ordered[i]] for i in best}
        there = got.chosen[0]
        left = sorted(want, key=lambda token: (token[1], token[0]))
        assert [ordered[i] for i in there.tolist()] == left
        frame, place, size = frame[:, there], place[:, there], got.size
        assert size[0].tolist() == [want[token][1] for token in left]
        if layer < 3:
            rows = numpy.stack([want[token][0] for token in left])
            torch.testing.assert_close(got.feature[0], torch.from_numpy(rows), rtol=1e-6, atol=1e-6)
            # What the layer does to them.
            rows = rows + 0.05 * numpy.random.default_rng(layer).normal(size=rows.shape)
            want = {token: (row, want[token][1]) for token, row in zip(left, rows, strict=True)}
            feature = torch.from_numpy(rows)[None]
        held.append(len(want))
    mean = (sum(held) + (LAYERS - 4) * len(want)) / LAYERS
    assert mean <= cost / 100 * total or len(want) == 1


def test_a_still_film_is_one_frame_and_a_film_of_noise_meets_the_budget() -> None:
    """32 frames of 196 tokens: 30% on average over 28 layers, of which three hold them all."""
    first, *_, last = steps_of()
    total = 32 * 196
    at = torch.arange(total)[None]
    segment, counts = torch.zeros_like(at), torch.tensor([[total]])
    spent = (counts, torch.tensor([[0]]))
    given = {"merge": {"frames": (at // 196, at % 196), "spent": spent}}
    still = torch.randn(1, 196, 8, generator=torch.Generator().manual_seed(0)).repeat(1, 32, 1)
    # No more than 70% merge at once.
    assert decide(first, still, torch.ones(1, total), segment, counts, [], given).chosen.shape[1] == total * 3 // 10
    free = Repeats(above=0.6)
    assert free.apply(still, torch.ones(1, total), Scope(segment, counts, 1), given["merge"]["frames"])[0].tolist() == [
        list(range(196))
    ]
    spent = (counts, counts * 3)
    kept = decide(
        last, still, torch.ones(1, total), segment, counts, [torch.rand(1, total)], {"select": {"spent": spent}}
    )
    assert kept.chosen.shape[1] == (total * 300 * 28 // 1000 - 3 * total) // 25 == 1354


def test_an_overspent_budget_leaves_one_token_of_each_image() -> None:
    scope = Scope(torch.tensor([[-1, 0, 0, 1, 1, 1]]), torch.tensor([[2, 3, 0]]), 3)
    entered = torch.tensor([[2, 3, 0]])
    assert allowance(scope, (entered, entered * 9), 300, 28, 9).tolist() == [[1, 1, 0]]
    assert allowance(scope, (entered, entered * 0), 1000, 28, 0).tolist() == [[2, 3, 0]]


def test_images_that_share_a_budget_add_up_what_they_spent() -> None:
    shared = Scope(torch.tensor([[0] * 9]), torch.tensor([[9]]), 1)
    spent = (torch.tensor([[10, 20]]), torch.tensor([[30, 50]]))
    assert allowance(shared, spent, 500, 10, 4).tolist() == [[min(9, (15 * 10 - 80) // 6)]]
    more = Scope(torch.tensor([[0] * 20]), torch.tensor([[20]]), 1)
    assert allowance(more, spent, 500, 10, 4).tolist() == [[11]]


def test_layers_are_counted_by_stages() -> None:
    counts = [torch.tensor([[9, 4]]), torch.tensor([[5, 4]]), torch.tensor([[2, 1]])]
    assert token_layers(counts, [0, 3, 2]).tolist() == [[19, 14]]


def test_depth_is_the_models_and_the_site_the_steps() -> None:
    step = steps_of(layers=12)[-1]
    assert (step.select.depth, step.select.before) == (12, 3)
    again = resolve(load_policy(resolve(load_policy("framefusion"), layout()).to_yaml()), layout())
    assert again.steps[-1].select.depth == 12
    with pytest.raises(SiteError) as caught:
        resolve(load_policy("framefusion", set=["steps.1.select.afford={cost: 30%, depth: 28}"]), layout())
    assert caught.value.slug == "other-depth"
    assert [one.merge.before for one in steps_of(layers=12)[:-1]] == [0, 1, 2]
    with pytest.raises(PolicyError, match="no number of layers"):
        Afford(cost=Budget(permille=300)).apply(torch.ones(1, 2), Scope(*[torch.zeros(1, 2).long()] * 2, 1), ((), ()))
    with pytest.raises(SiteError) as caught:
        resolve(
            load_policy(
                {"version": 1, "steps": [{"at": "projector", "score": "uniform", "select": {"afford": "30%"}}]}
            ),
            layout(),
        )
    assert caught.value.slug == "decoder-only"


@pytest.mark.parametrize("merge", [{"scenes": {"by": {"cuts": 2}, "above": 0.5, "keep": "50%"}}, {"repeats": 0.5}])
def test_whole_frames_are_asked_for_where_gaps_would_matter(merge: dict) -> None:
    policy = load_policy({"version": 1, "steps": [{"at": "language.0..1", "merge": merge}]})
    if "repeats" in merge:
        assert len(resolve(policy, layout()).steps) == 2
        return
    with pytest.raises(SiteError) as caught:
        resolve(policy, layout())
    assert caught.value.slug == "no-frames"
