"""absorb_neighbours: each chosen token takes in the tokens most like it, weighted by their score.

Shapes:  feature [B, V, D] float, metric [B, V, d] float, size [B, V] float, segment [B, V] int64 (-1 pads),
         counts [B, N] int64, chosen [B, K] int64 (-1 pads), score [B, V] float
         -> index [B, K2] int64 ascending, pads (-1) first; feature [B, K2, D] and size [B, K2] like the inputs, pads 0
Rule:    x + sum(score * y) over the `neighbours` other tokens y of its segment, chosen or not, of the highest cosine of
         the metric (of fewer: all). Every y is as it came in, and the weights are not normalised.
Extra:   where asked for, the last token of each segment that was not chosen stays and becomes sum(score * y) over all
         that were not chosen: K2 = K + slots. A segment that was chosen whole has none. Else K2 = K.
Sizes:   a chosen token's own; the extra token has those of all that were not chosen.
Ties:    the lower index wins.   NaN: counts as a score of 0.
Memory:  O(B K V).

Reference: LLaVA-PruMerge, arXiv 2403.15388. Deviation: the extra token stands where the last one that was not chosen
stood; published, it is one more token behind all others, there also where nothing was left.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from tvc.errors import PolicyError
from tvc.kernels.op import Rest, Scope, Tap, op, primitive
from tvc.kernels.segments import mark, pack, per_token, ranks, rows_at


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    segment = torch.tensor([[-1, -1, 0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, 0, 0], [-1, 0, 1, 1, 1, 1, 1, 1, 1]])
    counts = torch.tensor([[4, 3], [9, 0], [1, 7]])
    chosen = torch.tensor([[-1, 3, 6], [1, 4, 8], [-1, -1, 5]])
    feature, metric, score = torch.randn(3, 9, 6), torch.randn(3, 9, 4), torch.rand(3, 9)
    plain = (feature, metric, torch.randint(1, 4, (3, 9)).float(), segment, counts)
    for extra in (False, True):
        yield f"two-{extra}", (*plain, chosen, score, 2, extra, 2)
        yield f"all-{extra}", (*plain, chosen, score, 32, extra, 2)
        yield f"equal-metric-{extra}", (feature, torch.ones(3, 9, 4), *plain[2:], chosen, score, 3, extra, 2)
    yield "zero-metric", (feature, torch.zeros(3, 9, 4), *plain[2:], chosen, score, 1, True, 2)
    yield "no-score", (*plain, chosen, torch.zeros(3, 9), 2, True, 2)
    yield "nan", (*plain, chosen, score.masked_fill(score > 0.6, float("nan")), 2, True, 2)
    nothing = torch.zeros(3, 0, dtype=torch.int64)
    yield "none-chosen", (*plain, nothing, score, 2, True, 2)
    yield "every-chosen", (*plain, torch.where(segment < 0, -1, torch.arange(9)), score, 2, True, 2)
    no_token = (feature[:, :0], metric[:, :0], plain[2][:, :0], segment[:, :0], torch.zeros_like(counts))
    yield "no-visual-token", (*no_token, nothing, score[:, :0], 2, True, 2)
    yield "no-visual-token-slots", (*no_token, torch.full((3, 2), -1), score[:, :0], 2, False, 0)


@op(_cases)
def absorb_neighbours(
    feature: torch.Tensor,
    metric: torch.Tensor,
    size: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    chosen: torch.Tensor,
    score: torch.Tensor,
    neighbours: int,
    extra: bool,
    slots: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(index, feature, size) of the chosen tokens with their neighbours added, and of the extra tokens."""
    valid, own, score = segment >= 0, size.float()[:, :, None], score.float()
    wide = torch.where(valid[:, :, None], feature.float(), 0.0)
    score = torch.where(valid & ~torch.isnan(score), score, 0.0)
    rest = valid & ~mark(chosen, segment.shape[1])
    if extra:
        left = torch.where(rest, segment, -1)
        numbers = counts.new_zeros(counts.shape[0], counts.shape[1] + 1)
        numbers = numbers.scatter_add(1, left + 1, torch.ones_like(left))[:, 1:]
        last = rest & (ranks(left, numbers) == per_token(numbers, left) - 1)
        result = pack((valid & ~rest) | last, chosen.shape[1] + slots)
        is_extra = rows_at(last[:, :, None].float(), result) > 0  # [B, K2, 1]
    else:
        result = chosen.clone(memory_format=torch.contiguous_format)
        is_extra = torch.zeros_like(result, dtype=torch.bool)[:, :, None]
    same = (segment[:, None, :] == per_token(segment, result)[:, :, None]) & valid[:, None, :]
    same = same & (result >= 0)[:, :, None]
    near = _nearest(metric, result, same, neighbours)
    # Not by `where`, which ONNX Runtime lacks for bool.
    taken = (is_extra & same & rest[:, None, :]) | (~is_extra & near)
    added = (taken.float() * score[:, None, :]) @ wide
    merged = torch.where(is_extra, 0.0, rows_at(wide, result)) + added
    sizes = torch.where(is_extra, taken.float() @ own, rows_at(own, result))
    return result, merged.to(feature.dtype), sizes.to(size.dtype).squeeze(2)


def _nearest(metric: torch.Tensor, index: torch.Tensor, same: torch.Tensor, neighbours: int) -> torch.Tensor:
    """[B, K, V] bool: the tokens nearest to each of `index [B, K]`, of those in its segment, not itself."""
    metric = metric.float()
    ones = torch.ones(metric.shape[2], 1, device=metric.device)
    metric = metric / ((metric * metric) @ ones).sqrt().clamp(min=1e-12)
    column = torch.arange(metric.shape[1], device=metric.device).expand(same.shape)
    other = same & (column != index[:, :, None])
    near = torch.where(other, rows_at(metric, index) @ metric.transpose(1, 2), -2.0)
    order = torch.sort(near, dim=2, descending=True, stable=True).indices
    return other & (torch.zeros_like(order).scatter(2, order, column) < neighbours)


@primitive
class Absorb(Rest):
    """Chosen tokens take in their nearest neighbours, weighted by score; one more token may hold what was left."""

    key: ClassVar[str] = "absorb"
    neighbours: int = Field(32, gt=0, description="other tokens that each chosen one takes in")
    by: Literal["key_cosine", "feature_cosine"] = "feature_cosine"
    layer: str | None = Field(None, description="for key_cosine: the layer of the keys; default: the step's own")
    extra: bool = Field(False, description="whether one more token of each scope sums up those not chosen")

    def taps(self) -> dict[str, Tap]:
        return {"metric": Tap("key", self.layer)} if self.by == "key_cosine" else {}

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
        metric: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if score is None:
            raise PolicyError(
                "neighbours are weighted by their score",
                where="rest.absorb",
                got="a step without a score",
                want="a score",
                fix="add `score:` to the step, or write rest: {merge: {targets: kept}}",
            )
        tensors = (feature, feature if metric is None else metric, size, scope.segment, scope.counts, chosen, score)
        merged: tuple[Any, Any, Any] = absorb_neighbours.overload(*tensors, self.neighbours, self.extra, scope.number)
        return merged

    def kept(self, counts: list[int], chosen: list[int]) -> list[int]:
        return [stays + min(1, n - stays) if self.extra else stays for n, stays in zip(counts, chosen, strict=True)]
