"""exit_keep: all visual tokens of the samples that stay, none of the samples that exit.

Shapes:  gate [B] bool (True = exit), segment [B, V] int64 (-1 pads)
         -> [B, K] int64 ascending, pads (-1) first; K = V where any visual token stays, else 0 (an unbacked size)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from tvc.kernels.op import Scope, When, op
from tvc.kernels.segments import pack
from tvc.kernels.when_always import Always


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    segment = torch.tensor([[-1, 0, 0, 1], [0, 0, 0, 0], [-1, -1, -1, -1]])
    for bits in ((False, False, False), (True, False, False), (True, True, False), (True, True, True)):
        yield "gate-" + "".join("01"[bit] for bit in bits), (torch.tensor(bits), segment)
    yield "one-token", (torch.tensor([False]), torch.tensor([[0]]))


@op(_cases)
def exit_keep(gate: torch.Tensor, segment: torch.Tensor) -> torch.Tensor:
    """[B, K] int64: the tokens of the samples that stay."""
    width = segment.shape[1]
    keep = (segment >= 0) & ~gate[:, None]
    slots: int = (keep.sum(1).max().clamp(max=1) * width).item()  # type: ignore[assignment]
    torch._check(slots >= 0)
    torch._check(slots <= width)
    return pack(keep, slots)


def exit_chosen(when: When, score: torch.Tensor | None, scope: Scope, **taps: Any) -> torch.Tensor:
    """[B, K] int64: what an exit step leaves; K is the static 0 where the exit always happens."""
    if isinstance(when, Always):
        return scope.segment.new_full((scope.segment.shape[0], 0), -1)
    return exit_keep.overload(when.apply(score, scope, **taps), scope.segment)
