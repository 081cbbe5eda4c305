"""Presets for videos: their steps on random frames against the papers' formulas, in plain Python numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from policy_cases import layout
from policy_formulas_video import dycoke, evs, stc

from tvc.kernels.reselect import reselect
from tvc.passes.reduction import decide
from tvc.passes.taps import frames_of
from tvc.policy import Step, load_policy, resolve

Row = list[float]


def step_of(name: str, *settings: str) -> Step:
    (step,) = resolve(load_policy(name, set=list(settings)), layout()).steps
    return step


def kept(step: Step, feature: torch.Tensor, size: int) -> list[int]:
    """What the step leaves of one video [1, T P, D] with frames of `size` tokens."""
    tokens = feature.shape[1]
    segment, counts = torch.zeros(1, tokens, dtype=torch.int64), torch.tensor([[tokens]])
    place = torch.arange(tokens)[None]
    frames = (place // size, place % size)
    scores = [{"feature": feature, "frames": frames}]
    decision = decide(step, feature, torch.ones(1, tokens), segment, counts, scores, {"select": {"frames": frames}})
    chosen = decision.chosen[0].tolist()
    assert chosen == sorted(chosen)
    return [index for index in chosen if index >= 0]


def cosine(a: Row, b: Row) -> float:
    length = math.sqrt(sum(x * x for x in a) * sum(x * x for x in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / length


def best(values: dict[int, float], number: int) -> set[int]:
    """The `number` highest, the lower index first among equals."""
    return set(sorted(values, key=lambda i: (-values[i], i))[:number])


def film(frames: int, size: int, width: int = 8, seed: int = 0) -> torch.Tensor:
    """Frames that drift, as those of a video do."""
    torch.manual_seed(seed)
    return torch.randn(1, frames, size, width).mul(0.4).cumsum(1).flatten(1, 2) + torch.randn(1, 1, width)


# Baselines ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("frames", "size", "every"), [(8, 6, 4), (7, 5, 3), (3, 4, 9), (5, 1, 1)])
def test_frame_stride(frames: int, size: int, every: int) -> None:
    left = kept(step_of("frame-stride", f"every={every}"), film(frames, size), size)
    assert left == [i for i in range(frames * size) if i // size % every == 0]


@pytest.mark.parametrize(("frames", "rows", "columns"), [(8, 4, 6), (7, 3, 5), (3, 2, 2), (4, 5, 3)])
def test_pool_3d_is_pytorchs_average_over_frames(frames: int, rows: int, columns: int) -> None:
    """Blocks at the ends hold what there is, as PyTorch's do with `ceil_mode`."""
    step = step_of("pool-3d", f"steps.0.merge.frame_windows.columns={columns}", "frames=3")
    size = rows * columns
    x, place = film(frames, size), torch.arange(frames * size)[None]
    at, counts = (place // size, place % size), torch.tensor([[frames * size]])
    made = decide(step, x, torch.ones(place.shape), torch.zeros_like(place), counts, [], {"merge": {"frames": at}})
    video = x[0].T.reshape(1, -1, frames, rows, columns)
    wanted = torch.nn.functional.avg_pool3d(video, (3, 2, 2), ceil_mode=True, count_include_pad=False)
    assert made.feature is not None
    torch.testing.assert_close(made.feature[0], wanted.flatten(2)[0].T)
    places = place.reshape(1, 1, frames, rows, columns).float()
    first = -torch.nn.functional.max_pool3d(-places, (3, 2, 2), ceil_mode=True)
    assert made.chosen[0].tolist() == first.flatten().long().tolist()


# EVS ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("frames", "size"), [(8, 6), (5, 7), (2, 9), (1, 5)])
@pytest.mark.parametrize("dropped", [0.75, 0.5, 0.0])
def test_evs(frames: int, size: int, dropped: float) -> None:
    x = film(frames, size)
    step = step_of("evs", f"keep={round((1 - dropped) * 100)}%")
    assert kept(step, x, size) == evs(x[0].tolist(), frames, size, int(frames * size * (1 - dropped)))


def test_evs_keeps_a_frame_at_least_and_of_a_still_film_the_first() -> None:
    assert kept(step_of("evs"), torch.ones(1, 24, 4), 12) == list(range(12))
    assert kept(step_of("evs", "keep=50%"), torch.ones(1, 40, 4), 10) == list(range(20))


# DyCoke ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [2, 3, 5, 6, 7, 8, 9, 12, 13, 32])
def test_dycoke(frames: int) -> None:
    x = film(frames, 9, seed=frames)
    assert kept(step_of("dycoke"), x, 9) == dycoke(x[0].tolist(), frames, 9, 2)


def test_dycoke_leaves_3098_of_32_frames_of_196() -> None:
    assert len(kept(step_of("dycoke"), film(32, 196, width=3), 196)) == 3098


def test_dycoke_without_its_open_ends_thins_every_window() -> None:
    x = film(8, 10)
    left = kept(step_of("dycoke", "bug_compatible=false"), x, 10)
    assert [sum(i // 10 == t for i in left) for t in range(8)] == [10, 3, 3, 3] * 2
    odd = kept(step_of("dycoke", "bug_compatible=false"), film(7, 10), 10)
    assert [sum(i // 10 == t for i in odd) for t in range(7)] == [10, 3, 3, 3, 10, 3, 3]
    assert kept(step_of("dycoke"), film(1, 10), 10) == list(range(10))


def test_dycoke_attends_to_as_many_as_its_code() -> None:
    rule = resolve(load_policy("dycoke"), layout()).reselect
    assert rule is not None
    assert (rule.first, rule.observed, rule.alike) == (3, 2, 0.9)
    assert all(rule.keep.kept(number) == int(number * (1 - 0.7)) for number in range(6273))


def drifting(steps: int, image: int, text: int, seed: int) -> list[Row]:
    """Per decode step the attention to text, an image in the middle of it, and the tokens since: some steps alike."""
    torch.manual_seed(seed)
    own, rows = torch.rand(image), []
    for step in range(steps):
        own = own if step % 3 else torch.rand(image)
        now = own + 0.02 * torch.rand(image)
        rows.append(torch.cat([torch.rand(text), now, torch.rand(text + step)]).tolist())
    return rows


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(("image", "text"), [(10, 3), (23, 2), (1, 4)])
def test_dycoke_chooses_keys_step_by_step(image: int, text: int, whole: bool) -> None:
    rule = resolve(load_policy("dycoke", set=[f"bug_compatible={str(whole).lower()}"]), layout()).reselect
    assert rule is not None
    rows, branches = drifting(8, image, text, seed=image), set()
    before: Row = []
    keys: set[int] = set()
    cached = 2 * text + image - 1
    seen, chosen = torch.zeros(1, cached), torch.ones(1, cached, dtype=torch.bool)
    for row in rows:
        now = row[text : text + image]
        alike = bool(before) and cosine(now, before) >= 0.9
        if not alike:
            keys = best(dict(enumerate(row[text : text + image])), int(image * (1 - 0.7)))
        attended = set(range(image)) if alike and whole else keys
        branches.add(alike)
        want = [not text <= n < text + image or n - text in attended for n in range(len(row))]
        visual = torch.tensor([[text <= n < text + image for n in range(len(row))]])
        last = None if whole else chosen
        one = torch.tensor([True])
        chosen, seen = reselect.overload(
            torch.tensor([row]), seen, last, visual, one, rule.keep.permille, 0, rule.alike
        )
        assert chosen[0].tolist() == want
        before = now
    assert branches == {True, False}


# STC ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("frames", "size", "number"), [(6, 11, 4), (3, 5, 1), (1, 7, 3), (4, 6, 60)])
def test_stc(frames: int, size: int, number: int) -> None:
    x = film(frames, size)
    assert kept(step_of("stc", f"keep={number}"), x, size) == stc(x[0].tolist(), frames, size, number)


def test_stc_keeps_sixty_of_each_frame() -> None:
    left = kept(step_of("stc"), film(5, 196), 196)
    assert [sum(i // 196 == t for i in left) for t in range(5)] == [60] * 5


# Frames ---------------------------------------------------------------------------------------------------------------


def grid(frames: int, rows: int, columns: int, start: int) -> torch.Tensor:
    """[3, T h w] time, row and column of a video whose first token stands at `start`; times may coincide."""
    times, heights, widths = torch.meshgrid(*(torch.arange(n) for n in (frames, rows, columns)), indexing="ij")
    return torch.stack([times // 2, heights, widths]).flatten(1) + start


@pytest.mark.parametrize("behind", [False, True])
def test_frames_are_told_by_rows_and_columns(behind: bool) -> None:
    """Two videos and an image, with text and padding around them; time alone would join frames."""
    shapes = [(3, 2, 2), (1, 3, 2), (2, 1, 3)]
    parts, index, slot = [torch.full((3, 2), -1)], [], 2
    for shape in shapes:
        made = grid(*shape, start=slot + 5)
        parts += [made, torch.full((3, 1), slot)]
        index += range(slot, slot + made.shape[1])
        slot += made.shape[1] + 1
    counts = torch.tensor([[t * h * w for t, h, w in shapes]])

    def padded(numbers: list[int]) -> torch.Tensor:
        return torch.tensor([[*numbers, -1, -1] if behind else [-1, *numbers]])

    segment = padded([number for number, count in enumerate(counts[0].tolist()) for _ in range(count)])
    frame, place = frames_of(torch.cat(parts, 1)[:, None], padded(index), segment, counts)
    wanted = [n for t, h, w in shapes for n in [h * w] * t]
    assert torch.equal(frame, padded([f for f, n in enumerate(wanted) for _ in range(n)]))
    assert torch.equal(place, padded([p for n in wanted for p in range(n)]))


@pytest.mark.parametrize("positions", [torch.zeros(1, 0, dtype=torch.int64), torch.zeros(3, 1, 0, dtype=torch.int64)])
def test_a_chunk_without_tokens_has_no_frames(positions: torch.Tensor) -> None:
    nothing: Any = torch.zeros(1, 0, dtype=torch.int64)
    assert [one.shape for one in frames_of(positions, nothing, nothing, nothing)] == [(1, 0), (1, 0)]
