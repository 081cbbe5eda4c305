"""What pictures become in families whose processor cannot be built here, by one function a way of doing it.

Each takes the pictures of every sample and the family's options, and returns what stands for each picture in the prompt
and the tensors that the model takes beside the tokens.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image

Pictures = list[list[Image.Image]]
Made = tuple[list[str], dict[str, torch.Tensor]]


def whole(pictures: Pictures, *, side: int, text: str, pixels: str = "pixel_values") -> Made:
    """Square pictures of one size, each as many tokens as the next."""
    tensors = [_pixels(picture, (side, side)) for picture in _flat(pictures)]
    return [text] * len(tensors), {pixels: torch.stack(tensors)}


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


def patch_rows(
    pictures: Pictures, *, patch: int, merge: int, longest: int, token: str, start: str, end: str
) -> Made:
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


def _padded(tensors: list[torch.Tensor]) -> torch.Tensor:
    high, wide = (max(tensor.shape[axis] for tensor in tensors) for axis in (1, 2))
    return torch.stack(
        [torch.nn.functional.pad(t, (0, wide - t.shape[2], 0, high - t.shape[1])) for t in tensors]
    )


def _patches(tensor: torch.Tensor, patch: int) -> torch.Tensor:
    """[patches, patch * patch * 3], row by row."""
    channels, high, wide = tensor.shape
    split = tensor.reshape(channels, high // patch, patch, wide // patch, patch)
    return split.permute(1, 3, 2, 4, 0).reshape(-1, patch * patch * channels)
