"""Visual tokens that are not in the decoder's sequence: its text reads them by cross-attention in some layers.

The model's own code makes them on the way of its forward to the decoder, and hands them over beside a mask that says
which of them each slot of the text reads. A row of that mask without any says to the decoder that the slot reads no
image; what such a slot reads instead is the model's affair, and is what is left of all of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from tvc.chunks import Crossing
from tvc.errors import ModelError
from tvc.trace.parts import PIXEL_NAMES, feature_owner


def reads_across(model: torch.nn.Module) -> bool:
    """Whether the text reads visual tokens by cross-attention, so that none is in the decoder's sequence."""
    return not hasattr(feature_owner(model), "get_image_features")


def image_function(owner: Any) -> Callable[..., Any]:
    """What makes visual tokens of images. `owner`: what `feature_owner` gives.

    Without `get_image_features`, a function of those inputs of the owner's forward that its decoder does not have; it
    returns what was made of them, [B, V, D], all that can be read by a sample's text one after the other.
    """
    own: Callable[..., Any] | None = getattr(owner, "get_image_features", None)
    return own if own is not None else _to_decoder(owner)


class _Handed(Exception):
    """Carries the decoder's arguments out of its caller."""

    def __init__(self, arguments: dict[str, Any]):
        self.arguments = arguments


def _to_decoder(owner: Any) -> Callable[..., Any]:
    decoder = owner.get_decoder()
    known = inspect.signature(type(decoder).forward).parameters
    forward = inspect.signature(type(owner).forward)
    beside = [one for name, one in forward.parameters.items() if name not in known]

    def states(**images: Any) -> torch.Tensor:
        def handed(*args: Any, **kwargs: Any) -> Any:
            raise _Handed({**dict(zip([name for name in known if name != "self"], args, strict=False)), **kwargs})

        batch = next(value.shape[0] for value in images.values() if isinstance(value, torch.Tensor))
        ids = torch.zeros(batch, 1, dtype=torch.int64, device=next(iter(images.values())).device)
        stood_in = vars(decoder).get("forward")
        decoder.forward = handed
        try:
            type(owner).forward(owner, input_ids=ids, **images)
        except _Handed as caught:
            return across(caught.arguments, batch)[1]
        finally:
            del decoder.forward
            if stood_in is not None:
                decoder.forward = stood_in
        raise ModelError(
            "the model's forward returned without calling its decoder",
            where=type(owner).__name__,
            got="no decoder call",
            want=f"a call of {type(decoder).__name__}",
            fix="report the model class",
            slug="decoder-not-reached",
        )

    states.__signature__ = inspect.Signature(beside)  # type: ignore[attr-defined]
    return states


def across(arguments: Mapping[str, Any], batch: int) -> tuple[str, torch.Tensor]:
    """The decoder's argument with visual tokens that are not in its sequence: its name, and its value as [B, V, D].

    Raises:
        ModelError: there is none among `arguments`, or several.
    """
    found = {
        name: value.reshape(batch, -1, value.shape[-1])
        for name, value in arguments.items()
        if name != "inputs_embeds"
        and isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and value.dim() == 3
    }
    if len(found) != 1:
        raise ModelError(
            "the decoder reads images by cross-attention in a way that is not known",
            where="decoder",
            got=f"arguments {', '.join(sorted(found)) or 'without a tensor of three axes'}",
            want="one argument with the visual tokens, [batch, tokens, width]",
            fix="a model of another way cannot be compiled",
            slug="cross-attention",
        )
    return next(iter(found.items()))


def read_crossing(given: Mapping[str, Any], batch: int, slots: int) -> Crossing:
    """By which of the decoder's arguments `given` it reads visual tokens; its layers are not known yet.

    Raises:
        ModelError: they are not of a form that is known.
    """
    states, value = across(given, batch)
    shapes = {name: tuple(one.shape) for name, one in given.items() if isinstance(one, torch.Tensor)}
    masks = [name for name, shape in shapes.items() if shape == (batch, 1, slots, value.shape[1])]
    rows = [name for name, shape in shapes.items() if shape == (batch, 1, slots, 1)]
    if len(masks) != 1 or len(rows) > 1:
        raise ModelError(
            "the sample does not say which visual tokens its text reads by cross-attention",
            where="decoder",
            got=", ".join(f"{name} {list(shape)}" for name, shape in sorted(shapes.items())),
            want=f"a mask of shape {[batch, 1, slots, value.shape[1]]} among the decoder's arguments",
            fix="pass all that the model's processor returned",
            slug="no-cross-mask",
        )
    return Crossing((), states, masks[0], rows[0] if rows else "")


def beside(given: Mapping[str, Any], crossing: Crossing | None) -> dict[str, Any]:
    """The decoder's arguments without those of its cross-attention."""
    own = () if crossing is None else (crossing.states, crossing.mask, crossing.rows)
    return {name: value for name, value in given.items() if name not in own}


def crossing_arguments(
    crossing: Crossing, states: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor
) -> dict[str, torch.Tensor]:
    """What the decoder takes of `states` [B, V, D], `mask` [B, 1, S, V] and `rows` [B, S]."""
    made = {crossing.states: states, crossing.mask: mask}
    return made | ({crossing.rows: rows[:, None, :, None]} if crossing.rows else {})


def seen_by(given: Mapping[str, Any], crossing: Crossing) -> torch.Tensor | None:
    """[B, S, V] bool which visual tokens each slot reads, False in the whole row of one that reads no image.

    None where the model's own code made no mask: a slot by itself then reads all.
    """
    mask = given.get(crossing.mask)
    if mask is None:
        return None
    rows = given.get(crossing.rows)
    read: torch.Tensor = mask[:, 0] >= 0
    return read if rows is None else read & (rows[:, 0] > 0)


def images_of(inputs: Mapping[str, torch.Tensor]) -> int:
    """Images of a sample at most, where a tower takes samples of several, else 0.

    Their pixels are [B, images, tiles, C, H, W].
    """
    pixels = [inputs[name] for name in PIXEL_NAMES if name in inputs]
    return pixels[0].shape[1] if pixels and pixels[0].dim() > 5 else 0


def each_image_apart(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a tower takes of samples of several images, as samples of one each: no image sees another."""
    if not images_of(inputs):
        return dict(inputs)
    return {name: tensor.flatten(0, 1).unsqueeze(1) for name, tensor in inputs.items()}


def images_together(outputs: Mapping[str, torch.Tensor], inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a graph made of `each_image_apart(inputs)`, by samples again."""
    images = images_of(inputs)
    if not images:
        return dict(outputs)
    return {name: tensor.reshape(-1, images, *tensor.shape[2:]) for name, tensor in outputs.items()}
