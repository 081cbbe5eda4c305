"""What the tokens that each policy keeps show of the things that the questions of `accuracy.py` ask about.

    python benchmarks/seen.py [--examples N] [--policies NAME,...] [--budgets 25%,...] [--answers DIRECTORY]

Every scene says where its things are, so that reasons of a low accuracy can be told apart: what is asked about is not
kept; fewer tokens are left than the budget allows; or enough is kept, and the replies are no answers at all. Tokens are
counted in one call a question; replies are those that `accuracy.py` keeps. Results: `benchmarks/results/seen.json` and
`seen.md`, where rows of policies that are not named stay.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from tvc.api import Prepared, layout_of
from tvc.evaluation import scenes
from tvc.evaluation.records import Record
from tvc.evaluation.study import BUDGETS
from tvc.evaluation.variants import DENSE, Variant, labelled, variants
from tvc.report.cost import one_image
from tvc.report.panels import panels
from tvc.report.patches import View, views
from tvc.report.timing import environment
from tvc.runtime.prompts import prepared_batch

HERE = pathlib.Path(__file__).parent
MODEL = HERE.parent / "examples" / "models" / "tiny-llava"
RESULTS = HERE / "results" / "seen"
BATCH = 50
# Those that answer less than `random` at some budget, and some that do not.
BELOW = ("fastervlm", "prumerge", "recoverable", "illava", "fopru-row", "pact", "holitom", "prunevid", "vflowopt")
ABOVE = ("visionzip", "divprune", "tome", "fastv", str(HERE / "policies" / "fastv-4.yaml"))


@dataclasses.dataclass(frozen=True)
class Seen:
    """Means over the questions, all but the first from 0 to 1.

    left: visual tokens behind the last cut.
    things: of the kept tokens, those that show a thing or the sign.
    known: of a scene's things, those of which a kept token shows a part.
    asked: of the tokens that show what a question asks about, those that are kept.
    blind: questions about something of which no kept token shows a part.
    clumped: of a kept token's neighbours in the grid, those that are kept too.
    """

    left: float
    things: float
    known: float
    asked: float
    blind: float
    clumped: float


def covered(box: tuple[int, int, int, int], view: View) -> np.ndarray:
    """[tokens] bool: which of a view's tokens show a part of a box, given in pixels of a scene."""
    left, top, right, bottom = (edge / scenes.SIDE for edge in box)
    parts = [view.box(token) for token in range(view.tokens)]
    shown = (part and part[0] < right and part[2] > left and part[1] < bottom and part[3] > top for part in parts)
    return np.array([bool(shows) for shows in shown])


def clumped(kept: np.ndarray) -> float:
    """Of the neighbours of the tokens of a grid [rows, columns] bool that are kept, the share that is kept."""
    around = np.pad(kept, 1).astype(int)
    inside = np.pad(np.ones_like(kept), 1).astype(int)
    moves = [(down, across) for down in (-1, 0, 1) for across in (-1, 0, 1) if (down, across) != (0, 0)]
    near, possible = (sum(np.roll(grid, move, (0, 1))[1:-1, 1:-1] for move in moves) for grid in (around, inside))
    return float((near[kept] / possible[kept]).mean()) if kept.any() else 0.0


def look(drawn: scenes.Scene, asked: scenes.Question, kept: np.ndarray, view: View) -> Seen:
    """What the kept tokens of one scene show."""
    boxes = [thing.box for thing in drawn.things] + ([drawn.sign_box] if drawn.sign_box else [])
    there = np.array([covered(box, view) for box in boxes])
    wanted = np.array([covered(box, view) for box in asked.boxes])
    return Seen(
        left=float(kept.sum()),
        things=float(there.any(0)[kept].mean()) if kept.any() else 0.0,
        known=float((there & kept).any(1).mean()),
        asked=float((wanted & kept).sum() / wanted.sum()),
        blind=float(not (wanted & kept).any(1).all()),
        clumped=clumped(kept.reshape(view.rows, view.cols)),
    )


def kept_tokens(compiled: Any, processor: Any, drawn: Sequence[tuple[scenes.Scene, scenes.Question]]) -> Iterator[Any]:
    """(kept [tokens] bool, view) of every scene: the tokens that are left behind the last cut."""
    inputs = prepared_batch(processor, [one.image for one, _ in drawn], [question.text for _, question in drawn])
    with torch.no_grad():
        kept = compiled(**inputs).kept
    for number, (one, _) in enumerate(drawn):
        ids = inputs["input_ids"][number]
        places = (ids == compiled.config.image_token_id).nonzero().flatten().tolist()
        alone = {"pixel_values": inputs["pixel_values"][number : number + 1]}
        layout = views(one.image, len(places), alone, processor.image_processor)
        last = panels({site: rows[number].tolist() for site, rows in kept.items()}, places, layout)[-1]
        mask = np.zeros(len(places), bool)
        mask[list(last.kept)] = True
        yield mask, layout[0]


def measure(prepared: Prepared, variant: Variant, examples: int) -> Seen:
    compiled = prepared.compile(variant.policy, verify=False)
    found = []
    for first in range(0, examples, BATCH):
        drawn = [scenes.example("test", 0, index) for index in range(first, min(first + BATCH, examples))]
        kept = kept_tokens(compiled, prepared.source.processor, drawn)
        found += [look(*one, mask, view) for one, (mask, view) in zip(drawn, kept, strict=True)]
    means = np.mean([dataclasses.astuple(one) for one in found], axis=0)
    return Seen(*(round(float(mean), 4) for mean in means))


def replies(folder: pathlib.Path, variant: str) -> list[Record]:
    file = folder / "answers" / f"{variant}.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines()[1:] if file.is_file() else []
    return [Record(**json.loads(line)) for line in lines]


def stray(given: Sequence[Record], dense: Sequence[Record]) -> float | None:
    """Of a policy's replies, the share that the dense model gives to no question of the kind; None without replies."""
    sayings = {(record.kind, record.text) for record in dense}
    found = [(record.kind, record.text) not in sayings for record in given]
    return round(float(np.mean(found)), 4) if found else None


def table(rows: Sequence[dict[str, Any]]) -> str:
    columns = ("left", "things", "known", "asked", "blind", "clumped", "stray")
    lines = [f"| policy | budget | planned | {' | '.join(columns)} |", f"|---|---|{'---:|' * (len(columns) + 1)}"]
    for row in rows:
        left, *shares = (row[column] for column in columns)
        shown = ["-" if share is None else f"{share:.0%}" for share in shares]
        lines.append(f"| {row['policy']} | {row['budget']} | {row['planned']:.0f} | {left:.1f} | {' | '.join(shown)} |")
    return "\n".join(lines)


def write(rows: Sequence[dict[str, Any]], examples: int) -> None:
    content = {"environment": environment(), "examples": examples, "rows": rows}
    RESULTS.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    told = (*(Seen.__doc__ or "").splitlines(), "stray: replies that the dense model gives to no question of the kind.")
    text = "\n".join(["# What kept tokens show", "", *(line.strip() for line in told), "", table(rows), ""])
    RESULTS.with_suffix(".md").write_text(text, encoding="utf-8")


def _others(policies: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of earlier runs that are of other policies."""
    file = RESULTS.with_suffix(".json")
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.is_file() else []
    return [row for row in rows if row["policy"] not in policies]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--answers", type=pathlib.Path, default=HERE.parent / "out" / "accuracy" / "accuracy")
    parser.add_argument("--examples", type=int, default=120)
    parser.add_argument("--policies", default=",".join((*BELOW, *ABOVE)))
    parser.add_argument("--budgets", default=",".join(BUDGETS))
    options = parser.parse_args()
    prepared = Prepared(MODEL)
    layout = one_image(layout_of(prepared.source.model, processor=prepared.source.processor))
    named = labelled(options.policies.split(","))
    dense = replies(options.answers, DENSE)
    rows = _others(options.policies.split(","))
    known = {row["policy"] for row in rows}
    for variant in variants(named, layout, options.budgets.split(","), seeds=1, average=False, text_tokens=16):
        if isinstance(variant, Variant) and variant.label not in known:
            rows.append({"policy": variant.label, "budget": variant.budget, "planned": variant.reached})
            rows[-1] |= dataclasses.asdict(measure(prepared, variant, options.examples))
            rows[-1]["stray"] = stray(replies(options.answers, f"{variant.name}-torch"), dense)
            print(rows[-1], flush=True)
            write(rows, options.examples)


if __name__ == "__main__":
    main()
