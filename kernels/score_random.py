"""random_score: a fixed pseudo-random number for each visual token, by its ordinal and a seed.

Shapes:  ordinal [B, V] int64 (-1 pads) -> [B, V] float32 in [0, 1)
Rule:    rounds of x -> (multiplier * x + increment)^3 modulo a prime below 2^24. A cube is a bijection modulo a prime
         p with p mod 3 = 2, so different ordinals never tie, and every number is exact in float32. No product reaches
         2^53: runtimes that hold integers in doubles give the same numbers.
Batch:   a sample's scores depend on its own ordinals alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from pydantic import Field

from tvc.kernels.op import Score, Tap, op, primitive

PRIME = 16777199
ROUNDS = 3


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    for seed in (0, 1, 2**40):
        yield f"V577-seed{seed}", (torch.arange(577)[None], seed)
    yield "pads", (torch.tensor([[-1, 0, 1], [0, 1, 2]]), 7)
    yield "V1", (torch.zeros(1, 1, dtype=torch.int64), 3)


def _constants(seed: int) -> list[tuple[int, int]]:
    """(multiplier, increment) of each round: the splitmix64 stream of the seed."""
    drawn, state = [], seed
    for _ in range(2 * ROUNDS):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        mixed = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % 2**64
        drawn.append(1 + (mixed ^ (mixed >> 31)) % (PRIME - 1))
    return list(zip(drawn[::2], drawn[1::2], strict=True))


@op(_cases)
def random_score(ordinal: torch.Tensor, seed: int) -> torch.Tensor:
    """[B, V] float32: the same number for the same ordinal and seed, everywhere."""
    value = (ordinal + 1) % PRIME
    for multiplier, increment in _constants(seed):
        value = (value * multiplier + increment) % PRIME
        value = value * value % PRIME * value % PRIME
    return value.float() / 2**24


@primitive
class RandomScore(Score):
    """A fixed pseudo-random number: the baseline every other score has to beat."""

    key: ClassVar[str] = "random"
    shorthand: ClassVar[str | None] = "seed"
    seed: int = Field(0, ge=0, lt=2**63)

    def taps(self) -> dict[str, Tap]:
        return {"ordinal": Tap("ordinal")}

    def apply(self, ordinal: torch.Tensor) -> torch.Tensor:
        return random_score.overload(ordinal, self.seed)
