"""restore: the chunk as it was in front of a cut, once the tokens that the cut left have run through some layers.

Shapes:  before [B, S, D] float, what entered the cut; kept [B, S'] int64 slots that it left, ascending, -1 pads first;
         inside [B, S', D] float, these slots behind the layers -> [B, S, D]: `inside` in the slots that were kept,
         `before` in all others
Pads:    go nowhere.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tvc.kernels.op import op
from tvc.kernels.segments import take_rows


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    before, inside = torch.randn(2, 7, 6), torch.randn(2, 4, 6)
    pads = torch.full((2, 4), -1)
    yield "some", (before, torch.tensor([[0, 1, 4, 6], [-1, -1, 3, 6]]), inside)
    yield "pads-alone", (before, pads, inside)
    yield "nothing-left", (before, pads[:, :0], inside[:, :0])
    yield "all", (before, torch.arange(7).repeat(2, 1), torch.randn(2, 7, 6))
    yield "step", (before[:, :1], torch.zeros(2, 1, dtype=torch.int64), inside[:, :1])
    yield "half", (before.bfloat16(), torch.tensor([[1, 2, 3, 5], [-1, 0, 1, 2]]), inside.bfloat16())


@op(_cases)
def restore(before: torch.Tensor, kept: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """`before` with the rows of `inside` at the slots `kept`."""
    slots = before.shape[1]
    own = torch.arange(slots + 1, device=kept.device).expand(kept.shape[0], -1)
    came = torch.arange(kept.shape[1], device=kept.device).expand(kept.shape[0], -1) + slots
    # Pads write to a slot that is cut off. Rows are gathered from both at once: no write into either.
    source = own.scatter(1, torch.where(kept < 0, slots, kept), came)[:, :-1]
    return take_rows(torch.cat([before, inside], 1), source)
