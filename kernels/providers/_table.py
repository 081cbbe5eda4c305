"""Block sizes and warps by kernel and size class, read from `table.json`; `benchmarks/kernels.py --tune` rewrites it.

A kernel has a list of classes: the first whose `up_to` is not below the size counts (null: any size). Nothing is
searched at run time.
"""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

PATH = pathlib.Path(__file__).with_name("table.json")


@functools.cache
def table() -> dict[str, list[dict[str, Any]]]:
    """Kernel -> its size classes, in ascending order."""
    kernels: dict[str, list[dict[str, Any]]] = json.loads(PATH.read_text(encoding="utf-8"))["kernels"]
    return kernels


@functools.cache
def setting(kernel: str, size: int) -> Mapping[str, int]:
    """The numbers that `kernel` is launched with at this size, by name."""
    for entry in table()[kernel]:
        if entry["up_to"] is None or size <= entry["up_to"]:
            return {name: value for name, value in entry.items() if name != "up_to"}
    raise KeyError(f"{PATH.name} has no class of {kernel} for size {size}")
