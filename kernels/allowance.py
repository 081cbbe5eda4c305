"""allowance: how many visual tokens may stay from a decoder layer on, so that the layers' mean is a share of all.

With n0 tokens at the decoder's entry, `spent` tokens summed over the layers in front of a step, and L of them from the
step on, n tokens from here on make the mean over the D layers of the decoder (spent + L n) / (D n0).
"""

from __future__ import annotations

import torch

from tvc.errors import PolicyError
from tvc.kernels.op import Scope, Tap


def spent_tap(before: int | None) -> dict[str, Tap]:
    """The tap that `allowance` reads, once the layer that the step stands in front of is known."""
    return {"spent": Tap("spent", None if before is None else f"language.{before}")}


def allowance(
    scope: Scope, spent: tuple[torch.Tensor, torch.Tensor], permille: int, depth: int | None, before: int | None
) -> torch.Tensor:
    """[B, N] int64: tokens that each scope may keep from here on, at least 1 and at most those that it has.

    Args:
        spent: ([B, I] int64 tokens of each image at the decoder's entry, [B, I] their sum over the layers so far); the
            images are the scopes, or all in the only scope.
        permille: what the mean over all layers shall be, of the tokens at the entry.
        depth: layers of the decoder; before: the layer in front of which the step stands.
    """
    if depth is None or before is None:
        raise PolicyError(
            "a share of what all layers hold has no number of layers yet",
            where="cost",
            got="no depth",
            want="the layers of a model",
            fix="resolve the policy for a model first: tvc.policy.resolve(policy, layout)",
            slug="unresolved-depth",
        )
    images = torch.arange(spent[0].shape[1], device=scope.counts.device)
    to = torch.minimum(images, torch.ones_like(images) * (scope.counts.shape[1] - 1)).expand(spent[0].shape)
    entered, used = (torch.zeros_like(scope.counts).scatter_add(1, to, values) for values in spent)
    left = (entered * (permille * depth) - 1000 * used).clamp(min=0) // (1000 * (depth - before))
    return torch.minimum(left.clamp(min=1), scope.counts)
