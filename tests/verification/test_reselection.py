"""What decode steps attend to, by hand: near ties and near likeness are followed, mistakes are told."""

from __future__ import annotations

import math
import types

import pytest
import torch

from tvc.kernels.budget import Budget
from tvc.policy.reselection import Reselect
from tvc.trace.observe import Seen
from tvc.verification.reselection import Reselection, of_run

PROMPT, VISUAL, SLACK = 5, torch.tensor([1, 2, 3]), 1e-4


def looked(paid: list[list[float]], theirs: list[list[int]] | None = None, **rule: object) -> Reselection:
    """A prompt with three visual tokens, and steps that pay them attention as `paid`, in proportion.

    `theirs`: per step the visual tokens that the compiled model attended to.
    """
    size = PROMPT + len(paid)
    logits = torch.zeros(size, size)
    for step, values in enumerate(paid):
        logits[PROMPT + step, VISUAL] = torch.tensor(values, dtype=torch.float64).log().float()
    keys = torch.eye(size)[None, None]
    found = []
    for own in theirs or []:
        attended = torch.ones(1, size, dtype=torch.bool)
        attended[0, VISUAL] = torch.isin(VISUAL, torch.tensor(own))
        found.append(attended)
    made = Reselect(at="language.1", layer="language.0", keep=Budget(count=1), **rule)
    by_hand = Reselection(made, PROMPT, found, SLACK)
    by_hand.look(Seen(logits[None, None], keys, keys, None, 1.0), [VISUAL])
    return by_hand


def attended(by_hand: Reselection) -> list[list[int]]:
    assert by_hand.open is not None
    size = by_hand.open.shape[1]
    assert bool(by_hand.open[0, :PROMPT].all())
    others = [column for column in range(size) if column not in VISUAL.tolist()]
    assert bool(by_hand.open[0][:, others].all())
    rows = by_hand.open[0, PROMPT:][:, VISUAL]
    return [VISUAL[row].tolist() for row in rows]


def worst(by_hand: Reselection) -> float:
    return max(choice.gap - choice.allowed for choice in by_hand.choices)


ALIKE = [[1.0, 5.0, 2.0], [5.0, 5.5, 2.0], [5.6, 5.5, 2.0], [1.0, 1.0, 9.0]]


@pytest.mark.parametrize(
    ("rule", "want"),
    [
        ({}, [[2], [2], [1], [3]]),
        ({"unless_alike": 0.9}, [[2], [2], [2], [3]]),
        ({"unless_alike": 0.9, "bug_compatible": True}, [[2], [2], [1, 2, 3], [3]]),
        ({"unless_alike": 0.7}, [[2], [2], [2], [3]]),
        ({"unless_alike": 0.7, "bug_compatible": True}, [[2], [1, 2, 3], [1, 2, 3], [3]]),
    ],
)
def test_steps_choose_by_the_rule(rule: dict[str, object], want: list[list[int]]) -> None:
    assert attended(looked(ALIKE, **rule)) == want
    again = looked(ALIKE, want, **rule)
    assert attended(again) == want
    assert worst(again) == 0


def test_masks_are_narrowed_from_the_layer_on_alone() -> None:
    by_hand = looked(ALIKE)
    mask = torch.ones(1, 1, 3, PROMPT + 4, dtype=torch.bool)
    assert by_hand.narrowed(mask, 0) is mask
    assert (~by_hand.narrowed(mask, 1)).sum(3).tolist() == [[[2, 2, 2]]]


@pytest.mark.parametrize(("second", "followed"), [(5.0 * (1 - 1e-5), True), (4.9, False)])
def test_a_near_tie_is_followed(second: float, followed: bool) -> None:
    by_hand = looked([[second, 5.0, 2.0]], [[1]])
    assert attended(by_hand) == ([[1]] if followed else [[2]])
    assert (worst(by_hand) <= 0) == followed
    assert by_hand.choices[0].different == 2


@pytest.mark.parametrize(("near", "followed"), [(1e-6, True), (0.02, False)])
@pytest.mark.parametrize("alike", [True, False])
def test_near_likeness_is_followed(near: float, followed: bool, alike: bool) -> None:
    """Steps whose cosine is on the one side of 0.9 here, and on the other in the compiled model."""
    cosine = 0.9 + (-near if alike else near)
    turned = [cosine, math.sqrt(1 - cosine**2), 1e-9]
    first = [1.0, 1e-9, 1e-9]
    # Of the second step, 1 is the best again: only whether everything is attended to tells.
    other = [1, 2, 3] if alike else [1]
    by_hand = looked([first, turned], [[1], other], unless_alike=0.9, bug_compatible=True)
    mine = [1] if alike else [1, 2, 3]
    assert attended(by_hand) == [[1], other if followed else mine]
    assert (worst(by_hand) <= 0) == followed


def test_another_number_of_tokens_is_never_explained() -> None:
    by_hand = looked([[5.0, 5.0, 2.0]], [[1, 2]])
    assert attended(by_hand) == [[1]]
    assert worst(by_hand) == float("inf")


def test_choices_of_a_run_are_found_by_place() -> None:
    chosen = torch.tensor([[True, False, True], [True, True, False]])
    cache = types.SimpleNamespace(
        marks={"chosen.1": chosen}, key_positions=[None, torch.tensor([[0, 2, 5], [-1, 3, 4]])]
    )
    (made,) = of_run([cache], 1, 6)
    assert made.tolist() == [[True, False, False, False, False, True], [False, False, False, True, False, False]]
    assert of_run([types.SimpleNamespace(marks={}, key_positions=[])], 0, 6) == []
