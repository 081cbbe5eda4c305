"""fold_weakest: what was not chosen is folded into the weakest chosen token, the lower the score the heavier.

Shapes:  feature [B, V, D] float, size [B, V] float, segment [B, V] int64 (-1 pads), counts [B, N] int64,
         chosen [B, K] int64 (-1 pads), score [B, V] float
         -> feature [B, K, D] and size [B, K] like the inputs, of the chosen tokens, pads 0
Rule:    the lowest-scored chosen token of each segment becomes the weighted mean of itself, with weight 1, and of the
         tokens that were not chosen: the best-scored of them has weight 2, the next 3, and so on. Sizes add up. A
         segment without a chosen token is dropped. Sums are float32.
Ties:    in the order of scores the lower index comes first, so that it weighs less; NaN comes last.

Reference: iLLaVA, arXiv 2412.06263 (the least attended token has the largest weight, as in the published code).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch

from tvc.errors import PolicyError
from tvc.kernels.op import Rest, Scope, op, primitive
from tvc.kernels.segments import mark, per_token, ranks, rows_at


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    segment = torch.tensor([[-1, -1, 0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, 0, 0], [-1, 0, 1, 1, 1, 1, 1, 1, 1]])
    counts = torch.tensor([[4, 3], [9, 0], [1, 7]])
    chosen = torch.tensor([[-1, 3, 6], [1, 4, 8], [-1, -1, 5]])
    feature, score = torch.randn(3, 9, 6), torch.randn(3, 9)
    plain = (feature, torch.randint(1, 4, (3, 9)).float(), segment, counts)
    yield "some", (*plain, chosen, score)
    yield "equal-scores", (*plain, chosen, torch.ones(3, 9))
    yield "nan", (*plain, chosen, score.masked_fill(score > 0.4, float("nan")))
    yield "every-chosen", (*plain, torch.where(segment < 0, -1, torch.arange(9)), score)
    nothing = torch.zeros(3, 0, dtype=torch.int64)
    yield "none-chosen", (*plain, nothing, score)
    yield "pads-alone", (*plain, torch.full((3, 2), -1), score)
    yield "no-visual-token", (*(tensor[:, :0] for tensor in plain[:3]), torch.zeros_like(counts), nothing, score[:, :0])
    shuffled = (torch.randn(1, 6, 3), torch.ones(1, 6), torch.tensor([[1, 0, 1, 0, -1, 1]]), torch.tensor([[2, 3]]))
    yield "interleaved", (*shuffled, torch.tensor([[0, 3, 5]]), torch.randn(1, 6))


@op(_cases)
def fold_weakest(
    feature: torch.Tensor,
    size: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    chosen: torch.Tensor,
    score: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(feature, size) of the chosen tokens, the others folded into the weakest of their segment."""
    kept = mark(chosen, segment.shape[1])
    rest = (segment >= 0) & ~kept
    place, numbers = _places(rest, segment, counts, score.float())
    order, stay = _places(kept, segment, counts, score.float())
    target = kept & (order == per_token(stay, segment) - 1) & (per_token(numbers, segment) > 0)

    wide, own = torch.where((segment >= 0)[:, :, None], feature.float(), 0.0), size.float()[:, :, None]
    scopes = torch.arange(counts.shape[1], device=segment.device)
    member = ((segment[:, :, None] == scopes) & rest[:, :, None]).float().transpose(1, 2)  # [B, N, V]
    # The n members have the weights 2, ..., n + 1, the target has 1.
    whole = (1 + numbers * (numbers + 3) // 2).float()[:, :, None]
    folds = rows_at(target[:, :, None].float(), chosen).squeeze(2) > 0
    into = torch.where(folds, per_token(segment, chosen), -1)
    gained = rows_at((member * (place + 2).float()[:, None, :]) @ wide, into)
    merged = (rows_at(wide, chosen) + gained) / rows_at(whole, into).clamp(min=1.0)
    sizes = rows_at(own, chosen) + rows_at(member @ own, into)
    return merged.to(feature.dtype), sizes.squeeze(2).to(size.dtype)


def _places(
    flag: torch.Tensor, segment: torch.Tensor, counts: torch.Tensor, score: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, V] place by descending score among the flagged tokens of its segment, and [B, N] how many those are."""
    left = torch.where(flag, segment, -1)
    numbers = counts.new_zeros(counts.shape[0], counts.shape[1] + 1)
    numbers = numbers.scatter_add(1, left + 1, torch.ones_like(left))[:, 1:]
    return ranks(left, numbers, score), numbers


@primitive
class Fold(Rest):
    """The tokens that were not chosen are folded into the weakest that was, those of the lowest score weighing most."""

    key: ClassVar[str] = "fold"

    @property
    def needs_score(self) -> bool:
        """Always: scores order the tokens."""
        return True

    def apply(
        self, feature: torch.Tensor, size: torch.Tensor, chosen: torch.Tensor, score: torch.Tensor | None, scope: Scope
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if score is None:
            raise PolicyError(
                "a fold orders tokens by their score",
                where="rest.fold",
                got="a step without a score",
                want="a score",
                fix="add `score:` to the step, or write rest: {merge: {targets: kept}}",
            )
        merged, sizes = fold_weakest.overload(feature, size, scope.segment, scope.counts, chosen, score)
        return chosen, merged, sizes
