"""window_merge: windows of an image's grid whose tokens are alike become one token each.

Shapes:  feature [B, V, D] float, size [B, V] float, segment [B, V] int64 (-1 pads), counts [B, N] int64, columns [B, V]
         int64 from 1 on, the same for all tokens of a segment
         -> index [B, K] int64 ascending, pads (-1) first; feature [B, K, D] and size [B, K] like the inputs, pads 0;
            K = the most that any sample of the batch is left with (an unbacked size)
Grid:    places 0..columns-1 of a segment are its first row, and so on. Windows of side x side tokens lie side by side
         from its first corner on; what is left over at the ends of rows and columns is in none.
Rule:    a window merges where the mean cosine of its pairs of tokens is `above` or more: into the mean weighted by
         size, in the place of its middle token (the later one of two). Sizes add up. Sums are float32.
Zeros:   what has no direction has cosine 0 with all others.
Memory:  O(B V D).

Reference: MustDrop, arXiv 2411.10803 (local merging in the encoder). Deviations: every image merges what it has; the
published code merges as many windows in all images of a batch as the one with the fewest, and puts them in front.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from pydantic import Field

from tvc.kernels.greedy import directions
from tvc.kernels.grid import Gridded
from tvc.kernels.op import Merging, Scope, op, primitive
from tvc.kernels.segments import pack, per_token, ranks, rows_at, starts
from tvc.kernels.select_threshold import largest


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    segment = torch.tensor([[-1, -1, *[0] * 6, *[1] * 8], [0] * 16, [-1, 0, *[1] * 14]])
    counts = torch.tensor([[6, 8], [16, 0], [1, 14]])
    feature = torch.randn(3, 16, 5)
    plain = (feature, torch.randint(1, 4, (3, 16)).float(), segment, counts)
    two, three, four = (torch.full_like(segment, columns) for columns in (2, 3, 4))
    for above in (-0.1, 0.0, 0.3):
        yield f"side2-above{above:g}", (*plain, four, 2, above)
        yield f"odd-columns-above{above:g}", (*plain, three, 2, above)
        yield f"ragged-above{above:g}", (*plain, torch.where(segment == 1, four, two), 2, above)
    yield "side3", (*plain, four, 3, -1.0)
    yield "none-alike", (*plain, four, 2, 1.5)
    yield "all-alike", (torch.ones(3, 16, 5), *plain[1:], four, 2, 0.9)
    yield "no-direction", (torch.zeros(3, 16, 5), *plain[1:], four, 2, 0.0)
    mixed = torch.tensor([[1, 0, 1, 0, -1, 1, 0, 0, 1]])
    pairs = (mixed, torch.tensor([[4, 4]]), torch.full_like(mixed, 2))
    yield "interleaved", (torch.randn(1, 9, 5), torch.ones(1, 9), *pairs, 2, -1.0)
    one = torch.zeros(1, 1, dtype=torch.int64)
    yield "one-token", (torch.randn(1, 1, 5), torch.ones(1, 1), one, one + 1, one + 1, 2, -1.0)
    nothing = (feature[:, :0], plain[1][:, :0], segment[:, :0], torch.zeros_like(counts), four[:, :0])
    yield "no-visual-token", (*nothing, 2, 0.3)
    whole = torch.zeros(1, 581, dtype=torch.int64)
    many = (torch.randn(1, 581, 5), torch.ones(1, 581), whole, torch.tensor([[581]]), whole + 24)
    yield "V581", (*many, 3, 0.0)


def grid_windows(
    segment: torch.Tensor, counts: torch.Tensor, columns: torch.Tensor, side: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """([B, V] int64 one more than the spot of the first token of each token's window, 0 in none; [B, V] is it middle).

    Spots are those of `tvc.kernels.segments.starts`.
    """
    place = ranks(segment, counts)
    row, column = place // columns, place % columns
    rows = per_token(counts, segment) // columns // side * side
    inside = (segment >= 0) & (row < rows) & (column < columns // side * side)
    corner = starts(segment, counts) + (row - row % side) * columns + column - column % side
    middle = (row % side) * side + column % side == side * side // 2
    return torch.where(inside, corner + 1, 0), middle


@op(_cases)
def window_merge(
    feature: torch.Tensor,
    size: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    columns: torch.Tensor,
    side: int,
    above: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(index, feature, size) of the windows that merged and of the tokens that did not."""
    number, width = side * side, feature.shape[2]
    valid = segment >= 0
    # Row 0 of a table takes what is in no window.
    window, middle = grid_windows(segment, counts, columns, side)

    def gathered(values: torch.Tensor) -> torch.Tensor:
        """[B, V, ...]: sums of `values [B, V, ...]` over the window of each token."""
        index = window[:, :, None].expand(values.shape)
        room = values.new_zeros(values.shape[0], values.shape[1] + 1, values.shape[2])
        return room.scatter_add(1, index, values).gather(1, index)

    ones = torch.ones(width, 1, device=feature.device)
    unit = directions(feature)
    total = gathered(unit)
    pairs = (total * total) @ ones - gathered((unit * unit) @ ones)
    alike = (pairs / max(1, number * (number - 1))).squeeze(2)
    joins = (window > 0) & (alike >= above)

    wide, weight = feature.float(), size.float()[:, :, None]
    sizes = gathered(weight)
    mean = gathered(torch.where(valid[:, :, None], wide * weight, 0.0)) / sizes.clamp(min=1e-12)
    index = pack(valid & (~joins | middle), largest(valid & (~joins | middle)))
    merged = torch.where(joins[:, :, None], mean, wide).to(feature.dtype)
    sizes = torch.where(joins[:, :, None], sizes, weight).to(size.dtype)
    return index, rows_at(merged, index), rows_at(sizes, index).squeeze(2)


@primitive
class Windows(Gridded, Merging):
    """Square windows of the picture whose tokens are alike become one token each."""

    key: ClassVar[str] = "windows"
    exact: ClassVar[bool] = False
    side: int = Field(3, gt=1, le=32, description="tokens of a window's side")
    above: float = Field(ge=-1, le=1, description="mean cosine of the pairs of a window from which on it merges")

    def apply(
        self, feature: torch.Tensor, size: torch.Tensor, scope: Scope, columns: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        grid = (scope.segment, scope.counts, self.rows(scope, columns))
        merged: tuple[Any, Any, Any] = window_merge.overload(feature, size, *grid, self.side, self.above)
        return merged

    @property
    def sure(self) -> bool:
        """Where every window merges, on grids that are known."""
        return self.above == -1 and self.columns is not None

    def kept(self, counts: list[int]) -> list[int]:
        """The upper bound: how many windows merge is known only at run time, unless all do."""
        return self.fewest(counts) if self.sure else list(counts)

    def fewest(self, counts: list[int]) -> list[int]:
        # Where positions tell how long rows are, windows may fill an image.
        side, columns = self.side, self.columns
        windows = [count // columns // side * (columns // side) if columns else count // side**2 for count in counts]
        return [count - number * (side**2 - 1) for count, number in zip(counts, windows, strict=True)]
