"""The gate of an exit that looks at how much text and visual tokens still attend to each other."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from tvc.kernels.op import Attention, Scope, Tap, When, primitive
from tvc.kernels.score_attention import attention_score


@primitive
class CrossAttention(When):
    """The visual tokens of a sample leave when text and visual tokens hardly attend to each other any more.

    With A the attention of one layer, mean over its heads: the share of the text's attention that goes to visual
    tokens, and the share of the visual tokens' attention that goes to all else, both lie below `below`. A sample
    without visual tokens stays as it is.

    Reference: ToDRE, arXiv 2505.18757v2, stage 2 (threshold 0.10); no published code to compare with.
    """

    key: ClassVar[str] = "cross_attention"
    components: ClassVar[tuple[str, ...]] = ("language",)
    shorthand: ClassVar[str | None] = "below"
    below: float = Field(0.1, gt=0, le=1, allow_inf_nan=False, description="share of attention, both ways")
    layer: str = Field("previous", description="the layer of the attention: previous, self or language.K")

    def taps(self) -> dict[str, Tap]:
        return {
            "of_text": Tap("attention", self.layer, ("text",)),
            "of_visual": Tap("attention", self.layer, ("visual",)),
        }

    def apply(self, score: torch.Tensor | None, scope: Scope, of_text: Attention, of_visual: Attention) -> torch.Tensor:
        """[B] bool."""
        # A row of attention sums to 1, so what does not go to visual tokens goes to text.
        to_visual = attention_score.overload(*of_text[:6], "mean", of_text.softcap).sum(1)
        to_text = 1.0 - attention_score.overload(*of_visual[:6], "mean", of_visual.softcap).sum(1)
        there = (scope.segment >= 0).sum(1) > 0
        return there & (to_visual < self.below) & (to_text < self.below)
