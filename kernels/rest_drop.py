"""Drop: the tokens that were not chosen leave without a trace. No op: the gather of the chosen ones is all there is."""

from __future__ import annotations

from typing import ClassVar

import torch

from tvc.kernels.op import Rest, Scope, primitive


@primitive
class Drop(Rest):
    """The other tokens are dropped."""

    key: ClassVar[str] = "drop"

    def apply(
        self,
        feature: torch.Tensor,
        size: torch.Tensor,
        chosen: torch.Tensor,
        score: torch.Tensor | None,
        scope: Scope,
    ) -> None:
        return None
