"""scenes_merge: places of a video that stand still become one token a scene; what is then in a frame is clustered.

Shapes:  feature [B, V, D] float, size [B, V] float, segment [B, V] int64 (-1 pads), counts [B, N] int64, frame, place
         and scene [B, V] int64 (-1 pads)
         -> index [B, K] int64 ascending, pads (-1) first; feature [B, K, D] and size [B, K] like the inputs, pads 0;
            K = the most that any sample of the batch is left with (an unbacked size)
Still:   a place stands still in a scene of W >= 2 frames that all have it. With `every`: the cosine of its token with
         the one in the next frame is above `above` in each of the W - 1 steps; else the mean cosine of any two of its W
         tokens is. They become their mean, in the first frame's place.
Groups:  what stands still in a scene, and what moves in each frame of a video, are groups of n tokens.
Budget:  a group of `spare` tokens or fewer stays as it is. Of another one permille / 1000 stay, rounded down; or, `of
         the whole`, the share that makes that permille of all the video's tokens, of which n' are left when still
         places are joined: permille / 1000 * tokens / n', 1 at most, rounded to the nearest (half to even) where places
         stand still and up where they move. One token of a group stays at least.
Spatial: those that stay are the centres of density peaks (kernels/peaks.py), with `neighbours` neighbours, or as many
         as there are centres where that is less. Every token goes to the nearest centre of its group. With blend 0 a
         centre becomes the mean of its cluster; else blend times itself and 1 - blend times the mean of the others.
         Sums are float32, sizes add up.
Memory:  O(B V (D + BLOCK)): never all distances at once.

Reference: PruneVID, arXiv 2412.16117 (per frame), HoliTom, arXiv 2505.21334 (of the whole, blended). Deviations: the
published codes put a scene's still tokens in front of its moving ones, and add noise of 1e-6 to densities.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from tvc.kernels.budget import Budget, OwnRounding
from tvc.kernels.frames import extent, same_place
from tvc.kernels.greedy import directions, rows
from tvc.kernels.op import Frames, Merging, Scope, Tap, op, primitive
from tvc.kernels.peaks import centres, histogram
from tvc.kernels.scene_cuts import scene_cuts
from tvc.kernels.scene_runs import scene_runs
from tvc.kernels.scene_windows import scene_windows
from tvc.kernels.score_change import frame_cases
from tvc.kernels.segments import pack, per_token, rows_at
from tvc.kernels.select_threshold import largest


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    for name, (segment, counts, frame, place) in frame_cases():
        scene = scene_pairs(segment, frame)
        size = torch.randint(1, 4, frame.shape).float()
        given = (torch.randn(*frame.shape, 3), size, segment, counts, frame, place, scene)
        yield f"{name}-mean", (*given, 0.2, False, 500, False, 0, 2, 0.0)
        yield f"{name}-every", (*given, 0.0, True, 400, True, 0, 3, 0.6)
        yield f"{name}-spare", (*given, -0.5, True, 300, False, 2, 3, 0.5)
        yield f"{name}-all-stay", (*given, 0.2, True, 1000, True, 0, 7, 0.0)
    segment, counts, frame, place = dict(frame_cases())["videos"]
    still = (torch.ones(3, 12, 3), torch.ones(3, 12), segment, counts, frame, place, segment)
    yield "all-still", (*still, 0.9, True, 500, False, 0, 3, 0.0)
    yield "all-still-mean", (*still, 0.9, False, 100, True, 0, 3, 0.6)
    for frames, seed in ((8, 1), (5, 2)):
        torch.manual_seed(seed)
        steps = torch.randn(1, frames, 9, 4) * (torch.rand(1, frames, 9, 1) > 0.6)
        film = (steps.cumsum(1) + 0.05 * torch.randn(1, frames, 9, 4)).flatten(1, 2)
        frame = torch.arange(frames).repeat_interleave(9)[None]
        video = (torch.zeros_like(frame), torch.tensor([[9 * frames]]), frame, torch.arange(9).repeat(frames)[None])
        given = (film, torch.ones(1, 9 * frames), *video, frame // 3)
        yield f"film{frames}-mean", (*given, 0.8, False, 500, False, 3, 7, 0.0)
        yield f"film{frames}-every", (*given, 0.65, True, 250, True, 0, 7, 0.6)


def scene_pairs(segment: torch.Tensor, frame: torch.Tensor) -> torch.Tensor:
    """[B, V] int64: scenes of two frames, fewer at the end of a segment."""
    one, other = (torch.nn.functional.pad(values, (1, 0), value=-9)[:, :-1] for values in (segment, frame // 2))
    begins = (segment >= 0) & ((one != segment) | (other != frame // 2))
    return torch.where(segment < 0, -1, begins.long().cumsum(1) - 1)


def _fake(
    feature: torch.Tensor, size: torch.Tensor, segment: torch.Tensor, *rest: object
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    slots = torch.library.get_ctx().new_dynamic_size()
    torch._check(slots <= segment.shape[1])
    batch, width = segment.shape[0], feature.shape[2]
    index = segment.new_empty(batch, slots)
    return index, feature.new_empty(batch, slots, width), size.new_empty(batch, slots)


@op(_cases, fake=_fake)
def scenes_merge(
    feature: torch.Tensor,
    size: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    frame: torch.Tensor,
    place: torch.Tensor,
    scene: torch.Tensor,
    above: float,
    every: bool,
    permille: int,
    whole: bool,
    spare: int,
    neighbours: int,
    blend: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(index, feature, size) of the clusters' centres."""
    tokens = segment.shape[1]
    valid, here = segment >= 0, torch.arange(tokens, device=segment.device)
    first, frames = extent(frame, scene, histogram(scene, tokens))
    index, there = same_place(frame, place, torch.where(valid, first, -1), segment)
    # The token that stands for a place in its scene.
    stands = torch.where(there, index, here)
    wide = torch.where(valid[:, :, None], feature.float(), 0.0)
    still = valid & _still(wide, segment, frame, place, first, frames, stands, above, every)

    stands = torch.where(still, stands, here)
    left = valid & (stands == here)
    wide = _gathered(wide, stands) / _gathered(valid.float()[:, :, None], stands).clamp(min=1.0)
    weight = _gathered(torch.where(valid, size.float(), 0.0)[:, :, None], stands)

    group = torch.where(left, torch.where(still, tokens + scene, frame), -1)
    members = histogram(group, 2 * tokens)
    if whole:
        # Of each group, through one of its tokens: the tokens of its segment, and those that are left.
        alive = histogram(torch.where(left, segment, -1), counts.shape[1])
        share = torch.stack([per_token(counts, segment), per_token(alive, segment)], 2)
        room = torch.zeros(group.shape[0], 2 * tokens + 1, 2, dtype=torch.int64, device=group.device)
        room = room.scatter_reduce(1, (group + 1)[:, :, None].expand(share.shape), share, "amax")[:, 1:]
        above_line, below_line = members * permille * room[:, :, 0], (1000 * room[:, :, 1]).clamp(min=1)
        down, over = above_line // below_line, above_line % below_line
        nearest = down + ((2 * over > below_line) | ((2 * over == below_line) & (down % 2 == 1))).long()
        moves = torch.arange(2 * tokens, device=group.device) < tokens
        number = torch.where(moves, down + (over > 0).long(), nearest)
    else:
        number = members * permille // 1000
    number = torch.minimum(torch.where(members <= spare, members, number.clamp(min=1)), members)
    centre, to = centres(wide, group, members, number, number.clamp(max=neighbours), neighbours)

    to = torch.where(left, to, here)
    apart = (left & ~centre)[:, :, None].float()
    total, others = _gathered(torch.where(left[:, :, None], wide, 0.0), to), _gathered(apart, to)
    if blend > 0:
        merged = blend * wide + (1.0 - blend) * (total - wide) / others.clamp(min=1.0)
    else:
        merged = total / (1.0 + others)
    merged = torch.where(others > 0, merged, wide)
    gained = _gathered(torch.where(left[:, :, None], weight, 0.0), to)
    # What nothing joined is as it was, to the last bit.
    alone = (gained.squeeze(2) == size) & (others.squeeze(2) == 0)
    merged = torch.where(alone[:, :, None], feature, merged.to(feature.dtype))
    chosen = pack(centre, largest(centre))
    return chosen, rows_at(merged, chosen), rows_at(gained.to(size.dtype), chosen).squeeze(2)


def _gathered(values: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
    """[B, V, D]: at each token the sum of the `values [B, V, D]` of those that go `to [B, V]` it; 0 where none does."""
    return torch.zeros_like(values).scatter_add(1, to[:, :, None].expand(values.shape), values)


def _still(
    feature: torch.Tensor,
    segment: torch.Tensor,
    frame: torch.Tensor,
    place: torch.Tensor,
    first: torch.Tensor,
    frames: torch.Tensor,
    stands: torch.Tensor,
    above: float,
    every: bool,
) -> torch.Tensor:
    """[B, V] bool: whether the place of each token stands still in its scene."""
    unit = directions(feature)
    ones = torch.ones(feature.shape[2], 1, device=feature.device)
    real = (segment >= 0).float()[:, :, None]
    all_there = _gathered(real, stands).squeeze(2).gather(1, stands) == frames
    if every:
        index, there = same_place(frame, place, torch.where(frame < 0, -1, frame - 1), segment)
        alike = ((unit * rows(unit, index)) @ ones).squeeze(2) > above
        steps = (there & (frame > first) & alike).float()[:, :, None]
        still = _gathered(steps, stands).squeeze(2).gather(1, stands) == frames - 1
    else:
        total = _gathered(unit, stands)
        pairs = (total * total) @ ones - _gathered((unit * unit) @ ones, stands)
        number = frames.float()
        still = pairs.squeeze(2).gather(1, stands) / (number * (number - 1.0)).clamp(min=1.0) > above
    return still & all_there & (frames > 1)


def _share(budget: Budget) -> Budget:
    if budget.permille is None:
        raise ValueError("give a share such as 25%")
    return budget


Share = Annotated[OwnRounding, AfterValidator(_share)]


class Runs(BaseModel):
    """Scenes are runs of frames that fall into one cluster."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    runs: Share = Field(description="clusters of frames: a share of a video's frames")
    neighbours: int = Field(7, gt=0, le=64, description="neighbours that a frame's density is made of")


class Windows(BaseModel):
    """Scenes are the windows of frames that save most tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    windows: int = Field(gt=1, strict=True, description="frames of a window at most")


class Cuts(BaseModel):
    """Scenes end where successive frames are least alike."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    cuts: int = Field(gt=0, strict=True, description="scenes that a video has at least, if it has as many frames")
    below: float = Field(-1.0, ge=-1, le=1, description="cosine of two frames below which a scene ends as well")


Division = Runs | Windows | Cuts


def scenes_of(
    division: Division, above: float, feature: torch.Tensor, scope: Scope, frames: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """[B, V] int64: the scene of each token, -1 pads; `above` is what windows call still."""
    frame, place = frames
    given = (feature, scope.segment, scope.counts, frame)
    if isinstance(division, Runs):
        return scene_runs.overload(*given, division.runs.permille or 0, division.neighbours)  # type: ignore[no-any-return]
    if isinstance(division, Windows):
        return scene_windows.overload(*given, place, above, division.windows)  # type: ignore[no-any-return]
    return scene_cuts.overload(*given, division.cuts, division.below)  # type: ignore[no-any-return]


@primitive
class Scenes(Merging):
    """Places of a video that stand still through a scene become one token, and what is in a frame is clustered."""

    key: ClassVar[str] = "scenes"
    exact: ClassVar[bool] = False
    by: Division = Field(description="{runs: 25%}, {windows: n} or {cuts: n, below: cosine}: what a scene is")
    above: float = Field(ge=-1, le=1, description="cosine from frame to frame above which a place stands still")
    still: Literal["mean", "every"] = Field(
        "mean", description="whether the mean cosine of a place's frames has to be above, or that of every step"
    )
    keep: Share = Field(description="a share, of each group of tokens or of all")
    of: Literal["group", "video"] = Field("group", description="what `keep` is a share of")
    spare: int = Field(0, ge=0, description="groups of so many tokens or fewer stay as they are")
    neighbours: int = Field(7, gt=0, le=64, description="neighbours that a token's density is made of")
    blend: float = Field(0.0, ge=0, lt=1, description="the weight of a cluster's centre; 0: as any other member")

    def taps(self) -> dict[str, Tap]:
        return {"frames": Tap("frame")}

    def apply(
        self, feature: torch.Tensor, size: torch.Tensor, scope: Scope, frames: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        scene = scenes_of(self.by, self.above, feature, scope, frames)
        rule = (self.keep.permille or 0, self.of == "video", self.spare, self.neighbours, self.blend)
        merged: tuple[Any, Any, Any] = scenes_merge.overload(
            feature, size, scope.segment, scope.counts, *frames, scene, self.above, self.still == "every", *rule
        )
        return merged

    def kept(self, counts: list[int]) -> list[int]:
        """The upper bound, all of them, for frames of any size; of what a video is made only the run tells."""
        return list(counts)

    def fewest(self, counts: list[int]) -> list[int]:
        return [min(1, count) for count in counts]

    def kept_of_frames(self, frames: Frames) -> list[int]:
        """The upper bound, whatever stands still: what groups are due, rounded in favour of each.

        A frame has one group of what moves, and shares one of what stands still with another frame at least.
        """
        if self.of == "group":
            each = {size: self._most(size) for scope in frames for size in scope}
            return [
                sum(each[size] for size in scope) // 2 if len(scope) > 1 else sum(map(self._due, scope))
                for scope in frames
            ]
        permille, least = self.keep.permille or 0, max(1, self.spare)
        found = []
        for scope in frames:
            tokens, groups = sum(scope), len(scope) + len(scope) // 2
            found.append(min(tokens, tokens * permille // 1000 + groups * least))
        return found

    def _most(self, size: int) -> int:
        """Twice what stays at most of a frame of `size` tokens, of which half of what stands still counts here."""
        return max(2 * self._due(size - still) + self._due(still) for still in range(size + 1))

    def _due(self, members: int) -> int:
        """What stays of a group, as a share of its own."""
        return members if members <= self.spare else min(members, max(1, self.keep.kept(members)))
