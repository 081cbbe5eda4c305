"""compact: the slots that remain after a cut, in order, and where the text and visual tokens stand among them.

Shapes:  text_index [B, T] int64, visual_slots [B, K] int64: slots of the chunk, -1 pads
         -> kept [B, T + K] the remaining slots ascending, pads (-1) first
         -> source [B, T + K] the column of each of them in cat(text_index, visual_slots)
         -> text_index [B, T], visual_index [B, K] the tokens' slots in the shortened chunk, -1 pads
Every tensor of the chunk is gathered along its token axis by `kept`; values known per token, by `source`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tvc.kernels.op import op


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    text = torch.tensor([[0, 1, 6, 7], [-1, 2, 7, 8]])
    yield "ragged", (text, torch.tensor([[2, 4, 5], [-1, 3, 6]]))
    yield "all-visual-pads", (text, torch.full((2, 2), -1))
    yield "one-text-token", (torch.tensor([[9]]), torch.tensor([[0, 3]]))
    yield "one-visual-token", (torch.tensor([[0, 5]]), torch.tensor([[3]]))
    yield "decode", (torch.tensor([[0], [0]]), torch.zeros(2, 0, dtype=torch.int64))


@op(_cases)
def compact(
    text_index: torch.Tensor, visual_slots: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(kept, source, text_index, visual_index) of the chunk that holds these text and visual slots alone."""
    slots = torch.cat([text_index, visual_slots], dim=1)
    kept, source = torch.sort(slots, dim=1, stable=True)
    place = torch.arange(slots.shape[1], device=slots.device).expand(slots.shape[0], -1)
    moved = torch.where(slots < 0, -1, torch.zeros_like(source).scatter(1, source, place))
    text_width = text_index.shape[1]
    return kept, source, moved[:, :text_width].clone(), moved[:, text_width:].clone()
