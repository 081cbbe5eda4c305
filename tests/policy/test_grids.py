"""Grids that the decoder's positions tell: pictures of several shapes in a sample, each step by hand, and refusals."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from policy_cases import layout, policy, step

from tvc.errors import SiteError
from tvc.kernels import PRIMITIVES
from tvc.kernels.grid import neighbours_by_position, row_lengths
from tvc.kernels.op import Scope
from tvc.passes.reduction import decide
from tvc.policy import Step, load_policy, resolve
from tvc.report.schedule import make_plan

SHAPES = [(3, 5), (6, 4), (1, 7), (4, 1), (2, 9)]
TOLD = dataclasses.replace(layout(), in_order=False, spatial=True)
PADS = 2


def positions(sizes: list[tuple[int, ...]], gap: int = 1) -> torch.Tensor:
    """[3, 1, V] where Qwen2-VL puts pictures of (frames, rows, columns), each `gap` behind the largest before."""
    parts, start = [torch.zeros(3, PADS, dtype=torch.int64)], 0
    for size in sizes:
        axes = torch.meshgrid(*(torch.arange(n) for n in size), indexing="ij")
        parts.append(torch.stack(axes).flatten(1) + start)
        start = int(parts[-1].max()) + gap
    return torch.cat(parts, 1)[:, None]


def numbers(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(segment [1, V], counts [1, N]) of pictures behind pads."""
    counts = torch.tensor([lengths])
    segment = torch.arange(len(lengths)).repeat_interleave(counts[0])
    return torch.nn.functional.pad(segment, (PADS, 0), value=-1)[None], counts


def told(shapes: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(segment [1, V], counts [1, N], row lengths [1, V] by position)."""
    segment, counts = numbers([rows * columns for rows, columns in shapes])
    return segment, counts, row_lengths(positions([(1, *shape) for shape in shapes]), segment)


def test_positions_tell_how_long_rows_are() -> None:
    _, _, lengths = told(SHAPES)
    assert lengths.tolist() == [[1] * PADS + [columns for rows, columns in SHAPES for _ in range(rows * columns)]]


@pytest.mark.parametrize("gap", [1, 2, 7])
def test_frames_and_pictures_that_follow_each_other_are_apart(gap: int) -> None:
    """In one scope, too, as all images of a prompt may be; no text between them moves the next one by one place."""
    sizes = [(3, 2, 4), (1, 1, 3), (2, 3, 1), (1, 1, 1), (2, 1, 5)]
    segment, _ = numbers([math.prod(size) for size in sizes])
    for scope in (segment, segment.clamp(max=0)):
        want = [size[2] for size in sizes for _ in range(math.prod(size))]
        assert row_lengths(positions(sizes, gap), scope)[0, PADS:].tolist() == want


def test_places_that_follow_each_other_in_another_picture_are_no_neighbours() -> None:
    """Tokens of one row, but for a picture, a frame and a pad that begin within it."""
    across = torch.arange(7)
    where = torch.stack([(across >= 4).long(), torch.zeros(7).long(), across])[:, None]
    segment = torch.tensor([[-1, -1, 0, 1, 1, 1, 1]])
    assert neighbours_by_position(where, segment)[0].tolist() == [[-1, -1, -1, -1, 5, 6, -1]]
    assert row_lengths(where, segment).tolist() == [[1, 1, 1, 1, 3, 3, 3]]
    short = torch.tensor([[[0] * 4], [[0, 0, 0, 1]], [[0, 1, 2, 1]]])  # a second row of which one token is there
    assert neighbours_by_position(short, torch.zeros(1, 4).long())[1].tolist() == [[-1, -1, -1, -1]]


def test_no_visual_token_has_no_row() -> None:
    none = torch.zeros(2, 0, dtype=torch.int64)
    assert row_lengths(torch.zeros(3, 2, 0, dtype=torch.int64), none).shape == (2, 0)


def carried_out(one: Step, feature: torch.Tensor, scores: list[torch.Tensor], **taps: Any) -> tuple[Any, Any]:
    """(per picture the places of what is left, the values [K, D] that it has)."""
    segment, counts, lengths = told(SHAPES)
    parts = {
        part: {name: lengths for name, tap in primitive.taps().items() if tap.kind == "row"} | taps
        for part, primitive in one.parts().items()
    }
    made = decide(one, feature, torch.ones(segment.shape), segment, counts, list(scores), parts)
    real = made.chosen[0] >= 0
    chosen = made.chosen[0][real]
    starts = PADS + counts[0].cumsum(0) - counts[0]
    places = [(chosen[segment[0, chosen] == n] - starts[n]).tolist() for n in range(len(SHAPES))]
    return places, None if made.feature is None else made.feature[0][real]


def drawn(seed: int, width: int = 3) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """([1, V, D] random features behind pads, and those of each picture [R, C, D])."""
    torch.manual_seed(seed)
    maps = [torch.randn(rows, columns, width) for rows, columns in SHAPES]
    flat = torch.cat([one.flatten(0, 1) for one in maps])
    return torch.nn.functional.pad(flat, (0, 0, PADS, 0))[None], maps


@pytest.mark.parametrize("keep", [100, 60, 34])
def test_whole_rows_of_every_picture_stay(keep: int) -> None:
    (one,) = resolve(load_policy("fopru-row", set=[f"keep={keep}%"]), TOLD).steps
    feature, maps = drawn(keep, 1)
    places, _ = carried_out(one, feature, [feature[:, :, 0]])
    for picture, left in zip(maps, places, strict=True):
        rows, columns = picture.shape[:2]
        stay = rows * columns * keep * 10 // 1000 // columns
        best = sorted(range(rows), key=lambda r: -float(picture[r].sum()))[:stay]
        assert left == sorted(r * columns + c for r in best for c in range(columns))


def test_neighbours_of_anchors_are_those_of_their_picture() -> None:
    (one,) = resolve(load_policy("hiprune", set=["keep=60%", "anchors=1000"]), TOLD).steps
    feature, maps = drawn(4, 2)
    places, _ = carried_out(one, feature, [feature[:, :, 0], feature[:, :, 1]])
    for picture, left in zip(maps, places, strict=True):
        rows, columns = picture.shape[:2]
        size = rows * columns
        middle, deep = (picture[:, :, i].flatten().tolist() for i in (0, 1))
        budget = size * 600 // 1000
        anchors = sorted(range(size), key=lambda i: -middle[i])[: round(budget / 5)]
        near = {min(max(v + d, 0), size - 1) for v in anchors for d in (0, 1, -1, columns, -columns)}
        order = sorted(range(size), key=lambda i: (i not in near, -deep[i]))
        assert left == sorted(order[:budget])


@pytest.mark.parametrize("side", [2, 3, 4])
def test_pool_is_pytorchs_average_of_a_square_grid(side: int) -> None:
    """On the eight by eight tokens of a tile; of three by three, a seam of two rows and columns is left over."""
    (one,) = resolve(load_policy("pool", set=[f"side={side}"]), layout()).steps
    assert one.merge is not None
    torch.manual_seed(side)
    feature = torch.randn(1, 64, 5)
    segment, counts = torch.zeros(1, 64, dtype=torch.int64), torch.tensor([[64]])
    made = decide(one, feature, torch.ones(1, 64), segment, counts, [], {})
    maps = feature.transpose(1, 2).unflatten(2, (8, 8))
    means = torch.nn.functional.avg_pool2d(maps, side).flatten(2).transpose(1, 2)
    assert one.merge.sure
    assert one.merge.kept([64]) == [made.chosen.shape[1]] == [means.shape[1] + 64 - (8 // side * side) ** 2]
    assert made.feature is not None
    whole = torch.isin(made.size[0], float(side * side))
    torch.testing.assert_close(made.feature[0, whole], means[0])
    seam = [r * 8 + c for r in range(8) for c in range(8) if max(r, c) >= 8 // side * side]
    assert made.chosen[0, ~whole].tolist() == seam


def test_windows_that_need_not_merge_leave_their_number_to_the_run() -> None:
    text = policy(step("language.0", "merge: {windows: {side: 2, above: -0.9}}"))
    (one,) = resolve(load_policy(text), layout()).steps
    assert one.merge is not None
    assert not one.merge.sure
    assert (one.merge.kept([64]), one.merge.fewest([64])) == ([64], [16])


def test_windows_are_those_of_their_picture() -> None:
    text = policy(step("language.0", "merge: {windows: {side: 2, above: -1}}"))
    (one,) = resolve(load_policy(text), TOLD).steps
    feature, maps = drawn(5)
    places, values = carried_out(one, feature, [])
    assert one.merge is not None
    want, most = [], []
    for picture, left in zip(maps, places, strict=True):
        rows, columns = picture.shape[:2]
        made = {r * columns + c: picture[r, c] for r in range(rows) for c in range(columns)}
        for r in range(0, rows - 1, 2):
            for c in range(0, columns - 1, 2):
                for spot in ((r, c), (r, c + 1), (r + 1, c), (r + 1, c + 1)):
                    del made[spot[0] * columns + spot[1]]
                made[(r + 1) * columns + c] = picture[r : r + 2, c : c + 2].mean((0, 1))
        assert left == sorted(made)
        want += [made[place] for place in sorted(made)]
        most.append(len(made))
    torch.testing.assert_close(values, torch.stack(want))
    sizes = [rows * columns for rows, columns in SHAPES]
    assert one.merge.fewest(sizes) == [6, 6, 4, 1, 6]  # of 15, 24, 7, 4 and 18, windows of four filling a picture
    assert all(low <= number for low, number in zip(one.merge.fewest(sizes), most, strict=True))


@pytest.mark.parametrize("cells", [1, 2, 3])
def test_cells_are_parts_of_their_picture(cells: int) -> None:
    head = "score: random\n    select: {top: 20%}"
    (one,) = resolve(load_policy(policy(step("language.0", f"{head}\n    rest: {{cells: {cells}}}"))), TOLD).steps
    feature, maps = drawn(6)
    score = feature[:, :, 0].abs()
    places, values = carried_out(one, feature, [score])
    want = []
    for picture, left in zip(maps, places, strict=True):
        rows, columns = picture.shape[:2]
        flat = picture.flatten(0, 1)
        order = sorted(range(len(flat)), key=lambda i: -float(flat[i, 0].abs()))
        made = {i: flat[i] for i in order[: len(flat) * 200 // 1000]}
        groups: dict[tuple[int, int], list[int]] = {}
        for i in range(len(flat)):
            if i not in made:
                groups.setdefault((i // columns * cells // rows, i % columns * cells // columns), []).append(i)
        for members in groups.values():
            weight = flat[members, 0].abs()
            made[min(members, key=order.index)] = (flat[members] * weight[:, None]).sum(0) / weight.sum()
        assert left == sorted(made)
        want += [made[i] for i in sorted(made)]
    torch.testing.assert_close(values, torch.stack(want))


@pytest.mark.parametrize("side", [1, 2, 3])
def test_pictures_of_any_shape_are_pooled_to_one_grid(side: int) -> None:
    """A picture of fewer tokens than cells goes through the network token by token."""
    merge = PRIMITIVES["merge"]["grid_mlp"].model_validate({"weights": "w.safetensors", "side": side})
    segment, counts, lengths = told(SHAPES)
    feature, maps = drawn(side, 4)
    network = {name: torch.randn(4, 4) for name in ("gate.weight", "up.weight", "down.weight")}
    size = (segment >= 0).float()
    chosen, values, sizes = merge.apply(feature, size, Scope(segment, counts, len(SHAPES)), network, lengths)
    want = []
    for picture in maps:
        cells = torch.nn.functional.adaptive_avg_pool2d(picture.permute(2, 0, 1), side).flatten(1).T
        want.append(cells if picture[..., 0].numel() >= side * side else picture.flatten(0, 1))
    pooled = torch.cat(want)
    gate, up, down = network.values()
    wanted = (torch.nn.functional.silu(pooled @ gate.T) * (pooled @ up.T)) @ down.T
    torch.testing.assert_close(values[0][chosen[0] >= 0], wanted, rtol=1e-5, atol=1e-5)
    assert merge.kept(counts[0].tolist()) == [len(each) for each in want]
    torch.testing.assert_close(sizes.sum(), counts.sum().float())


@pytest.mark.parametrize("side", [2, 3])
def test_pictures_of_any_shape_fall_into_blocks(side: int) -> None:
    """With weights that hand on the first numbers of a block, normed, and then those of its last token."""
    merge = PRIMITIVES["merge"]["pixel_shuffle"].model_validate({"weights": "w.safetensors", "side": side})
    segment, counts, lengths = told(SHAPES)
    feature, maps = drawn(side, 4)
    size = (segment >= 0).float()
    norm = torch.nn.LayerNorm(4 * side**2)
    for name, first in (("first", 0), ("last", 4 * side**2 - 4)):
        taken = torch.zeros(4, 4 * side**2)
        taken[:, first : first + 4] = torch.eye(4)
        network = {"norm.weight": norm.weight, "norm.bias": norm.bias, "first.bias": torch.full((4,), 50.0)}
        network |= {"first.weight": taken, "second.weight": torch.eye(4), "second.bias": torch.full((4,), -50.0)}
        chosen, values, sizes = merge.apply(feature, size, Scope(segment, counts, len(SHAPES)), network, lengths)
        want, numbers = [], []
        for picture in maps:
            for row in range(0, picture.shape[0], side):
                for column in range(0, picture.shape[1], side):
                    block = torch.zeros(side, side, 4)
                    part = picture[row : row + side, column : column + side]
                    block[: part.shape[0], : part.shape[1]] = part
                    want.append(norm(block.flatten())[first : first + 4])
                    numbers.append(float(part.shape[0] * part.shape[1]))
        real = chosen[0] >= 0
        torch.testing.assert_close(values[0][real], torch.stack(want), rtol=1e-5, atol=1e-4, msg=name)
        assert sizes[0][real].tolist() == numbers
    most, least = sum(merge.kept(counts[0].tolist())), sum(merge.fewest(counts[0].tolist()))
    assert least <= len(want) <= most
    assert not merge.sure


def test_a_square_grid_tells_how_many_blocks_there_are() -> None:
    (one,) = resolve(load_policy("pixel-shuffle", set=["side=3"]), layout()).steps
    assert one.merge is not None
    assert (one.merge.sure, one.merge.kept([64]), one.merge.fewest([64])) == (True, [9], [9])
    sequence = policy(step("language.0", "scope: sequence\n    merge: {pixel_shuffle: {weights: w.safetensors}}"))
    assert refused(sequence, layout(visual=(64, 64))).slug == "no-grid"


# What a policy may ask ------------------------------------------------------------------------------------------------


def refused(text: Any, model: Any = TOLD, settings: tuple[str, ...] = ()) -> SiteError:
    with pytest.raises(SiteError) as caught:
        resolve(load_policy(text, settings), model)
    return caught.value


@pytest.mark.parametrize(
    "name", ["fopru-row", "hiprune", "tokenflex", "vflowopt", "mustdrop", "visual-context-window", "pixel-shuffle"]
)
def test_a_grid_that_positions_tell_is_left_open(name: str) -> None:
    first = resolve(load_policy(name), TOLD).steps[0]
    (primitive,) = (p for p in first.primitives() if "columns" in type(p).model_fields)
    assert primitive.columns is None
    assert [tap.kind for tap in primitive.taps().values() if tap.kind == "row"] == ["row"]
    again = resolve(load_policy(resolve(load_policy(name), TOLD).to_yaml()), TOLD).steps[0]
    assert [p for p in again.primitives() if "columns" in type(p).model_fields] == [primitive]
    square = resolve(load_policy(name), layout()).steps[0]
    assert [p.columns for p in square.primitives() if "columns" in type(p).model_fields] == [8]


ROWS = "score: random\n    select: {rows: 50%}"


def test_rows_are_told_where_each_image_is_a_scope_and_in_the_decoder() -> None:
    several = refused(policy(step("language.0", f"scope: sequence\n    {ROWS}")))
    assert (several.slug, several.got) == ("no-grid", "rows with scope: sequence")
    early = refused(policy(step("projector", ROWS)))
    assert (early.slug, early.got, early.fix) == ("no-grid", "rows at projector", "write at: language.0")
    written = policy(
        step("language.0", "scope: sequence\n    score: random\n    select: {rows: {keep: 50%, columns: 4}}")
    )
    assert resolve(load_policy(written), TOLD).steps[0].scope == "sequence"
    windows = policy(step("language.0", "scope: sequence\n    merge: {frame_windows: {group: 2, near: 1, far: 2}}"))
    assert resolve(load_policy(windows), TOLD).steps[0].merge is not None
    behind = policy(step("language.0", "select: {stride: 50%}"), step("language.2", ROWS))
    assert refused(behind).slug == "broken-grid"


def test_queries_need_a_square_grid_and_say_so() -> None:
    refusal = refused("mqt")
    assert refusal.slug == "no-square-grid"
    assert "one square grid" in refusal.summary
    square = dataclasses.replace(TOLD, visual_tokens=(36,))
    written = resolve(load_policy("mqt", ("steps.0.merge.queries.columns=6",)), square)
    assert written.steps[0].merge is not None


def test_whole_rows_are_counted_from_above_where_only_the_run_tells_them() -> None:
    plans = [
        make_plan(resolve(load_policy("fopru-row", ("keep=40%",)), model), model)
        for model in (dataclasses.replace(TOLD, visual_tokens=(64,)), layout())
    ]
    assert [plan.layers[0].visual for plan in plans] == [25, 24]
    assert [plan.fired is None for plan in plans] == [False, True]


@pytest.mark.parametrize(("group", "near", "far"), [(1, 1, 3), (2, 2, 3), (3, 3, 1), (2, 4, 4)])
@pytest.mark.parametrize("written", [True, False])
def test_what_windows_leave_lies_within_the_plan_however_frames_are_cut(
    group: int, near: int, far: int, written: bool
) -> None:
    rows, columns = 12, 5
    settings = {"group": group, "near": near, "far": far, "columns": columns if written else None}
    merge = PRIMITIVES["merge"]["frame_windows"].model_validate(settings)
    made = []
    for height in (1, 2, 3, 4, 6, 12):  # of every frame
        sides = [far if number % group else near for number in range(rows // height)]
        made.append(sum(math.ceil(height / side) * math.ceil(columns / side) for side in sides))
    (least,), (most,) = merge.fewest([rows * columns]), merge.kept([rows * columns])
    assert least <= min(made)
    assert max(made) <= most


def test_what_windows_leave_at_least_and_at_most_without_a_row() -> None:
    merge = PRIMITIVES["merge"]["frame_windows"].model_validate({"group": 2, "near": 2, "far": 3})
    assert (merge.kept([36, 10]), merge.fewest([36, 10])) == ([36, 10], [4, 2])
