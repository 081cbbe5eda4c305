"""Which part of the photo each visual token shows.

What is known of an image is what its processor returned: pixels of one or several tiles, or packed patches with a grid.
From that and from the number of visual tokens follows the layout, without knowing the family:

1. `image_grid_thw`: one grid over the whole photo, `merge_size` patches a side per token.
2. One tile and a square number of tokens: one grid, over the centre crop where the processor crops.
3. Several tiles with equally many tokens each: a mosaic over the photo, and an overview of the whole of it.
4. An overview and one grid whose rows end in a newline token.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

Box = tuple[float, float, float, float]  # left, top, right, bottom, as fractions of the photo
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


@dataclasses.dataclass(frozen=True)
class View:
    """Tokens that lie in rows over a part of the photo; `ends` tokens close each row and show nothing.

    Views with one `canvas` are drawn onto one copy of the photo.
    """

    rows: int
    cols: int
    region: Box = WHOLE
    canvas: int = 0
    ends: int = 0

    @property
    def tokens(self) -> int:
        return self.rows * (self.cols + self.ends)

    def box(self, token: int) -> Box | None:
        """The part of the photo that the view's `token` shows; None for one that closes a row."""
        row, column = divmod(token, self.cols + self.ends)
        if column >= self.cols:
            return None
        left, top, right, bottom = self.region
        wide, high = (right - left) / self.cols, (bottom - top) / self.rows
        return left + column * wide, top + row * high, left + (column + 1) * wide, top + (row + 1) * high


def views(
    photo: Image.Image, count: int, inputs: Mapping[str, Any], image_processor: Any = None, tile_side: int = 0
) -> list[View]:
    """How `count` visual tokens lie on the photo; empty where their layout is not known.

    Args:
        photo: the picture as it was given to the processor.
        count: visual tokens that the model makes of it.
        inputs: what the processor returned for it: `pixel_values`, and `image_grid_thw` where patches are packed.
        image_processor: read for `merge_size`, `do_center_crop`, `size` and `crop_size`.
        tile_side: visual tokens along one side of a tile, where it is known.
    """
    found = _packed(inputs, image_processor, count)
    if found:
        return found
    tiles = _tiles(inputs)
    side = math.isqrt(count // max(1, len(tiles)))
    if len(tiles) <= 1:
        square = side * side == count
        return [View(side, side, crop_region(photo.size, image_processor))] if square and count else []
    if side * side * len(tiles) == count:
        return _mosaic(photo, tiles, side)
    return _with_newlines(photo, count, tile_side)


def _packed(inputs: Mapping[str, Any], image_processor: Any, count: int) -> list[View]:
    grids = inputs.get("image_grid_thw")
    if grids is None:
        return []
    merge = getattr(image_processor, "merge_size", 1)
    _, rows, cols = (int(n) for n in np.asarray(grids)[0])
    view = View(rows // merge, cols // merge)
    return [view] if view.tokens == count else []


def _tiles(inputs: Mapping[str, Any]) -> np.ndarray:
    """[tiles, 3, height, width] float; empty where the pixels have another form."""
    pixels = inputs.get("pixel_values")
    if pixels is None:
        return np.zeros((0, 3, 1, 1))
    array = np.asarray(pixels, dtype=np.float32)
    if array.ndim == 5:
        array = array[0]
    return array if array.ndim == 4 else np.zeros((0, 3, 1, 1))


def crop_region(size: tuple[int, int], image_processor: Any) -> Box:
    """The part of the photo that survives the processor's centre crop, as fractions."""
    if not getattr(image_processor, "do_center_crop", False):
        return WHOLE
    width, height = size
    resize, crop = dict(image_processor.size), dict(image_processor.crop_size)
    if "shortest_edge" in resize:
        factor = resize["shortest_edge"] / min(width, height)
        width, height = round(width * factor), round(height * factor)
    elif "height" in resize:
        width, height = resize["width"], resize["height"]
    across, down = min(1.0, crop["width"] / width), min(1.0, crop["height"] / height)
    return (1 - across) / 2, (1 - down) / 2, (1 + across) / 2, (1 + down) / 2


def _shape(tiles: int, aspect: float) -> tuple[int, int]:
    """Rows and columns of `tiles` tiles whose shape is nearest to that of a photo of width / height `aspect`."""
    pairs = [(rows, tiles // rows) for rows in range(1, tiles + 1) if tiles % rows == 0]
    return min(pairs, key=lambda pair: abs(math.log(pair[1] / pair[0] / aspect)))


def _mosaic(photo: Image.Image, tiles: np.ndarray, side: int) -> list[View]:
    """Tiles in reading order, and the overview before or behind them: where the tile looks like the whole photo."""
    rows, cols = _shape(len(tiles) - 1, photo.width / photo.height)
    details = [
        View(side, side, (c / cols, r / rows, (c + 1) / cols, (r + 1) / rows)) for r in range(rows) for c in range(cols)
    ]
    overview = View(side, side, canvas=1)
    return [overview, *details] if _likeness(photo, tiles[0]) > _likeness(photo, tiles[-1]) else [*details, overview]


def _likeness(photo: Image.Image, tile: np.ndarray) -> float:
    """Correlation of brightness between the photo, squashed, and a tile."""
    seen = Image.fromarray(tile.mean(0).astype(np.float32)).resize((16, 16), Image.Resampling.BOX)
    whole = photo.convert("L").resize((16, 16), Image.Resampling.BOX)
    first, second = (np.asarray(picture, dtype=np.float64).ravel() for picture in (seen, whole))
    first, second = first - first.mean(), second - second.mean()
    norm = np.linalg.norm(first) * np.linalg.norm(second)
    return float(first @ second / norm) if norm else 0.0


def _with_newlines(photo: Image.Image, count: int, side: int) -> list[View]:
    """An overview of side x side tokens, then a grid of the photo's shape whose rows are closed by a newline each."""
    rest, aspect = count - side * side, photo.width / photo.height
    grids = [(rows, rest // rows - 1) for rows in range(1, rest // 2 + 1) if rest % rows == 0]
    if not side or not grids:
        return []
    rows, cols = min(grids, key=lambda grid: abs(math.log(grid[1] / grid[0] / aspect)))
    near = abs(math.log(cols / rows / aspect)) < math.log(1.25)  # rounding to whole tokens moves a small grid's shape
    return [View(side, side, canvas=1), View(rows, cols, ends=1)] if near else []
