"""What decoders take beside embeddings: found, laid out over the slots, handed on; and rows that their code picks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tvc.chunks import Extra
from tvc.errors import ModelError
from tvc.trace.extras import arguments, laid_out, on_all_slots, read_extras, structure

VISUAL = torch.tensor([[False, True, True, False], [True, False, True, True]])  # five of eight slots
ROWS = 5


def given() -> dict[str, Any]:
    """A decoder's arguments: rows of visual tokens in a list, values of every slot in a mapping; and no extras."""
    return {
        "attention_mask": torch.zeros(2, 1, 4, 4),
        "past_key_values": None,
        "cache_position": torch.arange(4),
        "use_cache": True,
        "visual_pos_masks": VISUAL,
        "deepstack": [torch.randn(ROWS, 3), torch.randn(ROWS, 3)],
        "per_layer": {"early": torch.randn(2, 4, 6, 2), "late": (torch.randint(9, (2, 4)), None)},
    }


EXTRAS = (
    Extra("extra.visual_pos_masks", False, (), "bool"),
    Extra("extra.deepstack.0", True, (3,), ""),
    Extra("extra.deepstack.1", True, (3,), ""),
    Extra("extra.per_layer.early", False, (6, 2), ""),
    Extra("extra.per_layer.late.0", False, (), "int64"),
)


def test_every_tensor_of_slots_or_visual_tokens_is_found() -> None:
    assert read_extras(given(), VISUAL) == EXTRAS
    assert read_extras({"attention_mask": torch.zeros(7), "use_cache": True}, VISUAL) == ()


@pytest.mark.parametrize("value", (torch.zeros(3, 4), torch.zeros(ROWS), torch.zeros(()), torch.zeros(2, 3, 4)))
def test_a_tensor_of_no_token_is_refused_by_name(value: torch.Tensor) -> None:
    with pytest.raises(ModelError, match=r"decoder, argument cross\.1") as caught:
        read_extras({"cross": [None, value]}, VISUAL)
    assert caught.value.slug == "decoder-extra-input"


def test_rows_are_laid_out_over_the_slots() -> None:
    values = given()
    made = laid_out(values, EXTRAS, VISUAL, torch.float64)
    assert list(made) == [extra.name for extra in EXTRAS]
    rows = iter(values["deepstack"][1])
    for b in range(2):
        for s in range(4):
            want = next(rows) if VISUAL[b, s] else torch.zeros(3)
            assert made["extra.deepstack.1"][b, s].tolist() == want.double().tolist()
    assert made["extra.deepstack.1"].dtype == torch.float64
    assert torch.equal(made["extra.per_layer.early"], values["per_layer"]["early"].double())
    assert torch.equal(made["extra.per_layer.late.0"], values["per_layer"]["late"][0])
    assert made["extra.visual_pos_masks"].dtype == torch.bool


@pytest.mark.parametrize("values", ({}, {"deepstack": None, "per_layer": {"late": ()}}))
def test_a_chunk_without_them_has_zeros(values: dict[str, Any]) -> None:
    made = laid_out(values, EXTRAS, torch.zeros(3, 1, dtype=torch.bool), torch.float32)
    for extra in EXTRAS:
        assert made[extra.name].shape == (3, 1, *extra.trailing)
        assert not made[extra.name].any()
        assert str(made[extra.name].dtype).removeprefix("torch.") == (extra.dtype or "float32")


def test_arguments_are_nested_as_they_came() -> None:
    values = given()
    made = laid_out(values, EXTRAS, VISUAL, torch.float32)
    handed = arguments(EXTRAS, made, structure(values))
    assert handed == {
        "visual_pos_masks": made["extra.visual_pos_masks"],
        "deepstack": [made["extra.deepstack.0"], made["extra.deepstack.1"]],
        "per_layer": {"early": made["extra.per_layer.early"], "late": [made["extra.per_layer.late.0"], None]},
    }


def test_names_that_begin_alike_are_not_mixed_up() -> None:
    values = {"deep": torch.randn(ROWS, 2), "deepstack": torch.randn(ROWS, 3), "deepest": True}
    extras = read_extras(values, VISUAL)
    handed = arguments(extras, laid_out(values, extras, VISUAL, torch.float32), structure(values))
    assert {name: value.shape[2] for name, value in handed.items()} == {"deep": 2, "deepstack": 3}


def _added(hidden: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    hidden = hidden.clone()
    hidden[mask] = hidden[mask] + rows
    return hidden


def _added_by_name(hidden: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    hidden = hidden.clone()
    local = hidden[mask, :].clone() + rows
    hidden[mask, :] = local
    return hidden


def _scattered(hidden: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    spread = mask.unsqueeze(-1).expand_as(hidden)
    return hidden.masked_scatter(spread, rows * 2)


def _scattered_by_function(hidden: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return torch.masked_scatter(hidden, mask.unsqueeze(-1), source=hidden[mask] - rows)


Idiom = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@pytest.mark.parametrize("idiom", (_added, _added_by_name, _scattered, _scattered_by_function))
@pytest.mark.parametrize("visual", (VISUAL, torch.zeros_like(VISUAL), torch.ones_like(VISUAL)))
def test_rows_on_all_slots_equal_packed_rows(idiom: Idiom, visual: torch.Tensor) -> None:
    hidden, rows = torch.randn(2, 4, 3), torch.randn(int(visual.sum()), 3)
    before = hidden.clone()
    extras = (Extra("extra.rows", True, (3,), ""),)
    spread = laid_out({"rows": rows}, extras, visual, torch.float32)["extra.rows"]
    with on_all_slots(extras):
        got = idiom(hidden, visual, spread)
    assert torch.equal(got, idiom(hidden, visual, rows))
    assert torch.equal(hidden, before)


def test_without_rows_of_visual_tokens_nothing_changes() -> None:
    hidden = torch.randn(2, 4, 3)
    with on_all_slots(EXTRAS[:1]):
        assert torch.equal(hidden[VISUAL], torch.stack([hidden[b, s] for b, s in VISUAL.nonzero().tolist()]))


def test_other_masks_mean_what_they_mean() -> None:
    """A mask over elements, over features alone, or beside an index is no mask of slots."""
    hidden = torch.arange(24.0).reshape(2, 4, 3)
    with on_all_slots(EXTRAS):
        assert hidden[hidden > 20].tolist() == [21.0, 22.0, 23.0]
        assert hidden[VISUAL, 0].tolist() == [3.0, 6.0, 12.0, 18.0, 21.0]
        assert hidden[0][VISUAL[0]].tolist() == [[3.0, 4.0, 5.0], [6.0, 7.0, 8.0]]
        hidden[hidden > 20] = 0
    assert hidden[1, 3].tolist() == [0.0, 0.0, 0.0]
