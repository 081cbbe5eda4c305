"""Decoders of a few lines that use positions in one way each, and what is found of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tvc.trace.position_use import PositionUse, tells_grid

TABLE = torch.zeros(40, 6)
HIDDEN = torch.randn(2, 5, 6)


def rotary(positions: torch.Tensor) -> torch.Tensor:
    return HIDDEN * (positions[:, :, None].float() * torch.ones(6)).cos()


def promoted(positions: torch.Tensor) -> torch.Tensor:
    return positions[:, :, None] * torch.ones(6)


def embedded(positions: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.embedding(positions.clamp(min=0) + 2, TABLE)


def indexed(positions: torch.Tensor) -> torch.Tensor:
    return TABLE[positions * 1]


def gathered(positions: torch.Tensor) -> torch.Tensor:
    return TABLE.expand(2, -1, -1).gather(1, positions[:, :, None].expand(-1, -1, 6))


def picked(positions: torch.Tensor) -> torch.Tensor:
    return TABLE.index_select(0, positions.reshape(-1))


def both(positions: torch.Tensor) -> torch.Tensor:
    return rotary(positions) + embedded(positions)


def unused(_positions: torch.Tensor) -> torch.Tensor:
    return HIDDEN * 2


def compared(positions: torch.Tensor) -> torch.Tensor:
    return HIDDEN.masked_fill((positions[:, :, None] < 0), 0.0)


def experts(positions: torch.Tensor) -> torch.Tensor:
    """What hidden states choose is no position, though positions have turned them."""
    return TABLE[rotary(positions).argmax(-1)]


@pytest.mark.parametrize(
    ("decoder", "want"),
    [
        (rotary, ""),
        (promoted, ""),
        (experts, ""),
        (embedded, "it looks positions up in a table"),
        (indexed, "it looks positions up in a table"),
        (gathered, "it looks positions up in a table"),
        (picked, "it looks positions up in a table"),
        (both, "it looks positions up in a table"),
        (unused, "it takes no positions"),
        (compared, "it takes no positions"),
    ],
)
def test_what_a_decoder_does_with_positions_is_seen(decoder: Callable[[torch.Tensor], torch.Tensor], want: str) -> None:
    positions = torch.arange(5).repeat(2, 1)
    with PositionUse(positions) as use:
        decoder(positions)
    assert use.whole(0) == want


def test_several_axes_are_the_first_reason() -> None:
    positions = torch.arange(5).repeat(3, 2, 1)
    with PositionUse(positions) as use:
        rotary(positions[0])
    assert use.whole(3) == use.kept(3) == "its tokens have positions on 3 axes"


ADDED = "it adds positions to its tokens before its first layer"


@pytest.mark.parametrize(
    ("front", "layer", "want"),
    [
        (lambda _p: (HIDDEN, None), lambda _made, p: rotary(p), ""),
        (lambda p: (HIDDEN, p.float() * 2), lambda made, _p: HIDDEN * made[:, :, None].cos(), ""),
        (lambda p: (HIDDEN + embedded(p), p.float()), lambda made, _p: HIDDEN * made[:, :, None], ""),
        (lambda _p: (HIDDEN, None), lambda _made, p: embedded(p), ""),  # as good as numbers, asked in the layer
        (lambda p: (HIDDEN + embedded(p), None), lambda _made, _p: HIDDEN, ADDED),
        (lambda p: (HIDDEN + embedded(p), p.float()), lambda _made, _p: HIDDEN, ADDED),  # handed on for nothing
        (lambda p: (rotary(p), None), lambda _made, _p: HIDDEN, ADDED),
        (lambda _p: (HIDDEN, None), lambda _made, _p: HIDDEN, "it takes no positions"),
    ],
)
def test_positions_count_behind_a_cut_where_layers_use_them(front: Any, layer: Any, want: str) -> None:
    positions = torch.arange(5).repeat(2, 1)
    with PositionUse(positions) as use:
        hidden, made = front(positions)
        use.entering_layers(hidden)
        layer(made, positions) + hidden.relu()
    assert use.kept(0) == want


def placed(rows: int, columns: int, axes: tuple[int, ...] = (0, 1, 2)) -> torch.Tensor:
    """[3, 1, S] a word, a picture on the axes of time, rows and columns, and two words."""
    at = torch.meshgrid(torch.zeros(1, dtype=torch.int64), torch.arange(rows), torch.arange(columns), indexing="ij")
    picture = torch.stack(at).flatten(1)[list(axes)] + 1
    words = torch.arange(2).expand(3, -1) + int(picture.max()) + 1
    return torch.cat([torch.zeros(3, 1, dtype=torch.int64), picture, words], 1)[:, None]


@pytest.mark.parametrize(
    ("positions", "told"),
    [
        (placed(2, 3), True),
        (placed(2, 3).float(), True),
        (placed(2, 3, axes=(0, 2, 1)), False),  # columns where rows should be
        (placed(1, 6), False),  # one row: not to be told from text
        (torch.arange(9).expand(3, 1, -1), False),  # a text's
        (torch.arange(9)[None], False),
        (placed(2, 3).repeat(2, 1, 1)[:4], False),
        (None, False),
    ],
)
def test_positions_tell_a_grid_or_they_do_not(positions: torch.Tensor | None, told: bool) -> None:
    visual = torch.tensor([[False, *[True] * 6, False, False]])
    assert tells_grid(positions, visual) is told
