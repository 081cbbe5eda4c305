"""Latents: each new token is the mean of all, weighted by the softmax of their products with a trained vector.

Reference: FLASH, arXiv 2505.12728 (what its draft model sees of an image). The released code of that branch does not
run, as it names tensors that it never defines; this is written from the formula z = softmax(A x^T) x.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from tvc.kernels.op import Scope, Tap, primitive
from tvc.kernels.segment_pool import CountedPooling
from tvc.kernels.weights import Shape


@primitive
class Latents(CountedPooling):
    """New tokens, each the mean of all that enter, by what a trained vector makes of them; the old tokens leave."""

    key: ClassVar[str] = "latents"

    def taps(self) -> dict[str, Tap]:
        return self.module()

    def shapes(self, width: int | str) -> dict[str, Shape]:
        return {"latents": (self.keep.count or "latents", width)}

    def apply(
        self, feature: torch.Tensor, size: torch.Tensor, scope: Scope, weights: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = feature.float() @ weights["latents"].float().T
        chosen, pooled, sizes = self.pooled(logits[:, None], feature, size, scope)
        return chosen, pooled.to(feature.dtype), sizes
