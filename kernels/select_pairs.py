"""pairs_keep: the best-scored tokens, and of the others those that are left when near-duplicates go, round by round.

Shapes:  feature [B, V, D] float, score [B, V] float, segment [B, V] int64 (-1 pads), counts [B, N] int64
         -> [B, slots] int64 ascending, pads (-1) first
Budget:  T = `count` tokens of each segment where count > 0, else a share of its tokens (portions.py);
         T share // 1000 of them by score. The others stand in a line, best score first, until T are left in all.
Round:   the tokens at even places of the line each find the highest cosine to one at an odd place. Of them the `drop`
         most alike go (fewer in the last round, and never more than there are); those that stay form the new line, the
         most alike first, followed by the odd ones as they stood. Cosines are float32, of zeros and NaN 0.
Ties:    the lower index wins: it is first in the line and goes first.
Memory:  B V^2 cosines, of which any may be asked for in any round; the rounds themselves go by blocks of rows.

Reference: VisPruner, arXiv 2412.01818v2. Deviation: a line of odd length has one more even place; the published code
fails there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from pydantic import Field

from tvc.kernels.blocks import by_rows
from tvc.kernels.budget import Budget
from tvc.kernels.greedy import above_nothing, directions, of_slots, rows
from tvc.kernels.loop import State, repeat
from tvc.kernels.op import Scope, Select, Tap, op, primitive
from tvc.kernels.segments import budgets, pack, per_token, ranks


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    segment = torch.tensor([[-1, -1, 0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, 0, 0], [-1, 0, 1, 1, 1, 1, 1, 1, 1]])
    counts = torch.tensor([[4, 3], [9, 0], [1, 7]])
    feature, score = torch.randn(3, 9, 6), torch.randn(3, 9)
    yield "share-half", (feature, score, segment, counts, 500, 0, 500, 1, 4)
    yield "share-all", (feature, score, segment, counts, 1000, 0, 500, 8, 9)
    yield "count-three", (feature, score, segment, counts, 0, 3, 500, 2, 6)
    yield "keep-one", (feature, score, segment, counts, 0, 1, 500, 8, 2)
    yield "all-by-score", (feature, score, segment, counts, 0, 3, 1000, 8, 6)
    yield "none-by-score", (feature, score, segment, counts, 0, 3, 0, 8, 6)
    yield "count-above-all", (feature, score, segment, counts, 0, 20, 500, 8, 40)
    yield "all-equal", (torch.ones(3, 9, 4), torch.zeros(3, 9), segment, counts, 500, 0, 500, 1, 4)
    yield "no-direction", (torch.zeros(3, 9, 6), score, segment, counts, 500, 0, 500, 1, 4)
    yield "nan", (feature, score.masked_fill(torch.rand(3, 9) > 0.7, float("nan")), segment, counts, 0, 2, 500, 1, 4)
    interleaved = torch.tensor([[1, 0, 1, 0, -1, 1, 0, 0, 0, 1]])
    yield (
        "interleaved",
        (torch.randn(1, 10, 4), torch.rand(1, 10), interleaved, torch.tensor([[5, 4]]), 0, 2, 500, 1, 4),
    )
    nothing = (feature[:, :0], score[:, :0], segment[:, :0], torch.zeros(3, 0, dtype=torch.int64))
    yield "no-visual-token", (*nothing, 500, 0, 500, 8, 0)
    long = (torch.randn(1, 61, 8), torch.randn(1, 61), torch.zeros(1, 61, dtype=torch.int64), torch.tensor([[61]]))
    yield "V61", (*long, 0, 10, 500, 8, 10)


def _fake(
    feature: torch.Tensor,
    score: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    permille: int,
    count: int,
    share: int,
    drop: int,
    slots: int,
) -> torch.Tensor:
    return of_slots(segment, slots)


def rounds_of(surplus: torch.Tensor, drop: int) -> torch.Tensor:
    """Rounds in which `surplus` tokens go, at least: one for each `drop`, and as many as it takes to halve the last."""
    return torch.where(surplus > 0, (surplus + drop - 1) // drop + (2 * drop).bit_length(), 0)


@op(_cases, fake=_fake)
def pairs_keep(
    feature: torch.Tensor,
    score: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    permille: int,
    count: int,
    share: int,
    drop: int,
    slots: int,
) -> torch.Tensor:
    """[B, slots] int64: the best of each segment, and the least alike of the others."""
    unit = directions(feature)
    cosine = unit @ unit.transpose(1, 2)
    budget = budgets(counts, permille, count)
    best = budget * share // 1000
    rank = ranks(segment, counts, score.float())
    valid = segment >= 0
    by_score = valid & (rank < per_token(best, segment))
    line = torch.where(valid & ~by_score, rank - per_token(best, segment), -1)
    wanted = budget - best

    def one(number: torch.Tensor, line: torch.Tensor, left: torch.Tensor) -> State:
        even, odd = (line >= 0) & (line % 2 == 0), (line >= 0) & (line % 2 == 1)

        def block(at: torch.Tensor, new: torch.Tensor, alike: torch.Tensor) -> State:
            other = odd[:, None, :] & (segment.gather(1, at)[:, :, None] == segment[:, None, :])
            return (alike.scatter(1, at, above_nothing(torch.where(other, rows(cosine, at), -2.0)).amax(2)),)

        alike = by_rows(block, (torch.zeros(segment.shape, device=segment.device),), segment)[0]
        evens = (left + 1) // 2
        going = torch.minimum((left - wanted).clamp(min=0, max=drop), evens)
        first = per_token(going, segment)
        place = ranks(torch.where(even, segment, -1), evens, alike) - first
        behind = per_token(evens, segment) - first + line // 2
        return torch.where(even, place.clamp(min=-1), torch.where(odd, behind, -1)), left - going

    # One column of zeros keeps the largest surplus defined for N = 0.
    surplus = torch.nn.functional.pad(counts - budget, (0, 1)).amax((0, 1))
    line, _ = repeat(one, (line, counts - best), rounds_of(surplus, drop))
    return pack(by_score | (line >= 0), slots)


@primitive
class Pairs(Select):
    """A part of the budget goes to the best-scored tokens, the rest to those that no other one is nearly a copy of."""

    key: ClassVar[str] = "pairs"
    shorthand: ClassVar[str | None] = "keep"
    keep: Budget = Field(description="what stays of each scope")
    share: int = Field(500, ge=0, le=1000, description="thousandths of the budget that go by score")
    drop: int = Field(8, gt=0, description="tokens that go in each round")

    def taps(self) -> dict[str, Tap]:
        return {"feature": Tap("feature")}

    def apply(self, score: torch.Tensor | None, scope: Scope, feature: torch.Tensor) -> torch.Tensor:
        budget = self.keep
        slots = budget.slots(scope.segment.shape[1], scope.number)
        rule = (*budget.numbers, self.share, self.drop, slots)
        return pairs_keep.overload(feature, score, scope.segment, scope.counts, *rule)

    def kept(self, counts: list[int]) -> list[int]:
        return [self.keep.kept(count) for count in counts]
