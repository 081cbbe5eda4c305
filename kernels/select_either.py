"""either_score: a token passes by its share of one score, by another score itself, or because a third ranks it high.

Shapes:  total [B, V] float, single [B, V] float, guard [B, V] float, segment [B, V] int64 (-1 pads), counts [B, N]
         int64 -> [B, V] float32, pads 0: 1 or more for a token that passes
Rule:    the larger of total / (share * sum of the segment's totals) and single / least. The tokens of a segment that
         `guard` ranks highest, `count` of them where count > 0, else permille / 1000 rounded up, get GUARDED.
Ties:    the lower index is guarded.   NaN: in `guard` ranks last, in the others counts as 0.

Reference: MustDrop, arXiv 2411.10803 (the dual-attention filter with its key set).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from pydantic import Field

from tvc.kernels.budget import OwnRounding
from tvc.kernels.op import Scope, Select, op, primitive
from tvc.kernels.segments import per_token, ranks
from tvc.kernels.select_threshold import threshold_keep

GUARDED = 1e6
PASSES = 1.0 - 2.0**-24  # the number below 1 that is nearest to it: what is above is 1 or more


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    segment = torch.tensor([[-1, -1, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0, 0], [-1, 0, 1, 1, 1, 1, 1]])
    counts = torch.tensor([[3, 2], [7, 0], [1, 5]])
    total, single, guard = torch.rand(3, 7), torch.rand(3, 7), torch.randn(3, 7)
    plain = (total, single, guard, segment, counts)
    yield "share-guarded", (*plain, 0.2, 0.8, 80, 0)
    yield "count-guarded", (*plain, 0.2, 0.8, 0, 2)
    yield "all-guarded", (*plain, 0.9, 0.9, 1000, 0)
    yield "low-bars", (*plain, 1e-4, 1e-4, 0, 1)
    yield "equal", (torch.ones(3, 7), torch.ones(3, 7), torch.zeros(3, 7), segment, counts, 0.25, 2.0, 0, 1)
    yield "zeros", (torch.zeros(3, 7), torch.zeros(3, 7), guard, segment, counts, 0.01, 0.01, 80, 0)
    unknown = guard > 0.3
    lost = (value.masked_fill(unknown, float("nan")) for value in (total, single, guard))
    yield "nan", (*lost, segment, counts, 0.2, 0.8, 300, 0)
    nothing = (total[:, :0], single[:, :0], guard[:, :0], segment[:, :0], torch.zeros_like(counts))
    yield "no-visual-token", (*nothing, 0.2, 0.8, 80, 0)


@op(_cases)
def either_score(
    total: torch.Tensor,
    single: torch.Tensor,
    guard: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    share: float,
    least: float,
    permille: int,
    count: int,
) -> torch.Tensor:
    """[B, V] float32: by how much each token passes."""
    valid = segment >= 0
    total, single = (torch.where(torch.isnan(v) | ~valid, 0.0, v.float()) for v in (total, single))
    # Column 0 takes the pads.
    sums = total.new_zeros(counts.shape[0], counts.shape[1] + 1).scatter_add(1, segment + 1, total)[:, 1:]
    part = total / (per_token(sums, segment) * share).clamp(min=1e-30)
    number = counts.clamp(max=count) if count > 0 else (counts * permille + 999) // 1000
    guarded = valid & (ranks(segment, counts, guard.float()) < per_token(number, segment))
    passes = torch.where(guarded, GUARDED, torch.maximum(part, single / least))
    return torch.where(valid, passes, 0.0)


@primitive
class Either(Select):
    """Tokens stay that have their share of one score or enough of another, and the best by a third."""

    key: ClassVar[str] = "either"
    terms: ClassVar[int] = 3
    exact: ClassVar[bool] = False
    keep: OwnRounding = Field(description="what stays in any case, by the third score; a share is rounded up")
    share: float = Field(gt=0, le=1, description="of the scope's sum of the first score, from which on a token stays")
    least: float = Field(gt=0, allow_inf_nan=False, description="the second score from which on a token stays")

    def joined(self, terms: list[torch.Tensor], scope: Scope) -> torch.Tensor:
        rule = (self.share, self.least, self.keep.permille or 0, self.keep.count or 0)
        return either_score.overload(*terms, scope.segment, scope.counts, *rule)

    def apply(self, score: torch.Tensor | None, scope: Scope) -> torch.Tensor:
        return threshold_keep.overload(score, scope.segment, scope.counts, PASSES, False)

    def kept(self, counts: list[int]) -> list[int]:
        """The upper bound, all of them: how many pass is known only at run time."""
        return list(counts)
