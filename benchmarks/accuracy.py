"""What every preset leaves of the bundled model's answers, at four budgets; and whether ONNX Runtime answers the same.

    python benchmarks/accuracy.py [--examples N] [--output DIRECTORY] [--only NAME,...]

Replies are kept below the output directory, so that a run that was stopped goes on; table, plot and JSON are written to
`benchmarks/results/accuracy*`. `--only` asks these policies alone, at all budgets, and puts their rows in the place of
those that the results have of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import shutil
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from tvc.evaluation import pages
from tvc.evaluation.records import write_whole
from tvc.evaluation.study import BUDGETS, Options, evaluate
from tvc.evaluation.tasks import SceneTask
from tvc.evaluation.variants import AS_WRITTEN, BASELINES, DENSE
from tvc.policy import presets

HERE = pathlib.Path(__file__).parent
# As one would write it: the results name it.
MODEL = pathlib.Path(os.path.relpath(HERE.parent / "examples" / "models" / "tiny-llava"))
MARKS = ("<!-- accuracy -->", "<!-- /accuracy -->")


def fitted(*names: str) -> tuple[str, ...]:
    """Presets as the bundled model can take them: cuts at layers that it has, weights and reaches that suit it."""
    return tuple(str(HERE / "policies" / f"{name}.yaml") for name in names)


# FastV by the fourth layer: the bundled model's six layers find later than the preset cuts what a question asks about.
FITTED = fitted(
    *("fastv-4", "aim-6", "sparsevlm-6", "transprune-6", "centerclip-spectral-relative"),
    *("b-vllm-sampler-trained", "covipal-trained", "flash-latents-trained"),
    *("mqt-trained", "pixel-shuffle-trained", "qtsplus-trained", "reread-trained", "tokenflex-trained"),
)
# What no budget can be set of: it asks by itself how much leaves, cuts nothing, or thins the frames of a video.
UNBUDGETED = (
    *("dycoke", "evs", "frame-stride", "framefusion", "pool", "pool-3d", "showui", "stc", "todre-exit", "v2pe"),
    *("video-xl-2", "vista-unrotated", "visual-context-window"),
    *fitted("dyvte-trained", "mustdrop-6"),
)
# Name of the results, presets, and how to ask: all budgets in torch; what has none, as it is; and in both runtimes one
# budget of a policy that acts inside the decoder, one that acts before it, and the baselines. The conformance tests
# verify what runs.
STUDIES = {
    "accuracy": ((*presets(), *FITTED), Options(budgets=BUDGETS, targets=("torch",), batch_size=50, verify=False)),
    "accuracy-as-written": (
        UNBUDGETED,
        Options(budgets=(AS_WRITTEN,), targets=("torch",), batch_size=50, verify=False),
    ),
    "accuracy-runtimes": (
        ("fastv", "visionzip"),
        Options(budgets=("25%",), targets=("torch", "ort"), seeds=1, batch_size=50, verify=False),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--examples", type=int, default=600)
    parser.add_argument("--output", type=pathlib.Path, default=HERE.parent / "out" / "accuracy")
    parser.add_argument("--only", type=lambda text: text.split(","))
    options = parser.parse_args()
    if options.only:
        again(options.only, options.examples, options.output)
        _write_readme()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f}%"), TimeElapsedColumn())
    for name, (named, study) in STUDIES.items():
        with Progress(*columns, console=Console(stderr=True)) as progress:
            bar = progress.add_task("loading", total=None)
            evaluate(
                MODEL,
                sorted(named, key=lambda given: pathlib.Path(given).stem),
                SceneTask(options.examples),
                options.output / name,
                study,
                lambda what, done, total, bar=bar, shown=progress: shown.update(
                    bar, description=what, completed=done, total=total
                ),
            )
        for suffix, made in ((".json", "results.json"), (".md", "results.md"), (".png", "accuracy.png")):
            shutil.copy(options.output / name / made, HERE / "results" / f"{name}{suffix}")
        print((HERE / "results" / f"{name}.md").read_text(encoding="utf-8"))
    _write_readme()


def again(names: list[str], examples: int, output: pathlib.Path) -> None:
    """Some policies of the first study once more: their rows take the place of the earlier ones."""
    policies, study = STUDIES["accuracy"]
    known = {pathlib.Path(given).stem: given for given in policies}
    if strangers := [name for name in names if name not in known]:
        raise SystemExit(f"--only: the study has no {', '.join(strangers)}; it has {', '.join(known)}")
    chosen = [known[name] for name in names]
    result, folder = _result("accuracy"), output / "only"
    alone = dataclasses.replace(study, baselines=False)
    made = evaluate(MODEL, chosen, SceneTask(examples), folder, alone)
    kept = ("examples", "accuracy")
    if [made["rows"][0][name] for name in kept] != [result["rows"][0][name] for name in kept]:
        raise SystemExit("the dense model answers otherwise than in the results: run all of them anew")
    for rows, dense in (("rows", 1), ("refused", 0)):
        added = [row for row in result[rows][dense:] if row["policy"] not in names] + made[rows][dense:]
        result[rows] = result[rows][:dense] + sorted(added, key=lambda row: row["policy"])
    result["facts"] = made["facts"]
    result["again"] = {**result.get("again", {}), **dict.fromkeys(names, made["environment"])}
    place = HERE / "results" / "accuracy"
    write_whole(place.with_suffix(".json"), json.dumps(result, indent=1) + "\n")
    write_whole(place.with_suffix(".md"), pages.markdown(result))
    pages.plot(result, place.with_suffix(".png"))


def _write_readme() -> None:
    readme = HERE.parent / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, behind = text.split(MARKS[0])[0], text.split(MARKS[1])[1]
    readme.write_text(f"{before}{MARKS[0]}\n{summary()}\n{MARKS[1]}{behind}", encoding="utf-8")


def summary() -> str:
    """The README's tables, from the results: right answers and FLOPs of each policy at each budget, or as written."""
    result = _result("accuracy")
    dense, *rows = result["rows"]
    budgets = list(dict.fromkeys(row["budget"] for row in rows))
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        most = "≤ " if row["at_most"] else ""
        cells.setdefault(row["policy"], {})[row["budget"]] = f"{row['accuracy']:.1%} ({most}{row['flops_ratio']:.0%})"
    lines = [f"| policy | {' | '.join(budgets)} |", f"|---|{'---|' * len(budgets)}"]
    lines += [f"| {name} | {' | '.join(of.get(budget, '-') for budget in budgets)} |" for name, of in cells.items()]
    kinds = ", ".join(f"{kind} {share:.1%}" for kind, share in dense["kinds"].items())
    written = [
        f"| {row['policy']} | {row['accuracy']:.1%} ({'≤ ' if row['at_most'] else ''}{row['flops_ratio']:.0%}) |"
        for row in _result("accuracy-as-written")["rows"]
        if row["policy"] not in (DENSE, *BASELINES)
    ]
    head = f"Dense: {dense['accuracy']:.1%} right ({kinds})."
    return "\n".join([head, "", *lines, "", "| without a budget | as written |", "|---|---|", *written])


def _result(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((HERE / "results" / f"{name}.json").read_text(encoding="utf-8"))
    return result


if __name__ == "__main__":
    main()
