"""tvc policies: what ships, what a policy says, whether a file is right, and the schema for editors."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import typer

from tvc.commands.plan import FRAMES

if TYPE_CHECKING:
    from tvc.policy import Policy
    from tvc.program import Layout

_SET = typer.Option([], "--set", metavar="KEY=VALUE", help="Replace a value: keep=25% or steps.0.select.top.keep=25%.")
_JSON = typer.Option(False, "--json", help="Write JSON for machines.")


def register(app: typer.Typer) -> None:
    group = typer.Typer(help="List, show and check policies.", no_args_is_help=True)
    group.command("list")(list_presets)
    group.command("show")(show)
    group.command("check")(check)
    group.command("schema")(schema)
    app.add_typer(group, name="policies")


def _dump(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def list_presets(
    model: str | None = typer.Option(None, "--model", help="Which of them act on this model as they are, and why not."),
    frames: int | None = typer.Option(None, "--frames", min=1, metavar="N", help=f"With --model: {FRAMES}"),
    as_json: bool = _JSON,
    as_markdown: bool = typer.Option(False, "--markdown", help="Write a table for a document."),
) -> None:
    """List the policies that ship with tvc."""
    from rich.console import Console
    from rich.table import Table

    from tvc.policy import load_policy, presets
    from tvc.policy.words import preset_table

    policies = [load_policy(name) for name in presets()]
    if model is not None:
        if as_markdown:
            raise typer.BadParameter("the table of a document is about no model", param_hint="--markdown")
        _list_for(policies, model, frames, as_json)
        return
    _refuse_frames(frames)
    if as_json:
        _dump([{"name": p.name, "about": p.about, "parameters": dict(p.parameters)} for p in policies])
        return
    if as_markdown:
        typer.echo(preset_table(policies))
        return
    table = Table("name", "parameters", "about", box=None, pad_edge=False)
    for policy in policies:
        table.add_row(policy.name, " ".join(f"{k}={v}" for k, v in policy.parameters.items()), policy.about)
    Console().print(table)


def _list_for(policies: list[Policy], model: str, frames: int | None, as_json: bool) -> None:
    """Each policy's visual tokens on the model, or the refusal."""
    from rich.console import Console
    from rich.table import Table

    from tvc.report.fit import fits

    found = fits(policies, _layout(model, frames))
    if as_json:
        _dump([dataclasses.asdict(one) for one in found])
        return
    table = Table("name", "visual tokens in a layer, or why not", box=None, pad_edge=False)
    for one in found:
        table.add_row(one.name, one.text())
    Console().print(table)
    acting = sum(one.refusal is None for one in found)
    typer.echo(f"{acting} of {len(found)} act on this model as they are; what only a trace tells, tvc compile says.")


def _layout(model: str, frames: int | None) -> Layout:
    """The model's, of one image, or of a video of so many frames."""
    from tvc import api

    layout = api.one_image(api.layout_of(model))
    return layout if frames is None else api.shown(layout, frames)


def _refuse_frames(frames: int | None) -> None:
    if frames is not None:
        raise typer.BadParameter("frames are planned on a model: give --model too", param_hint="--frames")


def show(
    policy: str = typer.Argument(metavar="NAME", help="A preset's name or a file."),
    model: str | None = typer.Option(None, "--model", help="Also its sites and its plan on this model (no weights)."),
    frames: int | None = typer.Option(None, "--frames", min=1, metavar="N", help=f"With --model: {FRAMES}"),
    settings: list[str] = _SET,
    as_json: bool = _JSON,
) -> None:
    """Print a policy in words and as YAML, with what it extends written out; the whole is a policy file."""
    from tvc.policy import load_policy
    from tvc.policy.words import in_words

    loaded = load_policy(policy, set=settings)
    if model is None:
        _refuse_frames(frames)
        if as_json:
            _dump(loaded.document.data)
        else:
            typer.echo(_commented(in_words(loaded)) + loaded.to_yaml(), nl=False)
        return
    from tvc.report.budget import ladder
    from tvc.report.schedule import plan_policy

    if not as_json:
        typer.echo(_commented(in_words(loaded)), nl=False)  # also where the model cannot do what they say
    layout = _layout(model, frames)
    plan, rungs = plan_policy(loaded, layout, new_tokens=64), list(ladder(loaded, layout))
    if as_json:
        budgets = {rung.share: dataclasses.asdict(rung) for rung in rungs}
        _dump({"policy": loaded.document.data, "plan": plan.to_json(), "budgets": budgets})
        return
    left = "visual tokens in a layer on average" if loaded.measure == "average" else "visual tokens behind the last cut"
    head = f"budget, {left}, KV cache against dense, settings:"
    lines = ["", f"On {model}:", *plan.text().splitlines(), "", head, *(rung.text() for rung in rungs)]
    typer.echo(_commented(lines) + loaded.to_yaml(), nl=False)


def _commented(lines: list[str]) -> str:
    return "".join(f"# {line}".rstrip() + "\n" for line in lines)


def check(
    policy: str = typer.Argument(metavar="FILE", help="A file or a preset's name."),
    settings: list[str] = _SET,
    as_json: bool = _JSON,
) -> None:
    """Check a policy without a model; exit code 2 and five lines where it is wrong."""
    from tvc.errors import TvcError
    from tvc.policy import load_policy

    try:
        loaded = load_policy(policy, set=settings)
    except TvcError as error:
        if not as_json:
            raise
        lines = {"summary": error.summary, "where": error.where, "got": error.got, "want": error.want, "fix": error.fix}
        _dump({"ok": False, "code": error.code, "slug": error.slug, **lines})
        raise typer.Exit(error.exit_code) from None
    if as_json:
        facts = {"name": loaded.name, "steps": [s.at for s in loaded.steps], "parameters": dict(loaded.parameters)}
        _dump({"ok": True, **facts, "digest": loaded.digest()})
        return
    parameters = ", ".join(f"{k}={v}" for k, v in loaded.parameters.items()) or "no parameters"
    steps = f"{len(loaded.steps)} step(s) at {', '.join(s.at for s in loaded.steps)}" if loaded.steps else "no step"
    typer.echo(f"ok {loaded.name}: {steps}; {parameters}")


def schema() -> None:
    """Print the JSON Schema of the policy language."""
    from tvc.policy import json_schema

    _dump(json_schema())
