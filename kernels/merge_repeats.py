"""repeats_merge: a token of a video that is like the one before it at its place joins it.

Shapes:  feature [B, V, D] float, size [B, V] float, segment [B, V] int64 (-1 pads), counts [B, N] int64, frame and
         place [B, V] int64 (-1 pads), room [B, N] int64
         -> index [B, K] int64 ascending, pads (-1) first; feature [B, K, D] and size [B, K] like the inputs, pads 0;
            K = the most that any sample of the batch is left with (an unbacked size)
Before:  the token of the nearest earlier frame of the segment that still has one at that place; frames may have gaps.
Rule:    a token joins where its cosine with the one before it is `above` or more; of a segment as many as leave `room`
         tokens at most, those most alike first. Tokens that join one after another are a run, in the place of the token
         in front of the first of them, which becomes the mean of all. Sums are float32, sizes add up.
Ties:    the lower index joins first.   Zeros: what has no direction has cosine 0 with all others.

Reference: FrameFusion, arXiv 2501.01986.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from pydantic import Field

from tvc.kernels.allowance import allowance, spent_tap
from tvc.kernels.greedy import directions, rows
from tvc.kernels.merge_scenes import Share
from tvc.kernels.op import Merging, Scope, Tap, op, primitive
from tvc.kernels.peaks import histogram
from tvc.kernels.score_change import frame_cases
from tvc.kernels.segments import pack, per_token, ranks, rows_at
from tvc.kernels.select_threshold import largest


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    for name, (segment, counts, frame, place) in frame_cases():
        size = torch.randint(1, 4, frame.shape).float()
        given = (torch.randn(*frame.shape, 3), size, segment, counts, frame, place)
        for above in (-0.3, 0.3):
            yield f"{name}-above{above:g}", (*given, torch.ones_like(counts), above)
        yield f"{name}-room", (*given, (counts * 2 + 2) // 3, -0.5)
        yield f"{name}-all-stay", (*given, counts, -1.0)
    videos = dict(frame_cases())["videos"]
    one = torch.ones_like(videos[1])
    yield "still", (torch.ones(3, 12, 3), torch.ones(3, 12), *videos, one, 0.9)
    yield "still-room", (torch.ones(3, 12, 3), torch.ones(3, 12), *videos, one * 3, 0.9)
    yield "no-direction", (torch.zeros(3, 12, 3), torch.ones(3, 12), *videos, one, 0.5)
    # What an earlier step left: frames with gaps, of which one is gone.
    segment = torch.tensor([[-1, *[0] * 9, 1, 1]])
    frame = torch.tensor([[-1, 0, 0, 0, 1, 2, 2, 4, 4, 4, 5, 6]])
    place = torch.tensor([[-1, 0, 1, 3, 3, 0, 1, 0, 2, 3, 1, 1]])
    gaps = (torch.randn(1, 12, 2), torch.ones(1, 12), segment, torch.tensor([[9, 2]]), frame, place)
    yield "gaps", (*gaps, torch.tensor([[1, 1]]), 0.0)
    yield "gaps-room", (*gaps, torch.tensor([[7, 1]]), -1.0)


@op(_cases)
def repeats_merge(
    feature: torch.Tensor,
    size: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    frame: torch.Tensor,
    place: torch.Tensor,
    room: torch.Tensor,
    above: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(index, feature, size) of the first tokens of the runs."""
    tokens = segment.shape[1]
    # Places of a segment one after another, each through all frames: two stable sorts.
    by_place = torch.sort(place, dim=1, stable=True).indices
    order = by_place.gather(1, torch.sort(segment.gather(1, by_place), dim=1, stable=True).indices)
    line, spot = segment.gather(1, order), place.gather(1, order)
    one, other = (torch.nn.functional.pad(values, (1, 0), value=-9)[:, :tokens] for values in (line, spot))
    follows = (line >= 0) & (one == line) & (other == spot)
    unit = rows(directions(feature), order)
    ones = torch.ones(feature.shape[2], 1, device=feature.device)
    cosine = ((unit * torch.nn.functional.pad(unit, (0, 0, 1, 0))[:, :tokens]) @ ones).squeeze(2)
    near = torch.zeros_like(cosine).scatter(1, order, cosine)
    alike = torch.zeros_like(follows).scatter(1, order, follows & (cosine >= above))
    may = torch.where(alike, segment, -1)
    joins = alike & (ranks(may, histogram(may, counts.shape[1]), near) < per_token((counts - room).clamp(min=0), may))

    head = ~joins.gather(1, order)
    # Runs counted along the line, and the token each starts with; column 0 takes the others.
    run = head.long().cumsum(1)
    starts = torch.zeros(order.shape[0], tokens + 1, dtype=torch.int64, device=order.device)
    starts = starts.scatter(1, torch.where(head, run, 0), order)
    to = torch.zeros_like(order).scatter(1, order, starts.gather(1, run))
    wide = torch.where((segment >= 0)[:, :, None], feature.float(), 0.0)
    summed = torch.zeros_like(wide).scatter_add(1, to[:, :, None].expand(wide.shape), wide)
    number = torch.zeros_like(segment).scatter_add(1, to, torch.ones_like(to))
    sizes = torch.zeros_like(size, dtype=torch.float32).scatter_add(1, to, size.float())
    merged = torch.where((number > 1)[:, :, None], summed / number.clamp(min=1)[:, :, None], wide).to(feature.dtype)
    stays = (segment >= 0) & ~joins
    index = pack(stays, largest(stays))
    return index, rows_at(merged, index), rows_at(sizes.to(size.dtype)[:, :, None], index).squeeze(2)


@primitive
class Repeats(Merging):
    """A token of a video joins the one before it at its place where the two are alike."""

    key: ClassVar[str] = "repeats"
    shorthand: ClassVar[str | None] = "above"
    exact: ClassVar[bool] = False
    gaps: ClassVar[bool] = True
    components: ClassVar[tuple[str, ...]] = ("language",)
    above: float = Field(ge=-1, le=1, description="cosine from which on a token joins the one before it")
    cost: Share | None = Field(
        None, description="no more join than bring the mean over all layers down to this share of what entered"
    )
    depth: int | None = Field(None, gt=0, description="for cost: layers of the decoder; default: those of the model")
    before: int | None = Field(None, ge=0, description="for cost: the layer that the step stands before")

    def taps(self) -> dict[str, Tap]:
        return {"frames": Tap("frame")} | (spent_tap(self.before) if self.cost is not None else {})

    def apply(
        self,
        feature: torch.Tensor,
        size: torch.Tensor,
        scope: Scope,
        frames: tuple[torch.Tensor, torch.Tensor],
        spent: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        room = torch.zeros_like(scope.counts)
        if self.cost is not None and spent is not None:
            room = allowance(scope, spent, self.cost.permille or 0, self.depth, self.before)
        merged: tuple[Any, Any, Any] = repeats_merge.overload(
            feature, size, scope.segment, scope.counts, *frames, room, self.above
        )
        return merged

    def kept(self, counts: list[int]) -> list[int]:
        """The upper bound, all of them: how much of a video repeats is known only at run time."""
        return list(counts)

    def fewest(self, counts: list[int]) -> list[int]:
        return [min(1, count) for count in counts]
