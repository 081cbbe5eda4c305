"""Inputs to compare on: one sample, the batch as given, and a batch of samples of different lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tvc.errors import ArgumentError
from tvc.trace.crossing import image_function, reads_across
from tvc.trace.parts import PIXEL_NAMES, VIDEO, decoder_weight, feature_owner, keywords
from tvc.trace.sample import default_size, pixel_inputs, sample_axis, visual_token_ids, with_text
from tvc.verification.encoder import feature_parts

Inputs = dict[str, torch.Tensor]


def default_inputs(model: Any, processor: Any) -> Inputs:
    """One sample with a picture made for the purpose."""
    pixels = placed(pixel_inputs(model, processor, default_size(model), images=1), model)
    with torch.no_grad():
        length = sum(image_lengths(model, pixels))
    return placed(with_text(model, pixels, [1 if reads_across(model) else length]), model)


def placed(inputs: Mapping[str, Any], model: Any) -> Inputs:
    """The tensors among `inputs`, on the model's device, numbers in its type."""
    weight = decoder_weight(model)
    tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    return {
        name: value.to(weight.device, weight.dtype if value.is_floating_point() else value.dtype)
        for name, value in tensors.items()
    }


def image_lengths(model: Any, inputs: Mapping[str, Any]) -> list[int]:
    """Visual tokens of each image (or tile), or of each video where the inputs hold videos, by the model's own code."""
    owner: Any = feature_owner(model)
    function = image_function(owner) if inputs.get(VIDEO) is None else owner.get_video_features
    return [len(part) for part in feature_parts(function(**keywords(function, inputs)))]


def left_padded(inputs: Inputs) -> Inputs:
    """The same samples with all padding in front and an attention mask.

    Raises:
        ArgumentError: there are no token ids or no image.
    """
    if "input_ids" not in inputs or not any(name in inputs for name in PIXEL_NAMES):
        raise ArgumentError(
            "these inputs cannot be verified on",
            where="inputs",
            got=f"{sorted(inputs)}",
            want="input_ids and pixel_values",
            fix="pass what the processor returns for a prompt with an image",
            slug="no-image",
        )
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    order = torch.argsort(mask.to(torch.int8), dim=1, stable=True)
    made = {name: _by_slot(value, order) if value.shape[:2] == ids.shape else value for name, value in inputs.items()}
    made["attention_mask"] = mask.gather(1, order).long()
    made.pop("position_ids", None)
    return made


def _by_slot(values: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """values [B, S, ...] with each row's slots in the order [B, S]."""
    rest = values.shape[2:]
    return values.gather(1, order.reshape(*order.shape, *[1] * len(rest)).expand(*order.shape, *rest))


def singles(model: Any, inputs: Inputs, lengths: Sequence[int]) -> list[Inputs] | None:
    """Every sample by itself, without padding; None where it is not known which pixels are whose.

    Args:
        model: for its placeholder ids.
        inputs: a left-padded batch.
        lengths: visual tokens of each image.
    """
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    batch = len(ids)
    visual = sum(((ids == token).long() for token in visual_token_ids(model)), torch.zeros_like(ids)) * mask.long()
    images = _images_per_sample(visual.sum(1).tolist(), lengths)
    rows: list[Inputs] = [{} for _ in range(batch)]
    for name, value in inputs.items():
        parts = _split(name, value, inputs, batch, images, mask)
        if parts is None:
            return None
        for row, part in zip(rows, parts, strict=True):
            row[name] = part
    return rows


def holds_image(model: Any, inputs: Inputs) -> bool:
    """Whether any token of the inputs stands for a visual feature."""
    return any(bool((inputs["input_ids"] == token).any()) for token in visual_token_ids(model))


def _images_per_sample(tokens: list[int], lengths: Sequence[int]) -> list[int] | None:
    found, left = [], list(lengths)
    for needed in tokens:
        taken = 0
        while needed > 0 and left:
            needed -= left.pop(0)
            taken += 1
        if needed != 0:
            return None
        found.append(taken)
    return found if not left else None


def _split(
    name: str, value: torch.Tensor, inputs: Inputs, batch: int, images: list[int] | None, mask: torch.Tensor
) -> list[torch.Tensor] | None:
    if value.shape[:2] == mask.shape:
        return [value[row, mask[row]][None] for row in range(batch)]
    if batch == 1:
        return [value]
    if images is not None and value.shape[0] == sum(images):
        return list(value.split(images))
    if value.shape[0] == batch:
        return list(value.split(1))
    grid = inputs.get(name.replace("pixel_values", "image_grid_thw").replace("image_grid_thw_videos", "video_grid_thw"))
    if images is not None and grid is not None and len(grid) == sum(images):
        patches = grid.prod(1)
        if int(patches.sum()) == value.shape[0]:
            return list(value.split([int(part.sum()) for part in patches.split(images)]))
    return None


def joined(model: Any, samples: Sequence[Inputs], pad: int) -> Inputs | None:
    """Samples of any length as one batch, padded on the left; None where their pixels do not fit together.

    Args:
        model: for the shape of its pixels.
        samples: one sample each.
        pad: the token that fills rows up.
    """
    width = max(sample["input_ids"].shape[1] for sample in samples)
    samples = [widened(sample, width, pad) for sample in samples]
    made: Inputs = {}
    for name in samples[0]:
        parts = [sample[name] for sample in samples]
        axis = sample_axis(model, name, parts[0])
        if len({part.shape[:-1] if axis else part.shape[1:] for part in parts}) > 1:
            return None
        made[name] = torch.cat(parts, axis)
    return made


def widened(sample: Inputs, width: int, pad: int) -> Inputs:
    """The sample with so much padding in front that it is `width` tokens long."""
    ids, made = sample["input_ids"], dict(sample)
    for name, value in sample.items():
        if value.shape[:2] == ids.shape:
            room = (*(0, 0) * (value.dim() - 2), width - value.shape[1], 0)
            made[name] = torch.nn.functional.pad(value, room, value=pad if name == "input_ids" else 0)
    return made


def lengthened(sample: Inputs, tokens: int) -> Inputs:
    """The sample with its last token `tokens` times more at its end."""
    ids = sample["input_ids"]
    return {
        name: torch.cat([value, value[:, -1:].expand(-1, tokens, *value.shape[2:])], 1)
        if value.shape[:2] == ids.shape
        else value
        for name, value in sample.items()
    }
