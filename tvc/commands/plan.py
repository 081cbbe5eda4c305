"""tvc plan: tokens per layer, FLOPs and cache of a policy on a model, from its configuration alone."""

from __future__ import annotations

import json

import typer

_SET = typer.Option([], "--set", metavar="KEY=VALUE", help="Replace a value: keep=25% or steps.0.select.top.keep=25%.")

BUDGET = "A share of the visual tokens: as published for it, else with all budgets scaled to it."
FRAMES = "Plan a video of N frames, as many as the decoder sees, in the place of an image."


def register(app: typer.Typer) -> None:
    app.command("plan")(plan)


def plan(
    model: str = typer.Argument(metavar="MODEL", help="A model directory or hub id; its weights are not read."),
    policy: str = typer.Option(..., "--policy", "-p", help="A preset's name or a policy file."),
    budget: str | None = typer.Option(None, "--budget", metavar="SHARE", help=BUDGET),
    average_tokens: float | None = typer.Option(
        None, "--average-tokens", min=0, help="Scale the budgets so that the layers hold N visual tokens on average."
    ),
    text_tokens: int = typer.Option(64, "--text-tokens", min=1, help="Text tokens of the prompt."),
    image_size: str | None = typer.Option(None, "--image-size", metavar="HxW", help="Size of the sample image."),
    frames: int | None = typer.Option(None, "--frames", min=1, metavar="N", help=FRAMES),
    settings: list[str] = _SET,
    as_json: bool = typer.Option(False, "--json", help="Write JSON for machines."),
) -> None:
    """Show what a policy leaves in each layer, and what that costs. Needs no weights."""
    from tvc import api
    from tvc.policy import load_policy

    size = _size(image_size) if image_size is not None else None
    made = api.plan(
        model,
        load_policy(policy, set=settings),
        text_tokens=text_tokens,
        budget=budget,
        average_tokens=average_tokens,
        image_size=size,
        frames=frames,
    )
    typer.echo(json.dumps(made.to_json(), indent=2) if as_json else made.text())


def _size(text: str) -> tuple[int, int]:
    """(height, width) of `480x640`."""
    height, cross, width = text.lower().partition("x")
    if cross and height.isdigit() and width.isdigit() and int(height) and int(width):
        return int(height), int(width)

    from tvc.errors import ArgumentError

    raise ArgumentError(
        "an image size is not two whole numbers",
        where="--image-size",
        got=text,
        want="height and width in pixels, joined by x",
        fix="write --image-size 480x640",
        slug="bad-image-size",
    )
