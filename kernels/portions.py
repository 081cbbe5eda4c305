"""Shares of a number of tokens: an exact fraction, and how it is rounded where it is no whole number.

Ops take a budget as two integers, `permille` and `count`. A positive count is a number of tokens. With a count of 0 the
budget is permille / 1000, rounded down. For any other share the first is a fraction's numerator, and the second is
-(3 * denominator + the place of the rounding in ROUNDINGS); `Portion.numbers` writes that, `Portion.read` reads it.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Self, TypeVar, get_args

import torch

Rounding = Literal["down", "nearest", "up"]  # nearest: of two that are as near the even one, as Python and PyTorch do
ROUNDINGS: tuple[Rounding, ...] = get_args(Rounding)
_Number = TypeVar("_Number", int, torch.Tensor)


class Portion(NamedTuple):
    """`parts` of a `whole`, and how it is rounded."""

    parts: int
    whole: int = 1000
    rounding: Rounding = "down"

    @classmethod
    def read(cls, permille: int, count: int) -> Self:
        """The share that an op was given; its count is not positive."""
        if count == 0:
            return cls(permille)
        whole, place = divmod(-count, len(ROUNDINGS))
        return cls(permille, whole, ROUNDINGS[place])

    @property
    def numbers(self) -> tuple[int, int]:
        """(permille, count) for an op."""
        place = ROUNDINGS.index(self.rounding)
        plain = self.whole == 1000 and place == 0
        return self.parts, 0 if plain else -(len(ROUNDINGS) * self.whole + place)

    def of(self, number: _Number) -> _Number:
        """The share of a number, or of each number of an integer tensor."""
        scaled = number * self.parts
        below = scaled // self.whole
        if self.rounding == "down":
            return below
        left = scaled - below * self.whole
        if self.rounding == "up":
            return below + (left + self.whole - 1) // self.whole
        odd = below - below // 2 * 2
        return below + (2 * left + odd + self.whole - 1) // (2 * self.whole)

    def room(self, number: int, scopes: int) -> int:
        """A number that the shares of `scopes` numbers do not exceed together that are `number` together, nor it.

        Exact for one scope. Takes SymInts.
        """
        share = self.of(number)
        if self.rounding == "down":
            return share
        # Two roundings are one above that of the sum at most, so that scopes - 1 more are enough. The even number is
        # never below 0, which a trace would not watch over: it takes what it has seen, one scope at least, for granted.
        return torch.sym_min(number, share + scopes // 2 * 2)
