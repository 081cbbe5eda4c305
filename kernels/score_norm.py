"""norm_score: the length of each visual token's feature or attention key.

Shapes:  vector [B, V, D] float -> [B, V] float32
Rule:    (sum |x|^order)^(1/order) in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from pydantic import Field

from tvc.kernels.op import Score, Tap, op, primitive


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    for order in (1.0, 2.0, 3.0):
        yield f"B2-V7-order{order:g}", (torch.randn(2, 7, 12), order)
        yield f"B1-V1-order{order:g}", (torch.randn(1, 1, 5), order)
        yield f"zeros-order{order:g}", (torch.zeros(2, 3, 4), order)
    yield "strided", (torch.randn(3, 8, 5).transpose(1, 2), 2.0)


@op(_cases)
def norm_score(vector: torch.Tensor, order: float) -> torch.Tensor:
    """[B, V] float32: the norm of each row of `vector`."""
    # The sum along D is a matrix product: with V = 0 ONNX Runtime leaves a reduced axis in place.
    ones = torch.ones(vector.shape[2], 1, device=vector.device)
    size = vector.float().abs()
    if order == 1.0:
        return (size @ ones).squeeze(2)
    if order == 2.0:
        return ((size * size) @ ones).sqrt().squeeze(2)
    return (size.pow(order) @ ones).pow(1.0 / order).squeeze(2)


@primitive
class NormScore(Score):
    """How long a visual token's feature or key is."""

    key: ClassVar[str] = "norm"
    shorthand: ClassVar[str | None] = "of"
    of: Literal["feature", "key"] = "feature"
    # Beyond these the powers of usual features leave float32.
    order: float = Field(2.0, ge=0.125, le=8, allow_inf_nan=False)
    prefer: Literal["large", "small"] = "large"
    layer: str | None = Field(None, description="the site or layer the vectors are taken at; default: the step's own")

    def taps(self) -> dict[str, Tap]:
        return {"vector": Tap(self.of, self.layer)}

    def apply(self, vector: torch.Tensor) -> torch.Tensor:
        score = norm_score.overload(vector, self.order)
        return score if self.prefer == "large" else -score
