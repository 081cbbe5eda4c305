"""Presets that fold, absorb or merge what they do not keep: their steps on random numbers against the papers' formulas.

The references are written from the formulas with plain Python numbers and share nothing with the ops.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy
import pytest
import torch
from policy_cases import layout
from pydantic import ValidationError

from tvc.errors import PolicyError, SiteError
from tvc.kernels.budget import Budget
from tvc.kernels.op import Attention, Scope
from tvc.kernels.rest_absorb import Absorb
from tvc.kernels.rest_cells import Cells
from tvc.kernels.rest_fold import Fold
from tvc.kernels.rest_merge import Merge, StrideTargets
from tvc.kernels.score_attention import AttentionScore
from tvc.kernels.score_global import GlobalScore
from tvc.kernels.select_outliers import Outliers
from tvc.passes.insert_vision import _check_static
from tvc.passes.reduction import Decision, decide
from tvc.policy import Step, load_policy, resolve
from tvc.policy.budgets import leaving
from tvc.trace.observe import Seen
from tvc.verification.encoder import EncoderTaps

Row = list[float]
HEADS, WIDTH, DEPTH = 4, 8, 6


def steps_of(name: str, *settings: str, **depths: Any) -> tuple[Step, ...]:
    return resolve(load_policy(name, set=list(settings)), layout(**depths)).steps


def bundle(tokens: int, prefix: int, seed: int, sharp: float = 1.0) -> Attention:
    """The attention of one tile in which the first row is the CLS token's (of a prefix of 1), or all rows score."""
    torch.manual_seed(seed)
    query, key = (torch.randn(1, HEADS, tokens + prefix, WIDTH) * sharp for _ in range(2))
    rows = torch.zeros(1, 1, dtype=torch.int64) if prefix else torch.arange(tokens)[None]
    columns = torch.arange(prefix, tokens + prefix)[None, :, None]
    return Attention(query, key, None, rows, columns, WIDTH**-0.5)


def run(step: Step, feature: torch.Tensor, scores: list[Any], **taps: Any) -> Decision:
    """The step on one image."""
    tokens = feature.shape[1]
    segment, counts = torch.zeros(1, tokens, dtype=torch.int64), torch.tensor([[tokens]])
    return decide(step, feature, torch.ones(1, tokens), segment, counts, scores, taps)


def real(decision: Decision) -> tuple[list[int], torch.Tensor]:
    """(positions, values) without the pads."""
    there = decision.chosen[0] >= 0
    assert decision.feature is not None
    return decision.chosen[0][there].tolist(), decision.feature[0][there]


def softmax(values: Row) -> Row:
    powers = [math.exp(value - max(values)) for value in values]
    return [power / sum(powers) for power in powers]


def dot(a: Row, b: Row) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def cosine(a: Row, b: Row) -> float:
    return dot(a, b) / math.sqrt(dot(a, a) * dot(b, b))


def total(rows: list[Row], weights: Row) -> Row:
    return [dot(list(column), weights) for column in zip(*rows, strict=True)]


def agree(got: torch.Tensor, want: list[Row]) -> None:
    torch.testing.assert_close(got, torch.tensor(want), rtol=1e-4, atol=1e-5)


# PruMerge -------------------------------------------------------------------------------------------------------------


def prumerge(x: list[Row], q: list[Row], k: list[Row], near: list[Row], plus: bool, neighbours: int) -> dict[int, Row]:
    """q, k [1 + N, H d] of all heads side by side, `near` [N, d] keys that are compared; token -> row."""
    number = len(x)
    a = softmax([dot(q[0], key) / math.sqrt(len(key)) for key in k])[1:]
    low, high = numpy.percentile(a, [25, 75])
    outliers = sum(value > high + 1.5 * (high - low) for value in a)
    kept = sorted(range(number), key=lambda i: -a[i])[:outliers]
    if plus:
        step = int(int(1 / (outliers / number)) / 3)
        kept += [i for i in range(0, number - 1, step) if i not in kept]
    made = {}
    for i in kept:
        others = sorted((j for j in range(number) if j != i), key=lambda j, i=i: -cosine(near[i], near[j]))[:neighbours]
        made[i] = total([x[i], *(x[j] for j in others)], [1.0, *(a[j] for j in others)])
    dropped = [i for i in range(number) if i not in kept]
    if dropped:
        made[dropped[-1]] = total([x[j] for j in dropped], [a[j] for j in dropped])
    return made


@pytest.mark.parametrize("plus", [False, True], ids=["prumerge", "prumerge-plus"])
@pytest.mark.parametrize("seed", range(3))
def test_prumerge(plus: bool, seed: int) -> None:
    (step,) = steps_of("prumerge-plus" if plus else "prumerge", "neighbours=5")
    given, feature = bundle(64, 1, seed, sharp=1.5), torch.randn(1, 64, DEPTH)
    score = step.score[0].primitive.apply(given)
    metric = given.key[:, :, 1:].mean(1)
    got, values = real(run(step, feature, [score], rest={"metric": metric}))
    wide_q, wide_k = (tensor[0].transpose(0, 1).flatten(1).tolist() for tensor in (given.query, given.key))
    want = prumerge(feature[0].tolist(), wide_q, wide_k, metric[0].tolist(), plus, 5)
    assert len(want) > 2
    assert got == sorted(want)
    agree(values, [want[i] for i in got])


def whole(tokens: int) -> Scope:
    return Scope(torch.zeros(1, tokens, dtype=torch.int64), torch.tensor([[tokens]]), 1)


@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 144, 576, 729])
def test_the_number_of_outliers_is_numpys_and_never_more_than_planned(tokens: int) -> None:
    torch.manual_seed(tokens)
    for sharp in (0.5, 2.0):
        score = (torch.randn(1, tokens) * sharp).exp()
        low, high = numpy.percentile(score[0].double().numpy(), [25, 75])
        want = max(1, int((score[0].double() > high + 1.5 * (high - low)).sum()))
        selector = Outliers(keep=Budget(permille=1000))
        assert (selector.apply(score, whole(tokens)) >= 0).sum() == want
        (most,) = selector.kept([tokens])
        assert want <= most
        # With a fence of 0 and no equals all above the upper quartile are outliers: the most there can be.
        assert (Outliers(keep=Budget(permille=1000), fence=0.0).apply(score, whole(tokens)) >= 0).sum() == most


@pytest.mark.parametrize(("outliers", "samples"), [(32, 96), (36, 115), (40, 144), (144, 575)])
def test_prumerge_plus_spaces_by_a_third_of_the_outliers_gap(outliers: int, samples: int) -> None:
    """Of 576 tokens, every (576 // outliers // 3)-th of the first 575: the 6th, 5th, 4th and 1st."""
    score = torch.zeros(1, 576)
    score[:, 575 - outliers : 575] = 1.0
    fence = 1.5 if outliers < 144 else 0.0
    chosen = Outliers(keep=Budget(permille=1000), spread=3, fence=fence).apply(score, whole(576))[0]
    step = 576 // outliers // 3
    assert len(range(0, 575, step)) == samples
    assert set(chosen.tolist()) == set(range(0, 575, step)) | set(range(575 - outliers, 575))


def test_without_an_outlier_the_best_token_stays() -> None:
    scope = whole(10)
    assert Outliers(keep=Budget(permille=1000)).apply(torch.ones(1, 10), scope).tolist() == [[0]]
    assert Outliers(keep=Budget(permille=1000), spread=3).apply(torch.ones(1, 10), scope).tolist() == [[0, 3, 6]]
    assert Outliers(keep=Budget(count=2), spread=3).apply(torch.ones(1, 10), scope).tolist() == [[0, 3]]


def test_a_decode_step_has_no_outliers() -> None:
    none = Scope(torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2, 1, dtype=torch.int64), 0)
    assert Outliers(keep=Budget(count=3)).apply(torch.zeros(2, 0), none).shape == (2, 0)


@pytest.mark.parametrize("part", [{"select": Outliers(keep=Budget(count=3))}, {"rest": Cells()}], ids=str)
def test_the_encoder_refuses_what_only_the_run_can_count(part: dict[str, Any]) -> None:
    step = Step("vision.1", **{"select": load_policy("fastv").steps[0].select, **part})
    with pytest.raises(SiteError, match="ragged-encoder"):
        _check_static(step)


# VisionDrop -----------------------------------------------------------------------------------------------------------


def visiondrop(x: list[Row], keys: list[Row], score: Row, dominant: int, contextual: int) -> dict[int, Row]:
    """The best-scored, and every step-th of the others with the mean of what is nearest to it added."""
    made = {i: x[i] for i in sorted(range(len(x)), key=lambda i: -score[i])[:dominant]}
    others = [i for i in range(len(x)) if i not in made]
    targets = others[:: max(1, len(others) // contextual)][:contextual]
    near = {i: max(targets, key=lambda t: cosine(keys[i], keys[t])) for i in others if i not in targets}
    for t in targets:
        members = [x[i] for i in near if near[i] == t]
        made[t] = total([x[t], *members], [1.0, *[1 / max(1, len(members))] * len(members)])
    return made


@pytest.mark.parametrize(("number", "sizes"), [(1, (48, 30, 5)), (2, (35, 22, 4)), (3, (26, 16, 3))])
def test_a_stage_of_visiondrop(number: int, sizes: tuple[int, int, int]) -> None:
    tokens, dominant, contextual = sizes
    step = steps_of("visiondrop")[number]
    given = bundle(tokens, 0, number)
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()[None, None]
    feature = torch.randn(1, tokens, DEPTH)
    paid = [[0.0] * tokens for _ in range(HEADS)]
    for head in range(HEADS):
        keys = given.key[0, head].tolist()
        for row in range(tokens):
            query = given.query[0, head, row].tolist()
            for n, value in enumerate(softmax([dot(query, key) * given.scale for key in keys[: row + 1]])):
                paid[head][n] += value / tokens
    score = [sum(head[n] for head in paid) / HEADS for n in range(tokens)]
    metric = given.key.mean(1)
    decision = run(step, feature, [{"attention": given._replace(mask=causal)}], rest={"metric": metric})
    want = visiondrop(feature[0].tolist(), metric[0].tolist(), score, dominant, contextual)
    got, values = real(decision)
    assert got == sorted(want)
    assert len(got) == dominant + contextual
    agree(values, [want[i] for i in got])


# VisionZip ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "dominant", "contextual"), [(577 - 1, 54, 10), (577 - 1, 162, 30), (37, 1, 1), (37, 5, 4), (12, 8, 4)]
)
def test_visionzip_adds_means_of_the_nearest_to_evenly_spaced_tokens(
    tokens: int, dominant: int, contextual: int
) -> None:
    (step,) = steps_of("visionzip", f"keep={dominant}", f"contextual={contextual}", vision=24)
    (term,) = step.score
    assert (term.primitive.layer, term.primitive.heads, step.rest.layer) == ("vision.22", "sum", "vision.22")
    given = bundle(tokens, 1, tokens + dominant)
    feature, metric = torch.randn(1, tokens, DEPTH), given.key.mean(1)[:, 1:]
    score = [0.0] * tokens
    for head in range(HEADS):
        query = given.query[0, head, 0].tolist()
        paid = softmax([dot(query, key) * given.scale for key in given.key[0, head].tolist()])
        score = [sum(pair) for pair in zip(score, paid[1:], strict=True)]
    decision = run(step, feature, [term.primitive.apply(given)], rest={"metric": metric})
    want = visiondrop(feature[0].tolist(), metric[0].tolist(), score, dominant, contextual)
    got, values = real(decision)
    assert got == sorted(want)
    agree(values, [want[i] for i in got])


def test_visiondrop_has_the_published_schedule() -> None:
    model = layout(vision=24, language=32, visual=(576,))
    steps = resolve(load_policy("visiondrop"), model).steps
    assert [step.at for step in steps] == ["language.0", "language.8", "language.16", "language.24"]
    assert [left for _, _, left in leaving(steps, model)] == [[48], [35], [26], [19]]


def test_targets_of_a_merge_are_a_count_or_a_share() -> None:
    share = Merge.model_validate({"targets": {"stride": "10%"}})
    assert share.model_dump(mode="json")["targets"] == {"stride": "10%"}
    assert share.kept([48, 9], [30, 5]) == [34, 5]
    assert share.scaled(0.5).model_dump(mode="json")["targets"] == {"stride": "5%"}  # type: ignore[arg-type]
    assert Merge.model_validate({"targets": {"stride": 10}}).targets == StrideTargets(stride=10)
    for wrong in ({"average": 10}, 0.1, 0, "10"):
        with pytest.raises(ValidationError):
            Merge.model_validate({"targets": {"stride": wrong}})


# iLLaVA ---------------------------------------------------------------------------------------------------------------


def illava(x: list[Row], score: Row, removed: int) -> dict[int, Row]:
    """The removed + 1 lowest, ascending, with weights removed + 1, ..., 1, in the place of the highest of them."""
    tail = sorted(range(len(x)), key=lambda i: score[i])[: removed + 1]
    weights = [float(removed + 1 - i) for i in range(removed + 1)]
    made = {i: x[i] for i in range(len(x)) if i not in tail}
    return made | {tail[-1]: [value / sum(weights) for value in total([x[i] for i in tail], weights)]}


@pytest.mark.parametrize(("number", "removed"), [(0, 6), (-1, 12)])
def test_a_fold_of_illava(number: int, removed: int) -> None:
    step = steps_of("illava")[number]
    given, feature = bundle(40, -number, 8), torch.randn(1, 40, DEPTH)
    score = step.score[0].primitive.apply(given)[0].tolist()
    got, values = real(run(step, feature, [{"attention": given}]))
    want = illava(feature[0].tolist(), score, removed)
    assert got == sorted(want)
    agree(values, [want[i] for i in got])


def test_illava_folds_where_the_paper_does() -> None:
    model = layout(vision=27, language=28, visual=(729,), prefix=0)
    steps = resolve(load_policy("illava"), model).steps
    assert [step.at for step in steps] == ["vision.6", "vision.7", "vision.8", "vision.9", "language.8"]
    taken = [step.score[0].primitive.model_dump() for step in steps]
    assert [one["layer"] for one in taken] == ["vision.5", "vision.6", "vision.7", "vision.8", "language.7"]
    assert [one["of"] for one in taken] == ["all"] * 4 + ["last"]
    assert [left for _, _, left in leaving(steps, model)] == [[612], [513], [430], [361], [252]]


# VFlowOpt -------------------------------------------------------------------------------------------------------------


def attended(given: Attention, above: float) -> Row:
    """Mean over the global rows of what each pays, heads averaged."""
    number = given.query.shape[2]
    paid = [[0.0] * number for _ in range(number)]
    for head in range(HEADS):
        keys = given.key[0, head].tolist()
        for row in range(number):
            for n, value in enumerate(
                softmax([dot(given.query[0, head, row].tolist(), k) * given.scale for k in keys])
            ):
                paid[row][n] += value / HEADS
    mass = [sum(row[n] for row in paid) / number for n in range(number)]
    rows = [n for n in range(number) if mass[n] > above * sum(mass) / number]
    rows = rows or [mass.index(max(mass))]
    return [sum(paid[row][n] for row in rows) / len(rows) for n in range(number)]


@pytest.mark.parametrize("above", [1.2, 28.7])
def test_the_first_step_of_vflowopt(above: float) -> None:
    step = steps_of("vflowopt", f"above={above}", "keep=60%")[0]
    given, feature = bundle(64, 0, 5), torch.randn(1, 64, DEPTH)
    score = attended(given, above)
    torch.testing.assert_close(step.score[0].primitive.apply(given)[0], torch.tensor(score), rtol=1e-4, atol=1e-7)
    got, values = real(run(step, feature, [torch.tensor([score])]))
    kept = sorted(range(64), key=lambda i: -score[i])[:38]
    x = feature[0].tolist()
    want = {i: x[i] for i in kept}
    cells: dict[tuple[int, int], list[int]] = {}
    for i in range(64):
        if i not in kept:
            cells.setdefault((i // 8 * 3 // 8, i % 8 * 3 // 8), []).append(i)
    for members in cells.values():
        weights = [score[i] / sum(score[j] for j in members) for i in members]
        want[max(members, key=lambda i: score[i])] = total([x[i] for i in members], weights)
    assert got == sorted(want)
    agree(values, [want[i] for i in got])


def test_vflowopt_prunes_by_one_map_where_the_paper_does() -> None:
    model = dataclasses.replace(layout(vision=27, language=28, visual=(729,)), tile_tokens=730)
    steps = resolve(load_policy("vflowopt"), model).steps
    assert [step.at for step in steps] == ["language.0", "language.9", "language.18"]
    assert len({step.score[0].primitive for step in steps}) == 1
    assert steps[0].rest == Cells(cells=3, columns=27)
    assert [left for _, _, left in leaving(steps, model)] == [[527 + 9], [401], [195]]


def test_vflowopt_needs_a_grid() -> None:
    with pytest.raises(SiteError, match="no-grid"):
        steps_of("vflowopt", visual=(60,))
    with pytest.raises(PolicyError, match="unresolved-grid"):
        Cells().apply(torch.randn(1, 4, 2), torch.ones(1, 4), torch.tensor([[0, 1]]), torch.rand(1, 4), whole(4))


@pytest.mark.parametrize("above", [1.05, 28.7])
@pytest.mark.parametrize("packed", [False, True])
def test_the_definition_of_a_global_score_agrees_with_the_op(above: float, packed: bool) -> None:
    """What verification works out from an encoder's own attention, tile by tile or packed."""
    torch.manual_seed(7)
    query, key = torch.randn(2, HEADS, 9, WIDTH), torch.randn(2, HEADS, 9, WIDTH)
    taps = EncoderTaps(torch.arange(18), 18, [9, 9])
    seen = [Seen(query, key, key, None, 0.3)]
    mask, columns, image = None, torch.arange(9)[None, :, None].repeat(2, 1, 1), None
    if packed:
        seen = [Seen(query[i : i + 1], key[i : i + 1], key, None, 0.3) for i in range(2)]
        query, key = (tensor.transpose(0, 1).flatten(1, 2)[None] for tensor in (query, key))
        mask = torch.block_diag(torch.ones(9, 9), torch.ones(9, 9)).bool()[None, None]
        columns, image = torch.arange(18)[None, :, None], torch.arange(18)[None] // 9
    rows = torch.arange(query.shape[2]).repeat(query.shape[0], 1)
    given = Attention(query, key, mask, rows, columns, 0.3, image)
    score = GlobalScore(above=above).apply(given)
    torch.testing.assert_close(taps.of_global(seen, above), score.flatten(), rtol=1e-5, atol=1e-7)
    joined = AttentionScore(of="all", heads="joined").apply(given)
    torch.testing.assert_close(taps.attention(seen, "all", "joined"), joined.flatten(), rtol=1e-5, atol=1e-7)


# What all of them share -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rest", [Absorb(), Absorb(extra=True), Fold(), Cells()], ids=lambda rest: rest.key)
def test_weights_need_a_score(rest: Any) -> None:
    assert rest.needs_score
    with pytest.raises(PolicyError, match="score"):
        rest.apply(torch.randn(1, 4, 2), torch.ones(1, 4), torch.tensor([[0, 1]]), None, whole(4))


@pytest.mark.parametrize("rest", [Absorb(extra=True), Fold(), Cells(cells=2, columns=3)], ids=lambda rest: rest.key)
@pytest.mark.parametrize("images", [(9, 4), (1, 0), (16,)])
def test_no_token_is_lost_and_no_more_stay_than_planned(rest: Any, images: tuple[int, ...]) -> None:
    torch.manual_seed(len(images))
    segment = torch.repeat_interleave(torch.arange(len(images)), torch.tensor(images))[None]
    scope = Scope(segment, torch.tensor([images]), len(images))
    tokens = sum(images)
    score, feature = torch.rand(1, tokens), torch.randn(1, tokens, DEPTH)
    chosen = load_policy("fastv", set=["keep=3"]).steps[0].select.apply(score, scope)  # type: ignore[union-attr]
    index, values, sizes = rest.apply(feature, torch.ones(1, tokens), chosen, score, scope)
    there = index[0] >= 0
    assert values.shape[:2] == sizes.shape == index.shape
    assert sizes[0].sum() == tokens
    assert not values[0][~there].any()
    planned = rest.kept(list(images), [min(3, n) for n in images])
    assert there.sum() <= sum(planned)
    if rest.exact:
        assert there.sum() == sum(planned)
