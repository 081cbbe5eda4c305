"""cosine_score: the cosine of each visual token with the mean of some anchor tokens.

Shapes:  feature [B, V, D] float, anchor [B, M, D] float, valid [B, M] bool -> [B, V] float32
Rule:    in float32, with the mean of the valid anchors; 0 where either vector is zero (a sample without anchors).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from pydantic import Field

from tvc.kernels.op import Score, Tap, op, primitive


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    for batch, tokens, anchors, width in ((1, 1, 1, 8), (2, 9, 3, 16), (3, 4, 7, 5)):
        feature, anchor = torch.randn(batch, tokens, width), torch.randn(batch, anchors, width)
        valid = torch.rand(batch, anchors) > 0.3
        valid[0] = True
        yield f"B{batch}-V{tokens}-M{anchors}", (feature, anchor, valid)
    feature = torch.randn(2, 4, 8).transpose(0, 1).contiguous().transpose(0, 1)
    yield "no-anchor", (feature, torch.randn(2, 3, 8), torch.zeros(2, 3, dtype=torch.bool))
    yield "zero-feature", (torch.zeros(2, 4, 8), torch.randn(2, 3, 8), torch.ones(2, 3, dtype=torch.bool))


@op(_cases)
def cosine_score(feature: torch.Tensor, anchor: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """[B, V] float32: cosine of each row of `feature` with the mean of the valid rows of `anchor`."""
    feature = feature.float()
    used = torch.where(valid[:, :, None], anchor.float(), 0.0)
    mean = used.sum(1) / valid.sum(1, keepdim=True).clamp(min=1)
    # Sums along D are matrix products: with V = 0 ONNX Runtime leaves a reduced axis in place.
    ones = torch.ones(feature.shape[2], 1, device=feature.device)
    lengths = ((feature * feature) @ ones).sqrt() * mean.square().sum(1).sqrt()[:, None, None]
    return (feature @ mean[:, :, None] / lengths.clamp(min=1e-12)).squeeze(2)


@primitive
class CosineScore(Score):
    """Cosine with the mean visual token of the sample, with the mean text token, or with the last text token."""

    key: ClassVar[str] = "cosine"
    shorthand: ClassVar[str | None] = "to"
    to: Literal["mean", "text", "last"] = "mean"
    prefer: Literal["similar", "different"] | None = Field(
        None, description="which tokens score high; default: different from the mean, similar to the text"
    )
    layer: str | None = Field(None, description="the site the features are taken at; default: the step's own")

    def taps(self) -> dict[str, Tap]:
        other = {"ordinal": Tap("ordinal")} if self.to == "mean" else {"text": Tap("text", self.layer)}
        return {"feature": Tap("feature", self.layer), **other}

    def apply(
        self,
        feature: torch.Tensor,
        ordinal: torch.Tensor | None = None,
        text: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        if text is not None:
            anchor, valid = text
        elif ordinal is not None:
            anchor, valid = feature, ordinal.ge(0)
        else:
            raise ValueError("a cosine needs either the text or the ordinal tap")
        if self.to == "last":
            place = torch.where(valid, torch.arange(valid.shape[1], device=valid.device), -1)
            valid = valid & (place == place.amax(1, keepdim=True))
        score = cosine_score.overload(feature, anchor, valid)
        different = self.prefer == "different" if self.prefer else self.to == "mean"
        return -score if different else score
