"""Measures dense, compiled and ideal side by side, torch and ONNX Runtime, prefill and decode; writes one JSON a run.

    python benchmarks/run.py [--case decoder-12x768] [--target torch --target ort] [--repeats 20] [--output FILE]

Each compiled model is verified against the untouched one before it is measured: no number without a passed check.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import pathlib
import sys
from types import ModuleType
from typing import Any

import torch

import tvc
from tvc.report.phases import PHASES, in_sequence, phases
from tvc.report.timing import Variant, environment, measure, rows, text

HERE = pathlib.Path(__file__).resolve().parent
COLUMNS = ("case", "target", "phase", "variant", "median_ms", "p20_ms", "p80_ms", "speedup", "efficiency")


def _beside(name: str) -> ModuleType:
    """A file of this folder as a module: with PYTHONSAFEPATH the folder of a script is not searched."""
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    if spec is None or spec.loader is None:
        raise ImportError(name)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


cases = _beside("cases")


def main() -> None:
    options = _arguments()
    torch.set_num_threads(options.threads or torch.get_num_threads())
    facts = environment(HERE)
    measured: list[dict[str, Any]] = []
    for name in options.case or ["decoder-12x768"]:
        for target in options.target or ["torch", "ort"]:
            made = variants(cases.CASES[name], target)
            for phase in PHASES:
                timings = measure({label: both[phase] for label, both in made.items()}, options.repeats)
                measured += rows(timings, case=name, target=target, phase=phase)
            print(
                text([row for row in measured if (row["case"], row["target"]) == (name, target)], COLUMNS), flush=True
            )
    output = options.output or HERE / "results" / f"{facts['date'][:10]}-{(facts['commit'] or 'none')[:8]}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"environment": facts, "rows": measured}, indent=1) + "\n", encoding="utf-8")
    print(output)


def variants(case: Any, target: str) -> dict[str, dict[str, Variant]]:
    """Label -> phase -> variant. In ONNX Runtime the untouched model is the one that keeps every token."""
    model, inputs = cases.build_model(case), cases.build_inputs(case)
    dense = (
        phases(model, inputs, logits_to_keep=1)
        if target == "torch"
        else phases(tvc.compile(model, cases.KEEP_ALL, target=target, inputs=inputs), inputs)
    )
    compiled = phases(tvc.compile(model, case.policy, target=target, inputs=inputs), inputs)
    parts = [native(part, target) for part in case.parts if part.layers]
    ideal = {phase: in_sequence([part[phase] for part in parts]) for phase in PHASES}
    return {"dense": dense, "compiled": compiled, "ideal": ideal}


def native(part: Any, target: str) -> dict[str, Variant]:
    """Some of the layers at the length they run at, through the same code path."""
    inputs = cases.build_inputs(part)
    return phases(tvc.compile(cases.build_model(part), cases.KEEP_ALL, target=target, inputs=inputs), inputs)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--case", action="append", choices=list(cases.CASES))
    parser.add_argument("--target", action="append")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 leaves the default")
    parser.add_argument("--output", type=pathlib.Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
