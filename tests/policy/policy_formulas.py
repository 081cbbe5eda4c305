"""What the formulas of several papers share, on plain Python numbers."""

from __future__ import annotations

import math

Row = list[float]
Rows = list[Row]
Left = dict[int, Row]  # what is left: the token that it stands at, and what it is


def dot(a: Row, b: Row) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def length(a: Row) -> float:
    return math.sqrt(dot(a, a))


def cosine(a: Row, b: Row) -> float:
    both = length(a) * length(b)
    return dot(a, b) / both if both else 0.0


def softmax(values: Row) -> Row:
    powers = [math.exp(value - max(values)) for value in values]
    return [power / sum(powers) for power in powers]


def total(rows: Rows, weights: Row | None = None) -> Row:
    weights = [1.0] * len(rows) if weights is None else weights
    return [dot(list(column), weights) for column in zip(*rows, strict=True)]


def mean(rows: Rows) -> Row:
    return [value / len(rows) for value in total(rows)]


def best(values: Row, number: int, among: list[int] | None = None) -> list[int]:
    """The `number` highest, best first, the lower index first among equals."""
    return sorted(range(len(values)) if among is None else among, key=lambda v: (-values[v], v))[:number]


def first(values: dict[int, float], unit: float = 0.0) -> int:
    """The first one whose value is the highest, but for what rounding makes of it."""
    high = max(values.values())
    return min(v for v, value in values.items() if value >= high - 1e-6 * max(abs(high), unit))


def spaced(number: int, keep: int) -> list[int]:
    """The middles of `keep` equal stretches."""
    return [(2 * i + 1) * number // (2 * keep) for i in range(keep)]


def kept(x: Rows, chosen: list[int]) -> Left:
    return {v: x[v] for v in sorted(chosen)}


def gelu(x: float) -> float:
    return x * 0.5 * (1 + math.erf(x / math.sqrt(2)))
