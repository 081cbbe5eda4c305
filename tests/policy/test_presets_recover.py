"""The preset recoverable: its step on random numbers against the formulas of the paper and of scikit-learn."""

from __future__ import annotations

import math

import numpy
import pytest
import torch
from policy_cases import layout
from sklearn.neighbors import LocalOutlierFactor

from tvc.errors import PolicyError
from tvc.kernels.local_outliers import local_outliers
from tvc.kernels.rest_recycle import Recycle
from tvc.kernels.select_recover import Recover
from tvc.passes.reduction import decide
from tvc.policy import Step, load_policy, resolve
from tvc.policy.budgets import leaving

Row = list[float]


def step_of(*settings: str) -> Step:
    (step,) = resolve(load_policy("recoverable", set=list(settings)), layout()).steps
    return step


def ratio(values: Row, neighbours: int) -> float:
    """The share of outliers, as the published code asks scikit-learn for it."""
    found = LocalOutlierFactor(n_neighbors=min(neighbours, len(values) - 1), contamination="auto")
    found.fit(numpy.asarray(values)[:, None])
    return float((-found.negative_outlier_factor_ > 1.5).sum()) / len(values)


def cosine(a: Row, b: Row) -> float:
    length = math.sqrt(sum(x * x for x in a) * sum(x * x for x in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / length


def recoverable(x: list[Row], keys: list[Row], a: Row, s: Row, near: int) -> dict[int, Row]:
    """s: likeness to the text, which counts 1.8 times among neighbours."""
    number = len(x)
    kept = sorted(range(number), key=lambda i: -a[i])[: round(number * ratio(a, 20))]
    low = min(s)
    like = [low if i in kept else value for i, value in enumerate(s)]
    more = int((number - len(kept)) * round(number * ratio(like, 20)) / number)
    kept += sorted((i for i in range(number) if i not in kept), key=lambda i: -like[i])[:more]
    rest = [i for i in range(number) if i not in kept]
    share = ratio([a[i] for i in rest], 10)
    centres = sorted(rest, key=lambda i: -a[i])[: int(len(kept) * round(share * len(rest)) / len(rest))]
    made = {i: x[i] for i in kept}
    for c in centres:
        value = {i: cosine(keys[c], keys[i]) + 1.8 * s[i] for i in rest if i != c}
        taken = sorted(value, key=lambda i: -value[i])[:near]
        made[c] = [v + sum(a[i] * x[i][d] for i in taken) for d, v in enumerate(x[c])]
    left = [i for i in rest if i not in centres]
    if centres:
        made[left[-1]] = [sum(a[i] * x[i][d] for i in left) for d in range(len(x[0]))]
    return made


@pytest.mark.filterwarnings("ignore:Duplicate values")
@pytest.mark.parametrize(("tokens", "seed"), [(144, 0), (97, 1), (61, 2), (40, 3)])
def test_recoverable(tokens: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    feature = torch.randn(1, tokens, 7, generator=generator)
    metric = torch.randn(1, tokens, 5, generator=generator)
    score = torch.randn(1, tokens, generator=generator).mul(1.5).exp().softmax(1)
    text = torch.randn(1, 4, 7, generator=generator)
    mean = text[0].mean(0).tolist()
    likeness = [cosine(row, mean) for row in feature[0].tolist()]
    words = (text, torch.ones(1, 4, dtype=torch.bool))
    segment, counts = torch.zeros(1, tokens, dtype=torch.int64), torch.tensor([[tokens]])
    taps = {"select": {"feature": feature, "text": words}, "rest": {"metric": metric, "text": words}}
    step = step_of("neighbours=6")
    decision = decide(step, feature, torch.ones(1, tokens), segment, counts, [score], taps)
    want = recoverable(feature[0].tolist(), metric[0].tolist(), score[0].tolist(), likeness, 6)
    assert 2 < len(want) < tokens
    assert decision.chosen[0].tolist() == sorted(want)
    assert decision.feature is not None
    torch.testing.assert_close(decision.feature[0], torch.tensor([want[i] for i in sorted(want)]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("neighbours", [1, 5, 20])
@pytest.mark.parametrize("tokens", [2, 3, 21, 144, 576])
def test_outliers_are_those_of_scikit_learn(tokens: int, neighbours: int) -> None:
    values = torch.randn(1, tokens, generator=torch.Generator().manual_seed(tokens)).exp()
    segment, counts = torch.zeros(1, tokens, dtype=torch.int64), torch.tensor([[tokens]])
    found = local_outliers(values, segment, counts, neighbours, 1.5)
    assert int(found.sum()) == round(ratio(values[0].tolist(), neighbours) * tokens)


def test_a_number_alone_and_numbers_that_are_equal_are_no_outliers() -> None:
    for tokens in (1, 7):
        segment, counts = torch.zeros(1, tokens, dtype=torch.int64), torch.tensor([[tokens]])
        assert not local_outliers(torch.ones(1, tokens), segment, counts, 5, 1.5).any()


def test_recoverable_leaves_the_number_open() -> None:
    model = layout(visual=(64,))
    assert [left for _, _, left in leaving(resolve(load_policy("recoverable"), model).steps, model)] == [[64]]
    small = resolve(load_policy("recoverable", set=["keep=10%"]), model)
    assert [left for _, _, left in leaving(small.steps, model)] == [[13]]
    assert not Recover.exact
    assert not Recycle.exact


def test_recycling_needs_a_score() -> None:
    tensors = (torch.randn(1, 4, 2), torch.ones(1, 4), torch.tensor([[0, 1]]))
    with pytest.raises(PolicyError, match="score"):
        Recycle().apply(*tensors, None, None, torch.randn(1, 4, 2), (torch.randn(1, 1, 2), torch.ones(1, 1).bool()))  # type: ignore[arg-type]
