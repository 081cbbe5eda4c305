"""Policy steps by hand: ties that rounding decides, and choices that it does not explain."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

import tvc
from tvc.verification.report import DOUBT, TOLERANCES
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


def test_what_is_left_goes_by_scores_as_they_are_where_a_tie_is_followed():
    """Three of five stay, the last of them by a tie: it is the weakest, and the others are folded into it."""
    made = step(score={"norm": {"of": "feature"}}, select={"top": {"keep": 3}}, rest={"fold": {}})
    outcome = run(made, sample([0] * 5), [5.0, 3.01, 3.0, 2.9995, 1.0], torch.tensor([1, 2, 4]))
    assert outcome.sample.slots.tolist() == [1, 2, 4]
    assert outcome.feature[:, 0].tolist() == pytest.approx([5.0, 3.01, (2.9995 + 2 * 3.0 + 3 * 1.0) / 6], abs=1e-5)
    assert outcome.sample.size.tolist() == [1.0, 1.0, 3.0]


@pytest.mark.parametrize("seed", (0, 37))
def test_ties_that_the_last_digits_settle_are_followed(seed):
    """Among tokens of which many are equal noise of any size tells other outliers than the last digits do."""
    slack = TOLERANCES[torch.float32].relative
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randn(60, generator=generator).exp()[torch.randint(60, (120,), generator=generator)] + 1
    last_digits = 1e-7 * torch.randn(120, generator=generator)
    made = step(score={"norm": {"of": "feature"}}, select={"recover": {"keep": "100%", "neighbours": 2}}, rest="drop")
    given = sample([0] * 120)

    def outcome_of(values, theirs):
        hidden = torch.zeros(122, 4)
        hidden[1:-1, 0], hidden[0, :2], hidden[-1, 1] = values, 1.0, 1.0

        def tap(wanted, _primitive, current):
            if wanted.kind == "text":
                return hidden[current.text][None], torch.ones(1, 2, dtype=torch.bool)
            return hidden[current.slots][None]

        return carry_out(made, given, hidden, tap, theirs, slack)

    theirs = outcome_of(lengths * (1 + last_digits), None).sample.slots
    outcome = outcome_of(lengths, theirs)
    assert outcome.gap <= slack * outcome.scale
    assert torch.equal(outcome.sample.slots, theirs)
    largest = int(lengths.argmax()) + 1
    without = outcome_of(lengths, theirs[theirs != largest])  # no digits at the end of a number make it go
    assert not without.gap <= slack * without.scale


def test_a_sample_without_visual_tokens_stays_as_it_is():
    given = Sample.fresh(0, torch.arange(2), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
    outcome = run(step(**TOP), given, [], None)
    assert outcome.sample is given
    assert outcome.planned == 0


GREEDY = ("max_min", "log_det", "coverage", "max_sum")


def greedily(key, twin, theirs=None, images=(0,) * 8 + (1,) * 4):
    """A greedy selector over random tokens of two images, of which number 5 is `twin` times noise beside number 2."""
    torch.manual_seed(0)
    given = sample(list(images))
    hidden = torch.randn(len(images) + 2, 6)
    hidden[1 + 5] = hidden[1 + 2] + twin * torch.randn(6)
    score = {"score": {"norm": {"of": "feature"}}} if key == "max_sum" else {}
    made = step(**score, select={key: {"keep": "50%"}}, rest="drop")

    def tap(wanted, _primitive, current):
        if wanted.kind == "text":
            return hidden[current.text][None], torch.ones(1, 2, dtype=torch.bool)
        return hidden[current.slots][None]

    return carry_out(made, given, hidden, tap, theirs, SLACK)


@pytest.mark.parametrize("key", GREEDY)
def test_a_near_tie_inside_a_greedy_loop_is_followed(key):
    mine = greedily(key, 1e-4).sample.slots
    assert (3 in mine) != (6 in mine)  # one of the twins
    theirs = torch.tensor(sorted(9 - int(slot) if slot in (3, 6) else int(slot) for slot in mine))
    outcome = greedily(key, 1e-4, theirs)
    assert outcome.different == 2
    assert 0 <= outcome.gap <= SLACK * outcome.scale < 0.1
    assert torch.equal(outcome.sample.slots, theirs)


@pytest.mark.parametrize("key", GREEDY)
def test_another_token_than_the_best_of_a_greedy_loop_is_not_excused(key):
    mine = greedily(key, 1e-4).sample.slots.tolist()
    other = next(slot for slot in range(1, 9) if slot not in (*mine, 3, 6))
    for gone in mine[:2]:
        theirs = torch.tensor(sorted({*mine, other} - {gone}))
        outcome = greedily(key, 1e-4, theirs)
        assert outcome.gap > SLACK * outcome.scale, gone


@pytest.mark.parametrize(("other", "sure"), (((1.0, -3.0), True), ((1.0, -1.00001), False)))
def test_taking_in_one_of_two_that_are_equally_near_is_in_doubt(other, sure):
    hidden = torch.zeros(5, 4)
    hidden[1:-1, :2] = torch.tensor([(5.0, 0.0), (1.0, 1.0), other])
    made = step(score={"norm": {"of": "feature"}}, select={"top": {"keep": 1}}, rest={"absorb": {"neighbours": 1}})

    def tap(_wanted, _primitive, current):
        return hidden[current.slots][None]

    outcome = carry_out(made, sample([0, 0, 0]), hidden, tap, None, SLACK)
    assert outcome.doubt == 1.0  # whichever it takes in, the sum is good
    assert outcome.unsettled == 1.0 if sure else outcome.unsettled > DOUBT
    both = torch.tensor([[6.4142, 1.4142], [6.4142, -1.4142]])  # scores are lengths
    made = {int((both - draw.feature[0, :2]).abs().amax(1).argmin()) for draw in outcome.drawn}
    assert made == ({0} if sure else {0, 1})


def test_doubt_widens_what_is_allowed_up_to_a_bound():
    allowed = TOLERANCES[torch.float32].allowed
    values = torch.tensor([4.0])
    assert [allowed(values, doubt) / allowed(values) for doubt in (0.5, 1.0, 3.0, 1e9)] == pytest.approx(
        [1, 1, 3, DOUBT]
    )


def test_a_merge_by_trained_weights_is_carried_out(tmp_path):
    """Weights are the same on both sides: rounding moves what enters beside them."""
    latents = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    save_file({"latents": latents}, tmp_path / "drawn.safetensors")
    merge = {"latents": {"weights": str(tmp_path / "drawn.safetensors"), "keep": 2}}
    made = step(merge=merge)
    hidden = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))

    def tap(wanted, _primitive, _current):
        assert wanted.kind == "weights"
        return {"latents": latents}

    outcome = carry_out(made, sample([0, 0, 0]), hidden, tap, None, SLACK)
    shares = (hidden[1:-1] @ latents.T).softmax(0)
    torch.testing.assert_close(outcome.feature, shares.T @ hidden[1:-1])
    assert 1.0 <= outcome.doubt < DOUBT
