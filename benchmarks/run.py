"""Measures dense, compiled and ideal side by side, torch and ONNX Runtime, prefill and decode; writes one JSON a run.

    python benchmarks/run.py [--case decoder-12x768] [--target torch --target ort] [--repeats 20] [--threads 1]

Two scopes: `decoder`, the graph alone, where the ideal is every layer at its native length through the same code; and
`model`, a whole call with vision, embedding and the family's own code, where dense is the untouched model in PyTorch.
Each compiled model is verified against the untouched one before it is measured: no number without a passed check.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import pathlib
import sys
import tempfile
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

import tvc
from tvc.chunks import CHUNK_INPUTS
from tvc.export import manifest
from tvc.report.phases import PHASES, in_sequence, phases
from tvc.report.timing import Timing, Variant, environment, measure, rows, text

HERE = pathlib.Path(__file__).resolve().parent
COLUMNS = ("case", "target", "scope", "phase", "variant", "median_ms", "p20_ms", "p80_ms", "speedup", "efficiency")
DECODE_TURNS = 3  # decode steps per prefill: they are short, and their medians need more of them
ROUNDS = 4  # openings of each graph: where its weights come to lie moves a decode step by a tenth


def _beside(name: str) -> ModuleType:
    """A file of this folder as a module: with PYTHONSAFEPATH the folder of a script is not searched."""
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    if spec is None or spec.loader is None:
        raise ImportError(name)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


cases, decoder = _beside("cases"), _beside("decoder")


def main() -> None:
    options = _arguments()
    torch.set_num_threads(options.threads or torch.get_num_threads())
    facts = environment(HERE)
    rows_of_all: list[dict[str, Any]] = []
    for name in options.case or ["decoder-12x768"]:
        for target in options.target or ["torch", "ort"]:
            with tempfile.TemporaryDirectory(prefix="tvc-bench-") as folder:
                prepared = prepare(cases.CASES[name], target, options.threads, pathlib.Path(folder))
                made, graphs = prepared.variants(prepared.case.batch)
                fresh = measured(made, graphs, options.repeats, case=name, target=target)
            print(text(fresh, COLUMNS), flush=True)
            rows_of_all += fresh
    output = options.output or HERE / "results" / f"{facts['date'][:10]}-{(facts['commit'] or 'none')[:8]}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"environment": facts, "rows": rows_of_all}, indent=1) + "\n", encoding="utf-8")
    print(output)


def measured(
    made: dict[str, dict[str, dict[str, Variant]]],
    graphs: list[Any],
    repeats: int,
    synchronize: Callable[[], None] = lambda: None,
    **facts: Any,
) -> list[dict[str, Any]]:
    """Rows of every scope and phase; the turns are spread over rounds, each on freshly opened graphs."""
    times: dict[tuple[str, str], dict[str, tuple[float, ...]]] = {}
    for _ in range(ROUNDS):
        for graph in graphs:
            graph.renew()
        for scope, labels in made.items():
            for phase in PHASES:
                turns = max(1, repeats // ROUNDS) * (DECODE_TURNS if phase == "decode" else 1)
                timed = {label: both[phase] for label, both in labels.items() if phase in both}
                timings = measure(timed, turns, warmup=2, synchronize=synchronize)
                pooled = times.setdefault((scope, phase), dict.fromkeys(timings, ()))
                for label, timing in timings.items():
                    pooled[label] += timing.times
    return [
        row
        for (scope, phase), pooled in times.items()
        for row in rows({label: Timing(v) for label, v in pooled.items()}, **facts, scope=scope, phase=phase)
    ]


@dataclasses.dataclass
class Prepared:
    """A case compiled: for one target, for any batch."""

    case: Any
    model: Any
    compiled: Any
    again: Callable[[], Any] | None
    dense: Any
    ideal: list[tuple[Any, Any]]  # (part of the case, its decoder)

    def variants(self, batch: int) -> tuple[dict[str, dict[str, dict[str, Variant]]], list[Any]]:
        """Scope -> label -> phase -> variant, and the graphs they run."""
        inputs = cases.build_inputs(dataclasses.replace(self.case, batch=batch))
        calls = decoder.Recorder(self.compiled.engine.run)
        self.compiled.engine.run = calls
        whole = {"dense": phases(self.model, inputs, logits_to_keep=1), "compiled": phases(self.compiled, inputs)}
        step = whole["compiled"]["decode"]
        step.call(step.setup())
        self.compiled.engine.run = calls.run
        given = dict(zip(PHASES, calls.given, strict=True))
        chunk = {name: value for name, value in given["prefill"].items() if name in CHUNK_INPUTS}
        graphs = {
            "dense": [self.dense.graph(chunk)],
            "compiled": [decoder.Graph(calls.run, given, self.again)],
            "ideal": [own.graph(decoder.chunk(part.width, part.visual, part.text, batch)) for part, own in self.ideal],
        }
        alone = {
            label: {phase: in_sequence([one.variant(phase) for one in some]) for phase in PHASES}
            for label, some in graphs.items()
        }
        return {"decoder": alone, "model": whole}, [one for some in graphs.values() for one in some]


def prepare(case: Any, target: str, threads: int, folder: pathlib.Path, verify: bool = True) -> Prepared:
    """The case's model, compiled, and the decoders it is compared with. Files of the targets go below `folder`."""
    model, inputs = cases.build_model(case), cases.build_inputs(case)
    compiled: Any = tvc.compile(model, case.policy, target=target, inputs=inputs, verify=verify)
    again = None
    if target != "torch":
        compiled.save_pretrained(folder / "compiled")
        compiled = tvc.load(folder / "compiled", threads=threads)
        again = decoder.opener(folder / "compiled", manifest.read(folder / "compiled"), threads)
    dense = decoder.native(model, inputs, target, folder / "dense", threads)
    parts = [part for part in case.parts if part.layers]
    ideal = []
    for part in parts:
        own = cases.build_model(part) if part == parts[-1] else decoder.headless(cases.build_model(part))
        place = folder / f"ideal{part.layers}"
        ideal.append((part, decoder.native(own, cases.build_inputs(part), target, place, threads)))
    return Prepared(case, model, compiled, again, dense, ideal)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--case", action="append", choices=[name for name, case in cases.CASES.items() if case.device == "cpu"]
    )
    parser.add_argument("--target", action="append")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=0, help="threads of one operator; 0 leaves the default")
    parser.add_argument("--output", type=pathlib.Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
