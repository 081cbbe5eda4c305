"""Settings for budgets: what papers count at each of theirs, and how a policy keeps, loses and uses such settings."""

from __future__ import annotations

import dataclasses
import pathlib

import pytest
from policy_cases import KEEP, layout

import tvc
from tvc.errors import ArgumentError, PolicyError
from tvc.policy import load_policy, presets, resolve
from tvc.report.budget import settings_at, share_of
from tvc.report.schedule import make_plan

# Visual tokens behind each cut of one image of 576, as the papers or their code count them.
LEFT = {
    "auroracap": {"80%": [480], "50%": [288], "20%": [120]},
    "cdpruner": {"50%": [288], "33%": [192], "25%": [144], "22%": [128], "11%": [64], "10%": [58], "5%": [29]},
    "dart": {"33%": [188], "22%": [124], "11%": [60]},
    "divprune": {"10%": [56]},
    "fastervlm": {"50%": [288], "25%": [144], "10%": [58], "5%": [29]},
    "fastv": {"75%": [432], "50%": [288], "25%": [144]},
    "hiprune": {"33%": [192], "22%": [128], "11%": [64]},
    "holov": {"33%": [192], "22%": [128], "11%": [64]},
    "mmtok": {"33%": [192], "22%": [128], "20%": [115], "11%": [64], "10%": [57], "5%": [28]},
    "sparsevlm": {
        "33%": [309, 204, 113],
        "22%": [312, 117, 39],
        "17%": [249, 55, 27],
        "11%": [82, 32, 18],
    },
    "todre": {"25%": [144], "10%": [57]},
    "visionzip": {"33%": [192], "22%": [128], "11%": [64], "5.6%": [32]},
    "vispruner": {"50%": [288], "33%": [192], "25%": [144], "22%": [128], "11%": [64], "10%": [58], "5%": [29]},
}
# Thresholds and scenes, whose counts depend on the picture, and shares of a model with 28 layers.
ELSEWHERE = {"framefusion", "holitom", "mustdrop", "vflowopt"}


def image(language: int = 32):
    return dataclasses.replace(layout(vision=24, language=language, visual=(576,)), tile_tokens=577)


def test_every_preset_with_budgets_is_counted_here() -> None:
    assert {name for name in presets() if load_policy(name).budgets} == {*LEFT, *ELSEWHERE}


@pytest.mark.parametrize("name", LEFT)
def test_published_budgets_leave_what_their_papers_count(name: str) -> None:
    policy, found = load_policy(name), {}
    for share in policy.budgets:
        chosen = policy.with_settings(settings_at(policy, image(), share))
        visual = [layer.visual for layer in make_plan(resolve(chosen, image()), image()).layers]
        found[share] = [count for count in dict.fromkeys(visual) if count != 576]
    assert found == LEFT[name]


def test_sparsevlm_means_are_the_published_ones_over_32_layers() -> None:
    policy = load_policy("sparsevlm")
    plans = {share: tvc_plan(policy, share, 32) for share in policy.budgets}
    means = {share: plan.average_visual_tokens for share, plan in plans.items()}
    assert means == pytest.approx({"33%": 206.5, "22%": 145.4, "17%": 114.1, "11%": 82.3}, abs=0.06)


def test_visionzip_keeps_and_merges_in_the_published_proportion() -> None:
    split = {}
    for share, settings in load_policy("visionzip").budgets.items():
        (only,) = resolve(load_policy("visionzip", set=settings), image()).steps
        chosen = only.select.kept([576])
        split[share] = (chosen[0], only.rest.kept([576], chosen)[0] - chosen[0])
    assert split == {"33%": (162, 30), "22%": (108, 20), "11%": (54, 10), "5.6%": (27, 5)}


def test_vflowopt_leaves_half_a_quarter_and_a_tenth_on_average() -> None:
    policy = load_policy("vflowopt")
    means = {share: tvc_plan(policy, share, 28).average_visual_tokens / 576 for share in policy.budgets}
    # The tokens of the merged cells come on top of the budget.
    assert means == pytest.approx({"50%": 0.5, "25%": 0.25, "10%": 0.1}, abs=0.012)


def tvc_plan(policy, share, language):
    model = image(language)
    return make_plan(resolve(policy.with_settings(settings_at(policy, model, share)), model), model)


@pytest.mark.parametrize("name", presets())
def test_a_smaller_budget_never_leaves_more(name: str) -> None:
    """By the policy's own measure: budgets that its numbers are scaled to, and those that its paper has settings for.

    Papers name budgets by what they aim at, so that settings for 33% may leave 36%: they are no steps of one ladder.
    """
    policy = load_policy(name)
    scaled: list[float] = []
    published: list[float] = []
    for share in ("75%", "50%", "40%", "33%", "25%", "22%", "20%", "17%", "15%", "11%", "10%", "5%"):
        try:
            plan = tvc_plan(policy, share, 32)
        except ArgumentError:
            continue
        counted = plan.average_visual_tokens if policy.measure == "average" else plan.layers[-1].visual
        (published if share in policy.budgets else scaled).append(counted)
        if share not in policy.budgets:
            assert counted <= 5.76 * float(share[:-1])
    assert scaled == sorted(scaled, reverse=True)
    assert published == sorted(published, reverse=True)


@pytest.mark.parametrize(
    "select", ["{top: 25%}", "{top: {keep: 25%}}", '{top: "{keep}"}', "{stride: 25%}", "{max_min: 25%}"]
)
def test_budgets_are_scaled_however_they_are_written(select: str) -> None:
    parameters = "parameters: {keep: 25%}\n" if "{keep}" in select else ""
    text = f"version: 1\n{parameters}steps:\n  - at: language.2\n    score: norm\n    select: {select}\n"
    text = text if "top" in select else text.replace("    score: norm\n", "")
    assert tvc_plan(load_policy(text), "50%", 32).layers[-1].visual == 288


def test_a_setting_goes_into_what_is_written_as_a_name_or_a_bare_value() -> None:
    text = "version: 1\nsteps:\n  - at: language.2\n    score: norm\n    select: {top: 25%}\n    rest: fold\n"
    policy = load_policy(text, set=["steps.0.score.norm.order=1", "steps.0.select.top.keep=7"])
    assert policy.steps[0].score[0].primitive.order == 1
    assert policy.steps[0].select.keep.count == 7
    with pytest.raises(PolicyError, match=r"top\.kept"):
        load_policy(text, set=["steps.0.select.top.kept=7"])


def test_a_mean_is_scaled_to_where_means_are_published() -> None:
    text = KEEP.replace("language.0", "language.2") + "measure: average\n"
    policy, model = load_policy(text), image(4)
    plan = make_plan(resolve(policy.with_settings(settings_at(policy, model, "75%")), model), model)
    assert plan.average_visual_tokens == 432
    assert policy.digest() == load_policy(text.replace("average", "last")).digest()
    assert load_policy(policy.to_yaml()).measure == "average"
    with pytest.raises(PolicyError, match='write "average"'):
        load_policy(text.replace("average", "avarage"))


def test_a_budget_without_settings_is_scaled_to() -> None:
    policy = load_policy("visionzip")
    settings = settings_at(policy, image(), "40%")
    assert set(settings) == {"steps.0.select.top.keep", "steps.0.rest.merge.targets.stride"}
    (only,) = policy.with_settings(settings).steps
    assert only.rest.kept([576], only.select.kept([576])) == [230]


def test_an_average_is_met_whatever_is_published() -> None:
    policy, model = load_policy("fastv"), image(4)
    settings = settings_at(policy, model, "75%", average=True)
    plan = make_plan(resolve(policy.with_settings(settings), model), model)
    assert plan.average_visual_tokens == 432
    assert [layer.visual for layer in plan.layers] == [576, 576, 288, 288]


def test_settings_of_a_budget_replace_parameters_and_keep_the_others() -> None:
    policy = load_policy(KEEP + "budgets:\n  33%: {keep: 192}\n  5 %: {keep: 7%}\n")
    assert dict(policy.budgets) == {"33%": {"keep": 192}, "5%": {"keep": "7%"}}
    chosen = policy.with_settings(policy.budgets["5%"])
    assert chosen.steps[0].select.keep.permille == 70
    assert chosen.budgets == policy.budgets
    assert load_policy(chosen.to_yaml()) == chosen
    assert chosen.digest() == load_policy(KEEP.replace("25%", "7%")).digest()


def test_budgets_go_with_the_steps_that_they_were_written_for() -> None:
    text = KEEP + "budgets:\n  33%: {keep: 33%}\n"
    assert load_policy(text, set=["steps.0.select.stride=5"]).budgets == {}
    assert load_policy(text, set=["keep=5"]).budgets == {"33%": {"keep": "33%"}}
    other = "version: 1\nextends: visionzip\nsteps: [{at: language.1, select: {stride: 20%}}]"
    assert load_policy(other).budgets == {}
    assert load_policy("version: 1\nextends: visionzip\nbudgets: {33%: {keep: 9}}").budgets["33%"] == {
        "keep": 9, "contextual": "5.3%",
    }  # fmt: skip
    assert resolve(load_policy("visionzip"), image()).policy.budgets == {}


def test_policies_are_shown_with_their_budgets() -> None:
    from tvc.policy.words import in_words

    assert "Published for budgets of 33%, 22%, 11%, 5.6%." in in_words(load_policy("visionzip"))
    assert "Published for budgets of 50%, 25%, 10%, means over the layers." in in_words(load_policy("vflowopt"))


@pytest.mark.parametrize("text", ["0.5", "64", "120%", "half", "", "{average: 3}"])
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(ArgumentError, match="no share"):
        share_of(text, "--budget")
    with pytest.raises(ArgumentError, match="no share"):
        tvc.compile("no/such/model", "fastv", budget=text)


def test_a_plan_at_a_budget_says_so() -> None:
    model = pathlib.Path(__file__).parents[2] / "examples/models/tiny-llava"
    plan = tvc.plan(model, "visionzip", budget="33.0 %")
    assert plan.text().startswith("visionzip at 33% on llava")
    assert [layer.visual for layer in plan.layers] == [144 * 282 // 1000 + 144 * 53 // 1000] * 6
    assert plan.to_json()["budget"] == "33%"
    assert [layer.visual for layer in tvc.plan(model, "uniform", budget="5%").layers] == [7] * 6
