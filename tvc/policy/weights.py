"""The weights that a policy names, against the model: every name and every shape, before anything is traced."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from tvc.errors import WeightsError
from tvc.kernels.op import Primitive
from tvc.kernels.weights import Shape, Trained, Weights
from tvc.policy.schema import Policy, SiteName, Step, parse_sites
from tvc.program import Layout

_FLOATS = ("F64", "F32", "F16", "BF16")


def settled(policy: Policy, number: int, site: SiteName, primitive: Primitive) -> dict[str, Any]:
    """What a model decides of a trained primitive: where its file is, and which of the names in there are its own."""
    if not isinstance(primitive, Trained):
        return {}
    ranged = parse_sites(policy.steps[number].at) is not None
    own = ".".join(part for part in (primitive.prefix, str(site) if ranged else "") if part)
    return {"weights": Weights(os.fspath(primitive.weights.path)), "prefix": own}


def trained(steps: tuple[Step, ...]) -> Iterator[tuple[Step, Trained]]:
    """Every primitive with weights, and its step."""
    for step in steps:
        for primitive in step.primitives():
            if isinstance(primitive, Trained):
                yield step, primitive


def check_weights(steps: tuple[Step, ...], layout: Layout) -> None:
    """Compares the files that resolved steps name with what their primitives take in this model.

    Raises:
        WeightsError: there is no such file, or it lacks a tensor, holds one that nothing takes, or one of another shape
            or type; the message names the tensors.
    """
    known: set[tuple[str, str]] = set()  # (file, name) that some step takes
    users = list(trained(steps))
    for step, primitive in users:
        header, front = primitive.weights.header(), f"{primitive.prefix}." if primitive.prefix else ""
        wanted = {f"{front}{name}": shape for name, shape in primitive.shapes(_width(step, layout)).items()}
        missing = [name for name in wanted if name not in header]
        if missing:
            raise _refused(
                step,
                primitive,
                f"the weights of `{primitive.key}` at {step.at} are not complete",
                f"no {', '.join(missing)}; there are {', '.join(header) or 'no tensors'}",
                ", ".join(f"{name} {_written(shape)}" for name, shape in wanted.items()),
                "save every tensor under its name, or name the right file",
                "missing-weight",
            )
        _shapes(step, primitive, header, wanted)
        known |= {(primitive.weights.name, name) for name in wanted}
    for step, primitive in users:
        extra = [name for name in primitive.weights.header() if (primitive.weights.name, name) not in known]
        if extra:
            raise _refused(
                step,
                primitive,
                f"the weights of `{primitive.key}` at {step.at} hold tensors that no step takes",
                ", ".join(extra),
                ", ".join(name for file, name in sorted(known) if file == primitive.weights.name),
                "leave these tensors out of the file, or give the step the settings that they belong to",
                "extra-weight",
            )


def _shapes(
    step: Step,
    primitive: Trained,
    header: Mapping[str, tuple[str, tuple[int, ...]]],
    wanted: Mapping[str, Shape],
) -> None:
    sizes: dict[str, tuple[int, str]] = {}  # a size that the file decides, and the tensor that said it first
    for name, shape in wanted.items():
        kind, found = header[name]
        fits = len(found) == len(shape) and kind in _FLOATS
        for size, axis in zip(found, shape, strict=False):
            fits &= sizes.setdefault(axis, (size, name))[0] == size if isinstance(axis, str) else axis == size
        if fits and 0 not in found:
            continue
        told = {f"{axis} = {size} by {by}" for axis, (size, by) in sizes.items() if axis in shape and by != name}
        raise _refused(
            step,
            primitive,
            f"a weight of `{primitive.key}` at {step.at} has another shape or type than this model needs",
            f"{name} {_written(found)} {kind}",
            f"{name} {_written(shape)}{' with ' if told else ''}{', '.join(sorted(told))}, one of {', '.join(_FLOATS)}",
            "train them for this model and site, or name the right file",
            "weight-shape",
        )


def _width(step: Step, layout: Layout) -> int | str:
    """How wide visual tokens are at the step's site."""
    return layout.vision_width or "width" if step.at.startswith("vision.") else layout.hidden_size


def _written(shape: Shape) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _refused(step: Step, primitive: Trained, summary: str, got: str, want: str, fix: str, slug: str) -> WeightsError:
    where = f"{step.where}: {primitive.weights}"
    return WeightsError(summary, where=where, got=got, want=want, fix=fix, slug=slug)
