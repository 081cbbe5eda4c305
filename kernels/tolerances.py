"""How far a float may lie from an oracle that computes in double precision, by the dtype the op returns.

Indices and masks have no tolerance: they are equal.
"""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """|got - want| <= atol + rtol * |want|."""

    rtol: float
    atol: float
    because: str


TOLERANCES: dict[torch.dtype, Tolerance] = {
    torch.float32: Tolerance(1e-5, 1e-6, "sums of up to a thousand terms, each rounded at 6e-8"),
    torch.float16: Tolerance(2e-3, 1e-3, "one rounding of the result at 5e-4 and one of an intermediate value"),
    torch.bfloat16: Tolerance(1.6e-2, 8e-3, "one rounding of the result at 4e-3 and one of an intermediate value"),
}

EXCEPTIONS: dict[tuple[str, torch.dtype], Tolerance] = {
    ("attention", torch.float16): Tolerance(4e-3, 4e-3, "logits up to 8 are rounded at 4e-3 before exp"),
    ("attention", torch.bfloat16): Tolerance(3.2e-2, 3.2e-2, "logits up to 8 are rounded at 3e-2 before exp"),
}
EXCEPTIONS |= {
    (name, dtype): bar for (_, dtype), bar in EXCEPTIONS.items() for name in ("attend", "unrotated_attention")
}


def tolerance(name: str, dtype: torch.dtype) -> Tolerance:
    """The bar for one op's float results."""
    return EXCEPTIONS.get((name, dtype), TOLERANCES[dtype])
