"""Families x presets x what they are asked, each compiled and compared with the untouched model; resumable.

    python tests/conformance/asked.py [--families llava,...] [--presets fastv,...] [--target draft] [--fresh]

What a model is asked: a prompt of three pictures and a later turn; prompts with two pictures, one and none in a batch,
padded in front and behind, and a later turn; prompts that are alike, and a decode step on their caches; prompts without
a picture. Each is run through the prompt and a few tokens more. The target `draft` runs the graphs as the passes leave
them, in a third of the time; `matrix.py` has the targets, for one prompt and a padded batch.

Cells are written to benchmarks/results/conformance-asked.json as they are done, and cells found there are not run
again; conformance-asked.md has them as a table.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import json
import logging
import pathlib
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch

from tvc.policy import Policy, load_policy, presets
from tvc.report.timing import environment

HERE = pathlib.Path(__file__).resolve().parent
RESULTS = HERE.parent.parent / "benchmarks" / "results" / "conformance-asked.json"


def _beside(name: str, path: pathlib.Path) -> Any:
    """A file whose folder stays off `sys.path` (tests/kernels would pass for a package of that name)."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


support = _beside("support", HERE.parent / "support.py")
random_inputs = _beside("random_inputs", HERE / "random_inputs.py")
random_bench = _beside("random_bench", HERE / "random_bench.py")
matrix = _beside("matrix", HERE / "matrix.py")
Inputs, Sample = random_inputs.Inputs, random_inputs.Sample

ASKED = {
    "several": Inputs((Sample(1, ((0, 150, 101), (1, 64, 190), (2, 120, 120))),), turn=3),
    "ragged": Inputs((Sample(0, ((0, 120, 90), (2, 77, 163))), Sample(1, ((1, 150, 150),)), Sample(3, ())), True, 3),
    "alike": Inputs((Sample(2, ((2, 133, 97),)),) * 2, turn=1),
    "none": Inputs((Sample(0, ()), Sample(1, ()))),
}
# Those of which a user is likely to have one; each with a processor of its own, or a stand-in for it.
FAMILIES = (
    *("llava", "llava_next", "llava_onevision", "llava_next_video", "video_llava", "qwen2_vl", "qwen2_5_vl"),
    *("qwen3_vl", "internvl", "idefics3", "smolvlm", "paligemma", "gemma3", "mistral3", "lfm2_vl", "blip-2"),
    *("instructblip", "mllama"),
)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One family, preset and way of asking, and what came of it, as `random_bench.Outcome` has it."""

    family: str
    preset: str
    asked: str
    outcome: str
    what: str
    where: str
    share: float  # the worst difference, as a share of what is allowed
    comparisons: int
    seconds: float


@functools.lru_cache(maxsize=2)  # presets are the inner loop
def bench(family: str, layers: int | None) -> Any:
    return random_bench.Bench(family, support.build_model(family, layers=layers))


def cells_of(family: str, preset: str, target: str) -> list[Cell]:
    """Compiles once and asks in every way."""
    started = time.perf_counter()
    policy: Policy = load_policy(preset, matrix.SETTINGS.get(preset, ()))
    try:
        found = bench(family, matrix.DEPTHS.get(preset)).runs(policy, [[one] for one in ASKED.values()], target)
    except Exception as problem:  # noqa: BLE001  the model cannot be opened; told as of a policy
        found = [random_bench.told(problem)] * len(ASKED)
    spent = (time.perf_counter() - started) / len(ASKED)
    return [
        Cell(family, preset, asked, one.kind, one.what, one.where, one.share, one.comparisons, spent)
        for asked, one in zip(ASKED, found, strict=True)
    ]


def summary(cells: Iterable[Cell]) -> str:
    """Families by ways of asking: how many presets agree, are refused, and whatever else there is."""
    kept = list(cells)
    lines = [f"| family | {' | '.join(ASKED)} |", "|---" * (1 + len(ASKED)) + "|"]
    for family in dict.fromkeys(cell.family for cell in kept):
        row = []
        for asked in ASKED:
            own = Counter(cell.outcome for cell in kept if (cell.family, cell.asked) == (family, asked))
            row.append(", ".join(f"{number} {kind}" for kind, number in own.most_common()))
        lines.append(f"| {family} | {' | '.join(row)} |")
    reasons = Counter(cell.what for cell in kept if cell.outcome == "refused")
    told = ", ".join(f"`{slug}` {number}" for slug, number in reasons.most_common())
    compared = sum(cell.comparisons for cell in kept)
    lines += ["", f"{len(kept)} cells, {compared} comparisons. Refused: {told or 'none'}."]
    return "\n".join(lines) + "\n"


def _write(cells: list[Cell], target: str, results: pathlib.Path) -> None:
    content = {"environment": environment(), "target": target, "steps": random_bench.STEPS}
    content["cells"] = [dataclasses.asdict(cell) for cell in cells]
    partial = results.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(results)
    results.with_suffix(".md").write_text(summary(cells), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--presets", default=",".join(presets()))
    parser.add_argument("--target", default="draft")
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    known = options.output.is_file() and not options.fresh
    cells = [Cell(**one) for one in json.loads(options.output.read_text())["cells"]] if known else []
    bad = {(cell.family, cell.preset) for cell in cells if cell.outcome in ("failed", "crashed")}
    done = {(cell.family, cell.preset) for cell in cells} - bad
    for family in options.families.split(","):
        for preset in options.presets.split(","):
            if (family, preset) in done:
                continue
            cells = [cell for cell in cells if (cell.family, cell.preset) != (family, preset)]
            for cell in cells_of(family, preset, options.target):
                cells.append(cell)
                note = "" if cell.outcome == "passed" else f" {cell.what} {cell.where}"
                print(f"{family} {preset} {cell.asked}: {cell.outcome} {cell.share:.2f}{note}".rstrip(), flush=True)
            _write(cells, options.target, options.output)
    print(summary(cells))
    return 1 if any(cell.outcome in ("failed", "crashed") for cell in cells) else 0


if __name__ == "__main__":
    raise SystemExit(main())
