"""pivot_keep: a few pivots of each segment, and for each of them the tokens least like it, one pivot after the other.

Shapes:  feature [B, V, D] float, text [B, T, D] float, length [B, V] float, text_length [B, T] float,
         after [B, T] bool (text that may be a pivot), segment [B, V] int64 (-1 pads), counts [B, N] int64
         -> [B, slots] int64 ascending, pads (-1) first
Pivots:  the `visual` tokens of each segment with the greatest length, which all stay, and the `words` text tokens of
         the sample with the greatest length, which every segment shares. Fewer where there are fewer.
Rounds:  one a pivot: visual pivots by descending length, then text pivots by descending length. Each takes, of the
         tokens of its segment that are still free, those with the lowest cosine to it, in float32; a vector without a
         direction has cosine 0. What the budget leaves is spread over the pivots still to come, rounded up.
Budget:  `count` tokens of each segment where count > 0, else a share of its tokens (portions.py), pivots
         included; it is met exactly. A budget below `visual` keeps that many pivots and nothing else.
Ties:    the lower index wins. NaN ranks last.
Memory:  O(B V D), never V x V; the rounds are as many as pivots are asked for, whatever the sizes.

Reference: DART, arXiv 2502.11494 (length: L1 norm of the key). Deviations: the published order of the pivots is that of
a Python set; the published budget is 4 + 8 * int(share * V / 8), of which every round takes an equal part.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from pydantic import Field

from tvc.kernels.budget import Budget
from tvc.kernels.op import Attention, Scope, Select, Tap, op, primitive
from tvc.kernels.segments import budgets, pack, per_token, ranks


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    segment = torch.tensor([[-1, -1, 0, 0, 0, 0, 1, 1, 1], [0] * 9, [-1, 0, 1, 1, 1, 1, 1, 1, 1]])
    counts = torch.tensor([[4, 3], [9, 0], [1, 7]])
    feature, text = torch.randn(3, 9, 5), torch.randn(3, 4, 5)
    after = torch.tensor([[True, False, True, True], [False] * 4, [False, False, False, True]])
    vectors = (feature, text, torch.rand(3, 9), torch.rand(3, 4))
    yield "share", (*vectors, after, segment, counts, 2, 2, 600, 0, 5)
    yield "count", (*vectors, after, segment, counts, 1, 2, 0, 4, 8)
    yield "no-text-pivot", (*vectors, after, segment, counts, 2, 0, 0, 5, 10)
    yield "more-pivots-than-tokens", (*vectors, after, segment, counts, 4, 4, 0, 6, 12)
    yield "keep-one", (*vectors, after, segment, counts, 2, 1, 0, 1, 2)
    yield "keep-all", (*vectors, after, segment, counts, 2, 2, 1000, 0, 9)
    yield "count-above-all", (*vectors, after, segment, counts, 2, 2, 0, 20, 40)
    # Corners of a cube in four dimensions: cosines tie exactly.
    corners, words = torch.randint(0, 2, (3, 9, 4)) * 2.0 - 1.0, torch.randint(0, 2, (3, 4, 4)) * 2.0 - 1.0
    yield "tied", (corners, words, torch.ones(3, 9), torch.ones(3, 4), after, segment, counts, 2, 2, 0, 4, 8)
    zeros = (torch.zeros(3, 9, 5), torch.zeros(3, 4, 5), torch.zeros(3, 9), torch.zeros(3, 4))
    yield "zeros", (*zeros, after, segment, counts, 2, 2, 500, 0, 4)
    nothing = (feature[:, :0], text, torch.zeros(3, 0), torch.rand(3, 4), after, segment[:, :0])
    yield "no-visual-token", (*nothing, torch.zeros_like(counts), 2, 2, 500, 0, 0)
    yield "no-segment", (*nothing, torch.zeros(3, 0, dtype=torch.int64), 2, 2, 0, 3, 0)
    one = (torch.randn(1, 1, 4), torch.randn(1, 1, 4), torch.ones(1, 1), torch.ones(1, 1))
    yield (
        "one-token",
        (*one, torch.ones(1, 1, dtype=torch.bool), torch.tensor([[0]]), torch.tensor([[1]]), 2, 2, 0, 1, 1),
    )


def _directions(vector: torch.Tensor) -> torch.Tensor:
    """[B, V, D] float32: rows of length 1, or zeros."""
    vector = vector.float()
    # The sum along D is a matrix product: with V = 0 ONNX Runtime leaves a reduced axis in place.
    ones = torch.ones(vector.shape[2], 1, device=vector.device)
    return vector / ((vector * vector) @ ones).sqrt().clamp(min=1e-12)


@op(_cases)
def pivot_keep(
    feature: torch.Tensor,
    text: torch.Tensor,
    length: torch.Tensor,
    text_length: torch.Tensor,
    after: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    visual: int,
    words: int,
    permille: int,
    count: int,
    slots: int,
) -> torch.Tensor:
    """[B, slots] int64: pivots, and what is least like them."""
    unit = _directions(feature)
    # One row and `words` columns more, so that pivots that are not there have something to read.
    text_unit = torch.nn.functional.pad(_directions(text), (0, 0, 0, 1))
    rank = torch.where(after, text_length.float(), float("-inf"))
    text_pivots = torch.nn.functional.pad(rank.sort(dim=1, descending=True, stable=True).indices, (0, words))
    number = after.sum(1, keepdim=True).clamp(max=words)  # [B, 1] text pivots

    left = budgets(counts, permille, count)  # [B, N] tokens still to be taken
    own = left.clamp(max=visual)  # [B, N] visual pivots
    place = ranks(segment, counts, length)
    keep = (segment >= 0) & (place < per_token(own, segment))
    free = (segment >= 0) & ~keep
    left, there = left - own, counts - own
    column = torch.arange(segment.shape[1], device=segment.device).expand(segment.shape[0], -1)
    ones = torch.ones(unit.shape[2], 1, device=unit.device)
    for turn in range(visual + words):
        if turn < visual:
            # Column 0 takes every other token and is cut off.
            to = torch.where((segment >= 0) & (place == turn), segment + 1, 0)
            empty = torch.zeros(counts.shape[0], counts.shape[1] + 1, dtype=torch.int64, device=counts.device)
            picked = per_token(empty.scatter(1, to, column)[:, 1:], segment)
            pivot = unit.gather(1, picked[:, :, None].expand(-1, -1, unit.shape[2]))
            pivots_left = own - turn + number
            takes_part = own > turn
        else:
            picked = text_pivots[:, turn - visual, None, None]
            pivot = text_unit.gather(1, picked.expand(-1, -1, unit.shape[2]))
            pivots_left = (number - (turn - visual)).expand(-1, own.shape[1])
            takes_part = pivots_left > 0
        pivots_left = pivots_left.clamp(min=1)
        part = torch.where(takes_part, (left + pivots_left - 1) // pivots_left, 0)
        cosine = ((unit * pivot) @ ones).squeeze(2)
        taken = free & (ranks(torch.where(free, segment, -1), there, -cosine) < per_token(part, segment))
        keep, free = keep | taken, free & ~taken
        left, there = left - part, there - part
    return pack(keep, slots)


def key_lengths(attention: Attention) -> tuple[torch.Tensor, torch.Tensor]:
    """([B, V], [B, R]) float32: the L1 norm, over all heads together, of the keys of the columns and of the rows."""
    length = attention.key.float().abs().sum(3).sum(1)  # [B, N]
    past = attention.key.shape[2] - attention.query.shape[2]
    of_rows = length.gather(1, attention.rows.clamp(min=0) + past)
    return length.gather(1, attention.columns[:, :, 0].clamp(min=0)), of_rows


def behind_visual(attention: Attention) -> torch.Tensor:
    """[B, R] bool: the rows that stand behind the sample's last visual token; all real ones where none does."""
    past = attention.key.shape[2] - attention.query.shape[2]
    # One more column keeps the maximum defined for V = 0.
    last = torch.nn.functional.pad(attention.columns[:, :, 0], (1, 0), value=-1).amax(1, keepdim=True)
    real = attention.rows >= 0
    behind = real & (attention.rows + past > last)
    return behind | (real & (behind.sum(1, keepdim=True) == 0))


@primitive
class Pivots(Select):
    """The tokens with the longest keys stay, and those least like them and like the text with the longest keys."""

    key: ClassVar[str] = "pivots"
    components: ClassVar[tuple[str, ...]] = ("language",)
    shorthand: ClassVar[str | None] = "keep"
    needs_score: ClassVar[bool] = False
    keep: Budget = Field(description="what stays of each scope, pivots included")
    visual: int = Field(4, ge=1, le=16, description="pivots among the visual tokens of each scope")
    text: int = Field(4, ge=0, le=16, description="pivots among the text behind the last visual token")
    layer: str = Field("previous", description="the layer of the keys: previous, self or language.K")

    def taps(self) -> dict[str, Tap]:
        return {
            "feature": Tap("feature"),
            "words": Tap("text"),
            "attention": Tap("attention", self.layer, ("text",)),
        }

    def apply(
        self,
        score: torch.Tensor | None,
        scope: Scope,
        feature: torch.Tensor,
        words: tuple[torch.Tensor, torch.Tensor],
        attention: Attention,
    ) -> torch.Tensor:
        lengths = key_lengths(attention)
        budget = self.keep
        slots = budget.slots(scope.segment.shape[1], scope.number)
        tensors = (feature, words[0], *lengths, behind_visual(attention), scope.segment, scope.counts)
        sizes = (self.visual, self.text, *budget.numbers, slots)
        kept: torch.Tensor = pivot_keep.overload(*tensors, *sizes)
        return kept

    def kept(self, counts: list[int]) -> list[int]:
        return [self.keep.kept(count) for count in counts]
