"""pixel_blocks: the tokens of every square block of an image's grid side by side in one row.

Shapes:  feature [B, V, D] float, size [B, V] float, segment [B, V] int64 (-1 pads), counts [B, N] int64, columns [B, V]
         int64 from 1 on, the same for all tokens of a segment
         -> index [B, K] int64 ascending, pads (-1) first; rows [B, K, side^2 D] like feature, size [B, K] like size,
            pads 0; K = the most that any sample of the batch is left with (an unbacked size)
Grid:    places 0..columns-1 of a segment are its first row, and so on; the last row may be short. Blocks of side x side
         tokens lie side by side from its first corner on.
Order:   row by row within a block: of side 2 the upper left token's D numbers come first, then those of the upper
         right, the lower left and the lower right one.
Ends:    where rows or columns are no multiple of `side`, zeros stand for the tokens that the last blocks lack.
Places:  a block takes the place of its first token. Sizes add up.
Memory:  O(B V D).

What `pixel_shuffle` makes of a row x of side^2 D numbers is W_2 gelu(W_1 norm(x) + b_1) + b_2, in float32.

Reference: InternVL 1.5, arXiv 2404.16821, and PVC, arXiv 2412.09613 (space to depth, then layer norm and two linear
layers). Deviation: it acts on projected features; published, on the encoder's, and the layers are the projector.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from pydantic import Field

from tvc.kernels.grid import WholeGrids
from tvc.kernels.op import Scope, Tap, op, primitive
from tvc.kernels.segments import follow, pack, per_token, ranks, rows_at, starts
from tvc.kernels.select_threshold import largest
from tvc.kernels.weights import Shape, Trained


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    segment = torch.tensor([[-1, -1, *[0] * 6, *[1] * 8], [0] * 16, [-1, 0, *[1] * 14]])
    counts = torch.tensor([[6, 8], [16, 0], [1, 14]])
    plain = (torch.randn(3, 16, 5), torch.randint(1, 4, (3, 16)).float(), segment, counts)
    one, two, three, four = (torch.full_like(segment, columns) for columns in (1, 2, 3, 4))
    yield (
        "whole-blocks",
        (torch.randn(3, 16, 5), plain[1], torch.zeros_like(segment), torch.tensor([[16, 0]] * 3), four, 2),
    )
    for side in (1, 2, 3, 5):
        yield f"side{side}", (*plain, four, side)
        yield f"side{side}-odd-columns", (*plain, three, side)
        yield f"side{side}-ragged", (*plain, torch.where(segment == 1, four, two), side)
    yield "single-column", (*plain, one, 2)
    mixed = torch.tensor([[1, 0, 1, 0, -1, 1, 0, 0, 1]])
    pairs = (mixed, torch.tensor([[4, 4]]), torch.full_like(mixed, 2))
    yield "interleaved", (torch.randn(1, 9, 5), torch.ones(1, 9), *pairs, 2)
    single = torch.zeros(1, 1, dtype=torch.int64)
    yield "one-token", (torch.randn(1, 1, 5), torch.ones(1, 1), single, single + 1, single + 1, 2)
    nothing = (plain[0][:, :0], plain[1][:, :0], segment[:, :0], torch.zeros_like(counts), four[:, :0])
    yield "no-visual-token", (*nothing, 2)
    whole = torch.zeros(1, 581, dtype=torch.int64)
    yield "V581", (torch.randn(1, 581, 3), torch.ones(1, 581), whole, torch.tensor([[581]]), whole + 24, 3)


@op(_cases)
def pixel_blocks(
    feature: torch.Tensor,
    size: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    columns: torch.Tensor,
    side: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(index, rows, size) of the blocks."""
    place = ranks(segment, counts)
    corner = (segment >= 0) & (place // columns % side == 0) & (place % columns % side == 0)
    index = pack(corner, largest(corner))
    first, long = follow(place, index), follow(columns, index)
    step = torch.arange(side * side, device=segment.device)
    down, across = step // side, step % side
    member = first[:, :, None] + down * long[:, :, None] + across  # [B, K, side^2] places in the segment
    inside = (index >= 0)[:, :, None] & (first[:, :, None] % long.abs()[:, :, None] + across < long[:, :, None])
    inside = inside & (member < follow(per_token(counts, segment), index)[:, :, None])
    spot = torch.where(inside, member + follow(starts(segment, counts), index)[:, :, None], -1)
    slot = follow(torch.sort(segment, dim=1, stable=True).indices, spot.flatten(1))  # [B, K side^2]
    shape = (feature.shape[0], index.shape[1], side * side * feature.shape[2])
    sizes = rows_at(size[:, :, None], slot).reshape(feature.shape[0], index.shape[1], side * side)
    ones = torch.ones(side * side, 1, dtype=size.dtype, device=size.device)
    return index, rows_at(feature, slot).reshape(shape), (sizes @ ones).squeeze(2)


def _up(number: int, parts: int) -> int:
    return -(-number // parts)


@primitive
class PixelShuffle(Trained, WholeGrids):
    """The tokens of every square block of a picture side by side go through a trained network as one token."""

    key: ClassVar[str] = "pixel_shuffle"
    exact: ClassVar[bool] = False
    side: int = Field(2, gt=1, le=32, description="tokens of a block's side")

    @property
    def sure(self) -> bool:
        """Whether rows are as long as the policy says."""
        return self.columns is not None

    def taps(self) -> dict[str, Tap]:
        return {**self.module(), **super().taps()}

    def shapes(self, width: int | str) -> dict[str, Shape]:
        joined = self.side**2 * width if isinstance(width, int) else "joined"
        return {
            "norm.weight": (joined,),
            "norm.bias": (joined,),
            "first.weight": ("channels", joined),
            "first.bias": ("channels",),
            "second.weight": (width, "channels"),
            "second.bias": (width,),
        }

    def apply(
        self,
        feature: torch.Tensor,
        size: torch.Tensor,
        scope: Scope,
        weights: dict[str, torch.Tensor],
        columns: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        grid = (scope.segment, scope.counts, self.rows(scope, columns))
        chosen, rows, sizes = pixel_blocks.overload(feature, size, *grid, self.side)
        own = {name: value.float() for name, value in weights.items()}
        rows = torch.nn.functional.layer_norm(rows.float(), rows.shape[2:], own["norm.weight"], own["norm.bias"])
        inner = torch.nn.functional.gelu(rows @ own["first.weight"].T + own["first.bias"])
        made = inner @ own["second.weight"].T + own["second.bias"]
        return chosen, torch.where((chosen >= 0)[:, :, None], made, 0.0).to(feature.dtype), sizes

    def kept(self, counts: list[int]) -> list[int]:
        """One a block; the upper bound, a single row, where only positions tell how long rows are."""
        if self.columns is None:
            return [_up(count, self.side) for count in counts]
        return [_up(_up(count, self.columns), self.side) * _up(self.columns, self.side) for count in counts]

    def fewest(self, counts: list[int]) -> list[int]:
        return self.kept(counts) if self.sure else [_up(count, self.side**2) for count in counts]
