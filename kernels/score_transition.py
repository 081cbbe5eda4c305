"""transition_score: how much a sub-block of a decoder layer changes each token.

Shapes:  before [B, S, D] float, after [B, S, D] float, real [B, S] bool -> [B, S] float32, pads 0
Rule:    |after| / |before|, times the softmax over the sample's real tokens of 1 - cos(before, after), in float32.
Edges:   a zero vector has cosine 0 with all; a token that enters as zeros scores 0.

Reference: TransPrune, arXiv 2507.20630 (token transition variation).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import ClassVar

import torch
from pydantic import Field

from tvc.kernels.op import Score, Tap, op, primitive


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    for batch, tokens, width in ((1, 1, 4), (2, 9, 8), (3, 4, 5)):
        real = torch.rand(batch, tokens) > 0.3
        real[0] = True
        yield f"B{batch}-S{tokens}", (torch.randn(batch, tokens, width), torch.randn(batch, tokens, width), real)
    same = torch.randn(2, 5, 4)
    yield "unchanged", (same, same.clone(), torch.ones(2, 5, dtype=torch.bool))
    yield "zeros", (torch.zeros(2, 3, 4), torch.randn(2, 3, 4), torch.ones(2, 3, dtype=torch.bool))
    yield "to-zeros", (torch.randn(2, 3, 4), torch.zeros(2, 3, 4), torch.ones(2, 3, dtype=torch.bool))
    yield "nothing-real", (torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.zeros(2, 3, dtype=torch.bool))


@op(_cases)
def transition_score(before: torch.Tensor, after: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """[B, S] float32: change of length times share of the change of direction."""
    before, after = before.float(), after.float()
    entering, leaving = before.square().sum(2).sqrt(), after.square().sum(2).sqrt()
    cosine = (before * after).sum(2) / (entering * leaving).clamp(min=1e-12)
    # The lowest finite number, not -inf: a sample without real tokens stays free of NaN.
    turned = (1.0 - cosine).masked_fill(~real, torch.finfo(torch.float32).min).softmax(1)
    ratio = torch.where(entering > 0, leaving / entering.clamp(min=1e-12), 0.0)
    return torch.where(real, ratio * turned, 0.0)


_CONCRETE = re.compile(r"language\.(\d+)")


@primitive
class TransitionScore(Score):
    """How much attention and MLP of the layers before a site change a visual token, summed over layers."""

    key: ClassVar[str] = "transition"
    components: ClassVar[tuple[str, ...]] = ("language",)
    layer: str = Field("previous", description="the last layer that counts: previous or language.K")
    since: str | None = Field(
        None, description="an earlier site: the layer in front of it is the first that counts; default: one layer"
    )

    def taps(self) -> dict[str, Tap]:
        written = [_CONCRETE.fullmatch(name or "") for name in (self.since, self.layer)]
        if written[0] is None or written[1] is None:  # `previous`, a share of the depth: not decided yet
            return {"transition": Tap("transition", self.layer)}
        first, last = (int(found[1]) for found in written if found is not None)
        return {f"transition_{layer}": Tap("transition", f"language.{layer}") for layer in range(first - 1, last + 1)}

    def apply(self, **transitions: torch.Tensor) -> torch.Tensor:
        score: torch.Tensor = torch.stack(list(transitions.values())).sum(0)
        return score
