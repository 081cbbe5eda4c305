"""Which parts of a Hugging Face model do what: encode images, decode, give logits. Told by its own methods."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from tvc.errors import ModelError

VIDEO = "pixel_values_videos"
PIXEL_NAMES = ("pixel_values", "pixel_values_images", VIDEO)
_CROSSING = re.compile(r"(.*\.)?(cross_?attn|cross_?attention|encoder_attn)", re.IGNORECASE)


def feature_owner(model: torch.nn.Module) -> torch.nn.Module:
    """The module that makes visual tokens of images (the base model where there is one): by its `get_image_features`,
    or where the decoder reads them by cross-attention, on the way of its forward to the decoder.
    """
    base = getattr(model, "base_model", model)
    for candidate in (base, model):
        if hasattr(candidate, "get_image_features"):
            return candidate
    if cross_attentions(model):
        return base
    raise _no_features(model)


def cross_attentions(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules of the decoder that are named after cross-attention."""
    decoder: Any = model.get_decoder()  # type: ignore[operator]
    parts = decoder.named_modules() if isinstance(decoder, torch.nn.Module) else ()
    return [part for path, part in parts if _CROSSING.fullmatch(path)]


def _no_features(model: torch.nn.Module) -> ModelError:
    """The refusal of a model without `get_image_features`."""
    name = type(model).__name__
    videos = any(hasattr(part, "get_video_features") for part in (model, getattr(model, "base_model", model)))
    return ModelError(
        f"{name} does not say how its images become tokens of the decoder",
        where=name,
        got="a model of videos alone, with get_video_features" if videos else "a model without get_image_features",
        want="a model whose get_image_features gives the visual tokens that its decoder reads",
        fix=(
            "a model that takes no images cannot be compiled; take one of its kind that takes images and videos"
            if videos
            else "a model without visual tokens cannot be compiled"
        ),
        slug="no-visual-tokens",
    )


def keywords(function: Callable[..., Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of `inputs` that `function` names as parameters."""
    parameters = inspect.signature(function).parameters
    return {name: value for name, value in inputs.items() if name in parameters}


def insists_on_pixels(model: torch.nn.Module) -> bool:
    """Whether the model's forward takes no text by itself: its own `generate` then writes by the language model's."""
    parameters = inspect.signature(type(model).forward).parameters
    return any(name in parameters and parameters[name].default is inspect.Parameter.empty for name in PIXEL_NAMES)


def decoder_weight(model: torch.nn.Module) -> torch.nn.Parameter:
    """A weight of the decoder: its type is that of the tokens. Parts of an encoder may be kept in another type."""
    decoder: Any = model.get_decoder()  # type: ignore[operator]
    return next((decoder or model).parameters())


def path_of(model: torch.nn.Module, wanted: torch.nn.Module) -> str:
    return next(path for path, module in model.named_modules() if module is wanted)


def no_decoder(model: torch.nn.Module, got: str) -> ModelError:
    """The refusal of a model whose language model is not a decoder alone."""
    return ModelError(
        f"{type(model).__name__} has no text decoder of its own",
        where=type(model).__name__,
        got=got,
        want="a decoder-only language model behind the vision path",
        fix="encoder-decoder models are not supported",
        slug="no-decoder",
    )


def language_paths(model: Any) -> dict[str, str]:
    """Where the text decoder, the token embedding and what gives logits stand, by their names in a `Boundary`.

    Raises:
        ModelError: there is no decoder of its own.
    """
    decoder = model.get_decoder()
    if decoder is None or decoder is model:
        raise no_decoder(model, "get_decoder() returned nothing")
    parts = {"decoder": decoder, "embeddings": model.get_input_embeddings(), "language": model}
    wanted = {id(decoder), id(model.get_output_embeddings())}
    for module in model.modules():  # outer ones come first
        if wanted <= {id(part) for part in module.modules()}:
            parts["language"] = module
    return {name: path_of(model, part) for name, part in parts.items()}
