"""cut_marker: holds the place of a cut inside the vision encoder while it is traced.

An encoder's token count is a constant in its trace. Called on a block's input, this operator gives a fresh symbolic
length to everything behind it; the reduction takes its place afterwards, so no graph that runs holds it.

Shapes:  hidden [n, T, C], number int (which cut) -> [n, T', C]
"""

from __future__ import annotations

import torch


@torch.library.custom_op("tvc::cut_marker", mutates_args=())
def cut_marker(hidden: torch.Tensor, number: int) -> torch.Tensor:
    """[n, T, C] the hidden states, unchanged."""
    return hidden.clone()


@cut_marker.register_fake
def _(hidden: torch.Tensor, number: int) -> torch.Tensor:
    length = torch.library.get_ctx().new_dynamic_size(min=2)
    return hidden.new_empty(hidden.shape[0], length, hidden.shape[2])
