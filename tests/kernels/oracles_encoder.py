"""Oracles of the selectors on grids, stretches and pairs."""

from __future__ import annotations

import math
from typing import Any

from kernel_oracles import ORACLES, Row, _best, _budget, _cosine, _members, _pad


def anchored_score(
    anchor: list[Row],
    fill: list[Row],
    segment: list[Row],
    counts: list[Row],
    columns: list[Row],
    permille: int,
    count: int,
    share: int,
) -> list[Row]:
    result = []
    for firsts, values, scopes, sizes, across in zip(anchor, fill, segment, counts, columns, strict=True):
        near: set[int] = set()
        for scope, size in enumerate(sizes):
            members = _members(scopes, scope)
            number = round(_budget(size, permille, count) * share / 5000)
            for best in _best(members, firsts, number):
                for offset in (0, -1, 1, -across[best], across[best]):
                    near.add(members[min(max(members.index(best) + offset, 0), size - 1)])
        known = [abs(v) for v, s in zip(values, scopes, strict=True) if s >= 0 and not math.isnan(v)]
        above = 2 * max(1e-6, *known, 0.0)
        raised = [v + above if i in near else v for i, v in enumerate(values)]
        result.append([v if s >= 0 else 0.0 for v, s in zip(raised, scopes, strict=True)])
    return result


def rows_keep(
    score: list[Row], segment: list[Row], counts: list[Row], columns: list[Row], permille: int, count: int, slots: int
) -> list[Row]:
    result = []
    for values, scopes, sizes, lengths in zip(score, segment, counts, columns, strict=True):
        kept: Row = []
        for scope, size in enumerate(sizes):
            members = _members(scopes, scope)
            across = lengths[members[0]] if members else 1
            rows = [members[i : i + across] for i in range(0, size - across + 1, across)]
            sums = [math.fsum(values[v] for v in row) for row in rows]
            for best in _best(list(range(len(rows))), sums, _budget(size, permille, count) // across):
                kept += rows[best]
        result.append(_pad(kept, slots))
    return result


def _variance(feature: Any, chunk: Row) -> Row:
    """Of the cosines to the others, a zero standing for the token itself."""
    units = []
    for v in chunk:
        length = math.sqrt(sum(x * x for x in feature[v])) + 1e-6
        units.append([x / length for x in feature[v]])
    result = []
    for i, one in enumerate(units):
        cosines = [sum(x * y for x, y in zip(one, unit, strict=True)) for unit in units]
        cosines[i] = 0.0
        mean = sum(cosines) / (len(chunk) - 1)
        result.append(sum((c - mean) ** 2 for c in cosines) / (len(chunk) - 1))
    return result


def _worth(feature: Any, values: Row, chunk: Row, diversity: float) -> float:
    if len(chunk) < 2:
        worth = sum(values[v] for v in chunk)
    else:
        unlike, raised = _variance(feature, chunk), [1000 * values[v] for v in chunk]
        scale = sum(abs(a) for a in raised) / len(chunk) / (sum(unlike) / len(chunk) + 1e-6)
        worth = sum(a + diversity * v * scale for a, v in zip(raised, unlike, strict=True)) / len(chunk)
    return worth if worth > 0 else 0.0


def chunks_keep(
    feature: Any,
    score: list[Row],
    segment: list[Row],
    counts: list[Row],
    permille: int,
    count: int,
    chunks: int,
    diversity: float,
    slots: int,
) -> list[Row]:
    result = []
    for b, scopes in enumerate(segment):
        kept: Row = []
        for scope, size in enumerate(counts[b]):
            members, parts = _members(scopes, scope), []
            for number in range(chunks):
                start = number * (size // chunks) + min(number, size % chunks)
                parts.append(members[start : start + size // chunks + (number < size % chunks)])
            worths = [_worth(feature[b], score[b], part, diversity) for part in parts]
            shares = [worth / (sum(worths) + 1e-6) for worth in worths]
            budget = _budget(size, permille, count)
            given = [math.floor(share * budget) for share in shares]
            for number in _best(list(range(chunks)), shares, budget - sum(given)):
                given[number] += 1
            taken: Row = []
            for part, amount in zip(parts, given, strict=True):
                taken += _best(part, score[b], amount)
            left = [v for v in members if v not in taken]
            kept += taken + _best(left, score[b], budget - len(taken))
        result.append(_pad(kept, slots))
    return result


def pairs_keep(
    feature: Any,
    score: list[Row],
    segment: list[Row],
    counts: list[Row],
    permille: int,
    count: int,
    share: int,
    drop: int,
    slots: int,
) -> list[Row]:
    result = []
    for b, scopes in enumerate(segment):
        kept: Row = []
        for scope, size in enumerate(counts[b]):
            budget = _budget(size, permille, count)
            by_score = budget * share // 1000
            order = _best(_members(scopes, scope), score[b], size)
            line = order[by_score:]
            while len(line) > budget - by_score:
                even, odd = line[::2], line[1::2]
                alike = {v: max((_cosine(feature[b][v], feature[b][w]) for w in odd), default=-2.0) for v in even}
                even.sort(key=lambda v, alike=alike: (-alike[v], v))
                line = even[min(drop, len(line) - (budget - by_score)) :] + odd
            kept += order[:by_score] + line
        result.append(_pad(kept, slots))
    return result


ORACLES.update(
    {function.__name__: function for function in (anchored_score, chunks_keep, pairs_keep, rows_keep)},
)
