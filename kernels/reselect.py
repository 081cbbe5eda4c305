"""reselect: which cached keys a decode step attends to from a layer on, by the attention that the new token has paid.

Shapes:  attention [B, N] float, that of the new token in an earlier layer, mean over heads; before [B, P] float, what
         the step before saw (zeros: there was none, or it was no decode step); chosen_before [B, P] bool, what that one
         attended to, or None; visual [B, N] bool; single [B] bool
         -> chosen [B, N] bool, seen [B, N] float32; N - P new keys stand behind the P cached ones
Rule:    keys that are not visual are chosen. Of the visual ones the `count` (where count > 0, else a share of them,
         portions.py) that get most attention are; but where the cosine of the attention of this step and of the one
         before, over visual keys, is `alike` or more, all of them, or, given `chosen_before`, those of that step.
         With `alike` 0 nothing is alike.
Single:  a sample whose chunk is more than one new token, or a visual one, chooses everything and has seen nothing.
Ties:    the lower index wins. NaN counts as no attention.

Reference: DyCoke, arXiv 2411.15024, section on dynamic pruning of the cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tvc.kernels.op import op
from tvc.kernels.segments import budgets


def _cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(0)
    visual = torch.tensor([[0, 1, 1, 1, 1, 1, 0, 0], [0, 0, 1, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0]]).bool()
    attention, none, single = torch.rand(3, 8), torch.zeros(3, 7), torch.tensor([True, True, True])
    near, far = attention[:, :7] * visual[:, :7] * 0.5, attention[:, :7].flip(1) * visual[:, :7]
    last = torch.rand(3, 7) > 0.5
    yield "first-step", (attention, none, None, visual, single, 500, 0, 0.9)
    yield "first-step-last-choice", (attention, none, last, visual, single, 500, 0, 0.9)
    yield "alike", (attention, near, None, visual, single, 500, 0, 0.9)
    yield "alike-last-choice", (attention, near, last, visual, single, 500, 0, 0.9)
    yield "never-alike", (attention, near, None, visual, single, 500, 0, 0.0)
    yield "unlike", (attention, far, last, visual, single, 300, 0, 0.999)
    yield "count", (attention, far, None, visual, single, 0, 2, 0.999)
    yield "count-above-all", (attention, none, None, visual, single, 0, 9, 0.9)
    yield "keep-all", (attention, none, None, visual, single, 1000, 0, 0.9)
    yield "keep-none", (attention, none, None, visual, single, 100, 0, 0.9)
    yield "not-single", (attention, near, last, visual, torch.tensor([False, True, False]), 500, 0, 0.9)
    yield "equal", (torch.full((3, 8), 0.125), none, None, visual, single, 500, 0, 0.9)
    poisoned = attention.masked_fill(attention > 0.5, float("nan"))
    yield "nan", (poisoned, none, None, visual, single, 500, 0, 0.9)
    yield "prefill", (attention, none[:, :0], last[:, :0], visual, ~single, 500, 0, 0.9)
    yield "first-token", (attention[:, :1], none[:, :0], None, visual[:, :1], single, 500, 0, 0.9)


@op(_cases)
def reselect(
    attention: torch.Tensor,
    before: torch.Tensor,
    chosen_before: torch.Tensor | None,
    visual: torch.Tensor,
    single: torch.Tensor,
    permille: int,
    count: int,
    alike: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(chosen [B, N] bool, seen [B, N] float32): what this step attends to, and what it paid attention to."""
    keys, single = visual.shape[1], single.unsqueeze(1)
    attention = torch.where(torch.isnan(attention), 0.0, attention.float())
    seen = torch.where(visual & single, attention, 0.0)
    # Padded to N: of a slice behind P, a trace could not tell that the chunk's number of keys is left, where a step
    # decides it at run time.
    other = torch.nn.functional.pad(before.float(), (0, keys - before.shape[1]))
    number = visual.sum(1, keepdim=True)
    budget = budgets(number, permille, count)
    # What is not visual comes last, whatever attention it gets.
    order = torch.sort(torch.where(visual, attention, -1.0), dim=1, descending=True, stable=True).indices
    index = torch.arange(keys, device=visual.device).expand(visual.shape[0], -1)
    place = torch.zeros_like(order).scatter(1, order, index)
    chosen = ~visual | (place < budget)
    if alike > 0:
        sizes = (seen * seen).sum(1, keepdim=True).sqrt() * (other * other).sum(1, keepdim=True).sqrt()
        cosine = (seen * other).sum(1, keepdim=True) / sizes.clamp(min=1e-30)
        same = torch.ones_like(visual)
        if chosen_before is not None:
            fresh = (0, keys - chosen_before.shape[1])
            same = torch.nn.functional.pad(chosen_before.to(torch.int64), fresh, value=1) > 0
        # By logic: ONNX Runtime has no `where` of booleans.
        near = cosine >= alike
        chosen = (near & same) | (~near & chosen)
    return chosen | ~single, seen
