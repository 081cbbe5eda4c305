"""Near ties: whether rounding explains another choice than the one that was made here, and what comes of the others.

Selectors that take one token after another go their rounds once more and keep to the tokens that the compiled model
chose. In each round the token taken falls short of the best one by some amount. What rounding can do to that amount is
measured: the same rounds on inputs that are moved by as much as verification allows give other values, and the largest
change of a value is what numbers of this round are good for, however ill-conditioned they are by then.

Everything else is decided again a few times, each time on inputs moved otherwise, and by less: what none of these
decisions does, rounding does not explain. Which of them the compiled model made is told token by token, by the values
that its next block cached, and followed.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tvc.kernels.greedy import EQUAL, Course, Round, followed
from tvc.kernels.op import Attention

# Changes of one draw of noise: the largest of a few hundred values is within a factor of four of what there can be.
DRAWS = 4.0
# How far inputs are moved for each of the other decisions, as a share of what is allowed.
SHARES = (1.0, 1.0, 1.0, 0.25, 0.25, 0.25, 0.06, 0.06)
# The same, down to the last digits, where a choice is asked for that none of these makes: among many tokens that are
# almost equal, noise that is large settles all ties at once, and never just the one that the last digits settle.
FINER = (*SHARES, *(share for share in (0.06, 0.015, 0.004, 0.001, 0.0001) for _ in range(8)))
Decide = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A decision on inputs that were moved."""

    share: float  # of what is allowed
    stays: torch.Tensor  # [V] bool
    feature: torch.Tensor | None  # [V, D] merged values of those that stay
    size: torch.Tensor  # [V]

    @classmethod
    def of(cls, share: float, decision: Any, visual: int) -> Drawn:
        """From what a step decides: (numbers of the tokens that stay, their values or None, their sizes)."""
        index, feature, size = decision
        stays = torch.zeros(visual, dtype=torch.bool, device=index.device)
        stays[index] = True
        sizes = size.new_zeros(visual)
        sizes[index] = size
        if feature is None:
            return cls(share, stays, None, sizes)
        values = feature.new_zeros(visual, feature.shape[1])
        values[index] = feature
        return cls(share, stays, values, sizes)


def explained(
    own: Drawn, drawn: Sequence[Drawn], wanted: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor] | None:
    """(values of the tokens that are `wanted`, their sizes), if rounding can settle it so; None where it cannot.

    Each token that `own` decides otherwise has to be decided as wanted by some of the decisions `drawn`.
    """
    if not bool((torch.stack([one.stays == wanted for one in drawn]).any(0) | (own.stays == wanted)).all()):
        return None
    nearest = sorted(drawn, key=lambda one: int((one.stays != wanted).sum()))
    feature, size, missing = own.feature, own.size.clone(), wanted & ~own.stays
    feature = None if feature is None else feature.clone()
    for one in nearest:
        here = missing & one.stays
        size[here] = one.size[here]
        if feature is not None and one.feature is not None:
            feature[here] = one.feature[here]
        missing &= ~here
    return None if feature is None else feature[wanted], size[wanted]


def doubts(own: Drawn, drawn: Sequence[Drawn], slack: float, before: float) -> tuple[float, float]:
    """How many times `slack` rounding may move a merged value: (choices being equal, choices being what they may be).

    What is left of a sum that nearly cancels hangs on the last digits of what enters, and so does which of two tokens
    that are almost equally near is merged. Decisions that made the same choices come as close as rounding lets them:
    the closest but one, or the closest pair, tells the first number, the first of them the second.

    Args:
        drawn: on inputs moved by `slack`, `before` times where they were in doubt already.
    """
    if own.feature is None or not bool(own.stays.any()):
        return before, before
    size = own.feature[own.stays].float().abs().amax(1).clamp(min=1e-30)

    def change(one: Drawn, other: Drawn) -> torch.Tensor:
        there = one.stays[own.stays] & other.stays[own.stays]
        values = [each.feature[own.stays].float() for each in (one, other) if each.feature is not None]
        moved = (values[0] - values[-1]).abs().amax(1) / size / (DRAWS * slack * max(one.share, other.share))
        return torch.where(there, moved, float("inf"))

    moves = [change(dataclasses.replace(own, share=0.0), one) for one in drawn]
    # Two of them that made the same choices, where each token has many to make; the closest of many pairs is lucky.
    pairs = [2 * change(one, other) for one, other in itertools.combinations(drawn, 2)]
    surest = torch.minimum(torch.stack(moves).sort(0).values[1], torch.stack(pairs).amin(0))
    least, free = _largest(surest), _largest(moves[0])
    return max(before, least), max(before, least, free)


def _largest(values: torch.Tensor) -> float:
    real = values[values.isfinite()]
    return float(real.max()) if len(real) else 0.0


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
