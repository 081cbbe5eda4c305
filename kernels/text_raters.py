"""text_raters: the text tokens that the visual tokens resemble more than the average text token.

Shapes:  visual [B, V, D] float, seen [B, V] bool, text [B, T, D] float, asked [B, T] bool -> [B, T] bool
Rule:    softmax over the asked text of the plain dot products with each visual token, mean over the visual tokens seen,
         in float32; a text token rates if its mean is above the mean of the asked text.
Edges:   where none is above (one text token, equal ones, no visual token) all the asked text rates.
Memory:  O(B V T).

Reference: SparseVLM, arXiv 2410.04417 (relevant text tokens, chosen once at the decoder's entry).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tvc.kernels.op import op


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    for batch, tokens, words, width in ((1, 1, 1, 4), (2, 9, 5, 8), (3, 4, 7, 3)):
        seen, asked = torch.rand(batch, tokens) > 0.3, torch.rand(batch, words) > 0.3
        seen[0], asked[0] = True, True
        yield (
            f"B{batch}-V{tokens}-T{words}",
            (torch.randn(batch, tokens, width), seen, torch.randn(batch, words, width), asked),
        )
    seen, asked = torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 4, dtype=torch.bool)
    yield "equal-text", (torch.randn(2, 3, 4), seen, torch.ones(2, 4, 4), asked)
    yield "nothing-seen", (torch.randn(2, 3, 4), ~seen, torch.randn(2, 4, 4), asked)
    yield "nothing-asked", (torch.randn(2, 3, 4), seen, torch.randn(2, 4, 4), ~asked)
    yield "no-visual-token", (torch.zeros(2, 0, 4), seen[:, :0], torch.randn(2, 4, 4), asked)
    yield "large-dot-products", (torch.randn(2, 3, 4) * 100, seen, torch.randn(2, 4, 4), asked)


@op(_cases)
def text_raters(visual: torch.Tensor, seen: torch.Tensor, text: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
    """[B, T] bool: which of the asked text rates the visual tokens."""
    logits = visual.float() @ text.float().transpose(1, 2)  # [B, V, T]
    # The lowest finite number, not -inf: a sample that asks nothing stays free of NaN.
    shares = logits.masked_fill(~asked[:, None, :], torch.finfo(torch.float32).min).softmax(2)
    weight = seen.float()
    # Sums are matrix products: with V = 0 ONNX Runtime leaves a reduced axis in place.
    number = (weight[:, None, :] @ weight[:, :, None]).squeeze(2).clamp(min=1)  # [B, 1]
    mean = (weight[:, None, :] @ shares).squeeze(1) / number
    average = torch.where(asked, mean, 0.0).sum(1, keepdim=True) / asked.sum(1, keepdim=True).clamp(min=1)
    above = asked & (mean > average)
    return above | (asked & (above.sum(1, keepdim=True) == 0))
