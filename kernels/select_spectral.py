"""spectral_rows: where tokens lie in the space of the slowest changes along their neighbourhoods.

Shapes:  feature [B, V, D] float, segment [B, V] int64 (-1 pads), counts [B, N] int64 -> [B, V, V] float32
Rule:    W_ij = exp(-|x_i - x_j|^2 / (2 sigma^2)) between the tokens of a segment, D_ii = sum_j W_ij, and
         L = D^-1/2 (D - W) D^-1/2. With the K eigenvectors of the smallest eigenvalues as the columns of Q, K being the
         segment's budget, token i gets row i of Q Q^T, made 1 long: rows that are as far from each other as those of Q
         with its rows made 1 long. Columns of other segments are 0.
Sigma:   in the unit of the features; `relative`: times the mean distance of two tokens of the segment.
Budget:  `count` of each segment where count > 0, else a share of its tokens (portions.py); of 0 it is 1 here.
Ties:    eigenvalues within a millionth of the largest row of L count as equal. Where the budget parts equal ones, Q
         goes without them, or has all of them if none is smaller. Tokens whose distance is below a thousandth of
         their lengths are copies.
NaN:     a token that is not finite is taken as zeros.   Pads: rows of zeros.
Memory:  O(B V^2), in float64; time O(B V^3).

`spectral` makes k-medoids of these rows, as select_medoids.py does of features. All are 1 long, so that the first token
of a segment is the first taken.

Reference: CenterCLIP, arXiv 2205.00823 (spectral clustering, sigma 2). Deviation: published, eigenvectors of equal
eigenvalues are taken in the order in which a singular value decomposition happens to give them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from pydantic import Field

from tvc.kernels.eigenspace import smallest
from tvc.kernels.op import Scope, op, primitive
from tvc.kernels.segments import budgets
from tvc.kernels.select_medoids import SAME, Medoids


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    segment = torch.tensor([[-1, -1, 0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, 0, 0], [-1, 0, 1, 1, 1, 1, 1, 1, 1]])
    counts = torch.tensor([[4, 3], [9, 0], [1, 7]])
    feature = torch.randn(3, 9, 6)
    given = (feature, segment, counts)
    yield "share-half", (*given, 500, 0, 2.0, False)
    yield "share-all", (*given, 1000, 0, 2.0, False)
    yield "share-none", (*given, 10, 0, 2.0, False)
    yield "count-three", (*given, 0, 3, 1.0, False)
    yield "keep-one", (*given, 0, 1, 2.0, False)
    yield "count-above-all", (*given, 0, 20, 2.0, False)
    yield "relative", (feature * 40, segment, counts, 500, 0, 0.5, True)
    yield "wide", (*given, 0, 3, 30.0, False)
    yield "narrow", (*given, 0, 3, 0.1, False)
    yield "so-narrow-that-all-are-alone", (*given, 0, 3, 1e-3, False)
    yield "all-equal", (torch.ones(3, 9, 4), segment, counts, 500, 0, 2.0, False)
    yield "all-equal-relative", (torch.ones(3, 9, 4), segment, counts, 500, 0, 1.0, True)
    yield "zeros", (torch.zeros(3, 9, 4), segment, counts, 0, 2, 2.0, False)
    yield "nan", (feature.masked_fill(torch.rand(3, 9, 1) > 0.7, float("nan")), segment, counts, 0, 2, 2.0, False)
    shuffled = torch.tensor([[1, 0, 1, 0, -1, 1, 0, 0, 0, 1]])
    yield "interleaved", (torch.randn(1, 10, 4), shuffled, torch.tensor([[5, 4]]), 0, 2, 1.0, False)
    nothing = (feature[:, :0], segment[:, :0], torch.zeros(3, 0, dtype=torch.int64))
    yield "no-visual-token", (*nothing, 500, 0, 2.0, False)
    yield "one-token", (torch.randn(1, 1, 3), torch.tensor([[0]]), torch.tensor([[1]]), 1000, 0, 2.0, False)
    yield "V61", (torch.randn(1, 61, 8), torch.zeros(1, 61, dtype=torch.int64), torch.tensor([[61]]), 0, 10, 2.0, False)
    copies = torch.tensor([0, 1, 0, 0, 2, 1, 0])
    for number in (2, 3, 4, 6):
        spots = (torch.randn(3, 4)[copies][None], torch.zeros(1, 7, dtype=torch.int64), torch.tensor([[7]]))
        yield f"copies-{number}", (*spots, 0, number, 1.0, False)
    blobs = torch.randn(1, 8, 3) / 8 + torch.tensor([0.0, 9.0] * 4)[None, :, None]
    yield "two-blobs", (blobs, torch.zeros(1, 8, dtype=torch.int64), torch.tensor([[8]]), 0, 2, 1.0, False)
    corners = torch.tensor([[[0.0, 0], [1, 0], [0, 1], [1, 1]]])
    for number in (1, 2, 3):  # two eigenvalues of a square are equal: the budget of 2 parts them
        square = (corners, torch.zeros(1, 4, dtype=torch.int64), torch.tensor([[4]]))
        yield f"square-{number}", (*square, 0, number, 1.0, False)


def _fake(
    feature: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    permille: int,
    count: int,
    sigma: float,
    relative: bool,
) -> torch.Tensor:
    return feature.new_empty(*segment.shape, segment.shape[1], dtype=torch.float32)


def _apart(feature: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """[B, V, V] float64: squared distances, symmetric to the last bit, 0 of a token with itself and with copies.

    Args:
        feature: [B, V, D] float64.
        valid: [B, V, 1] bool, no pads.
    """
    # Distances stay as they are when everything is moved; near zero their rounding is smallest.
    real = valid.double()
    mean = real.transpose(1, 2) @ feature / (real.transpose(1, 2) @ real).clamp(min=1)
    feature = torch.where(valid, feature - mean, 0.0)
    square = (feature * feature) @ torch.ones(feature.shape[2], 1, dtype=torch.float64, device=feature.device)
    both = square + square.transpose(1, 2)
    apart = both - 2.0 * feature @ feature.transpose(1, 2)
    place = torch.arange(feature.shape[1], device=feature.device)
    apart = (apart + apart.transpose(1, 2)) * 0.5
    return torch.where((place[:, None] == place) | (apart < SAME * both), 0.0, apart)


@op(_cases, fake=_fake)
def spectral_rows(
    feature: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    permille: int,
    count: int,
    sigma: float,
    relative: bool,
) -> torch.Tensor:
    """[B, V, V] float32: the rows."""
    valid = (segment >= 0)[:, :, None]
    feature = torch.nan_to_num(torch.where(valid, feature.double(), 0.0), 0.0, 0.0, 0.0)
    together = (segment[:, :, None] == segment[:, None, :]) & valid
    apart = _apart(feature, valid)
    ones = torch.ones(segment.shape[1], 1, dtype=torch.float64, device=segment.device)
    width = torch.full_like(ones, sigma)
    if relative:
        same = together.double()
        pairs = same @ (same @ ones - 1)  # [B, V, 1]
        mean = same @ ((same * apart.sqrt()) @ ones) / pairs.clamp(min=1)
        width = sigma * torch.where(mean > 0, mean, 1.0)
    place = torch.arange(segment.shape[1], device=segment.device)
    other = together & (place[:, None] != place)
    near = torch.where(other, (-apart / (2 * width * width)).exp(), 0.0)
    # Of L each number is told by what is beside the diagonal of W: 1 - 1 / D would lose it where neighbours are far.
    beside = near @ ones  # [B, V, 1]
    root = (1.0 + beside).sqrt()
    matrix = torch.where(other, -near / (root * root.transpose(1, 2)), 0.0)
    matrix = torch.where(place[:, None] == place, beside / (1.0 + beside), matrix)
    rows = smallest(matrix, segment, counts, budgets(counts, permille, count))
    length = ((rows * rows) @ ones).sqrt()
    return torch.where(valid, rows / length.clamp(min=1e-12), 0.0).float()


@primitive
class Spectral(Medoids):
    """Tokens are grouped along their neighbourhoods, by spectral clustering, and the medoid of each group stays."""

    key: ClassVar[str] = "spectral"
    sigma: float = Field(2.0, gt=0, allow_inf_nan=False, description="how far neighbourhoods reach")
    relative: bool = Field(False, description="whether sigma counts in mean distances between the tokens of a scope")

    def apply(self, score: torch.Tensor | None, scope: Scope, feature: torch.Tensor) -> torch.Tensor:
        rows = spectral_rows.overload(feature, *self.room(scope)[:4], self.sigma, self.relative)
        return super().apply(score, scope, rows)
