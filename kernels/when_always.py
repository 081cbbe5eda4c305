"""Always: every sample's visual tokens leave. No op: the size that stays is 0, known while tracing."""

from __future__ import annotations

from typing import ClassVar

import torch

from tvc.kernels.op import Scope, When, primitive


@primitive
class Always(When):
    """The visual tokens always leave."""

    key: ClassVar[str] = "always"

    def apply(self, score: torch.Tensor | None, scope: Scope) -> torch.Tensor:
        return torch.ones(scope.segment.shape[0], dtype=torch.bool, device=scope.segment.device)
