"""coverage_keep: tokens of each segment that together stand for the text and for all of the segment.

Shapes:  feature [B, V, D] float, text [B, T, D] float, valid [B, T] bool, segment [B, V] int64 (-1 pads),
         counts [B, N] int64 -> [B, slots] int64 ascending, pads (-1) first
Rule:    what is to be covered, each with the tokens of one segment that could cover it, by softmax of the cosine:
           text row t, weight 1 / (valid text rows):        softmax(cos(t, .) / text_temperature)
           token i of the segment, weight visual / (size):  softmax(cos(i, .) / visual_temperature)
         The value of a set is the sum over rows of weight x the best covering; each round takes the free token that
         adds most to it. Float32. A vector without a direction (zeros, NaN) has cosine 0 with all.
Budget:  `count` tokens of each segment where count > 0, else a share of its tokens (portions.py).
Ties:    the lower index wins, within 1e-6 of the best value; a token is never taken twice.
Memory:  B V (T + V) numbers, which each round asks for; the rounds themselves go by blocks of rows.

Reference: MMTok, arXiv 2508.18264 (multi-modal coverage).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from pydantic import Field

from tvc.kernels.blocks import by_rows
from tvc.kernels.greedy import Greedy, directions, of_slots, rows, take
from tvc.kernels.loop import State
from tvc.kernels.op import Scope, Tap, op, primitive
from tvc.kernels.segments import per_token


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    segment = torch.tensor([[-1, -1, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0, 0], [-1, 0, 1, 1, 1, 1, 1]])
    counts = torch.tensor([[3, 2], [7, 0], [1, 5]])
    feature, text = torch.randn(3, 7, 8), torch.randn(3, 3, 8)
    valid = torch.tensor([[True, True, False], [True, False, False], [True, True, True]])
    plain = (feature, text, valid, segment, counts)
    yield "share-half", (*plain, 0.02, 0.2, 0.5, 500, 0, 3)
    yield "share-all", (*plain, 0.02, 0.2, 0.5, 1000, 0, 7)
    yield "count-two", (*plain, 0.5, 0.2, 0.5, 0, 2, 4)
    yield "count-above-all", (*plain, 0.02, 0.2, 0.5, 0, 9, 18)
    yield "keep-one", (*plain, 0.02, 0.2, 0.5, 0, 1, 2)
    yield "text-alone", (*plain, 0.5, 0.2, 0.0, 0, 2, 4)
    yield "no-text", (feature, text, torch.zeros(3, 3, dtype=torch.bool), segment, counts, 0.02, 0.2, 0.5, 0, 2, 4)
    yield "all-equal", (torch.ones(3, 7, 8), text, valid, segment, counts, 0.02, 0.2, 0.5, 500, 0, 3)
    nothing = (feature[:, :0], text, valid, segment[:, :0], torch.zeros(3, 0, dtype=torch.int64))
    yield "nothing", (*nothing, 0.02, 0.2, 0.5, 250, 0, 0)
    one = (torch.randn(1, 1, 4), torch.randn(1, 2, 4), torch.ones(1, 2, dtype=torch.bool))
    yield "one-token", (*one, torch.tensor([[0]]), torch.tensor([[1]]), 0.02, 0.2, 0.5, 0, 1, 1)


def _fake(
    feature: torch.Tensor,
    text: torch.Tensor,
    valid: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    text_temperature: float,
    visual_temperature: float,
    visual: float,
    permille: int,
    count: int,
    slots: int,
) -> torch.Tensor:
    return of_slots(segment, slots)


def coverings(
    unit: torch.Tensor, segment: torch.Tensor, counts: torch.Tensor, temperature: float, visual: float
) -> torch.Tensor:
    """[B, V, V] float32, row i: how well each token covers token i of its segment, weighted."""
    same = (segment[:, :, None] == segment[:, None, :]) & (segment >= 0)[:, :, None]
    power = torch.where(same, _power(unit @ unit.transpose(1, 2), temperature), 0.0)
    whole = power @ torch.ones(segment.shape[1], 1, device=unit.device)
    share = visual / per_token(counts, segment).clamp(min=1)[:, :, None].float()
    return power * (share / whole.clamp(min=1e-30))


def text_coverings(
    unit: torch.Tensor,
    text: torch.Tensor,
    valid: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """[B, T, V] float32: how well each token covers each text row, weighted.

    A text row is to be covered in every segment on its own: its softmax runs over one segment's tokens.
    """
    power = _power(directions(text) @ unit.transpose(1, 2), temperature)
    member = (segment[:, :, None] == torch.arange(counts.shape[1], device=segment.device)).float()  # [B, V, N]
    whole = (power @ member) @ member.transpose(1, 2)  # the sum over the segment of each column
    asked = valid.float()[:, :, None] / valid.sum(1).clamp(min=1)[:, None, None]
    return torch.where((segment >= 0)[:, None, :], power / whole.clamp(min=1e-30), 0.0) * asked


def _power(cosine: torch.Tensor, temperature: float) -> torch.Tensor:
    # Cosines are at most 1, so that no maximum is needed along an axis that may be empty.
    return torch.exp((cosine - 1.0) / temperature)


def _gain(cover: torch.Tensor, covered: torch.Tensor) -> torch.Tensor:
    """[B, V]: by how much each column of `cover [B, R, V]` exceeds what is `covered [B, R, 1|V]`, in sum."""

    def block(at: torch.Tensor, new: torch.Tensor, total: torch.Tensor) -> State:
        more = (rows(cover, at) - rows(covered, at)).clamp(min=0.0)
        return (total + (more * new[:, None]).sum(1),)

    nothing = torch.zeros(cover.shape[0], cover.shape[2], device=cover.device)
    return by_rows(block, (nothing,), cover)[0]


@op(_cases, fake=_fake)
def coverage_keep(
    feature: torch.Tensor,
    text: torch.Tensor,
    valid: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    text_temperature: float,
    visual_temperature: float,
    visual: float,
    permille: int,
    count: int,
    slots: int,
) -> torch.Tensor:
    """[B, slots] int64: tokens of each segment that together stand for the text and the segment."""
    unit = directions(feature)
    seen = coverings(unit, segment, counts, visual_temperature, visual)
    told = text_coverings(unit, text, valid, segment, counts, text_temperature)

    def value(number: torch.Tensor, seen_best: torch.Tensor, told_best: torch.Tensor) -> torch.Tensor:
        return _gain(seen, seen_best) + _gain(told, told_best)

    def after(number: torch.Tensor, picked: torch.Tensor, seen_best: torch.Tensor, told_best: torch.Tensor) -> State:
        token = per_token(picked, segment)[:, :, None]
        # A text row is covered in every segment: kept per column is what covers it in the column's own.
        of_column = told.gather(2, token.transpose(1, 2).expand(-1, told.shape[1], -1))
        return torch.maximum(seen_best, seen.gather(2, token)), torch.maximum(told_best, of_column)

    start = (torch.zeros_like(segment, dtype=torch.float32)[:, :, None], torch.zeros_like(told))
    return take(value, after, start, segment, counts, permille, count, slots)


@primitive
class Coverage(Greedy):
    """Tokens stay that together cover the text and the whole picture best (maximum coverage)."""

    key: ClassVar[str] = "coverage"
    needs_score: ClassVar[bool] = False
    visual: float = Field(0.5, ge=0, description="weight of covering the picture; covering the text weighs 1")
    text_temperature: float = Field(0.02, gt=0, description="of the softmax over the tokens that cover a text token")
    visual_temperature: float = Field(0.2, gt=0, description="of the softmax over the tokens that cover a token")

    def taps(self) -> dict[str, Tap]:
        return {**super().taps(), "text": Tap("text")}

    def apply(
        self,
        score: torch.Tensor | None,
        scope: Scope,
        feature: torch.Tensor,
        text: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        weights = (self.text_temperature, self.visual_temperature, self.visual)
        segment, counts, *budget = self.room(scope)
        return coverage_keep.overload(feature, *text, segment, counts, *weights, *budget)
