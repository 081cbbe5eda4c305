"""Methods that keep or join tokens of a video frame by frame: their papers' formulas on plain Python numbers."""

from __future__ import annotations

import itertools
import math

import numpy
from policy_formulas import Row, best, cosine, length

Tokens = dict[tuple[int, int], tuple[numpy.ndarray, int]]  # (place, frame) -> (row, size)


def evs(x: list[Row], frames: int, size: int, keep: int) -> list[int]:
    """The `keep` tokens of the video that change most; a frame at least, so that the first stays whole."""
    change = [255.0 if i < size else round(1 - cosine(x[i], x[i - size]), 9) for i in range(frames * size)]
    return sorted(best(change, max(size, keep)))


def dycoke(x: list[Row], frames: int, size: int, number: int) -> list[int]:
    """`number` tokens of the second frame of each pair, then of the third of each window of four against its first."""
    left = {t: set(range(t * size, (t + 1) * size)) for t in range(frames - frames % 2)}

    def thin(t: int, against: int) -> None:
        apart = [-round(cosine(x[t * size + p], x[against * size + p]), 9) for p in range(size)]
        left[t] = {t * size + p for p in best(apart, number)}

    for t in range(0, frames - 1, 2):
        thin(t + 1, t)
    for t in range(0, frames - 4, 4):
        if t + 2 in left:
            thin(t + 2, t)
    return sorted(i for tokens in left.values() for i in tokens)


def stc(x: list[Row], frames: int, size: int, number: int) -> list[int]:
    """`number` tokens of each frame, those least like it and like all frames so far in the half that varies least."""
    left: set[int] = set()
    memory: list[Row] = []
    for t in range(frames):
        rows = x[t * size : (t + 1) * size]
        columns = [list(column) for column in zip(*rows, strict=True)]
        mean = [sum(column) / size for column in columns]
        varies = [sum((v - m) ** 2 for v in column) / size for column, m in zip(columns, mean, strict=True)]
        half = sorted(range(len(columns)), key=lambda c: round(varies[c], 9))[: len(columns) // 2]
        memory.append(mean)
        units = [unit([row[c] for c in half]) for row in rows]
        middle = [sum(column) / size for column in zip(*units, strict=True)]
        past = unit([sum(one[c] for one in memory) / len(memory) for c in half])
        alike = [-round(gauss(one, middle) + gauss(one, past), 6) for one in units]
        left |= {t * size + p for p in best(alike, number)}
    return sorted(left)


def unit(row: Row) -> Row:
    return [v / (length(row) or 1.0) for v in row]


def gauss(a: Row, b: Row) -> float:
    square = sum((v - w) ** 2 for v, w in zip(a, b, strict=True))
    return sum(math.exp(-square / (2 * width)) for width in (1 / 8, 1 / 4, 1 / 2, 1, 2))


def upper(ratios: list[float], cost: float, done: int, layers: int) -> float:
    """What may still go, as FrameFusion writes it: `ratios` merged so far in `done` of the decoder's layers."""
    left = [math.prod(1 - ratio for ratio in ratios[: j + 1]) for j in range(done)]
    rest = math.prod(1 - ratio for ratio in ratios)
    return max(0.0, 1 - (layers * cost - sum(left)) / ((layers - done) * rest))


def merged(tokens: Tokens, above: float, most: int) -> Tokens:
    """Runs of like tokens along each place's frames; of those that could join the `most` that are most alike."""
    line = sorted(tokens)
    near = {
        two: round(cosine(list(tokens[one][0]), list(tokens[two][0])), 9)
        for one, two in itertools.pairwise(line)
        if one[0] == two[0]
    }
    # Of equally alike ones those of earlier frames join first.
    joins = sorted((two for two, value in near.items() if value >= above), key=lambda two: (-near[two], two[::-1]))[
        :most
    ]
    runs: list[list[tuple[int, int]]] = []
    for token in line:
        if token in joins:
            runs[-1].append(token)
        else:
            runs.append([token])
    return {
        run[0]: (numpy.mean([tokens[token][0] for token in run], axis=0), sum(tokens[token][1] for token in run))
        for run in runs
    }
