"""normalize_score: brings a score to a common scale, so that several can be added.

Shapes:  score [B, V] float, segment [B, V] int64 (-1 pads) -> [B, V] float32, pads 0
Modes:   none; minmax (s - min) / (max - min), all equal gives 0; softmax; sum s / sum |s|, all zero gives 0.
Scope:   one sample: its valid tokens together. NaN stays NaN for its own token and takes no part in the statistics.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from tvc.kernels.op import op


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    segment = torch.tensor([[-1, -1, 0, 0, 1], [0, 0, 1, 1, 1], [-1, -1, -1, -1, -1]])
    for mode in ("none", "minmax", "softmax", "sum"):
        yield f"ragged-{mode}", (torch.randn(3, 5), segment, mode)
        yield f"equal-{mode}", (torch.full((2, 4), 0.25), torch.zeros(2, 4, dtype=torch.int64), mode)
        yield f"one-{mode}", (torch.tensor([[3.0]]), torch.tensor([[0]]), mode)
        yield f"nan-{mode}", (torch.tensor([[1.0, float("nan"), 3.0]]), torch.tensor([[0, 0, 0]]), mode)
        yield f"zero-{mode}", (torch.zeros(1, 3), torch.tensor([[0, 0, -1]]), mode)


@op(_cases)
def normalize_score(score: torch.Tensor, segment: torch.Tensor, mode: str) -> torch.Tensor:
    """[B, V] float32: the score on a common scale; `mode` is none, minmax, softmax or sum."""
    score = score.float()
    valid = segment >= 0
    counted = valid & ~torch.isnan(score)
    # One more column keeps the extremes defined for V = 0.
    filler = torch.full((score.shape[0], 1), float("-inf"), device=score.device)
    high = torch.cat([filler, torch.where(counted, score, float("-inf"))], dim=1).amax(1, keepdim=True)
    if mode == "minmax":
        low = torch.cat([-filler, torch.where(counted, score, float("inf"))], dim=1).amin(1, keepdim=True)
        score = torch.where(high > low, (score - low) / (high - low), score * 0.0)
    elif mode == "softmax":
        power = (score - high).exp()
        score = power / torch.where(counted, power, 0.0).sum(1, keepdim=True)
    elif mode == "sum":
        score = score / torch.where(counted, score.abs(), 0.0).sum(1, keepdim=True).clamp(min=1e-30)
    return torch.where(valid, score, 0.0)


def combine(parts: Sequence[tuple[torch.Tensor, float, str]], segment: torch.Tensor) -> torch.Tensor:
    """[B, V] float32: the weighted sum of normalised scores.

    Args:
        parts: at least one (score [B, V], weight, normalisation mode).
        segment: [B, V] int64, -1 pads.
    """
    total = None
    for score, weight, mode in parts:
        scaled = normalize_score.overload(score, segment, mode)
        scaled = scaled if weight == 1.0 else scaled * weight
        total = scaled if total is None else total + scaled
    if total is None:
        raise ValueError("combine needs at least one score")
    return total
