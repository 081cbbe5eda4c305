"""share_states, numbered_keep: what a trained head sees of a scope's scores, to say how many of its tokens stay.

Shapes:  score [B, V] float, segment [B, V] int64 (-1 pads), counts [B, N] int64 -> [B, N, 3] float32: the logarithm of
         the number of tokens, the highest score, and the entropy of the scores (each a share of their sum)
Edges:   negative scores count as 0, a scope whose scores add up to 0 has an entropy of 0; one without tokens gives 0s.

Reference: QTSplus, arXiv 2511.11910; code Siyou-Li/QTSplus@5cc24bc (read, not copied).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator

from tvc.kernels.budget import Budget
from tvc.kernels.op import Scope, Select, Tap, op, primitive
from tvc.kernels.segments import pack, per_token, ranks
from tvc.kernels.select_threshold import largest
from tvc.kernels.text_states import text_states
from tvc.kernels.weights import Shape, Trained


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    segment = torch.tensor([[-1, -1, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0, 0], [-1, 0, 1, 1, 1, 1, 1]])
    counts = torch.tensor([[3, 2], [7, 0], [1, 5]])
    yield "random", (torch.rand(3, 7), segment, counts)
    yield "some-negative", (torch.randn(3, 7), segment, counts)
    yield "zeros", (torch.zeros(3, 7), segment, counts)
    yield "equal", (torch.full((3, 7), 0.25), segment, counts)
    yield "one-token", (torch.rand(1, 1), torch.tensor([[0]]), torch.tensor([[1]]))
    yield "no-visual-token", (torch.zeros(2, 0), segment[:2, :0], torch.zeros_like(counts[:2]))


def _numbered() -> Iterator[tuple[str, tuple[object, ...]]]:
    for name, (score, segment, counts) in _cases():
        number: torch.Tensor = counts  # type: ignore[assignment]
        yield name, (score, segment, counts, (number + 1) // 2)
        yield f"{name}-different", (score, segment, counts, number.clamp(max=2) + torch.arange(number.shape[1]))


@op(_cases)
def share_states(score: torch.Tensor, segment: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """[B, N, 3] float32."""
    member = segment[:, None, :] == torch.arange(counts.shape[1], device=segment.device)[:, None]  # [B, N, V]
    values = torch.where(member, score.float().clamp(min=0)[:, None, :], 0.0)
    # Sums are matrix products: with V = 0 ONNX Runtime leaves a reduced axis in place.
    ones = torch.ones(segment.shape[1], 1, device=segment.device)
    shares = values / (values @ ones).clamp(min=1e-20)
    entropy = torch.where(shares > 0, -shares * shares.clamp(min=1e-30).log(), 0.0) @ ones
    # One more column keeps the maximum defined for V = 0.
    highest = torch.nn.functional.pad(values, (0, 1)).amax(2, keepdim=True)
    number = counts.clamp(min=1).float().log()[:, :, None]
    return torch.cat([number, highest, entropy], 2)


@op(_numbered)
def numbered_keep(
    score: torch.Tensor, segment: torch.Tensor, counts: torch.Tensor, number: torch.Tensor
) -> torch.Tensor:
    """[B, K] int64 ascending, pads (-1) first: the best `number [B, N]` of each segment; K is the most of a sample."""
    place = ranks(segment, counts, score)
    keep = (segment >= 0) & (place < per_token(number, segment))
    return pack(keep, largest(keep))


@primitive
class Predicted(Trained, Select):
    """As many of the best-scored tokens stay as a trained head says of the text and of how the scores are spread."""

    key: ClassVar[str] = "predicted"
    exact: ClassVar[bool] = False
    least: float = Field(0.05, gt=0, le=1, description="the smallest part that the head can choose")
    most: float = Field(0.5, gt=0, le=1, description="the largest part that the head can choose")
    limit: int = Field(2560, ge=1, description="the most tokens that stay of a scope")

    @model_validator(mode="after")
    def _rising(self) -> Predicted:
        if self.least > self.most:
            raise ValueError("give a `least` that is not above `most`")
        return self

    def taps(self) -> dict[str, Tap]:
        return {"text": Tap("text", of=("behind",)), **self.module()}

    def shapes(self, width: int | str) -> dict[str, Shape]:
        wide = width + 3 if isinstance(width, int) else f"{width} + 3"
        return {
            "hidden.weight": ("hidden", wide),
            "hidden.bias": ("hidden",),
            "share.weight": (1, "hidden"),
            "share.bias": (1,),
        }

    def part(
        self,
        score: torch.Tensor | None,
        scope: Scope,
        text: tuple[torch.Tensor, torch.Tensor],
        weights: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        """[B, N] float32: the part of each scope's tokens that the head says."""
        states: Any = share_states.overload(score, scope.segment, scope.counts)
        words = text_mean(*text)[:, None, :].expand(-1, scope.counts.shape[1], -1)
        seen = torch.cat([words, states], 2)
        hidden = torch.nn.functional.gelu(seen @ weights["hidden.weight"].float().T + weights["hidden.bias"].float())
        told = torch.sigmoid(hidden @ weights["share.weight"].float().T + weights["share.bias"].float()).squeeze(2)
        return self.least + (self.most - self.least) * told

    def apply(
        self,
        score: torch.Tensor | None,
        scope: Scope,
        text: tuple[torch.Tensor, torch.Tensor],
        weights: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        part = self.part(score, scope, text, weights)
        number = (part * scope.counts).ceil().clamp(min=1, max=self.limit).long()
        chosen: torch.Tensor = numbered_keep.overload(score, scope.segment, scope.counts, number)
        return chosen

    def kept(self, counts: list[int]) -> list[int]:
        """The upper bound; the head decides at run time."""
        most = Budget(permille=min(1000, round(self.most * 1000) + 1))
        return [min(count, most.kept(count) + 1, self.limit) for count in counts]


def text_mean(text: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
    """[B, D] float32: the mean of all asked text."""
    states, number = text_states.overload(text, asked), asked.float().sum(1, keepdim=True)
    before = (number - 1).clamp(min=0)
    return (states[:, 0] * before + states[:, 1]) / (before + 1)
