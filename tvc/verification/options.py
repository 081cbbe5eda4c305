"""What a policy says of all layers at once, carried out by hand: whom tokens see, and what caches hold of frames.

Columns are those of a sample's sequence: its prompt and what was generated behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from tvc.policy.options import Chunks, Unrotated
from tvc.trace.observe import Seen
from tvc.verification.masks import out_of_reach
from tvc.verification.steps import Sample, text_behind
from tvc.verification.unrotated import UnrotatedKeys

Frames = Sequence[tuple[torch.Tensor, torch.Tensor]]


class Options:
    """The options of one policy on one batch; without any, everything stays as it is."""

    def __init__(self, policy: Any, prompt: int, slack: float):
        self.pool, self.steps = policy.cache, policy.steps
        self.chunks = policy.attention if isinstance(policy.attention, Chunks) else None
        self.unrotated = UnrotatedKeys() if isinstance(policy.attention, Unrotated) else None
        self.prompt, self.slack = prompt, slack
        self.leader: dict[int, torch.Tensor] = {}  # per layer [B, S]: the column that stands for each one

    def enter(
        self,
        samples: Sequence[Sample],
        frames: Frames,
        hidden: torch.Tensor,
        cached: Callable[[int], torch.Tensor | None],
        depth: int,
    ) -> None:
        """Where the decoder begins.

        Args:
            frames: per sample the frame and the place of each of its visual tokens.
            hidden: [B, S, D] what enters the first block.
            cached: the compiled model's values of a layer by column, NaN where it holds nothing.
            depth: layers.
        """
        self.frame = torch.full(hidden.shape[:2], -1, dtype=torch.int64, device=hidden.device)
        for sample in samples:
            self.frame[sample.row, sample.slots] = frames[sample.row][0][sample.number]
        if self.unrotated is not None:
            self.unrotated.enter(samples, hidden)
        if self.chunks is not None:
            self.unseen = out_of_reach(self.frame, self.chunks.frames, self.chunks.previous)
        if self.pool is not None:
            self.whole = torch.zeros_like(self.frame, dtype=torch.bool)
            cut = [int((step.evict or step.at).removeprefix("language.")) for step in self.steps]
            whole = range(min([depth, *cut]))  # layers whose caches lose nothing else
            theirs = next((values for layer in whole if (values := cached(layer)) is not None), None)
            for sample in samples:
                held = None if theirs is None else ~theirs[sample.row].isnan().any(2).any(0)
                self._choose(sample, hidden[sample.row].float(), held)

    def _choose(self, sample: Sample, hidden: torch.Tensor, held: torch.Tensor | None) -> None:
        """Marks the columns that stay as they are; of chunks that are as good as each other, those that were `held`."""
        rule = self.pool
        own = self.frame[sample.row, sample.slots] // rule.chunk
        numbers = sorted(set(own.tolist()))
        if not numbers:
            return
        stays = {n for n in numbers if n < rule.first or n > numbers[-1] - rule.last}
        if rule.best:
            asked = hidden[text_behind(sample)].mean(0)
            likeness = torch.nn.functional.cosine_similarity(hidden[sample.slots], asked[None], dim=1)
            score = {n: float(likeness[own == n].mean()) for n in numbers}
            order = sorted(numbers, key=lambda n: (-score[n], n))
            chosen, edge = set(order[: rule.best]), score[order[min(rule.best, len(order)) - 1]]
            slack = self.slack * max(abs(value) for value in score.values())
            near = {n for n in numbers if abs(score[n] - edge) <= slack}
            if held is not None:
                found = {n for n in near - stays if bool(held[sample.slots[own == n]].all())}
                room = len(chosen & near)  # those that stay anyway may take some of it
                if room - len(near & stays) <= len(found) <= room:
                    chosen = (chosen - near) | found
            stays |= chosen
        for n in stays:
            self.whole[sample.row, sample.slots[own == n]] = True

    def narrowed(self, mask: torch.Tensor) -> torch.Tensor:
        """[B, 1, Q, S] the mask of the last Q columns without what chunks do not see."""
        return mask if self.chunks is None else mask & ~self.unseen[:, None, -mask.shape[2] :]

    def away(self, layer: int, held: torch.Tensor) -> torch.Tensor:
        """[B, S] bool: those of the columns `held` that leave the layer's cache, as another stands for them."""
        if self.pool is None:
            return torch.zeros_like(held)
        columns = torch.arange(held.shape[1], device=held.device).expand(held.shape)
        leader = columns.clone()
        grouped = held & (self.frame >= 0) & ~self.whole
        for row in range(len(held)):
            for number in self.frame[row, grouped[row]].unique():
                own = (grouped[row] & (self.frame[row] == number)).nonzero().flatten()
                for run in own.split(self.pool.tokens):
                    leader[row, run] = run[0]
        self.leader[layer] = leader
        return leader != columns

    def attend(self, layer: int, seen: Seen) -> torch.Tensor | None:
        """The mask to attend with; generated tokens see means in the place of runs, which stand behind all columns."""
        if self.unrotated is not None:
            return self.unrotated.attend(layer, seen)
        if self.pool is None or seen.mask is None:
            return seen.mask
        leader, mask = self.leader[layer], seen.mask if seen.mask.dtype == torch.bool else seen.mask >= 0
        columns = torch.arange(leader.shape[1], device=leader.device)
        members = torch.zeros_like(leader).scatter_add(1, leader, torch.ones_like(leader))
        run = (members > 1)[:, None, None, :]  # columns that stand for several
        later = (columns >= self.prompt)[:, None]
        means = mask & run & later
        seen.key = torch.cat([seen.key, self.means(layer, seen.key)], 2)
        seen.value = torch.cat([seen.value, self.means(layer, seen.value)], 2)
        return torch.cat([mask & ~(run & later), means], 3)

    def means(self, layer: int, values: torch.Tensor) -> torch.Tensor:
        """[B, G, S, d]: at each column that stands for others the mean of all of them, elsewhere what was there."""
        made, leader = values.clone(), self.leader[layer]
        for row in range(len(leader)):
            first, count = leader[row].unique(return_counts=True)
            for column in first[count > 1]:
                run = leader[row] == column
                made[row, :, column] = values[row][:, run].float().mean(1).to(values.dtype)
        return made

    def left(self, held: Sequence[torch.Tensor], lost: Sequence[torch.Tensor], cache: Any) -> list[torch.Tensor]:
        """Per layer [B, S] bool: the columns that the compiled model's caches hold.

        Args:
            held: per layer the columns that ran through it.
            lost: those of them that were evicted.
            cache: the untouched model's, which gets the means, or raw keys.
        """
        if self.unrotated is not None:
            self.unrotated.put(cache)
        made = []
        for layer, (columns, gone) in enumerate(zip(held, lost, strict=True)):
            made.append(columns & ~gone & ~self.away(layer, columns & ~gone))
            own = cache.layers[layer]
            if self.pool is not None and getattr(own, "keys", None) is not None:
                own.keys, own.values = self.means(layer, own.keys), self.means(layer, own.values)
        return made
