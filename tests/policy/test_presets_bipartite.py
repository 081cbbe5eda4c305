"""Merging without a selection: ranges of sites, what they mean for a model, and three papers' formulas by hand."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from typing import Any

import pytest
import torch
from policy_cases import layout, policy, step
from pydantic import ValidationError

import support
from tvc.errors import PolicyError, SiteError
from tvc.graphs import open_draft
from tvc.kernels.budget import Budget
from tvc.kernels.merge_bipartite import Bipartite, Spread
from tvc.kernels.op import Scope
from tvc.passes.insert_vision import PLACE, VisionInsertion
from tvc.passes.retrace import export_draft
from tvc.policy import ResolvedPolicy, json_schema, load_policy, resolve
from tvc.program import Layout
from tvc.report.schedule import make_plan, solve_kept
from tvc.trace.load import load
from tvc.trace.survey import survey
from tvc.trace.vision import capture_vision

PAIRS = "merge: {bipartite: {keep: 50%}}"
Row = list[float]


def encoder(tokens: int, blocks: int, used: int, prefix: int = 1) -> Layout:
    """A model with one tile an image, whose features come out of block `used` - 1."""
    made = layout(vision=blocks, prefix=prefix, visual=(tokens,))
    unused = {f"vision.{block}" for block in range(used, blocks)}
    sites = tuple(dataclasses.replace(site, legal=site.name not in unused) for site in made.sites)
    return dataclasses.replace(made, tile_tokens=tokens + prefix, used_vision_blocks=used, sites=sites)


def sites(text: str, model: Layout | None = None) -> list[str]:
    return [s.at for s in resolve(load_policy(text), model or layout()).steps]


def last(resolved: ResolvedPolicy, tokens: int) -> int:
    """Tokens behind the last step."""
    for each in resolved.steps:
        assert each.merge is not None
        (tokens,) = each.merge.kept([tokens])
    return tokens


# Ranges of sites ------------------------------------------------------------------------------------------------------


def test_a_range_becomes_a_step_at_each_of_its_sites() -> None:
    assert sites(policy(step("vision.1..-2", PAIRS))) == [f"vision.{i}" for i in (1, 2, 3, 4)]
    assert sites(policy(step("language.50%..-4", "select: {stride: 90%}"))) == [f"language.{i}" for i in (6, 7, 8)]
    assert sites(policy(step("vision.3..3", PAIRS))) == ["vision.3"]
    assert sites(policy(step("language.all", "select: {stride: 99%}"))) == [f"language.{i}" for i in range(12)]


def test_all_blocks_are_those_that_the_features_depend_on() -> None:
    assert sites(policy(step("vision.all", PAIRS)), encoder(64, 6, 5)) == [f"vision.{i}" for i in range(5)]


def test_each_step_of_a_range_has_its_own_layer() -> None:
    text = policy(step("vision.1..3", "merge: {bipartite: {remove: 2, by: key_cosine, layer: previous}}"))
    steps = resolve(load_policy(text), layout()).steps
    assert [s.merge.layer for s in steps] == ["vision.0", "vision.1", "vision.2"]  # type: ignore[union-attr]
    assert {(s.where, s.number) for s in steps} == {("policy text:3, steps[0]", 0)}


def test_a_range_that_ends_before_it_starts_is_refused() -> None:
    with pytest.raises(PolicyError, match="empty-range") as caught:
        load_policy(policy(step("vision.4..2", PAIRS)))
    assert caught.value.where == "policy text:3, steps[0].at"
    with pytest.raises(SiteError, match="empty-range") as late:
        resolve(load_policy(policy(step("vision.4..-4", PAIRS))), layout())
    assert late.value.where == "policy text:3, steps[0].at"


def test_a_mistake_in_a_range_points_at_the_line_that_was_written() -> None:
    text = policy(step("vision.1..2", PAIRS), step("language.1..9", "score: {attention: cls}\n    select: {top: 9}"))
    with pytest.raises(SiteError, match="no-cls") as caught:
        resolve(load_policy(text), layout())
    assert caught.value.where.startswith("policy text:6, steps[1].score")
    emptied = policy(step("vision.1..2", PAIRS), step("language.1..9", "select: {stride: 30%}"))
    with pytest.raises(SiteError, match="keeps-nothing") as caught:
        resolve(load_policy(emptied), layout())
    assert caught.value.where.startswith("policy text:6, steps[1].select")


@pytest.mark.parametrize(
    ("one", "other", "slug"),
    [
        ("vision.1..3", "vision.3..4", "same-site"),
        ("vision.1..3", "vision.2", "step-order"),
        ("vision.all", "vision.-1", "same-site"),
        ("language.2", "vision.all", "step-order"),
    ],
)
def test_ranges_that_meet_or_cross_are_refused(one: str, other: str, slug: str) -> None:
    with pytest.raises(PolicyError, match=slug):
        load_policy(policy(step(one, "select: {stride: 90%}"), step(other, "select: {stride: 90%}")))


def test_ranges_that_meet_in_a_model_alone_are_refused_there() -> None:
    loaded = load_policy(policy(step("vision.1..50%", PAIRS), step("vision.3", PAIRS)))
    with pytest.raises(SiteError, match="same-site") as caught:
        resolve(loaded, layout())
    assert caught.value.where == "policy text:5, steps[1].at"


def test_an_exit_that_always_happens_has_one_site() -> None:
    with pytest.raises(SiteError, match="unreachable-step"):
        resolve(load_policy(policy(step("language.3..5", "exit: {when: always}"))), layout())


# A step that only merges ----------------------------------------------------------------------------------------------


def test_a_merge_is_a_step_of_its_own() -> None:
    (only,) = load_policy(policy(step("projector", PAIRS))).steps
    assert (only.select, only.rest, only.exit, only.score) == (None, None, None, ())
    assert only.merge == Bipartite(keep=Budget(permille=500))
    assert only.primitives() == (only.merge,)
    assert list(only.parts()) == ["merge"]
    short = load_policy(policy(step("projector", "merge: {bipartite: 50%}")))
    assert short.digest() == load_policy(policy(step("projector", PAIRS))).digest()


@pytest.mark.parametrize(
    ("more", "slug"),
    [
        ("score: uniform", "unused-score"),
        ("rest: drop", "unused-rest"),
        ("select: {stride: 3}", "select-and-exit"),
        ("exit: {when: always}", "select-and-exit"),
    ],
)
def test_a_merge_stands_alone(more: str, slug: str) -> None:
    with pytest.raises(PolicyError, match=slug):
        load_policy(policy(step("language.2", f"{PAIRS}\n    {more}")))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"keep": "50%", "remove": 3},
        {"remove": 3, "spread": "steps"},
        {"keep": 64},
        {"keep": {"average": 64}},
        {"keep": {"average": 64}, "spread": "steps"},
        {"remove": 0},
        {"keep": "50%", "by": "attention"},
    ],
)
def test_bipartite_refuses(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Bipartite.model_validate(settings)


def test_a_spread_without_a_model_has_no_numbers() -> None:
    with pytest.raises(PolicyError, match="unresolved-spread"):
        Bipartite(keep=Budget(permille=500), spread="steps").kept([64])


def test_sizes_weigh_in_the_encoder_alone() -> None:
    text = policy(step("language.2", "merge: {bipartite: {keep: 50%, proportional: true}}"))
    with pytest.raises(SiteError, match="sizes-unknown") as caught:
        resolve(load_policy(text), layout())
    assert caught.value.where == "policy text:4, steps[0].merge.bipartite.proportional"


def test_the_schema_of_the_language_knows_merges_and_ranges() -> None:
    definition = json_schema()["$defs"]["step"]
    assert {"required": ["merge"]} in definition["oneOf"]
    assert "bipartite" in json.dumps(definition["properties"]["merge"])
    assert "all" in definition["properties"]["at"]["anyOf"][0]["pattern"]


# Budgets --------------------------------------------------------------------------------------------------------------


def test_tinychart_leaves_732_of_2916_tokens() -> None:
    resolved = resolve(load_policy("tinychart"), encoder(2916, 27, 26, prefix=0))
    assert len(resolved.steps) == 26
    assert last(resolved, 2916) == 732
    assert resolved.steps[0].merge.kept([2916]) == [2916 - 84]  # type: ignore[union-attr]


@pytest.mark.parametrize(("keep", "removed", "left"), [("80%", 3, 588), ("50%", 7, 400), ("20%", 12, 165)])
def test_auroracap_merges_as_many_as_its_code(keep: str, removed: int, left: int) -> None:
    resolved = resolve(load_policy("auroracap", set=[f"keep={keep}"]), encoder(729, 48, 47))
    assert len(resolved.steps) == 47
    assert resolved.steps[0].merge.kept([729]) == [729 - removed]  # type: ignore[union-attr]
    assert last(resolved, 729) == left


def test_tome_merges_16_in_each_of_23_blocks() -> None:
    resolved = resolve(load_policy("tome"), encoder(576, 24, 23))
    assert last(resolved, 576) == 576 - 23 * 16
    plan = make_plan(resolved, encoder(576, 24, 23))
    assert plan.vision_tokens == tuple(577 - 16 * (block + 1) for block in range(23))
    assert [layer.visual for layer in plan.layers] == [208] * 12


def test_two_rounds_leave_a_quarter() -> None:
    twice = Bipartite(keep=Budget(permille=250), reduce="mean")
    assert twice.kept([196, 16, 7, 1, 0]) == [49, 4, 2, 1, 0]
    assert Bipartite(keep=Budget(permille=15)).kept([196]) == [4]  # each round rounds up
    assert Bipartite(keep=Budget(permille=1000)).kept([7]) == [7]


def test_a_count_can_be_spread_too() -> None:
    made = Bipartite(keep=Budget(count=100), spread="steps").for_model(tokens=196, steps=8, blocks=12)
    assert made.spread == Spread(tokens=196, parts=8)
    assert made.kept([196]) == [184]


def test_a_solved_budget_is_a_setting_of_the_step_that_was_written() -> None:
    written, model = load_policy("tome"), encoder(576, 24, 23)
    solved = solve_kept(resolve(written, model), model, 300)
    assert list(solved.settings) == ["steps.0.merge.bipartite.keep"]
    again = resolve(written.with_settings(solved.settings), model)
    assert solved.plan.layers[0].visual == last(again, 576) == 576 - 23 * 12


# By hand --------------------------------------------------------------------------------------------------------------


def _cosine(one: Row, other: Row) -> float:
    dot = sum(a * b for a, b in zip(one, other, strict=True))
    return dot / math.sqrt(sum(a * a for a in one) * sum(b * b for b in other))


def matched(metric: list[Row], removed: int) -> list[tuple[int, int]]:
    """(source, target) of each merge, as both papers say it."""
    sources, targets = range(0, len(metric), 2), range(1, len(metric), 2)
    likes = {a: {b: _cosine(metric[a], metric[b]) for b in targets} for a in sources}
    best = {a: max(row, key=lambda b, row=row: row[b]) for a, row in likes.items()}
    first = sorted(sources, key=lambda a: -likes[a][best[a]])[:removed]
    return [(a, best[a]) for a in first]


def whole(tokens: int, full: bool) -> Scope:
    return Scope(torch.zeros(1, tokens, dtype=torch.int64), torch.tensor([[tokens]]), 1, full)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("tokens", [196, 20])
def test_the_merge_of_aim_is_two_rounds_of_plain_means(tokens: int, full: bool) -> None:
    torch.manual_seed(0)
    feature = torch.randn(1, tokens, 8)
    rows, original = feature[0].double().tolist(), list(range(tokens))
    for removed in (tokens // 2, tokens // 4):
        pairs = matched(rows, removed)
        gone = {a for a, _ in pairs}
        groups = {b: [rows[b], *(rows[a] for a, target in pairs if target == b)] for b in range(1, len(rows), 2)}
        made = {b: [sum(column) / len(group) for column in zip(*group, strict=True)] for b, group in groups.items()}
        left = [v for v in range(len(rows)) if v not in gone]
        rows, original = [made.get(v, rows[v]) for v in left], [original[v] for v in left]
    assert original == list(range(3, tokens, 4))
    merge = Bipartite(keep=Budget(permille=250), reduce="mean")
    index, merged, size = merge.apply(feature, torch.ones(1, tokens), whole(tokens, full))
    assert index[0].tolist() == original
    torch.testing.assert_close(merged[0].double(), torch.tensor(rows, dtype=torch.float64), rtol=1e-5, atol=1e-6)
    assert size.sum() == tokens


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(("tokens", "removed"), [(196, 8), (31, 15), (31, 99)])
def test_a_round_of_tome_weighs_by_size(tokens: int, removed: int, full: bool) -> None:
    torch.manual_seed(1)
    feature, metric = torch.randn(1, tokens, 8), torch.randn(1, tokens, 4)
    size = torch.randint(1, 5, (1, tokens)).float()
    pairs = matched(metric[0].double().tolist(), min(removed, tokens // 2))
    weighed, sizes = (feature * size[:, :, None])[0].double(), size[0].double().clone()
    for a, b in pairs:
        weighed[b] += weighed[a]
        sizes[b] += sizes[a]
    published = [v for v in range(0, tokens, 2) if v not in {a for a, _ in pairs}] + list(range(1, tokens, 2))
    order = sorted(published)
    merge = Bipartite(remove=removed, by="key_cosine")
    index, merged, after = merge.apply(feature, size, whole(tokens, full), metric)
    assert index[0].tolist() == order
    torch.testing.assert_close(after[0].double(), sizes[order])
    torch.testing.assert_close(merged[0].double(), (weighed / sizes[:, None])[order], rtol=1e-5, atol=1e-6)


# Inside an encoder ----------------------------------------------------------------------------------------------------


def by_hand(model: Any, pixels: torch.Tensor, removed: int, weigh: bool) -> tuple[torch.Tensor, list[int]]:
    """Features and surviving patches of one picture: a plain loop over the blocks of a CLIP tower that merges."""
    tower = model.model.vision_tower
    tower = getattr(tower, "vision_model", tower)
    hidden = tower.pre_layrnorm(tower.embeddings(pixels))[0]
    patches, size = list(range(len(hidden) - 1)), torch.ones(len(hidden) - 1)
    for block in tower.encoder.layers[:-1]:
        attention = block.self_attn
        heads, width = attention.num_heads, attention.head_dim
        keys = attention.k_proj(block.layer_norm1(hidden))[1:].unflatten(1, (heads, width)).mean(1)
        rows = hidden[1:] * size[:, None]
        pairs = matched(keys.double().tolist(), removed)
        for a, b in pairs:
            rows[b] += rows[a]
            size[b] += size[a]
        left = [v for v in range(len(rows)) if v not in {a for a, _ in pairs}]
        rows, size, patches = rows[left] / size[left, None], size[left], [patches[v] for v in left]
        hidden = torch.cat([hidden[:1], rows])
        inner, outputs = block.layer_norm1(hidden), []
        query, key, value = (p(inner) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            logits = query[:, part] @ key[:, part].T / math.sqrt(width)
            if weigh:
                logits[:, 1:] += size.log()
            outputs.append(logits.softmax(1) @ value[:, part])
        hidden = hidden + attention.out_proj(torch.cat(outputs, 1))
        hidden = hidden + block.mlp(block.layer_norm2(hidden))
    return model.model.multi_modal_projector(hidden[1:]), patches


@torch.no_grad()
def test_an_encoder_with_tome_equals_a_loop_over_its_blocks() -> None:
    model, processor = support.build("llava")
    surveyed = survey(load(model, processor=processor).meta, processor)
    resolved = resolve(load_policy("tome"), surveyed.layout)
    names = [s.at for s in resolved.steps]
    assert names == ["vision.0", "vision.1", "vision.2"]
    component = capture_vision(model, surveyed.host, surveyed.sample, names)
    component.draft = open_draft(component)
    VisionInsertion(component, surveyed.layout).cut(list(resolved.steps))
    export_draft(component)
    pixels = support.inputs("llava", 2)["pixel_values"]
    features, place = open_draft(component)(pixels)
    assert component.outputs == ("visual_features", PLACE)
    assert features.shape[1] == 16 - 3 * 3
    for number in range(2):
        (weighed, patches), (plain, _) = (by_hand(model, pixels[number : number + 1], 3, w) for w in (True, False))
        stays = [v for v, row in enumerate(place[number].tolist()) if row >= 0]
        assert stays == patches
        assert [row for row in place[number].tolist() if row >= 0] == list(range(len(patches)))
        torch.testing.assert_close(features[number], weighed, rtol=1e-4, atol=1e-4)
        assert (features[number] - plain).abs().max() > 1e-2


def test_pairs_of_a_policy_survive_their_text() -> None:
    for name, keep in itertools.product(("tome", "tinychart", "auroracap"), ("25%", "75%")):
        model = encoder(64, 6, 5)
        resolved = resolve(load_policy(name, set=[f"keep={keep}"]), model)
        again = load_policy(resolved.to_yaml())
        assert again == resolved.policy
        assert resolve(again, model).policy == resolved.policy
