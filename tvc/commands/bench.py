"""tvc bench: prefill and decode of artifacts beside each other, and beside the untouched model."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import typer

COLUMNS = ("phase", "variant", "median_ms", "p20_ms", "p80_ms", "speedup", "efficiency")
_ARTIFACTS = typer.Argument(metavar="OUT...", help="Directories that tvc compile wrote.")
_IMAGE = typer.Option(..., "--image", help="The photo.")
_OUTPUT = typer.Option(None, "--output", "-o", help="Also write the rows as JSON to this file.")


def register(app: typer.Typer) -> None:
    app.command("bench")(bench)


def bench(
    artifacts: list[str] = _ARTIFACTS,
    image: pathlib.Path = _IMAGE,
    prompt: str = typer.Option("describe the picture", "--prompt", help="The question."),
    model: str | None = typer.Option(None, "--model", help="The untouched model, measured as `dense`."),
    repeats: int = typer.Option(20, "--repeats", min=1, help="Turns that are measured."),
    output: pathlib.Path | None = _OUTPUT,
    as_json: bool = typer.Option(False, "--json", help="Write JSON for machines."),
) -> None:
    """Time prefill and one decode step; all variants take turns, and spread is shown as 20 and 80 percent quantiles."""
    import tvc
    from tvc.commands.show import open_photo
    from tvc.report.phases import PHASES, phases
    from tvc.report.timing import environment, measure, rows, text
    from tvc.runtime.prompts import prepared

    photo = open_photo(image)
    variants: dict[str, Any] = {}
    for path in artifacts:
        compiled = tvc.load(path)
        inputs = prepared(compiled.processor, photo, prompt)
        variants[_label(path, variants)] = phases(compiled, inputs)
    if model is not None:
        from tvc.trace.load import load

        untouched: Any = load(model).model
        variants["dense"] = phases(untouched, inputs, logits_to_keep=1)
    measured: list[dict[str, Any]] = []
    for phase in PHASES:
        timings = measure({name: both[phase] for name, both in variants.items()}, repeats)
        measured += rows(timings, phase=phase)
    content = {"environment": environment(), "prompt_tokens": inputs["input_ids"].shape[1], "rows": measured}
    if output is not None:
        output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    typer.echo(json.dumps(content, indent=1) if as_json else text(measured, COLUMNS))


def _label(path: str, taken: dict[str, Any]) -> str:
    """The directory's name, or its whole path where two directories share a name."""
    name = pathlib.Path(path).resolve().name
    return path if name in taken or name == "dense" else name
