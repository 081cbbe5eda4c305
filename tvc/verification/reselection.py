"""What decode steps attend to, by hand: keys that a rule leaves out are masked in the untouched model.

Of two keys that get almost the same attention, and of a step that is almost as alike as the rule asks, rounding may
decide either way. Within it the compiled model's choice is followed, beyond it this one's, and that is reported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from tvc.trace.observe import Seen

# [steps] of [B, S] bool: columns that the compiled model attended to; see `of_run`.
Theirs = Sequence[torch.Tensor]


@dataclasses.dataclass
class Choice:
    """What one decode step of one sample leaves out."""

    step: int  # 1 for the first token that is fed back
    sample: int
    different: int = 0  # visual tokens that the compiled model chose otherwise
    gap: float = 0.0  # how far its choice is from one that the rule allows
    allowed: float = 0.0  # what rounding explains of that


class Reselection:
    """Carries out a policy's `reselect` on the untouched model, over all steps at once."""

    def __init__(self, rule: Any, prompt: int, theirs: Theirs, slack: float):
        """
        Args:
            rule: the resolved policy's.
            prompt: columns of the prompt; each column behind it is a decode step.
            theirs: what the compiled model attended to in each step; empty where that is not known.
            slack: relative difference of attention that rounding explains.
        """
        self.rule, self.prompt, self.theirs, self.slack = rule, prompt, theirs, slack
        self.choices: list[Choice] = []
        self.open: torch.Tensor | None = None  # [B, S, S] bool: what rows may attend to, as far as the rule goes

    def look(self, seen: Seen, slots: Sequence[torch.Tensor]) -> None:
        """Decides every step from the attention of the layer that tells.

        Args:
            seen: the layer's query, key and mask over all columns.
            slots: per sample the columns [V] of its visual tokens.
        """
        batch, size = seen.query.shape[0], seen.query.shape[2]
        self.choices = []
        self.open = torch.ones(batch, size, size, dtype=torch.bool, device=seen.query.device)
        for sample, visual in enumerate(slots):
            before, last = None, torch.ones(len(visual), dtype=torch.bool, device=visual.device)
            for step in range(1, size - self.prompt + 1):
                row = self.prompt + step - 1
                now = _paid(seen, sample, row)[visual]
                theirs = self.theirs[step - 1][sample, visual] if step <= len(self.theirs) else None
                last = self._decided(Choice(step, sample), now, before, last, theirs)
                self.open[sample, row, visual] = last
                before = now

    def narrowed(self, mask: torch.Tensor, layer: int) -> torch.Tensor:
        """The mask [B, 1, Q, S] bool of `layer` without the keys that steps leave out."""
        if layer < self.rule.first or self.open is None:
            return mask
        return mask & self.open[:, None, -mask.shape[2] :]

    def _decided(
        self,
        choice: Choice,
        now: torch.Tensor,
        before: torch.Tensor | None,
        last: torch.Tensor,
        theirs: torch.Tensor | None,
    ) -> torch.Tensor:
        """[V] bool: the visual tokens that the step attends to.

        Args:
            now, before: [V] attention of this step and of the one before, None where there was none.
            last: [V] bool what the step before attended to.
            theirs: [V] bool what the compiled model attended to, where that is known.
        """
        count = self.rule.keep.kept(len(now))
        best = torch.zeros(len(now), dtype=torch.bool, device=now.device)
        best[now.sort(descending=True, stable=True).indices[:count]] = True
        same = torch.ones_like(best) if self.rule.bug_compatible else last
        cosine, unsure = _likeness(now, before, self.slack)
        alike = bool(self.rule.alike) and cosine >= self.rule.alike
        mine = same if alike else best
        self.choices.append(choice)
        if theirs is None or torch.equal(theirs, mine):
            return mine
        choice.different = int((theirs != mine).sum())
        far = abs(cosine - self.rule.alike) if self.rule.alike else float("inf")
        ways = []  # (how far it is from what the rule allows, how far rounding explains), either branch
        if torch.equal(theirs, same):
            ways.append((0.0 if alike else far, unsure))
        if int(theirs.sum()) == count:
            score = self.slack * float(now.max()) if len(now) else 0.0
            gap = _gap(now, best, theirs)
            if not alike or far <= unsure:
                ways.append((gap, score))
        choice.gap, choice.allowed = min(ways, key=lambda way: way[0] - way[1], default=(float("inf"), 0.0))
        return theirs if choice.gap <= choice.allowed else mine


def _paid(seen: Seen, sample: int, row: int) -> torch.Tensor:
    """[S] float64: the attention of the token in column `row`, mean over heads."""
    query, key = seen.query[sample, :, row].double(), seen.key[sample].double()
    key = key.repeat_interleave(len(query) // len(key), 0)
    logits = torch.einsum("hd,hnd->hn", query, key) * seen.scale
    if seen.softcap:
        logits = (logits / seen.softcap).tanh() * seen.softcap
    allowed = torch.arange(key.shape[1], device=key.device) <= row
    if seen.mask is not None:
        own = seen.mask[sample if seen.mask.shape[0] > 1 else 0, :, row]
        allowed = allowed & (own if own.dtype == torch.bool else own >= 0)
    return logits.masked_fill(~allowed, float("-inf")).softmax(-1).mean(0)


def _likeness(now: torch.Tensor, before: torch.Tensor | None, slack: float) -> tuple[float, float]:
    """The cosine of two steps' attention, 0 where there is nothing to compare; and what rounding may add to it."""
    if before is None or not len(now):
        return 0.0, 0.0
    sizes = [float(one.norm()) for one in (now, before)]
    if not all(sizes):
        return 0.0, 0.0
    # Noise of `slack` times the largest entry in each of V entries turns a vector by that much at most.
    turns = [slack * float(one.max()) * len(one) ** 0.5 / size for one, size in zip((now, before), sizes, strict=True)]
    return float(now @ before) / (sizes[0] * sizes[1]), sum(turns)


def _gap(now: torch.Tensor, best: torch.Tensor, theirs: torch.Tensor) -> float:
    """How far the attention to tokens that were chosen otherwise lies from the cut."""
    if torch.equal(best, theirs):
        return 0.0
    return float((now[best != theirs] - now[best].min()).abs().max())


def of_run(caches: Sequence[Any], stage: int, columns: int) -> list[torch.Tensor]:
    """Per decode step [B, columns] bool: what a compiled model attended to, from its caches after each of them.

    A token that stands in no cache is not attended to. Empty where the caches hold no choice.
    """
    found = []
    for cache in caches:
        chosen = cache.marks.get(f"chosen.{stage}")
        if chosen is None:
            return []
        places = cache.key_positions[stage]
        made = torch.zeros(len(places), columns + 1, dtype=torch.bool, device=places.device)
        where = torch.where((places < 0) | (places >= columns), columns, places)
        found.append(made.scatter(1, where, chosen)[:, :columns])
    return found
