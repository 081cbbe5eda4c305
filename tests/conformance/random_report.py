"""What came of random cases, and what was in them."""

from __future__ import annotations

import collections
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from tvc.errors import TvcError
from tvc.kernels.op import PRIMITIVES
from tvc.policy import load_policy, presets
from tvc.policy.bypass import NEXT
from tvc.policy.evictions import EARLIER
from tvc.policy.options import OPTIONS
from tvc.policy.positions import positions_data
from tvc.policy.schema import COMPONENTS
from tvc.report.timing import environment

Row = Mapping[str, Any]
KINDS = ("passed", "rounding", "refused", "failed", "crashed", "unusable")
COMPARED = ("passed", "rounding", "failed")


def summary(rows: list[Row]) -> str:
    """Outcomes by family, refusals by name, and every failure."""
    lines = [f"{'family':20}" + "".join(f"{kind:>10}" for kind in KINDS)]
    for family, counted in {**outcomes(rows), "all": collections.Counter(row["outcome"] for row in rows)}.items():
        lines.append(f"{family:20}" + "".join(f"{counted[kind]:>10}" for kind in KINDS))
    refused = collections.Counter(f"{r['where']} {r['what']}" for r in rows if r["outcome"] == "refused")
    lines.append("refused: " + ", ".join(f"{name} {count}" for name, count in refused.most_common()))
    lines += [f"{label}: cases {', '.join(map(str, numbers))}" for label, numbers in _bad(rows).items()]
    compared = sum(row["comparisons"] for row in rows)
    lines.append(f"{len(rows)} cases, {compared} comparisons, {sum(row['seconds'] for row in rows) / 60:.0f} minutes")
    return "\n".join(lines)


def outcomes(rows: list[Row]) -> dict[str, collections.Counter[str]]:
    """How often each outcome came of each family."""
    counted: dict[str, collections.Counter[str]] = {}
    for row in rows:
        counted.setdefault(row["model"]["family"], collections.Counter())[row["outcome"]] += 1
    return counted


def _bad(rows: list[Row]) -> dict[str, list[str]]:
    """The cases (seed: number) of each kind of failure."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row["outcome"] in ("rounding", "failed", "crashed"):
            place = f" {row['where']}" if row["outcome"] == "crashed" else ""
            found.setdefault(f"{row['outcome']} {row['what']}{place}", []).append(f"{row['seed']}:{row['number']}")
    return found


def coverage(rows: list[Row]) -> dict[str, dict[str, int]]:
    """In how many of the cases that were compared each thing was; 0 for what never was."""
    counted: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for kind, known in PRIMITIVES.items():
        counted[kind].update(dict.fromkeys(known, 0))
    counted["option"].update(dict.fromkeys((one.key for known in OPTIONS.values() for one in known), 0))
    counted["preset"].update(dict.fromkeys(presets(), 0))
    for row in rows:
        if row["outcome"] in COMPARED and "policy" in row:
            for group, name in set(_features(row)):
                counted[group][name] += 1
    return {group: dict(sorted(names.items())) for group, names in sorted(counted.items())}


def _features(row: Row) -> Iterator[tuple[str, str]]:
    """(group, name) of what a case holds."""
    yield from (("family", row["model"]["family"]), ("type", row["model"].get("dtype", "float32")))
    yield "target", row["target"]
    if row["policy"]["name"] in presets():
        yield "preset", row["policy"]["name"]
    yield from _of_inputs(row["inputs"])
    try:
        policy = load_policy(row["policy"])
    except TvcError:  # written for an older grammar
        return
    written = positions_data(policy.positions)
    yield "positions", written if isinstance(written, str) else next(iter(written))
    yield from (("option", option.key) for option in policy.options.values() if option is not None)
    if policy.reselect is not None:
        yield "reselect", "unless alike" if policy.reselect.alike else "always"
    yield "steps", str(len(policy.steps))
    touched = {step.at.partition(".")[0] for step in policy.steps}
    yield "components", "+".join(name for name in COMPONENTS if name in touched)
    for step in policy.steps:
        yield "scope", step.scope
        if step.until:
            yield "until", "next" if step.until == NEXT else "a layer"
        if step.evict:
            yield "evict", "all earlier layers" if step.evict == EARLIER else "some layers"
        if ".." in step.at or step.at.endswith("all"):
            yield "sites", "range"
        scores = step.exit.score if step.exit is not None else step.score
        yield from (("score", term.primitive.key) for term in scores)
        if step.exit is not None:
            yield from (("when", step.exit.gate.key), ("action", "exit"))
        elif step.merge is not None:
            yield from (("merge", step.merge.key), ("action", "merge"))
        else:
            yield from (("select", step.select.key), ("action", "select"))
            yield "rest", "drop" if step.rest is None else step.rest.key


def _of_inputs(calls: list[Row]) -> Iterator[tuple[str, str]]:
    for call in calls:
        samples = call["samples"]
        yield "inputs", f"batch of {len(samples)}"
        marks = {
            "padded on the left": len({json.dumps(sample) for sample in samples}) > 1 and not call.get("right"),
            "padded on the right": len({json.dumps(sample) for sample in samples}) > 1 and call.get("right"),
            "later turn": call.get("turn"),
            "several pictures": any(len(sample["photos"]) > 1 for sample in samples),
            "videos": any(sample.get("videos") for sample in samples),
            "a sample without a picture beside others": len({bool(sample["photos"]) for sample in samples}) > 1,
            "no picture at all": not any(sample["photos"] or sample.get("videos") for sample in samples),
        }
        yield from (("inputs", name) for name, true in marks.items() if true)


def _earlier(rows: list[Row], path: pathlib.Path) -> list[dict[str, Any]]:
    """What was recorded of runs that `rows` do not hold any more."""
    if not path.is_file():
        return []
    last = json.loads(path.read_text("utf-8"))
    earlier: list[dict[str, Any]] = last.pop("earlier", [])
    held = {(row["seed"], row.get("commit", "")) for row in rows}
    if all((run["seed"], run["commit"]) in held for run in last["runs"]):
        return earlier
    return [*earlier, {key: value for key, value in last.items() if key not in ("families", "coverage")}]


def record(rows: list[Row], path: pathlib.Path) -> str:
    """Writes what was run to `path`, beside what was recorded there of other seeds; returns a summary of it.

    Cases of those seeds that were run once more are told among what was mended, and not counted again.
    """
    earlier = _earlier(rows, path)
    before = {run["seed"] for one in earlier for run in one["runs"]}
    again, rows = [row for row in rows if row.get("was")], [row for row in rows if row["seed"] not in before]
    runs: dict[tuple[int, str], list[Row]] = {}
    for row in rows:
        runs.setdefault((row["seed"], row.get("commit", "")), []).append(row)
    content = {
        "environment": environment(pathlib.Path(__file__).parent),
        "cases": len(rows),
        "comparisons": sum(row["comparisons"] for row in rows),
        "minutes": round(sum(row["seconds"] for row in rows) / 60),
        "outcomes": dict(collections.Counter(row["outcome"] for row in rows)),
        "bad": _bad(rows),
        "mended": {f"{row['seed']}:{row['number']}": f"{row['was']}, now {row['outcome']}" for row in again},
        "runs": [
            {
                "seed": seed,
                "commit": commit,
                "cases": [min(row["number"] for row in own), max(row["number"] for row in own)],
                "outcomes": dict(collections.Counter(row["outcome"] for row in own)),
            }
            for (seed, commit), own in runs.items()
        ],
        "families": {family: dict(counted) for family, counted in sorted(outcomes(rows).items())},
        "coverage": coverage(rows),
        "earlier": earlier,
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return summary(rows)
