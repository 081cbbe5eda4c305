"""Budgets against exact fractions, and against what torch.export can trace."""

from __future__ import annotations

from fractions import Fraction
from math import ceil, floor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from tvc.errors import PolicyError
from tvc.kernels.budget import Budget
from tvc.kernels.segments import budgets
from tvc.policy import load_policy


class Holder(BaseModel):
    keep: Budget


def parse(value: object) -> Budget:
    return Holder.model_validate({"keep": value}).keep


written = st.one_of(
    st.integers(1, 10_000),
    st.integers(1, 1000).map(lambda p: f"{p // 10}.{p % 10}%"),
    st.integers(1, 100).map(lambda p: f"{p}%"),
    st.integers(1, 10_000).map(lambda n: {"average": n}),
    st.integers(1, 10_000).flatmap(lambda n: st.integers(1, n).map(lambda part: f"{part}/{n}")),
    st.builds(
        lambda permille, how: {"share": f"{permille // 10}.{permille % 10}%", "round": how},
        st.integers(1, 1000),
        st.sampled_from(["down", "nearest", "up"]),
    ),
)
# How Python rounds a fraction: `round` goes to the even one of two numbers that are as near.
ROUNDED = {"down": floor, "nearest": round, "up": ceil}


@given(written)
def test_what_is_dumped_parses_to_the_same_budget(value: object) -> None:
    budget = parse(value)
    dumped = Holder(keep=budget).model_dump(mode="json")["keep"]
    assert parse(dumped) == budget
    assert sum(n is not None for n in (budget.count, budget.permille, budget.exact, budget.average)) == 1


@given(st.integers(1, 1000), st.integers(0, 100_000))
def test_a_share_keeps_the_floor(permille: int, entering: int) -> None:
    share = Fraction(permille, 1000)
    assert parse(f"{permille // 10}.{permille % 10}%").kept(entering) == floor(share * entering)


@given(
    st.integers(1, 10**6).flatmap(lambda whole: st.tuples(st.integers(1, whole), st.just(whole))),
    st.sampled_from(sorted(ROUNDED)),
    st.lists(st.integers(0, 100_000), max_size=5),
)
def test_a_fraction_is_exact_and_rounded_as_it_says(part: tuple[int, int], how: str, entering: list[int]) -> None:
    budget = parse({"share": f"{part[0]}/{part[1]}", "round": how})
    kept = [ROUNDED[how](Fraction(*part) * number) for number in entering]
    assert [budget.kept(number) for number in entering] == kept
    assert [budget.slots(number, 1) for number in entering] == kept
    assert budgets(torch.tensor([entering], dtype=torch.int64), *budget.numbers).tolist() == [kept]


@given(st.integers(1, 1000), st.sampled_from(sorted(ROUNDED)), st.fractions(0, 3))
def test_a_scaled_share_keeps_its_rounding(permille: int, how: str, factor: Fraction) -> None:
    scaled = parse({"share": f"{permille}/1000", "round": how}).scaled(factor)
    assert scaled == parse({"share": f"{min(1000, max(1, floor(permille * factor)))}/1000", "round": how})


def test_one_share_has_one_spelling_however_it_is_written() -> None:
    for value in ("25%", "25.0%", " 1 / 4 ", "250/1000", {"share": "25%"}, {"share": "1/4", "round": "down"}):
        assert Holder(keep=parse(value)).model_dump(mode="json") == {"keep": "25%"}
    assert str(parse({"share": "6/8", "round": "up"})) == "{share: 75%, round: up}"
    assert str(parse("12/14")) == "6/7"


@pytest.mark.parametrize("value", [64, {"average": 64}, {"share": "25%", "round": "up"}, {"share": "25%"}])
def test_a_rounding_is_for_plain_shares_alone(value: object) -> None:
    """A parameter may stand for any budget: `{share: "{keep}", round: nearest}`."""
    assert parse({"share": value, "round": "nearest"}) == parse(value)
    select = {"max_min": {"keep": {"share": "{keep}", "round": "nearest"}}}
    text = {"version": 1, "parameters": {"keep": value}, "steps": [{"at": "language.0", "select": select}]}
    assert load_policy(text).steps[0].select.keep == parse(value)


@given(st.integers(1, 1000), st.integers(0, 1000))
def test_a_count_keeps_at_most_what_there_is(count: int, entering: int) -> None:
    assert parse(count).kept(entering) == sorted((count, entering))[0]


@given(written, st.lists(st.integers(0, 500), max_size=6))
def test_slots_are_enough_for_every_scope(value: object, scopes: list[int]) -> None:
    budget = parse(value)
    if budget.average is None:
        assert sum(budget.kept(n) for n in scopes) <= budget.slots(sum(scopes), len(scopes)) <= sum(scopes)


@pytest.mark.parametrize("value", ["100%", 10**9])
def test_everything_may_be_kept(value: object) -> None:
    assert parse(value).kept(577) == 577


@pytest.mark.parametrize("value", [0.5, 1.0, 64.0, float("nan"), float("inf")])
def test_a_bare_float_is_refused_and_both_readings_are_named(value: float) -> None:
    with pytest.raises(ValidationError) as caught:
        parse(value)
    (error,) = caught.value.errors()
    assert error["type"] == "bare-float"
    assert "%" in error["ctx"]["fix"]
    assert "count" in error["ctx"]["fix"]


@pytest.mark.parametrize("value", [0, -1, "0%", "0.0%", {"average": 0}])
def test_a_budget_that_keeps_nothing_is_refused(value: object) -> None:
    with pytest.raises(ValidationError) as caught:
        parse(value)
    assert caught.value.errors()[0]["type"] == "empty-budget"


@pytest.mark.parametrize(
    "value",
    [
        *(True, None, "54", "25", "half", "-5%", "100.1%", "12.34%", [], {"average": 2.5}, {}, 10**9 + 1, 10**30),
        *("3/2", "1/0", "-1/2", "1/3000001", "9" * 30 + "/" + "9" * 31),
        *({"share": None}, {"share": "25%", "round": "half"}, {"share": "25%", "round": []}, {"round": "up"}),
        *({"share": {"mean": 3}}, {"exact": 3}, {"share": "25%", "average": 3}),
    ],
)
def test_anything_else_is_refused(value: object) -> None:
    with pytest.raises(ValidationError) as caught:
        parse(value)
    assert caught.value.errors()[0]["type"] == "bad-budget"


@pytest.mark.parametrize("value", ["2/0", " 7 / 00 "])
def test_a_share_of_nothing_is_called_by_its_name(value: str) -> None:
    with pytest.raises(ValidationError, match="divided by zero"):
        parse(value)


def test_an_average_has_no_slots_before_it_is_resolved() -> None:
    with pytest.raises(PolicyError, match="unresolved-average"):
        parse({"average": 64}).slots(576, 1)


class _Head(torch.nn.Module):
    def __init__(self, budget: Budget) -> None:
        super().__init__()
        self.budget = budget

    def forward(self, visual: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        slots = self.budget.slots(visual.shape[1], counts.shape[1])
        return visual.new_zeros(visual.shape[0], slots)


@pytest.mark.parametrize(
    ("value", "sizes"),
    [
        ("12.5%", (40, 2, 5)),
        (7, (40, 3, 21)),
        (10**9, (40, 3, 40)),
        ("100%", (9, 2, 9)),
        ("6/7", (40, 2, 34)),
        ({"share": "12.5%", "round": "nearest"}, (44, 1, 6)),  # 5.5
        ({"share": "12.5%", "round": "nearest"}, (44, 3, 8)),
        ({"share": "99.9%", "round": "up"}, (40, 3, 40)),
    ],
)
def test_slots_trace_with_symbolic_sizes(value: object, sizes: tuple[int, int, int]) -> None:
    length, images, slots = sizes
    dim = torch.export.Dim.DYNAMIC
    program = torch.export.export(
        _Head(parse(value)),
        (torch.zeros(2, 24), torch.ones(2, 4, dtype=torch.int64)),
        dynamic_shapes={"visual": {0: dim, 1: dim}, "counts": {0: dim, 1: dim}},
    )
    found = program.module()(torch.zeros(3, length), torch.ones(3, images, dtype=torch.int64))
    assert found.shape == (3, slots)


@pytest.mark.parametrize("side", (1001, 10**6))
def test_a_grid_may_have_more_cells_than_there_are_tokens(side: int) -> None:
    merge = {"grid_mlp": {"weights": "w.safetensors", "side": side}}
    policy = load_policy({"version": 1, "name": "one", "steps": [{"at": "projector", "merge": merge}]})
    assert policy.steps[0].merge.kept([576]) == [576]
