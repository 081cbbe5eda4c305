"""mlp_score: a trained rating of each visual token, by a small network over its state and over that of the text.

Shapes:  visual [B, V, D] float, states [B, D] float (or None), visual_weight [h, D], text_weight [h, D] (or None),
         bias [h], score_weight [1, h], score_bias [1] -> [B, V] float32
Rule:    score_weight . gelu(visual_weight . n(visual) + text_weight . n(states) + bias) + score_bias in float32, where
         n divides a vector by the root of the mean of its squares (plus 1e-6).
Memory:  O(B V h).

Reference: CoViPAL, arXiv 2508.17243 (a small module in front of decoder layers rates the tokens). The paper's module is
not published; this one is the plainest of that kind.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from pydantic import Field

from tvc.kernels.op import Score, Tap, op, primitive
from tvc.kernels.text_states import text_states
from tvc.kernels.weights import Shape, Trained


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    for batch, tokens, width, hidden in ((1, 1, 4, 3), (2, 9, 8, 5), (3, 4, 3, 8)):
        first, other = torch.randn(2, hidden, width) / width**0.5
        weights = (torch.randn(hidden), torch.randn(1, hidden), torch.randn(1))
        visual, states = torch.randn(batch, tokens, width), torch.randn(batch, width)
        yield f"B{batch}-V{tokens}-text", (visual, states, first, other, *weights)
        yield f"B{batch}-V{tokens}", (visual, None, first, None, *weights)
    rest = (torch.randn(5, 4), torch.randn(5), torch.randn(1, 5), torch.randn(1))
    yield "no-visual-token", (torch.zeros(2, 0, 4), torch.randn(2, 4), torch.randn(5, 4), *rest)
    yield "zeros", (torch.zeros(2, 3, 4), torch.zeros(2, 4), torch.randn(5, 4), *rest)
    yield "large", (torch.randn(2, 3, 4) * 1000, torch.randn(2, 4) * 1000, torch.randn(5, 4), *rest)


@op(_cases)
def mlp_score(
    visual: torch.Tensor,
    states: torch.Tensor | None,
    visual_weight: torch.Tensor,
    text_weight: torch.Tensor | None,
    bias: torch.Tensor,
    score_weight: torch.Tensor,
    score_bias: torch.Tensor,
) -> torch.Tensor:
    """[B, V] float32: the rating of each visual token."""
    hidden = _even(visual) @ visual_weight.float().T + bias.float()
    if states is not None and text_weight is not None:
        hidden = hidden + (_even(states) @ text_weight.float().T)[:, None, :]
    hidden = torch.nn.functional.gelu(hidden)
    return (hidden @ score_weight.float().T).squeeze(2) + score_bias.float()


def _even(values: torch.Tensor) -> torch.Tensor:
    """The vectors, each with a mean square of 1, in float32."""
    values = values.float()
    # A matrix product sums: with V = 0 ONNX Runtime leaves a reduced axis in place.
    ones = torch.full((values.shape[-1], 1), 1.0 / values.shape[-1], device=values.device)
    return values / ((values * values) @ ones + 1e-6).sqrt()


@primitive
class MlpScore(Trained, Score):
    """A trained network rates each visual token by its state and, if asked to, by that of the text behind the image."""

    key: ClassVar[str] = "mlp"
    shorthand: ClassVar[str | None] = "weights"
    text: Literal["none", "mean", "last"] = Field(
        "none", description="what of the text the network sees: the mean of its tokens but the last, or the last"
    )

    def taps(self) -> dict[str, Tap]:
        words = {} if self.text == "none" else {"text": Tap("text", of=("behind",))}
        return {"feature": Tap("feature"), **words, **self.module()}

    def shapes(self, width: int | str) -> dict[str, Shape]:
        words: dict[str, Shape] = {} if self.text == "none" else {"text.weight": ("hidden", width)}
        return {
            "visual.weight": ("hidden", width),
            **words,
            "hidden.bias": ("hidden",),
            "score.weight": (1, "hidden"),
            "score.bias": (1,),
        }

    def apply(
        self,
        feature: torch.Tensor,
        weights: dict[str, torch.Tensor],
        text: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        states = None if text is None else text_states.overload(*text)[:, 0 if self.text == "mean" else 1]
        names = ("visual.weight", "text.weight", "hidden.bias", "score.weight", "score.bias")
        score: torch.Tensor = mlp_score.overload(feature, states, *map(weights.get, names))
        return score
