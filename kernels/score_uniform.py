"""uniform_score: the van der Corput order of the visual tokens, so that any top k of them lie evenly spread.

Shapes:  ordinal [B, V] int64 (-1 pads) -> [B, V] float32 in (0, 1]
Rule:    1 - r / 2^20, r the ordinal with its 20 bits reversed. The top 2^j of 2^m tokens are every 2^(m - j)-th one;
         for other numbers two gaps occur, one twice the other. Ordinals repeat after 2^20 (ties: the lower index).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch

from tvc.kernels.op import Score, Tap, op, primitive

BITS = 20


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    yield "V577", (torch.arange(577)[None],)
    yield "pads", (torch.tensor([[-1, 0, 1], [0, 1, 2]]),)
    yield "V1", (torch.zeros(1, 1, dtype=torch.int64),)
    yield "large", (torch.tensor([[2**20 - 1, 2**20, 2**19]]),)


@op(_cases)
def uniform_score(ordinal: torch.Tensor) -> torch.Tensor:
    """[B, V] float32: the earlier a token comes in the van der Corput order, the higher."""
    power = 2 ** torch.arange(BITS, device=ordinal.device)
    bits = (ordinal.clamp(min=0)[:, :, None] // power % 2).float()
    # A matrix product of bits and powers of two is exact, and unlike a sum survives V = 0 in ONNX Runtime.
    return 1.0 - (bits @ (0.5 / power.float())[:, None]).squeeze(2)


@primitive
class UniformScore(Score):
    """An even spread over the tokens in order: the baseline that looks at nothing."""

    key: ClassVar[str] = "uniform"

    def taps(self) -> dict[str, Tap]:
        return {"ordinal": Tap("ordinal")}

    def apply(self, ordinal: torch.Tensor) -> torch.Tensor:
        return uniform_score.overload(ordinal)
