"""What a policy can name: parameters, taps, counts, and the properties that every selection and merge has."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_one_graph import Inputs, make
from kernel_oracles import ORACLES
from pydantic import ValidationError

from tvc.errors import PolicyError
from tvc.kernels import PRIMITIVES
from tvc.kernels.budget import Budget
from tvc.kernels.combine_scores import combine
from tvc.kernels.exit_select import exit_chosen
from tvc.kernels.op import Attention, Scope, Tap
from tvc.kernels.rest_drop import Drop
from tvc.kernels.rest_merge import Merge
from tvc.kernels.score_attention import AttentionScore
from tvc.kernels.score_cosine import CosineScore
from tvc.kernels.score_norm import NormScore
from tvc.kernels.score_random import PRIME, RandomScore
from tvc.kernels.score_uniform import UniformScore
from tvc.kernels.select_chunks import Chunks
from tvc.kernels.select_log_det import LogDet
from tvc.kernels.select_max_min import MaxMin
from tvc.kernels.select_max_sum import MaxSum
from tvc.kernels.select_medoids import Medoids
from tvc.kernels.select_pairs import Pairs
from tvc.kernels.select_stride import Stride
from tvc.kernels.select_threshold import Threshold
from tvc.kernels.select_top import Top
from tvc.kernels.when_always import Always
from tvc.kernels.when_threshold import ThresholdGate

IMAGES = st.lists(st.lists(st.integers(1, 9), min_size=0, max_size=3), min_size=1, max_size=3)
SHARES = st.integers(1, 1000).map(lambda p: f"{p // 10}.{p % 10}%")
ROUNDED = st.builds(lambda share, how: {"share": share, "round": how}, SHARES, st.sampled_from(["nearest", "up"]))
BUDGETS = st.one_of(st.integers(1, 12), SHARES, st.sampled_from(["1/3", "6/7"]), ROUNDED)


def chunk(images: list[list[int]], seed: int = 0) -> Inputs:
    return make(images, [2] * len(images), seed=seed)


def scope_of(at: Inputs) -> Scope:
    return Scope(at.segment, at.counts, at.counts.shape[1])


def valid(row: torch.Tensor) -> list[int]:
    return [index for index in row.tolist() if index >= 0]


def ordinals(number: int) -> torch.Tensor:
    return torch.arange(number)[None]


# Parameters


@pytest.mark.parametrize(
    ("kind", "key", "parameters"),
    [
        ("score", "attention", {"of": ["cls", "all"], "layer": "vision.-2", "heads": "sum"}),
        ("score", "cosine", {"to": "text", "prefer": "different"}),
        ("score", "norm", {"of": "key", "order": 1.0}),
        ("score", "random", {"seed": 3}),
        ("score", "uniform", {}),
        ("select", "top", {"keep": "12.5%"}),
        ("select", "stride", {"keep": 54}),
        ("select", "threshold", {"relative": 0.5}),
        ("rest", "drop", {}),
        ("rest", "merge", {"targets": {"stride": 10}, "by": "key_cosine", "reduce": "target_mean"}),
        ("rest", "merge", {"targets": "kept"}),
        ("when", "always", {}),
        ("when", "threshold", {"reduce": "mean", "below": 0.1}),
    ],
)
def test_primitive_dumps_what_it_was_given(kind: Any, key: str, parameters: dict[str, Any]) -> None:
    made = PRIMITIVES[kind][key].model_validate(parameters)
    assert made.model_dump(mode="json", exclude_unset=True) == parameters


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        (AttentionScore, {"of": "middle"}),
        (AttentionScore, {"head": "mean"}),
        (NormScore, {"order": 0.0}),
        (RandomScore, {"seed": -1}),
        (Top, {"keep": 0.5}),
        (Top, {}),
        (Threshold, {}),
        (Threshold, {"above": 0.1, "relative": 0.5}),
        (Threshold, {"relative": 1.5}),
        (Merge, {"targets": {"stride": 0}}),
        (Merge, {"targets": {"rows": 3}}),
        (Merge, {"targets": "best"}),
        (ThresholdGate, {"reduce": "max"}),
        (ThresholdGate, {"above": 0.1, "below": 0.2}),
        (Drop, {"to": "nothing"}),
    ],
)
def test_primitive_refuses(model: type[Any], parameters: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        model.model_validate(parameters)


def test_primitives_name_their_taps() -> None:
    of = AttentionScore(of=("cls", "all"), layer="vision.-2")
    assert of.taps() == {"attention": Tap("attention", "vision.-2", ("cls", "all"))}
    assert CosineScore(to="last").taps() == {"feature": Tap("feature"), "text": Tap("text")}
    assert CosineScore().taps() == {"feature": Tap("feature"), "ordinal": Tap("ordinal")}
    assert NormScore(of="key", layer="language.3").taps() == {"vector": Tap("key", "language.3")}
    assert Merge(by="key_cosine", layer="vision.-2").taps() == {"metric": Tap("key", "vision.-2")}
    assert Merge().taps() == Drop().taps() == Always().taps() == Top(keep=Budget(count=1)).taps() == {}


# Scores


def test_attention_score_equals_the_column_of_a_full_attention_matrix() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8)
    mask = torch.ones(9, 9, dtype=torch.bool).tril()[None, None]
    full = (query @ key.repeat_interleave(2, 1).transpose(2, 3) * 0.3).masked_fill(~mask, -math.inf).softmax(-1)
    columns = torch.arange(2, 7)[None, :, None].repeat(2, 1, 1)
    bundle = Attention(query, key, mask, torch.tensor([[8], [8]]), columns, 0.3)
    torch.testing.assert_close(AttentionScore().apply(bundle), full[:, :, 8, 2:7].mean(1))


def test_cosine_last_reads_the_last_text_token_alone() -> None:
    at = chunk([[3, 2], [4]])
    text = (at.text, torch.tensor([[True, True], [True, False]]))
    got = CosineScore(to="last").apply(feature=at.feature, text=text)
    last = torch.stack([at.text[0, 1], at.text[1, 0]])[:, None]
    torch.testing.assert_close(got, torch.nn.functional.cosine_similarity(at.feature, last, dim=2))


def test_cosine_prefers_the_unusual_unless_told() -> None:
    at = chunk([[3, 2]])
    taps = {"feature": at.feature, "ordinal": at.ordinal}
    assert torch.equal(CosineScore().apply(**taps), -CosineScore(prefer="similar").apply(**taps))


def test_norm_can_prefer_the_small() -> None:
    at = chunk([[3, 2]])
    assert torch.equal(NormScore(prefer="small").apply(at.feature), -NormScore().apply(at.feature))


@given(st.integers(0, 2**63 - 1))
@settings(max_examples=20)
def test_random_scores_never_tie_and_do_not_lean(seed: int) -> None:
    score = RandomScore(seed=seed).apply(ordinals(4096))[0]
    assert score.unique().numel() == 4096
    assert abs(score.mean().item() - 0.5) < 0.04
    assert abs(torch.corrcoef(torch.stack([score, torch.arange(4096.0)]))[0, 1].item()) < 0.08


def test_random_seeds_choose_different_tokens() -> None:
    first, second = (set(RandomScore(seed=seed).apply(ordinals(1000))[0].topk(100).indices.tolist()) for seed in (0, 1))
    assert 0 < len(first & second) < 30


def test_random_modulus_makes_a_cube_a_bijection_without_overflow() -> None:
    assert PRIME % 3 == 2
    assert all(PRIME % divisor for divisor in range(2, math.isqrt(PRIME) + 1))
    assert PRIME**2 + PRIME < 2**53
    assert PRIME < 2**24


@given(st.integers(1, 700), st.integers(1, 700))
@settings(max_examples=60)
def test_uniform_top_is_spread_evenly(number: int, kept: int) -> None:
    score = UniformScore().apply(ordinals(number))[0].tolist()
    chosen = sorted(sorted(range(number), key=lambda v: -score[v])[:kept])
    gaps = [after - before for before, after in itertools.pairwise(chosen)]
    assert len(set(score)) == number
    assert not gaps or max(gaps) <= 2 * min(gaps)


def test_combine_weighs_normalised_scores() -> None:
    segment = torch.tensor([[-1, 0, 0, 0]])
    first, second = torch.tensor([[9.0, 1.0, 2.0, 3.0]]), torch.tensor([[9.0, 10.0, 30.0, 60.0]])
    got = combine([(first, 2.0, "minmax"), (second, 1.0, "sum")], segment)
    torch.testing.assert_close(got, torch.tensor([[0.0, 0.1, 1.3, 2.6]]))
    with pytest.raises(ValueError, match="at least one"):
        combine([], segment)


# Selections


@given(IMAGES, BUDGETS, st.integers(0, 5), st.integers(0, 3))
@settings(max_examples=60)
def test_selection_keeps_what_the_plan_counts(images: list[list[int]], budget: Any, seed: int, levels: int) -> None:
    at = chunk(images, seed)
    torch.manual_seed(seed)
    keep = Budget.model_validate(budget)
    score = (torch.randn(at.segment.shape) * levels).round()
    for selector in (Top(keep=keep), Stride(keep=keep)):
        chosen = selector.apply(score, scope_of(at))
        assert chosen.shape[1] == keep.slots(at.segment.shape[1], at.counts.shape[1])
        for b, sample in enumerate(images):
            kept = valid(chosen[b])
            assert chosen[b].tolist() == [-1] * (chosen.shape[1] - len(kept)) + sorted(set(kept))
            scopes = [at.segment[b, v].item() for v in kept]
            assert [scopes.count(i) for i in range(len(sample))] == selector.kept(sample)


@given(IMAGES, BUDGETS, st.integers(0, 5))
@settings(max_examples=60)
def test_top_takes_the_best_and_the_lowest_of_equals(images: list[list[int]], budget: Any, levels: int) -> None:
    at = chunk(images)
    torch.manual_seed(levels)
    keep = Budget.model_validate(budget)
    score = (torch.randn(at.segment.shape) * levels).round()
    slots = keep.slots(at.segment.shape[1], at.counts.shape[1])
    rule = (*keep.numbers, slots)
    want = ORACLES["top_keep"](score.tolist(), at.segment.tolist(), at.counts.tolist(), *rule)
    assert Top(keep=keep).apply(score, scope_of(at)).tolist() == want


@given(IMAGES, ROUNDED, st.integers(0, 3))
@settings(max_examples=10, deadline=None)
def test_every_selector_rounds_as_the_plan_does(images: list[list[int]], budget: Any, seed: int) -> None:
    at = chunk(images, seed)
    torch.manual_seed(seed)
    score, keep = torch.rand(at.segment.shape), Budget.model_validate(budget)
    plain = {"top": Top, "stride": Stride}
    for_features = {"max_min": MaxMin, "max_sum": MaxSum, "log_det": LogDet, "medoids": Medoids, "chunks": Chunks}
    for name, kind in (plain | for_features | {"pairs": Pairs}).items():
        selector = kind(keep=keep)
        taps = {} if name in plain else {"feature": at.feature}
        chosen = selector.apply(score, scope_of(at), **taps)
        for b, sample in enumerate(images):
            scopes = [at.segment[b, v].item() for v in valid(chosen[b])]
            assert [scopes.count(i) for i in range(len(sample))] == selector.kept(sample), name


def test_a_full_budget_keeps_every_token_in_place() -> None:
    at = chunk([[5, 4], [7], []])
    every = torch.where(at.segment < 0, -1, torch.arange(9))
    for selector in (Top(keep=Budget(permille=1000)), Stride(keep=Budget(permille=1000))):
        assert torch.equal(selector.apply(torch.randn(3, 9), scope_of(at)), every)


@given(IMAGES, st.integers(-4, 4))
@settings(max_examples=40)
def test_threshold_keeps_what_passes(images: list[list[int]], quarter: int) -> None:
    at = chunk(images)
    torch.manual_seed(quarter + 4)
    score = (torch.randn(at.segment.shape) * 4).round() / 4
    lists = (score.tolist(), at.segment.tolist(), at.counts.tolist())
    above = Threshold(above=quarter / 4).apply(score, scope_of(at))
    assert above.tolist() == ORACLES["threshold_keep"](*lists, quarter / 4, False)
    if quarter > 0:
        relative = Threshold(relative=quarter / 4).apply(score, scope_of(at))
        assert relative.tolist() == ORACLES["threshold_keep"](*lists, quarter / 4, True)


def test_padding_in_front_changes_nothing_but_the_positions() -> None:
    at = chunk([[5, 4]])
    score, front = torch.randn(1, 9), torch.full((1, 3), -1)
    padded = Scope(torch.cat([front, at.segment], 1), at.counts, 2)
    poisoned = torch.cat([torch.full((1, 3), float("nan")), score], 1)
    for selector in (Top(keep=Budget(count=2)), Stride(keep=Budget(count=2)), Threshold(relative=0.25)):
        assert torch.equal(selector.apply(poisoned, padded), selector.apply(score, scope_of(at)) + 3)


# The rest


@pytest.mark.parametrize(
    ("dominant", "contextual", "left", "step", "last"),
    [(161, 30, 415, 13, 377), (107, 20, 469, 23, 437), (53, 10, 523, 52, 468), (26, 5, 550, 110, 440)],
)
def test_stride_targets_of_visionzip(dominant: int, contextual: int, left: int, step: int, last: int) -> None:
    """VisionZip counts the class token among 577 rows and as one of the dominant ones: 576 patches less dominant."""
    scope = Scope(torch.zeros(1, 576, dtype=torch.int64), torch.tensor([[576]]), 1)
    score = torch.randn(1, 576, generator=torch.Generator().manual_seed(dominant))
    chosen = Top(keep=Budget(count=dominant)).apply(score, scope)
    rest = [v for v in range(576) if v not in set(valid(chosen[0]))]
    assert len(rest) == left
    merge = Merge.model_validate({"targets": {"stride": contextual}, "reduce": "target_mean"})
    index, _, _ = merge.apply(torch.randn(1, 576, 4), torch.ones(1, 576), chosen, None, scope)
    targets = [rest.index(v) for v in valid(index[0]) if v not in set(valid(chosen[0]))]
    assert targets == list(range(0, last + 1, step))
    assert merge.kept([576], [dominant]) == [dominant + contextual]


@given(IMAGES, st.integers(1, 5), st.sampled_from(["stride", "top", "kept"]), st.integers(0, 9))
@settings(max_examples=60)
def test_merge_loses_no_token(images: list[list[int]], amount: int, targets: str, seed: int) -> None:
    at = chunk(images, seed)
    torch.manual_seed(seed)
    scope = scope_of(at)
    score = torch.randn(at.segment.shape)
    chosen = Top(keep=Budget(count=2)).apply(score, scope)
    rule = "kept" if targets == "kept" else {targets: amount}
    merge = Merge.model_validate({"targets": rule, "reduce": "size_weighted"})
    size = torch.where(at.segment < 0, 0.0, torch.randint(1, 5, at.segment.shape).float())
    index, feature, sizes = merge.apply(at.feature, size, chosen, score, scope)
    torch.testing.assert_close(sizes.sum(1), size.sum(1))
    # A size-weighted mean keeps the weighted sum of all features.
    before, after = (at.feature * size[:, :, None]).sum(1), (feature * sizes[:, :, None]).sum(1)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    for b, sample in enumerate(images):
        kept = valid(index[b])
        assert set(valid(chosen[b])) <= set(kept)
        scopes = [at.segment[b, v].item() for v in kept]
        stays = Top(keep=Budget(count=2)).kept(sample)
        assert [scopes.count(i) for i in range(len(sample))] == merge.kept(sample, stays)


def test_merge_leaves_tokens_without_members_bit_for_bit() -> None:
    at = chunk([[5, 4]])
    feature = at.feature.to(torch.bfloat16)
    every = torch.arange(9)[None]
    for reduce in ("mean", "target_mean", "size_weighted"):
        index, merged, sizes = Merge(reduce=reduce).apply(feature, at.size * 3, every, None, scope_of(at))
        assert torch.equal(index, every)
        assert torch.equal(merged, feature)
        assert torch.equal(sizes, at.size * 3)


def test_merge_of_the_best_targets_needs_a_score() -> None:
    at = chunk([[5]])
    merge = Merge.model_validate({"targets": {"top": 2}})
    assert merge.needs_score
    with pytest.raises(PolicyError, match="need a score"):
        merge.apply(at.feature, at.size, torch.tensor([[0]]), None, scope_of(at))


def test_drop_merges_nothing() -> None:
    at = chunk([[5]])
    assert Drop().apply(at.feature, at.size, torch.tensor([[0]]), None, scope_of(at)) is None
    assert Drop().kept([5], [1]) == [1]


# Exits


def test_an_exit_always_taken_has_a_static_size() -> None:
    at = chunk([[5], [3]])
    assert Always().apply(None, scope_of(at)).tolist() == [True, True]
    assert exit_chosen(Always(), None, scope_of(at)).shape == (2, 0)


def test_an_exit_takes_each_sample_by_its_own_gate() -> None:
    at = chunk([[4], [3], []])
    score = torch.tensor([[0.1, 0.2, 0.3, 0.4], [9.0, 0.5, 0.6, 0.7], [9.0, 9.0, 9.0, 9.0]])
    gate = ThresholdGate(above=0.65)
    assert gate.apply(score, scope_of(at)).tolist() == [False, True, False]
    assert exit_chosen(gate, score, scope_of(at)).tolist() == [[0, 1, 2, 3], [-1] * 4, [-1] * 4]
    everyone = exit_chosen(ThresholdGate(above=0.0), score, scope_of(at))
    assert everyone.shape == (3, 0)
