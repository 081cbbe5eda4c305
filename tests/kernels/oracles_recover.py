"""What ops that count local outliers mean, as loops over Python numbers; see oracles.py."""

from __future__ import annotations

import math
from typing import Any

from kernel_oracles import ORACLES, Row, _best, _budget, _cosine, _members


def outliers(values: Row, neighbours: int) -> int:
    """How many numbers have a local outlier factor above 1.5."""
    total = len(values)
    if total < 2:
        return 0
    order = sorted(range(total), key=lambda i: (-values[i], i))
    near = []
    for i in range(total):
        others = sorted((j for j in order if j != i), key=lambda j, i=i: abs(values[i] - values[j]))
        near.append(others[: min(neighbours, total - 1)])
    reach = [abs(values[i] - values[near[i][-1]]) for i in range(total)]
    density = []
    for i in range(total):
        far = [max(reach[j], abs(values[i] - values[j])) for j in near[i]]
        density.append(1 / (sum(far) / len(far) + 1e-10))
    factor = [sum(density[j] for j in near[i]) / len(near[i]) / density[i] for i in range(total)]
    return sum(value > 1.5 for value in factor)


def _known(row: Row) -> Row:
    return [0.0 if math.isnan(value) else value for value in row]


def recover_keep(
    score: Any, text: Any, segment: Any, counts: Any, neighbours: int, permille: int, count: int
) -> list[Row]:
    rows = []
    for b, scopes in enumerate(segment):
        seen, words, taken = _known(score[b]), _known(text[b]), []
        for scope in range(len(counts[b])):
            members = _members(scopes, scope)
            if not members:
                continue
            kept = _best(members, seen, outliers([seen[i] for i in members], neighbours))
            low = min(words[i] for i in members)
            like = {i: low if i in kept else words[i] for i in members}
            left = [i for i in members if i not in kept]
            number = len(left) * outliers([like[i] for i in members], neighbours) // len(members)
            kept += sorted(left, key=lambda i: (-like[i], i))[:number]
            kept = kept or _best(members, seen, 1)
            taken += kept[: _budget(len(members), permille, count)]
        rows.append(sorted(taken))
    width = max(map(len, rows))
    return [[-1] * (width - len(row)) + row for row in rows]


def recycle_rest(
    feature: Any,
    metric: Any,
    text: Any,
    size: Any,
    segment: Any,
    counts: Any,
    chosen: Any,
    score: Any,
    neighbours: int,
    around: int,
    weight: float,
) -> tuple[Any, Any, Any]:
    made = []
    for b, scopes in enumerate(segment):
        weights, words = _known(score[b]), _known(text[b])
        left = {i: (feature[b][i], size[b][i]) for i in chosen[b] if i >= 0}
        for scope in range(len(counts[b])):
            others = [i for i in _members(scopes, scope) if i not in chosen[b]]
            if not others:
                continue
            kept = counts[b][scope] - len(others)
            number = kept * outliers([weights[i] for i in others], around) // len(others)
            centres = _best(others, weights, number)
            for c in centres:
                like = {i: _cosine(metric[b][c], metric[b][i]) + weight * words[i] for i in others if i != c}
                near = sorted(like, key=lambda i: (-like[i], i))[:neighbours]
                left[c] = (_sum(feature[b], {c: 1.0, **{i: weights[i] for i in near}}), size[b][c])
            plain = [i for i in others if i not in centres]
            if centres and plain:
                total = _sum(feature[b], {i: weights[i] for i in plain})
                left[plain[-1]] = (total, sum(size[b][i] for i in plain))
        made.append(dict(sorted(left.items())))
    width = max(map(len, made))
    depth = len(feature[0][0]) if feature[0] else 6
    index = [[-1] * (width - len(one)) + list(one) for one in made]
    rows = [[[0.0] * depth] * (width - len(one)) + [row for row, _ in one.values()] for one in made]
    return index, rows, [[0.0] * (width - len(one)) + [number for _, number in one.values()] for one in made]


def _sum(rows: Any, weights: dict[int, float]) -> Row:
    return [sum(weights[i] * rows[i][d] for i in weights) for d in range(len(rows[0]))]


ORACLES |= {"recover_keep": recover_keep, "recycle_rest": recycle_rest}
