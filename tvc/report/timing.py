"""Times variants of one computation side by side, and says on what machine.

Variants run in turns (a, b, c, b, c, a, ...), so that a slow spell of a shared machine falls on all of them, and ratios
are medians of the ratios within a turn.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import os
import pathlib
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from tvc.errors import ArgumentError

_VERSIONS = ("tvc", "torch", "transformers", "onnxruntime", "onnxruntime-gpu", "triton")


@dataclasses.dataclass(frozen=True)
class Variant:
    """Something to time. `setup` makes the argument of each `call` and is not timed (a fresh cache, for example)."""

    call: Callable[[Any], object]
    setup: Callable[[], Any] = lambda: None


@dataclasses.dataclass(frozen=True)
class Timing:
    """Milliseconds of each turn, in the order of the turns."""

    times: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.times)

    def quantile(self, share: float) -> float:
        """Between the two nearest turns, linearly."""
        ordered = sorted(self.times)
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

    def over(self, other: Timing) -> float:
        """How many times as long this took as the other: the median over the turns."""
        return statistics.median(a / b for a, b in zip(self.times, other.times, strict=True))


def measure(
    variants: Mapping[str, Variant],
    repeats: int = 20,
    warmup: int = 3,
    *,
    synchronize: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Times the variants in turns.

    Args:
        variants: by name.
        repeats: turns that count.
        warmup: turns before them that do not.
        synchronize: waits for the device; called before the clock is read.
        clock: seconds.

    Raises:
        ArgumentError: nothing to repeat.
    """
    if repeats < 1 or not variants:
        raise ArgumentError(
            "there is nothing to measure",
            where="bench",
            got=f"{len(variants)} variants, {repeats} repeats",
            want="at least one of each",
            fix="give --repeats 20",
            slug="nothing-to-measure",
        )
    names = list(variants)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warmup + repeats):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            variant = variants[name]
            given = variant.setup()
            synchronize()
            start = clock()
            variant.call(given)
            synchronize()
            elapsed = 1000 * (clock() - start)
            if turn >= warmup:
                times[name].append(elapsed)
    return {name: Timing(tuple(values)) for name, values in times.items()}


def rows(timings: Mapping[str, Timing], **facts: Any) -> list[dict[str, Any]]:
    """One row per variant: milliseconds, and where they are measured, speed-up over `dense` and efficiency.

    Efficiency is the time of `ideal` (each layer at its native length) divided by the variant's.
    """
    made = []
    for name, timing in timings.items():
        row: dict[str, Any] = {**facts, "variant": name, "repeats": len(timing.times), "median_ms": timing.median}
        row |= {"p20_ms": timing.quantile(0.2), "p80_ms": timing.quantile(0.8)}
        row["speedup"] = timings["dense"].over(timing) if "dense" in timings else None
        row["efficiency"] = timings["ideal"].over(timing) if "ideal" in timings else None
        made.append(row)
    return made


def environment(folder: str | os.PathLike[str] = ".") -> dict[str, Any]:
    """Hardware, thread counts, versions, date, and the commit of the repository at `folder`."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpu": gpu,
        "system": platform.platform(),
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version for name in _VERSIONS if (version := _version(name))},
        "commit": _git(folder, "rev-parse", "HEAD"),
        "dirty": bool(_git(folder, "status", "--porcelain", "--untracked-files=no")),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _processor() -> str:
    listing = pathlib.Path("/proc/cpuinfo")
    if listing.exists():
        for line in listing.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(folder: str | os.PathLike[str], *arguments: str) -> str | None:
    """What git says, or None outside a repository and on machines without git."""
    try:
        done = subprocess.run(["git", "-C", os.fspath(folder), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def text(measured: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Rows as a plain table of the columns that some row fills."""
    shown = [name for name in columns if any(row.get(name) is not None for row in measured)]
    cells = [[name.removesuffix("_ms") + (" ms" if name.endswith("_ms") else "") for name in shown]]
    cells += [[_cell(row.get(name)) for name in shown] for row in measured]
    widths = [max(len(line[i]) for line in cells) for i in range(len(shown))]
    numeric = [any(isinstance(row.get(name), float) for row in measured) for name in shown]
    return "\n".join(
        "  ".join(c.rjust(w) if n else c.ljust(w) for c, w, n in zip(line, widths, numeric, strict=True)).rstrip()
        for line in cells
    )


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)
