"""What the greedy selectors share: settings, directions, the best token of each segment, the loop that takes them.

Every round takes one token of each segment whose budget is not spent, so a prompt with many images needs no more
rounds than its largest budget.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import ClassVar, NamedTuple

import torch
from pydantic import Field

from tvc.kernels.blocks import by_rows
from tvc.kernels.budget import Budget
from tvc.kernels.loop import State, repeat
from tvc.kernels.op import Scope, Select, Tap
from tvc.kernels.segments import budgets, pack, per_token

EQUAL = 1e-6


def directions(feature: torch.Tensor) -> torch.Tensor:
    """[B, V, D] float32: rows of length 1; zeros and what is not finite become zeros."""
    feature = feature.float()
    ones = torch.ones(feature.shape[2], 1, device=feature.device)
    # A sum along D as a matrix product: with V = 0 ONNX Runtime leaves a reduced axis in place.
    length = ((feature * feature) @ ones).sqrt()
    return torch.nan_to_num(feature / length.clamp(min=1e-12), 0.0, 0.0, 0.0)


def rows(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """[B, K, D]: the rows of `values [B, V, D]` at `index [B, K]`."""
    return values.gather(1, index[:, :, None].expand(-1, -1, values.shape[2]))


def above_nothing(value: torch.Tensor) -> torch.Tensor:
    """`value [..., V]` with one column of the lowest more: a maximum that is defined for any V.

    No round runs where V is 0, but a graph whose V only the run tells must not have to promise that it is not.
    """
    return torch.nn.functional.pad(value, (0, 1), value=float("-inf"))


def best(
    value: torch.Tensor, free: torch.Tensor, segment: torch.Tensor, counts: torch.Tensor, unit: float
) -> torch.Tensor:
    """[B, N] int64: in each segment the free token with the highest value [B, V], the first of equals.

    Values count as equal within EQUAL of the highest, or of `unit` where that is larger: duplicates are common, and
    the last bits of their values differ between runtimes. Means nothing for a segment without a free token; V >= 1.
    """
    numbers = torch.arange(counts.shape[1], device=segment.device)[:, None]
    open_here = (segment[:, None, :] == numbers) & free[:, None, :]
    value = above_nothing(torch.where(open_here, value[:, None, :], float("-inf")))
    top = value.amax(2, keepdim=True)
    return (value >= top - EQUAL * top.abs().clamp(min=unit)).float().argmax(2)


def to_picked(unit: torch.Tensor, picked: torch.Tensor, segment: torch.Tensor) -> torch.Tensor:
    """[B, V] float32: the cosine of each token of `unit [B, V, D]` with the one picked [B, N] in its segment."""
    cosine = unit @ rows(unit, picked).transpose(1, 2)  # [B, V, N]
    return cosine.gather(2, segment.clamp(min=0)[:, :, None]).squeeze(2)


def nearest(unit: torch.Tensor, segment: torch.Tensor) -> torch.Tensor:
    """[B, V] float32: the highest cosine of each token with another one of its segment; -2 where it is alone.

    Takes O(B V BLOCK) memory.
    """
    place = torch.arange(segment.shape[1], device=segment.device)

    def block(at: torch.Tensor, new: torch.Tensor, closest: torch.Tensor) -> State:
        other = (segment.gather(1, at)[:, :, None] == segment[:, None, :]) & (at[:, :, None] != place)
        cosine = rows(unit, at) @ unit.transpose(1, 2)
        return (closest.scatter(1, at, above_nothing(torch.where(other, cosine, -2.0)).amax(2)),)

    nothing = torch.zeros(segment.shape, device=segment.device)
    return by_rows(block, (nothing,), segment)[0]


class Round(NamedTuple):
    """One round of a greedy rule."""

    value: torch.Tensor  # [B, V]
    free: torch.Tensor  # [B, V] bool
    picked: torch.Tensor  # [B, N]
    segment: torch.Tensor  # [B, V]
    unit: float


@dataclasses.dataclass
class Course:
    """The rounds that a greedy rule goes when it keeps to some tokens: for asking what another choice would have cost.

    Inside `followed`, and eagerly, each round takes the best of the tokens that are `wanted`, as long as there are any.
    """

    wanted: torch.Tensor  # [B, V] bool
    order: list[torch.Tensor] | None = None  # [B, N] what to take in each round, instead
    rounds: list[Round] = dataclasses.field(default_factory=list)

    def choose(
        self, value: torch.Tensor, free: torch.Tensor, segment: torch.Tensor, counts: torch.Tensor, unit: float
    ) -> torch.Tensor:
        """`best`, on this course."""
        picked = best(value, free & self.wanted, segment, counts, unit)
        if self.order is not None:
            picked = self.order[len(self.rounds)]
        self.rounds.append(Round(value, free, picked, segment, unit))
        return picked


_courses: list[Course] = []


@contextlib.contextmanager
def followed(course: Course) -> Iterator[None]:
    """Greedy rules inside the block go the rounds of `course`."""
    _courses.append(course)
    try:
        yield
    finally:
        _courses.pop()


Value = Callable[..., torch.Tensor]
After = Callable[..., State]


def take(
    value: Value,
    after: After,
    state: State,
    segment: torch.Tensor,
    counts: torch.Tensor,
    permille: int,
    count: int,
    slots: int,
    unit: float = 0.0,
) -> torch.Tensor:
    """[B, slots] int64: the tokens that a greedy rule takes, ascending, pads (-1) first.

    Args:
        value: (round, *state) -> [B, V] float32; in each segment the free token with the highest value is taken.
        after: (round, picked [B, N], *state) -> the state behind the round.
        state: float tensors that the rule remembers.
        segment, counts, permille, count, slots: as for every selector.
        unit: size of the numbers that values are made of, where a value itself may be near 0.
    """
    budget = budgets(counts, permille, count)
    place = torch.arange(segment.shape[1], device=segment.device)
    choose = _courses[-1].choose if _courses else best

    def one(number: torch.Tensor, free: torch.Tensor, *now: torch.Tensor) -> State:
        picked = choose(value(number, *now), free, segment, counts, unit)
        taken = (place == per_token(picked, segment)) & (number < per_token(budget, segment))
        return free & ~taken, *after(number, picked, *now)

    # One column of zeros keeps the largest budget defined for N = 0.
    rounds = torch.nn.functional.pad(budget, (0, 1)).amax((0, 1))
    free = repeat(one, (segment >= 0, *state), rounds)[0]
    return pack((segment >= 0) & ~free, slots)


def of_slots(segment: torch.Tensor, slots: int) -> torch.Tensor:
    """The shape of a selector's result, for its fake kernel."""
    return segment.new_empty(segment.shape[0], slots)


class Greedy(Select):
    """A selector that looks at features and has one budget."""

    shorthand: ClassVar[str | None] = "keep"
    keep: Budget = Field(description="what stays of each scope")

    def taps(self) -> dict[str, Tap]:
        return {"feature": Tap("feature")}

    def room(self, scope: Scope) -> tuple[torch.Tensor, torch.Tensor, int, int, int]:
        """What every op of this kind ends with: segment, counts, permille, count, slots."""
        slots = self.keep.slots(scope.segment.shape[1], scope.number)
        return scope.segment, scope.counts, *self.keep.numbers, slots

    def kept(self, counts: list[int]) -> list[int]:
        return [self.keep.kept(count) for count in counts]
