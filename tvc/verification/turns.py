"""Calls that follow each other on one cache, said of the untouched model: its one call over everything they brought.

A later call brings visual tokens of its own, and steps reduce these alone. Scores that remember earlier calls are asked
once, of the tokens of all calls together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from tvc.chunks import memory_name
from tvc.trace.observe import kept_offsets, named_arguments, plain_cache
from tvc.trace.parts import PIXEL_NAMES
from tvc.trace.sample import sample_axis
from tvc.verification.samples import Inputs, image_lengths, joined, widened
from tvc.verification.steps import Sample, TapValue, remembers, taps_of


@dataclasses.dataclass(frozen=True)
class Talk:
    """What two calls bring, and the same as one prompt; `start` is the column of it where the second one begins."""

    first: Inputs
    second: Inputs
    whole: Inputs
    start: int


def talk_of(model: Any, several: Sequence[Inputs], pad: int) -> Talk | None:
    """Each sample, and in a later call the next one with the negatives of its pictures.

    None where pixels do not fit together.

    Args:
        several: one sample each, of any length.
        pad: the token that fills rows up.
    """
    firsts, seconds = list(several), [_negative(sample) for sample in (*several[1:], several[0])]
    width = max(sample["input_ids"].shape[1] for sample in several)
    firsts, seconds = ([widened(one, width, pad) for one in each] for each in (firsts, seconds))
    wholes = [_one_prompt(model, one, other) for one, other in zip(firsts, seconds, strict=True)]
    found = [whole for whole in wholes if whole is not None]
    parts = [joined(model, each, pad) for each in (firsts, seconds, found)] if len(found) == len(wholes) else []
    if not parts or any(part is None for part in parts):
        return None
    first, second, whole = (part for part in parts if part is not None)
    return Talk(first, second, whole, width)


def _negative(sample: Inputs) -> Inputs:
    """The sample with other pictures of the same sizes."""
    return {name: -value if name in PIXEL_NAMES else value for name, value in sample.items()}


def _one_prompt(model: Any, one: Inputs, other: Inputs) -> Inputs | None:
    """Two samples as one, its pictures side by side as the model takes those of one prompt."""
    lengths = [*image_lengths(model, one), *image_lengths(model, other)]
    for axis in (None, 1):  # pictures of all samples in one row, or each sample's in its own
        made = {name: torch.cat([one[name], other[name]], _axis(model, name, one, axis)) for name in one}
        try:
            if image_lengths(model, made) == lengths:
                return made
        except (ValueError, RuntimeError, TypeError, LookupError):
            continue  # not the way this model takes them
    return None


def _axis(model: Any, name: str, sample: Inputs, among: int | None) -> int:
    value = sample[name]
    if value.shape[:2] == sample["input_ids"].shape:
        return 1
    return sample_axis(model, name, value) if among is None else min(among, value.dim() - 1)


def positions(model: Any, whole: Inputs, more: int) -> torch.Tensor | None:
    """The positions that the model gives a prompt and `more` text tokens behind it, None where it gives none."""
    found: list[torch.Tensor | None] = []

    def given(decoder: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(named_arguments(decoder, args, kwargs).get("position_ids"))

    handle = model.get_decoder().register_forward_pre_hook(given, with_kwargs=True)
    try:
        with kept_offsets(model):
            model(**whole)
    finally:
        handle.remove()
    places = found[0]
    if places is None:
        return None
    behind = places[..., -1:] + torch.arange(1, more + 1, device=places.device)
    return torch.cat([places, behind.to(places.dtype)], -1)


def ends(model: Any, talk: Talk) -> tuple[torch.Tensor, torch.Tensor]:
    """[1, vocabulary] what the model itself answers to two calls without padding, and to one prompt with all of it."""
    cache = plain_cache(model)
    model(**talk.first, past_key_values=cache, use_cache=True)
    given = {**talk.second, "attention_mask": talk.whole["attention_mask"]}
    apart = model(**given, past_key_values=cache, use_cache=True).logits[:, -1]
    return apart, model(**talk.whole).logits[:, -1]


def parted(
    row: int, mask: torch.Tensor, visual: torch.Tensor, owner: torch.Tensor, starts: Sequence[int]
) -> list[Sample]:
    """What each call brought of the sample in a row, fresh.

    Args:
        mask: [S] bool, columns of the prompts that are no padding.
        visual: [S] bool, those of visual tokens.
        owner: [S] int64 which image or video of the batch each of these is of.
        starts: the first column of each call.
    """
    made, before = [], 0
    for start, stop in zip(starts, [*starts[1:], len(mask)], strict=True):
        inside = torch.zeros_like(mask)
        inside[start:stop] = True
        slots = (visual & inside).nonzero().flatten()
        known: dict[int, int] = {}  # numbers in the order in which the call shows its images
        numbers = [known.setdefault(image, len(known)) for image in owner[slots].tolist()]
        segment = torch.tensor(numbers, dtype=torch.int64, device=mask.device)
        sample = Sample.fresh(row, (mask & inside & ~visual).nonzero().flatten(), slots, segment)
        made.append(dataclasses.replace(sample, number=sample.number + before, start=start, stop=stop))
        before += len(slots)
    return made


def before(samples: Sequence[Sample], sample: Sample) -> list[Sample]:
    """Those of the samples that are what earlier calls brought of `sample`, in order."""
    return [one for one in samples if one.row == sample.row and one.start < sample.start]


def memories(step: Any, samples: Sequence[Sample], tap_value: TapValue) -> dict[str, torch.Tensor]:
    """[B, ...] what the scores of a step remember behind the last call, by the names of the decoder's outputs.

    Args:
        samples: as they came to the step.
    """
    made: dict[str, torch.Tensor] = {}
    for number, term in enumerate(step.score):
        if not remembers(term.primitive):
            continue
        last = {sample.row: sample.behind(before(samples, sample)) for sample in samples}
        rows = [term.primitive.remembered(**taps_of(term.primitive, one, tap_value)) for one in last.values()]
        for name in rows[0]:
            output = memory_name(step.at, number, name).removeprefix("past_")
            made[output] = torch.cat([row[name] for row in rows])
    return made
