"""What a verification found: one row a comparison, and how far two computations of the same number may lie apart."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from tvc.errors import VerificationError


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """Two results may differ by `relative` times the largest number of the tensor, or times 1 where that is larger."""

    relative: float
    because: str

    def allowed(self, values: torch.Tensor, doubt: float = 1.0) -> float:
        """For tensors of any scale: below 1 the numbers around them (norms, softmax) set the size of the rounding.

        `doubt`: how many times more rounding was found to move what merges in front of these values gave; what is
        beyond `DOUBT` times is not explained by it.
        """
        return self.relative * max(1.0, _largest(values)) * min(max(1.0, doubt), DOUBT)

    def allowed_score(self, score: torch.Tensor) -> float:
        """For scores, which may all be tiny: attention spreads 1 over every token."""
        return self.relative * _largest(score)


DOUBT = 10.0  # merges that rounding moves further than this many times cannot be verified

TOLERANCES: dict[torch.dtype, Tolerance] = {
    torch.float32: Tolerance(2e-5, "a few hundred roundings of 6e-8 each along the layers"),
    torch.float16: Tolerance(1e-2, "every layer rounds its residual at 5e-4, and so do both sides independently"),
    torch.bfloat16: Tolerance(6e-2, "every layer rounds its residual at 4e-3, and so do both sides independently"),
}


def _largest(values: torch.Tensor) -> float:
    return float(values.detach().abs().max()) if values.numel() else 0.0


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One number that was compared: `worst` is the largest difference found, `where` its place."""

    name: str  # which inputs: `batch 1`
    site: str  # the last cut before it; `start` where there is none
    output: str  # `selection`, `kept`, `plan`, `cache.3`, `key.3`, `value.3`, `logits.0` (prefill), `logits.1`, ...
    worst: float
    allowed: float
    where: str = ""

    @property
    def passed(self) -> bool:
        return self.worst <= self.allowed  # a NaN never passes

    def to_json(self) -> dict[str, Any]:
        worst = self.worst if math.isfinite(self.worst) else str(self.worst)
        return {
            "name": self.name,
            "site": self.site,
            "output": self.output,
            "worst": worst,
            "allowed": self.allowed,
            "passed": self.passed,
            "where": self.where,
        }


@dataclasses.dataclass(frozen=True)
class Report:
    """Every comparison of one verification, in the order in which a model computes, and what was not compared."""

    comparisons: tuple[Comparison, ...]
    left_out: tuple[str, ...] = ()  # what, and why

    @property
    def passed(self) -> bool:
        return all(row.passed for row in self.comparisons)

    @property
    def worst(self) -> Comparison:
        """The comparison closest to, or furthest beyond, what is allowed."""
        return max(self.comparisons, key=_severity)

    def first_failure(self) -> Comparison | None:
        return next((row for row in self.comparisons if not row.passed), None)

    def to_json(self) -> dict[str, Any]:
        rows = [row.to_json() for row in self.comparisons]
        return {"passed": self.passed, "comparisons": rows, "left_out": list(self.left_out)}

    def text(self) -> str:
        columns = ("", "inputs", "site", "output", "worst", "allowed", "where")
        rows = [
            ("ok" if r.passed else "DIFFERS", r.name, r.site, r.output, f"{r.worst:.3g}", f"{r.allowed:.3g}", r.where)
            for r in self.comparisons
        ]
        widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in (columns, *rows)
        ]
        return "\n".join([*lines, *(f"not compared: {what}" for what in self.left_out)])

    def raise_if_failed(self) -> None:
        """
        Raises:
            VerificationError: some comparison failed; the message names the first one.
        """
        failed = self.first_failure()
        if failed is None:
            return
        others = sum(not row.passed for row in self.comparisons) - 1
        raise VerificationError(
            f"{failed.output} differs from the untouched model with the dropped tokens masked",
            report=self,
            where=f"{failed.name}, site {failed.site}, {failed.output}" + (f", {failed.where}" if failed.where else ""),
            got=f"{failed.worst:.3g}" + (f" (and {others} more comparisons differ)" if others else ""),
            want=f"at most {failed.allowed:.3g}",
            fix="look at the first row that differs in the report; verify=False hands the model over all the same",
        )


def _severity(row: Comparison) -> float:
    if math.isnan(row.worst):
        return math.inf
    return row.worst / row.allowed if row.allowed else (math.inf if row.worst else 0.0)
