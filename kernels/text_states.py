"""text_states: what a module sees of the text: the mean of its tokens and the last of them.

Shapes:  text [B, T, D] float, asked [B, T] bool -> [B, 2, D] float32: mean of the asked tokens but the last; the last
Edges:   one asked token is its own mean; without any both are zeros.

Reference: DyVTE, arXiv 2411.19628 (the state that its routers see). Deviation: the published mean over no token is NaN.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tvc.kernels.op import op


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    for batch, words, width in ((1, 1, 4), (2, 5, 8), (3, 7, 3)):
        asked = torch.rand(batch, words) > 0.3
        asked[0] = True
        yield f"B{batch}-T{words}", (torch.randn(batch, words, width), asked)
    some = torch.tensor([[False, True, False, False], [True, True, False, False], [False, False, False, True]])
    yield "pads-on-either-side", (torch.randn(3, 4, 6), some)
    yield "nothing-asked", (torch.randn(2, 3, 4), torch.zeros(2, 3, dtype=torch.bool))
    yield "no-text", (torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.bool))


@op(_cases)
def text_states(text: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
    """[B, 2, D] float32: mean and last of the asked text."""
    running = asked.long().cumsum(1)
    # Sums are matrix products: with T = 0 ONNX Runtime leaves a reduced axis in place.
    ones = torch.ones(asked.shape[1], 1, device=text.device)
    number = (asked.float() @ ones).long()  # [B, 1]
    last = asked & (running == number)
    before = asked & (~last | (number == 1))
    weight = torch.stack([before, last], 1).float()  # [B, 2, T]
    sums = weight @ torch.where(asked[:, :, None], text.float(), 0.0)
    return sums / (weight @ ones).clamp(min=1)
