"""Whether a decoder's positions tell the frames of a video, by the model's own code for a video of two frames."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from tvc.errors import TvcError
from tvc.trace.attention import NAME as TRACED_ATTENTION
from tvc.trace.attention import attention_as
from tvc.trace.host import Host
from tvc.trace.parts import VIDEO
from tvc.trace.route import video_departs

_PIXELS, _GRID, _KINDS = "pixel_values", "grid_thw", "mm_token_type_ids"
_OF_A_VIDEO = 2  # what kinds of tokens call those of videos


def tells_frames(
    host: Host, sample: Mapping[str, torch.Tensor], embed: Callable[[torch.Tensor, str], torch.Tensor]
) -> bool:
    """Whether the visual tokens of a video are one run, in which rows and columns begin again with every frame.

    Args:
        sample: inputs of two images, which become the two frames where they are alike.
        embed: stands for the embeddings of ids.
    """
    token = getattr(host.model.config, "video_token_id", None)
    grids, other = sample.get(f"image_{_GRID}"), getattr(host.model.config, "image_token_id", None)
    if token is None or other is None or grids is None or not hasattr(host.owner, "get_video_features"):
        return False
    if len(grids) != 2 or not torch.equal(grids[0], grids[1]) or int(grids[0, 0]) != 1 or _PIXELS not in sample:
        return False
    text = sample["input_ids"][0]
    tokens = 2 * int((text == other).sum())
    words = text[text != other]
    ids = torch.cat([words[:1], words.new_full((tokens,), token), words[-1:]])[None]
    grid = grids[:1] * torch.tensor([2, 1, 1], device=grids.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), VIDEO: sample[_PIXELS], f"video_{_GRID}": grid}
    if _KINDS in sample:
        inputs[_KINDS] = _OF_A_VIDEO * (ids == token).long()
    positions = _positions(host, inputs, embed)
    if positions is None or positions.dim() != 3 or positions.shape[2] != ids.shape[1]:
        return False
    places = positions[1:, 0, 1 : 1 + tokens].T
    again = (places == places[0]).all(1).nonzero().flatten().tolist()
    return again == [0, tokens // 2]


def _positions(
    host: Host, inputs: dict[str, torch.Tensor], embed: Callable[[torch.Tensor, str], torch.Tensor]
) -> torch.Tensor | None:
    """Those that the decoder gets; None where the model's own code does not take the video, or not as images."""
    dtype = next(host.model.parameters()).dtype
    features = [torch.zeros(shape, dtype=dtype, device=host.device) for shape in host.boundary.features]
    try:
        if video_departs(host, inputs):
            return None
        with (
            torch.no_grad(),
            attention_as(host.model, TRACED_ATTENTION),
            host.bound(vision=lambda _pending: features, embed=embed),
        ):
            return host.reach_decoder(**inputs, use_cache=True).position_ids
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, TvcError):
        return None
