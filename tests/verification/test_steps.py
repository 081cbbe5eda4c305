"""Policy steps by hand: ties that rounding decides, and choices that it does not explain."""

from __future__ import annotations

import pytest
import torch

import tvc
from tvc.verification.steps import Sample, carry_out

SLACK = 1e-3


def step(**parts):
    return tvc.load_policy({"version": 1, "name": "one", "steps": [{"at": "language.2", **parts}]}).steps[0]


def sample(images):
    segment = torch.tensor(images)
    slots = torch.arange(len(images)) + 1
    return Sample.fresh(0, torch.tensor([0, len(images) + 1]), slots, segment)


def run(made, given, lengths, theirs):
    """Scores are the lengths of the hidden states."""
    hidden = torch.zeros(len(lengths) + 2, 4)
    hidden[1:-1, 0] = torch.tensor(lengths)

    def tap(wanted, _primitive, current):
        assert wanted.kind == "feature"
        return hidden[current.slots][None]

    return carry_out(made, given, hidden, tap, theirs, SLACK)


TOP = {"score": {"norm": {"of": "feature"}}, "select": {"top": {"keep": 1}}, "rest": "drop"}


def test_each_image_keeps_its_own_budget():
    outcome = run(step(**TOP), sample([0, 0, 1, 1, 1]), [9.0, 8.0, 1.0, 3.0, 2.0], torch.tensor([0, 1, 4, 6]))
    assert outcome.sample.slots.tolist() == [1, 4]
    assert (outcome.different, outcome.gap, outcome.planned, outcome.exact) == (0, 0.0, 2, True)


def test_a_choice_within_rounding_is_followed():
    outcome = run(step(**TOP), sample([0, 0, 0]), [2.0, 2.0005, 1.0], torch.tensor([1]))
    assert outcome.different == 2
    assert 0 < outcome.gap <= SLACK * outcome.scale
    assert outcome.sample.slots.tolist() == [1]


def test_a_choice_beyond_rounding_is_not_excused():
    outcome = run(step(**TOP), sample([0, 0, 0]), [2.0, 2.5, 1.0], torch.tensor([1]))
    assert outcome.gap == pytest.approx(0.5)
    assert outcome.gap > SLACK * outcome.scale


def test_keeping_one_more_is_not_excused_by_a_tie_elsewhere():
    outcome = run(step(**TOP), sample([0, 0, 0]), [2.0, 2.0, 1.0], torch.tensor([1, 3]))
    assert outcome.gap == pytest.approx(1.0)


def test_without_a_score_there_is_nothing_to_round():
    made = step(select={"stride": {"keep": 1}}, rest="drop")
    outcome = run(made, sample([0, 0]), [1.0, 1.0], torch.tensor([1]))
    assert outcome.different == 2
    assert outcome.gap == float("inf")


def test_a_merge_follows_the_choice_and_averages():
    rest = {"merge": {"targets": "kept", "by": "feature_cosine", "reduce": "mean"}}
    made = step(**{**TOP, "rest": rest})
    outcome = run(made, sample([0, 0, 0]), [2.0, 2.0005, 1.0], torch.tensor([1]))
    assert outcome.sample.slots.tolist() == [1]
    assert outcome.feature[0, 0].item() == pytest.approx((2.0 + 2.0005 + 1.0) / 3, abs=1e-6)
    assert outcome.sample.size.tolist() == [3.0]


def test_a_sample_without_visual_tokens_stays_as_it_is():
    given = Sample.fresh(0, torch.arange(2), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
    outcome = run(step(**TOP), given, [], None)
    assert outcome.sample is given
    assert outcome.planned == 0
