"""regions_keep: of each region of a picture in which neighbouring tokens show the same, evenly spaced tokens.

Shapes:  pixels [B, V, P] float, segment [B, V] int64 (-1 pads), right and below [B, V] int64 (-1: none)
         -> [B, K] int64 ascending, pads (-1) first; K = the most that any sample of the batch keeps (an unbacked size)
Regions: two neighbours whose pixels lie less than `within` apart (Euclidean, float32; at `within` they do not) are of
         one region, and so is whoever is joined to either. NaN is apart from everything.
Budget:  of n tokens k = max(1, n - round(n (1000 - permille) / 1000)) stay. The share is exact, and a half is rounded
         to the even number, as Python does. A token by itself stays.
Which:   those at places floor(i (n - 1) / (k - 1)) of the region, i = 0..k-1, in whole numbers; the first where k = 1.
         With `floating` as float32 has them, i steps from the first or, in the upper half, back from the last.
Memory:  O(B V P). Rounds: each takes the lowest number among neighbours and halves the way to it, until none changes.

Reference: ShowUI, arXiv 2411.17465 (UI graph). The published places are those of `floating`: at a half 86 sizes below
3000 have one a place too low (the first are 111, 115 and 187).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from pydantic import Field

from tvc.kernels.grid import Neighbours, neighbours_by_columns
from tvc.kernels.loop import State, repeat
from tvc.kernels.merge_scenes import Share
from tvc.kernels.op import Scope, Select, Tap, op, primitive
from tvc.kernels.peaks import histogram
from tvc.kernels.portions import Portion
from tvc.kernels.segments import pack, per_token, ranks, take_rows
from tvc.kernels.select_threshold import largest


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    segment = torch.tensor([[-1, -1, *[0] * 6, *[1] * 4], [0] * 12, [-1, 0, *[1] * 10]])
    counts = torch.tensor([[6, 4], [12, 0], [1, 10]])
    # Whole numbers, so that distances are exact whatever the dtype.
    shades = torch.randint(0, 3, (3, 12, 2)).float()
    for columns in (1, 2, 3, 5):
        grid = (segment, *neighbours_by_columns(segment, counts, columns))
        yield f"columns{columns}", (shades, *grid, 500, 1.5)
    grid = (segment, *neighbours_by_columns(segment, counts, 3))
    yield "at-the-distance", (shades, *grid, 500, 1.0)
    yield "all-equal", (torch.ones(3, 12, 2), *grid, 500, 1.0)
    yield "all-equal-tenth", (torch.ones(3, 12, 2), *grid, 100, 1.0)
    yield "all-different", (torch.arange(36.0).reshape(3, 12, 1) * 2, *grid, 500, 1.0)
    yield "keep-all", (torch.ones(3, 12, 2), *grid, 1000, 1.0)
    yield "quarter", (shades, *grid, 250, 2.5)
    yield "nan", (shades.masked_fill(shades > 1, float("nan")), *grid, 500, 5.0)
    nothing = torch.zeros(3, 0, dtype=torch.int64)
    yield "no-visual-token", (shades[:, :0], nothing, nothing, nothing, 500, 1.0)
    single = torch.zeros(1, 1, dtype=torch.int64)
    yield "one-token", (torch.ones(1, 1, 4), single, single - 1, single - 1, 100, 1.0)
    whole, number = torch.zeros(1, 187, dtype=torch.int64), torch.tensor([[187]])
    wide = (whole, *neighbours_by_columns(whole, number, 17))
    yield "V187-equal", (torch.ones(1, 187, 1), *wide, 500, 1.0)
    yield "V187-floating", (torch.ones(1, 187, 1), *wide, 500, 1.0, True)
    yield "V187-floating-noise", (shades[:1, :, :1].tile(1, 16, 1)[:, :187], *wide, 370, 0.5, True)
    yield "V187-noise", (torch.randint(0, 2, (1, 187, 1)).float(), *wide, 370, 0.5)
    # The last round but one moves a single label.
    square, four = torch.zeros(1, 4, dtype=torch.int64), torch.tensor([[4]])
    bent = torch.tensor([[[0.0], [1.0], [1.0], [1.0]]])
    yield "bent", (bent, square, *neighbours_by_columns(square, four, 2), 500, 0.5)
    # One region that winds through the picture: its ends are neighbours of nothing but the next token.
    winding = torch.tensor([[(row % 2 == 0) | (column == (16 if row % 4 == 1 else 0)) for column in range(17)]
                            for row in range(11)]).float().reshape(1, 187, 1)  # fmt: skip
    yield "V187-winding", (winding, *wide, 500, 0.5)


def _fake(
    pixels: torch.Tensor,
    segment: torch.Tensor,
    right: torch.Tensor,
    below: torch.Tensor,
    permille: int,
    within: float,
    floating: bool = False,
) -> torch.Tensor:
    keep = segment >= 0
    return pack(keep, largest(keep))


def regions(joined: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """[B, V] int64: the first token of each token's region; `joined`: pairs ([B, V] other token, [B, V] bool if)."""
    batch, tokens = joined[0][0].shape
    # One more column takes what is joined to nothing.
    number = torch.arange(tokens + 1, device=joined[0][0].device).expand(batch, -1).clone()

    def lower(_: torch.Tensor, label: torch.Tensor, moved: torch.Tensor) -> State:
        own, made = label[:, :tokens], label
        for other, together in joined:
            theirs = label.gather(1, torch.where(together, other, tokens))
            least = torch.where(together, torch.minimum(own, theirs), tokens)
            for root in (own, theirs):
                made = made.scatter_reduce(1, torch.where(together, root, tokens), least, "amin")
        made = made.gather(1, made)
        return made, (made != label).sum() > 0

    rounds = torch.ones((), dtype=torch.int64, device=number.device) * (tokens + 1)
    changes = torch.ones((), dtype=torch.bool, device=number.device)
    label, _ = repeat(lower, (number, changes), rounds, unsettled=lambda label, moved: moved)
    return label[:, :tokens]


@op(_cases, fake=_fake)
def regions_keep(
    pixels: torch.Tensor,
    segment: torch.Tensor,
    right: torch.Tensor,
    below: torch.Tensor,
    permille: int,
    within: float,
    floating: bool = False,
) -> torch.Tensor:
    """[B, K] int64: the tokens that stay of each region; K is the largest number of a sample."""
    valid, pixels = segment >= 0, pixels.float()
    ones = torch.ones(pixels.shape[2], 1, device=pixels.device)

    def near(other: torch.Tensor) -> torch.Tensor:
        apart = take_rows(pixels, other) - pixels
        return valid & (other >= 0) & (((apart * apart) @ ones).squeeze(2).sqrt() < within)

    region = torch.where(valid, regions([(right, near(right)), (below, near(below))]), -1)
    sizes = histogram(region, segment.shape[1])
    place, size = ranks(region, sizes), per_token(sizes, region)
    goes = Portion(1000 - permille, rounding="nearest").of(size)
    last, span = (size - goes).clamp(min=1) - 1, (size - 1).clamp(min=1)
    # The first of the k whose exact place is not in front of this one.
    number = (place * last + span - 1) // span
    if floating:
        # Float32 is off by less than a place.
        taken = _lies(number - 1, place, span, last) | _lies(number, place, span, last)
        taken = taken | _lies(number + 1, place, span, last)
    else:
        taken = number * span < (place + 1) * last
    keep = valid & ((place == 0) | taken)
    return pack(keep, largest(keep))


def _lies(number: torch.Tensor, place: torch.Tensor, span: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """[B, V] bool: whether the one of this number, 0..last, is put at the place by float32."""
    step = span.float() / last.clamp(min=1).float()
    spot = torch.where(number < (last + 1) // 2, number.float() * step, span.float() - (last - number).float() * step)
    return (number >= 0) & (number <= last) & (last > 0) & (spot.floor().long() == place)


@primitive
class Regions(Select):
    """Of each region in which neighbouring tokens show the same, evenly spaced tokens stay."""

    key: ClassVar[str] = "regions"
    shorthand: ClassVar[str | None] = "keep"
    needs_score: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    keep: Share = Field(description="a share of each region; one token of it at least")
    within: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="distance of normalised pixels below which neighbours show the same"
    )
    columns: int | None = Field(
        None, gt=0, description="tokens in a row of the grid; default: those of the model, or what its positions tell"
    )
    bug_compatible: bool = Field(False, description="whether places are rounded as by float32, as in ShowUI's code")

    def taps(self) -> dict[str, Tap]:
        return {"pixels": Tap("pixel"), "neighbours": Tap("neighbour", columns=self.columns)}

    def apply(
        self, score: torch.Tensor | None, scope: Scope, pixels: torch.Tensor, neighbours: Neighbours
    ) -> torch.Tensor:
        rule = (self.keep.permille or 0, self.within, self.bug_compatible)
        return regions_keep.overload(pixels, scope.segment, *neighbours, *rule)

    def kept(self, counts: list[int]) -> list[int]:
        """The upper bound, all of them: how much of a picture shows the same is known only at run time."""
        return list(counts)
