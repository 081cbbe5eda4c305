"""Writes what is known of a compile as `report.json` and as one page, `report.html`, that needs nothing else."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from PIL import Image

from tvc.report.plan import COSTS, Cost, Plan, scale_of

Rows = Sequence[Mapping[str, Any]]


def write_report(
    folder: str | os.PathLike[str],
    plan: Plan,
    *,
    verification: Mapping[str, Any] | None = None,
    fusions: Mapping[str, int] | None = None,
    timings: Mapping[str, float] | None = None,
    benchmark: Rows = (),
    overlay: Image.Image | None = None,
    facts: Mapping[str, Any] | None = None,
) -> tuple[pathlib.Path, pathlib.Path]:
    """Writes report.json and report.html into `folder`, which exists.

    Args:
        folder: where to.
        plan: tokens and costs.
        verification: JSON values; a `comparisons` list of equally keyed rows becomes a table, `passed` the headline.
        fusions: how often each fusion or lowering matched; one that matched nothing is shown as 0.
        timings: seconds of each step of the compile.
        benchmark: measured rows, equally keyed.
        overlay: the photo with kept patches.
        facts: anything short for the head of the page: target, versions, source model.

    Returns:
        The two paths.
    """
    target = pathlib.Path(folder)
    content = {
        "facts": dict(facts or {}),
        "plan": plan.to_json(),
        "verification": None if verification is None else dict(verification),
        "fusions": dict(fusions or {}),
        "timings": dict(timings or {}),
        "benchmark": [dict(row) for row in benchmark],
    }
    data, page = target / "report.json", target / "report.html"
    data.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    page.write_text(render(plan, content, overlay), encoding="utf-8")
    return data, page


def render(plan: Plan, content: Mapping[str, Any], overlay: Image.Image | None = None) -> str:
    """The page as text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["figure"] = _figure
    return environment.get_template("report.html.jinja").render(
        **{**content, "plan": plan},
        bars=_bars(plan),
        costs=_costs(plan.dense, plan.compiled, plan.fired),
        picture=_data_url(overlay) if overlay is not None else None,
        comparisons=(content["verification"] or {}).get("comparisons", []),
        left_out=(content["verification"] or {}).get("left_out", []),
    )


def _figure(value: Any) -> str:
    """A cell of a table: numbers short, everything else as it is."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e5 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _costs(dense: Cost, compiled: Cost, fired: Plan | None) -> list[dict[str, Any]]:
    ratios, rows = compiled.ratio(dense), []
    for field, label, base in COSTS:
        scale, unit = scale_of(getattr(dense, field), base)
        row = {"label": label, "unit": unit, "ratio": ratios[field]}
        row |= {"dense": getattr(dense, field) / scale, "compiled": getattr(compiled, field) / scale}
        rows.append(row | {"least": fired.ratio[field] if fired else None})
    return rows


@dataclasses.dataclass(frozen=True)
class Bar:
    """One decoder layer in the chart, in units of the drawing."""

    index: int
    x: float
    width: float
    visual: float  # heights
    text: float
    label: str
    cut: bool
    ticked: bool


def _bars(plan: Plan, width: float = 800.0, height: float = 200.0) -> list[Bar]:
    """Tokens per decoder layer, as high as the untouched model's are at most."""
    most = max(1, sum(plan.visual_tokens) + plan.text_tokens)
    step, every = width / len(plan.layers), max(1, -(-len(plan.layers) // 16))
    return [
        Bar(
            index=layer.index,
            x=layer.index * step,
            width=step * 0.84,
            visual=height * layer.visual / most,
            text=height * layer.text / most,
            label=f"layer {layer.index}: {layer.visual} visual + {layer.text} text tokens",
            cut=bool(layer.sites),
            ticked=layer.index % every == 0,
        )
        for layer in plan.layers
    ]


def _data_url(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
