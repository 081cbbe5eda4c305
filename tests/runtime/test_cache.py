"""The cache of a compiled decoder: layers with keys and values, and layers with a state, go the same way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tvc.chunks import DecoderShape
from tvc.errors import InputError
from tvc.runtime.cache import StagedCache

BATCH, STAGES = 3, (5, 2)  # tokens that each stage holds
SHAPE = DecoderShape(8, 0, ((2, 4, 6), (7, 3), (1, 5, 5)), torch.float32, torch.device("cpu"))
PLACES = [torch.tensor([[0, 1, 2, 3, 4], [-1, 0, 1, 2, 3], [-1, -1, 0, 1, 2]]), torch.tensor([[0, 4], [0, 3], [0, 2]])]

MARKS = {"visual.1": torch.tensor([[True, False], [False, True], [True, True]]), "seen.1": torch.rand(BATCH, 2)}
MARKS |= {"memory.language.0.0.total": torch.rand(BATCH, 8), "memory.language.0.0.frames": torch.tensor([4, 0, 7])}


def held() -> dict[str, torch.Tensor]:
    sizes = {"key.0": (2, 5, 4), "value.0": (2, 5, 6), "state.1": (7, 3), "key.2": (1, 2, 5), "value.2": (1, 2, 5)}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(BATCH, *size, generator=generator) for name, size in sizes.items()}


def made() -> StagedCache:
    return StagedCache(SHAPE, held(), PLACES, seen=9, saved=torch.tensor([5, 0, 7]), marks=MARKS)


MOVES: dict[str, tuple[Callable[[Any], None], list[int]]] = {
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([1, 1, 0])), [1, 1, 0]),
}


@pytest.mark.parametrize("name", held())
def test_inputs_find_what_the_outputs_gave(name: str) -> None:
    assert torch.equal(made().tensor(f"past_{name}"), held()[name])


@pytest.mark.parametrize("move", MOVES)
def test_a_move_takes_every_tensor_along(move: str) -> None:
    cache, (act, rows) = made(), MOVES[move]
    act(cache)
    for name, before in held().items():
        assert torch.equal(cache.tensor(f"past_{name}"), torch.stack([before[row] for row in rows])), name
    for places, before in zip(cache.key_positions, PLACES, strict=True):
        assert places.tolist() == [before[row].tolist() for row in rows]
    assert cache.saved is not None
    assert cache.saved.tolist() == [[5, 0, 7][row] for row in rows]
    assert {name: mark.tolist() for name, mark in cache.marks.items()} == {
        name: [mark[row].tolist() for row in rows] for name, mark in MARKS.items()
    }
    assert cache.get_seq_length() == 9


def test_moves_follow_each_other() -> None:
    cache = made()
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([5, 0, 3, 3, 1, 2]))
    cache.batch_select_indices(torch.tensor([0, 2]))
    for name, before in held().items():
        assert torch.equal(cache.tensor(f"past_{name}"), before[[2, 1]]), name


def test_a_move_leaves_the_tensors_of_others_alone() -> None:
    values = held()
    cache = StagedCache(SHAPE, values, PLACES, seen=9)
    cache.reorder_cache(torch.tensor([2, 2, 2]))
    for name, before in held().items():
        assert torch.equal(values[name], before)
    assert PLACES[0][0].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("layer", range(3))
def test_masks_are_made_over_the_whole_sequence(layer: int) -> None:
    """However few tokens a layer has left."""
    assert made().get_mask_sizes(4, layer) == (13, 0)
    assert made().get_seq_length(layer) == 9


def test_tokens_are_not_taken_back_out() -> None:
    with pytest.raises(InputError) as caught:
        made().crop(-1)
    assert caught.value.slug == "no-rollback"
