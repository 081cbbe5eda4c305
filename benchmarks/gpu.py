"""Measures models of 7 billion parameters on a CUDA device, end to end, and writes one JSON.

    python benchmarks/gpu.py [--case llava-1.5-7b] [--batch 1 --batch 8] [--inductor]

Random weights in bfloat16: latency does not depend on them. `dense` is the untouched model under SDPA, `ideal` every
layer at its native length through the same code, `published` selection as research code does it (`published.py`).
Each policy is first verified on a model of the same widths with four layers and 576 visual tokens. `overhead` is the
device time of everything that passes added (scores, selection, gathers), as a share of all device time of a prefill.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib.util
import json
import pathlib
import sys
import tempfile
import time
from types import ModuleType
from typing import Any

import torch
import torch.fx as fx

import tvc
from tvc.graphs import open_draft
from tvc.report.timing import environment, text
from tvc.verification.check import compare

HERE = pathlib.Path(__file__).resolve().parent
COLUMNS = ("case", "batch", "scope", "phase", "variant", "median_ms", "speedup", "efficiency", "peak_mib", "kv_mib")
SHALLOW = 4


def _beside(name: str) -> ModuleType:
    """A file of this folder as a module: with PYTHONSAFEPATH the folder of a script is not searched."""
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    if spec is None or spec.loader is None:
        raise ImportError(name)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


run = _beside("run")
published = _beside("published")


class _Marked(fx.Interpreter):
    """Runs a graph and names what passes added in the profile."""

    def run_node(self, node: fx.Node) -> Any:
        if (node.meta.get("custom") or {}).get("tvc"):
            with torch.profiler.record_function("added by a pass"):
                return super().run_node(node)
        return super().run_node(node)


def overhead(part: Any, given: dict[str, torch.Tensor]) -> dict[str, float]:
    """Device milliseconds of one prefill of a decoder: all of it, and what passes added."""
    marked = _Marked(open_draft(part))
    inputs = [given[name] for name in part.inputs]
    with torch.no_grad():
        marked.run(*inputs)
        torch.cuda.synchronize()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            marked.run(*inputs)
            torch.cuda.synchronize()
    averages = profile.key_averages()
    total = sum(each.self_device_time_total for each in averages if each.device_type == torch.autograd.DeviceType.CUDA)
    added = sum(
        each.device_time_total
        for each in averages
        if each.key == "added by a pass" and each.device_type == torch.autograd.DeviceType.CPU
    )
    ranges = sum(
        each.self_device_time_total
        for each in averages
        if each.key == "added by a pass" and each.device_type == torch.autograd.DeviceType.CUDA
    )
    return {"device_ms": (total - ranges) / 1000, "added_ms": added / 1000}


def peak(variant: Any) -> float:
    """MiB that one call takes above what is allocated before it."""
    given = variant.setup()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    variant.call(given)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def cached(call: Any, inputs: dict[str, torch.Tensor]) -> float:
    """MiB of keys and values after a prefill."""
    with torch.no_grad():
        layers = call(**inputs).past_key_values.layers
    return sum(t.numel() * t.element_size() for layer in layers for t in (layer.keys, layer.values)) / 2**20


def verified(case: Any) -> dict[str, Any]:
    """The policy on a shallow model of the same widths, against the untouched model."""
    side = 8 if case.visual > 576 else round(case.kept**0.5)
    shallow = dataclasses.replace(case, layers=SHALLOW, visual=576, kept=side * side, batch=1)
    model, inputs = run.cases.build_model(shallow), run.cases.build_inputs(shallow)
    report = compare(tvc.compile(model, shallow.policy, inputs=inputs, verify=False), model, inputs)
    failed = [str(each) for each in report.comparisons if not each.passed]
    return {"layers": SHALLOW, "comparisons": len(report.comparisons), "passed": not failed, "failed": failed}


def measured(
    prepared: Any, batch: int, repeats: int, faster: Any = None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of one case at one batch, and what was found beside times; `faster`: its model through `torch.compile`."""
    case = dataclasses.replace(prepared.case, batch=batch)
    made, graphs = prepared.variants(batch)
    model, compiled, inputs = prepared.model, prepared.compiled, run.cases.build_inputs(case)
    eager = published.Published(model, case, inputs)
    made["model"]["published"] = {"prefill": eager.variant()}
    found: dict[str, Any] = {"case": case.name, "batch": batch, "layers": case.layers}
    if faster is not None:
        made["model"]["torch_compile"] = run.phases(faster, inputs)
        given = graphs[1].inputs
        made["decoder"]["torch_compile"] = {
            phase: run.decoder.Graph(faster.engine.run, given).variant(phase) for phase in run.PHASES
        }
    rows = run.measured(made, graphs, repeats, torch.cuda.synchronize, case=case.name, batch=batch)
    memory = {(scope, label): peak(both["prefill"]) for scope, labels in made.items() for label, both in labels.items()}
    eager.release()
    for row in rows:
        if row["phase"] == "prefill":
            row["peak_mib"] = memory[row["scope"], row["variant"]]
        if row["scope"] == "model" and row["variant"] in ("dense", "compiled"):
            row["kv_mib"] = cached(model if row["variant"] == "dense" else compiled, inputs)
    decoder = compiled.engine.run.program.components["decoder"]
    found["overhead"] = overhead(decoder, graphs[1].inputs["prefill"])
    found["operators"] = [dataclasses.asdict(each) for each in compiled.plan.operators]
    return rows, found


def main() -> None:
    options = _arguments()
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py needs a CUDA device, and torch finds none.", file=sys.stderr)
        sys.exit(2)
    rows: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for name in options.case or [name for name, case in run.cases.CASES.items() if case.device == "cuda"]:
        checked = verified(run.cases.CASES[name]) if options.verify else None
        started = time.perf_counter()
        case = run.cases.CASES[name]
        case = dataclasses.replace(case, layers=options.layers or case.layers)
        with tempfile.TemporaryDirectory() as folder:
            prepared = run.prepare(case, "torch", 0, pathlib.Path(folder), verify=False)
        faster = prepared.compiled.torch_compile() if options.inductor else None
        for batch in options.batch or [1, 8]:
            try:
                fresh, more = measured(prepared, batch, options.repeats, faster)
            except torch.OutOfMemoryError as problem:
                fresh, more = [], {"case": name, "batch": batch, "out_of_memory": str(problem).splitlines()[0]}
            rows += fresh
            found.append({**more, "verified": checked, "seconds": time.perf_counter() - started})
            print(text(fresh, COLUMNS), found[-1], sep="\n", flush=True)
            content = {"environment": environment(HERE), "rows": rows, "found": found}
            options.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        del prepared, faster
        gc.collect()
        torch.cuda.empty_cache()
    print(text(rows, COLUMNS))
    print(options.output)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    names = [name for name, case in run.cases.CASES.items() if case.device == "cuda"]
    parser.add_argument("--case", action="append", choices=names)
    parser.add_argument("--batch", action="append", type=int)
    parser.add_argument("--layers", type=int, help="fewer layers than the case has")
    parser.add_argument("--inductor", action="store_true", help="measure the graphs through torch.compile too")
    parser.add_argument("--no-verify", dest="verify", action="store_false")
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--output", type=pathlib.Path, default=HERE / "results" / "gpu.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
