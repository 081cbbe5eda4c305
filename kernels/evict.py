"""evict: what a layer hands on of its cache once later cuts have dropped tokens of the chunk that stand in it.

Shapes:  held [B, G, N, d] float or [B, N] int64, of whose N entries the last S are the chunk's;
         kept [B, S'] int64 slots of the chunk that stay, ascending, -1 pads first;
         slots [B, S] int64, of which the width alone is read
         -> [B, G, N - S + S', d] or [B, N - S + S']: what stood in front of the chunk, then the slots that stay
Pads:    -1 in [B, N]. In [B, G, N, d] they repeat slot 0, which nothing attends to: the place of a pad is -1.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tvc.kernels.op import op
from tvc.kernels.segments import follow


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    slots = torch.arange(5).repeat(2, 1)
    some, none = torch.tensor([[0, 2, 4], [-1, 1, 4]]), torch.tensor([[-1], [-1]])
    for past in (0, 3):
        places = torch.cat([torch.arange(past).repeat(2, 1), slots + past], 1)
        places[1, 0] = -1
        keys = torch.randn(2, 3, past + 5, 4)
        for name, kept in (("some", some), ("pads-alone", none), ("all", slots), ("nothing", none[:, :0])):
            yield f"places-{name}-past{past}", (places, kept, slots)
            yield f"keys-{name}-past{past}", (keys, kept, slots)
    yield "step", (torch.randn(2, 1, 4, 2), torch.zeros(2, 1, dtype=torch.int64), slots[:, :1])


@op(_cases)
def evict(held: torch.Tensor, kept: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """The cache without the slots of the chunk that are not kept."""
    if held.dim() == 2:
        past = held.shape[1] - slots.shape[1]
        return torch.cat([held[:, :past], follow(held[:, past:], kept)], 1)
    past = held.shape[2] - slots.shape[1]
    index = kept.clamp(min=0)[:, None, :, None].expand(-1, held.shape[1], -1, held.shape[3])
    return torch.cat([held[:, :, :past], held[:, :, past:].gather(2, index)], 2)
