"""Families x presets x targets, each compiled and compared with the untouched model; resumable.

    python tests/conformance/matrix.py [--families llava,...] [--presets fastv,...] [--targets torch,...] [--fresh]
    python tests/conformance/matrix.py --device cuda --targets torch --output benchmarks/results/conformance-cuda.json

Every cell is verified over prefill and 8 decode steps, for one sample and for a padded batch of three. Cells are
written to benchmarks/results/conformance.json as they are done, and cells found there are not run again. Without
options: the main families with every preset and target, then every other family with one preset in the targets torch
and ort.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import json
import logging
import pathlib
import re
import sys
import tempfile
import time
import warnings
from typing import Any

import torch

from tvc import api
from tvc.errors import PassError, TvcError
from tvc.policy import load_policy, presets
from tvc.report.timing import environment
from tvc.verification.check import compare

HERE = pathlib.Path(__file__).resolve().parent


def _support() -> Any:
    """tests/support.py, whose folder stays off `sys.path` (tests/kernels would pass for a package of that name)."""
    if "support" not in sys.modules:
        spec = importlib.util.spec_from_file_location("support", HERE.parent / "support.py")
        sys.modules["support"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["support"])
    return sys.modules["support"]


support = _support()
RESULTS = HERE.parent.parent / "benchmarks" / "results" / "conformance.json"
TARGETS = ("torch", "ort", "pt2", "torchscript")
BROAD, BROAD_TARGETS = ("fastv",), ("torch", "ort")  # what every further family is tried with
STEPS = 8
# Published budgets are for hundreds of visual tokens and depths for tens of layers; the tiny models have tens and six.
SETTINGS = {
    "visionzip": ["keep=25%", "contextual=2"],
    "sparsevlm": ["first=1", "second=2", "third=4"],
    "transprune": ["first=2", "second=3", "third=5"],
    "mqt": ["keep=9", "heads=2"],
    "tokenflex": ["side=3"],
    "flash-latents": ["keep=5"],
    "b-vllm-sampler": ["keep=5", "heads=2", "layers=3"],
    "qtsplus": ["heads=4", "groups=2"],
    "reread": ["heads=4", "groups=2"],
    "visiondrop": [
        "keep=60%",
        "contextual=20%",
        "contextual_first=20%",
        "contextual_second=20%",
        "contextual_third=30%",
    ],
    "stc": ["keep=3"],
    "fastvid": ["salient=25%", "context=20%", "scenes=2"],
    "pact": ["depth=2"],
    "recoverable": ["neighbours=4"],
    "showui": ["within=40"],  # neighbours in a photo are never the same; of some a region is made like this
    "mustdrop": ["alike=0.3", "guarded=2", "share=0.06", "least=0.2", "first=1", "second=2", "third=3", "fourth=4"],
}
# Presets with more cuts than the tiny models have layers run on deeper ones.
DEPTHS = {"aim": 28}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One family, preset and target, and what came of it."""

    family: str
    preset: str
    target: str
    outcome: str  # passed, failed or refused
    worst: float
    allowed: float
    output: str  # the output with the worst difference, or the refusal
    comparisons: int
    seconds: float


@functools.lru_cache(maxsize=2)  # presets are the inner loop
def prepare(
    family: str, device: str, layers: int | None = None
) -> tuple[api.Prepared, dict[int, dict[str, torch.Tensor]]]:
    """The family's model, surveyed once for all presets, and what it is asked: one sample, and a padded batch.

    `layers`: of its decoder, where the few of the tests' model are not enough.
    """
    model, processor = support.build(family, layers=layers)
    sample = None if processor is not None else support.inputs(family, 2)
    inputs = {
        batch: {name: value.to(device) for name, value in support.inputs(family, batch).items()} for batch in (1, 3)
    }
    return api.Prepared(model.to(device), processor=processor, inputs=sample), inputs


def verify_cells(
    family: str, preset: str, targets: tuple[str, ...] = TARGETS, steps: int = STEPS, device: str = "cpu"
) -> list[Cell]:
    """Traces and reduces once, then lowers, opens and verifies for every target."""
    started = time.perf_counter()
    policy = load_policy(preset, SETTINGS.get(preset, ()))
    weights = tempfile.TemporaryDirectory(prefix="tvc-weights-")

    def refused(target: str, refusal: TvcError, called: bool = False) -> Cell:
        spent = time.perf_counter() - started
        # A pass that breaks its own rules is no refusal, nor is what comes once the model is compiled.
        outcome = "failed" if called or isinstance(refusal, PassError) else "refused"
        return Cell(family, preset, target, outcome, 0.0, 0.0, refusal.render(), 0, spent)

    try:
        prepared, inputs = prepare(family, device, DEPTHS.get(preset))
        model = prepared.source.model
        policy = support.with_weights(policy, prepared.survey.layout, pathlib.Path(weights.name))
        program, resolved = prepared.reduce(policy)
    except TvcError as refusal:
        return [refused(target, refusal) for target in targets]
    cells = []
    for target in targets:
        try:
            compiled = api.finish(prepared.source, prepared.survey, resolved, program, target)
        except TvcError as refusal:
            cells.append(refused(target, refusal))
            continue
        try:
            rows = [row for one in inputs.values() for row in compare(compiled, model, one, steps=steps).comparisons]
        except TvcError as problem:
            cells.append(refused(target, problem, called=True))
            continue
        worst = max(rows, key=lambda row: row.worst / max(row.allowed, 1e-30))
        spent, started = time.perf_counter() - started, time.perf_counter()
        outcome = "passed" if all(row.passed for row in rows) else "failed"
        label = f"{worst.name}, {worst.site}, {worst.output}"
        cells.append(Cell(family, preset, target, outcome, worst.worst, worst.allowed, label, len(rows), spent))
    return cells


def _read(results: pathlib.Path) -> dict[str, Any]:
    return json.loads(results.read_text(encoding="utf-8")) if results.is_file() else {"cells": []}


def _write(cells: list[Cell], results: pathlib.Path) -> None:
    content = {"environment": environment(), "steps": STEPS, "cells": [dataclasses.asdict(cell) for cell in cells]}
    partial = results.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(results)
    if results == RESULTS:
        RESULTS.with_name("families.md").write_text(families(cells), encoding="utf-8")


def table(cells: list[Cell]) -> str:
    """Worst difference of each family and preset, one column a target."""
    targets = list(dict.fromkeys(cell.target for cell in cells))
    lines = [f"{'family':16} {'preset':12} " + " ".join(f"{target:>12}" for target in targets)]
    for family, preset in dict.fromkeys((cell.family, cell.preset) for cell in cells):
        found = {cell.target: cell for cell in cells if (cell.family, cell.preset) == (family, preset)}
        shown = [f"{c.worst:12.1e}" if c.outcome == "passed" else f"{c.outcome:>12}" for c in found.values()]
        lines.append(f"{family:16} {preset:12} " + " ".join(shown))
    passed = sum(cell.outcome == "passed" for cell in cells)
    worst = max((cell.worst for cell in cells if cell.outcome == "passed"), default=0.0)
    compared = sum(cell.comparisons for cell in cells)
    lines.append(f"{passed} of {len(cells)} cells passed, {compared} comparisons, worst difference {worst:.1e}")
    return "\n".join(lines)


def families(cells: list[Cell]) -> str:
    """What became of every family with the presets of `BROAD`, as a table in Markdown."""
    lines = ["| family | preset | torch | ort |", "|---|---|---|---|"]
    kept = [cell for cell in cells if cell.preset in BROAD and cell.target in BROAD_TARGETS]
    for family, preset in sorted({(cell.family, cell.preset) for cell in kept}):
        found = {cell.target: cell for cell in kept if (cell.family, cell.preset) == (family, preset)}
        shown = [_shown(found.get(target)) for target in BROAD_TARGETS]
        lines.append(f"| {family} | {preset} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def _shown(cell: Cell | None) -> str:
    if cell is None:
        return "not run"
    if cell.outcome == "passed":
        return f"{cell.worst:.1e}"
    got = re.search(r"got: +(.*?)(?:\n  want:|$)", cell.output, re.DOTALL)
    reason = " ".join(got[1].split()) if got else cell.output
    return f"{cell.outcome}: {reason[:160]}".replace("|", "/")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families")
    parser.add_argument("--presets")
    parser.add_argument("--targets")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    cells = [] if options.fresh else [Cell(**cell) for cell in _read(options.output)["cells"]]
    named = [options.families, options.presets, options.targets]
    sweeps = [(support.FAMILIES, presets(), TARGETS), (support.FURTHER, BROAD, BROAD_TARGETS)]
    if any(named):
        sweeps = [tuple(n.split(",") if n else given for n, given in zip(named, sweeps[0], strict=True))]
    for family, preset, wanted in ((f, p, targets) for fs, ps, targets in sweeps for f in fs for p in ps):
        done = {c.target for c in cells if (c.family, c.preset) == (family, preset) and c.outcome == "passed"}
        left = tuple(target for target in wanted if target not in done)
        if not left:
            continue
        cells = [c for c in cells if (c.family, c.preset) != (family, preset) or c.target not in left]
        for cell in verify_cells(family, preset, left, device=options.device):
            cells.append(cell)
            note = "" if cell.outcome == "passed" else cell.output.replace("\n", " ")
            line = f"{family} {preset} {cell.target}: {cell.outcome} {cell.worst:.1e} ({cell.seconds:.0f} s) {note}"
            print(line.rstrip(), flush=True)
        _write(cells, options.output)
    print(table(cells))
    return 1 if any(cell.outcome == "failed" for cell in cells) else 0


if __name__ == "__main__":
    raise SystemExit(main())
