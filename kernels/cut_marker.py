"""cut_marker: holds the place of a cut inside the vision encoder while it is traced.

An encoder's token count is a constant in its trace. Called on a block's input, this op gives a fresh symbolic length to
everything behind it; the reduction takes its place afterwards. As an op of its own it is the identity.

Shapes:  hidden [n, T, C], number int (which cut) -> [n, T', C]
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tvc.kernels.op import op


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    yield "n2-T5", (torch.randn(2, 5, 4), 0)


def _fake(hidden: torch.Tensor, number: int) -> torch.Tensor:
    length = torch.library.get_ctx().new_dynamic_size(min=2)
    return hidden.new_empty(hidden.shape[0], length, hidden.shape[2])


@op(_cases, fake=_fake)
def cut_marker(hidden: torch.Tensor, number: int) -> torch.Tensor:
    """[n, T, C] the hidden states, unchanged."""
    return hidden.clone()
