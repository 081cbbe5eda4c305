"""Positions by hand: what the decoder's rotary embedding makes of others than the model's own."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch

from tvc.errors import TraceError
from tvc.policy.positions import WHOLE, Rescale


def in_fractions(mask: torch.Tensor, image: torch.Tensor, first: int, stride: int) -> torch.Tensor:
    """[S] float32 position of every token, one after the other, where a visual one takes `stride` / 256; pads 0.

    Args:
        mask: [S] bool, False at padding.
        image: [S] int64 number of the image that a token is of, -1 for text.
        first: position of a first token of text.
    """
    made = torch.zeros(len(mask), dtype=torch.float32)
    last, front, count, within = float(first - 1), 0, 0, -1
    for column in mask.nonzero().flatten().tolist():
        number = int(image[column])
        if number < 0:
            last = math.ceil(last) + 1
        else:
            if number != within:
                front, count = math.ceil(last), 0
            count += 1
            last = front + count * stride / WHOLE
        within, made[column] = number, last
    return made.to(mask.device)


def all_in_fractions(mask: torch.Tensor, image: torch.Tensor, positions: torch.Tensor, stride: int) -> torch.Tensor:
    """[B, S] float32: `in_fractions` of every sample, which starts where the model's own `positions` [B, S] do.

    Args:
        mask: [B, S] bool, of a prompt and what was generated behind it.
        image: [B, P] int64, of the prompt alone.
    """
    image = torch.nn.functional.pad(image, (0, mask.shape[1] - image.shape[1]), value=-1)
    return torch.stack(
        [
            in_fractions(real, images, int(numbers[real][0]), stride)
            for real, images, numbers in zip(mask, image, positions, strict=True)
        ]
    )


@contextlib.contextmanager
def at_frequencies(module: Any, rule: Rescale) -> Iterator[None]:
    """Inside the block a rotary embedding turns by the frequencies that YaRN (arXiv:2309.00071) gives, counted by hand.

    Of the i-th of d / 2 frequencies b^(-2i / d), one that turns r times within the window has i = d ln(window / 2 pi r)
    / (2 ln b). Between that of `fast` turns, rounded down, and that of `slow` ones, rounded up, their division by the
    factor sets in step by step; sines and cosines grow by 0.1 ln factor + 1.
    """
    config, before = module.config, (module.inv_freq, module.attention_scaling)
    base, pairs = config.rope_parameters["rope_theta"], len(before[0])
    length = rule.window or config.max_position_embeddings

    def place(turns: float) -> float:
        return pairs * math.log(length / (2 * math.pi * turns)) / math.log(base)

    low, high = max(math.floor(place(rule.fast)), 0), min(math.ceil(place(rule.slow)), 2 * pairs - 1)
    made = []
    for number in range(pairs):
        share = min(max((number - low) / (high - low or 0.001), 0.0), 1.0)
        made.append(base ** (-number / pairs) * (share / rule.factor + 1 - share))
    module.inv_freq = torch.tensor(made, dtype=torch.float32, device=before[0].device)
    module.attention_scaling = 0.1 * math.log(rule.factor) + 1
    try:
        yield
    finally:
        module.inv_freq, module.attention_scaling = before


class Rotary:
    """The calls of a decoder's rotary embeddings, made again for other positions."""

    def __init__(self, decoder: torch.nn.Module):
        self.modules = [part for name, part in decoder.named_children() if "rotary" in name]
        self._name = type(decoder).__name__
        self._calls: list[tuple[Any, Any, tuple[Any, ...], dict[str, Any]]] = []  # what came out, and the call
        self._again = False

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Inside the block calls of `modules` are noted."""

        def seen(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if not self._again:
                self._calls.append((output, module, args, kwargs))

        with contextlib.ExitStack() as stack:
            for module in self.modules:
                stack.callback(module.register_forward_hook(seen, with_kwargs=True).remove)
            yield

    def at(self, positions: torch.Tensor, given: Any) -> Any:
        """Position embeddings for `positions`, of the kind of the embeddings `given` to a block."""
        if not self._calls:
            raise TraceError(
                "the decoder has no rotary module whose positions could be numbered afresh",
                where="verification",
                got=self._name,
                want="a decoder with rotary_emb",
                fix="write positions: keep, or compile with verify=False",
                slug="no-rotary",
            )
        alike = [call for output, *call in self._calls if output is given] or [list(self._calls[-1][1:])]
        module, args, kwargs = alike[-1]
        if "position_ids" in kwargs:
            kwargs = {**kwargs, "position_ids": positions}
        else:
            args = (args[0], positions, *args[2:])
        self._again = True
        made = module(*args, **kwargs)
        self._again = False
        return made

    def unturned(self, mask: torch.Tensor, axes: int, given: Any) -> Any:
        """Position embeddings that turn no token: those of position 0, where every rotation begins.

        Args:
            mask: [B, S], of which the shape alone is read.
            axes: rotary axes of the positions, 0 for plain ones.
        """
        zeros = torch.zeros_like(mask, dtype=torch.int64)
        return self.at(zeros.expand(axes, *zeros.shape) if axes else zeros, given)
