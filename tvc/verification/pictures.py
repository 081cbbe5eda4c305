"""What visual tokens show, on the untouched model: the pixels of each, and which token is beside which."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tvc.trace.layout import residual_argument
from tvc.trace.observe import Observer, observed
from tvc.trace.parts import PIXEL_NAMES
from tvc.verification.encoder import flat_features, numbered, unmapped
from tvc.verification.steps import Sample

_DIRECTIONS = 3  # one alone may come out at zero for a pixel


class _Entered(Exception):
    """Ends the call in front of the encoder's first block."""


class _First(Observer):
    hidden: torch.Tensor | None = None

    def entering(self, component: str, index: int, block: torch.nn.Module, arguments: dict[str, Any]) -> None:
        if component == "vision" and index == 0:
            self.hidden = arguments[residual_argument(block)]
            raise _Entered


def token_pixels(model: torch.nn.Module, inputs: Mapping[str, Any], owner: torch.Tensor, number: int) -> torch.Tensor:
    """[number, P] float32: the pixels that each visual token was made from, in their order; zeros where it has none.

    In front of the first block, where tokens do not see each other yet, a pixel moves the token that it is part of and
    no other one; blocks leave tokens where they are.

    Args:
        owner: [tokens] the visual token that each encoder token ends in, -1 for none.
        number: how many visual tokens there are.

    Raises:
        TraceError: a pixel is part of several tokens, or tokens have different numbers of pixels.
    """
    name = next(name for name in PIXEL_NAMES if name in inputs)
    pixels, observer = inputs[name].detach().clone().requires_grad_(), _First()
    with torch.enable_grad(), observed(model, observer):
        with contextlib.suppress(_Entered):
            flat_features(model, {**inputs, name: pixels})
        if observer.hidden is None or not observer.hidden.requires_grad:
            raise unmapped("what enters the encoder does not depend on the pixels")
        hidden = observer.hidden.flatten(0, -2)
        generator = torch.Generator().manual_seed(0)
        directions = torch.randn(hidden.shape[1], _DIRECTIONS, generator=generator).to(hidden)
        told = (hidden @ directions).unbind(1)

        def gradient(weights: torch.Tensor) -> torch.Tensor:
            sums = [(one * weights.to(one)).sum() for one in told]
            made = [torch.autograd.grad(total, pixels, retain_graph=True)[0].flatten() for total in sums]
            return torch.stack(made, 1).double()

        token = numbered(gradient, len(hidden), hidden.device)
    of = torch.where(token < 0, -1, owner[token.clamp(min=0)])
    used = (of >= 0).nonzero().flatten()
    order = used[of[used].argsort(stable=True)]
    each = torch.bincount(of[used], minlength=number)
    if len(set(each[each > 0].tolist())) > 1:
        raise unmapped("visual tokens have different numbers of pixels")
    made = torch.zeros(number, int(each.max()), device=pixels.device)
    made[each > 0] = pixels.detach().float().flatten()[order].reshape(-1, made.shape[1])
    return made


class Pictures:
    """The images and videos of a batch, numbered as they come: which tokens each has, and how long its rows are."""

    def __init__(self) -> None:
        self.columns: list[int] = []  # tokens in a row, 0: not told
        self.shown: list[torch.Tensor] = []  # per sample [V] the one that each visual token is of

    def note(self, lengths: Sequence[int], grids: torch.Tensor | None) -> None:
        """Adds pictures of so many visual tokens, each made of several patches that are a square.

        Args:
            grids: [N, 3] frames, rows and columns of the patches of each; None where the model takes none.
        """
        told = grids.tolist() if grids is not None and len(grids) == len(lengths) else [(0, 0, 0)] * len(lengths)
        for length, (frames, height, width) in zip(lengths, told, strict=True):
            side = math.isqrt(frames * height * width // max(length, 1))
            self.columns.append(width // side if side else 0)

    def rows(self, sample: Sample) -> torch.Tensor:
        """[1, V] int64 how many tokens the row of each visual token of a sample has."""
        shown = self.shown[sample.row][sample.number].tolist()
        return torch.tensor([[self._width(picture) for picture in shown]], device=sample.number.device).long()

    def _width(self, picture: int) -> int:
        if not self.columns[picture]:
            raise unmapped("the inputs name no grid of rows and columns")
        return self.columns[picture]

    def beside(
        self, sample: Sample, frames: tuple[torch.Tensor, torch.Tensor], columns: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """([1, V] the token to the right of each visual token of a sample, [1, V] the one below), -1 for none.

        Args:
            frames: [V'] the frame of each token that entered the decoder, and its place there.
            columns: the length of a row; None: as the grids of the pictures tell.
        """
        spots: dict[tuple[int, int, int], int] = {}
        shown, frame, place = (values[sample.number].tolist() for values in (self.shown[sample.row], *frames))
        for number, (picture, one, at) in enumerate(zip(shown, frame, place, strict=True)):
            width = columns or self._width(picture)
            spots[one, at // width, at % width] = number
        right, below = torch.full_like(sample.number, -1), torch.full_like(sample.number, -1)
        for (one, row, column), number in spots.items():
            right[number] = spots.get((one, row, column + 1), -1)
            below[number] = spots.get((one, row + 1, column), -1)
        return right[None], below[None]
