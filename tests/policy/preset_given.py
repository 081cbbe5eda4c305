"""One prompt with everything that a policy step may ask for, in small numbers, and steps carried out on it.

What is drawn is the same whoever asks first, as every value has a seed of its own. Where tokens are equal, or copies of
a few, they are corners of a cube, and what reads them is in eighths: lengths, cosines and products are exact in
float32, so that what ties by the formula ties in the op.
"""

from __future__ import annotations

import math
import pathlib
import zlib
from typing import Any

import safetensors.torch
import torch
from policy_formulas import Left, Row, Rows, softmax

from tvc.kernels.grid import neighbours_by_columns
from tvc.kernels.op import Attention, Tap
from tvc.kernels.weights import Trained
from tvc.passes.reduction import decide
from tvc.passes.taps import rater_mask, raters_among, transitions
from tvc.policy import Step

WIDTH, HEADS, GROUPS, HEAD = 8, 4, 2, 4  # heads of the decoder; the encoder has as many heads of keys as of queries
SCALE = 0.5
FRONT, BEHIND = 2, 5  # words on either side of the picture
COPIES = 5  # different tokens where there are ties
KINDS = ("formula", "odd", "ties", "equal", "one", "all")
PIXELS = 3


class Given:
    """A picture of `rows` x `columns` tokens, or a video of several, between words.

    kind: `ties`: every token is one of a few; `equal`: all are copies; else all differ.
    numbers: the settings of the policy under test, for its formula.
    """

    def __init__(self, kind: str, grid: tuple[int, int, int], seed: int, numbers: dict[str, float]) -> None:
        self.kind, self.seed, self.numbers = kind, seed, numbers
        self.frames, self.rows, self.columns = frames, rows, columns = grid
        self.tokens, self.places = frames * rows * columns, rows * columns
        self.length = FRONT + self.tokens + BEHIND
        self.visual = list(range(FRONT, FRONT + self.tokens))
        self.behind = list(range(FRONT + self.tokens, self.length))
        self.text = [*range(FRONT), *self.behind]
        # The last two are copies of none: sums over rows have last bits of their own at the end of a line of numbers.
        some = [int(n) % COPIES for n in self.drawn("copy", max(0, self.tokens - 2)).mul(99)]
        self.copy = [0] * self.tokens if kind == "equal" else [*some, COPIES, COPIES + 1][: self.tokens]
        self.feature = self.of_tokens("feature", 1, WIDTH)
        if frames > 1 and kind in ("formula", "odd"):
            self.feature = self.film().flatten(0, 1)[None]
        self.words = self.drawn("words", 1, FRONT + BEHIND, WIDTH)
        if kind == "ties":
            self.words = self.corners("words", FRONT + BEHIND, WIDTH)[None]
        # How many tokens each stands for: some have taken in others before.
        self.sizes = [
            1.0 + int(n) % 3 if kind in ("formula", "odd") else 1.0 for n in self.drawn("size", self.tokens).mul(9)
        ]
        self.weights: dict[str, torch.Tensor] = {}

    @property
    def pixels(self) -> torch.Tensor:
        """[1, V, P] what the encoder was given of each token's cell: some neighbours alike, others not."""
        return self.of_tokens("pixel", 1, PIXELS) / 2

    @property
    def x(self) -> Rows:
        """The tokens that enter."""
        return self.feature[0].double().tolist()  # type: ignore[no-any-return]

    def drawn(self, name: str, *shape: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {name}".encode()))
        values = torch.randn(*shape, generator=generator)
        return values if self.kind not in ("ties", "equal") else (values * 8).round() / 8

    def of_tokens(self, name: str, *shape: int) -> torch.Tensor:
        """[..., V, D] of a shape (..., D): one row a token."""
        if self.kind in ("ties", "equal"):
            return self.corners(name, COPIES + 2, shape[-1])[self.copy].expand(*shape[:-1], -1, -1)
        return self.drawn(name, *shape[:-1], self.tokens, shape[-1])

    def film(self) -> torch.Tensor:
        """[T, P, D] places that stand still but for some noise, and jump now and then."""
        shape = (self.frames, self.places, WIDTH)
        jumps = self.drawn("jumps", *shape[:2], 1) > 0.8
        steps = torch.where(jumps, self.drawn("steps", *shape), 0.0)
        return self.drawn("first", 1, *shape[1:]) + steps.cumsum(0) + 0.1 * self.drawn("noise", *shape)

    def corners(self, name: str, number: int, width: int) -> torch.Tensor:
        """[number, D] of ones, minus ones and zeros: all of a length of 2, so that cosines are exact."""
        order = self.drawn(f"{name} places", number, width).argsort(dim=1, stable=True)
        signs = torch.where(self.drawn(f"{name} signs", number, width) < 0, -1.0, 1.0)
        return torch.where(order < 4, signs, 0.0)

    # Attention --------------------------------------------------------------------------------------------------------

    def layer(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """([1, H, N, d] queries, [1, G, N, d] keys): a class token and the picture, or the whole prompt."""
        encoder = name.startswith("vision.")
        front, behind = (1, 0) if encoder else (FRONT, BEHIND)
        groups = HEADS if encoder else GROUPS
        shown = self.of_tokens(f"key {name}", 1, groups, HEAD)
        around = self.drawn(f"words {name}", 1, groups, front + behind, HEAD)
        if self.kind == "equal":  # what is no picture gets nothing: shares are 1 / 64, and sums of them exact
            around = shown[:, :, :1].expand_as(around) * -4
        key = torch.cat([around[:, :, :front], shown, around[:, :, front:]], 2)
        if self.kind == "equal":
            return shown[:, :1, :1].expand(1, HEADS, key.shape[2], HEAD) * 8, key
        return self.drawn(f"query {name}", 1, HEADS, key.shape[2], HEAD), key

    def keys(self, name: str, joined: bool = False) -> torch.Tensor:
        """[1, V, d] of the visual tokens, the mean of the heads; `joined`: all heads side by side."""
        front = 1 if name.startswith("vision.") else FRONT
        rows = self.layer(name)[1][:, :, front : front + self.tokens].transpose(1, 2)
        return rows.flatten(2) if joined else rows.mean(2)

    def paid(self, name: str, asking: list[int], temperature: float = 1.0) -> list[Rows]:
        """[H][rows] what tokens pay to all tokens of a layer, by hand: the decoder's see none behind them."""
        query, key = (part[0].double().tolist() for part in self.layer(name))
        number, made = len(key[0]), []
        for head in range(HEADS):
            keys, rows = key[head * len(key) // HEADS], []
            for row in asking:
                seen = number if name.startswith("vision.") else row + 1
                dots = (sum(a * b for a, b in zip(query[head][row], k, strict=True)) for k in keys[:seen])
                rows.append([*softmax([x * SCALE / temperature for x in dots]), *[0.0] * (number - seen)])
            made.append(rows)
        return made

    def received(self, name: str, asking: list[int]) -> Row:
        """What each visual token gets: the mean over rows and heads."""
        front = 1 if name.startswith("vision.") else FRONT
        rows = [row for head in self.paid(name, asking) for row in head]
        return [sum(row[front + v] for row in rows) / len(rows) for v in range(self.tokens)]

    def of_class(self, name: str) -> Row:
        return self.received(name, [0])

    def of_all(self, name: str) -> Row:
        return self.received(name, list(range(self.tokens + 1)))

    # Taps -------------------------------------------------------------------------------------------------------------

    def tap(self, tap: Tap) -> Any:
        """What a compiled model hands to a primitive."""
        return getattr(self, f"_{tap.kind}")(tap)

    def _feature(self, tap: Tap) -> torch.Tensor:
        return self.feature

    def _key(self, tap: Tap) -> torch.Tensor:
        assert tap.layer is not None
        return self.keys(tap.layer, tap.of == ("joined",))

    def _attention(self, tap: Tap) -> Attention:
        assert tap.layer is not None
        query, key = self.layer(tap.layer)
        if tap.layer.startswith("vision."):
            rows = [0] if tap.of[0] == "cls" else list(range(self.tokens + 1))
            columns = torch.arange(1, self.tokens + 1)
            return Attention(query, key, None, torch.tensor([rows]), columns[None, :, None], SCALE)
        mask = torch.ones(self.length, self.length, dtype=torch.bool).tril()[None, None]
        slots = {
            "last": [self.length - 1],
            "text": self.text,
            "visual": self.visual,
            "all": list(range(self.length)),
        }.get(tap.of[0])
        rows = self._raters() if slots is None else torch.tensor([slots])
        return Attention(query, key, mask, rows, torch.tensor(self.visual)[None, :, None], SCALE)

    def _raters(self) -> torch.Tensor:
        hidden = torch.cat([self.words[:, :FRONT], self.feature, self.words[:, FRONT:]], 1)
        text = torch.tensor([self.text])
        return raters_among(text, rater_mask(hidden, torch.tensor([self.visual]), text))

    def _text(self, tap: Tap) -> tuple[torch.Tensor, torch.Tensor]:
        number = torch.arange(FRONT + BEHIND)[None]
        return self.words, number >= (FRONT if tap.of == ("behind",) else 0)

    def _ordinal(self, tap: Tap) -> torch.Tensor:
        return torch.arange(self.tokens)[None]

    def _frame(self, tap: Tap) -> tuple[torch.Tensor, torch.Tensor]:
        return self.frames_of_tokens()

    def frames_of_tokens(self) -> tuple[torch.Tensor, torch.Tensor]:
        """([1, V] the frame of each token, [1, V] its place there)."""
        at = torch.arange(self.tokens)[None]
        return at // self.places, at % self.places

    def _row(self, tap: Tap) -> torch.Tensor:
        return torch.full((1, self.tokens), self.columns)

    def _pixel(self, tap: Tap) -> torch.Tensor:
        return self.pixels

    def _neighbour(self, tap: Tap) -> tuple[torch.Tensor, torch.Tensor]:
        return neighbours_by_columns(self._segment, self._counts, self.columns)

    def _spent(self, tap: Tap) -> tuple[torch.Tensor, torch.Tensor]:
        """All tokens have been in all layers so far."""
        assert tap.layer is not None
        return self._counts, self._counts * int(tap.layer.removeprefix("language."))

    def _transition(self, tap: Tap) -> torch.Tensor:
        places = torch.arange(self.length)[None]
        return transitions(*self.block(tap.layer), torch.tensor([self.visual]), places)

    def _weights(self, tap: Tap) -> dict[str, torch.Tensor]:
        assert tap.tensors is not None
        return tap.tensors()

    def _memory(self, tap: Tap) -> dict[str, torch.Tensor]:
        """Nothing came before."""
        return {"total": torch.zeros(1, WIDTH), "frames": torch.zeros(1, dtype=torch.int64)}

    def block(self, name: str | None) -> list[torch.Tensor]:
        """[1, S, D] into and out of a layer's attention, into and out of its MLP."""
        made = []
        for part in ("into attention", "out of attention", "into mlp", "out of mlp"):
            around = self.drawn(f"words {part} {name}", 1, FRONT + BEHIND, WIDTH)
            shown = self.of_tokens(f"{part} {name}", 1, WIDTH)
            made.append(torch.cat([around[:, :FRONT], shown, around[:, FRONT:]], 1))
        return made

    @property
    def _segment(self) -> torch.Tensor:
        return torch.zeros(1, self.tokens, dtype=torch.int64)

    @property
    def _counts(self) -> torch.Tensor:
        return torch.tensor([[self.tokens]])

    # Steps ------------------------------------------------------------------------------------------------------------

    def run(self, step: Step) -> tuple[list[int], torch.Tensor | None]:
        """(what the step leaves, what these tokens are then: None where the step leaves them as they are)."""
        terms = step.exit.score if step.exit is not None else step.score
        scores: list[Any] = [{name: self.tap(tap) for name, tap in term.primitive.taps().items()} for term in terms]
        taps = {
            group: {name: self.tap(tap) for name, tap in part.taps().items()} for group, part in step.parts().items()
        }
        size = torch.tensor([self.sizes])
        made = decide(step, self.feature, size, self._segment, self._counts, scores, taps)
        there = made.chosen[0] >= 0
        return made.chosen[0][there].tolist(), None if made.feature is None else made.feature[0][there]

    def train(self, steps: tuple[Step, ...], sizes: dict[str, int], path: pathlib.Path) -> None:
        """Writes the file of weights that the steps ask for; `sizes` are those that the file decides."""
        for step in steps:
            terms = [term.primitive for term in step.score]
            for part in (*terms, *step.parts().values()):
                if isinstance(part, Trained):
                    for name, shape in part.shapes(WIDTH).items():
                        whole = f"{part.prefix}.{name}" if part.prefix else name
                        numbers = [sizes[size] if isinstance(size, str) else size for size in shape]
                        # Sums over a row of weights stay near 1.
                        self.weights[whole] = torch.randn(
                            *numbers, generator=torch.Generator().manual_seed(zlib.crc32(whole.encode()))
                        ) / math.sqrt(numbers[-1])
        if self.weights:
            safetensors.torch.save_file(self.weights, path)


def differs(got: tuple[list[int], torch.Tensor | None], want: Left, given: Given) -> str:
    """What is wrong with the answer of a step; nothing where it is the formula's."""
    left, rows = got
    if left != sorted(want):
        return f"{left} are left, {sorted(want)} by the formula"
    found = given.feature[0, left] if rows is None else rows
    wanted = torch.tensor([want[v] for v in left], dtype=torch.float64)
    # Sums of up to a hundred numbers in float32, several of them behind each other in what is trained.
    wrong = [v for v, one, other in zip(left, found, wanted, strict=True)
             if not torch.allclose(one.double(), other, rtol=1e-4, atol=1e-5)]  # fmt: skip
    return f"tokens {wrong} are not those of the formula" if wrong else ""
