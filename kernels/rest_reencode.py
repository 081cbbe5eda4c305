"""Reencode: the others are dropped, and a trained block of attention runs over the tokens that stay.

    new token = x + W_o A(W_q n(x), W_k n(kept), W_v n(kept))

`n` is a root-mean-square norm, `A` attention among the kept tokens of one scope (see kernels/segment_attention.py).

Reference: QTSplus, arXiv 2511.11910; code Siyou-Li/QTSplus@5cc24bc (read, not copied).
"""

from __future__ import annotations

from typing import ClassVar

import torch

from tvc.kernels.op import Scope, primitive
from tvc.kernels.score_query_attention import rms_normed
from tvc.kernels.segment_attention import Attending
from tvc.kernels.segments import or_pad, per_token, rows_at


@primitive
class Reencode(Attending):
    """The others are dropped, and a trained block of attention runs over the tokens that stay, image by image."""

    key: ClassVar[str] = "reencode"

    def apply(
        self,
        feature: torch.Tensor,
        size: torch.Tensor,
        chosen: torch.Tensor,
        score: torch.Tensor | None,
        scope: Scope,
        weights: dict[str, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        own = torch.where(chosen < 0, -1, per_token(scope.segment, chosen))
        kept = rows_at(feature, chosen)
        normed = rms_normed(kept, weights["norm.weight"])
        made = kept.float() + self.read(normed, normed, own, own, weights)
        return chosen.clone(), made.to(feature.dtype), or_pad(size, chosen, 0.0)
