"""Pictures with known contents and questions about them: the benchmark that needs no download.

A scene is a background (a crop of a photograph, or a texture) with small coloured things on it, handwritten digits and
shapes, one to a cell of a 3 x 3 grid, and mostly a sign with a two-digit number. Most of the picture is background or
distraction, and every question needs another part of it: one thing (`what`, `colour`, `where`), two (`relation`),
the sign (`read`) or the whole picture (`count`).

Digits are those of scikit-learn (UCI Optical Recognition of Handwritten Digits), photographs the two that it ships. The
`test` split uses digits and parts of the photographs that `train` never shows. Everything follows from
`(split, seed, index)`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from PIL import Image, ImageDraw

from tvc.errors import ArgumentError

SIDE = 96  # pixels of a scene
CELL = SIDE // 3
KINDS = ("what", "colour", "count", "where", "relation", "read")
DIGITS = tuple(str(digit) for digit in range(10))
SHAPES = ("circle", "square", "triangle", "cross", "ring", "star")
THINGS = (*DIGITS, *SHAPES)
COLOURS = {
    "red": (1.0, 0.16, 0.14),
    "green": (0.18, 0.9, 0.2),
    "blue": (0.25, 0.4, 1.0),
    "yellow": (1.0, 0.95, 0.15),
    "purple": (0.85, 0.25, 1.0),
    "cyan": (0.2, 0.95, 1.0),
}
PLACES = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")
TEST_DIGITS = 397  # of 1797
SPLITS = ("train", "test")
PLATE = (30, 20)  # width and height of a sign, pixels

WORDING: dict[str, tuple[str, ...]] = {
    "what": ("what is {colour}?", "what is the {colour} thing?"),
    "colour": ("what colour is the {thing}?", "which colour does the {thing} have?"),
    "count shapes": ("how many shapes are there?", "how many shapes do you see?"),
    "count colour": ("how many {colour} things are there?", "how many things are {colour}?"),
    "where": ("where is the {thing}?", "in which part of the picture is the {thing}?"),
    "relation": ("on which side of the {other} is the {thing}?", "where is the {thing} seen from the {other}?"),
    "read": ("what number is on the sign?", "what does the sign say?"),
}


@dataclasses.dataclass(frozen=True)
class Thing:
    """One thing in a scene; `box` is (left, top, right, bottom) in pixels."""

    name: str
    colour: str
    box: tuple[int, int, int, int]

    @property
    def centre(self) -> tuple[float, float]:
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2


@dataclasses.dataclass(frozen=True)
class Scene:
    """A picture [SIDE, SIDE, 3] uint8 and what is in it; `sign` is the number on the sign, if there is one."""

    pixels: np.ndarray
    things: tuple[Thing, ...]
    sign: str | None
    sign_box: tuple[int, int, int, int] | None

    @property
    def image(self) -> Image.Image:
        return Image.fromarray(self.pixels)


@dataclasses.dataclass(frozen=True)
class Question:
    """A question about a scene, its one right answer, and the boxes of what one must look at to answer it."""

    kind: str
    text: str
    answer: str
    boxes: tuple[tuple[int, int, int, int], ...]


def scene(split: str, seed: int, index: int, photo: np.ndarray | None = None) -> Scene:
    """Scene number `index` of a split.

    Args:
        split: `train` or `test`.
        seed, index: any non-negative numbers.
        photo: [height, width, 3] uint8, at least SIDE a side, to take as background in place of the split's own.

    Raises:
        ArgumentError: no such split, or scikit-learn is not installed.
    """
    rng = _generator(split, seed, index)
    background = _background(rng, split) if photo is None else _muted(rng, _crop(rng, photo.astype(np.float32) / 255))
    return _compose(rng, _Pen(split, rng), background)


def questions(drawn: Scene, seed: int, index: int, kinds: Sequence[str] = KINDS) -> Iterator[Question]:
    """Endless questions about a scene, kinds in turn; a kind that the scene does not admit is passed over."""
    rng = np.random.default_rng((seed, index, 1))
    turn = int(rng.integers(len(kinds)))
    while True:
        question = _ASK[kinds[turn % len(kinds)]](drawn, rng)
        turn += 1
        if question is not None:
            yield question


def example(split: str, seed: int, index: int) -> tuple[Scene, Question]:
    """Example `index` of the benchmark: kinds in turn, a scene each."""
    kind = KINDS[index % len(KINDS)]
    attempt = 0
    while True:
        drawn = scene(split, seed, index + attempt * 1_000_003)
        rng = np.random.default_rng((seed, index, 2 + attempt))
        question = _ASK[kind](drawn, rng)
        if question is not None:
            return drawn, question
        attempt += 1


def _generator(split: str, seed: int, index: int) -> np.random.Generator:
    if split not in SPLITS:
        raise ArgumentError(
            "there is no such split",
            where="scenes",
            got=split,
            want=" or ".join(SPLITS),
            fix="use test to measure, train to learn",
            slug="no-such-split",
        )
    return np.random.default_rng((SPLITS.index(split), seed, index, 0))


# What is drawn


def _sklearn_datasets() -> object:
    try:
        from sklearn import datasets
    except ImportError as problem:
        raise ArgumentError(
            "the scenes are drawn with scikit-learn's digits, and it is not installed",
            where="tvc eval",
            got=str(problem),
            want="scikit-learn",
            fix="pip install 'tvc[eval]'",
            slug="no-scikit-learn",
        ) from problem
    return datasets


@functools.cache
def _digit_images() -> tuple[np.ndarray, np.ndarray]:
    """All digits [1797, 8, 8] uint8 in an order of ours, and which digit each shows."""
    loaded = _sklearn_datasets().load_digits()  # type: ignore[attr-defined]
    order = np.random.default_rng(1797).permutation(len(loaded.target))
    return (loaded.images[order] * 255 / 16).round().astype(np.uint8), loaded.target[order]


@functools.cache
def _photographs(split: str) -> tuple[np.ndarray, ...]:
    """The split's part of each photograph, at two scales: the right third is for tests."""
    parts = []
    for photo in _sklearn_datasets().load_sample_images().images:  # type: ignore[attr-defined]
        border = photo.shape[1] * 2 // 3
        part = photo[:, :border] if split == "train" else photo[:, border:]
        parts.append(part.astype(np.float32) / 255)
        half = Image.fromarray(part).resize((part.shape[1] // 2, part.shape[0] // 2))
        parts.append(np.asarray(half, np.float32) / 255)
    return tuple(parts)


@functools.cache
def _digits_of(split: str) -> tuple[np.ndarray, ...]:
    """For each digit its images [n, 8, 8] uint8 in a split."""
    images, labels = _digit_images()
    part = slice(0, TEST_DIGITS) if split == "test" else slice(TEST_DIGITS, None)
    return tuple(images[part][labels[part] == digit] for digit in range(10))


class _Pen:
    """Masks of things, float32 in 0..1; digits for training are bent a little, as there are few of them."""

    def __init__(self, split: str, rng: np.random.Generator):
        self._digits, self._bent, self._rng = _digits_of(split), split == "train", rng

    def digit(self, digit: int, width: int, height: int) -> np.ndarray:
        """[height, width]"""
        images = self._digits[digit]
        glyph = Image.fromarray(images[self._rng.integers(len(images))])
        bend = self._rng.uniform(-0.18, 0.18, 4) if self._bent else np.zeros(4)
        # From a pixel of the result to one of the 8 x 8 image, about the centres.
        a, b = 8 / width * (1 + bend[0] / 2), 8 / width * bend[1]
        d, e = 8 / height * bend[2], 8 / height * (1 + bend[3] / 2)
        c, f = 4 - (a * width + b * height) / 2, 4 - (d * width + e * height) / 2
        large = glyph.transform((width, height), Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.BILINEAR)
        return np.minimum(1, np.asarray(large, np.float32) * (1.3 / 255))

    def thing(self, name: str, size: int) -> np.ndarray:
        """[size, size]"""
        return _shape(name, size) if name in SHAPES else self.digit(int(name), size, size)


@functools.cache
def _shape(name: str, size: int) -> np.ndarray:
    """A shape drawn at eight times its size, then averaged: smooth edges."""
    scale = 8
    big = size * scale
    canvas = Image.new("L", (big, big))
    draw = ImageDraw.Draw(canvas)
    low, high, middle = big * 0.08, big * 0.92, big / 2
    if name == "circle":
        draw.ellipse((low, low, high, high), fill=255)
    elif name == "square":
        draw.rectangle((big * 0.14, big * 0.14, big * 0.86, big * 0.86), fill=255)
    elif name == "triangle":
        draw.polygon([(middle, low), (high, high), (low, high)], fill=255)
    elif name == "cross":
        draw.rectangle((big * 0.38, low, big * 0.62, high), fill=255)
        draw.rectangle((low, big * 0.38, high, big * 0.62), fill=255)
    elif name == "ring":
        draw.ellipse((low, low, high, high), fill=255)
        draw.ellipse((big * 0.3, big * 0.3, big * 0.7, big * 0.7), fill=0)
    else:
        angles = np.pi * (np.arange(10) / 5 - 0.5)
        radii = np.where(np.arange(10) % 2 == 0, 0.48, 0.19) * big
        draw.polygon(
            [(middle + r * np.cos(t), middle + r * np.sin(t)) for r, t in zip(radii, angles, strict=True)], fill=255
        )
    return np.asarray(canvas.resize((size, size), Image.Resampling.BOX), np.float32) / 255


def _crop(rng: np.random.Generator, photo: np.ndarray) -> np.ndarray:
    top, left = (int(rng.integers(length - SIDE + 1)) for length in photo.shape[:2])
    return photo[top : top + SIDE, left : left + SIDE]


def _muted(rng: np.random.Generator, picture: np.ndarray) -> np.ndarray:
    """Less colour and less light, so that things stand out."""
    grey = picture.mean(2, keepdims=True)
    return (0.5 * picture + 0.5 * grey) * np.float32(rng.uniform(0.35, 0.65))


def _background(rng: np.random.Generator, split: str) -> np.ndarray:
    """[SIDE, SIDE, 3] float32: in half of all scenes photographic, else a gradient, stripes or noise."""
    sort = rng.random()
    if sort < 0.5:
        photographs = _photographs(split)
        return _muted(rng, _crop(rng, photographs[rng.integers(len(photographs))]))
    down, across = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) / SIDE
    angle = rng.uniform(0, 2 * np.pi)
    along = down * np.float32(np.sin(angle)) + across * np.float32(np.cos(angle))
    if sort < 0.7:
        pattern = along
    elif sort < 0.85:
        pattern = np.sin(along * np.float32(rng.uniform(10, 60)))
    else:
        coarse = rng.random((12, 12), dtype=np.float32)
        pattern = np.asarray(Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    first, second = rng.uniform(0.1, 0.5, (2, 3)).astype(np.float32)
    mixed = first + (second - first) * (pattern[..., None] * 0.5 + 0.5)
    return mixed + rng.normal(0, 0.03, (SIDE, SIDE, 1)).astype(np.float32)


def _compose(rng: np.random.Generator, pen: _Pen, background: np.ndarray) -> Scene:
    canvas = np.ascontiguousarray(background, np.float32).copy()
    for _ in range(int(rng.integers(2, 7))):  # dull patches, to distract
        size, (top, left) = int(rng.integers(4, 10)), rng.integers(0, SIDE - 10, 2)
        canvas[top : top + size, left : left + size] = rng.uniform(0.1, 0.6, 1) + rng.uniform(-0.06, 0.06, 3)
    names, colours = _contents(rng)
    cells = rng.permutation(9)[: len(names) + 1]
    things = []
    for name, colour, cell in zip(names, colours, cells[1:], strict=True):
        size = int(rng.integers(16, 21))
        top, left = (int(corner) * CELL + int(rng.integers(CELL - size + 1)) for corner in divmod(int(cell), 3))
        mask = pen.thing(name, size)[..., None]
        tint = np.asarray(COLOURS[colour], np.float32) * np.float32(rng.uniform(0.85, 1))
        part = canvas[top : top + size, left : left + size]
        part += (tint - part) * mask
        things.append(Thing(name, colour, (left, top, left + size, top + size)))
    sign, box = None, None
    if rng.random() < 0.8:
        sign, box = f"{rng.integers(10, 100)}", _draw_sign_place(rng, int(cells[0]))
        left, top, right, bottom = box
        plate = np.full((PLATE[1], PLATE[0]), rng.uniform(0.8, 1), np.float32)
        for place, digit in enumerate(sign):
            start = 1 + 14 * place
            plate[2:18, start : start + 14] *= 1 - 0.9 * pen.digit(int(digit), 14, 16)
        canvas[top:bottom, left:right] = plate[..., None]
    canvas += rng.normal(0, 0.015, canvas.shape).astype(np.float32)
    return Scene((canvas.clip(0, 1) * 255).round().astype(np.uint8), tuple(things), sign, box)


def _draw_sign_place(rng: np.random.Generator, cell: int) -> tuple[int, int, int, int]:
    row, column = divmod(cell, 3)
    left = column * CELL + int(rng.integers(CELL - PLATE[0] + 1))
    top = row * CELL + int(rng.integers(CELL - PLATE[1] + 1))
    return left, top, left + PLATE[0], top + PLATE[1]


def _contents(rng: np.random.Generator) -> tuple[list[str], list[str]]:
    """Names and colours of three to six things; two names and one colour at least occur once, to be asked for."""
    while True:
        count = int(rng.integers(3, 7))
        shapes = rng.random(count) < 0.5
        names = [SHAPES[rng.integers(len(SHAPES))] if shape else DIGITS[rng.integers(len(DIGITS))] for shape in shapes]
        colours = [tuple(COLOURS)[pick] for pick in rng.integers(len(COLOURS), size=count)]
        if len(_once(names)) >= 2 and _once(colours):
            return names, colours


def _once(values: list[str]) -> list[str]:
    return [value for value in values if values.count(value) == 1]


# What is asked


def _worded(rng: np.random.Generator, wording: str, **words: str) -> str:
    choices = WORDING[wording]
    return choices[rng.integers(len(choices))].format(**words)


def _pick(rng: np.random.Generator, drawn: Scene, attribute: str) -> Thing:
    """A thing whose name or colour no other thing has."""
    once = _once([getattr(thing, attribute) for thing in drawn.things])
    chosen = once[rng.integers(len(once))]
    return next(thing for thing in drawn.things if getattr(thing, attribute) == chosen)


def _what(drawn: Scene, rng: np.random.Generator) -> Question:
    thing = _pick(rng, drawn, "colour")
    return Question("what", _worded(rng, "what", colour=thing.colour), thing.name, (thing.box,))


def _colour(drawn: Scene, rng: np.random.Generator) -> Question:
    thing = _pick(rng, drawn, "name")
    return Question("colour", _worded(rng, "colour", thing=thing.name), thing.colour, (thing.box,))


def _count(drawn: Scene, rng: np.random.Generator) -> Question:
    boxes = tuple(thing.box for thing in drawn.things)
    if rng.random() < 0.5:
        number = sum(thing.name in SHAPES for thing in drawn.things)
        return Question("count", _worded(rng, "count shapes"), str(number), boxes)
    # Mostly a colour that occurs.
    of = [thing.colour for thing in drawn.things] + [tuple(COLOURS)[rng.integers(len(COLOURS))]]
    colour = of[rng.integers(len(of))]
    number = sum(thing.colour == colour for thing in drawn.things)
    return Question("count", _worded(rng, "count colour", colour=colour), str(number), boxes)


def _where(drawn: Scene, rng: np.random.Generator) -> Question:
    thing = _pick(rng, drawn, "name")
    across, down = (int(value) // CELL for value in thing.centre)
    return Question("where", _worded(rng, "where", thing=thing.name), PLACES[down * 3 + across], (thing.box,))


def _relation(drawn: Scene, rng: np.random.Generator) -> Question | None:
    """Left, right, above or below: asked only of pairs for which one of them clearly holds."""
    once = _once([thing.name for thing in drawn.things])
    single = [thing for thing in drawn.things if thing.name in once]
    pairs = []
    for thing in single:
        for other in single:
            across, down = (a - b for a, b in zip(thing.centre, other.centre, strict=True))
            if abs(across) >= 2 * abs(down) and abs(across) > CELL / 2:
                pairs.append((thing, other, "left" if across < 0 else "right"))
            elif abs(down) >= 2 * abs(across) and abs(down) > CELL / 2:
                pairs.append((thing, other, "above" if down < 0 else "below"))
    if not pairs:
        return None
    thing, other, side = pairs[rng.integers(len(pairs))]
    text = _worded(rng, "relation", thing=thing.name, other=other.name)
    return Question("relation", text, side, (thing.box, other.box))


def _read(drawn: Scene, rng: np.random.Generator) -> Question | None:
    if drawn.sign is None or drawn.sign_box is None:
        return None
    return Question("read", _worded(rng, "read"), drawn.sign, (drawn.sign_box,))


_ASK: dict[str, Callable[[Scene, np.random.Generator], Question | None]] = {
    "what": _what,
    "colour": _colour,
    "count": _count,
    "where": _where,
    "relation": _relation,
    "read": _read,
}
