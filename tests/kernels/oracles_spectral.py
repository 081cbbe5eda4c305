"""What spectral embeddings mean, by the eigendecomposition of LAPACK; see oracles.py."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from kernel_oracles import ORACLES, Row, _budget, _members


def laplacian(rows: list[Row], origin: Row, sigma: float, relative: bool) -> Any:
    """[n, n] D^-1/2 (D - W) D^-1/2 of tokens; those nearer than a thousandth of their lengths from `origin` are one."""
    size = len(rows)
    apart = [[0.0] * size for _ in rows]
    for i, one in enumerate(rows):
        for j, other in enumerate(rows):
            distance = math.dist(one, other)
            copies = distance**2 < 1e-6 * (math.dist(one, origin) ** 2 + math.dist(other, origin) ** 2)
            apart[i][j] = 0.0 if copies else distance
    mean = sum(map(sum, apart)) / max(1, size * (size - 1))
    reach = sigma * mean if relative and mean > 0 else sigma
    near = [[math.exp(-0.5 * (value / reach) ** 2) for value in row] for row in apart]
    beside = [math.fsum(value for j, value in enumerate(row) if j != i) for i, row in enumerate(near)]
    made = np.zeros((size, size))
    for i in range(size):
        for j in range(size):
            made[i, j] = -near[i][j] / math.sqrt((1 + beside[i]) * (1 + beside[j])) if i != j else 0.0
        made[i, i] = beside[i] / (1 + beside[i])  # 1 - 1 / D, to the last digit where D is almost 1
    return made


def columns_of(matrix: Any, number: int) -> Any:
    """[n, K] eigenvectors of the `number` smallest eigenvalues; where that parts equal ones, none of these or all."""
    values, vectors = np.linalg.eigh(matrix)
    slack = 1e-6 * np.abs(matrix).sum(1).max()
    low = int((values < values[number - 1] - slack).sum())
    high = int((values <= values[number - 1] + slack).sum())
    return vectors[:, : number if high == number else low or high]


def spectral_rows(
    feature: Any, segment: Any, counts: Any, permille: int, count: int, sigma: float, relative: bool
) -> list[Any]:
    result = []
    for b, scopes in enumerate(segment):
        tokens = [
            [0.0 if math.isnan(value) or scope < 0 else value for value in row]
            for row, scope in zip(feature[b], scopes, strict=True)
        ]
        real = [row for row, scope in zip(tokens, scopes, strict=True) if scope >= 0]
        origin = [sum(column) / len(real) for column in zip(*real, strict=True)]
        made = np.zeros((len(scopes), len(scopes)))
        for scope in range(len(counts[b])):
            members = _members(scopes, scope)
            if not members:
                continue
            matrix = laplacian([tokens[i] for i in members], origin, sigma, relative)
            columns = columns_of(matrix, max(1, _budget(len(members), permille, count)))
            long = np.linalg.norm(columns, axis=1, keepdims=True)
            # Rows of Q Q^T are those of Q in another basis: of the same lengths, and as far from each other.
            made[np.ix_(members, members)] = columns / long @ columns.T
        result.append(made.tolist())
    return result


ORACLES["spectral_rows"] = spectral_rows
