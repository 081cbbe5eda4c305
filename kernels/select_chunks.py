"""chunks_keep: every stretch of a segment has its own budget, by its scores and by how unlike its tokens are.

Shapes:  feature [B, V, D] float, score [B, V] float (attention), segment [B, V] int64 (-1 pads), counts [B, N] int64
         -> [B, slots] int64 ascending, pads (-1) first
Chunks:  the n tokens of a segment in `chunks` stretches of n // chunks, the first n % chunks of them one longer.
Unlike:  of token i of a chunk of m > 1 tokens, with the cosines c_ij to the others: mu = sum_j c_ij / (m - 1),
         v_i = (sum_j (c_ij - mu)^2 + mu^2) / (m - 1); mu^2 is what a zero on the diagonal adds. A length is taken 1e-6
         longer than it is, and what is not finite as 0.
Worth:   of a chunk, with a = 1000 score: mean(a) + diversity * mean(v) * mean|a| / (mean(v) + 1e-6); of a single token
         its score alone. What is negative or NaN is worth 0.
Budget:  T = `count` tokens of each segment where count > 0, else a share of its tokens (portions.py). A chunk
         gets floor(T worth / (sum of worths + 1e-6)); what is left goes one each to the chunks worth most.
Kept:    the best-scored of each chunk. What a chunk gets beyond its tokens goes to the best-scored of all others.
Ties:    the lower index wins, also among chunks. NaN scores rank last.
Memory:  O(B V D + B V^2 / chunks) where a sample holds one segment: cosines of neighbouring blocks, never V x V.

Reference: HoloV, arXiv 2510.02912. Deviation: the published code feeds zero vectors in the place of what a chunk gets
beyond its tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from pydantic import Field

from tvc.kernels.budget import Budget
from tvc.kernels.op import Scope, Select, Tap, op, primitive
from tvc.kernels.segments import budgets, pack, per_token, ranks, starts


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    segment = torch.tensor([[-1, -1, 0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, 0, 0], [-1, 0, 1, 1, 1, 1, 1, 1, 1]])
    counts = torch.tensor([[4, 3], [9, 0], [1, 7]])
    feature, score = torch.randn(3, 9, 6), torch.rand(3, 9)
    yield "share-half", (feature, score, segment, counts, 500, 0, 2, 0.09, 4)
    yield "share-all", (feature, score, segment, counts, 1000, 0, 3, 0.09, 9)
    yield "count-three", (feature, score, segment, counts, 0, 3, 3, 50.0, 6)
    yield "keep-one", (feature, score, segment, counts, 0, 1, 2, 0.09, 2)
    yield "more-chunks-than-tokens", (feature, score, segment, counts, 0, 3, 20, 0.09, 6)
    yield "one-chunk", (feature, score, segment, counts, 500, 0, 1, 0.09, 4)
    yield "count-above-all", (feature, score, segment, counts, 0, 20, 2, 0.09, 40)
    yield "all-equal", (torch.ones(3, 9, 6), torch.ones(3, 9), segment, counts, 500, 0, 2, 0.09, 4)
    yield "no-worth", (torch.zeros(3, 9, 6), torch.zeros(3, 9), segment, counts, 500, 0, 2, 0.09, 4)
    steep = torch.tensor([[0.0, 0.0, 9.0, 8.0, 0.001, 0.002, 9.0, 0.0, 0.001]]).repeat(3, 1)
    yield "overflow", (feature, steep, segment, counts, 0, 3, 3, 0.09, 6)
    yield "nan", (feature, score.masked_fill(torch.rand(3, 9) > 0.8, float("nan")), segment, counts, 0, 2, 2, 0.09, 4)
    interleaved = torch.tensor([[1, 0, 1, 0, -1, 1, 0, 0, 0, 1]])
    yield (
        "interleaved",
        (torch.randn(1, 10, 4), torch.rand(1, 10), interleaved, torch.tensor([[5, 4]]), 0, 3, 2, 0.09, 6),
    )
    nothing = (feature[:, :0], score[:, :0], segment[:, :0], torch.zeros(3, 0, dtype=torch.int64))
    yield "no-visual-token", (*nothing, 500, 0, 2, 0.09, 0)


def _unlike(feature: torch.Tensor, chunk: torch.Tensor, spot: torch.Tensor, size: torch.Tensor, B: int) -> torch.Tensor:
    """[B, V] float32: the variance of each token's cosines to the others of its chunk.

    Tokens are laid out by `spot`, chunk behind chunk, in blocks at least as long as any chunk (`B`): all of a
    token's chunk stands in its own block, the one before and the one behind.
    """
    batch, width, depth = feature.shape
    blocks = width // B + 2  # at least two, as B is: a size that may be 1 leaves guards behind
    feature = feature.float()
    ones = torch.ones(depth, 1, device=feature.device)
    unit = torch.nan_to_num(feature / (((feature * feature) @ ones).sqrt() + 1e-6), 0.0, 0.0, 0.0)
    line = unit.new_zeros(batch, (blocks + 2) * B, depth)
    line = line.scatter(1, (spot + B)[:, :, None].expand(-1, -1, depth), unit).unflatten(1, (blocks + 2, B))
    names = torch.full((batch, (blocks + 2) * B), -1, dtype=torch.int64, device=feature.device)
    names = names.scatter(1, spot + B, chunk).unflatten(1, (blocks + 2, B))
    three = [line[:, :-2], line[:, 1:-1], line[:, 2:]]
    cosine = line[:, 1:-1] @ torch.cat(three, 2).transpose(2, 3)  # [B, blocks, B, 3 B]
    name = names[:, 1:-1, :, None]
    other = (name == torch.cat([names[:, :-2], names[:, 1:-1], names[:, 2:]], 2)[:, :, None, :]) & (name >= 0)
    own = torch.arange(B, device=feature.device)[:, None] + B == torch.arange(3 * B, device=feature.device)
    other = other & ~own
    mean = torch.where(other, cosine, 0.0).sum(3).flatten(1).gather(1, spot) / (size - 1).clamp(min=1)
    of_line = torch.zeros(batch, blocks * B, device=feature.device).scatter(1, spot, mean).unflatten(1, (blocks, B))
    square = torch.where(other, (cosine - of_line[..., None]) ** 2, 0.0).sum(3).flatten(1).gather(1, spot)
    return (square + mean * mean) / (size - 1).clamp(min=1)


@op(_cases)
def chunks_keep(
    feature: torch.Tensor,
    score: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    permille: int,
    count: int,
    chunks: int,
    diversity: float,
    slots: int,
) -> torch.Tensor:
    """[B, slots] int64: the best of each stretch, by budgets of their own."""
    batch, valid, score = segment.shape[0], segment >= 0, score.float()
    place, start = ranks(segment, counts), starts(segment, counts)
    whole, longer = per_token(counts // chunks, segment), per_token(counts % chunks, segment)
    edge = longer * (whole + 1)
    inside = torch.where(place < edge, place // (whole + 1), longer + (place - edge) // whole.clamp(min=1))
    size = whole + (inside < longer).long()
    # Two empty segments more keep every sum along chunks defined for N = 0; pads are in none.
    padded = torch.nn.functional.pad(counts, (0, 2))
    number = torch.arange(chunks, device=segment.device)
    sizes = padded[:, :, None] // chunks + (number < padded[:, :, None] % chunks).long()  # [B, N + 1, chunks]
    chunk = torch.where(valid, segment * chunks + inside, -1)
    last = padded.shape[1] * chunks
    group = torch.where(valid, chunk, last)

    def mean_of(values: torch.Tensor) -> torch.Tensor:
        zeros = torch.zeros(batch, last + 1, device=segment.device)
        summed = zeros.scatter_add(1, group, torch.where(valid, values, 0.0))[:, :-1]
        return summed.unflatten(1, (padded.shape[1], chunks)) / sizes.clamp(min=1)

    # Pads come first in the line, in their own order.
    spot = torch.where(valid, start + place, (~valid).long().cumsum(1) - 1)
    unlike = _unlike(feature, chunk, spot, torch.where(valid, size, 0), segment.shape[1] // chunks + 2)
    raised, spread = score * 1000, mean_of(unlike)
    worth = mean_of(raised) + diversity * spread * mean_of(raised.abs()) / (spread + 1e-6)
    worth = torch.where(sizes > 1, worth, mean_of(score))
    worth = torch.where(worth > 0, worth, 0.0)
    share = worth / (worth.sum(2, keepdim=True) + 1e-6)
    budget = budgets(padded, permille, count)[:, :, None]
    given = (share * budget).floor().long()
    left = budget - given.sum(2, keepdim=True)
    by_share = torch.sort(share, dim=2, descending=True, stable=True).indices
    given = given + (torch.zeros_like(given).scatter(2, by_share, number.expand_as(given)) < left).long()

    of_chunk = torch.nn.functional.pad(given.flatten(1), (0, 1)).gather(1, group)
    taken = valid & (ranks(chunk, sizes.flatten(1), score) < of_chunk)
    fitting = torch.minimum(given, sizes).sum(2)
    free = valid & ~taken
    more = per_token(budget[:, :, 0] - fitting, segment)
    extra = free & (ranks(torch.where(free, segment, -1), padded - fitting, score) < more)
    return pack(taken | extra, slots)


@primitive
class Chunks(Select):
    """Every stretch of an image keeps its best tokens; how many, its scores and the variety of its tokens decide."""

    key: ClassVar[str] = "chunks"
    shorthand: ClassVar[str | None] = "keep"
    keep: Budget = Field(description="what stays of each scope")
    number: int = Field(16, gt=0, description="stretches that a scope is divided into")
    diversity: float = Field(0.09, ge=0, allow_inf_nan=False, description="weight of the variety beside the scores")

    def taps(self) -> dict[str, Tap]:
        return {"feature": Tap("feature")}

    def apply(self, score: torch.Tensor | None, scope: Scope, feature: torch.Tensor) -> torch.Tensor:
        budget = self.keep
        slots = budget.slots(scope.segment.shape[1], scope.number)
        rule = (*budget.numbers, self.number, self.diversity, slots)
        return chunks_keep.overload(feature, score, scope.segment, scope.counts, *rule)

    def kept(self, counts: list[int]) -> list[int]:
        return [self.keep.kept(count) for count in counts]
