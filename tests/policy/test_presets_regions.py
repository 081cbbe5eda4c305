"""The preset `showui`: its step on pictures against union-find and the published rule, in plain Python."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

import pytest
import torch
from policy_cases import layout

from tvc.errors import SiteError
from tvc.kernels.grid import Neighbours, neighbours_by_columns, neighbours_by_position
from tvc.passes.reduction import decide
from tvc.policy import Step, load_policy, resolve

Picture = list[list[tuple[float, ...]]]  # rows of cells, each the numbers that it shows


def step_of(*settings: str) -> Step:
    (step,) = resolve(load_policy("showui", set=list(settings)), layout()).steps
    return step


def published(picture: Picture, ratio: Fraction = Fraction(1, 2), threshold: float = 1.0) -> list[int]:
    """What stays of one picture: parts that are joined to the right or below, thinned one by one."""
    rows, columns = len(picture), len(picture[0])
    part = {(r, c): {(r, c)} for r in range(rows) for c in range(columns)}
    for r, c in list(part):
        for other in ((r, c + 1), (r + 1, c)):
            if other in part and math.dist(picture[r][c], picture[other[0]][other[1]]) < threshold:
                joined = part[r, c] | part[other]
                part |= dict.fromkeys(joined, joined)
    kept = []
    for members in {min(cells): sorted(cells) for cells in part.values()}.values():
        stay = max(1, len(members) - round(len(members) * ratio))
        step = (len(members) - 1) / (stay - 1) if stay > 1 else 0.0
        # What floats make of a whole number is off by far less than the next fraction.
        kept += [members[math.floor(i * step + 1e-9)] for i in range(stay)]
    return sorted(r * columns + c for r, c in kept)


def kept(step: Step, pictures: list[Picture], beside: Neighbours | None = None, pads: int = 0) -> list[list[int]]:
    """What the step leaves of each of the pictures of one sample, which stand one after another behind `pads`."""
    cells = [cell for picture in pictures for row in picture for cell in row]
    lengths = [len(picture) * len(picture[0]) for picture in pictures]
    numbers = torch.arange(len(pictures)).repeat_interleave(torch.tensor(lengths))
    segment = torch.cat([torch.full((pads,), -1), numbers])[None]
    pixels = torch.nn.functional.pad(torch.tensor(cells, dtype=torch.float32), (0, 0, pads, 0))[None]
    counts = torch.tensor([lengths])
    beside = beside or neighbours_by_columns(segment, counts, len(pictures[0][0]))
    taps = {"select": {"pixels": pixels, "neighbours": beside}}
    (chosen,) = decide(step, pixels, torch.ones_like(pixels[..., 0]), segment, counts, [], taps).chosen.tolist()
    assert chosen == sorted(chosen)
    ends = [pads + sum(lengths[:i]) for i in range(len(lengths) + 1)]
    return [[i - ends[n] for i in chosen if ends[n] <= i < ends[n + 1]] for n in range(len(lengths))]


def drawn(rows: int, columns: int, shades: int, seed: int, width: int = 3) -> Picture:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, shades, (rows, columns, 1), generator=generator).expand(-1, -1, width)
    return [[tuple(cell) for cell in row] for row in values.tolist()]


def positions(sizes: list[tuple[int, int, int]], pads: int = 0) -> torch.Tensor:
    """[3, 1, V] where Qwen2-VL puts pictures of (frames, rows, columns), each behind the one before and a word."""
    parts, start = [torch.zeros(3, pads, dtype=torch.int64)], 5
    for frames, rows, columns in sizes:
        axes = torch.meshgrid(*(torch.arange(n) for n in (frames, rows, columns)), indexing="ij")
        parts.append(torch.stack(axes).flatten(1) + start)
        start = int(parts[-1].max()) + 2
    return torch.cat(parts, 1)[:, None]


@pytest.mark.parametrize(("rows", "columns"), [(5, 7), (1, 9), (9, 1), (7, 3), (1, 1), (11, 13)])
@pytest.mark.parametrize("shades", [1, 2, 3, 100])
def test_showui(rows: int, columns: int, shades: int) -> None:
    for seed in range(3):
        picture = drawn(rows, columns, shades, seed)
        assert kept(step_of(), [picture]) == [published(picture)]


@pytest.mark.parametrize("keep", [100, 90, 70, 30, 10])
def test_showui_at_other_shares(keep: int) -> None:
    picture = drawn(9, 11, 2, seed=keep)
    assert kept(step_of(f"keep={keep}%"), [picture]) == [published(picture, Fraction(100 - keep, 100))]


def test_cells_at_the_threshold_stay_apart() -> None:
    steps = [[(0.0, float(c)) for c in range(6)]]  # each exactly 1 from the next
    assert kept(step_of(), [steps]) == [list(range(6))]
    assert kept(step_of("within=1.001"), [steps]) == [published(steps, threshold=1.001)] == [[0, 2, 5]]


def test_what_reaches_across_differences_is_one_region() -> None:
    shading = [[(0.9 * c,) for c in range(9)]]  # ends that are far from each other
    assert kept(step_of(), [shading]) == [published(shading)] == [[0, 2, 4, 6, 8]]
    ring = drawn(5, 5, 1, 0)
    ring[2][2] = (9.0, 9.0, 9.0)
    assert kept(step_of(), [ring]) == [published(ring)]
    assert 12 in kept(step_of(), [ring])[0]


def test_each_picture_and_each_frame_is_a_grid_of_its_own() -> None:
    sizes = [(1, 3, 5), (1, 5, 3), (1, 1, 7), (1, 4, 1)]
    pictures = [drawn(rows, columns, 2, seed) for seed, (_, rows, columns) in enumerate(sizes)]
    segment = torch.cat([torch.full((2,), -1), torch.arange(4).repeat_interleave(torch.tensor([15, 15, 7, 4]))])[None]
    beside = neighbours_by_position(positions(sizes, pads=2), segment)
    assert kept(step_of(), pictures, beside, pads=2) == [published(picture) for picture in pictures]
    # Two frames of one video, which show the same: nothing joins them.
    still = drawn(3, 3, 1, 0)
    video = neighbours_by_position(positions([(2, 3, 3)]), torch.zeros(1, 18, dtype=torch.int64))
    once = published(still)
    assert kept(step_of(), [still + still], video) == [once + [9 + i for i in once]]


def test_positions_and_columns_tell_the_same_grid() -> None:
    segment = torch.cat([torch.full((3,), -1), torch.arange(2).repeat_interleave(torch.tensor([20, 15]))])[None]
    by_position = neighbours_by_position(positions([(1, 4, 5), (1, 3, 5)], pads=3), segment)
    by_columns = neighbours_by_columns(segment, torch.tensor([[20, 15]]), 5)
    for one, other in zip(by_position, by_columns, strict=True):
        assert one.tolist() == other.tolist()
    right, below = by_columns
    assert right[0, 3:8].tolist() == [4, 5, 6, 7, -1]
    assert below[0, [0, 3, 17, 18, 22, 23, 33]].tolist() == [-1, 8, 22, -1, -1, 28, -1]


@pytest.mark.parametrize(("rows", "columns", "left"), [(24, 24, 288), (28, 48, 672), (17, 11, 93), (37, 3, 55)])
def test_of_a_plain_picture_half_stays(rows: int, columns: int, left: int) -> None:
    """Odd numbers of cells: half of 187 is 93.5, of which 94 go; half of 111 is 55.5, of which 56 go."""
    (places,) = kept(step_of(), [drawn(rows, columns, 1, 0)])
    assert len(places) == left == rows * columns - round(rows * columns / 2)
    assert (places[0], places[-1]) == (0, rows * columns - 1)


def test_float32_puts_one_place_too_low_for_86_sizes() -> None:
    """The published code spaces the places of a region in float32."""
    apart = []
    for size in range(2, 3000):
        stay = max(1, size - round(size * 0.5))
        exact = [i * (size - 1) // max(stay - 1, 1) for i in range(stay)]
        rounded = torch.linspace(0, size - 1, stay).long().tolist()
        if exact != rounded:
            apart.append(size)
            assert sum(a - b for a, b in zip(exact, rounded, strict=True)) == 1
    assert (len(apart), apart[:3]) == (86, [111, 115, 187])
    (places,) = kept(step_of("bug_compatible=false"), [drawn(37, 3, 1, 0)])
    assert places == [i * 110 // 54 for i in range(55)]


@pytest.mark.parametrize(
    ("rows", "columns"), [(37, 3), (5, 23), (17, 11), (1, 191), (47, 5), (24, 24), (40, 50), (3, 1)]
)
@pytest.mark.parametrize("keep", [50, 30, 90])
def test_places_are_the_published_ones(rows: int, columns: int, keep: int) -> None:
    """`linspace` in float32, cut off; 111, 115, 187, 191 and 235 are among the sizes where that is another place."""
    size = rows * columns
    stay = max(1, size - round(size * Fraction(100 - keep, 100)))
    (places,) = kept(step_of(f"keep={keep}%"), [drawn(rows, columns, 1, 0)])
    assert places == torch.linspace(0, size - 1, stay).long().tolist()


def refused(text: str, **model: object) -> SiteError:
    with pytest.raises(SiteError) as caught:
        resolve(load_policy(text), dataclasses.replace(layout(), **model))
    return caught.value


REGIONS = "version: 1\nsteps: [{at: AT, select: {regions: 50%}}]"


def test_the_grid_is_the_models_or_its_positions() -> None:
    assert step_of().select.columns == 8  # type: ignore[union-attr]
    packed = dataclasses.replace(layout(), in_order=False, spatial=True)
    (told,) = resolve(load_policy("showui"), packed).steps
    assert told.select.columns is None  # type: ignore[union-attr]
    (written,) = resolve(load_policy("showui", set=["steps.0.select.regions.columns=4"]), packed).steps
    assert written.select.columns == 4  # type: ignore[union-attr]
    again = resolve(load_policy(resolve(load_policy("showui"), packed).to_yaml()), packed)
    assert again.steps == (told,)


def test_the_published_list_of_layers() -> None:
    """`[2,2,1],[4,4,1],...,[26,26,1]` of 28 layers, counted from 1."""
    settings = ["before_layer=1..25/2", "until=next"]
    steps = resolve(load_policy("showui", set=settings), layout(language=28)).steps
    assert [(step.at, step.until) for step in steps] == [
        (f"language.{number - 1}", f"language.{number}") for number in range(2, 27, 2)
    ]
    assert all(step.select.columns == 8 for step in steps)  # type: ignore[union-attr]


def test_regions_are_refused_where_their_grid_or_their_pixels_are_not_known() -> None:
    assert refused(REGIONS.replace("AT", "language.1"), in_order=False).slug == "no-grid"
    assert refused(REGIONS.replace("AT", "projector")).slug == "decoder-only"
    assert refused(REGIONS.replace("AT", "vision.2")).slug == "decoder-only"
    assert refused(REGIONS.replace("AT", "language.1"), resampled="a resampler mixes tokens").slug == "resampled-vision"
    assert refused(REGIONS.replace("AT", "language.1"), untraced="a loop").slug == "untraced-vision"
    behind = "version: 1\nsteps: [{at: language.1, select: {stride: 50%}}, {at: language.2, select: {regions: 50%}}]"
    assert refused(behind).slug == "broken-grid"
    assert refused(behind, in_order=False, spatial=True).slug == "broken-grid"
    assert refused(REGIONS.replace("AT", "language.1..2")).slug == "broken-grid"
