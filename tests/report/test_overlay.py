"""Where tokens lie on a photo, and what the drawing shows there."""

from __future__ import annotations

import types

import numpy as np
import pytest
from PIL import Image

from tvc.errors import ArgumentError
from tvc.report.overlay import WIDTH, Panel, overlay
from tvc.report.patches import View, crop_region, views

CROPPING = types.SimpleNamespace(
    do_center_crop=True, size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
)


def photo(width: int = 640, height: int = 320) -> Image.Image:
    """Red grows to the right, green to the middle from above and below: no part looks like the whole."""
    red = np.tile(np.linspace(60, 255, width), (height, 1))
    green = np.tile(255 - np.abs(np.linspace(-195, 195, height))[:, None], (1, width))
    green[:, : width // 2] = 60
    return Image.fromarray(np.stack((red, green, 0 * red), 2).astype(np.uint8))


def tile(picture: Image.Image, size: int = 32) -> np.ndarray:
    return np.asarray(picture.resize((size, size)), dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1


def test_a_centre_crop_holds_the_grid():
    (view,) = views(photo(), 576, {"pixel_values": np.zeros((1, 3, 336, 336))}, CROPPING)
    assert (view.rows, view.cols) == (24, 24)
    assert view.region == (0.25, 0.0, 0.75, 1.0)
    assert view.box(0) == pytest.approx((0.25, 0, 0.25 + 0.5 / 24, 1 / 24))
    assert view.box(575) == pytest.approx((0.75 - 0.5 / 24, 1 - 1 / 24, 0.75, 1))


def test_a_portrait_photo_is_cropped_above_and_below():
    assert crop_region((100, 200), CROPPING) == (0.0, 0.25, 1.0, 0.75)


def test_packed_patches_follow_their_grid():
    inputs = {"pixel_values": np.zeros((32, 8)), "image_grid_thw": np.array([[1, 4, 8]])}
    assert views(photo(), 8, inputs, types.SimpleNamespace(merge_size=2)) == [View(2, 4)]


@pytest.mark.parametrize("last", [True, False])
def test_tiles_and_their_overview_are_told_apart_by_looking(last):
    whole = photo()
    parts = [tile(whole.crop((c * 320, 0, c * 320 + 320, 320))) for c in range(2)]
    tiles = [*parts, tile(whole)] if last else [tile(whole), *parts]
    found = views(whole, 3 * 16, {"pixel_values": np.stack(tiles)[None]})
    overview = View(4, 4, canvas=1)
    details = [View(4, 4, (0.0, 0.0, 0.5, 1.0)), View(4, 4, (0.5, 0.0, 1.0, 1.0))]
    assert found == ([*details, overview] if last else [overview, *details])


def test_rows_closed_by_newlines_are_found():
    inputs = {"pixel_values": np.zeros((1, 3, 3, 384, 384))}
    overview, grid = views(photo(), 729 + 27 * 55, inputs, tile_side=27)
    assert overview == View(27, 27, canvas=1)
    assert (grid.rows, grid.cols, grid.ends) == (27, 54, 1)
    assert grid.box(54) is None
    assert grid.box(55) == pytest.approx((0, 1 / 27, 1 / 54, 2 / 27))


def test_an_unknown_layout_is_said_to_be_unknown():
    assert views(photo(), 577, {"pixel_values": np.zeros((1, 3, 336, 336))}) == []
    assert views(photo(), 100, {}) == [View(10, 10)]
    assert views(photo(), 729 + 17, {"pixel_values": np.zeros((1, 3, 3, 384, 384))}, tile_side=27) == []


def _middle(page: Image.Image, row: int, col: int, cells: int = 2) -> np.ndarray:
    """The colour in the middle of a cell of a page with one panel: the photo stands below the title, at the margin."""
    high = WIDTH // 2
    left, top = 18 + (2 * col + 1) * WIDTH // (2 * cells), 18 + 50 + (2 * row + 1) * high // (2 * cells)
    return np.asarray(page)[top, left].astype(int)


def test_kept_is_the_photo_merged_is_tinted_dropped_is_dim():
    grid = [View(2, 2)]
    page = overlay(photo(), [Panel("language.2", grid, kept=[0], merged=[1], dropped=[2, 3])])
    original = overlay(photo(), [Panel("language.2", grid, kept=[0, 1, 2, 3])])
    assert (_middle(page, 0, 0) == _middle(original, 0, 0)).all()
    dim, bright = _middle(page, 1, 1), _middle(original, 1, 1)
    assert 2 * dim[0] < bright[0]
    tint = _middle(page, 0, 1)
    assert tint[0] > tint[1] > tint[2]
    assert (tint != _middle(original, 0, 1)).any()


def test_panels_stand_side_by_side_and_wrap():
    panel = Panel("language.2", [View(2, 2)], kept=[0])
    one, three, four = (overlay(photo(), [panel] * n) for n in (1, 3, 4))
    assert three.width > 3 * WIDTH
    assert three.height == one.height
    assert four.width < three.width
    assert four.height > 1.5 * one.height


def test_titles_count():
    assert Panel("language.2", [View(2, 4)], kept=[0, 3], merged=[1]).title() == (
        "before language.2",
        "2 of 8 kept (25.0%), 1 merged, 5 dropped",
    )
    assert Panel("projector", [View(2, 4)], kept=[]).title()[0] == "after the projector"


def test_tokens_without_a_place_are_drawn_as_cells():
    page = overlay(photo(), [Panel("language.2", [], kept=[0, 5], dropped=range(1, 5))])
    assert page.width >= WIDTH


def test_a_token_off_the_photo_is_refused():
    with pytest.raises(ArgumentError, match="token-off-photo"):
        overlay(photo(), [Panel("language.2", [View(2, 2)], kept=[4])])


def test_nothing_to_draw_is_refused():
    with pytest.raises(ArgumentError, match="nothing-to-show"):
        overlay(photo(), [])
