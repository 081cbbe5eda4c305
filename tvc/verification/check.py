"""Compares a compiled model with its definition, output by output."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from tvc.trace.layout import blocks
from tvc.trace.observe import cached_state, replaced
from tvc.trace.sample import visual_token_ids
from tvc.verification import samples
from tvc.verification.across import define
from tvc.verification.oracle import Case, Expected
from tvc.verification.report import TOLERANCES, Comparison, Report, Tolerance
from tvc.verification.reselection import of_run
from tvc.verification.turns import Talk, ends, positions, talk_of

STEPS = 8
LARGE = 1_000_000_000  # parameters from which on one short comparison has to do
_MARK = re.compile(r"(image|video|visual|vision).*token_(id|index)")
LENGTHS = (0, 3, 7)  # tokens that the samples of the padded batch are longer than the given one


def check(
    compiled: Any,
    model: Any,
    inputs: Mapping[str, Any] | None = None,
    *,
    steps: int = STEPS,
    tolerance: float | None = None,
) -> Report:
    """Compares `compiled` with the untouched `model`; both on one device and of one type.

    Args:
        compiled: a `CompiledModel`.
        model: the module that it was made from.
        inputs: what the processor returned; default: a picture and a prompt made for the purpose.
        steps: tokens to generate; models beyond a billion parameters get two.
        tolerance: relative difference that is allowed; default: by the model's type.

    Raises:
        VerificationError: they differ; it carries the report.
    """
    report = compare(compiled, model, inputs, steps=steps, tolerance=tolerance)
    report.raise_if_failed()
    return report


def compare(
    compiled: Any,
    model: Any,
    inputs: Mapping[str, Any] | None = None,
    *,
    steps: int = STEPS,
    tolerance: float | None = None,
) -> Report:
    """What `check` finds, whether it passed or not."""
    allowed = TOLERANCES[compiled.dtype]
    if tolerance is not None:
        allowed = Tolerance(tolerance, "asked for")
    given = samples.placed(inputs, model) if inputs is not None else samples.default_inputs(model, compiled.processor)
    given = samples.left_padded(given)
    large = sum(p.numel() for p in model.parameters()) > LARGE
    with torch.no_grad():
        return _Comparing(compiled, model, allowed, min(steps, 2) if large else steps).all(given, large)


@dataclasses.dataclass
class _Comparing:
    compiled: Any
    model: Any
    tolerance: Tolerance
    steps: int
    left_out: list[str] = dataclasses.field(default_factory=list)  # see `Report`

    def all(self, given: samples.Inputs, large: bool) -> Report:
        batch = len(given["input_ids"])
        alone = samples.singles(self.model, given, samples.image_lengths(self.model, given))
        if alone is not None:
            alone = [sample for sample in alone if samples.holds_image(self.model, sample)]
        rows: list[Comparison] = []
        if large:
            self.left_out.append("a padded batch, which takes as many runs again (the model has a billion parameters)")
        elif not alone:
            self.left_out.append("samples alone and in a padded batch (what they share of the inputs is not known)")
        if batch > 1 or not alone:
            rows += self._case(f"batch {batch}", given)[0]
        if alone and (batch == 1 or not large):
            rows += self._case("batch 1", alone[0])[0]
        if alone and not large:
            rows += self._padded(alone[0])
        if alone and self.compiled.engine.interface.shape.memories:
            rows += self._later_call(alone[0], large)
        return Report(tuple(rows), tuple(self.left_out))

    def _later_call(self, sample: samples.Inputs, large: bool) -> list[Comparison]:
        """Two calls on one cache, since scores remember the first one; by hand everything is one prompt."""
        pad, lengths = _pad_token(self.model), LENGTHS[:1] if large else LENGTHS
        several = [samples.lengthened(sample, more) for more in lengths]
        talk = talk_of(self.model, several, pad) or talk_of(self.model, [sample], pad)
        if talk is None:
            self.left_out.append("a later call (pictures of two calls do not fit into one prompt)")
            return []
        run = converse(self.compiled, self.model, talk, self.steps)
        rows = self._compared(f"later call, batch {len(talk.whole['input_ids'])}", talk.whole, run, (0, talk.start))
        alone = talk_of(self.model, [sample], pad)
        if not self.compiled.engine.interface.shape.spans or (
            alone is not None and _difference(*ends(self.model, alone)) <= self.tolerance.allowed(run.logits)
        ):
            return rows
        # Tokens of this model see others where all is one prompt: only in front of its layers is that as in two calls.
        self.left_out.append(
            "a later call behind the first layer (the untouched model's own answers to two calls differ)"
        )
        return [row for row in rows if row.site == "language.0" and row.output in ("selection", "plan", "memory")]

    def _padded(self, sample: samples.Inputs) -> list[Comparison]:
        """Samples of three lengths in one batch, and each of them by itself."""
        several = [samples.lengthened(sample, more) for more in LENGTHS]
        batch = samples.joined(self.model, several, pad=_pad_token(self.model))
        if batch is None:
            self.left_out.append("a padded batch (the samples do not fit into one)")
            return []
        rows, together = self._case("padded batch 3", batch)
        worst, largest, where = 0.0, together.logits[:, :1], ""
        for number, one in enumerate(several):
            apart = self.compiled(**one)
            pads = batch["input_ids"].shape[1] - one["input_ids"].shape[1]
            if not _same_kept(apart.kept, together.kept, number, pads):  # rounding may settle near ties another way
                rows += self._case(f"sample {number} of padded batch 3", one)[0]
                continue
            difference = _difference(together.logits[number, 0], apart.logits[0, -1])
            if not difference <= worst:
                worst, where = difference, f"sample {number}"
        allowed = self.tolerance.allowed(largest, together.doubt)
        if not worst <= allowed:
            own = self._own_difference(batch, several)
            if worst <= 2 * own:
                allowed, where = 2 * own, f"{where}: the untouched model itself depends on padding"
        if not worst <= allowed and together.unsettled > 1:  # then each of the two has its own definition
            alone = [row for number, one in enumerate(several) for row in self._case(f"sample {number}", one)[0]]
            if all(row.passed for row in (*rows, *alone)):
                allowed, where = worst, f"{where}: alone, rounding settles a merge otherwise"
        rows.append(Comparison("padded batch 3", "all", "batch of 3 = 3 of 1", worst, allowed, where))
        return rows

    def _own_difference(self, batch: samples.Inputs, several: list[samples.Inputs]) -> float:
        """How much the untouched model's answers to samples differ from those to the same samples in a padded batch."""
        together = self.model(**batch).logits[:, -1]
        return max(_difference(together[i], self.model(**one).logits[0, -1]) for i, one in enumerate(several))

    def _case(self, name: str, inputs: samples.Inputs) -> tuple[list[Comparison], Run]:
        run = generate(self.compiled, self.model, inputs, self.steps)
        return self._compared(name, inputs, run), run

    def _compared(self, name: str, inputs: samples.Inputs, run: Run, turns: tuple[int, ...] = (0,)) -> list[Comparison]:
        """What a run gave beside what it has to give; `turns`: the first columns of the calls that prompts came in."""
        case = Case(
            inputs,
            run.tokens[:, :-1],
            run.kept,
            self.compiled.engine.interface.shape.axes,
            visual_token_ids(self.model),
            functools.partial(run.values, self.compiled, inputs["input_ids"].shape[1] + self.steps - 1),
            run.chosen,
            self.compiled.engine.interface.shape.crossing,
            turns,
        )
        expected = define(self.model, self.compiled.policy, case, self.tolerance.relative)
        rows = [*self._selections(name, case, expected), *self._choices(name, expected)]
        rows += [*self._memories(name, run, expected), *self._caches(name, run, expected)]
        for step in range(run.logits.shape[1]):
            rows.append(self._logits(name, step, run.logits[:, step], expected.logits[:, step], expected.doubts[-1]))
        run.doubt, run.unsettled = expected.doubts[-1], expected.unsettled
        return rows

    def _logits(self, name: str, step: int, got: torch.Tensor, want: torch.Tensor, doubt: float) -> Comparison:
        site = self._site_before(self._depth())
        where = _place(got, want, "sample token")
        return self._number(name, site, f"logits.{step}", got, want, doubt, where)

    def _number(
        self, name: str, site: str, output: str, got: torch.Tensor, want: torch.Tensor, doubt: float, where: str
    ) -> Comparison:
        if doubt > 1:
            where += f"; rounding moves merged values up to {doubt:.1f} times further"
        return Comparison(name, site, output, _difference(got, want), self.tolerance.allowed(want, doubt), where)

    def _selections(self, name: str, case: Case, expected: Expected) -> Iterator[Comparison]:
        for number, site, outcomes in expected.outcomes:
            label = f"step {number}"
            worst = max(outcomes, key=lambda o: o.gap / o.scale if o.scale else o.gap, default=None)
            if worst is not None:
                where = f"{label}, {worst.different} tokens" if worst.different else label
                slack = self.tolerance.relative * worst.scale
                yield Comparison(name, site, "selection", worst.gap, slack, where)
            late = [len(o.sample.slots) - o.planned for o in outcomes]
            exact = all(o.exact for o in outcomes)
            off = max((abs(d) if exact else max(d, 0) for d in late), default=0)
            yield Comparison(name, site, "plan", float(off), 0.0, label)
        for site, kept in case.kept.items():
            if site.startswith("language."):
                yield self._kept(name, site, kept, case, expected)

    def _choices(self, name: str, expected: Expected) -> Iterator[Comparison]:
        """What decode steps attend to, the one of them that is furthest from the rule."""
        if expected.choices:
            worst = max(expected.choices, key=lambda choice: choice.gap - choice.allowed)
            where = f"sample {worst.sample}, token {worst.step}, {worst.different} tokens" if worst.different else ""
            site = self.compiled.policy.reselect.at
            yield Comparison(name, site, "reselection", worst.gap, worst.allowed, where)

    def _memories(self, name: str, run: Run, expected: Expected) -> Iterator[Comparison]:
        """What scores remember behind the last call."""
        for output, want in expected.memories.items():
            site, got = output.removeprefix("memory.").rsplit(".", 2)[0], run.cache.marks[output]
            where = _place(got, want, f"sample{' entry' * (want.dim() - 1)}")
            yield self._number(name, site, "memory", got, want, 1.0, f"{output.rsplit('.', 1)[1]}, {where}")

    def _kept(self, name: str, site: str, kept: torch.Tensor, case: Case, expected: Expected) -> Comparison:
        """Every text token and what the step left, ascending."""
        left = [o.sample for n, s, outcomes in expected.outcomes if s == site for o in outcomes]
        wrong, where = 0, ""
        for number, row in enumerate(kept):
            row, own = row[row >= 0], [sample for sample in left if sample.row == number]
            want = torch.cat([part for sample in own for part in (sample.text, sample.slots)]).sort().values
            if not torch.equal(row, want):
                different = len(set(row.tolist()) ^ set(want.tolist())) or 1
                wrong, where = max(wrong, different), f"sample {number}"
        return Comparison(name, site, "kept", float(wrong), 0.0, where)

    def _caches(self, name: str, run: Run, expected: Expected) -> list[Comparison]:
        """Places, keys and values of every layer; one row where all of them agree."""
        rows = []
        for layer, (got, want) in enumerate(zip(run.cache.layers, expected.cache.layers, strict=True)):
            site, doubt = self._site_before(layer + 1), expected.doubts[layer]
            if getattr(got, "keys", None) is None and cached_state(got) is None:  # it reads another layer's
                continue
            one, other = cached_state(got), cached_state(want)
            if one is not None and other is not None:
                where = _place(one, other, "sample channel place")
                rows.append(self._number(name, site, f"state.{layer}", one, other, doubt, where))
                continue
            places, held = run.places(self.compiled, layer), expected.held[layer]
            rows.append(self._places(name, site, layer, places, held, got.keys.shape[2]))
            if not rows[-1].passed:
                continue
            for output, ours, theirs in (("key", got.keys, want.keys), ("value", got.values, want.values)):
                index = places.clamp(min=0)[:, None, :, None]
                aligned = theirs.gather(2, index.expand(-1, theirs.shape[1], -1, theirs.shape[3]))
                real = (places >= 0)[:, None, :, None]
                one, other = torch.where(real, ours, 0.0), torch.where(real, aligned, 0.0)
                where = _place(one, other, "sample head token channel")
                rows.append(self._number(name, site, f"{output}.{layer}", one, other, doubt, where))
        if not all(row.passed for row in rows):
            return [row for row in rows if not row.passed]
        worst = max((r for r in rows if r.allowed), key=lambda r: r.worst / r.allowed)
        return [dataclasses.replace(worst, where=f"worst of {self._depth()} layers' keys and values")]

    def _places(
        self, name: str, site: str, layer: int, places: torch.Tensor, held: torch.Tensor, length: int
    ) -> Comparison:
        output = f"cache.{layer}"
        if length != places.shape[1]:
            return Comparison(
                name, site, output, float(abs(length - places.shape[1])), 0.0, "keys and places differ in length"
            )
        for row, (have, want) in enumerate(zip(places, held, strict=True)):
            have, want = have[have >= 0], want.nonzero().flatten()
            if not torch.equal(have, want):
                different = len(set(have.tolist()) ^ set(want.tolist())) or 1
                return Comparison(name, site, output, float(different), 0.0, f"places of sample {row}")
        return Comparison(name, site, output, 0.0, 0.0)

    def _depth(self) -> int:
        return len(blocks(self.model)[0])

    def _site_before(self, layer: int) -> str:
        """The last cut in front of block `layer`."""
        found = "start"
        for step in self.compiled.policy.steps:
            index = int(step.at.removeprefix("language.")) if step.at.startswith("language.") else -1
            if index < layer:
                found = step.at
        return found


@dataclasses.dataclass
class Run:
    """What the compiled model did in one generation."""

    tokens: torch.Tensor  # [B, steps] generated
    logits: torch.Tensor  # [B, steps, vocabulary]
    kept: dict[str, torch.Tensor]
    cache: Any  # the `StagedCache` after the last call
    chosen: list[torch.Tensor]  # per decode step [B, S] bool what it attended to; none where it attends to everything
    doubt: float = 1.0  # how much of a difference behind its merges is rounding, see `Tolerance.allowed`
    unsettled: float = 1.0  # the same, had no choice been followed

    def places(self, compiled: Any, layer: int) -> torch.Tensor:
        interface = compiled.engine.interface
        crosses = interface.shape.crosses(layer)
        places: torch.Tensor = (
            self.cache.crossed if crosses else self.cache.key_positions[interface.stage_of_layer[layer]]
        )
        return places

    def values(self, compiled: Any, length: int, layer: int) -> torch.Tensor | None:
        """[B, H, length, d] what a layer cached of every place of the sequence, NaN where nothing; None if not that."""
        got = self.cache.layers[layer]
        if getattr(got, "values", None) is None or cached_state(got) is not None:
            return None
        places = self.places(compiled, layer)
        batch, heads, held, width = got.values.shape
        if held != places.shape[1]:
            return None
        made = got.values.new_full((batch, heads, length + 1, width), float("nan"))  # one more place takes the pads
        where = torch.where(places < 0, length, places)[:, None, :, None]
        return made.scatter(2, where.expand(got.values.shape), got.values)[:, :, :length]


def generate(compiled: Any, model: Any, inputs: samples.Inputs, steps: int) -> Run:
    """Greedy search by the compiled model, whose calls are recorded. Image tokens and the end are never chosen."""
    answers: list[Any] = []
    call = compiled.engine.call

    def recorded(given: dict[str, Any]) -> Any:
        answers.append(call(given))
        return answers[-1]

    with replaced(compiled.engine, "call", recorded), _quiet():
        ids = compiled.generate(
            **inputs,
            max_new_tokens=steps,
            min_new_tokens=steps,
            do_sample=False,
            num_beams=1,
            suppress_tokens=_unwanted(model),
        )
    return Run(
        tokens=ids[:, inputs["input_ids"].shape[1] :],
        logits=torch.cat([answer.logits[:, -1:] for answer in answers], 1),
        kept=answers[0].kept,
        cache=answers[-1].cache,
        chosen=of_run([answer.cache for answer in answers[1:]], compiled.engine.interface.stages - 1, ids.shape[1] - 1),
    )


def converse(compiled: Any, model: Any, talk: Talk, steps: int) -> Run:
    """Greedy search by the compiled model behind two calls on one cache."""
    places = positions(model, talk.whole, steps) if compiled.engine.interface.shape.axes else None
    first = _called(compiled, talk.first, None, places)
    mask = talk.whole["attention_mask"]
    answer = _called(compiled, {**talk.second, "attention_mask": mask}, first, places)
    kept = {site: torch.cat([rows, answer.kept[site]], 1) for site, rows in first.kept.items()}
    logits, tokens = [answer.logits[:, -1]], []
    while True:
        said = logits[-1].clone()
        said[:, _unwanted(model)] = float("-inf")
        tokens.append(said.argmax(1, keepdim=True))
        if len(tokens) == steps:
            break
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        answer = _called(compiled, {"input_ids": tokens[-1], "attention_mask": mask}, answer, places)
        logits.append(answer.logits[:, -1])
    return Run(torch.cat(tokens, 1), torch.stack(logits, 1), kept, answer.past_key_values, [])


def _called(compiled: Any, inputs: samples.Inputs, before: Any, places: torch.Tensor | None) -> Any:
    """The answer to what comes behind the answer `before`; `places` [A, B, S] are the positions of all columns."""
    cache = None if before is None else before.past_key_values
    start = 0 if cache is None else cache.get_seq_length()
    given = {} if places is None else {"position_ids": places[..., start : start + inputs["input_ids"].shape[1]]}
    return compiled(**inputs, **given, past_key_values=cache)


def _unwanted(model: Any) -> list[int]:
    """Tokens that would make another prompt of what is generated: those of images, and around them."""
    return sorted({*visual_token_ids(model), *_marks(model.config)})


def _same_kept(apart: Mapping[str, torch.Tensor], together: Mapping[str, torch.Tensor], number: int, pads: int) -> bool:
    """Whether a sample by itself keeps the tokens that it keeps as sample `number` of a batch, behind `pads` slots."""
    for site, rows in apart.items():
        moved = pads if site.startswith("language.") else 0
        alone, among = rows[0], together[site][number]
        if not torch.equal(alone[alone >= 0] + moved, among[among >= 0]):
            return False
    return True


def _marks(config: Any) -> set[int]:
    """Tokens around images: in a prompt they may stand for something else than in an answer."""
    found: set[int] = set()
    for name, value in vars(config).items():
        if _MARK.search(name):
            found |= {v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, int)}
    return {token for token in found if 0 <= token < config.get_text_config().vocab_size}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """A generation configuration made for sampling is no news here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _pad_token(model: Any) -> int:
    token = model.config.get_text_config().pad_token_id
    return token if isinstance(token, int) else 0


def _difference(got: torch.Tensor, want: torch.Tensor) -> float:
    if got.shape != want.shape:
        return float("inf")
    if not got.numel():
        return 0.0
    worst = float((got.float() - want.float()).abs().max())
    return worst if worst == worst else float("inf")


def _place(got: torch.Tensor, want: torch.Tensor, axes: str) -> str:
    """Where the largest difference lies."""
    if got.shape != want.shape or not got.numel():
        return f"shape {list(got.shape)} instead of {list(want.shape)}" if got.shape != want.shape else ""
    flat = int((got.float() - want.float()).abs().nan_to_num(float("inf")).argmax())
    names = zip(axes.split(), torch.unravel_index(torch.tensor(flat), got.shape), strict=True)
    return " ".join(f"{name} {int(number)}" for name, number in names)
