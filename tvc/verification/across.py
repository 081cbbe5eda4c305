"""The definition of a compiled model whose text reads visual tokens by cross-attention.

The untouched model runs once over the prompt and all that was generated. In front of its decoder the steps are carried
out by hand on the visual tokens it is about to read; those that are dropped are masked from then on, with the lowest
number of the type, in every layer that reads them.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from tvc.chunks import Crossing
from tvc.kernels.op import Tap
from tvc.trace.crossing import across, images_of
from tvc.trace.layout import blocks
from tvc.trace.observe import plain_cache
from tvc.verification.oracle import Case, Expected, expect
from tvc.verification.steps import Sample, carry_out, constants


def define(model: Any, policy: Any, case: Case, slack: float) -> Expected:
    """Runs the untouched `model` on `case`, whichever way its text reads images.

    Args:
        policy: resolved.
        slack: see `carry_out`.
    """
    if case.crossing is None:
        return expect(model, policy, case, slack)
    return _expect_across(model, policy, case, case.crossing, slack)


def _expect_across(model: Any, policy: Any, case: Case, crossing: Crossing, slack: float) -> Expected:
    oracle = _Across(policy, case, crossing, slack, len(blocks(model)[0]))
    inputs = _with_generated(case)
    places = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)  # as `generate` numbers them
    steps = case.tokens.shape[1] + 1
    cache = plain_cache(model)
    given = {**inputs, "position_ids": places, "past_key_values": cache, "use_cache": True, "logits_to_keep": steps}
    names = inspect.signature(model.forward).parameters
    handle = model.get_decoder().register_forward_pre_hook(oracle.entering, with_kwargs=True)
    try:
        with torch.no_grad():
            logits = model(**{name: value for name, value in given.items() if name in names}).logits[:, -steps:]
    finally:
        handle.remove()
    expected = oracle.expected
    expected.logits, expected.cache = logits, cache
    if not expected.held:  # no image among the inputs: nothing is read across
        oracle.note(
            torch.zeros(len(places), 0, dtype=torch.bool, device=places.device), inputs["attention_mask"].bool()
        )
    return expected


def _with_generated(case: Case) -> dict[str, Any]:
    """The case's inputs with the generated tokens behind them, which read what the last token of the prompt reads."""
    inputs, tokens = dict(case.inputs), case.tokens
    ids = inputs["input_ids"]
    for name, value in inputs.items():
        if name == "input_ids":
            inputs[name] = torch.cat([value, tokens], 1)
        elif name == "attention_mask":
            inputs[name] = torch.cat([value.long(), torch.ones_like(tokens)], 1)
        elif value.shape[:2] == ids.shape:
            more = value[:, -1:].expand(-1, tokens.shape[1], *value.shape[2:])
            inputs[name] = torch.cat([value, more], 1)
    return inputs


class _Across:
    def __init__(self, policy: Any, case: Case, crossing: Crossing, slack: float, depth: int):
        self.policy, self.case, self.crossing, self.slack, self.depth = policy, case, crossing, slack, depth
        self.expected = Expected(torch.empty(0))

    def note(self, there: torch.Tensor, text: torch.Tensor) -> None:
        """Which columns every layer caches: `there` [B, V] where it reads across, else `text` [B, S]."""
        for layer in range(self.depth):
            self.expected.held.append(there if layer in self.crossing.layers else text)
            self.expected.doubts.append(self.expected.unsettled)

    def entering(self, _decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Before the decoder runs: the steps are carried out, and what they drop is masked."""
        if kwargs.get(self.crossing.states) is None:
            return args, kwargs
        batch, slots = kwargs[self.crossing.mask].shape[0], kwargs[self.crossing.mask].shape[2]
        _, states = across(kwargs, batch)
        mask = kwargs[self.crossing.mask].expand(batch, 1, slots, states.shape[1]).clone()
        lowest = torch.finfo(mask.dtype).min
        reads = (mask > lowest).squeeze(1)
        if self.crossing.rows:
            reads &= kwargs[self.crossing.rows][:, 0] > 0
        states, there = self._steps(states, reads.any(1))
        # A row that is left without any token reads no image: the model lets such a row read all there is.
        reads &= there[:, None]
        any_read = reads.any(2, keepdim=True)
        open_to = torch.where(any_read, reads, there[:, None])
        mask = torch.zeros_like(mask).masked_fill(~open_to[:, None], lowest)
        states = states * there.any(1)[:, None, None]  # no token at all: nothing is added
        more = {self.crossing.rows: any_read[:, None].to(mask.dtype)} if self.crossing.rows else {}
        text = self.case.inputs["attention_mask"].bool()
        text = torch.nn.functional.pad(text, (0, slots - text.shape[1]), value=True)
        self.note(there, text)
        return args, {**kwargs, self.crossing.states: states, self.crossing.mask: mask, **more}

    def _steps(self, states: torch.Tensor, real: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The visual tokens [B, V, D] behind all steps, and [B, V] bool which of them are there; padding stays."""
        images = images_of(dict(self.case.inputs)) or 1
        share = states.shape[1] // images
        nothing = torch.zeros(0, dtype=torch.int64, device=states.device)
        samples = []
        for row, visual in enumerate(real):
            slots = visual.nonzero().flatten()
            samples.append(Sample.fresh(row, nothing, slots, slots // share))
        for number, step in enumerate(self.policy.steps):
            outcomes = []
            for sample in samples:
                hidden = states[sample.row]

                def tap_value(tap: Tap, _primitive: Any, asked: Sample, hidden: torch.Tensor = hidden) -> Any:
                    return _tap(tap, asked, hidden)

                theirs = self._theirs(step.at, sample)
                outcome = carry_out(step, sample, hidden, tap_value, theirs, self.slack, self.expected.unsettled)
                outcomes.append(outcome)
                if outcome.feature is not None:
                    states = states.clone()
                    states[sample.row, outcome.sample.slots] = outcome.feature.to(states.dtype)
            samples = [outcome.sample.entering() for outcome in outcomes]
            self.expected.unsettled = max([self.expected.unsettled, *(outcome.unsettled for outcome in outcomes)])
            self.expected.outcomes.append((number, step.at, outcomes))
        there = ~real
        for sample in samples:
            there[sample.row, sample.slots] = True
        return states, there

    def _theirs(self, site: str, sample: Sample) -> torch.Tensor | None:
        """Columns of the visual tokens that the compiled model kept."""
        if site not in self.case.kept:
            return None
        row = self.case.kept[site][sample.row]
        return sample.slots[torch.isin(sample.number, row[row >= 0])]


def _tap(tap: Tap, sample: Sample, hidden: torch.Tensor) -> Any:
    """What can be had where visual tokens enter the decoder: their features, their order, trained weights."""
    if tap.kind == "weights":
        return constants(tap, hidden)
    return sample.origin[None] if tap.kind == "ordinal" else hidden[sample.slots][None]
