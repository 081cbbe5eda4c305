"""segment_pool: new tokens for each segment, every one a weighted mean of all tokens of the segment.

Shapes:  logits [B, H, V, M] float, value [B, V, H d] float, segment [B, V] int64 (-1 pads), counts [B, N] int64,
         chosen [B, K] int64 (-1 pads): the places that the new tokens take -> [B, K, H d] float32, pads 0
Rule:    the j-th place of a segment (at most M of them) gets, in each of H stretches of the width, the mean of the
         values of its segment, weighted by the softmax of logits[:, :, :, j] over the segment. Sums are float32.
Memory:  O(B H V (M + K)).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from pydantic import Field

from tvc.kernels.budget import Budget
from tvc.kernels.grid import WholeGrids
from tvc.kernels.op import Merging, Scope, op
from tvc.kernels.segments import budgets, per_token, ranks
from tvc.kernels.select_stride import stride_keep
from tvc.kernels.weights import Trained


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    segment = torch.tensor([[-1, -1, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0, 0], [-1, 0, 1, 1, 1, 1, 1]])
    counts = torch.tensor([[3, 2], [7, 0], [1, 5]])
    chosen = torch.tensor([[-1, 3, 5], [1, 4, 6], [-1, 1, 4]])
    for heads, width in ((1, 4), (2, 3)):
        logits, value = torch.randn(3, heads, 7, 4), torch.randn(3, 7, heads * width)
        yield f"H{heads}", (logits, value, segment, counts, chosen)
    yield "one-token", (torch.randn(1, 2, 1, 1), torch.randn(1, 1, 4), *map(torch.tensor, ([[0]], [[1]], [[0]])))
    yield "none-chosen", (torch.randn(3, 1, 7, 4), torch.randn(3, 7, 4), segment, counts, chosen[:, :0])
    empty = (torch.zeros(3, 1, 0, 4), torch.zeros(3, 0, 4), segment[:, :0], torch.zeros_like(counts))
    yield "no-visual-token", (*empty, chosen[:, :0])
    sharp = torch.where(torch.rand(3, 1, 7, 4) > 0.4, -1e4, 0.0)
    yield "nothing-of-most", (sharp, torch.randn(3, 7, 4), segment, counts, chosen)


@op(_cases)
def segment_pool(
    logits: torch.Tensor, value: torch.Tensor, segment: torch.Tensor, counts: torch.Tensor, chosen: torch.Tensor
) -> torch.Tensor:
    """[B, K, H d] float32: the new tokens."""
    heads, most = logits.shape[1], logits.shape[3]
    own = torch.where(chosen < 0, -1, per_token(segment, chosen))  # [B, K] segment of each new token
    there = (own[:, :, None] == torch.arange(counts.shape[1], device=own.device)).sum(1)
    place = ranks(own, there).clamp(min=0, max=most - 1)
    rows = logits.float().gather(3, place[:, None, None, :].expand(-1, heads, logits.shape[2], -1)).transpose(2, 3)
    same = (own[:, :, None] == segment[:, None, :]) & (own >= 0)[:, :, None]  # [B, K, V]
    # Places that stand for nothing see everything, so that no row is without a number: they are set to 0 behind it.
    seen = same | (own < 0)[:, :, None]
    shares = rows.masked_fill(~seen[:, None], float("-inf")).softmax(3)
    shares = torch.where(same[:, None], shares, 0.0)
    parts = value.float().unflatten(2, (heads, -1)).transpose(1, 2)  # [B, H, V, d]
    return (shares @ parts).transpose(1, 2).flatten(2).clone(memory_format=torch.contiguous_format)


class Pooling(Merging):
    """A merge whose new tokens are weighted means of all that enter, at evenly spaced places."""

    @property
    def number(self) -> Budget:
        """How many new tokens each scope gets."""
        raise NotImplementedError

    def placed(self, size: torch.Tensor, scope: Scope) -> tuple[torch.Tensor, torch.Tensor]:
        """(chosen [B, K], size [B, K]); each new token has an even part of all sizes."""
        budget, segment, counts = self.number, scope.segment, scope.counts
        # A count beyond the tokens that there are gives no slots: a tile of an encoder has no room for pads.
        slots = torch.sym_min(budget.slots(segment.shape[1], scope.number), segment.shape[1])
        chosen = stride_keep.overload(segment, counts, *budget.numbers, slots)
        even = torch.zeros_like(size)[:, None, :, None]
        sizes = segment_pool.overload(even, size[:, :, None], segment, counts, chosen).squeeze(2)
        entering = per_token(counts, per_token(segment, chosen))
        left = per_token(budgets(counts, *budget.numbers), per_token(segment, chosen))
        return chosen, sizes * entering / left.clamp(min=1)

    def pooled(
        self, logits: torch.Tensor, value: torch.Tensor, size: torch.Tensor, scope: Scope
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(chosen [B, K], feature [B, K, H d] float32, size [B, K]), see `placed`."""
        chosen, sizes = self.placed(size, scope)
        return chosen, segment_pool.overload(logits, value, scope.segment, scope.counts, chosen), sizes

    def kept(self, counts: list[int]) -> list[int]:
        return [self.number.kept(count) for count in counts]


class CountedPooling(Trained, Pooling):
    """A trained pooling whose number of new tokens is written in the policy."""

    keep: Budget = Field(description="how many new tokens each scope gets")

    @property
    def number(self) -> Budget:
        """The budget as written."""
        return self.keep


class GridPooling(WholeGrids, Pooling):
    """A pooling that knows an image as a grid, a square one unless the decoder's positions tell its rows."""


def by_place(table: torch.Tensor, segment: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """[B, H, V, M]: the rows of a constant table [H, P, M] for the places that tokens have in their segments."""
    heads, places, most = table.shape
    place = ranks(segment, counts).clamp(min=0, max=places - 1)
    rows = torch.nn.functional.embedding(place, table.transpose(0, 1).reshape(places, heads * most))
    return rows.unflatten(2, (heads, most)).transpose(1, 2)
