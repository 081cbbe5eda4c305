"""tvc verify: an artifact beside the untouched model, whose dropped tokens are masked."""

from __future__ import annotations

import json
import pathlib

import typer

_ARTIFACT = typer.Argument(metavar="OUT", help="A directory that tvc compile wrote.")
_MODEL = typer.Option(..., "--model", help="The untouched model: hub id or directory.")
_IMAGE = typer.Option(None, "--image", help="A photo; default: a picture made for the purpose.")
_TOLERANCE = typer.Option(None, "--tolerance", help="Difference allowed, relative to the largest number.")


def register(app: typer.Typer) -> None:
    app.command("verify")(verify)


def verify(
    artifact: pathlib.Path = _ARTIFACT,
    model: str = _MODEL,
    image: pathlib.Path | None = _IMAGE,
    prompt: str = typer.Option("describe the picture", "--prompt", help="The question."),
    steps: int = typer.Option(8, "--steps", min=1, help="Tokens to generate."),
    tolerance: float | None = _TOLERANCE,
    as_json: bool = typer.Option(False, "--json", help="Write JSON for machines."),
) -> None:
    """Check that dropping equals masking, for the prefill and for every decode step; exit code 3 where it does not."""
    import tvc
    from tvc.commands.show import open_photo
    from tvc.errors import ArgumentError, VerificationError
    from tvc.runtime.prompts import prepared

    compiled, inputs = tvc.load(str(artifact)), None
    if image is not None:
        if compiled.processor is None:
            raise ArgumentError(
                "a photo needs a processor, and the artifact has none",
                where="--image",
                got=str(artifact),
                want="an artifact with the model's processor",
                fix="leave --image out",
                slug="no-processor",
            )
        inputs = prepared(compiled.processor, open_photo(image), prompt)
    try:
        report = tvc.verify(compiled, model, inputs, steps=steps, tolerance=tolerance)
    except VerificationError as differs:
        typer.echo(_shown(differs.report, as_json))
        raise
    typer.echo(_shown(report, as_json))


def _shown(report: object, as_json: bool) -> str:
    return json.dumps(report.to_json(), indent=1) if as_json else str(report.text())  # type: ignore[attr-defined]
