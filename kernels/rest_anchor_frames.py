"""anchor_frames_merge: what was not chosen of a video's scenes goes to the densest such tokens of every few frames.

Shapes:  feature [B, V, D] float, size [B, V] float, segment [B, V] int64 (-1 pads), counts [B, N] int64,
         chosen [B, K] int64 (-1 pads), frame and scene [B, V] int64 (-1 pads)
         -> index [B, K2] int64 ascending, pads (-1) first; feature [B, K2, D] and size [B, K2] like the inputs, pads 0;
            K2 = the most that any sample of the batch is left with (an unbacked size)
Frames:  of a scene of L frames the last one and every `every`-th in front of it are anchor frames, A = ceil(L / every).
Anchors: a frame of P tokens is due P * permille // 1000, a scene the sum c of that over its frames. An anchor frame has
         c // A anchors, all of its tokens that were not chosen where these are fewer: those with the highest density *
         lead among them (kernels/peaks.py, with `neighbours` neighbours).
Merging: every token of a scene that was not chosen goes to one anchor of each of its anchor frames, the one with the
         highest cosine (an anchor to itself, the lower index among equals). With n tokens, itself among them, an anchor
         becomes w times itself and 1 - w times their mean, w = max(1 / (n + 1), blend). Sums are float32. A token's
         size is shared out equally among its anchors; of a scene without anchors it is dropped.
Memory:  O(B V (C + BLOCK + D)) for C anchors.

Reference: FastVID, arXiv 2503.11187 (density-based token merging).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from pydantic import Field

from tvc.kernels.frames import extent, lengths
from tvc.kernels.greedy import directions
from tvc.kernels.loop import State, repeat
from tvc.kernels.merge_scenes import Division, Share, scene_pairs, scenes_of
from tvc.kernels.op import Frames, Rest, Scope, Tap, op, primitive
from tvc.kernels.peaks import Peaks, histogram
from tvc.kernels.score_change import frame_cases
from tvc.kernels.segments import mark, pack, per_token, ranks, rows_at
from tvc.kernels.select_threshold import largest


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    for name, (segment, counts, frame, _) in frame_cases():
        size = torch.randint(1, 4, frame.shape).float()
        every = torch.where(segment < 0, -1, torch.arange(frame.shape[1]))
        given = (torch.randn(*frame.shape, 3), size, segment, counts)
        scenes = (frame, scene_pairs(segment, frame))
        yield f"{name}-one-each", (*given, every[:, ::3], *scenes, 1, 500, 2, 0.6)
        yield f"{name}-last-alone", (*given, every[:, ::4], *scenes, 9, 340, 4, 0.3)
        yield f"{name}-none-chosen", (*given, every[:, :0], *scenes, 2, 600, 4, 0.0)
        yield f"{name}-all-chosen", (*given, every, *scenes, 2, 600, 4, 0.6)
        yield f"{name}-no-anchor", (*given, every[:, ::2], *scenes, 2, 1, 4, 0.6)
    frame = torch.arange(9).repeat_interleave(7)[None]
    film = (torch.randn(1, 63, 5), torch.ones(1, 63), torch.zeros_like(frame), torch.tensor([[63]]))
    chosen = torch.arange(0, 63, 5)[None]
    uneven = torch.tensor([[0] * 9 + [1] * 2 + [2] + [3] * 4 + [4] * 12])
    alone = (torch.randn(1, 28, 5), torch.ones(1, 28), torch.zeros_like(uneven), torch.tensor([[28]]))
    for apart in (2, 3):
        scenes = (uneven, torch.zeros_like(uneven))
        yield f"uneven-frames-{apart}", (*alone, torch.tensor([[0, 9, 27]]), *scenes, apart, 400, 3, 0.6)
    yield "film", (*film, chosen, frame, torch.zeros_like(frame), 4, 300, 4, 0.6)
    yield "film-in-parts", (*film, chosen, frame, (frame + 4) // 5, 2, 300, 4, 0.6)
    yield "all-equal", (torch.ones(1, 63, 5), *film[1:], chosen, frame, torch.zeros_like(frame), 4, 300, 4, 0.6)


def _fake(
    feature: torch.Tensor, size: torch.Tensor, segment: torch.Tensor, *rest: object
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    slots = torch.library.get_ctx().new_dynamic_size()
    torch._check(slots <= segment.shape[1])
    batch, width = segment.shape[0], feature.shape[2]
    return segment.new_empty(batch, slots), feature.new_empty(batch, slots, width), size.new_empty(batch, slots)


@op(_cases, fake=_fake)
def anchor_frames_merge(
    feature: torch.Tensor,
    size: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    chosen: torch.Tensor,
    frame: torch.Tensor,
    scene: torch.Tensor,
    every: int,
    permille: int,
    neighbours: int,
    blend: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(index, feature, size) of the chosen tokens and of the anchors."""
    tokens = segment.shape[1]
    kept = mark(chosen, tokens)
    left = (segment >= 0) & ~kept
    first, frames = extent(frame, scene, histogram(scene, tokens))
    back = first + frames - 1 - frame  # frames of the scene behind a token's own
    parts = (frames + every - 1) // every
    opens = frame != torch.nn.functional.pad(frame, (1, 0), value=-1)[:, :tokens]
    own = torch.where(opens, lengths(frame).gather(1, frame + 1) * permille // 1000, 0)
    room = torch.zeros(scene.shape[0], tokens + 1, dtype=torch.int64, device=scene.device)
    due = room.scatter_add(1, scene + 1, own).gather(1, scene + 1) // parts.clamp(min=1)
    group = torch.where(left, frame, -1)
    members = histogram(group, tokens)
    peaks = Peaks(feature, group)
    density, reach = peaks.densities(per_token(members.clamp(min=1, max=neighbours), group), neighbours)
    # Column 0 takes the tokens of no group.
    widest = torch.zeros(group.shape[0], tokens + 1, device=group.device)
    widest = per_token(widest.scatter_reduce(1, group + 1, reach, "amax")[:, 1:], group)
    value = density * peaks.leads(density, widest)
    anchor = left & (back % every == 0) & (ranks(group, members, value) < due)

    index = pack(anchor, largest(anchor))
    joins = _joins(directions(feature), index, left, scene, torch.where(anchor, back // every, -1), parts)
    share = joins.transpose(1, 2)  # [B, C, V]
    wide = torch.where((segment >= 0)[:, :, None], feature.float(), 0.0)
    number = share @ torch.ones_like(wide[:, :, :1])
    mean = share @ wide / number.clamp(min=1.0)
    weight = torch.clamp(1.0 / (number + 1.0), min=blend)
    merged = weight * rows_at(wide, index) + (1.0 - weight) * mean
    spread = size.float() / parts.clamp(min=1)
    gained = share @ torch.where(left, spread, 0.0)[:, :, None]

    result = pack(kept | anchor, largest(kept | anchor))
    # Where each anchor stands among them; tokens that were chosen read themselves.
    place = torch.where(anchor, tokens + anchor.cumsum(1) - 1 + index.shape[1] - anchor.sum(1, keepdim=True), -1)
    place = torch.where(anchor, place, torch.arange(tokens, device=segment.device))
    place = torch.where(result < 0, -1, per_token(place, result))
    sizes = torch.cat([size, gained.squeeze(2).to(size.dtype)], 1)[:, :, None]
    return result, rows_at(torch.cat([feature, merged.to(feature.dtype)], 1), place), rows_at(sizes, place).squeeze(2)


def _joins(
    unit: torch.Tensor,
    index: torch.Tensor,
    left: torch.Tensor,
    scene: torch.Tensor,
    part: torch.Tensor,
    parts: torch.Tensor,
) -> torch.Tensor:
    """[B, V, C] float32, 1 where a token goes to an anchor of `index [B, C]`.

    Args:
        part: [B, V] int64 which of its scene's anchor frames an anchor is in, counted back from the last; -1: none.
        parts: [B, V] int64 how many anchor frames each token's scene has.
    """
    real = index >= 0
    whose = torch.where(real, per_token(scene, index), -1)
    within = torch.where(real, per_token(part, index), -1)
    itself = index[:, None, :] == torch.arange(unit.shape[1], device=index.device)[:, None]
    near = unit @ rows_at(unit, index).transpose(1, 2)
    near = torch.where(itself, 2.0, near)
    same = (scene[:, :, None] == whose[:, None, :]) & left[:, :, None]
    column = torch.arange(index.shape[1], device=index.device)

    def one(number: torch.Tensor, joins: torch.Tensor) -> State:
        """What goes to the anchor frames of one number, each scene's own."""
        here = same & (within == number)[:, None, :]
        # A row and a column more keep V = 0 and C = 0 defined, here and in ONNX Runtime.
        best = torch.nn.functional.pad(torch.where(here, near, -3.0), (0, 1, 1, 0), value=-2.5).argmax(2)[:, 1:]
        return (joins + (here & (column == best[:, :, None])).float(),)

    # One column more keeps that defined for V = 0.
    rounds = torch.nn.functional.pad(torch.where(left, parts, 0), (0, 1)).amax((0, 1))
    return repeat(one, (torch.zeros_like(near),), rounds)[0]


@primitive
class AnchorFrames(Rest):
    """The other tokens of a video's scenes are merged into the densest ones of every few frames."""

    key: ClassVar[str] = "anchor_frames"
    exact: ClassVar[bool] = False
    by: Division = Field(description="{runs: 25%}, {windows: n} or {cuts: n, below: cosine}: what a scene is")
    above: float = Field(1.0, ge=-1, le=1, description="for windows: cosine above which a place stands still")
    every: int = Field(4, gt=0, description="frames from one with anchors to the next")
    keep: Share = Field(description="anchors for each frame: a share of its tokens")
    neighbours: int = Field(4, gt=0, le=64, description="neighbours that a token's density is made of")
    blend: float = Field(0.6, ge=0, le=1, description="the weight of an anchor beside the mean of what goes to it")

    def taps(self) -> dict[str, Tap]:
        return {"frames": Tap("frame")}

    def apply(
        self,
        feature: torch.Tensor,
        size: torch.Tensor,
        chosen: torch.Tensor,
        score: torch.Tensor | None,
        scope: Scope,
        frames: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        scene = scenes_of(self.by, self.above, feature, scope, frames)
        rule = (self.every, self.keep.permille or 0, self.neighbours, self.blend)
        merged: tuple[Any, Any, Any] = anchor_frames_merge.overload(
            feature, size, scope.segment, scope.counts, chosen, frames[0], scene, *rule
        )
        return merged

    def kept(self, counts: list[int], chosen: list[int]) -> list[int]:
        """The upper bound, as though each scope were one frame; several round down what they are due one by one."""
        return self.kept_of_frames([[count] for count in counts], chosen)

    def kept_of_frames(self, frames: Frames, chosen: list[int]) -> list[int]:
        """The upper bound: what a scene is due is divided among its frames with anchors, and rounded down again."""
        due = [sum(self.keep.kept(size) for size in scope) for scope in frames]
        return [min(sum(scope), own + more) for scope, own, more in zip(frames, chosen, due, strict=True)]
