"""The pixels of each visual token, against boxes cut out of the picture; numbers followed through graphs."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.fx as fx

import support
from tvc.errors import SiteError
from tvc.graphs import open_draft
from tvc.passes.insert_vision import VisionInsertion
from tvc.passes.patches import cell_pixels, find_patches, number_patches, on_all_channels, patch_rows, pixels_of
from tvc.passes.retrace import export_draft
from tvc.passes.token_map import TokenMap, in_shape_of
from tvc.program import Component
from tvc.trace.load import load
from tvc.trace.survey import survey
from tvc.trace.vision import capture_vision

AUTO = torch.export.Dim.AUTO
SLOW = pytest.mark.conformance


def boxes(pixels: torch.Tensor, side: int) -> torch.Tensor:
    """[n * F, C * side * side]: pictures [n, C, H, W] cut into boxes, row by row."""
    rows, columns = range(0, pixels.shape[2], side), range(0, pixels.shape[3], side)
    return torch.stack(
        [image[:, y : y + side, x : x + side].flatten() for image in pixels for y in rows for x in columns]
    )


def fours(patches: torch.Tensor) -> torch.Tensor:
    """[P / 4, 4 w]: Qwen2-VL's processor puts the four patches of a visual token one after another."""
    return patches.reshape(len(patches) // 4, -1)


def with_pixels(family: str, change: Callable[[Any], None] = lambda _model: None) -> Component:
    """The family's vision graph, of a model that was changed, with the pixels of its tokens as an output."""
    model, processor = support.build(family)
    change(model)
    surveyed = survey(load(model, processor=processor).meta, processor)
    component = capture_vision(model, surveyed.host, surveyed.sample)
    component.draft = open_draft(component)
    VisionInsertion(component, surveyed.layout).add_pixels("tap.pixels", "test")
    export_draft(component)
    return component


@pytest.mark.parametrize(
    ("family", "cells"),
    [
        ("llava", lambda pixels: boxes(pixels, 14)),
        pytest.param("qwen2_5_vl", fours, marks=SLOW),
        pytest.param("qwen2_vl", fours, marks=SLOW),
        pytest.param("glm4v", fours, marks=SLOW),
        pytest.param("qwen3_vl", fours, marks=SLOW),
        pytest.param("internvl", lambda pixels: boxes(pixels, 28), marks=SLOW),
        pytest.param("smolvlm", lambda pixels: boxes(pixels, 28), marks=SLOW),
        pytest.param("paligemma", lambda pixels: boxes(pixels, 14), marks=SLOW),
        pytest.param("gemma3", lambda pixels: boxes(pixels, 28), marks=SLOW),
        pytest.param("aya_vision", lambda pixels: boxes(pixels, 28), marks=SLOW),
    ],
)
@torch.no_grad()
def test_each_visual_token_gets_the_pixels_of_its_cell(family: str, cells: Any) -> None:
    component = with_pixels(family)
    # Other pictures than those of the trace, the first of them twice.
    names, given = component.inputs, dict(zip(component.inputs, component.sample, strict=True))
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(given[names[0]].shape, generator=generator)
    values = component.exported.module(check_guards=False)(pixels, *component.sample[1:])
    got, features = values[-1], values[0]
    assert got.shape[:-1] == features.shape[:-1]
    assert component.meta["tap_widths"] == {"tap.pixels": got.shape[-1]}
    # Which of a cell's pixels comes first is all the same, as long as it is in all of them.
    want = cells(pixels)
    order = torch.stack([(want[0] == value).nonzero()[0, 0] for value in got.flatten(0, -2)[0]])
    assert order.sort().values.tolist() == list(range(want.shape[1]))
    assert torch.equal(got.flatten(0, -2), want[:, order])


@pytest.mark.conformance
@torch.no_grad()
def test_tokens_that_overlap_behind_the_encoder_are_refused() -> None:
    def overlap(model: Any) -> None:
        model.model.multi_modal_projector.avg_pool = torch.nn.AvgPool2d(4, 1)

    with pytest.raises(SiteError, match="which pixels") as caught:
        with_pixels("gemma3", overlap)
    assert caught.value.slug == "pixels-not-traceable"
    assert "avg_pool2d" in caught.value.where
    assert "overlap" in caught.value.got
    assert "max_min" in caught.value.fix


class Embedding(torch.nn.Module):
    def __init__(self, layer: torch.nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.layer(pixels.to(torch.float32) * 1.0)


def draft_of(module: torch.nn.Module, given: torch.Tensor) -> fx.GraphModule:
    """The module's graph, its weights as attributes."""
    dynamic = ({0: AUTO},)
    exported = torch.export.export(module, (given,), dynamic_shapes=dynamic, strict=False)
    return open_draft(Component("vision", exported, ("given",), ("made",), (given,), dynamic))


def found(layer: torch.nn.Module, pixels: torch.Tensor) -> Any:
    nodes = draft_of(Embedding(layer), pixels).graph.nodes
    made = [find_patches(node, "test") for node in nodes if node.op == "call_function"]
    return next((one for one in made if one is not None), None)


@pytest.mark.parametrize(
    ("layer", "shape", "rows"),
    [
        (torch.nn.Conv2d(3, 5, 2, 2), (2, 3, 4, 6), 12),
        (torch.nn.Conv2d(3, 5, (2, 3), (2, 3)), (2, 3, 4, 6), 8),
        (torch.nn.Conv2d(3, 5, 2, 2, padding="valid"), (2, 3, 5, 7), 12),  # a rest that is in no patch
        (torch.nn.Conv3d(3, 5, (2, 2, 2), (2, 2, 2)), (2, 3, 4, 4, 6), 24),
        (torch.nn.Linear(12, 5), (2, 7, 12), 14),
    ],
    ids=["square", "oblong", "cropped", "in-time", "linear"],
)
@torch.no_grad()
def test_the_rows_are_what_each_patch_was_made_of(layer: Any, shape: tuple[int, ...], rows: int) -> None:
    pixels = torch.randn(shape)
    patches, made = found(layer, pixels), layer(pixels)
    assert patches.width == layer.weight[0].numel()
    got = patch_rows(pixels, made, patches.kernel)
    assert got.shape == (rows, patches.width)
    numbers = number_patches(made, patches.kernel)
    assert numbers.shape == made.shape
    # Each patch times the weights is what the layer gives at the patch's number.
    product = got @ layer.weight.flatten(1).T + layer.bias
    channels = product[
        numbers, torch.arange(5).reshape(-1, *[1] * (made.dim() - 2)) if patches.kernel else torch.arange(5)
    ]
    torch.testing.assert_close(channels, made)


@pytest.mark.parametrize(
    "layer",
    [
        torch.nn.Conv2d(3, 5, 3, 2),
        torch.nn.Conv2d(3, 5, 2, 2, padding=1),
        torch.nn.Conv2d(3, 5, 3, 1, padding="same"),
        torch.nn.Conv2d(3, 6, 2, 2, groups=3),
        torch.nn.Conv2d(3, 5, 2, 2, dilation=2),
    ],
    ids=["overlapping", "padded", "same", "grouped", "dilated"],
)
def test_patches_that_do_not_lie_side_by_side_are_refused(layer: Any) -> None:
    with pytest.raises(SiteError, match="which pixels") as caught:
        found(layer, torch.zeros(2, 3, 8, 8))
    assert caught.value.slug == "pixels-not-traceable"


def test_a_layer_over_numbers_that_are_no_pixels_is_passed_by() -> None:
    class Sizes(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(2, 4)

        def forward(self, sizes: torch.Tensor) -> torch.Tensor:
            return self.layer(sizes.float())

    nodes = draft_of(Sizes(), torch.ones(3, 2, dtype=torch.int64)).graph.nodes
    assert all(find_patches(node, "test") is None for node in nodes if node.op == "call_function")


def test_a_token_of_several_patches_shows_them_side_by_side() -> None:
    rows = torch.arange(8.0).reshape(4, 2)
    cells = torch.tensor([[[3, 0], [1, -1], [-1, -1]]])
    assert cell_pixels(rows, cells).tolist() == [[[6.0, 7, 0, 1], [2, 3, 0, 0], [0, 0, 0, 0]]]


@pytest.mark.parametrize(
    ("features", "packed", "expected"),
    [
        ((3, 7), True, (3, 2)),
        ((3, 1, 7), True, (3, 1, 2)),
        ((2, 3, 7), False, (2, 3, 2)),
        ((2, 3, 1, 7), False, (2, 3, 1, 2)),
    ],
)
def test_values_are_laid_out_as_the_features(features: Any, packed: bool, expected: Any) -> None:
    value = torch.arange(12.0)[: 3 * 2 * (1 if packed else 2)].reshape(1 if packed else 2, 3, 2)
    made = in_shape_of(torch.zeros(features), value, packed)
    assert made.shape == expected
    assert torch.equal(made.flatten(), value.flatten())


def test_an_encoder_with_attention_of_its_own_is_refused() -> None:
    component = Component("vision", None, (), ("visual_features",), (), ())
    component.draft = draft_of(torch.nn.Linear(12, 5), torch.zeros(2, 7, 12))
    insertion = VisionInsertion(component, SimpleNamespace(prefix_tokens=0))
    with pytest.raises(SiteError, match="cannot be seen") as caught:
        insertion.add_keys("tap", "vision.1", "a step")
    assert (caught.value.slug, caught.value.where) == ("unseen-attention", "a step")


def test_all_channels_of_a_token_hold_one_number() -> None:
    numbers = torch.tensor([[[4, 9, 9], [2, 9, 9]]])
    assert on_all_channels(numbers, torch.zeros(1, 2, 5)).tolist() == [[[4] * 5, [2] * 5]]


def test_an_encoder_without_blocks_is_refused() -> None:
    graph = draft_of(Embedding(torch.nn.Linear(12, 5)), torch.zeros(2, 7, 12)).graph
    with pytest.raises(SiteError, match="which pixels") as caught:
        pixels_of(graph, [], next(iter(graph.nodes)), "a step")
    assert (caught.value.slug, caught.value.where) == ("pixels-not-traceable", "a step")


class Joined(torch.nn.Module):
    """Tokens with two others in front, turned round, and every other of them; broken: the others are a maximum."""

    def __init__(self, broken: bool = False):
        super().__init__()
        self.broken = broken
        self.first = torch.nn.Parameter(torch.zeros(1, 2, 4))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden * 2.0
        others = hidden.max(1, keepdim=True).values if self.broken else self.first.expand(hidden.shape[0], -1, -1)
        whole = torch.cat([others, hidden], 1)
        return whole[:, torch.tensor([6, 5, 4, 3, 2, 1, 0])][:, ::2] + 1.0


def followed(module: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    draft = draft_of(module, hidden)
    (source,) = [node for node in draft.graph.nodes if node.op == "placeholder"]
    (output,) = [node for node in draft.graph.nodes if node.op == "output"]
    output.args = (TokenMap(draft.graph, source, output.args[0][0], "test").columns(),)
    draft.recompile()
    return draft(hidden)


@torch.no_grad()
def test_tokens_put_beside_others_have_no_number() -> None:
    assert followed(Joined(), torch.zeros(3, 5, 4)).tolist() == [[[4], [2], [0], [-1]]] * 3


def test_tokens_that_were_lost_on_the_way_are_refused() -> None:
    with pytest.raises(SiteError, match="cannot be followed"):
        followed(Joined(broken=True), torch.zeros(3, 6, 4))


class Averaged(torch.nn.Module):
    """Tokens of a grid, averaged in windows; what fills no window at the edge is left out. A layer follows."""

    def __init__(self, rows: int, columns: int, kernel: tuple[int, int], stride: int | None = None, width: int = 12):
        super().__init__()
        self.grid, self.kernel, self.stride = (rows, columns), kernel, stride
        self.linear = torch.nn.Linear(width, 2 * width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        laid = hidden.transpose(1, 2).unflatten(2, self.grid)
        pooled = torch.nn.functional.avg_pool2d(laid, self.kernel, self.stride)
        made: torch.Tensor = self.linear(pooled.flatten(2).transpose(1, 2))
        return made


@pytest.mark.parametrize(
    ("rows", "columns", "kernel"), [(4, 6, (2, 2)), (5, 7, (2, 3)), (3, 4, (1, 4)), (5, 5, (3, 3))]
)
@torch.no_grad()
def test_tokens_of_a_window_are_those_of_their_mean(rows: int, columns: int, kernel: tuple[int, int]) -> None:
    found = followed(Averaged(rows, columns, kernel, width=36), torch.zeros(2, rows * columns, 36))
    high, wide = kernel
    expected = [
        [(top * high + down) * columns + left * wide + across for down in range(high) for across in range(wide)]
        for top in range(rows // high)
        for left in range(columns // wide)
    ]
    assert found.tolist() == [expected] * 2


def test_windows_that_share_tokens_are_refused() -> None:
    for stride, width in ((1, 12), (None, 3), (None, 6)):
        with pytest.raises(SiteError, match="cannot be followed"):
            followed(Averaged(4, 4, (2, 2), stride, width), torch.zeros(2, 16, width))


class Path(torch.nn.Module):
    """A way from tokens to features, through layers of its own."""

    def __init__(self, way: Callable[..., torch.Tensor], *layers: torch.nn.Module):
        super().__init__()
        self.way, self.layers = way, torch.nn.ModuleList(layers)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.way(hidden, *self.layers)


def laid(hidden: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    return hidden.transpose(1, 2).unflatten(2, (rows, columns))


def in_rows(grid: torch.Tensor) -> torch.Tensor:
    return grid.flatten(2).transpose(1, 2)


def unfolded(hidden: torch.Tensor, layer: Any, stride: int = 2) -> torch.Tensor:
    """Two pictures in a row, of 4 x 6 and 2 x 5 tokens, each in windows of 2 x 2."""
    rows = []
    for picture, (high, wide) in zip(hidden.split([24, 10]), [(4, 6), (2, 5)], strict=True):
        grid = picture.view(high, wide, -1).permute(2, 0, 1).unsqueeze(0)
        windows = torch.nn.functional.unfold(grid, 2, stride=stride)
        rows.append(windows.view(windows.shape[1], -1).t())
    made: torch.Tensor = layer(torch.cat(rows))
    return made


def unfolded_twice(hidden: torch.Tensor, first: Any, last: Any) -> torch.Tensor:
    """Windows of a row of tokens, pairs of what a layer makes of them, and another layer."""
    windows = torch.nn.functional.unfold(laid(hidden, 1, 12), (1, 2), stride=(1, 2)).transpose(1, 2)
    made: torch.Tensor = last(first(windows).unflatten(1, (-1, 2)).flatten(2))
    return made


def gated(hidden: torch.Tensor, first: Any, last: Any) -> torch.Tensor:
    """Four tokens side by side in a gated layer."""
    value, gate = first(hidden.unflatten(1, (-1, 4)).flatten(2)).chunk(2, dim=-1)
    made: torch.Tensor = last(torch.nn.functional.silu(gate) * value)
    return made


def gated_by_slices(hidden: torch.Tensor, first: Any, last: Any) -> torch.Tensor:
    wide = first(hidden.unflatten(1, (-1, 4)).flatten(2))
    half = wide.shape[-1] // 2
    made: torch.Tensor = last(wide[..., :half] * wide[..., half:].sigmoid())
    return made


def parted(hidden: torch.Tensor, layer: Any) -> torch.Tensor:
    """What a layer makes of pairs of tokens, put side by side and taken apart again."""
    left, right = layer(hidden).unflatten(1, (-1, 2)).flatten(2).chunk(2, dim=-1)
    return torch.cat([right, left], 1)


def every_other(hidden: torch.Tensor) -> torch.Tensor:
    even, odd = hidden.unflatten(1, (-1, 2)).unbind(2)
    return torch.cat([odd, even], 1)


WAYS = {
    "unfolded": (Path(unfolded, torch.nn.Linear(32, 12)), (34, 8)),
    "unfolded-then-joined": (Path(unfolded_twice, torch.nn.Linear(16, 6), torch.nn.Linear(12, 20)), (2, 12, 8)),
    "gated": (Path(gated, torch.nn.Linear(32, 24), torch.nn.Linear(12, 20)), (2, 12, 8)),
    "gated-by-slices": (Path(gated_by_slices, torch.nn.Linear(32, 24), torch.nn.Linear(12, 20)), (2, 12, 8)),
    "taken-apart": (Path(parted, torch.nn.Linear(8, 6)), (2, 12, 8)),
    "every-other": (Path(every_other), (2, 12, 8)),
    "convolved": (
        Path(lambda hidden, layer: in_rows(layer(laid(hidden, 4, 7))), torch.nn.Conv2d(8, 24, (2, 3), (2, 3))),
        (2, 28, 8),
    ),
    "pooled-to-a-size": (
        Path(lambda hidden: in_rows(torch.nn.functional.adaptive_avg_pool2d(laid(hidden, 4, 6), (2, 3)))),
        (2, 24, 8),
    ),
    "frames": (Path(lambda hidden: hidden.unflatten(1, (3, -1)).mean(1)), (2, 12, 9)),
    "frames-of-rows": (
        Path(
            lambda hidden, layer: layer(hidden.unflatten(1, (3, -1)).mean(1, keepdim=True).squeeze(1)),
            torch.nn.Linear(9, 7),
        ),
        (2, 12, 9),
    ),
}


def moving(module: torch.nn.Module, hidden: torch.Tensor) -> list[list[list[int]]]:
    """Which tokens move each feature, by its derivatives: [n][F] of token numbers."""
    derived = torch.autograd.functional.jacobian(module, hidden)
    if hidden.dim() == 2:
        derived = derived[None, :, :, None]
    # [n, F, D, n, T, C], of which a sample is moved by its own tokens alone.
    moved = derived.abs().sum((2, 5)).diagonal(dim1=0, dim2=2).permute(2, 0, 1) > 0
    return [[row.nonzero().flatten().tolist() for row in sample] for sample in moved]


@pytest.mark.parametrize("name", WAYS)
@torch.no_grad()
def test_features_are_made_from_the_tokens_that_move_them(name: str) -> None:
    torch.manual_seed(0)
    module, shape = WAYS[name]
    hidden = torch.randn(shape)
    with torch.enable_grad():
        expected = moving(module, hidden)
    found = followed(module, hidden)
    assert found.sort(-1).values.tolist() == expected


@pytest.mark.parametrize(
    ("way", "layers", "tokens"),
    [
        (lambda hidden, layer: unfolded(hidden, layer, stride=1), [torch.nn.Linear(48, 12)], 34),
        (lambda hidden, layer: in_rows(layer(laid(hidden, 4, 4))), [torch.nn.Conv2d(12, 12, 3, padding=1)], 16),
        (lambda hidden: in_rows(torch.nn.functional.adaptive_avg_pool2d(laid(hidden, 5, 4), (2, 2))), [], 20),
        (lambda hidden: in_rows(torch.nn.functional.avg_pool2d(laid(every_other(hidden), 4, 4), 2, 1)), [], 16),
        (lambda hidden, layer: layer(hidden.unflatten(1, (-1, 2)).flatten(2)).mean(1), [torch.nn.Linear(24, 6)], 8),
    ],
    ids=["unfolded", "convolved", "pooled-to-a-size", "pooled", "mean-of-pairs"],
)
def test_tokens_that_end_in_several_places_or_share_one_are_refused(way: Any, layers: Any, tokens: int) -> None:
    shape = (34, 12) if tokens == 34 else (2, tokens, 12)
    with pytest.raises(SiteError) as caught:
        followed(Path(way, *layers), torch.zeros(shape))
    assert caught.value.slug == "tokens-not-traceable"
