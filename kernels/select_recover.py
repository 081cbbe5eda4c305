"""recover_keep: as many of the best-scored tokens as there are outliers, and of the others those that suit the text.

Shapes:  score [B, V] float, text [B, V] float, segment [B, V] int64 (-1 pads), counts [B, N] int64
         -> [B, K] int64 ascending, pads (-1) first; K = the most that any sample of the batch keeps (an unbacked size)
First:   of a segment of n tokens the v best by `score` stay, v being the number of local outliers among the scores
         (factor above 1.5, on either side).
Then:    those tokens' `text` becomes the segment's lowest. With o local outliers among these numbers the best
         (n - v) o // n of the others by `text` stay as well. A segment of which none would stay keeps its best token.
Budget:  no more than `count` tokens of each segment where count > 0, else than a share of its tokens (portions.py); of
         more the recovered ones go first, then the lowest-scored.
Ties:    the lower index wins.   NaN: counts as 0.
Memory:  O(B V neighbours).

Reference: Recoverable Compression, arXiv 2409.01179. Deviation: every image has its own numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from pydantic import Field

from tvc.kernels.budget import Budget
from tvc.kernels.local_outliers import histogram, local_outliers
from tvc.kernels.op import Scope, Select, Tap, op, primitive
from tvc.kernels.score_cosine import cosine_score
from tvc.kernels.segments import budgets, pack, per_token, ranks
from tvc.kernels.select_threshold import largest

OUTLYING = 1.5


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    segment = torch.tensor([[-1, -1, *[0] * 9, *[1] * 7], [0] * 18, [-1, 0, *[1] * 16]])
    counts = torch.tensor([[9, 7], [18, 0], [1, 16]])
    score, text = torch.randn(3, 18).exp().square(), torch.randn(3, 18).exp()
    plain = (score, text, segment, counts)
    for neighbours in (1, 3, 20):
        yield f"all-{neighbours}", (*plain, neighbours, 1000, 0)
        yield f"half-{neighbours}", (*plain, neighbours, 500, 0)
        yield f"two-{neighbours}", (*plain, neighbours, 0, 2)
    yield "equal-scores", (torch.full((3, 18), 0.5), torch.full((3, 18), 0.5), segment, counts, 3, 1000, 0)
    yield "nan", (score.masked_fill(score > 4, float("nan")), text, segment, counts, 3, 1000, 0)
    one = torch.zeros(1, 1, dtype=torch.int64)
    yield "one-token", (torch.ones(1, 1), torch.ones(1, 1), one, one + 1, 3, 1000, 0)
    shuffled = torch.tensor([[1, 0, 1, 0, -1, 1, 0, 0, 1, 1]])
    mixed = (torch.randn(1, 10).exp(), torch.randn(1, 10).exp(), shuffled, torch.tensor([[4, 5]]))
    yield "interleaved", (*mixed, 2, 1000, 0)
    nothing = (score[:, :0], text[:, :0], segment[:, :0], torch.zeros_like(counts))
    yield "no-visual-token", (*nothing, 3, 1000, 0)
    whole = torch.zeros(1, 301, dtype=torch.int64)
    yield "V301", (torch.randn(1, 301).exp(), torch.randn(1, 301).exp(), whole, torch.tensor([[301]]), 20, 1000, 0)


@op(_cases)
def recover_keep(
    score: torch.Tensor,
    text: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    neighbours: int,
    permille: int,
    count: int,
) -> torch.Tensor:
    """[B, K] int64: the tokens that stay; K is the largest number of a sample."""
    valid = segment >= 0
    score, text = (torch.where(torch.isnan(v) | ~valid, 0.0, v.float()) for v in (score, text))
    seen = histogram(local_outliers(score, segment, counts, neighbours, OUTLYING), segment, counts)
    rank = ranks(segment, counts, score)
    kept = valid & (rank < per_token(seen, segment))

    top = torch.finfo(torch.float32).max
    # Column 0 takes the pads.
    lowest = torch.full((counts.shape[0], counts.shape[1] + 1), top, device=score.device)
    lowest = lowest.scatter_reduce(1, segment + 1, torch.where(valid, text, top), "amin")[:, 1:]
    text = torch.where(kept, per_token(lowest, segment), text)
    suits = histogram(local_outliers(text, segment, counts, neighbours, OUTLYING), segment, counts)
    left = torch.where(valid & ~kept, segment, -1)
    more = (counts - seen) * suits // counts.clamp(min=1)
    place = ranks(left, counts - seen, text)
    recovered = (left >= 0) & (place < per_token(more, left))
    alone = (per_token(seen + more, segment) == 0) & (rank == 0)
    # In the order in which they are counted: by score, then by the text.
    number = torch.where(kept, rank, torch.where(recovered, per_token(seen, segment) + place, 0))
    keep = (kept | recovered | alone) & valid & (number < per_token(budgets(counts, permille, count), segment))
    return pack(keep, largest(keep))


@primitive
class Recover(Select):
    """Tokens that stand out by their score stay, and of the others those whose likeness to the text stands out."""

    key: ClassVar[str] = "recover"
    shorthand: ClassVar[str | None] = "keep"
    exact: ClassVar[bool] = False
    keep: Budget = Field(description="the most that may stay of each scope")
    neighbours: int = Field(20, gt=0, le=64, description="of a number, among which it is an outlier or not")

    def taps(self) -> dict[str, Tap]:
        return {"feature": Tap("feature"), "text": Tap("text")}

    def apply(
        self,
        score: torch.Tensor | None,
        scope: Scope,
        feature: torch.Tensor,
        text: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        likeness = cosine_score.overload(feature, *text)
        rule = (self.neighbours, *self.keep.numbers)
        return recover_keep.overload(score, likeness, scope.segment, scope.counts, *rule)

    def kept(self, counts: list[int]) -> list[int]:
        """The upper bound: how many stand out is known only at run time."""
        return [self.keep.kept(count) for count in counts]
