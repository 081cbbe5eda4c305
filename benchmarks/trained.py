"""What the modules that `examples/` trains for the bundled model are worth, beside baselines at the same budgets.

    python benchmarks/trained.py [--examples N] [--output DIRECTORY]

The scorer at three budgets, and the exit routers beside exits at fixed layers and beside policies that hold as many
visual tokens in the decoder's layers on average as the routers did. Replies are kept below the output directory, so
that a run that was stopped goes on; tables and JSON are written to `benchmarks/results/trained-*`.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
from typing import Any

import torch

from tvc.api import Prepared
from tvc.evaluation.study import Options, evaluate
from tvc.evaluation.tasks import SceneTask, batches
from tvc.runtime.prompts import prepared_batch

HERE = pathlib.Path(__file__).parent
EXAMPLES = pathlib.Path(os.path.relpath(HERE.parent / "examples"))
MODEL, POLICIES = EXAMPLES / "models" / "tiny-llava", EXAMPLES / "policies"
RESULTS = HERE / "results"
BUDGETS = ("25%", "11%", "5%")
LAYERS = range(2, 6)


def fixed(layer: int) -> dict[str, Any]:
    step = {"at": f"language.{layer}", "exit": {"when": "always"}}
    return {"version": 1, "name": f"exit-at-{layer}", "steps": [step]}


def held(policy: pathlib.Path, task: SceneTask) -> dict[str, Any]:
    """Visual tokens in each decoder layer, mean over the questions, and where they left."""
    prepared = Prepared(MODEL, dtype="float32")
    compiled = prepared.compile(policy, verify=False)
    sites = {int(step.at.removeprefix("language.")): step.at for step in compiled.policy.steps}
    visual = compiled.plan.layers[0].visual
    total, left = torch.zeros(len(prepared.survey.layout.language)), dict.fromkeys((*map(str, sites), "never"), 0)
    for _, examples in batches(task, 0, 50):
        inputs = prepared_batch(prepared.source.processor, [e.image for e in examples], [e.question for e in examples])
        with torch.no_grad():
            kept = compiled(**inputs).kept
        text = inputs["attention_mask"].sum(1) - visual
        now = torch.full((len(examples),), visual)
        for layer in range(len(total)):
            if layer in sites:
                staying = (kept[sites[layer]] >= 0).sum(1) - text
                left[str(layer)] += int(((staying == 0) & (now > 0)).sum())
                now = staying
            total[layer] += now.sum()
        left["never"] += int((now > 0).sum())
    return {"visual_tokens": (total / len(task)).tolist(), "left_at": left, "of": visual}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--examples", type=int, default=600)
    parser.add_argument("--output", type=pathlib.Path, default=HERE.parent / "out" / "trained")
    options = parser.parse_args()
    task = SceneTask(options.examples)
    plain: dict[str, Any] = {"batch_size": 50, "verify": False, "seeds": 1}
    asked = {"model": MODEL, "task": task}
    scorer = evaluate(
        policies=[POLICIES / "scorer.yaml", "fastv"],
        output=options.output / "scorer",
        options=Options(budgets=BUDGETS, **plain),
        **asked,
    )
    write("trained-scorer", scorer, options.output / "scorer")
    router = POLICIES / "exit-router.yaml"
    exits = evaluate(
        policies=[router, *(fixed(layer) for layer in LAYERS)],
        output=options.output / "exits",
        options=Options(budgets=("as-written",), **plain),
        **asked,
    )
    exits["held"] = held(router, task)
    average = sum(exits["held"]["visual_tokens"]) / len(exits["held"]["visual_tokens"])
    share = f"{round(1000 * average / exits['held']['of']) / 10:g}%"
    same = evaluate(
        policies=["fastv"],
        output=options.output / f"average-{share.rstrip('%')}",
        options=Options(budgets=(share,), average=True, **plain),
        **asked,
    )
    exits["same_average"] = {"budget": share, "rows": same["rows"], "refused": same["refused"]}
    write("trained-exits", exits, options.output / "exits", exits_page(exits))


def exits_page(result: dict[str, Any]) -> str:
    """What `results.md` cannot say: how many visual tokens the routers left, and what others do with as many."""
    measured = result["held"]
    layers = ", ".join(f"{count:.0f}" for count in measured["visual_tokens"])
    left = ", ".join(f"{number} at layer {name}" for name, number in measured["left_at"].items() if name != "never")
    lines = [
        "",
        "## The routers",
        "",
        f"Visual tokens in the decoder's layers, mean over the questions: {layers} (of {measured['of']}).",
        f"They left: {left}; {measured['left_at']['never']} never.",
        "",
        f"Policies with as many visual tokens in a layer on average ({result['same_average']['budget']}):",
        "",
        "| policy | right |",
        "|---|---|",
    ]
    lines += [f"| {row['policy']} | {row['accuracy']:.1%} |" for row in result["same_average"]["rows"][1:]]
    lines += [f"| {row['policy']} | refused: {row['reason']} |" for row in result["same_average"]["refused"]]
    return "\n".join(lines) + "\n"


def write(name: str, result: dict[str, Any], folder: pathlib.Path, more: str = "") -> None:
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    text = (folder / "results.md").read_text(encoding="utf-8") + more
    (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
