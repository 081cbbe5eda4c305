"""Presets that cluster: their steps on random numbers against the papers' formulas, in plain Python numbers."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from policy_cases import layout

from tvc.errors import SiteError
from tvc.kernels.op import Attention, Scope
from tvc.passes.insert_vision import _check_static
from tvc.passes.reduction import Decision, decide
from tvc.policy import Step, load_policy, resolve
from tvc.policy.budgets import leaving
from tvc.report.schedule import make_plan

Row = list[float]
HEADS, GROUPS, WIDTH, DEPTH = 4, 2, 6, 5


def step_of(name: str, *settings: str) -> Step:
    (step,) = resolve(load_policy(name, set=list(settings)), layout()).steps
    return step


def dot(a: Row, b: Row) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def apart(a: Row, b: Row) -> float:
    return max(0.0, 1 - dot(a, b) / math.sqrt(dot(a, a) * dot(b, b)))


def total(rows: list[Row]) -> Row:
    return [sum(column) for column in zip(*rows, strict=True)]


# CenterCLIP -----------------------------------------------------------------------------------------------------------


def medoids(x: list[Row], number: int) -> list[int]:
    """KKZ start; then, with all distances made negative and a token's own the lowest, the published rounds."""
    far = [[math.dist(a, b) for b in x] for a in x]
    shift = max(map(max, far)) + 1
    moved = [[value - shift - (i == j) for j, value in enumerate(row)] for i, row in enumerate(far)]
    norms = [round(math.sqrt(dot(row, row)), 9) for row in x]  # embedded tokens are all of one length
    centres = [norms.index(max(norms))]
    while len(centres) < number:
        nearest = [min(moved[i][c] for c in centres) for i in range(len(x))]
        centres.append(nearest.index(max(nearest)))
    for _ in range(100):
        home = [min(range(number), key=lambda k, i=i: moved[i][centres[k]]) for i in range(len(x))]
        after = []
        for k in range(number):
            sums = [sum(moved[i][j] for j in range(len(x)) if home[i] == home[j] == k) for i in range(len(x))]
            after.append(sums.index(min(sums)))
        if after == centres:
            break
        centres = after
    return sorted(centres)


@pytest.mark.parametrize(("tokens", "number"), [(98, 12), (49, 24), (31, 5), (7, 1), (5, 5)])
def test_centerclip(tokens: int, number: int) -> None:
    x = torch.randn(1, tokens, 6, generator=torch.Generator().manual_seed(tokens))
    step = step_of("centerclip", f"keep={number}")
    assert step.select is not None
    scope = Scope(torch.zeros(1, tokens, dtype=torch.int64), torch.tensor([[tokens]]), 1)
    # The published start may take a token twice only where tokens are copies.
    assert step.select.apply(None, scope, feature=x)[0].tolist() == medoids(x[0].tolist(), number)


@pytest.mark.parametrize(("tokens", "number", "sigma"), [(98, 12, 2), (49, 24, 1.5), (31, 5, 1), (7, 1, 2), (5, 5, 2)])
def test_centerclip_spectral(tokens: int, number: int, sigma: float) -> None:
    x = torch.randn(1, tokens, 6, generator=torch.Generator().manual_seed(tokens))
    step = step_of("centerclip-spectral", f"keep={number}", f"sigma={sigma}")
    assert step.select is not None
    scope = Scope(torch.zeros(1, tokens, dtype=torch.int64), torch.tensor([[tokens]]), 1)
    rows = x[0].tolist()
    near = np.array([[math.exp(-(math.dist(a, b) ** 2) / (2 * sigma**2)) for b in rows] for a in rows])
    degree = near.sum(1)
    laplacian = np.diag(degree**-0.5) @ (np.diag(degree) - near) @ np.diag(degree**-0.5)
    columns = np.linalg.eigh(laplacian)[1][:, :number]
    columns /= np.linalg.norm(columns, axis=1, keepdims=True)
    assert step.select.apply(None, scope, feature=x)[0].tolist() == medoids(columns.tolist(), number)


@pytest.mark.parametrize("name", ["centerclip", "centerclip-spectral"])
def test_centerclip_cuts_the_encoder_half_way(name: str) -> None:
    assert step_of(name).at == "vision.3"
    model = layout(vision=12, visual=(196,))
    steps = resolve(load_policy(name, set=["keep=81.7%"]), model).steps
    assert [(step.at, left) for step, _, left in leaving(steps, model)] == [("vision.6", [160])]


# PACT -----------------------------------------------------------------------------------------------------------------


def asked(q: torch.Tensor, k: torch.Tensor, h: torch.Tensor, last: int, visual: list[int], scale: float) -> Row:
    """[H, n, d] queries, [G, n, d] keys, [V, D] hidden: the mean query's attention times the norm of the hidden."""
    score = [0.0] * len(visual)
    for head in range(HEADS):
        mean = [value / (last + 1) for value in total(q[head, : last + 1].tolist())]
        logits = [dot(mean, k[head * GROUPS // HEADS, n].tolist()) * scale for n in visual]
        powers = [math.exp(value) for value in logits]
        for i, power in enumerate(powers):
            score[i] += power / sum(powers) / HEADS * math.sqrt(dot(h[i].tolist(), h[i].tolist()))
    return score


def pact(x: list[Row], keys: list[Row], score: Row, number: int, cutoff: float, reach: float) -> dict[int, Row]:
    """Centres by falling density among the best-scored; every other token joins the nearest within reach."""
    pool = sorted(range(len(x)), key=lambda i: -score[i])[:number]
    density = {i: sum(math.exp(-((apart(keys[i], keys[j]) / 2) ** 2)) for j in pool) for i in pool}
    centres: list[int] = []
    for i in sorted(pool, key=lambda i: -density[i]):
        if all(apart(keys[i], keys[c]) > cutoff for c in centres):
            centres.append(i)
    groups = {c: [c] for c in centres}
    for i in range(len(x)):
        home = min(centres, key=lambda c: apart(keys[i], keys[c]))
        if i not in groups and apart(keys[i], keys[home]) <= reach:
            groups[home].append(i)
    return {c: [value / len(group) for value in total([x[i] for i in group])] for c, group in groups.items()}


@pytest.mark.parametrize(("cutoff", "seed"), [(0.21, 0), (0.6, 1), (1.9, 2)])
def test_pact(cutoff: float, seed: int) -> None:
    visual, tokens = list(range(5, 45)), 55
    step = step_of("pact", f"cutoff={cutoff}", f"reach={min(2.0, 1.5 * cutoff)}")
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(1, HEADS, tokens, WIDTH, generator=generator)
    # Keys around a few directions, so that some are near each other.
    centres = torch.randn(8, GROUPS, WIDTH, generator=generator)
    key = centres[torch.randint(8, (tokens,), generator=generator)].transpose(0, 1)[None]
    key = key + torch.randn(1, GROUPS, tokens, WIDTH, generator=generator) * 0.3
    feature = torch.randn(1, len(visual), DEPTH, generator=generator)
    columns = torch.tensor(visual)[None, :, None]
    given = Attention(query, key, None, torch.arange(tokens)[None], columns, WIDTH**-0.5)
    metric = key[:, :, visual].transpose(1, 2).flatten(2)
    number = len(visual)
    segment, counts = torch.zeros(1, number, dtype=torch.int64), torch.tensor([[number]])
    score = asked(query[0], key[0], feature[0], visual[-1], visual, WIDTH**-0.5)
    scope = Scope(segment, counts, 1)
    mine = step.score[0].primitive.apply(scope=scope, feature=feature, attention=given)
    torch.testing.assert_close(mine[0], torch.tensor(score), rtol=1e-4, atol=1e-6)
    taps = {"select": {"metric": metric}, "rest": {"metric": metric}}
    scores = [{"feature": feature, "attention": given}]
    decision: Decision = decide(step, feature, torch.ones(1, number), segment, counts, scores, taps)
    want = pact(feature[0].tolist(), metric[0].tolist(), score, number * 55 // 100, cutoff, 1.5 * cutoff)
    assert decision.chosen[0].tolist() == sorted(want)
    assert 1 <= len(want) < number * 55 // 100
    assert decision.feature is not None
    torch.testing.assert_close(decision.feature[0], torch.tensor([want[i] for i in sorted(want)]), rtol=1e-4, atol=1e-5)


def test_pact_acts_in_front_of_the_fifth_layer_of_28() -> None:
    (step,) = resolve(load_policy("pact"), layout(language=28, visual=(576,))).steps
    assert step.at == "language.4"
    assert step.select is not None
    assert step.select.kept([576]) == [316]
    with pytest.raises(SiteError, match="turned-layer"):
        resolve(load_policy("pact", set=["steps.0.score.mean_query=language.1"]), layout(language=28))


# MustDrop -------------------------------------------------------------------------------------------------------------


def windows(x: list[Row], columns: int, above: float) -> dict[int, Row]:
    """3 x 3 windows whose 72 ordered pairs are alike on average, each as its mean in the place of its middle."""
    made = dict(enumerate(x))
    for top in range(0, len(x) // columns - 2, 3):
        for start in range(0, columns - 2, 3):
            tokens = [(top + r) * columns + start + c for r in range(3) for c in range(3)]
            alike = [1 - apart(x[i], x[j]) for i in tokens for j in tokens if i != j]
            if sum(alike) / 72 >= above:
                for token in tokens:
                    del made[token]
                made[tokens[4]] = [value / 9 for value in total([x[i] for i in tokens])]
    return made


@pytest.mark.parametrize("side", [6, 8, 24])
def test_mustdrop_merges_like_windows(side: int) -> None:
    model = layout(visual=(side * side,))
    model = dataclasses.replace(model, tile_tokens=side * side + 1)
    steps = resolve(load_policy("mustdrop"), model).steps
    generator = torch.Generator().manual_seed(side)
    # Noise of different strength around one direction in each window.
    rows, columns = torch.arange(side) // 3, torch.arange(side) // 3
    base = torch.randn(64, DEPTH, generator=generator)[rows[:, None] * 8 + columns]
    noise = torch.linspace(0.1, 1.2, 64)[rows[:, None] * 8 + columns][:, :, None]
    feature = (base + noise * torch.randn(side, side, DEPTH, generator=generator)).flatten(0, 1)[None]
    number = side * side
    segment, counts = torch.zeros(1, number, dtype=torch.int64), torch.tensor([[number]])
    decision = decide(steps[0], feature, torch.ones(1, number), segment, counts, [], {})
    want = windows(feature[0].tolist(), side, 0.8)
    assert decision.chosen[0].tolist() == sorted(want)
    assert decision.feature is not None
    torch.testing.assert_close(decision.feature[0], torch.tensor([want[i] for i in sorted(want)]), rtol=1e-4, atol=1e-5)
    assert int(decision.size.sum()) == number


@pytest.mark.parametrize(("share", "least"), [(0.05, 0.2), (0.03, 0.05), (0.9, 0.9)])
def test_mustdrop_filters_by_two_thresholds(share: float, least: float) -> None:
    asking, tokens, guarded = 7, 40, 4
    step = resolve(load_policy("mustdrop", set={"guarded": guarded, "share": share, "least": least}), layout()).steps[1]
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(1, HEADS, asking, WIDTH, generator=generator) * 2
    key = torch.randn(1, GROUPS, tokens + 5, WIDTH, generator=generator)
    columns = torch.arange(5, tokens + 5)[None, :, None]
    given = Attention(query, key, None, torch.arange(asking)[None], columns, WIDTH**-0.5)
    guard = torch.rand(1, tokens, generator=generator)
    paid = [[0.0] * tokens for _ in range(asking)]
    for row in range(asking):
        for head in range(HEADS):
            logits = [dot(query[0, head, row].tolist(), k) * WIDTH**-0.5 for k in key[0, head // 2].tolist()]
            powers = [math.exp(value) for value in logits]
            for n in range(tokens):
                paid[row][n] += powers[n + 5] / sum(powers) / HEADS
    sums = total(paid)
    guards = sorted(range(tokens), key=lambda n: -guard[0, n])[:guarded]
    gone = [n for n in range(tokens) if sums[n] < share * sum(sums) and max(row[n] for row in paid) < least]
    want = [n for n in range(tokens) if n not in gone or n in guards]
    segment, counts = torch.zeros(1, tokens, dtype=torch.int64), torch.tensor([[tokens]])
    feature = torch.randn(1, tokens, DEPTH, generator=generator)
    scores = [{"attention": given}, {"attention": given}, guard]
    decision = decide(step, feature, torch.ones(1, tokens), segment, counts, scores, {})
    assert decision.chosen[0].tolist() == want
    assert len(want) >= guarded


def test_mustdrop_acts_where_the_paper_does_and_leaves_the_number_open() -> None:
    model = dataclasses.replace(layout(vision=24, language=32, visual=(576,)), tile_tokens=577)
    steps = resolve(load_policy("mustdrop"), model).steps
    assert [step.at for step in steps] == ["language.0", *(f"language.{k}" for k in (3, 7, 11, 15))]
    assert [step.score[0].primitive.layer for step in steps[1:]] == [f"language.{k}" for k in (2, 6, 10, 14)]  # type: ignore[attr-defined]
    assert [left for _, _, left in leaving(steps, model)] == [[576]] * 5
    assert [step.evict for step in steps] == ["", *["language.2"] * 4]
    plan = make_plan(resolve(load_policy("mustdrop"), model), model)
    assert plan.fired is not None
    assert [layer.visual for layer in plan.fired.layers] == [64] * 3 + [0] * 29
    assert [layer.held - layer.text for layer in plan.fired.layers] == [64] * 2 + [0] * 30
    merge = steps[0].merge
    assert merge is not None
    assert merge.fewest([576]) == [64]
    with pytest.raises(SiteError, match="ragged-encoder"):
        _check_static(dataclasses.replace(steps[0], at="vision.1"))
