"""What pictures become in families whose processor cannot be built here, by one function a way of doing it.

Each takes the pictures of every sample and the family's options, and returns what stands for each picture in the prompt
and the tensors that the model takes beside the tokens.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

Pictures = list[list[Image.Image]]
Made = tuple[list[str], dict[str, torch.Tensor]]


def whole(pictures: Pictures, *, side: int, text: str, pixels: str = "pixel_values", mask: str = "") -> Made:
    """Square pictures of one size, each as many tokens as the next; with `mask`, padded instead of distorted."""
    if not mask:
        tensors = [_pixels(picture, (side, side)) for picture in _flat(pictures)]
        return [text] * len(tensors), {pixels: torch.stack(tensors)}
    tensors = [_pixels(picture, _sides(picture, 1, side)) for picture in _flat(pictures)]
    real = [torch.ones(1, *tensor.shape[1:], dtype=torch.bool) for tensor in tensors]
    return [text] * len(tensors), {pixels: _padded(tensors, side), mask: _padded(real, side)[:, 0]}


def whole_rows(
    pictures: Pictures, *, patch: int, merge: int, longest: int, token: str, row_end: str, image_end: str
) -> Made:
    """Pictures of their own shape, padded to one size; every row of patches ends in a token (Pixtral)."""
    cell = patch * merge
    tensors = [_pixels(picture, _sides(picture, cell, longest)) for picture in _flat(pictures)]
    rows = [(tensor.shape[1] // cell, tensor.shape[2] // cell) for tensor in tensors]
    texts = [row_end.join([token * wide] * high) + image_end for high, wide in rows]
    sizes = torch.tensor([tensor.shape[1:] for tensor in tensors])
    return texts, {"pixel_values": _padded(tensors), "image_sizes": sizes}


def patch_rows(pictures: Pictures, *, patch: int, merge: int, longest: int, token: str, start: str, end: str) -> Made:
    """Flattened patches of pictures of their own shape, padded to one number of patches (SigLIP 2 NaFlex)."""
    cell = patch * merge
    tensors = [_pixels(picture, _sides(picture, cell, longest)) for picture in _flat(pictures)]
    shapes = torch.tensor([(tensor.shape[1] // patch, tensor.shape[2] // patch) for tensor in tensors])
    most = int(shapes.prod(1).max())
    rows = [_patches(tensor, patch) for tensor in tensors]
    texts = [start + token * (int(high) * int(wide) // merge**2) + end for high, wide in shapes]
    mask = (torch.arange(most) < shapes.prod(1)[:, None]).long()
    values = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return texts, {"pixel_values": values, "spatial_shapes": shapes, "pixel_attention_mask": mask}


def placed_patches(
    pictures: Pictures, *, patch: int, merge: int, longest: int, token: str, start: str, end: str
) -> Made:
    """Flattened patches with their columns and rows, -1 where there is none (Gemma 4)."""
    tensors = [_pixels(picture, _sides(picture, patch * merge, longest)) for picture in _flat(pictures)]
    grids = [(tensor.shape[1] // patch, tensor.shape[2] // patch) for tensor in tensors]
    places = [torch.cartesian_prod(torch.arange(high), torch.arange(wide)).flip(1) for high, wide in grids]
    texts = [start + token * (high * wide // merge**2) + end for high, wide in grids]
    pad = torch.nn.utils.rnn.pad_sequence
    values = pad([_patches(tensor / 2 + 0.5, patch) for tensor in tensors], batch_first=True)
    return texts, {"pixel_values": values, "image_position_ids": pad(places, batch_first=True, padding_value=-1)}


def tiles(pictures: Pictures, *, side: int, text: str) -> Made:
    """Every picture whole, then its two halves: [images, 3, 3, side, side]."""
    stacks = []
    for picture in _flat(pictures):
        wide, high = picture.size
        parts = [picture, picture.crop((0, 0, wide // 2, high)), picture.crop((wide // 2, 0, wide, high))]
        stacks.append(torch.stack([_pixels(part, (side, side)) for part in parts]))
    return [text * 3] * len(stacks), {"pixel_values": torch.stack(stacks)}


def patch_stack(pictures: Pictures, *, patch: int, merge: int, longest: int, token: str, start: str, end: str) -> Made:
    """Patches row by row, those of all pictures in one: [patches, 3, patch, patch] (Kimi)."""
    tensors = [_pixels(picture, _sides(picture, patch * merge, longest)) for picture in _flat(pictures)]
    grids = torch.tensor([(1, tensor.shape[1] // patch, tensor.shape[2] // patch) for tensor in tensors])
    rows = [_patches(tensor, patch).reshape(-1, patch, patch, 3).permute(0, 3, 1, 2) for tensor in tensors]
    texts = [start + token * (int(grid.prod()) // merge**2) + end for grid in grids]
    return texts, {"pixel_values": torch.cat(rows), "image_grid_thw": grids}


def patch_grids(pictures: Pictures, *, patch: int, merge: int, longest: int, token: str) -> Made:
    """Flattened patches, those of all pictures in one: [patches, 3 * patch * patch] (Nemotron Omni)."""
    texts, made = patch_stack(pictures, patch=patch, merge=merge, longest=longest, token=token, start="", end="")
    return texts, {"pixel_values": made["pixel_values"].flatten(1), "image_grid_hw": made["image_grid_thw"][:, 1:]}


def patches_of_whole(pictures: Pictures, *, side: int, patch: int, token: str, row_end: str) -> Made:
    """Flattened patches of square pictures: [images, patches, patch * patch * 3] (Fuyu)."""
    rows = [_patches(_pixels(picture, (side, side)), patch) for picture in _flat(pictures)]
    text = (token * (side // patch) + row_end) * (side // patch)
    return [text] * len(rows), {"pixel_values": torch.stack(rows)}


def pooled_crops(pictures: Pictures, *, side: int, patch: int, text: str) -> Made:
    """Every picture whole and its middle, 2 x 2 patches a token, which are named by their numbers (Molmo 2)."""
    crops = []
    for picture in _flat(pictures):
        wide, high = picture.size
        for part in (picture, picture.crop((wide // 4, high // 4, 3 * wide // 4, 3 * high // 4))):
            crops.append(_patches(_pixels(part, (side, side)), patch))
    cells = side // patch
    numbers = torch.arange(len(crops) * cells**2).reshape(-1, cells // 2, 2, cells // 2, 2)
    grids = torch.full((len(crops) // 2, 4), cells // 2)
    return [text] * (len(crops) // 2), {
        "pixel_values": torch.stack(crops),
        "image_token_pooling": numbers.transpose(2, 3).reshape(-1, 4),
        "image_grids": grids,
        "image_num_crops": torch.full((len(crops) // 2,), 2),
    }


def counted(
    pictures: Pictures, *, processor: str, shapes: str, merge: int, token: str, start: str, end: str, **options: Any
) -> Made:
    """What the family's image processor makes; the output `shapes` holds each picture's sides in patches."""
    made = getattr(transformers, processor)(**options)(pictures, return_tensors="pt")
    texts = [start + token * (int(shape.prod()) // merge**2) + end for shape in made[shapes]]
    return texts, {"pixel_values": made["pixel_values"], shapes: made[shapes]}


def video_tokens(model: Any, grids: list[tuple[int, int, int]]) -> tuple[list[list[int]], dict[str, torch.Tensor]]:
    """(the tokens of each video, what the model takes beside tokens) of videos of noise: frames, rows, columns."""
    config = model.config
    vision = config.vision_config
    values = 3 * vision.temporal_patch_size * vision.patch_size**2
    noise = torch.randn(sum(t * h * w for t, h, w in grids), values, generator=torch.Generator().manual_seed(0))
    extra = {"pixel_values_videos": noise, "video_grid_thw": torch.tensor(grids)}
    if "second_per_grid_ts" in inspect.signature(model.forward).parameters:
        extra["second_per_grid_ts"] = torch.ones(len(grids))
    counts = [t * h * w // vision.spatial_merge_size**2 for t, h, w in grids]
    start, end = config.vision_start_token_id, config.vision_end_token_id
    return [[start, *[config.video_token_id] * count, end] for count in counts], extra


def with_kinds(model: Any, rows: list[list[int]], extra: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The rows padded on the left, with the kind of every token: text, image, video."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    kinds = (ids == model.config.image_token_id).long() + 2 * (ids == model.config.video_token_id).long()
    return {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": kinds, **extra}


def _flat(pictures: Pictures) -> list[Image.Image]:
    return [picture for sample in pictures for picture in sample]


def _pixels(picture: Image.Image, size: tuple[int, int]) -> torch.Tensor:
    """[3, height, width] between -1 and 1."""
    values = np.asarray(picture.resize((size[1], size[0]), Image.Resampling.BICUBIC), dtype=np.float32)
    return torch.from_numpy(values / 127.5 - 1).permute(2, 0, 1).contiguous()


def _sides(picture: Image.Image, cell: int, longest: int) -> tuple[int, int]:
    """(height, width) of about the picture's shape in whole cells, none longer than `longest`."""
    scale = longest / max(picture.size)
    high, wide = (max(1, math.floor(side * scale / cell)) * cell for side in (picture.height, picture.width))
    return high, wide


def _padded(tensors: list[torch.Tensor], side: int = 0) -> torch.Tensor:
    """All in one, padded below and on the right to the largest, or to squares of `side`."""
    high, wide = (side or max(tensor.shape[axis] for tensor in tensors) for axis in (1, 2))
    return torch.stack([torch.nn.functional.pad(t, (0, wide - t.shape[2], 0, high - t.shape[1])) for t in tensors])


def _patches(tensor: torch.Tensor, patch: int) -> torch.Tensor:
    """[patches, patch * patch * 3], row by row."""
    channels, high, wide = tensor.shape
    split = tensor.reshape(channels, high // patch, patch, wide // patch, patch)
    return split.permute(1, 3, 2, 4, 0).reshape(-1, patch * patch * channels)
