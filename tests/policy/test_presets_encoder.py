"""Presets that select by the vision encoder's attention, against their papers' formulas in plain Python."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from policy_cases import layout, policy, step

from tvc.errors import PolicyError, SiteError
from tvc.kernels.budget import Budget
from tvc.kernels.op import Attention, Scope
from tvc.kernels.select_anchors import Anchors, anchors_of
from tvc.kernels.select_pairs import rounds_of
from tvc.kernels.select_rows import Rows
from tvc.passes.reduction import decide
from tvc.policy import Step, load_policy, resolve
from tvc.program import Layout

SIDE, HEADS, WIDTH = 24, 2, 8
TOKENS = SIDE * SIDE
CLIP = dataclasses.replace(layout(vision=24, language=32, visual=(TOKENS,)), tile_tokens=TOKENS + 1)
Row = list[float]


def preset(name: str, *settings: str, model: Layout = CLIP) -> Step:
    (only,) = resolve(load_policy(name, set=settings), model).steps
    return only


class Encoder:
    """Queries and keys of every layer of one picture, the class token first, and its projected features."""

    def __init__(self, seed: int, tokens: int = TOKENS):
        self.generator = torch.Generator().manual_seed(seed)
        self.tokens, self.layers = tokens, {}
        self.feature = torch.randn(1, tokens, WIDTH, generator=self.generator)

    def layer(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        if name not in self.layers:
            shape = (2, 1, HEADS, self.tokens + 1, WIDTH)
            self.layers[name] = torch.randn(shape, generator=self.generator)
        query, key = self.layers[name]
        return query, key

    def score(self, primitive: Any) -> torch.Tensor:
        """[1, V] what the compiled encoder hands on for one term."""
        query, key = self.layer(primitive.layer)
        rows = torch.arange(1 if primitive.of == "cls" else self.tokens + 1)[None]
        return primitive.apply(Attention(query, key, None, rows, torch.arange(1, self.tokens + 1)[None, :, None], 0.5))

    def received(self, number: int, cls: bool) -> Row:
        """The attention that each patch of layer `number` gets, of its class token alone or of all tokens."""
        query, key = self.layer(f"vision.{number}")
        full = (query @ key.transpose(2, 3) * 0.5).double().softmax(3)[0].mean(0)
        return (full[0] if cls else full.mean(0))[1:].tolist()


def kept(one: Step, *encoders: Encoder) -> list[list[int]]:
    """What the step keeps of pictures of one sample, each numbered from 0."""
    lengths = [encoder.tokens for encoder in encoders]
    segment = torch.repeat_interleave(torch.arange(len(encoders)), torch.tensor(lengths))[None]
    scores = [torch.cat([encoder.score(term.primitive) for encoder in encoders], 1) for term in one.score]
    feature = torch.cat([encoder.feature for encoder in encoders], 1)
    assert one.select is not None
    taps = {"select": dict.fromkeys(one.select.taps(), feature)}
    chosen = decide(one, feature, torch.ones(segment.shape), segment, torch.tensor([lengths]), scores, taps).chosen[0]
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    inside = [[v for v in chosen.tolist() if v >= 0 and segment[0, v] == i] for i in range(len(lengths))]
    assert [len(found) for found in inside] == one.select.kept(lengths)
    return [[v - start for v in found] for found, start in zip(inside, starts, strict=True)]


def best(values: Row, number: int, among: list[int] | None = None) -> list[int]:
    return sorted(among if among is not None else range(len(values)), key=lambda v: (-values[v], v))[:number]


def layers(one: Step) -> list[str]:
    return [term.primitive.layer for term in one.score]  # type: ignore[attr-defined]


# VTC-CLS


def test_vtc_cls_adds_up_the_layers_of_the_published_default() -> None:
    one, encoder = preset("vtc-cls", "keep=36"), Encoder(0)
    assert layers(one) == [f"vision.{k}" for k in range(16, 23)]
    total = [sum(column) for column in zip(*(encoder.received(k, cls=True) for k in range(16, 23)), strict=True)]
    assert kept(one, encoder) == [sorted(best(total, 36))]
    assert kept(one, encoder) != [sorted(best(encoder.received(22, cls=True), 36))]


def test_a_range_of_layers_is_one_term_a_layer() -> None:
    score = "score: [{{attention: {{of: all, layer: {}}}, weight: 0.5}}]\n    select: {{top: 3}}"
    text = policy(step("language.0", score.format("vision.50%..-1")))
    (one,) = resolve(load_policy(text), layout(vision=6)).steps
    assert layers(one) == ["vision.3", "vision.4", "vision.5"]
    assert {term.weight for term in one.score} == {0.5}
    used = dataclasses.replace(layout(vision=6), used_vision_blocks=5)
    (every,) = resolve(load_policy(policy(step("language.0", score.format("vision.all")))), used).steps
    assert layers(every) == [f"vision.{k}" for k in range(5)]


def test_a_range_without_a_layer_is_refused() -> None:
    with pytest.raises(SiteError, match="empty-range"):
        resolve(load_policy("vtc-cls"), layout(vision=3))


def test_a_range_does_not_reach_behind_its_site() -> None:
    score = "score: {attention: {of: last, layer: language.0..3}}\n    select: {top: 3}"
    with pytest.raises(SiteError, match="later-layer"):
        resolve(load_policy(policy(step("language.2", score))), layout())


# FasterVLM


@pytest.mark.parametrize("tokens", [37, TOKENS])
@pytest.mark.parametrize("keep", ["1", "25%", "5.1%", "100%"])
def test_fastervlm_keeps_what_the_class_token_attends_to(tokens: int, keep: str) -> None:
    one, encoder = preset("fastervlm", f"keep={keep}"), Encoder(tokens, tokens)
    assert layers(one) == ["vision.22"]
    number = 1 if keep == "1" else math.floor(tokens * float(keep[:-1]) / 100)
    assert kept(one, encoder) == [sorted(best(encoder.received(22, cls=True), number))]


@pytest.mark.parametrize("name", ["fastervlm", "vtc-cls", "visionzip"])
def test_of_equally_attended_tokens_the_first_stay(name: str) -> None:
    one, encoder = preset(name, "keep=5", *(["contextual=2"] if name == "visionzip" else [])), Encoder(3, 37)
    for layer in layers(one):
        query, key = encoder.layer(layer)
        encoder.layers[layer] = torch.stack([query, torch.ones_like(key)])
    one = dataclasses.replace(one, rest=preset("fastervlm").rest)  # what becomes of the others is tested elsewhere
    assert kept(one, encoder) == [list(range(5))]


# HiPrune


def hiprune(encoder: Encoder, budget: int, side: int, share: float = 0.1) -> list[int]:
    middle, deep = encoder.received(8, cls=False), encoder.received(22, cls=False)
    anchors = best(middle, round(budget * share / 5))
    near = {min(max(v + d, 0), encoder.tokens - 1) for v in anchors for d in (0, 1, -1, side, -side)}
    left = [v for v in range(encoder.tokens) if v not in near]
    return sorted([*near, *best(deep, budget - len(near), left)])


@pytest.mark.parametrize("budget", [192, 128, 64, 25])
def test_hiprune_keeps_anchors_their_neighbours_and_the_best_of_a_deep_layer(budget: int) -> None:
    one, encoder = preset("hiprune", f"keep={budget}"), Encoder(budget)
    assert layers(one) == ["vision.8", "vision.22"]
    assert one.select is not None
    assert one.select.columns == SIDE  # type: ignore[attr-defined]
    assert kept(one, encoder) == [hiprune(encoder, budget, SIDE)]


def test_hiprune_has_as_many_anchors_as_published() -> None:
    budgets = torch.tensor([[192, 128, 64, 32, 25, 20, 75, 125]])
    assert anchors_of(budgets, 100).tolist() == [[4, 3, 1, 1, 0, 0, 2, 2]]
    assert anchors_of(budgets, 100).tolist() == [[round(n * 0.1 / 5) for n in budgets[0].tolist()]]


def test_hiprune_takes_each_picture_by_itself() -> None:
    one, pictures = preset("hiprune", "keep=64"), (Encoder(1), Encoder(2))
    assert kept(one, *pictures) == [hiprune(picture, 64, SIDE) for picture in pictures]


def test_more_anchors_than_the_budget_holds_leave_the_best_of_them() -> None:
    scope = Scope(torch.zeros(1, 9, dtype=torch.int64), torch.tensor([[9]]), 1)
    select = Anchors(keep=Budget(count=3), share=1000, columns=3)
    middle, deep = torch.tensor([[0.0, 0, 0, 0, 1, 0, 0, 0, 0]]), torch.arange(9.0)[None]
    score = select.joined([middle, deep], scope)
    assert select.apply(score, scope).tolist() == [[4, 5, 7]]


def test_two_terms_are_two_terms() -> None:
    one_term = "score: {attention: {of: all, layer: vision.-2}}\n    select: {anchors: 25%}"
    with pytest.raises(SiteError, match="score-terms"):
        resolve(load_policy(policy(step("language.0", one_term))), layout())


# Grids


def test_a_grid_is_that_of_a_tile() -> None:
    tiled = dataclasses.replace(layout(visual=(320, 320)), tiles=10)
    assert [tiled.columns(c) for c in ("vision", "language")] == [8, 8]
    joined = dataclasses.replace(layout(prefix=0, visual=(16,)), group=4)
    assert [joined.columns(c) for c in ("vision", "language")] == [8, 4]


@pytest.mark.parametrize(
    "changes",
    [{"in_order": False}, {"visual_tokens": (72,)}, {"tile_tokens": 61, "visual_tokens": (60,)}],
    ids=["stitched", "newlines", "no-square"],
)
def test_a_model_without_square_tiles_is_refused_unless_the_row_is_written(changes: dict[str, Any]) -> None:
    model = dataclasses.replace(layout(), **changes)
    for name in ("hiprune", "fopru-row"):
        with pytest.raises(SiteError, match="no-grid"):
            resolve(load_policy(name, set=["keep=50%"]), model)
    (one,) = resolve(load_policy("fopru-row", set=["keep=50%", "steps.0.select.rows.columns=12"]), model).steps
    assert one.select is not None
    assert one.select.kept([60]) == [24]


def test_a_grid_with_gaps_is_refused() -> None:
    score = "score: {attention: {of: all, layer: vision.-2}}\n    select: {rows: 50%}"
    text = policy(step("language.0", "select: {stride: 50%}"), step("language.2", score))
    with pytest.raises(SiteError, match="broken-grid"):
        resolve(load_policy(text), layout())


def test_selectors_on_a_grid_ask_for_a_resolved_policy() -> None:
    scope = Scope(torch.zeros(1, 4, dtype=torch.int64), torch.tensor([[4]]), 1)
    with pytest.raises(PolicyError, match="unresolved-grid"):
        Rows(keep=Budget(count=4)).apply(torch.zeros(1, 4), scope)
    with pytest.raises(PolicyError, match="unresolved-grid"):
        Anchors(keep=Budget(count=4)).joined([torch.zeros(1, 4)] * 2, scope)


# FoPru


def test_fopru_rank_takes_the_tokens_that_all_attend_to() -> None:
    one, encoder = preset("fopru-rank"), Encoder(3)
    assert kept(one, encoder) == [sorted(best(encoder.received(22, cls=False), 144))]


def test_fopru_row_takes_whole_rows() -> None:
    one, encoder = preset("fopru-row"), Encoder(4)
    values = encoder.received(22, cls=False)
    sums = [sum(values[row * SIDE : (row + 1) * SIDE]) for row in range(SIDE)]
    assert kept(one, encoder) == [[v for v in range(TOKENS) if v // SIDE in best(sums, 6)]]


def test_less_than_a_row_is_refused_with_what_keeps_one() -> None:
    with pytest.raises(SiteError, match=r"keep: 4\.2%, or keep: 24;"):
        resolve(load_policy("fopru-row", set=["keep=4.1%"]), CLIP)


# HoloV


def holov(encoder: Encoder, budget: int) -> list[int]:
    values, rows = encoder.received(22, cls=True), encoder.feature[0].double().tolist()
    units = [[x / (math.sqrt(sum(y * y for y in row)) + 1e-6) for x in row] for row in rows]
    size, worth, chunks = encoder.tokens // 16, [], []
    for start in range(0, encoder.tokens, size):
        chunk = list(range(start, start + size))
        alike = [[sum(a * b for a, b in zip(units[i], units[j], strict=True)) * (i != j) for j in chunk] for i in chunk]
        means = [sum(row) / (size - 1) for row in alike]
        spread = [sum((c - m) ** 2 for c in row) / (size - 1) for row, m in zip(alike, means, strict=True)]
        raised = [1000 * values[v] for v in chunk]
        scale = sum(raised) / size / (sum(spread) / size + 1e-6)
        worth.append(sum(a + 0.09 * scale * s for a, s in zip(raised, spread, strict=True)) / size)
        chunks.append(chunk)
    share = [w / (sum(worth) + 1e-6) for w in worth]
    given = [int(s * budget) for s in share]
    for number in best(share, budget - sum(given)):
        given[number] += 1
    taken = [v for chunk, amount in zip(chunks, given, strict=True) for v in best(values, amount, chunk)]
    return sorted(taken + best(values, budget - len(taken), [v for v in range(encoder.tokens) if v not in taken]))


@pytest.mark.parametrize("budget", [192, 64])
def test_holov_gives_each_stretch_its_budget(budget: int) -> None:
    one, encoder = preset("holov", f"keep={budget}"), Encoder(budget)
    assert kept(one, encoder) == [holov(encoder, budget)]
    assert kept(one, encoder) != [sorted(best(encoder.received(22, cls=True), budget))]


def test_holov_takes_each_picture_by_itself() -> None:
    one, pictures = preset("holov", "keep=64"), (Encoder(5), Encoder(6))
    assert kept(one, *pictures) == [holov(picture, 64) for picture in pictures]


def test_the_published_budgets_are_shares() -> None:
    assert [Budget(permille=p).kept(TOKENS) for p in (334, 223, 112)] == [192, 128, 64]


# VisPruner


def exact_directions(encoder: Encoder) -> None:
    """Features whose cosines are sixteenths, so that no rounding decides which pair is closer."""
    places = torch.rand(1, encoder.tokens, 64, generator=encoder.generator).argsort(2)[:, :, :16]
    signs = torch.randint(0, 2, places.shape, generator=encoder.generator) * 2.0 - 1.0
    encoder.feature = torch.zeros(1, encoder.tokens, 64).scatter(2, places, signs)


def vispruner(encoder: Encoder, budget: int) -> tuple[list[int], int]:
    """(what stays, rounds)."""
    order = best(encoder.received(22, cls=True), encoder.tokens)
    important, line = order[: budget // 2], order[budget // 2 :]
    cosine, rounds = encoder.feature[0].double() @ encoder.feature[0].double().T / 16, 0
    while len(line) > budget - len(important):
        even, odd = line[::2], line[1::2]
        alike = dict(zip(even, cosine[even][:, odd].amax(1).tolist(), strict=True))
        even.sort(key=lambda v, alike=alike: (-alike[v], v))  # type: ignore[misc]
        line = even[min(8, len(line) - (budget - len(important))) :] + odd
        rounds += 1
    return sorted(important + line), rounds


@pytest.mark.parametrize(("budget", "rounds"), [(64, 64), (128, 56), (192, 48)])
def test_vispruner_removes_near_duplicates_in_the_published_rounds(budget: int, rounds: int) -> None:
    one, encoder = preset("vispruner", f"keep={budget}"), Encoder(budget)
    exact_directions(encoder)
    assert (kept(one, encoder)[0], rounds) == vispruner(encoder, budget)


@pytest.mark.parametrize("drop", [1, 3, 8, 20])
def test_rounds_suffice_for_every_size(drop: int) -> None:
    bound = rounds_of(torch.arange(90), drop).tolist()
    for size in range(1, 90):
        for wanted in range(size):
            left, rounds = size, 0
            while left > wanted:
                left -= min(drop, left - wanted, (left + 1) // 2)
                rounds += 1
            assert rounds <= bound[size - wanted]
