"""Random policies over random small models: each equals its definition or is refused by name; resumable.

    python tests/conformance/random_sweep.py --cases N [--seed S] [--minutes M] [--families llava,...]
    python tests/conformance/random_sweep.py --again NUMBER [--seed S] [--smaller]
    python tests/conformance/random_sweep.py --retry [--minutes M]
    python tests/conformance/random_sweep.py --record

Every case is written to out/random-sweep.jsonl as it is done, and cases found there are not run again. `--again` runs
one of them once more, with its traceback; `--smaller` then looks for the smallest policy with the same outcome.
`--retry` runs all that failed once more, with the code as it is now.
`--record` writes what was run, by outcome and by what was in it, to benchmarks/results/random-sweep.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import json
import logging
import math
import pathlib
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from tvc.report.timing import environment

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
RESULTS = ROOT / "out" / "random-sweep.jsonl"
RECORD = ROOT / "benchmarks" / "results" / "random-sweep.json"
POLICIES = 30  # for each model
CALLS = 3  # inputs for each policy
# Of a model's cases: `draft` runs the graphs as the passes leave them, without the exports that take most of the time.
EXPORTED = {6: ("torch",), 18: ("ort", "pt2", "ort", "torchscript")}


def _beside(name: str, path: pathlib.Path) -> Any:
    """A file whose folder stays off `sys.path` (tests/kernels would pass for a package of that name)."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


support = _beside("support", HERE.parent / "support.py")
random_inputs = _beside("random_inputs", HERE / "random_inputs.py")
random_models = _beside("random_models", HERE / "random_models.py")
random_cases = _beside("random_cases", HERE / "random_cases.py")
random_report = _beside("random_report", HERE / "random_report.py")
random_bench = _beside("random_bench", HERE / "random_bench.py")
Bench, Outcome = random_bench.Bench, random_bench.Outcome


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
        inputs = tuple(random_inputs.Inputs.from_data(one) for one in data["inputs"])
        return cls(data["policy"], inputs, data["target"])


def model_of(seed: int, number: int, families: tuple[str, ...]) -> Any:
    """The model of case `number`; neighbours share it, and families take turns."""
    place = number // POLICIES
    return random_cases.drawn(random_models.models((families[place % len(families)],)), 1_000_003 * seed + place)


def case_of(seed: int, number: int, model: Any, bench: Bench) -> Case:
    """Case `number`: of five policies one is a preset, one is in all components, one is anything at all, and one acts
    on all layers or needs pictures whole.

    The last of these and most of the others are such that the model can do them.
    """
    own = 1_000_003 * seed + number
    place, which = divmod(number, POLICIES)
    videos = model.family in random_models.WITH_VIDEOS
    policies = random_cases.policies(bench.blocks)
    if number % 5 in (1, 2) or (number % 5 == 3 and len(bench.components) < 3):
        policies = random_cases.policies(bench.blocks, bench.components)
        policies = policies.map(lambda drawn: random_cases.gathered(drawn, bench.blocks, seed + place))
        policies = policies.filter(bench.resolves)
    if number % 5 == 2 and "language" in bench.components:
        policy = random_cases.soon(random_cases.wholes(bench.blocks), own, bench.resolves)
    elif number % 5 == 3 and len(bench.components) == 3:
        policy = random_cases.everywhere(bench.blocks, own, bench.resolves)
        policy = random_cases.gathered(policy, bench.blocks, seed + place)
    elif number % 5 == 4:
        policy = random_cases.published_in_turn(bench.blocks, videos, number // 5 + seed, own, bench.resolves)
    else:
        policy = random_cases.drawn(policies, own)
    drawn = random_inputs.inputs(videos)
    given = tuple(random_cases.drawn(drawn, 7 * own + call) for call in range(CALLS))
    targets = EXPORTED.get(which, ("draft",))
    if model.dtype == "bfloat16":  # which ONNX Runtime has no kernels for on a CPU
        targets = tuple(target for target in targets if target != "ort")
    return Case(policy, given, targets[place % len(targets)])


def read() -> list[dict[str, Any]]:
    """The rows of the file, of each case the last one."""
    lines = RESULTS.read_text("utf-8").splitlines() if RESULTS.is_file() else []
    return list({(row["seed"], row["number"]): row for row in map(json.loads, lines)}.values())


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
            bench = Bench.of(model)
        except Exception as problem:  # noqa: BLE001
            if first not in done:  # one line for all of its cases
                _write(first, seed, model, None, _of_model(random_bench.told(problem)), started)
            continue
        for number in left:
            if time.monotonic() > end:
                break
            case = case_of(seed, number, model, bench)
            _write(number, seed, model, case, _outcome(bench, model, case), started)
            started = time.perf_counter()


def retry(minutes: float) -> None:
    """Runs what failed once more, after what was wrong is mended; `was` keeps what came of it then."""
    end = time.monotonic() + 60 * minutes
    for row in [row for row in read() if row["outcome"] in ("failed", "crashed") and "policy" in row]:
        if time.monotonic() > end:
            break
        model, case, started = random_models.Model(**row["model"]), Case.from_json(row), time.perf_counter()
        outcome = _outcome(Bench.of(model), model, case)
        was = row.get("was") or f"{row['outcome']} {row['what']} at {row.get('commit', '')}"
        _write(row["number"], row["seed"], model, case, outcome, started, was)


def _outcome(bench: Bench, model: Any, case: Case) -> Outcome:
    outcome = bench.run(case.policy, list(case.given), case.target)
    compared = outcome.kind == "failed" and outcome.comparisons > 0  # no rounding makes a compiled model raise
    return _in_half(outcome, model, case) if compared and model.dtype != "float32" else outcome


def _in_half(outcome: Outcome, model: Any, case: Case) -> Outcome:
    """Half types settle choices of merges and selectors otherwise; what is right in float32 is right by its graph."""
    twin = Bench.of(dataclasses.replace(model, dtype="float32"))
    right = twin.run(case.policy, list(case.given), "draft").kind == "passed"
    return dataclasses.replace(outcome, kind="rounding") if right else outcome


def _of_model(outcome: Outcome) -> Outcome:
    """Sizes that the model's own code does not take are no fault of the compiler."""
    foreign = outcome.kind == "crashed" and not outcome.where
    return dataclasses.replace(outcome, kind="unusable") if foreign else outcome


def _write(
    number: int, seed: int, model: Any, case: Case | None, outcome: Outcome, started: float, was: str = ""
) -> None:
    row = {"number": number, "seed": seed, "model": dataclasses.asdict(model), **(case.to_json() if case else {})}
    found = {key: value for key, value in dataclasses.asdict(outcome).items() if key != "kind"}
    seconds = round(time.perf_counter() - started, 1)
    row |= {"outcome": outcome.kind, **found, "worst": _finite(outcome.worst), "seconds": seconds, "commit": commit()}
    row |= {"was": was} if was else {}
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    target = case.target if case else "model"
    print(f"{number} {model.family} {target}: {outcome.label()} {outcome.worst:.1e} ({seconds:.0f} s)", flush=True)


@functools.cache
def commit() -> str:
    """The commit that is checked out, with a + where files differ from it."""
    found = environment(ROOT)
    return str(found["commit"])[:7] + "+" * found["dirty"]


def _finite(number: float) -> float | str:
    return number if math.isfinite(number) else str(number)


# One case again -------------------------------------------------------------------------------------------------------


def simpler(case: Case) -> Iterator[Case]:
    """Cases with one thing less: a call, a sample, a picture, a video, a turn, a step, a score, a setting."""
    for call in range(len(case.given) if len(case.given) > 1 else 0):
        yield dataclasses.replace(case, given=(case.given[call],))
    if case.target != "draft":
        yield dataclasses.replace(case, target="draft")
    if len(case.given) == 1:
        samples = case.given[0].samples
        fewer = [samples[:i] + samples[i + 1 :] for i in range(len(samples))] if len(samples) > 1 else []
        for i, sample in enumerate(samples):
            for name in ("photos", "videos"):
                shown = getattr(sample, name)
                for j in range(len(shown)):
                    less = dataclasses.replace(sample, **{name: shown[:j] + shown[j + 1 :]})
                    fewer.append((*samples[:i], less, *samples[i + 1 :]))
        one = case.given[0]
        simple = [dataclasses.replace(one, samples=left) for left in fewer]
        simple += [dataclasses.replace(one, right=False)] * one.right + [dataclasses.replace(one, turn=0)] * bool(
            one.turn
        )
        yield from (dataclasses.replace(case, given=(left,)) for left in simple if left != one)
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
    row = next((row for row in read() if (row["seed"], row["number"]) == (seed, number)), None)
    if row is None:
        sys.exit(f"case {number} of seed {seed} is not in {RESULTS}; run it with --cases first")
    model = random_models.Model(**row["model"])
    bench, case = Bench.of(model), Case.from_json(row)
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
    parser.add_argument("--families", default=",".join(random_models.TURNS))
    parser.add_argument("--again", type=int, metavar="NUMBER")
    parser.add_argument("--smaller", action="store_true")
    parser.add_argument("--retry", action="store_true")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    if options.again is not None:
        again(options.again, options.seed, options.smaller, min(options.minutes, 60.0))
        return 0
    if options.retry:
        retry(options.minutes)
        return 0
    if options.record:
        print(random_report.record(read(), RECORD))
        return 0
    sweep(options.cases, options.seed, options.minutes, tuple(options.families.split(",")))
    rows = [row for row in read() if row["seed"] == options.seed]
    print(random_report.summary(rows))
    return 1 if any(row["outcome"] in ("failed", "crashed") for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
