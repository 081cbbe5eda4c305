"""Draws what a policy did to the visual tokens onto the photo they come from: one panel per site."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tvc.errors import ArgumentError
from tvc.report.patches import View

WIDTH = 420  # of a photo in a panel, pixels
MARGIN = 18
COLUMNS = 3
INK, PAPER, FAINT = (28, 30, 34), (255, 255, 255), (110, 116, 124)
KEPT, MERGED, DROPPED = (64, 156, 255), (255, 149, 0), (34, 42, 62)


@dataclasses.dataclass(frozen=True)
class Panel:
    """The visual tokens of one photo after one site.

    `kept`, `merged` and `dropped` are indices of visual tokens; tokens in none of them are drawn as dropped. `views`
    says where the tokens lie on the photo; without it they are drawn as a plain strip of cells.
    """

    site: str
    views: Sequence[View]
    kept: Sequence[int]
    merged: Sequence[int] = ()
    dropped: Sequence[int] = ()

    @property
    def total(self) -> int:
        drawn = sum(view.tokens for view in self.views)
        return drawn or 1 + max((*self.kept, *self.merged, *self.dropped), default=-1)

    def states(self) -> np.ndarray:
        """[total] 0 dropped, 1 merged, 2 kept."""
        states = np.zeros(self.total, dtype=np.int64)
        for value, indices in ((1, self.merged), (2, self.kept)):
            if indices and max(indices) >= self.total:
                raise ArgumentError(
                    "a panel names a visual token that its photo does not have",
                    where=f"panel {self.site}",
                    got=f"token {max(indices)}",
                    want=f"0..{self.total - 1}",
                    fix="give views that hold as many tokens as the model makes of the photo",
                    slug="token-off-photo",
                )
            states[list(indices)] = value
        return states

    def title(self) -> tuple[str, str]:
        """The site, and how many tokens are left there."""
        merged = f", {len(self.merged)} merged" if self.merged else ""
        gone = self.total - len(self.kept) - len(self.merged)
        share = 100 * len(self.kept) / self.total if self.total else 0.0
        place = "after the projector" if self.site == "projector" else f"before {self.site}"
        return place, f"{len(self.kept)} of {self.total} kept ({share:.1f}%){merged}, {gone} dropped"


def overlay(image: Image.Image, panels: Sequence[Panel]) -> Image.Image:
    """The photo with kept patches bright, merged ones tinted, dropped ones dimmed: one titled panel per site.

    Args:
        image: the photo.
        panels: one per site, in the order in which they are drawn.

    Raises:
        ArgumentError: there is no panel, or one names a token that its views do not hold.
    """
    if not panels:
        raise ArgumentError(
            "there is nothing to draw",
            where="overlay",
            got="no panels",
            want="a panel for each site of the policy",
            fix="show an artifact whose policy reduces visual tokens",
            slug="nothing-to-show",
        )
    photo = image.convert("RGB")
    drawn = [_draw_panel(photo, panel) for panel in panels]
    columns = min(COLUMNS, len(drawn)) if len(drawn) != 4 else 2
    rows = [drawn[i : i + columns] for i in range(0, len(drawn), columns)]
    widths = [max(row[c].width for row in rows if c < len(row)) for c in range(columns)]
    legend_height = 34
    width = max(sum(widths) + MARGIN * (columns + 1), 620)
    height = sum(max(cell.height for cell in row) + MARGIN for row in rows) + MARGIN + legend_height
    page = Image.new("RGB", (width, height), PAPER)
    top = MARGIN
    for row in rows:
        left = MARGIN
        for cell, wide in zip(row, widths, strict=False):
            page.paste(cell, (left, top))
            left += wide + MARGIN
        top += max(cell.height for cell in row) + MARGIN
    _draw_legend(page, (MARGIN, height - legend_height - 2), photo, panels)
    return page


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _draw_panel(photo: Image.Image, panel: Panel) -> Image.Image:
    pictures = _pictures(photo, panel)
    head, gap = 50, 10
    title, subtitle = panel.title()
    written = max(_font(20).getlength(title), _font(14).getlength(subtitle))
    width = max(sum(p.width for p in pictures) + gap * (len(pictures) - 1), math.ceil(written))
    cell = Image.new("RGB", (width, head + max(p.height for p in pictures)), PAPER)
    draw = ImageDraw.Draw(cell)
    draw.text((0, 0), title, fill=INK, font=_font(20))
    draw.text((0, 25), subtitle, fill=FAINT, font=_font(14))
    left = 0
    for picture in pictures:
        cell.paste(picture, (left, head))
        left += picture.width + gap
    return cell


def _pictures(photo: Image.Image, panel: Panel) -> list[Image.Image]:
    """One copy of the photo per canvas; the first, which holds the detail, is the largest."""
    states = panel.states()
    if not panel.views:
        return [_strip(states)]
    pictures = []
    for canvas in sorted({view.canvas for view in panel.views}):
        wide = WIDTH if canvas == 0 else WIDTH // 3
        copy = photo.resize((wide, max(1, round(wide * photo.height / photo.width))))
        pictures.append(_shade(copy, panel, states, canvas))
    return pictures


def _shade(photo: Image.Image, panel: Panel, states: np.ndarray, canvas: int) -> Image.Image:
    """The photo under a state per pixel: -1 not seen by the model, else as in `Panel.states`."""
    seen = np.full((photo.height, photo.width), -1, dtype=np.int64)
    edges = np.zeros((photo.height, photo.width), dtype=bool)
    start = 0
    for view in panel.views:
        for token in range(view.tokens):
            box = view.box(token) if view.canvas == canvas else None
            if box is not None:
                left, right = round(box[0] * photo.width), round(box[2] * photo.width)
                top, bottom = round(box[1] * photo.height), round(box[3] * photo.height)
                seen[top:bottom, left:right] = states[start + token]
                edges[top, left:right] = edges[top:bottom, left] = True
        start += view.tokens
    colour = np.asarray(photo, dtype=np.float32)
    grey = colour.mean(2, keepdims=True)
    # A floor of slate, so that a dropped patch of a dark area differs from a kept one.
    faded = 0.20 * grey + np.asarray(DROPPED, dtype=np.float32)
    tinted = 0.35 * grey + 0.65 * np.asarray(MERGED, dtype=np.float32) * (0.4 + 0.6 * grey / 255)
    unseen = 0.3 * grey + 0.7 * 255
    result = np.select([(seen == s)[..., None] for s in (2, 1, 0)], [colour, tinted, faded], unseen)
    lines = edges & (seen >= 0)
    result[lines] *= 0.82
    return Image.fromarray(result.clip(0, 255).astype(np.uint8))


def _strip(states: np.ndarray) -> Image.Image:
    """Cells in reading order, for tokens whose place on the photo is not known."""
    cols = max(1, math.ceil(math.sqrt(len(states))))
    cell = max(2, WIDTH // cols)
    rows = max(1, -(-len(states) // cols))
    picture = Image.new("RGB", (cols * cell, rows * cell), PAPER)
    draw = ImageDraw.Draw(picture)
    colours = (DROPPED, MERGED, KEPT)
    for index, state in enumerate(states):
        row, col = divmod(index, cols)
        draw.rectangle((col * cell, row * cell, (col + 1) * cell - 2, (row + 1) * cell - 2), fill=colours[state])
    return picture


def _draw_legend(page: Image.Image, corner: tuple[int, int], photo: Image.Image, panels: Sequence[Panel]) -> None:
    """What the looks mean; only those that occur, and a kept patch is shown by a piece of the photo itself."""
    side = 20
    piece = photo.resize((side * 3, side * 3)).crop((side, side, side * 2, side * 2))
    entries = [("kept", piece)]
    if any(not panel.views for panel in panels):
        entries.append(("kept, place unknown", Image.new("RGB", (side, side), KEPT)))
    if any(panel.merged for panel in panels):
        entries.append(("merged into a kept token", Image.new("RGB", (side, side), MERGED)))
    entries.append(("dropped", Image.new("RGB", (side, side), DROPPED)))
    if any(view.region != (0.0, 0.0, 1.0, 1.0) for panel in panels for view in panel.views if len(panel.views) == 1):
        entries.append(("cropped by the processor", Image.new("RGB", (side, side), (215, 215, 215))))
    draw, (left, top) = ImageDraw.Draw(page), corner
    for label, swatch in entries:
        page.paste(swatch, (left, top + 3))
        draw.text((left + side + 7, top + 4), label, fill=INK, font=_font(15))
        left += side + 7 + math.ceil(_font(15).getlength(label)) + 24
