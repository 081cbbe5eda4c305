"""tvc eval: what policies do to a model's answers."""

from __future__ import annotations

import json
import pathlib

import typer

_POLICY = typer.Option([], "--policy", "-p", help="A preset's name or a policy file; may be given several times.")
_TARGET = typer.Option(["torch"], "--target", "-t", help="torch or ort; several are compared reply by reply.")
_OUTPUT = typer.Option(..., "--output", "-o", help="Directory for replies and results; goes on where it stopped.")
_QUESTIONS = typer.Option(
    None, "--questions", help="JSON Lines of image, question, answer and kind; default: generated scenes."
)


def register(app: typer.Typer) -> None:
    app.command("eval")(eval_command)


def eval_command(
    model: str = typer.Argument(metavar="MODEL", help="A model directory or hub id, with its processor."),
    policies: list[str] = _POLICY,
    output: pathlib.Path = _OUTPUT,
    budgets: str = typer.Option(
        "50%,25%,11%,5%", "--budgets", help="Shares of the visual tokens, or as-written for policies as they are."
    ),
    average: bool = typer.Option(
        False, "--average", help="A budget is the mean over the decoder's layers, whatever a policy measures."
    ),
    targets: list[str] = _TARGET,
    questions: pathlib.Path | None = _QUESTIONS,
    examples: int | None = typer.Option(None, "--examples", min=1, help="How many questions; default: 500, or all."),
    seed: int = typer.Option(0, "--seed", min=0, help="Of the generated scenes."),
    seeds: int = typer.Option(3, "--seeds", min=1, help="How often a policy that draws at random is tried."),
    batch_size: int = typer.Option(25, "--batch-size", min=1, help="Questions asked at once."),
    new_tokens: int = typer.Option(8, "--max-new-tokens", min=1, help="The longest answer, in tokens."),
    match: str = typer.Option("exact", "--match", help="exact, or contains: the reply holds the answer's words."),
    device: str | None = typer.Option(None, "--device", help="cpu, cuda or cuda:N."),
    dtype: str | None = typer.Option(
        None, "--dtype", help="float32, float16 or bfloat16; default: float32 on a CPU, else the weights' own."
    ),
    no_verify: bool = typer.Option(False, "--no-verify", help="Do not compare compiled models with the untouched one."),
    as_json: bool = typer.Option(False, "--json", help="Write JSON for machines."),
) -> None:
    """Ask dense and compiled models the same questions, beside random and uniform selection, and compare."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table

    from tvc.evaluation.pages import table
    from tvc.evaluation.study import Options, evaluate
    from tvc.evaluation.tasks import FileTask, SceneTask

    if match not in ("exact", "contains"):
        raise _no_match(match)
    options = Options(
        budgets=tuple(part.strip() for part in budgets.split(",") if part.strip()),
        targets=tuple(dict.fromkeys(targets)),
        seeds=seeds,
        average=average,
        batch_size=batch_size,
        new_tokens=new_tokens,
        match="exact" if match == "exact" else "contains",
        verify=not no_verify,
        device=device,
        dtype=dtype,
    )
    task = SceneTask(examples or 500, seed) if questions is None else FileTask(questions, examples)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f}%"), TimeElapsedColumn())
    errors = Console(stderr=True)
    with Progress(*columns, console=errors, disable=not errors.is_terminal) as progress:
        bar = progress.add_task("loading", total=None)
        result = evaluate(
            model,
            policies,
            task,
            output,
            options,
            lambda what, done, total: progress.update(bar, description=what, completed=done, total=total),
        )
    if as_json:
        typer.echo(json.dumps(result, indent=2))
        return
    head, *lines = table(result)
    shown = Table(box=None, pad_edge=False)
    for place, name in enumerate(head):
        shown.add_column(name, justify="left" if place < 2 else "right", no_wrap=True)
    for line in lines:
        shown.add_row(*line)
    # Long lines rather than columns that are cut.
    Console(width=max(Console().width, 160)).print(shown)
    for entry in result["refused"]:
        typer.echo(f"not run: {entry['policy']} at {entry['budget']}: {entry['reason']}")
    typer.echo(f"{output / 'results.md'}, {output / 'results.json'}, {output / 'accuracy.png'}")


def _no_match(got: str) -> Exception:
    from tvc.errors import ArgumentError

    return ArgumentError(
        "replies are not compared that way",
        where="--match",
        got=got,
        want="exact or contains",
        fix="leave it out for exact",
        slug="unknown-match",
    )
