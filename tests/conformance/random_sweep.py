"""Random policies over random small models: each equals its definition or is refused by name; resumable.

    python tests/conformance/random_sweep.py --cases N [--seed S] [--minutes M] [--families llava,...]
    python tests/conformance/random_sweep.py --again NUMBER [--seed S] [--smaller]

Every case is written to out/random-sweep.jsonl as it is done, and cases found there are not run again. `--again` runs
one of them once more, with its traceback; `--smaller` then looks for the smallest policy with the same outcome.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import importlib.util
import json
import logging
import math
import pathlib
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import torch

from tvc import api, compiler
from tvc.errors import PassError, TvcError, VerificationError
from tvc.graphs import open_draft
from tvc.passes.insert_reductions import InsertReductions
from tvc.passes.rebind_cuts import RebindCuts
from tvc.policy import load_policy, resolve
from tvc.policy.schema import COMPONENTS
from tvc.verification.check import compare
from tvc.verification.report import TOLERANCES

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
RESULTS = ROOT / "out" / "random-sweep.jsonl"
STEPS = 3  # tokens that are generated for each comparison
POLICIES = 10  # for each model
CALLS = 3  # inputs for each policy
FURTHER = 10.0  # times the difference that is allowed
# A policy may be refused; these say that the compiler itself is at fault.
INTERNAL = (PassError, VerificationError)
# Of ten cases: `draft` runs the graphs as the passes leave them, without the exports that take most of the time.
TARGETS = ("draft", "torch", "draft", "draft", "draft", "torch", "draft", "draft", "draft", "ort")


def _beside(name: str, path: pathlib.Path) -> Any:
    """A file whose folder stays off `sys.path` (tests/kernels would pass for a package of that name)."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


support = _beside("support", HERE.parent / "support.py")
random_cases = _beside("random_cases", HERE / "random_cases.py")


@dataclasses.dataclass
class Outcome:
    """What came of one case.

    kind: passed | rounding (differs a little, as merges in many layers make it) | refused | failed (differs, or the
      compiler says that it broke its own rules) | crashed (an error without a type of its own) | unusable (Hugging
      Face's code refuses the inputs or the sizes)
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

    def __init__(self, model: Any):
        self.family = model.family
        self.model, self.processor = model.build(), support.build_processor(model.family)
        self.prepared = api.Prepared(self.model, processor=self.processor)

    @property
    def components(self) -> tuple[str, ...]:
        """Those that can be cut."""
        legal = {site.name.partition(".")[0] for site in self.prepared.survey.layout.sites if site.legal}
        return tuple(name for name in COMPONENTS if name in legal)

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
        """The policy compiled, and compared with its definition on each of the inputs."""
        usable = [tensors for tensors in (self.tensors(one) for one in given) if tensors is not None]
        if not usable:
            return Outcome("unusable", "inputs")
        try:
            compiled = self._draft(policy) if target == "draft" else self.prepared.compile(policy, target, verify=False)
        except Exception as problem:  # noqa: BLE001  what is raised is what is looked for
            return told(problem)
        found = Outcome("passed")
        for tensors in usable:
            try:
                outcome = self._compared(compiled, tensors)
            except Exception as problem:  # noqa: BLE001
                outcome = told(problem)
                outcome.where = f"{outcome.where} in a call"
                if outcome.kind == "refused":  # inputs that the model itself takes
                    outcome.kind = "failed"
            found.comparisons += outcome.comparisons
            if not outcome.fine:
                return outcome
            if outcome.share >= found.share:
                found = dataclasses.replace(outcome, comparisons=found.comparisons)
        return found

    def _draft(self, policy: Mapping[str, Any]) -> Any:
        """The compiled model in this process, its graphs neither exported again nor lowered."""

        def reduce(program: Any, resolved: Any, progress: Any) -> Any:
            return compiler.run(program, [InsertReductions(resolved), RebindCuts()], progress)

        with (
            mock.patch.object(compiler, "reduce", reduce),
            mock.patch.object(compiler, "lower", lambda program, *_: program),
            mock.patch.object(compiler, "GraphRunner", _Drafts),
        ):
            return self.prepared.compile(policy, "torch", verify=False)

    def tensors(self, given: Any) -> dict[str, torch.Tensor] | None:
        """The inputs, or None where the untouched model or its processor refuses them."""
        try:
            tensors = given.tensors(self.family, self.processor)
            with torch.no_grad():
                logits = self.model(**tensors).logits
        except Exception:  # noqa: BLE001  other people's code may raise anything
            return None
        return tensors if bool(logits.isfinite().all()) else None

    def _compared(self, compiled: Any, tensors: dict[str, torch.Tensor]) -> Outcome:
        if "pixel_values" not in tensors:
            return self._plain(compiled, tensors)
        rows = compare(compiled, self.model, tensors, steps=STEPS).comparisons
        wrong = next((row for row in rows if not row.passed), None)
        row = wrong or max(rows, key=lambda row: row.worst / max(row.allowed, 1e-30))
        what, where = row.output.partition(".")[0], f"{row.name}, {row.site}, {row.output}, {row.where}"
        kind = "passed" if wrong is None else "rounding" if _rounded(rows) else "failed"
        return Outcome(kind, what if wrong else "", where, row.worst, row.allowed, len(rows))

    def _plain(self, compiled: Any, tensors: dict[str, torch.Tensor]) -> Outcome:
        """Without a picture there is nothing to reduce."""
        with torch.no_grad():
            wanted = self.model(**tensors).logits[:, -1]
        worst = float((compiled(**tensors).logits[:, -1] - wanted).abs().max())
        allowed = TOLERANCES[torch.float32].allowed(wanted)
        kind = "passed" if worst <= allowed else "failed"
        return Outcome(kind, "" if kind == "passed" else "logits", "plain text", worst, allowed, 1)


def _rounded(rows: Any) -> bool:
    """Whether all that differs are numbers that lie a few times further apart than most policies bring them."""
    return all(row.passed or (row.allowed and row.worst <= FURTHER * row.allowed) for row in rows)


class _Drafts(compiler.GraphRunner):
    """Runs what the passes left, also before it is exported again."""

    def __post_init__(self) -> None:
        parts = self.program.components
        self._modules = {name: part.draft or open_draft(part) for name, part in parts.items()}
        for module in self._modules.values():
            module.recompile()


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


# Cases ----------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """A policy for a model, and the inputs to compare on."""

    policy: Mapping[str, Any]
    given: tuple[Any, ...]
    target: str = "torch"

    def to_json(self) -> dict[str, Any]:
        inputs = [dataclasses.asdict(one) for one in self.given]
        return {"policy": self.policy, "inputs": inputs, "target": self.target}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Case:
        inputs = tuple(random_cases.Inputs.from_data(one) for one in data["inputs"])
        return cls(data["policy"], inputs, data["target"])


def model_of(seed: int, number: int, families: tuple[str, ...]) -> Any:
    """The model of case `number`; neighbours share it, and families take turns."""
    place = number // POLICIES
    return random_cases.drawn(random_cases.models((families[place % len(families)],)), 1_000_003 * seed + place)


def case_of(seed: int, number: int, model: Any, bench: Bench) -> Case:
    """Case `number`: three in four of the policies are such that the model can do them."""
    policies = random_cases.policies(model.blocks)
    if number % 4:
        policies = random_cases.policies(model.blocks, bench.components).filter(bench.resolves)
    own = 1_000_003 * seed + number
    given = tuple(random_cases.drawn(random_cases.inputs(), 7 * own + call) for call in range(CALLS))
    return Case(random_cases.drawn(policies, own), given, TARGETS[number % len(TARGETS)])


def read() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RESULTS.read_text("utf-8").splitlines()] if RESULTS.is_file() else []


def sweep(cases: int, seed: int, minutes: float, families: tuple[str, ...]) -> None:
    """Runs the cases that are not in the file yet."""
    done = {row["number"] for row in read() if row["seed"] == seed}
    end = time.monotonic() + 60 * minutes
    for first in range(0, cases, POLICIES):
        left = [number for number in range(first, min(first + POLICIES, cases)) if number not in done]
        if not left or time.monotonic() > end:
            continue
        model = model_of(seed, first, families)
        started = time.perf_counter()
        try:
            bench = Bench(model)
        except Exception as problem:  # noqa: BLE001
            if first not in done:  # one line for all of its cases
                _write(first, seed, model, None, _of_model(told(problem)), started)
            continue
        for number in left:
            if time.monotonic() > end:
                break
            case = case_of(seed, number, model, bench)
            _write(number, seed, model, case, bench.run(case.policy, list(case.given), case.target), started)
            started = time.perf_counter()


def _of_model(outcome: Outcome) -> Outcome:
    """Sizes that the model's own code does not take are no fault of the compiler."""
    foreign = outcome.kind == "crashed" and not outcome.where
    return dataclasses.replace(outcome, kind="unusable") if foreign else outcome


def _write(number: int, seed: int, model: Any, case: Case | None, outcome: Outcome, started: float) -> None:
    row = {"number": number, "seed": seed, "model": dataclasses.asdict(model), **(case.to_json() if case else {})}
    found = {key: value for key, value in dataclasses.asdict(outcome).items() if key != "kind"}
    seconds = round(time.perf_counter() - started, 1)
    row |= {"outcome": outcome.kind, **found, "worst": _finite(outcome.worst), "seconds": seconds}
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    target = case.target if case else "model"
    print(f"{number} {model.family} {target}: {outcome.label()} {outcome.worst:.1e} ({seconds:.0f} s)", flush=True)


def _finite(number: float) -> float | str:
    return number if math.isfinite(number) else str(number)


def summary(rows: list[dict[str, Any]]) -> str:
    """Outcomes by family, refusals by name, and every failure."""
    kinds = ("passed", "rounding", "refused", "failed", "crashed", "unusable")
    lines = [f"{'family':16}" + "".join(f"{kind:>10}" for kind in kinds)]
    by_family = {family: [r for r in rows if r["model"]["family"] == family] for family in _families(rows)}
    for family, own in {**by_family, "all": rows}.items():
        counted = collections.Counter(row["outcome"] for row in own)
        lines.append(f"{family:16}" + "".join(f"{counted[kind]:>10}" for kind in kinds))
    refused = collections.Counter(f"{r['where']} {r['what']}" for r in rows if r["outcome"] == "refused")
    lines.append("refused: " + ", ".join(f"{name} {count}" for name, count in refused.most_common()))
    bad: dict[str, list[int]] = {}
    for row in rows:
        if row["outcome"] in ("rounding", "failed", "crashed"):
            place = f" {row['where']}" if row["outcome"] == "crashed" else ""
            bad.setdefault(f"{row['outcome']} {row['what']}{place}", []).append(row["number"])
    lines += [f"{label}: cases {', '.join(map(str, numbers))}" for label, numbers in bad.items()]
    compared = sum(row["comparisons"] for row in rows)
    lines.append(f"{len(rows)} cases, {compared} comparisons, {sum(row['seconds'] for row in rows) / 60:.0f} minutes")
    return "\n".join(lines)


def _families(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["model"]["family"] for row in rows))


# One case again -------------------------------------------------------------------------------------------------------


def simpler(case: Case) -> Iterator[Case]:
    """Cases with one thing less: a call, a sample, a picture, a step, a score, a setting."""
    for call in range(len(case.given) if len(case.given) > 1 else 0):
        yield dataclasses.replace(case, given=(case.given[call],))
    if case.target != "torch":
        yield dataclasses.replace(case, target="torch")
    if len(case.given) == 1:
        samples = case.given[0].samples
        fewer = [samples[:i] + samples[i + 1 :] for i in range(len(samples))] if len(samples) > 1 else []
        for i, sample in enumerate(samples):
            for j in range(len(sample.photos)):
                less = dataclasses.replace(sample, photos=sample.photos[:j] + sample.photos[j + 1 :])
                fewer.append((*samples[:i], less, *samples[i + 1 :]))
        yield from (dataclasses.replace(case, given=(random_cases.Inputs(left),)) for left in fewer)
    yield from (dataclasses.replace(case, policy=less) for less in _less(case.policy))


def _less(value: Any) -> Iterator[Any]:
    """The data with one entry of a list or mapping gone, at any depth."""
    if isinstance(value, Mapping):
        for key in value:
            yield {name: item for name, item in value.items() if name != key}
        for key, item in value.items():
            yield from ({**value, key: less} for less in _less(item))
    elif isinstance(value, list):
        yield from (value[:i] + value[i + 1 :] for i in range(len(value)))
        yield from ([*value[:i], less, *value[i + 1 :]] for i, item in enumerate(value) for less in _less(item))


def minimise(case: Case, bench: Bench, minutes: float = 10.0) -> Case:
    """The smallest case with the same outcome that is found in this time."""
    label, end, going = (
        bench.run(case.policy, list(case.given), case.target).label(),
        time.monotonic() + 60 * minutes,
        True,
    )
    while going:
        going = False
        for candidate in simpler(case):
            if time.monotonic() > end:
                break
            if not bench.resolves(candidate.policy):
                continue
            if bench.run(candidate.policy, list(candidate.given), candidate.target).label() == label:
                case, going = candidate, True
                break
    return case


def again(number: int, seed: int, smaller: bool, minutes: float) -> None:
    """Runs a case of the file once more and prints all that is known of it."""
    row = next(row for row in read() if (row["seed"], row["number"]) == (seed, number))
    model = random_cases.Model(**row["model"])
    bench, case = Bench(model), Case.from_json(row)
    outcome = bench.run(case.policy, list(case.given), case.target)
    if smaller and not outcome.fine:
        case = minimise(case, bench, minutes)
        outcome = bench.run(case.policy, list(case.given), case.target)
    print(json.dumps({"model": row["model"], **case.to_json()}, indent=1))
    print(outcome.trace)
    print(outcome.label(), outcome.where, f"{outcome.worst:.2e} allowed {outcome.allowed:.2e}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--families", default=",".join(random_cases.FAMILIES))
    parser.add_argument("--again", type=int, metavar="NUMBER")
    parser.add_argument("--smaller", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    if options.again is not None:
        again(options.again, options.seed, options.smaller, min(options.minutes, 60.0))
        return 0
    sweep(options.cases, options.seed, options.minutes, tuple(options.families.split(",")))
    rows = [row for row in read() if row["seed"] == options.seed]
    print(summary(rows))
    return 1 if any(row["outcome"] in ("failed", "crashed") for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
