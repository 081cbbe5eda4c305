"""recycle_rest: some of what was not chosen takes in its neighbours, and one more token sums up what is left.

Shapes:  feature [B, V, D] float, metric [B, V, d] float, text [B, V] float, size [B, V] float, segment [B, V] int64 (-1
         pads), counts [B, N] int64, chosen [B, K] int64 (-1 pads), score [B, V] float
         -> index [B, K2] int64 ascending, pads (-1) first; feature [B, K2, D] and size [B, K2] like the inputs, pads 0;
            K2 = the most that any sample of the batch is left with (an unbacked size)
Centres: of a segment with k chosen tokens and r others, o of which are local outliers by score (factor above 1.5 among
         `around` neighbours), the best-scored k o // r of the others are centres.
Rule:    a centre becomes x + sum(score * y) over the `neighbours` others y, centres among them and not itself, with the
         highest cosine of the metric + weight * text (of fewer: all). The last of the others that is no centre stays
         and becomes sum(score * y) over all that are none. A segment without a centre has no such token.
Sizes:   a centre's own; the last token has those of all that it sums up.
Ties:    the lower index wins.   NaN: counts as 0.
Memory:  O(B K2 V + B V around).

Reference: Recoverable Compression, arXiv 2409.01179. Deviation: neighbours are looked up by their own keys; the
published code looks them up at the places of others.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from pydantic import Field

from tvc.errors import PolicyError
from tvc.kernels.greedy import directions
from tvc.kernels.local_outliers import histogram, local_outliers
from tvc.kernels.op import Rest, Scope, Tap, op, primitive
from tvc.kernels.score_cosine import cosine_score
from tvc.kernels.segments import mark, pack, per_token, ranks, rows_at
from tvc.kernels.select_recover import OUTLYING
from tvc.kernels.select_threshold import largest


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    segment = torch.tensor([[-1, -1, *[0] * 9, *[1] * 7], [0] * 18, [-1, 0, *[1] * 16]])
    counts = torch.tensor([[9, 7], [18, 0], [1, 16]])
    chosen = torch.tensor([[-1, -1, 3, 4, 6, 12], [1, 4, 8, 9, 11, 16], [-1, 3, 5, 6, 9, 14]])
    feature, metric, text = torch.randn(3, 18, 6), torch.randn(3, 18, 4), torch.randn(3, 18)
    score = torch.randn(3, 18).exp().square()
    plain = (feature, metric, text, torch.randint(1, 4, (3, 18)).float(), segment, counts)
    for neighbours, around in ((2, 2), (1, 1), (32, 10)):
        yield f"{neighbours}-of-{around}", (*plain, chosen, score, neighbours, around, 1.8)
    yield "no-text", (*plain, chosen, score, 3, 2, 0.0)
    yield "equal-scores", (*plain, chosen, torch.full((3, 18), 0.5), 3, 2, 1.8)
    yield "nan", (*plain, chosen, score.masked_fill(score > 6, float("nan")), 3, 2, 1.8)
    every = torch.where(segment < 0, -1, torch.arange(18))
    yield "every-chosen", (*plain, every, score, 3, 2, 1.8)
    yield "none-chosen", (*plain, torch.full((3, 1), -1), score, 3, 2, 1.8)
    nothing = (feature[:, :0], metric[:, :0], text[:, :0], plain[3][:, :0], segment[:, :0], torch.zeros_like(counts))
    yield "no-visual-token", (*nothing, torch.zeros(3, 0, dtype=torch.int64), score[:, :0], 3, 2, 1.8)


@op(_cases)
def recycle_rest(
    feature: torch.Tensor,
    metric: torch.Tensor,
    text: torch.Tensor,
    size: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    chosen: torch.Tensor,
    score: torch.Tensor,
    neighbours: int,
    around: int,
    weight: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(index, feature, size) of the chosen tokens, the centres with their neighbours, and the sums of what is left."""
    valid, own = segment >= 0, size.float()[:, :, None]
    score, text = (torch.where(torch.isnan(v) | ~valid, 0.0, v.float()) for v in (score, text))
    wide = torch.where(valid[:, :, None], feature.float(), 0.0)
    kept = mark(chosen, segment.shape[1])
    left = torch.where(valid & ~kept, segment, -1)
    others = histogram(left >= 0, segment, counts)
    stand_out = histogram(local_outliers(score, left, others, around, OUTLYING), segment, counts)
    number = torch.minimum((counts - others) * stand_out // others.clamp(min=1), others)
    centre = (left >= 0) & (ranks(left, others, score) < per_token(number, left))
    plain = torch.where((left >= 0) & ~centre & (per_token(number, left) > 0), left, -1)
    last = (plain >= 0) & (
        ranks(plain, histogram(plain >= 0, segment, counts)) == per_token(others - number, plain) - 1
    )

    stays = kept | centre | last
    result = pack(stays, largest(stays))
    is_centre, is_last = (rows_at(flag[:, :, None].float(), result) > 0 for flag in (centre, last))  # [B, K2, 1]
    same = (segment[:, None, :] == per_token(segment, result)[:, :, None]) & (result >= 0)[:, :, None]
    column = torch.arange(segment.shape[1], device=segment.device).expand(same.shape)
    other = same & (left >= 0)[:, None, :] & (column != result[:, :, None])
    unit = directions(metric)
    like = rows_at(unit, result) @ unit.transpose(1, 2) + weight * text[:, None, :]
    order = torch.sort(torch.where(other, like, torch.finfo(torch.float32).min), dim=2, descending=True, stable=True)
    near = other & (torch.zeros_like(order.indices).scatter(2, order.indices, column) < neighbours)
    # Not by `where`, which ONNX Runtime lacks for bool.
    taken = ((is_centre & near) | (is_last & same & (plain >= 0)[:, None, :])).float()
    merged = torch.where(is_last, 0.0, rows_at(wide, result)) + (taken * score[:, None, :]) @ wide
    sizes = torch.where(is_last, taken @ own, rows_at(own, result))
    return result, merged.to(feature.dtype), sizes.squeeze(2).to(size.dtype)


@primitive
class Recycle(Rest):
    """A few of the other tokens take in their neighbours, text-like ones first; one more sums up what is left."""

    key: ClassVar[str] = "recycle"
    exact: ClassVar[bool] = False
    neighbours: int = Field(32, gt=0, description="other tokens that each centre takes in")
    around: int = Field(10, gt=0, le=64, description="neighbours of a score, among which it is an outlier or not")
    weight: float = Field(1.8, ge=0, allow_inf_nan=False, description="of the likeness to the text, beside the cosine")
    layer: str | None = Field(None, description="the layer of the keys; default: the step's own")

    def taps(self) -> dict[str, Tap]:
        return {"metric": Tap("key", self.layer), "text": Tap("text")}

    @property
    def needs_score(self) -> bool:
        """Always: scores are the weights."""
        return True

    def apply(
        self,
        feature: torch.Tensor,
        size: torch.Tensor,
        chosen: torch.Tensor,
        score: torch.Tensor | None,
        scope: Scope,
        metric: torch.Tensor,
        text: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if score is None:
            raise PolicyError(
                "neighbours are weighted by their score",
                where="rest.recycle",
                got="a step without a score",
                want="a score",
                fix="add `score:` to the step, or write rest: {merge: {targets: kept}}",
            )
        likeness = cosine_score.overload(feature, *text)
        tensors = (feature, metric, likeness, size, scope.segment, scope.counts, chosen, score)
        merged: tuple[Any, Any, Any] = recycle_rest.overload(*tensors, self.neighbours, self.around, self.weight)
        return merged

    def kept(self, counts: list[int], chosen: list[int]) -> list[int]:
        """The upper bound: how many centres there are is known only at run time."""
        return [stays + min(stays + 1, n - stays) if stays else 0 for n, stays in zip(counts, chosen, strict=True)]
