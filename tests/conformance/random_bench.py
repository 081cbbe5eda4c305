"""One random model with all its policies: each is compiled, called and compared with its definition."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
import tempfile
import traceback
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import random_inputs
import torch

import support
from tvc import api, compiler
from tvc.errors import PassError, TvcError, VerificationError
from tvc.graphs import open_draft
from tvc.policy import Policy, load_policy, resolve
from tvc.policy.positions import Rescale
from tvc.policy.schema import COMPONENTS
from tvc.trace.host import PIXEL_NAMES
from tvc.trace.sample import visual_token_ids
from tvc.verification import samples
from tvc.verification.across import define
from tvc.verification.check import compare
from tvc.verification.numbering import Rotary, at_frequencies
from tvc.verification.oracle import Case
from tvc.verification.report import TOLERANCES
from tvc.verification.reselection import of_run

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
STEPS = 3  # tokens that are generated for each comparison
FURTHER = 10.0  # times the difference that is allowed
LEFT_OUT = ("video-inside-encoder",)  # calls that a policy rules out
# A policy may be refused; these say that the compiler itself is at fault.
INTERNAL = (PassError, VerificationError)


@dataclasses.dataclass
class Outcome:
    """What came of one case.

    kind: passed | rounding (differs a little, as merges in many layers make it, or in a half type alone) | refused |
      failed (differs, or the compiler says that it broke its own rules) | crashed (an error without a type of its own)
      | unusable (Hugging Face's code refuses the inputs or the sizes)
    """

    kind: str
    what: str = ""  # the slug, the output that differs, or the exception
    where: str = ""
    worst: float = 0.0
    allowed: float = 0.0
    comparisons: int = 0
    trace: str = dataclasses.field(default="", repr=False)

    @property
    def fine(self) -> bool:
        return self.kind not in ("failed", "crashed")

    @property
    def share(self) -> float:
        """The worst difference as a share of what is allowed."""
        return self.worst / max(self.allowed, 1e-30)

    def label(self) -> str:
        """What outcomes with the same cause share."""
        return f"{self.kind}({self.what}{', ' + self.where if self.kind == 'crashed' else ''})"


class Bench:
    """One model, loaded and traced once for all its policies."""

    def __init__(self, family: str, model: Any):
        self.family = family
        self.model, self.processor = model, support.build_processor(family)
        sample = None if self.processor is not None else support.inputs(family, 2)
        self.prepared = api.Prepared(self.model, processor=self.processor, inputs=sample)

    @classmethod
    def of(cls, model: Any) -> Bench:
        """That of a drawn model."""
        return cls(model.family, model.build())

    @property
    def components(self) -> tuple[str, ...]:
        """Those that can be cut."""
        legal = {site.name.partition(".")[0] for site in self.prepared.survey.layout.sites if site.legal}
        return tuple(name for name in COMPONENTS if name in legal)

    @property
    def blocks(self) -> dict[str, int]:
        """Blocks of each component, by its name in a site."""
        layout = self.prepared.survey.layout
        return {"vision": max(len(layout.vision), 1), "language": len(layout.language)}

    def resolves(self, policy: Mapping[str, Any]) -> bool:
        """Whether the model can do the policy, as far as that is known before compiling."""
        try:
            resolve(load_policy(policy), self.prepared.survey.layout)
        except TvcError:
            return False
        except Exception:  # noqa: BLE001
            return True  # to be run, and told
        return True

    def run(self, policy: Mapping[str, Any], given: list[Any], target: str = "torch") -> Outcome:
        """The policy compiled, and compared with its definition on all of the inputs."""
        try:
            loaded = load_policy(policy)
        except Exception as problem:  # noqa: BLE001  what is raised is what is looked for
            return told(problem)
        (found,) = self.runs(loaded, [given], target)
        return found

    def runs(self, policy: Policy, lists: list[list[Any]], target: str = "torch") -> list[Outcome]:
        """As `run`, an outcome for each list of inputs; the policy is compiled once."""
        usable = [[(one, made) for one in given if (made := self.tensors(one)) is not None] for given in lists]
        if not any(usable):
            return [Outcome("unusable", "inputs")] * len(lists)
        with tempfile.TemporaryDirectory(prefix="tvc-weights-") as folder:
            try:
                own = support.with_weights(policy, self.prepared.survey.layout, pathlib.Path(folder))
                compiled = self._draft(own) if target == "draft" else self.prepared.compile(own, target, verify=False)
            except Exception as problem:  # noqa: BLE001  what is raised is what is looked for
                return [told(problem)] * len(lists)
            return [self._on_all(compiled, given) if given else Outcome("unusable", "inputs") for given in usable]

    def _on_all(self, compiled: Any, usable: list[tuple[Any, dict[str, torch.Tensor]]]) -> Outcome:
        """The first failure, or what came closest to one."""
        found = Outcome("passed")
        for one, tensors in usable:
            for check in self._checks(one, tensors):
                try:
                    outcome = check(compiled, tensors)
                except Exception as problem:  # noqa: BLE001
                    outcome = told(problem)
                    outcome.where = f"{outcome.where} in a call"
                    if outcome.kind == "refused":  # inputs that the model itself takes
                        outcome = _of_call(outcome)
                found.comparisons += outcome.comparisons
                if not outcome.fine:
                    return outcome
                if outcome.share >= found.share:
                    found = dataclasses.replace(outcome, comparisons=found.comparisons)
        return found

    def _checks(self, one: Any, tensors: dict[str, torch.Tensor]) -> Iterator[Any]:
        if not _shows(tensors):
            yield self._plain
            return
        yield self._compared
        if one.right and not bool(tensors["attention_mask"].all()):
            yield self._right
        # Called without positions a model counts padding in front, which `generate` and the definition do not.
        if one.turn and (self.prepared.survey.axes or bool(tensors["attention_mask"].all())):
            yield functools.partial(self._later, one.turn)

    def _draft(self, policy: Any) -> Any:
        """The compiled model in this process, its graphs neither exported again nor lowered."""
        with (
            mock.patch.object(compiler, "lower", lambda program, *_: program),
            mock.patch.object(compiler, "GraphRunner", _Drafts),
        ):
            return self.prepared.compile(policy, "torch", verify=False)

    def tensors(self, given: Any) -> dict[str, torch.Tensor] | None:
        """The inputs, or None where the untouched model or its processor refuses them."""
        try:
            made = given.tensors(self.model, self.family, self.processor)
            tensors = samples.placed(made, self.model)
            with torch.no_grad():
                logits = self.model(**tensors).logits
        except Exception:  # noqa: BLE001  other people's code may raise anything
            return None
        return tensors if bool(logits.isfinite().all()) else None

    def _compared(self, compiled: Any, tensors: dict[str, torch.Tensor]) -> Outcome:
        rows = compare(compiled, self.model, tensors, steps=STEPS).comparisons
        wrong = next((row for row in rows if not row.passed), None)
        row = wrong or max(rows, key=lambda row: row.worst / max(row.allowed, 1e-30))
        what, where = row.output.partition(".")[0], f"{row.name}, {row.site}, {row.output}, {row.where}"
        kind = "passed" if wrong is None else "rounding" if _rounded(rows) else "failed"
        return Outcome(kind, what if wrong else "", where, row.worst, row.allowed, len(rows))

    def _plain(self, compiled: Any, tensors: dict[str, torch.Tensor]) -> Outcome:
        """Without a picture there is nothing to reduce; frequencies of the rotary embedding turn words, too."""
        rule, rotary = compiled.policy.positions, Rotary(self.model.get_decoder())
        rescaled = at_frequencies(rotary.modules[0], rule) if isinstance(rule, Rescale) else contextlib.nullcontext()
        with torch.no_grad(), rescaled:
            wanted = self.model(**tensors).logits[:, -1]
        return _alike(compiled(**tensors).logits[:, -1], wanted, 1.0, "plain text")

    def _right(self, compiled: Any, tensors: dict[str, torch.Tensor]) -> Outcome:
        """Where the padding stands makes no difference."""
        moved, order = random_inputs.padded_right(tensors)
        answer = compiled(**moved)
        kept = {
            site: torch.where(row < 0, -1, order.gather(1, row.clamp(min=0))) if site.startswith("language.") else row
            for site, row in answer.kept.items()
        }
        nothing = tensors["input_ids"][:, :0]
        return self._defined(compiled.policy, compiled, tensors, nothing, kept, answer, "padded on the right")

    def _later(self, tokens: int, compiled: Any, tensors: dict[str, torch.Tensor]) -> Outcome:
        """A later turn is what the definition says of its tokens behind the prompt."""
        rows = len(tensors["input_ids"])
        more = torch.arange(3, 3 + tokens).expand(rows, -1) + 7  # plain words
        mask = torch.cat([tensors["attention_mask"], torch.ones_like(more)], 1)
        first = compiled(**tensors)
        beside = random_inputs.of_further(tensors, tokens)
        second = compiled(input_ids=more, attention_mask=mask, past_key_values=first.past_key_values, **beside)
        policy = compiled.policy
        if tokens > 1:  # read whole; a single token is a decode step
            policy = dataclasses.replace(policy, policy=dataclasses.replace(policy.policy, reselect=None))
        return self._defined(policy, compiled, tensors, more, first.kept, second, "later turn")

    def _defined(
        self,
        policy: Any,
        compiled: Any,
        tensors: dict[str, torch.Tensor],
        tokens: torch.Tensor,
        kept: dict[str, torch.Tensor],
        answer: Any,
        where: str,
    ) -> Outcome:
        """The outcome of comparing the logits of the answer's last token with their definition."""
        interface, slack = compiled.engine.interface, TOLERANCES[compiled.dtype].relative
        columns = tensors["input_ids"].shape[1] + tokens.shape[1]
        chosen = of_run([answer.past_key_values] if tokens.shape[1] else [], interface.stages - 1, columns)
        ids = visual_token_ids(self.model)
        shape = interface.shape
        case = Case(tensors, tokens, kept, shape.axes, ids, chosen=chosen, crossing=shape.crossing)
        expected = define(self.model, policy, case, slack)
        for choice in expected.choices:
            if choice.gap > choice.allowed:
                return Outcome("failed", "reselection", where, choice.gap, choice.allowed, 1)
        for _, site, outcomes in expected.outcomes:
            for one in outcomes:
                if not one.gap <= slack * one.scale:
                    return Outcome("failed", "selection", f"{where}, {site}", one.gap, slack * one.scale, 1)
        return _alike(answer.logits[:, -1], expected.logits[:, -1], expected.doubts[-1], where)


def _shows(tensors: dict[str, torch.Tensor]) -> bool:
    return any(name in tensors for name in PIXEL_NAMES)


def _alike(got: torch.Tensor, wanted: torch.Tensor, doubt: float, where: str) -> Outcome:
    """The outcome of comparing the logits of one place."""
    worst = float((got.float() - wanted.float()).abs().max())
    allowed = TOLERANCES[wanted.dtype].allowed(wanted, doubt)
    kind = "passed" if worst <= allowed else "rounding" if worst <= FURTHER * allowed else "failed"
    return Outcome(kind, "" if kind == "passed" else "logits", where, worst, allowed, 1)


def _of_call(outcome: Outcome) -> Outcome:
    """Videos beside scores of the encoder are refused by name; what else the model takes a compiled one takes, too."""
    return outcome if outcome.what in LEFT_OUT else dataclasses.replace(outcome, kind="failed")


def _rounded(rows: Any) -> bool:
    """Whether all that differs are numbers that lie a few times further apart than most policies bring them."""
    return all(row.passed or (row.allowed and row.worst <= FURTHER * row.allowed) for row in rows)


class _Drafts(compiler.GraphRunner):
    """Runs what the passes left, also before it is exported again."""

    def _opened(self, part: Any, text_only: bool) -> Any:
        module = part.draft or open_draft(part)
        module.recompile()
        return module


def told(problem: Exception) -> Outcome:
    """An exception as an outcome; `where` is the deepest line of the project's own code."""
    if isinstance(problem, TvcError) and not isinstance(problem, INTERNAL):
        return Outcome("refused", problem.slug, type(problem).__name__)
    cause = problem.__cause__ or problem
    frames = [frame for frame in traceback.extract_tb(cause.__traceback__) if _own(frame.filename)]
    where = f"{_own(frames[-1].filename)}:{frames[-1].lineno}" if frames else ""
    kind = "failed" if isinstance(problem, TvcError) else "crashed"
    what = problem.slug if isinstance(problem, TvcError) else type(problem).__name__
    return Outcome(kind, what, where, trace="".join(traceback.format_exception(problem)))


def _own(filename: str) -> str:
    """The file's place in the repository, or nothing where it is somebody else's."""
    path = pathlib.Path(filename).resolve()
    inside = path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in ("tvc", "kernels", "passes", "export")
    return str(path.relative_to(ROOT)) if inside else ""
