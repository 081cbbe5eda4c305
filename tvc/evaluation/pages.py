"""The figures of an evaluation for people: a table and a plot of accuracy against FLOPs."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from tvc.errors import ArgumentError
from tvc.evaluation.variants import BASELINES, DENSE

Rows = Sequence[Mapping[str, Any]]
NAMED = 9  # lines of a plot that a reader can tell apart


def table(result: Mapping[str, Any]) -> list[list[str]]:
    """A head and a line a row: the same cells for the terminal and for Markdown."""
    kinds = list(result["rows"][0]["kinds"])
    several = len({row["target"] for row in result["rows"]}) > 1
    head = ["policy", "budget", *(["target"] * several), "accuracy", "95 %", "of dense", *kinds]
    head += ["same first token", "tokens, mean", "FLOPs", "KV"]
    lines = [head]
    for row in result["rows"]:
        low, high = row["interval"]
        line = [row["policy"], row["budget"], *([row["target"]] * several)]
        line += [_percent(row["accuracy"]), f"{100 * low:.0f}-{100 * high:.0f}", _percent(row["relative"])]
        line += [_percent(row["kinds"][kind]) for kind in kinds]
        most = "≤ " if row["at_most"] else ""
        line += [_percent(row["agreement"]), f"{most}{row['average_tokens']:.1f}"]
        line += [f"{most}{_percent(row[ratio])}" for ratio in ("flops_ratio", "kv_ratio")]
        lines.append(line)
    return lines


def markdown(result: Mapping[str, Any]) -> str:
    """The whole evaluation as a page."""
    facts = result["facts"]
    head, *lines = table(result)
    about = (
        f"{facts['model']}, {facts['dtype']}: {facts['examples']} questions of task `{facts['task']}`, greedy answers. "
        f"Budgets are shares of all visual tokens, counted as {facts['budget_unit']}. FLOPs (vision encoder and "
        f"prompt) and KV cache are relative to dense, for {facts['text_tokens']} text tokens. They and the tokens are "
        "upper bounds (≤) where a step decides at run time how many tokens it leaves."
    )
    rows = [f"| {' | '.join(line)} |" for line in (head, ["---"] * 2 + ["---:"] * (len(head) - 2), *lines)]
    parts = ["# Accuracy under token reduction", about, "\n".join(rows)]
    seeds = [f"{row['policy']} {row['budget']}" for row in result["rows"] if row["seeds"] > 1]
    if seeds:
        count = max(row["seeds"] for row in result["rows"])
        parts.append(f"Means over {count} seeds: {', '.join(seeds)}.")
    parts += [
        f"{entry['policy']} {entry['budget']}: {entry['same']} of {entry['replies']} replies are the same in "
        f"{' and '.join(entry['targets'])}."
        for entry in result["agreement"]
    ]
    parts += [f"Not run: {entry['policy']} at {entry['budget']}: {entry['reason']}." for entry in result["refused"]]
    return "\n\n".join(parts) + "\n"


def plot(result: Mapping[str, Any], path: pathlib.Path) -> None:
    """Accuracy against FLOPs, a line a policy, the dense model and chance-like baselines told apart.

    Of many policies the baselines and the most accurate ones stand out, and the others lie behind them in grey.

    Raises:
        ArgumentError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as problem:
        raise ArgumentError(
            "the plot is drawn with matplotlib, and it is not installed",
            where="tvc eval",
            got=str(problem),
            want="matplotlib",
            fix="pip install 'tvc[eval]'; replies and results are kept",
            slug="no-matplotlib",
        ) from problem
    figure = Figure(figsize=(8, 5.2), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    dense = result["rows"][0]
    target = result["rows"][min(1, len(result["rows"]) - 1)]["target"]
    lines = _lines(result["rows"], target)
    prominent = _best(lines)
    for label, rows in lines.items():
        across = [100 * row["flops_ratio"] for row in rows]
        up = [100 * row["accuracy"] for row in rows]
        if label not in prominent:
            axes.plot(across, up, color="0.85", lw=1, zorder=1)
            axes.annotate(label, (across[0], up[0]), fontsize=5.5, color="0.6", ha="right", va="center")
            continue
        spread = [[100 * abs(row["accuracy"] - row["interval"][side]) for row in rows] for side in (0, 1)]
        style: dict[str, Any] = {"color": "0.6" if label == "random" else "0.35", "linestyle": "--"}
        axes.errorbar(
            across, up, yerr=spread, label=label, marker="o", ms=5, capsize=2, lw=1.6, elinewidth=0.8,
            **(style if label in BASELINES else {}),
        )  # fmt: skip
        if len(lines) > NAMED:
            continue
        for row, x, y in zip(rows, across, up, strict=True):
            axes.annotate(row["budget"], (x, y), xytext=(4, -11), textcoords="offset points", fontsize=7, color="0.4")
    axes.axhline(100 * dense["accuracy"], color="black", lw=1, ls=":")
    axes.plot([100], [100 * dense["accuracy"]], marker="*", ms=14, color="black", ls="none", label=DENSE)
    axes.set_xlabel("FLOPs of vision encoder and prompt, % of the dense model")
    axes.set_ylabel(f"right answers, % of {dense['examples']} questions")
    axes.set_title("What is left of the answers when visual tokens go")
    axes.set_xlim(left=0, right=104)
    axes.grid(alpha=0.25)
    axes.legend(loc="lower right", fontsize=8, frameon=False)
    beside = path.with_name(f"new-{path.name}")
    figure.savefig(beside)
    beside.replace(path)


def _best(lines: Mapping[str, Rows]) -> set[str]:
    """The lines that stand out: all of a few; of many the baselines and those with the best mean of right answers."""
    if len(lines) <= NAMED:
        return set(lines)
    means = {label: sum(row["accuracy"] for row in rows) / len(rows) for label, rows in lines.items()}
    others = sorted((label for label in lines if label not in BASELINES), key=lambda label: -means[label])
    return {*(label for label in lines if label in BASELINES), *others[: NAMED - 2]}


def _lines(rows: Rows, target: str) -> dict[str, list[Mapping[str, Any]]]:
    """The rows of each policy in one runtime, from few FLOPs to many; baselines last."""
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for row in sorted(rows[1:], key=lambda row: (row["policy"] in BASELINES, row["flops_ratio"])):
        if row["target"] == target:
            lines.setdefault(row["policy"], []).append(row)
    return lines


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%" if share == share else "-"
