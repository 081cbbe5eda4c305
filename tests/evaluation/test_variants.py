"""Policies at budgets: what each keeps, against counts by hand."""

from __future__ import annotations

import dataclasses

import pytest

import tvc
from tvc.errors import ArgumentError
from tvc.evaluation import figures, pages
from tvc.evaluation.records import Record
from tvc.evaluation.variants import Refused, Variant, labelled, shares, variants
from tvc.program import Layer, Layout, Site

LAYOUT = Layout(
    model_type="llava",
    hidden_size=64,
    vocabulary=100,
    language=(Layer(1000, 4, 2, 16),) * 8,
    vision=(Layer(500, 2, 2, 8),) * 6,
    prefix_tokens=1,
    group=1,
    tiles=1,
    tile_tokens=145,
    visual_tokens=(144,),
    patch_linear=588,
    projector_linear=90,
    head_linear=6400,
    element_size=2,
    sites=tuple(Site(f"language.{n}", True) for n in range(8)),
)


def planned(policies, budgets, seeds=1, average=False):
    return list(variants(labelled(policies), LAYOUT, shares(budgets), seeds, average, 16))


def visual(variant):
    return [layer.visual for layer in variant.plan.layers]


def test_a_budget_is_what_is_left_behind_the_last_cut():
    got = {(one.label, one.budget): visual(one) for one in planned(["fastv", "pyramiddrop"], ["50%", "5%"])}
    assert got["fastv", "50%"] == [144] * 2 + [72] * 6
    assert got["fastv", "5%"] == [144] * 2 + [7] * 6
    assert got["random", "5%"] == got["uniform", "5%"] == [7] * 8
    pyramid = got["pyramiddrop", "50%"]
    assert pyramid[-1] == 72
    assert 144 == pyramid[0] > pyramid[2] > pyramid[4] > 72


def test_targets_of_a_merge_scale_with_the_budget():
    (one,) = [variant for variant in planned(["visionzip"], ["25%"]) if variant.label == "visionzip"]
    assert visual(one) == [36] * 8
    # 54 and 10 of 64 in the preset: 31 and 5 are 0.574 times as many.
    assert one.settings == {"steps.0.select.top.keep": 31, "steps.0.rest.merge.targets.stride": 5}
    step = one.policy.steps[0]
    assert (step.select.keep.count, step.rest.targets.stride) == (31, 5)


def test_counts_that_are_decided_at_run_time_are_told_as_upper_bounds():
    replies = [Record("what", "ring", 5, True)]
    rows = [figures.row(one, "torch", [replies], replies) for one in planned(["prumerge", "fastv"], ["25%"])]
    _, *lines = pages.table({"rows": [dataclasses.asdict(row) for row in rows]})
    shown = {line[0]: line[-3:] for line in lines}
    assert shown["fastv"][0] == "63.0"  # 2 of 8 layers with 144 tokens, 6 with 36
    assert shown["prumerge"][0] == "≤ 36.0"  # one image has fewer outliers than another
    assert [number.startswith("≤ ") for number in shown["prumerge"]] == [True] * 3
    assert not any("≤" in number for name in ("fastv", "random", "uniform") for number in shown[name])


def test_what_is_published_for_a_budget_is_taken_as_it_is():
    (one,) = [variant for variant in planned(["visionzip"], ["22%"]) if variant.label == "visionzip"]
    assert one.settings == {"keep": "18.8%", "contextual": "3.5%"}
    assert visual(one) == [27 + 5] * 8


def test_averages_count_every_layer():
    got = {(one.label, one.budget): one for one in planned(["fastv"], ["50%", "25%"], average=True)}
    assert visual(got["fastv", "50%"]) == [144] * 2 + [48] * 6
    refused = got["fastv", "25%"]
    assert isinstance(refused, Refused)
    assert "36.8 to 144.0" in refused.reason
    assert got["uniform", "25%"].reached == 36


def test_as_written_changes_nothing():
    got = {one.label: one for one in planned(["pyramiddrop"], ["as-written"])}
    assert visual(got["pyramiddrop"]) == [144] * 2 + [72] * 2 + [36] * 2 + [18] * 2
    assert got["pyramiddrop"].policy.digest() == tvc.load_policy("pyramiddrop").digest()


def test_a_policy_that_draws_gets_seeds():
    drawn = [one for one in planned([], ["25%"], seeds=3) if one.label == "random"]
    assert [one.seed for one in drawn] == [0, 1, 2]
    assert len({one.policy.digest() for one in drawn}) == len({one.name for one in drawn}) == 3
    assert [one.policy.steps[0].score[0].primitive.seed for one in drawn] == [0, 1, 2]
    (uniform,) = [one for one in planned([], ["25%"], seeds=3) if one.label == "uniform"]
    assert uniform.seed is None


def test_a_seed_inside_a_sum_of_scores_is_set_alone():
    text = """
version: 1
name: mixed
steps:
  - at: language.1
    score: [{norm: {weight: 2}}, {random: 9}]
    select: {top: {keep: 50%}}
    rest: drop
"""
    policy = tvc.load_policy(text.replace("{norm: {weight: 2}}", "{norm: {}, weight: 2}"))
    drawn = [one for one in planned([policy], ["50%"], seeds=2) if one.label == "mixed"]
    assert [[term.weight for term in one.policy.steps[0].score] for one in drawn] == [[2, 1], [2, 1]]
    assert [one.policy.steps[0].score[1].primitive.seed for one in drawn] == [0, 1]


def test_labels_differ_and_baselines_are_not_doubled():
    mine = tvc.load_policy("fastv")
    other = mine.with_settings(["keep=10%"])
    assert list(labelled([mine, other, "fastv", "random"])) == ["fastv", "fastv-2", "random", "uniform"]
    assert next(iter(labelled([mine.with_settings(["name=a/b c"])]))) == "a-b-c"
    assert next(iter(labelled([mine.with_settings(["name=dense"])]))) == "dense-2"


def test_what_a_model_cannot_do_is_refused_with_the_reason():
    policy = tvc.load_policy("fastv").with_settings(["before_layer=30"])
    refused = [one for one in planned([policy], ["50%", "25%"]) if isinstance(one, Refused)]
    assert [(one.label, one.budget) for one in refused] == [("fastv", "50%"), ("fastv", "25%")]
    assert "language" in refused[0].reason
    assert all(isinstance(one, Variant) for one in planned([], ["50%"]))


def test_a_policy_whose_weights_are_not_there_is_refused_with_the_reason():
    (refused,) = [one for one in planned(["covipal"], ["25%"]) if isinstance(one, Refused)]
    assert refused.label == "covipal"
    assert "the weights that a step names are not there" in refused.reason


@pytest.mark.parametrize("text", ["0.5", "50", "0%", "120%", "half", ""])
def test_a_budget_that_is_no_share_is_refused(text):
    with pytest.raises(ArgumentError, match="no share"):
        shares(["50%", text])


def test_budgets_are_written_one_way():
    assert shares(["50%", "50.0%", "12.5 %", "as-written"]) == ["50%", "12.5%", "as-written"]
