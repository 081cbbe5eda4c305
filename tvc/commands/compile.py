"""tvc compile: a model with a policy compiled into it, written as an artifact directory."""

from __future__ import annotations

import json
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import typer

from tvc.commands.plan import BUDGET

_POLICY = typer.Option(..., "--policy", "-p", help="A preset's name or a policy file.")
_OUTPUT = typer.Option(..., "--output", "-o", help="The artifact directory to write.")
_SET = typer.Option([], "--set", metavar="KEY=VALUE", help="Replace a value: keep=25% or steps.0.select.top.keep=25%.")
_IMAGE = typer.Option(None, "--image", help="A photo to trace, plan and verify with; default: made-up pictures.")


def register(app: typer.Typer) -> None:
    app.command("compile")(compile_command)


def compile_command(
    model: str = typer.Argument(metavar="MODEL", help="A model directory or hub id."),
    policy: str = _POLICY,
    output: pathlib.Path = _OUTPUT,
    target: str = typer.Option("torch", "--target", "-t", help="torch, ort, pt2 or torchscript."),
    settings: list[str] = _SET,
    budget: str | None = typer.Option(None, "--budget", metavar="SHARE", help=BUDGET),
    image: pathlib.Path | None = _IMAGE,
    prompt: str | None = typer.Option(None, "--prompt", help="The question that goes with the photo."),
    device: str | None = typer.Option(None, "--device", help="Where to load the model: cpu, cuda or cuda:N."),
    dtype: str | None = typer.Option(None, "--dtype", help="float32, float16 or bfloat16; default: the weights' own."),
    no_verify: bool = typer.Option(False, "--no-verify", help="Do not compare with the untouched model."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Show the plan and the resolved policy; write nothing."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace an artifact that is there already."),
    as_json: bool = typer.Option(False, "--json", help="Write JSON for machines."),
) -> None:
    """Compile a model with a policy, compare it with the untouched model, and write it as a directory."""
    from tvc import placement
    from tvc.export import base, manifest
    from tvc.policy import load_policy

    base.target(target)
    loaded = load_policy(policy, set=settings)
    placement.device_of(device), placement.dtype_of(dtype)
    inputs, processor = _sample(model, image, prompt)
    if dry_run:
        _show_plan(model, loaded, budget, inputs, as_json)
        return
    manifest.check_place(output.absolute(), overwrite)

    import tvc

    steps = Steps()
    compiled = tvc.compile(
        model,
        loaded,
        target,
        inputs=inputs,
        budget=budget,
        verify=not no_verify,
        device=device,
        dtype=dtype,
        processor=processor,
        progress=steps,
    )
    steps(f"write {output}")
    _save(compiled, output, overwrite)
    steps.finish()
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    if as_json:
        content = {
            "output": str(output),
            "target": target,
            "policy": compiled.policy.policy.document.data,
            "plan": compiled.plan.to_json(),
            "verification": compiled.verification,
            "bytes": size,
            "seconds": steps.seconds,
        }
        typer.echo(json.dumps(content, indent=2))
        return
    typer.echo(compiled.plan.text())
    typer.echo("")
    typer.echo(worst(compiled.verification))
    typer.echo(f"wrote {output}: {target}, {size / 2**20:.1f} MiB; open {output / 'report.html'}")


class Steps:
    """Progress on stderr: a numbered line as each step begins, with the seconds since the first."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}  # how long each step took
        self._begun = self._started = time.perf_counter()
        self._name = ""

    def __call__(self, name: str) -> None:
        now = time.perf_counter()
        if self._name:
            self.seconds[self._name] = round(now - self._started, 3)
        self._started, self._name = now, "" if name == "done" else name
        if self._name:
            typer.echo(f"{len(self.seconds) + 1:2} {name} [{now - self._begun:.1f} s]", err=True)

    def finish(self) -> None:
        self("done")
        typer.echo(f"   done [{time.perf_counter() - self._begun:.1f} s]", err=True)


def worst(verification: Mapping[str, Any] | None) -> str:
    """One line on the comparison with the untouched model."""
    if verification is None:
        return "not verified"
    rows = [row for row in verification["comparisons"] if isinstance(row["worst"], float)]
    if not rows:
        return "verified"
    row = max(rows, key=lambda candidate: candidate["worst"])
    place = ", ".join(text for text in (row["name"], row["site"], row["output"]) if text)
    told = f"verified: {len(rows)} comparisons, worst difference {row['worst']:.2e} ({place})"
    return "\n".join([told, *(f"not compared: {what}" for what in verification.get("left_out", ()))])


def _sample(model: str, image: pathlib.Path | None, prompt: str | None) -> tuple[dict[str, Any] | None, Any]:
    """Processor outputs for the photo and the prompt, and the processor that made them; (None, None) without either."""
    from tvc.errors import ArgumentError

    if image is None and prompt is None:
        return None, None
    if image is None:
        raise ArgumentError(
            "a prompt without an image is nothing to trace with",
            where="--prompt",
            got=f"{prompt!r} and no --image",
            want="both, or neither",
            fix="add --image photo.jpg",
            slug="no-image",
        )

    from tvc.commands.show import open_photo
    from tvc.runtime.prompts import prepared
    from tvc.trace.layout import meta_model
    from tvc.trace.processor import load_processor

    photo = open_photo(image)
    meta_model(model)  # a directory that holds no model is told apart from one that holds no processor
    processor = load_processor(model)
    return prepared(processor, photo, prompt or "describe the picture"), processor


def _show_plan(model: str, loaded: Any, budget: str | None, inputs: dict[str, Any] | None, as_json: bool) -> None:
    from tvc.api import at_budget, layout_of
    from tvc.policy import resolve
    from tvc.report.cost import one_image
    from tvc.report.schedule import plan_policy

    layout = one_image(layout_of(model, inputs=inputs))
    loaded = at_budget(loaded, layout, budget)
    resolved = resolve(loaded, layout)
    made = plan_policy(loaded, layout)
    if as_json:
        typer.echo(json.dumps({"policy": resolved.policy.document.data, "plan": made.to_json()}, indent=2))
        return
    typer.echo(made.text())
    typer.echo("")
    typer.echo(resolved.to_yaml(), nl=False)


def _save(compiled: Any, output: pathlib.Path, overwrite: bool) -> None:
    from tvc.errors import ArgumentError

    try:
        compiled.save_pretrained(output, overwrite=overwrite)
    except OSError as problem:
        raise ArgumentError(
            "the artifact cannot be written",
            where="--output",
            got=f"{problem.filename or output}: {problem.strerror or problem}",
            want="a directory that can be created, on a disk with room",
            fix="choose another directory",
            slug="cannot-write",
        ) from problem
