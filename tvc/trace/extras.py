"""What a model hands to its decoder beside embeddings, positions and masks, slot by slot.

Some models add features of the vision encoder again behind early layers, or feed every layer embeddings of its own. Any
argument that says something of every slot, or of every visual token, travels with the chunk and is cut with it. Rows of
visual tokens are laid out over the slots first: picking them out by a mask and putting them back, as the model's code
does, becomes arithmetic on all slots while that code is traced.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from tvc.chunks import EXTRA, Extra, blank
from tvc.errors import ModelError

# Rebuilt inside the graph, or of no effect on what the layers compute.
_OWN = ("attention_mask", "past_key_values", "cache_position")


def read_extras(given: Mapping[str, Any], visual: torch.Tensor) -> tuple[Extra, ...]:
    """The extras among the decoder's arguments `given`, for a chunk whose visual slots are `visual` [B, S] bool.

    Raises:
        ModelError: an argument holds a tensor that belongs neither to slots nor to visual tokens.
    """
    found = []
    for name, value in _leaves(given):
        if value.shape[:2] == visual.shape:
            by_token, trailing = False, value.shape[2:]
        elif value.dim() > 1 and value.shape[0] == int(visual.sum()):
            by_token, trailing = True, value.shape[1:]
        else:
            raise ModelError(
                "the decoder takes values that belong to no token",
                where=f"decoder, argument {name.removeprefix(EXTRA)}",
                got=f"a tensor of shape {list(value.shape)}",
                want="one row for each slot of the sequence, or for each visual token",
                fix="models whose visual features reach the decoder in another way cannot be compiled",
                slug="decoder-extra-input",
            )
        dtype = "" if value.is_floating_point() else str(value.dtype).removeprefix("torch.")
        found.append(Extra(name, by_token, tuple(trailing), dtype))
    return tuple(found)


def laid_out(
    given: Mapping[str, Any], extras: tuple[Extra, ...], visual: torch.Tensor, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Every extra as [B, S, ...]; zeros where this chunk comes without it."""
    leaves = dict(_leaves(given))
    made = {}
    for extra in extras:
        value = leaves.get(extra.name)
        room = blank(extra, visual.shape[0], visual.shape[1], dtype).to(visual.device)
        if value is not None and extra.visual:
            room[visual] = value.to(room)
        elif value is not None:
            room = value.to(room)
        made[extra.name] = room
    return made


def arguments(
    extras: tuple[Extra, ...], values: Mapping[str, torch.Tensor], given: Mapping[str, Any]
) -> dict[str, Any]:
    """The decoder's arguments with the values of the extras in them, nested as the model's own code nests them."""
    return {name: _nested(name, value, values) for name, value in given.items() if _held(name, extras)}


def structure(given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` without its tensors: what `arguments` needs to know of it."""
    return {name: _without_tensors(value) for name, value in given.items() if name not in _OWN}


def _held(name: str, extras: tuple[Extra, ...]) -> bool:
    return any(extra.name == f"{EXTRA}{name}" or extra.name.startswith(f"{EXTRA}{name}.") for extra in extras)


def _leaves(given: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in given.items():
        if name not in _OWN:
            yield from _walk(f"{EXTRA}{name}", value)


def _walk(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _walk(f"{name}.{key}", item)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _walk(f"{name}.{index}", item)


def _without_tensors(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_tensors(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_tensors(item) for item in value]
    return None


def _nested(name: str, value: Any, values: Mapping[str, torch.Tensor]) -> Any:
    """`value`, a structure without tensors, with those of `values` in their places."""

    def fill(path: str, item: Any) -> Any:
        if isinstance(item, Mapping):
            return {key: fill(f"{path}.{key}", inner) for key, inner in item.items()}
        if isinstance(item, list):
            return [fill(f"{path}.{index}", inner) for index, inner in enumerate(item)]
        return values.get(path)

    return fill(f"{EXTRA}{name}", value)


class _OnAllSlots(TorchFunctionMode):
    """Rows that a mask [B, S] picks out stay where they are; rows put back by it are chosen between slot by slot."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.Tensor.__getitem__ and _by_slot(args[0], args[1]):
            return args[0].clone()
        if function is torch.Tensor.__setitem__ and _by_slot(args[0], args[1]):
            hidden, mask, rows = args[0], _mask_of(args[1]), args[2]
            hidden.copy_(torch.where(_spread(mask, hidden), rows, hidden))
            return None
        if function in (torch.Tensor.masked_scatter, torch.masked_scatter):
            hidden, mask, rows = args[0], args[1], args[2] if len(args) > 2 else kwargs["source"]
            if rows.numel() == hidden.numel():
                return torch.where(_spread(mask, hidden), rows.reshape(hidden.shape), hidden)
        return function(*args, **kwargs)


@contextlib.contextmanager
def on_all_slots(extras: tuple[Extra, ...]) -> Iterator[None]:
    """While the decoder's code runs inside the block, rows of visual tokens are laid out over all slots."""
    if not any(extra.visual for extra in extras):
        yield
        return
    with _OnAllSlots():
        yield


def _mask_of(index: Any) -> Any:
    return index[0] if isinstance(index, tuple) and index else index


def _by_slot(hidden: Any, index: Any) -> bool:
    mask = _mask_of(index)
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool or mask.dim() != 2 or hidden.dim() != 3:
        return False
    rest = index[1:] if isinstance(index, tuple) else ()
    return all(isinstance(part, slice) and part == slice(None) for part in rest)


def _spread(mask: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    return mask.unsqueeze(-1) if mask.dim() < hidden.dim() else mask
