"""Where a model runs and in which type: names that a user writes, checked before anything is loaded."""

from __future__ import annotations

import torch

from tvc.errors import ArgumentError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def device_of(name: torch.device | str | None) -> torch.device | None:
    """The device of that name.

    Raises:
        ArgumentError: there is none on this machine.
    """
    if name is None:
        return None
    try:
        device = torch.device(name)
    except RuntimeError as problem:
        raise _no_device(str(name), str(problem).splitlines()[0]) from problem
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise _no_device(str(name), f"{torch.cuda.device_count()} CUDA devices")
    return device


def dtype_of(name: torch.dtype | str | None) -> torch.dtype | None:
    """The floating-point type of that name.

    Raises:
        ArgumentError: no model is compiled in it.
    """
    if name is None:
        return None
    found = DTYPES.get(str(name).removeprefix("torch."))
    if found is None:
        raise ArgumentError(
            "no model is compiled in this type",
            where="dtype",
            got=name,
            want=f"one of {', '.join(DTYPES)}",
            fix="leave it out to keep the type of the weights",
            slug="unknown-dtype",
        )
    return found


def _no_device(name: str, got: str) -> ArgumentError:
    return ArgumentError(
        "this machine has no such device",
        where="device",
        got=f"{name}: {got}",
        want="cpu, cuda or cuda:N",
        fix="leave it out to run on the CPU",
        slug="unknown-device",
    )
