"""Reread: the tokens that stay read those that leave, by a trained attention with a gate.

    new token = x + tanh(g) W_o A(W_q n_1(x), W_k n_2(all), W_v n_2(all))

`n_1` and `n_2` are root-mean-square norms, `A` attention to all tokens of the scope that enter the step, the dropped
ones among them (see kernels/segment_attention.py), `g` one number: at 0 the others are dropped, and nothing else
happens. Tokens have no positions in it.

Reference: the cross-attention to unpooled features of CrossLMM, arXiv 2505.17020, and of the Slow-Fast video model,
arXiv 2504.01328. Deviation: read once, where the others leave, and not again in deeper layers, nor by the text, so that
nothing has to be kept beside the caches. Norms and biases are this module's own.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from tvc.kernels.op import Scope, primitive
from tvc.kernels.score_query_attention import rms_normed
from tvc.kernels.segment_attention import Attending
from tvc.kernels.segments import or_pad, per_token, rows_at
from tvc.kernels.weights import Shape


@primitive
class Reread(Attending):
    """The tokens that stay take from all of their image what a trained attention reads, before the others leave."""

    key: ClassVar[str] = "reread"

    def shapes(self, width: int | str) -> dict[str, Shape]:
        return {**super().shapes(width), "norm_read.weight": (width,), "gate": (1,)}

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
        asking, seen = rms_normed(kept, weights["norm.weight"]), rms_normed(feature, weights["norm_read.weight"])
        read = self.read(asking, seen, own, scope.segment, weights)
        made = kept.float() + weights["gate"].float().tanh() * read
        return chosen.clone(), made.to(feature.dtype), or_pad(size, chosen, 0.0)
