"""What a policy means for a model: real layers, one choice, counts for averages."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from policy_cases import layout, policy, step

from tvc.errors import SiteError
from tvc.policy import Step, load_policy, presets, resolve


def _score(resolved_step: Step) -> dict[str, object]:
    return resolved_step.score[0].primitive.model_dump()


@pytest.mark.parametrize("name", presets())
@pytest.mark.parametrize("prefix", [0, 1], ids=["siglip", "clip"])
def test_every_preset_resolves_and_its_text_is_a_policy_of_its_own(name: str, prefix: int) -> None:
    model, written = layout(prefix=prefix, language=28), load_policy(name)
    resolved = resolve(load_policy(name, set=["keep=25%"] if "keep" in written.parameters else []), model)
    again = load_policy(resolved.to_yaml())
    assert again == resolved.policy
    assert again.digest() == resolved.digest()
    assert resolve(again, model).policy == resolved.policy
    assert resolved.name == name
    assert all(s.site.index is None or (s.site.index >= 0 and not s.site.percent) for s in resolved.steps)


@pytest.mark.parametrize(("prefix", "rows"), [(1, "cls"), (5, "cls"), (0, "all")])
def test_the_first_row_the_encoder_has_is_chosen_and_written(prefix: int, rows: str) -> None:
    resolved = resolve(load_policy("fastervlm"), layout(prefix=prefix))
    assert _score(resolved.steps[0]) == {"of": rows, "layer": "vision.4", "heads": "mean"}
    assert f"of: {rows}" in resolved.to_yaml()
    assert "layer: vision.4" in resolved.to_yaml()


def test_previous_self_and_negatives_become_layers() -> None:
    attention = "score: {{attention: {{of: last, layer: {}}}}}\n    select: {{top: 50%}}"
    text = policy(
        step("language.2", attention.format("previous")),
        step("language.50%", attention.format("self")),
        step("language.-1", attention.format("language.-3")),
    )
    resolved = resolve(load_policy(text), layout(language=12))
    assert [s.at for s in resolved.steps] == ["language.2", "language.6", "language.11"]
    assert [_score(s)["layer"] for s in resolved.steps] == ["language.1", "language.6", "language.9"]


@pytest.mark.parametrize(
    ("layer", "refused"), [("language.1", True), ("language.2", False), ("previous", False), ("vision.1", False)]
)
def test_a_layer_in_front_of_an_earlier_cut_is_refused(layer: str, refused: bool) -> None:
    """Its attention is of tokens that have left since; a layer that runs on what the cut left is fine."""
    attention = "score: {{attention: {{of: {}, layer: {}}}}}\n    select: {{top: 50%}}"
    rows = "all" if layer.startswith("vision") else "last"
    text = policy(
        step("language.2", attention.format("last", "previous")), step("language.4", attention.format(rows, layer))
    )
    if not refused:
        assert len(resolve(load_policy(text), layout(language=12)).steps) == 2
        return
    with pytest.raises(SiteError) as caught:
        resolve(load_policy(text), layout(language=12))
    assert caught.value.slug == "layer-before-a-cut"
    assert "steps[1]" in str(caught.value.where)


@given(st.integers(2, 200), st.integers(0, 99))
def test_a_depth_is_the_floor_of_its_share(blocks: int, percent: int) -> None:
    text = policy(step(f"language.{percent}%", "select: {stride: 50%}"))
    (only,) = resolve(load_policy(text), layout(language=blocks)).steps
    assert only.site.index == int(Fraction(blocks * percent, 100))


def test_pyramiddrop_acts_where_the_paper_does() -> None:
    resolved = resolve(load_policy("pyramiddrop"), layout(language=32, visual=(576,)))
    assert [s.at for s in resolved.steps] == ["language.8", "language.16", "language.24"]
    assert [_score(s)["layer"] for s in resolved.steps] == ["language.8", "language.16", "language.24"]


def test_taps_of_rest_rules_and_gates_are_resolved_too() -> None:
    merge = "select: {stride: 4}\n    rest: {merge: {targets: {stride: 2}, by: key_cosine, layer: vision.-2}}"
    gate = "exit: {when: {score: {attention: {of: [cls, text], layer: previous}}, above: 0.5}}"
    first, second = resolve(load_policy(policy(step("language.0", merge), step("language.4", gate))), layout()).steps
    assert first.rest is not None
    assert first.rest.model_dump()["layer"] == "vision.4"
    assert second.exit is not None
    assert second.exit.score[0].primitive.model_dump() == {"of": "text", "layer": "language.3", "heads": "mean"}


def test_keys_without_a_layer_are_those_of_the_site() -> None:
    text = policy(step("language.3", "score: {norm: {of: key}}\n    select: {top: 3}"))
    assert _score(resolve(load_policy(text), layout()).steps[0])["layer"] == "language.3"


def test_features_without_a_layer_stay_the_steps_own() -> None:
    text = policy(step("projector", "score: {norm: {of: feature}}\n    select: {top: 3}"))
    assert _score(resolve(load_policy(text), layout()).steps[0])["layer"] is None


def test_keeping_everything_is_fine() -> None:
    (only,) = resolve(load_policy("fastv", set=["keep=100%"]), layout(visual=(1,))).steps
    assert only.select is not None
    assert only.select.kept([1]) == [1]


def test_an_image_without_tokens_empties_nothing() -> None:
    (only,) = resolve(load_policy("fastv"), layout(visual=(0, 64))).steps
    assert only.select is not None
    assert only.select.kept([0, 64]) == [0, 32]


def test_the_scope_decides_what_competes() -> None:
    text = policy(step("language.2", "scope: sequence\n    select: {stride: 10%}"))
    assert resolve(load_policy(text), layout(visual=(64, 9))).steps[0].scope == "sequence"
    with pytest.raises(SiteError) as caught:  # 9 tokens alone round down to none
        resolve(load_policy(text.replace("scope: sequence\n    ", "")), layout(visual=(64, 9)))
    assert caught.value.slug == "keeps-nothing"


# Averages -------------------------------------------------------------------------------------------------------------


def _mean(cuts: list[tuple[int, int]], blocks: int, visual: int) -> Fraction:
    """Visual tokens per layer, by hand: (layer, kept) cuts over `blocks` layers."""
    tokens, total = visual, 0
    for block in range(blocks):
        tokens = next((kept for layer, kept in cuts if layer == block), tokens)
        total += tokens
    return Fraction(total, blocks)


@given(st.integers(2, 40), st.data())
def test_an_average_becomes_the_best_count_there_is(blocks: int, data: st.DataObject) -> None:
    visual = data.draw(st.integers(2, 200), "visual tokens")
    layer = data.draw(st.integers(0, blocks - 1), "layer")
    means = [_mean([(layer, kept)], blocks, visual) for kept in range(1, visual + 1)]
    target = data.draw(st.integers(int(means[0]) + 1, visual), "target")
    text = policy(step(f"language.{layer}", f"select: {{stride: {{keep: {{average: {target}}}}}}}"))
    (only,) = resolve(load_policy(text), layout(language=blocks, visual=(visual,))).steps
    assert only.select is not None
    (kept,) = only.select.kept([visual])
    assert abs(means[kept - 1] - target) == min(abs(mean - target) for mean in means)


def test_steps_that_share_an_average_keep_the_same_share() -> None:
    each = "select: {stride: {keep: {average: 270}}}"
    text = policy(*(step(f"language.{k}", each) for k in (8, 16, 24)))
    resolved = resolve(load_policy(text), layout(language=32, visual=(576,)))
    counts = [576]
    for one in resolved.steps:
        assert one.select is not None
        counts += one.select.kept([counts[-1]])
    assert counts == [576, 288, 144, 72]  # three halves make the published mean of 270
    assert _mean(list(zip((8, 16, 24), counts[1:], strict=True)), 32, 576) == 270


def test_an_average_counts_what_other_steps_leave() -> None:
    text = policy(
        step("language.0", "select: {stride: 50%}"), step("language.6", "select: {stride: {keep: {average: 20}}}")
    )
    first, second = resolve(load_policy(text), layout(language=12, visual=(64,))).steps
    assert first.select is not None
    assert second.select is not None
    (kept,) = second.select.kept(first.select.kept([64]))
    assert _mean([(0, 32), (6, kept)], 12, 64) == 20


def test_an_average_before_the_decoder_counts_in_every_layer() -> None:
    text = policy(step("projector", "select: {stride: {keep: {average: 20}}}"))
    (only,) = resolve(load_policy(text), layout()).steps
    assert only.select is not None
    assert only.select.kept([64]) == [20]


def test_an_average_is_per_image() -> None:
    text = policy(step("language.0", "select: {stride: {keep: {average: 20}}}"))
    (only,) = resolve(load_policy(text), layout(visual=(64, 64))).steps
    assert only.select is not None
    assert only.select.kept([64, 64]) == [20, 20]


@pytest.mark.parametrize(("one", "other"), [("language.25%", "language.1"), ("language.1", "language.-3")])
def test_names_of_one_site_coincide_only_where_the_model_makes_them(one: str, other: str) -> None:
    text = policy(step(one, "select: {stride: 3}"), step(other, "select: {stride: 3}"))
    loaded = load_policy(text)
    with pytest.raises(SiteError, match="same-site"):
        resolve(loaded, layout(language=4))


@pytest.mark.parametrize(
    ("written", "first"),
    [
        ("earlier", "language.0"),
        ("language.-9", "language.3"),
        ("language.17%", "language.2"),
        ("language.40%", "language.3"),  # a share that comes to the step's own layer means the one before
    ],
)
def test_caches_are_cut_from_a_layer_that_the_model_has(written: str, first: str) -> None:
    text = policy(step("language.4", f"select: {{stride: 3}}\n    evict: {written}"))
    resolved = resolve(load_policy(text), layout())
    assert resolved.steps[0].evict == first
    assert resolve(load_policy(resolved.to_yaml()), layout()).policy == resolved.policy


@pytest.mark.parametrize(
    ("at", "until", "layers"),
    [
        ("language.4", "language.-3", {4: "language.9"}),
        ("language.4", "language.50%", {4: "language.6"}),
        ("language.-2", "next", {10: "language.11"}),
        ("language.-1", "next", {11: ""}),  # no layer follows in which they could take part
        ("language.4", "never", {4: ""}),
        ("language.2..5", "next", {n: f"language.{n + 1}" for n in range(2, 6)}),
        ("language.1..10/3", "next", {n: f"language.{n + 1}" for n in (1, 4, 7, 10)}),
        ("language.all/5", "next", {n: f"language.{n + 1}" for n in (0, 5, 10)}),
        ("language.50%..-1/2", "next", {6: "language.7", 8: "language.9", 10: "language.11"}),
    ],
)
def test_tokens_come_back_at_a_layer_that_the_model_has(at: str, until: str, layers: dict[int, str]) -> None:
    resolved = resolve(load_policy(policy(step(at, f"select: {{stride: 50%}}\n    until: {until}"))), layout())
    assert {made.site.index: made.until for made in resolved.steps} == layers
    assert resolve(load_policy(resolved.to_yaml()), layout()).policy == resolved.policy


def test_tokens_that_pass_by_count_in_an_average_where_they_take_part() -> None:
    """64 tokens in ten of twelve layers and n in the others are 56 on average for n = 16."""
    text = policy(step("language.3", "select: {stride: {keep: {average: 56}}}\n    until: language.5"))
    (only,) = resolve(load_policy(text), layout()).steps
    assert only.select is not None
    assert only.select.kept([64]) == [16]


def test_layers_in_front_of_a_bypass_may_be_asked_behind_it() -> None:
    attention = "score: {attention: {of: last, layer: language.1}}\n    select: {top: 50%}"
    text = policy(step("language.2", "select: {stride: 50%}\n    until: next"), step("language.6", attention))
    assert resolve(load_policy(text), layout()).steps[1].score[0].primitive.layer == "language.1"  # type: ignore[attr-defined]


def test_steps_that_only_keep_their_caches_say_nothing_of_it() -> None:
    plain = load_policy(policy(step("language.4", "select: {stride: 3}")))
    assert "evict" not in resolve(plain, layout()).to_yaml()
    assert plain.digest() == load_policy(policy(step("language.4", "select: {stride: 3}\n    evict:"))).digest()
    assert plain.digest() == load_policy(policy(step("language.4", "select: {stride: 3}\n    until: never"))).digest()
    assert plain.digest() != load_policy(policy(step("language.4", "select: {stride: 3}\n    until: next"))).digest()


@pytest.mark.parametrize(
    ("written", "at", "layer"),
    [
        ("at: language.3", "language.3", "language.2"),
        ("at: language.-1", "language.11", "language.10"),
        ("at: language.25%", "language.3", "language.2"),
        ("at: language.6", "language.6", "language.3"),  # layers 4 and 5 have no attention
        ("at: language.6, layer: language.1", "language.6", "language.1"),
    ],
)
def test_decode_steps_choose_by_a_layer_that_the_model_has(written: str, at: str, layer: str) -> None:
    model = layout()
    blind = dataclasses.replace(model.language[0], heads=0)
    model = dataclasses.replace(model, language=(*model.language[:4], blind, blind, *model.language[6:]))
    resolved = resolve(load_policy(f"version: 1\nreselect: {{{written}, keep: 30%}}"), model)
    assert resolved.reselect is not None
    assert (resolved.reselect.at, resolved.reselect.layer) == (at, layer)
    assert (resolved.reselect.first, resolved.reselect.observed) == (int(at[9:]), int(layer[9:]))
    assert resolve(load_policy(resolved.to_yaml()), model).policy == resolved.policy
