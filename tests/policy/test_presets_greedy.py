"""The presets that take one token after another: what they select, step by step, from the formulas of their papers."""

from __future__ import annotations

import fractions
import math

import pytest
import torch

from tvc.kernels.op import Scope
from tvc.passes.reduction import decide
from tvc.policy import load_policy


def one_image(count: int) -> Scope:
    return Scope(torch.zeros(1, count, dtype=torch.int64), torch.tensor([[count]]), 1)


def select(
    preset: str, keep: int, feature: torch.Tensor, score: torch.Tensor | None = None, **taps: object
) -> list[int]:
    (step,) = load_policy(preset, set={"keep": keep}).steps
    assert step.select is not None
    given = None if score is None else score[None]
    taken = step.select.apply(given, one_image(len(feature)), feature=feature[None], **taps)
    return [index for index in taken[0].tolist() if index >= 0]


@pytest.mark.parametrize("count", [1, 2, 7, 33])
@pytest.mark.parametrize("keep", [1, 5, 33])
def test_divprune_maximises_the_smallest_distance_greedily(count: int, keep: int) -> None:
    feature = torch.randn(count, 16, generator=torch.Generator().manual_seed(count))
    unit = torch.nn.functional.normalize(feature.double(), dim=1)
    distance = 1 - unit @ unit.T
    # The published seed: the column whose second smallest distance is the largest (the smallest is the token itself).
    taken = [int(distance.sort(0).values[1].argmax())] if count > 1 else [0]
    while len(taken) < min(keep, count):
        rest = [token for token in range(count) if token not in taken]
        nearest = [min(float(distance[other, token]) for other in taken) for token in rest]
        taken.append(rest[nearest.index(max(nearest))])
    assert select("divprune", keep, feature) == sorted(taken)


@pytest.mark.parametrize("count", [1, 576, 577, 250, 750, 728, 2880])
def test_divprune_keeps_as_many_as_published(count: int) -> None:
    """`round(0.098 * n)`: 24.5 of 250 are 24, and 73.5 of 750 are 74."""
    (step,) = load_policy("divprune").steps
    number = round(fractions.Fraction(98, 1000) * count)
    assert step.select.kept([count]) == [number]
    assert step.select.keep.slots(count, 1) == number
    if count < 700:
        feature = torch.randn(1, count, 4, generator=torch.Generator().manual_seed(count))
        assert step.select.apply(None, one_image(count), feature=feature).shape == (1, number)


def test_divprune_repeats_no_token_where_others_are_duplicates() -> None:
    """Ten distinct vectors, four times each: the published rule finds ten tokens for twenty places."""
    feature = torch.randn(10, 8, generator=torch.Generator().manual_seed(0)).repeat(4, 1)
    taken = select("divprune", 20, feature)
    assert len(set(taken)) == 20
    assert {token % 10 for token in taken} == set(range(10))


def test_todre_starts_at_the_best_scored_token_and_leaves_its_likes() -> None:
    generator = torch.Generator().manual_seed(3)
    feature, score = torch.randn(21, 12, generator=generator), torch.rand(21, generator=generator)
    unit = torch.nn.functional.normalize(feature.double(), dim=1)
    taken = [int(score.argmax())]
    while len(taken) < 9:
        rest = [token for token in range(21) if token not in taken]
        alike = [sum(float(unit[token] @ unit[other]) for other in taken) for token in rest]
        taken.append(rest[alike.index(min(alike))])
    assert select("todre", 9, feature, score) == sorted(taken)


@pytest.mark.parametrize("keep", [1, 6, 12])
def test_cdpruner_follows_the_largest_determinant(keep: int) -> None:
    """Against determinants themselves; the op under test updates a Cholesky factor."""
    generator = torch.Generator().manual_seed(5)
    feature, relevance = torch.randn(12, 16, generator=generator), torch.rand(12, generator=generator)
    unit = torch.nn.functional.normalize(feature.double(), dim=1)
    weight = relevance.double() + 1e-6
    kernel = weight[:, None] * (unit @ unit.T) * weight
    taken: list[int] = []
    while len(taken) < keep:
        rest = [token for token in range(12) if token not in taken]
        volume = [float(torch.linalg.det(kernel[[*taken, token]][:, [*taken, token]])) for token in rest]
        taken.append(rest[volume.index(max(volume))])
    assert select("cdpruner", keep, feature, relevance) == sorted(taken)


@pytest.mark.parametrize(("prefer", "sign"), [("similar", 1), ("different", -1)])
def test_cdpruner_may_have_the_published_sign(prefer: str, sign: int) -> None:
    """Published: relevance is minus the cosine, from (r - min + 1e-6) / (max - min); ours is the cosine by default."""
    generator = torch.Generator().manual_seed(11)
    feature, words = torch.randn(14, 16, generator=generator), torch.randn(4, 16, generator=generator)
    policy = load_policy("cdpruner", set={"keep": 5} | ({} if prefer == "similar" else {"prefer": prefer}))
    unit = torch.nn.functional.normalize(feature.double(), dim=1)
    relevance = sign * (unit @ torch.nn.functional.normalize(words.double().mean(0), dim=0))
    weight = (relevance - relevance.min() + 1e-6) / (relevance.max() - relevance.min())
    kernel = weight[:, None] * (unit @ unit.T) * weight
    taken: list[int] = []
    for _ in range(5):
        rest = [token for token in range(14) if token not in taken]
        volume = [float(torch.linalg.det(kernel[[*taken, token]][:, [*taken, token]])) for token in rest]
        taken.append(rest[volume.index(max(volume))])
    taps = {"feature": feature[None], "text": (words[None], torch.ones(1, 4, dtype=torch.bool))}
    scope = one_image(14)
    given = (feature[None], torch.ones(1, 14), scope.segment, scope.counts)
    got = decide(policy.steps[0], *given, [taps], {"select": {"feature": feature[None]}})
    assert got.chosen[0].tolist() == sorted(taken)
    assert taken[0] == int(weight.argmax())


def test_cdpruner_takes_the_most_relevant_token_first() -> None:
    generator = torch.Generator().manual_seed(6)
    feature, relevance = torch.randn(30, 8, generator=generator), torch.rand(30, generator=generator)
    assert select("cdpruner", 1, feature, relevance) == [int(relevance.argmax())]


def test_cdpruner_with_more_places_than_directions_repeats_nothing() -> None:
    feature = torch.randn(15, 3, generator=torch.Generator().manual_seed(7))
    assert len(set(select("cdpruner", 10, feature, torch.ones(15)))) == 10


def mmtok(feature: torch.Tensor, words: torch.Tensor, keep: int) -> list[int]:
    """Coverage of both matrices with the published temperatures, one column after another."""
    image = torch.nn.functional.normalize(feature.double(), dim=1)
    text = torch.nn.functional.normalize(words.double(), dim=1)
    told = torch.softmax(text @ image.T / 0.02, 1) / len(text)
    seen = torch.softmax(image @ image.T / 0.2, 1) / len(image)
    rows = torch.cat([told, 0.5 * seen])
    have = torch.zeros(len(rows), dtype=torch.float64)
    taken: list[int] = []
    while len(taken) < keep:
        gain = (rows - have[:, None]).relu().sum(0)
        gain[taken] = -math.inf
        taken.append(int(gain.argmax()))
        have = torch.maximum(have, rows[:, taken[-1]])
    return taken


@pytest.mark.parametrize("keep", [1, 4, 17])
def test_mmtok_covers_text_and_picture(keep: int) -> None:
    generator = torch.Generator().manual_seed(8)
    feature, words = torch.randn(17, 16, generator=generator), torch.randn(5, 16, generator=generator)
    valid = torch.tensor([[True] * 5])
    assert select("mmtok", keep, feature, text=(words[None], valid)) == sorted(mmtok(feature, words, keep))


def test_mmtok_leaves_padded_text_out() -> None:
    generator = torch.Generator().manual_seed(9)
    feature, words = torch.randn(23, 16, generator=generator), torch.randn(6, 16, generator=generator)
    valid = torch.tensor([[False, False, True, True, True, True]])
    assert select("mmtok", 7, feature, text=(words[None], valid)) == sorted(mmtok(feature, words[2:], 7))


def test_mmtok_first_takes_the_largest_column_sum() -> None:
    generator = torch.Generator().manual_seed(10)
    feature, words = torch.randn(40, 16, generator=generator), torch.randn(3, 16, generator=generator)
    every = torch.ones(1, 3, dtype=torch.bool)
    assert select("mmtok", 1, feature, text=(words[None], every)) == mmtok(feature, words, 1)
