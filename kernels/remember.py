"""remember: what a step goes on with in the next call: its states behind this one, where a sample brought anything.

Shapes:  before and after [B, ...] of one type, visual_index [B, V] int64 (-1 pads) -> [B, ...]
Rule:    a sample with a visual token has `after`, one without has `before`, to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tvc.kernels.op import op


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    index = torch.tensor([[-1, 3, 5], [-1, -1, -1], [0, 1, 2]])
    yield "some", (torch.randn(3, 4), torch.randn(3, 4), index)
    yield "numbers", (torch.tensor([1, 2, 3]), torch.tensor([5, 6, 7]), index)
    yield "several-axes", (torch.randn(3, 2, 3), torch.randn(3, 2, 3), index)
    yield "no-visual-token", (torch.randn(3, 4), torch.randn(3, 4), index[:, :0])
    yield "one-token", (torch.randn(1, 1), torch.randn(1, 1), torch.zeros(1, 1, dtype=torch.int64))
    poison = torch.full((3, 4), float("nan"))
    yield "nan", (torch.randn(3, 4), poison, index)


@op(_cases)
def remember(before: torch.Tensor, after: torch.Tensor, visual_index: torch.Tensor) -> torch.Tensor:
    """[B, ...]: the states that go along with the caches."""
    brings = (visual_index >= 0).sum(1) > 0
    return torch.where(brings.reshape(-1, *[1] * (before.dim() - 1)), after, before)
