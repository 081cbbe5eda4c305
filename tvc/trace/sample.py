"""Sample inputs to trace with: two samples of one image each, by the model's processor or from its configuration."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.models.auto.image_processing_auto import (
    IMAGE_PROCESSOR_MAPPING_NAMES,
    get_image_processor_class_from_name,
)

from tvc.errors import ArgumentError, ModelError
from tvc.trace.crossing import image_function
from tvc.trace.families import tiles_read, token_types
from tvc.trace.parts import PIXEL_NAMES, feature_owner

IMAGE_TOKENS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")


def visual_token_ids(model: torch.nn.Module) -> tuple[int, ...]:
    """The placeholder ids of the model's configuration, the image's first."""
    found = [getattr(model.config, name, None) for name in IMAGE_TOKENS]
    return tuple(dict.fromkeys(token for token in found if isinstance(token, int)))


def default_size(model: torch.nn.Module) -> tuple[int, int]:
    """(height, width) of an image that the vision encoder takes whole: its own size, else a middling one."""
    vision = getattr(model.config, "vision_config", None)
    size = getattr(vision, "image_size", None)
    if isinstance(size, (list, tuple)):
        return int(size[0]), int(size[1])
    if isinstance(size, int):
        return size, size
    patch = _patch_size(model) * getattr(vision, "spatial_merge_size", 1)
    side = patch * max(4, 448 // patch)
    return side, side


def _patch_size(model: torch.nn.Module) -> int:
    patch = getattr(getattr(model.config, "vision_config", None), "patch_size", 14)
    return int(max(patch) if isinstance(patch, (list, tuple)) else patch)


def photo_like(height: int, width: int) -> Image.Image:
    """A smooth picture without an all-black tile (some families drop those as padding)."""
    rows, columns = np.mgrid[0:height, 0:width]
    channels = [64 + 127 * (0.5 + 0.5 * np.sin(rows / (7 + c) + columns / (11 - c))) for c in range(3)]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


def pixel_inputs(
    model: torch.nn.Module, processor: Any, size: tuple[int, int], images: int = 2
) -> dict[str, torch.Tensor]:
    """What an image processor makes of `images` pictures, one a sample."""
    made = getattr(processor, "image_processor", None) if processor is not None else None
    made = made or _image_processor(model)
    pictures = [[photo_like(*size)] for _ in range(images)]
    flat = dict(made(pictures, return_tensors="pt"))
    # Some image processors also tell their text side how many tiles they made, which no model takes.
    taken = {*inspect.signature(model.forward).parameters, *_image_arguments(model)}
    found = {name: value for name, value in flat.items() if isinstance(value, torch.Tensor) and name in taken}
    return found | _insisted_on(model, processor, pictures, found)


def _insisted_on(
    model: torch.nn.Module, processor: Any, pictures: list[list[Image.Image]], found: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """What an encoder cannot do without beside pixels (a question that it reads too), from the whole processor."""
    parameters = inspect.signature(image_function(feature_owner(model))).parameters
    wanted = {name for name, one in parameters.items() if one.default is one.empty and one.kind is not one.VAR_KEYWORD}
    if processor is None or wanted <= found.keys():
        return {}
    made = processor(images=pictures, text=["what is it?"] * len(pictures), return_tensors="pt")
    return {name: made[name] for name in parameters if name in made and name not in found}


def _image_arguments(model: torch.nn.Module) -> set[str]:
    return set(inspect.signature(image_function(feature_owner(model))).parameters)


def _image_processor(model: torch.nn.Module) -> Any:
    """The family's image processor with the sizes of the model's configuration."""
    config = model.config
    names = IMAGE_PROCESSOR_MAPPING_NAMES.get(config.model_type)
    names = (
        list(names.values()) if isinstance(names, Mapping) else [names] if isinstance(names, str) else list(names or ())
    )
    # The variant that needs no torchvision is first choice: it is always there.
    candidates = sorted((n for n in names if n), key=lambda n: not n.endswith("Pil"))
    got = "no processor and no sample inputs"
    for name in candidates:
        made = get_image_processor_class_from_name(name)
        if made is None:
            continue
        try:
            return made(**_options(made(), config))
        except ImportError as problem:
            got = " ".join(str(problem).split())
    raise ModelError(
        "no image processor can be made for this model type",
        where=str(config.model_type),
        got=got,
        want="inputs to trace with",
        fix="pass inputs=processor(images=..., text=..., return_tensors='pt')",
        slug="no-sample",
    )


def _options(default: Any, config: Any) -> dict[str, Any]:
    vision = config.vision_config
    options: dict[str, Any] = {}
    side = getattr(vision, "image_size", None)
    if isinstance(side, (list, tuple)):
        side = side[0]
    if isinstance(side, int):
        size = dict(default.size or {})
        if "longest_edge" in size and getattr(default, "max_image_size", None):
            options["size"], options["max_image_size"] = {"longest_edge": 2 * side}, {"longest_edge": side}
        elif "shortest_edge" in size and "longest_edge" not in size:
            options["size"] = {"shortest_edge": side}
        elif "height" in size:
            options["size"] = {"height": side, "width": side}
        if getattr(default, "crop_size", None):
            options["crop_size"] = {"height": side, "width": side}
    for name, source in (
        ("patch_size", "patch_size"),
        ("temporal_patch_size",) * 2,
        ("merge_size", "spatial_merge_size"),
    ):
        if hasattr(default, name) and getattr(vision, source, None) is not None:
            options[name] = getattr(vision, source)
    if hasattr(default, "image_grid_pinpoints") and getattr(config, "image_grid_pinpoints", None):
        options["image_grid_pinpoints"] = config.image_grid_pinpoints
    return options


def with_text(
    model: torch.nn.Module, pixels: Mapping[str, torch.Tensor], lengths: list[int], text: int = 6
) -> dict[str, torch.Tensor]:
    """Full model inputs: one sample an image, `lengths[i]` placeholders between text tokens, padded on the left."""
    token = visual_token_ids(model)[0]
    vocabulary = model.config.get_text_config().vocab_size
    words = [i for i in range(3, min(vocabulary, 64)) if i not in visual_token_ids(model)]
    rows = []
    for length in lengths:
        picked = [words[(7 * i + 1) % len(words)] for i in range(text)]
        rows.append(picked[: text // 2] + [token] * length + picked[text // 2 :])
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    made = {"input_ids": ids, "attention_mask": mask, **pixels}
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        made["mm_token_type_ids"] = (ids == token).long()
    if "token_type_ids" in inspect.signature(model.forward).parameters:
        prefix = token_types(str(model.config.model_type)) == "prefix"  # type: ignore[union-attr]
        made["token_type_ids"] = torch.zeros_like(ids) if prefix else (ids == token).long()
    read = tiles_read(str(model.config.model_type))  # type: ignore[union-attr]
    if read is not None and read[1] in made:
        behind = (ids == token).long().cumsum(1) > 0
        made[read[0]] = made[read[1]][:, None].long() * behind[:, :, None, None].long()
    return made


def doubled(model: torch.nn.Module, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The user's own inputs twice over, so that no batch or image axis is 1 (a trace would make that a constant).

    Raises:
        ArgumentError: they hold no image.
    """
    tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    if not any(name in tensors for name in PIXEL_NAMES):
        raise ArgumentError(
            "the sample inputs hold no image",
            where="inputs",
            got=f"{sorted(tensors)}",
            want="pixel_values among them",
            fix="pass what the processor returns for a prompt with an image",
            slug="no-image",
        )
    return {name: torch.cat([value, value], sample_axis(model, name, value)) for name, value in tensors.items()}


def sample_axis(model: torch.nn.Module, name: str, value: torch.Tensor) -> int:
    """The axis of the input `name` along which one sample follows another: the first, but for strips of patches.

    Such a strip, [1, C, patch, n * patch], holds the patches of all images side by side; a picture is no patch high.
    """
    patch = _patch_size(model)
    strip = value.dim() == 4 and value.shape[0] == 1 and value.shape[2] == patch < value.shape[3]
    return -1 if strip and name in PIXEL_NAMES else 0
