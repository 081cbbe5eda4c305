"""Oracles of the ops about outliers and about what becomes of the tokens that were not chosen."""

from __future__ import annotations

import math
from typing import Any

from kernel_oracles import ORACLES, Row, _allowed, _best, _budget, _cosine, _members, _pad, _weights


def global_score(
    query: Any,
    key: Any,
    mask: Any,
    rows: list[Row],
    columns: Any,
    scale: float,
    above: float,
    image: Any = None,
    cap: float = 0.0,
) -> list[Row]:
    """Of several images, each as if it were alone."""
    result = []
    if image is not None:
        for b, sample in enumerate(query):
            past, scores = len(key[b][0]) - len(sample[0]), [0.0] * len(columns[b])
            one = None if mask is None else [mask[b if len(mask) > 1 else 0]]
            for number in set(image[b]):
                theirs = [row for row in rows[b] if row >= 0 and image[b][row + past] == number]
                here = [[[c for c in group if c >= 0 and image[b][c] == number] for group in columns[b]]]
                part = global_score([sample], [key[b]], one, [theirs], here, scale, above, cap=cap)[0]
                for v, group in enumerate(columns[b]):
                    share = len(here[0][v]) / max(1, sum(c >= 0 for c in group))
                    scores[v] += part[v] * share
            result.append(scores)
        return result
    for b, sample in enumerate(query):
        used, number = [row for row in rows[b] if row >= 0], len(key[b][0])
        paid: dict[int, Row] = {}
        for row in used:
            heads = []
            for h, head in enumerate(sample):
                group = key[b][h * len(key[b]) // len(sample)]
                heads.append(_weights(head[row], group, scale, _allowed(mask, b, h, row, number), cap))
            paid[row] = [sum(column) / len(heads) for column in zip(*heads, strict=True)]
        own = {row: sum(p[number - len(sample[0]) + row] for p in paid.values()) / len(used) for row in used}
        payers = [row for row in used if own[row] > above * sum(own.values()) / len(used)]
        payers = payers or [row for row in used if own[row] == max(own.values())]
        pooled = [sum(paid[row][n] for row in payers) / max(1, len(payers)) for n in range(number)]
        taken = [[pooled[column] for column in group if column >= 0] for group in columns[b]]
        result.append([sum(values) / max(1, len(values)) for values in taken])
    return result


def _quartile(values: Row, number: int) -> float:
    """Linear interpolation in the ascending order."""
    place = (len(values) - 1) * number / 4
    low = sorted(values)[math.floor(place)]
    return low + (sorted(values)[math.ceil(place)] - low) * (place - math.floor(place))


def outlier_keep(
    score: list[Row], segment: list[Row], counts: list[Row], fence: float, spread: int, permille: int, count: int
) -> list[Row]:
    rows = []
    for given, scopes, sizes in zip(score, segment, counts, strict=True):
        values = [0.0 if math.isnan(x) else x for x in given]
        kept: Row = []
        for scope, size in enumerate(sizes):
            members = _members(scopes, scope)
            if not members:
                continue
            low, high = (_quartile([values[v] for v in members], number) for number in (1, 3))
            found = [v for v in members if values[v] > high + fence * (high - low)] or _best(members, values, 1)
            if spread:
                step = max(1, size // len(found) // spread)
                found += [members[i] for i in range(0, size - 1, step) if members[i] not in found]
            kept += _best(found, values, _budget(size, permille, count))
        rows.append(kept)
    return [_pad(row, max(len(row) for row in rows)) for row in rows]


def _weighed(rows: list[Row], weights: Row, width: int) -> Row:
    return [sum(w * row[d] for w, row in zip(weights, rows, strict=True)) for d in range(width)]


def _folded(index: list[Row], made: list[dict[int, tuple[Row, float]]], width: int) -> Any:
    """Features and sizes along `index`, from each sample's dictionary of token -> (row, size)."""
    rows = [[at[v][0] if v >= 0 else [0.0] * width for v in row] for row, at in zip(index, made, strict=True)]
    return rows, [[at[v][1] if v >= 0 else 0.0 for v in row] for row, at in zip(index, made, strict=True)]


def absorb_neighbours(
    feature: Any,
    metric: Any,
    size: list[Row],
    segment: list[Row],
    counts: list[Row],
    chosen: list[Row],
    score: list[Row],
    neighbours: int,
    extra: bool,
    slots: int,
) -> Any:
    indices, made = [], []
    width = max((len(row) for rows in feature for row in rows), default=6)
    for b, scopes in enumerate(segment):
        kept, x = [v for v in chosen[b] if v >= 0], feature[b]
        a = [0.0 if math.isnan(value) else value for value in score[b]]
        at: dict[int, tuple[Row, float]] = {}
        for v in kept:
            others = [u for u in _members(scopes, scopes[v]) if u != v]
            others.sort(key=lambda u, v=v, b=b: (-_cosine(metric[b][v], metric[b][u]), u))
            near = others[:neighbours]
            at[v] = (_weighed([x[v], *(x[u] for u in near)], [1.0, *(a[u] for u in near)], width), size[b][v])
        for scope in range(len(counts[b]) if extra else 0):
            left = [v for v in _members(scopes, scope) if v not in kept]
            if left:
                at[left[-1]] = (
                    _weighed([x[v] for v in left], [a[v] for v in left], width),
                    sum(size[b][v] for v in left),
                )
        indices.append(_pad(list(at), len(chosen[b]) + (slots if extra else 0)))
        made.append(at)
    return indices, *_folded(indices, made, width)


def fold_weakest(
    feature: Any, size: list[Row], segment: list[Row], counts: list[Row], chosen: list[Row], score: list[Row]
) -> Any:
    made = []
    width = max((len(row) for rows in feature for row in rows), default=6)
    for b, scopes in enumerate(segment):
        at = {v: (feature[b][v], size[b][v]) for v in chosen[b] if v >= 0}
        for scope in range(len(counts[b])):
            order = _best(_members(scopes, scope), score[b], len(scopes))
            stay = [v for v in order if v in at]
            tail = [*stay[-1:], *(v for v in order if v not in at)]
            if stay and len(tail) > 1:
                weights = [(1.0 + i) / (len(tail) * (len(tail) + 1) / 2) for i in range(len(tail))]
                at[stay[-1]] = (_weighed([feature[b][v] for v in tail], weights, width), sum(size[b][v] for v in tail))
        made.append(at)
    return _folded(chosen, made, width)


def merge_cells(
    feature: Any,
    size: list[Row],
    segment: list[Row],
    counts: list[Row],
    chosen: list[Row],
    score: list[Row],
    columns: list[Row],
    cells: int,
    slots: int,
) -> Any:
    indices, made = [], []
    width = max((len(row) for rows in feature for row in rows), default=6)
    for b, scopes in enumerate(segment):
        at = {v: (feature[b][v], size[b][v]) for v in chosen[b] if v >= 0}
        kept = set(at)
        for scope in range(len(counts[b])):
            members = _members(scopes, scope)
            across = columns[b][members[0]] if members else 1
            down = math.ceil(len(members) / across)
            groups: dict[tuple[int, int], Row] = {}
            for place, v in enumerate(members):
                if v not in kept:
                    groups.setdefault((place // across * cells // down, place % across * cells // across), []).append(v)
            for group in groups.values():
                weights = [max(0.0, score[b][v]) if score[b][v] == score[b][v] else 0.0 for v in group]
                weights = weights if sum(weights) else [1.0] * len(group)
                row = _weighed([feature[b][v] for v in group], [w / sum(weights) for w in weights], width)
                at[_best(group, score[b], 1)[0]] = (row, sum(size[b][v] for v in group))
        indices.append(_pad(list(at), len(chosen[b]) + slots))
        made.append(at)
    return indices, *_folded(indices, made, width)


ORACLES |= {
    function.__name__: function
    for function in (absorb_neighbours, fold_weakest, global_score, merge_cells, outlier_keep)
}
