"""What the plan counts behind primitives that are about frames, beside what their ops leave of such frames."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tvc.kernels.op import PRIMITIVES, Frames, Scope

FRAMES = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=9), min_size=1, max_size=3)
VIDEOS = st.lists(
    st.tuples(st.integers(1, 9), st.integers(1, 12)).map(lambda two: [two[1]] * two[0]), min_size=1, max_size=2
)
BUDGETS = st.one_of(st.integers(1, 12), st.integers(1, 1000).map(lambda n: f"{n // 10}.{n % 10}%"))
SHARES = st.integers(1, 1000).map(lambda n: f"{n // 10}.{n % 10}%")


def of(kind: Any, name: str, **settings: Any) -> Any:
    return PRIMITIVES[kind][name].model_validate(settings)


def sample(frames: Frames, pads: int = 2) -> tuple[Scope, tuple[torch.Tensor, torch.Tensor]]:
    """One sample of such scopes behind pads, and the frame and the place of each token."""
    sizes = [(number, size) for number, scope in enumerate(frames) for size in scope]
    segment = [-1] * pads + [number for number, size in sizes for _ in range(size)]
    frame = [-1] * pads + [i for i, (_, size) in enumerate(sizes) for _ in range(size)]
    place = [-1] * pads + [i for _, size in sizes for i in range(size)]
    scope = Scope(torch.tensor([segment]), torch.tensor([[sum(own) for own in frames]]), len(frames))
    return scope, (torch.tensor([frame]), torch.tensor([place]))


def left(chosen: torch.Tensor, scope: Scope) -> list[int]:
    """How many tokens of each scope are chosen."""
    index = chosen[0][chosen[0] >= 0]
    return torch.bincount(scope.segment[0, index], minlength=scope.counts.shape[1]).tolist()


def film(frames: Frames, seed: int, still: float, pads: int = 2, width: int = 4) -> torch.Tensor:
    """[1, V, D]: places that change from frame to frame with probability 1 - still."""
    torch.manual_seed(seed)
    rows = [torch.zeros(pads, width)]
    for scope in frames:
        shown = torch.randn(max(scope), width)
        for size in scope:
            moves = torch.rand(len(shown), 1) > still
            shown = torch.where(moves, torch.randn_like(shown), shown)
            rows.append(shown[:size])
    return torch.cat(rows)[None]


@given(FRAMES, BUDGETS, st.booleans(), st.integers(0, 5), st.booleans(), st.integers(0, 9))
@settings(max_examples=120, deadline=None)
def test_frames_keep_what_the_plan_counts(
    frames: Frames, keep: Any, together: bool, window: int, open_ends: bool, seed: int
) -> None:
    select = of(
        "select", "frames", keep=keep, together=together, window=window, bug_compatible=open_ends and window > 0
    )
    scope, pair = sample(frames)
    torch.manual_seed(seed)
    made = left(select.apply(torch.randn(scope.segment.shape), scope, frames=pair), scope)
    if select.sure:
        assert made == select.kept_of_frames(frames)
    else:
        assert together
        assert window
        assert all(own <= most for own, most in zip(made, select.kept_of_frames(frames), strict=True))


@given(FRAMES, st.integers(1, 10))
@settings(max_examples=40, deadline=None)
def test_every_nth_frame_is_what_the_plan_counts(frames: Frames, step: int) -> None:
    select = of("select", "every", frames=step)
    scope, pair = sample(frames)
    assert left(select.apply(None, scope, frames=pair), scope) == select.kept_of_frames(frames)
    assert select.sure


def test_an_image_is_one_frame() -> None:
    for select in (of("select", "frames", keep=3), of("select", "every", frames=4)):
        assert select.kept([9, 2, 0]) == select.kept_of_frames([[9], [2], []])
    assert of("select", "frames", keep=3).kept([9, 2, 0]) == [3, 2, 0]


@given(FRAMES, *[st.integers(1, 4)] * 5)
@settings(max_examples=120, deadline=None)
def test_windows_of_known_rows_are_what_the_plan_counts(
    frames: Frames, columns: int, group: int, near: int, far: int, reach: int
) -> None:
    merge = of("merge", "frame_windows", columns=columns, group=group, near=near, far=far, frames=reach)
    scope, pair = sample(frames)
    feature = torch.randn(*scope.segment.shape, 3)
    chosen, *_ = merge.apply(feature, torch.ones(scope.segment.shape), scope, frames=pair)
    assert left(chosen, scope) == merge.kept_of_frames(frames)
    assert merge.sure
    told = merge.model_copy(update={"columns": None})
    assert not told.sure
    assert told.kept_of_frames(frames) == told.kept([sum(own) for own in frames])


@given(VIDEOS, SHARES, st.sampled_from(["group", "video"]), st.integers(0, 5), st.floats(0, 1), st.integers(0, 999))
@settings(max_examples=70, deadline=None)
def test_scenes_leave_no_more_than_the_plan_counts(
    frames: Frames, keep: str, of_what: str, spare: int, still: float, seed: int
) -> None:
    scope, pair = sample(frames)
    feature, size = film(frames, seed, still), torch.ones(scope.segment.shape)
    for by in ({"runs": "50%"}, {"windows": 4}, {"cuts": 2}):
        merge = of("merge", "scenes", by=by, above=0.8, still="every", keep=keep, of=of_what, spare=spare)
        made = left(merge.apply(feature, size, scope, frames=pair)[0], scope)
        assert all(own <= most for own, most in zip(made, merge.kept_of_frames(frames), strict=True))
        assert not merge.sure


def test_scenes_are_counted_closer_than_all_of_them() -> None:
    """What moves alone leaves as much as can be, but for what rounding may add."""
    frames = [[196] * 32]
    half = of("merge", "scenes", by={"runs": "25%"}, above=0.8, keep="50%", spare=14)
    assert half.kept_of_frames(frames) == [98 * 32]
    assert half.kept_of_frames([[196], [9]]) == [98, 9]
    tenth = of("merge", "scenes", by={"windows": 99}, above=0.8, still="every", keep="10%", of="video")
    assert tenth.kept_of_frames(frames) == [627 + 32 + 16]  # all move: 20 of each


@given(VIDEOS, SHARES, SHARES, st.integers(1, 4), st.integers(0, 999))
@settings(max_examples=100, deadline=None)
def test_anchors_are_no_more_than_the_plan_counts(
    frames: Frames, keep: str, anchors: str, every: int, seed: int
) -> None:
    scope, pair = sample(frames)
    feature, size = film(frames, seed, 0.5), torch.ones(scope.segment.shape)
    select, score = of("select", "frames", keep=keep), torch.rand(scope.segment.shape)
    rest = of("rest", "anchor_frames", by={"cuts": 2, "below": 0.5}, every=every, keep=anchors)
    chosen = select.apply(score, scope, frames=pair)
    made = left(rest.apply(feature, size, chosen, score, scope, frames=pair)[0], scope)
    most = rest.kept_of_frames(frames, select.kept_of_frames(frames))
    assert all(own <= bound for own, bound in zip(made, most, strict=True))
