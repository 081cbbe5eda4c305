"""Near ties inside selectors that take one token after another: whether rounding explains another choice.

The selector goes its rounds once more and keeps to the tokens that the compiled model chose. In each round the token
taken falls short of the best one by some amount. What rounding can do to that amount is measured: the same rounds on
inputs that are moved by as much as verification allows give other values, and the largest change of a value is what
numbers of this round are good for, however ill-conditioned they are by then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tvc.kernels.greedy import EQUAL, Course, Round, followed
from tvc.kernels.op import Attention

# Changes of one draw of noise: the largest of a few hundred values is within a factor of four of what there can be.
DRAWS = 4.0
Decide = Callable[[], Any]


def fallen_short(decide: Decide, shaken: Decide, wanted: torch.Tensor) -> tuple[float, float, Any] | None:
    """(by how much a choice falls short, what rounding explains, the decision) of the round that falls shortest.

    Args:
        decide: the selector, and what follows; its first value are the numbers of the tokens that stay.
        shaken: the same on inputs that were moved by as much as rounding may.
        wanted: [V] bool the tokens that the compiled model kept.

    None where no order of rounds takes exactly those tokens, or the selector goes none.
    """
    course = Course(wanted[None])
    with followed(course):
        decision = decide()
    if not course.rounds or not torch.equal(decision[0], wanted.nonzero().flatten()):
        return None
    again = Course(wanted[None], [each.picked for each in course.rounds])
    with followed(again):
        shaken()
    found = [
        _short(one, other, token)
        for one, other in zip(course.rounds, again.rounds, strict=True)
        for number, token in enumerate(one.picked[0].tolist())
        if bool(one.free[0, token] & wanted[token]) and int(one.segment[0, token]) == number  # else its budget is spent
    ]
    short, unsure = max(found, key=lambda pair: pair[0] / pair[1], default=(0.0, 0.0))
    return short, unsure, decision


def _short(one: Round, other: Round, token: int) -> tuple[float, float]:
    """By how much `token` falls short of the best of its segment in a round, and how much rounding may make of that."""
    value, again = one.value[0], other.value[0]
    rivals = one.free[0] & (one.segment[0] == one.segment[0, token]) & value.isfinite() & again.isfinite()
    top = float(value[rivals].max())
    unsure = DRAWS * float((value - again)[rivals].abs().max()) + EQUAL * max(abs(top), one.unit)
    return max(0.0, top - float(value[token])), max(unsure, torch.finfo(torch.float32).tiny)


def moved(value: Any, slack: float, generator: torch.Generator) -> Any:
    """A tap's value with noise of `slack` times the size of each of its rows; weights are exact on both sides."""
    if isinstance(value, (Attention, dict)):
        return value
    if isinstance(value, tuple):
        return tuple(moved(part, slack, generator) for part in value)
    if not value.is_floating_point():
        return value
    size = value.float().square().mean(-1, keepdim=True).sqrt()
    noise = torch.randn(value.shape, generator=generator).to(value.device)
    return value + (slack * size * noise).to(value.dtype)
