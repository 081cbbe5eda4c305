"""The command line. Each subcommand is one module of `tvc.commands` with a function `register(app)`.

Nothing here imports torch: a command imports what it needs when it runs, so that `--help` answers at once.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import typer
from typer.core import TyperGroup

from tvc.errors import TvcError

# In the order of `tvc --help`: make, use, look, measure.
COMMANDS = ("compile", "run", "inspect", "plan", "policies", "show", "verify", "bench", "eval", "tune")


class _Group(TyperGroup):
    """Turns an error of the library into its five lines on stderr and its exit code; a bug keeps its trace."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except TvcError as error:
            typer.echo(error.render(), err=True)
            raise typer.Exit(error.exit_code) from None


def build_app() -> typer.Typer:
    """The application with every subcommand whose module exists."""
    app = typer.Typer(
        name="tvc",
        cls=_Group,
        help="Compile a vision-language model so that it runs on fewer visual tokens.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.callback()(_root)
    for name in COMMANDS:
        module = f"tvc.commands.{name}"
        if importlib.util.find_spec(module) is not None:
            importlib.import_module(module).register(app)
    return app


def _version(wanted: bool) -> None:
    if wanted:
        from importlib import metadata

        typer.echo(f"tvc {metadata.version('tvc')}")
        raise typer.Exit


def _root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Show the version and exit."
    ),
) -> None:
    """Compile a vision-language model so that it runs on fewer visual tokens."""


def main() -> None:
    build_app()()
