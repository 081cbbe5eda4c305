"""Oracles of the selectors that take one token after another."""

from __future__ import annotations

import math
from typing import Any

from kernel_oracles import ORACLES, Row, _best, _budget, _members, _pad


def _directions(vectors: list[Row]) -> list[Row]:
    units = []
    for vector in vectors:
        length = math.sqrt(sum(value * value for value in vector))
        units.append([value / length for value in vector] if length > 0 else [0.0] * len(vector))
    return units


def _dot(one: Row, other: Row) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


def _first_best(tokens: list[int], value: Any) -> int:
    """The lowest index among those whose value is the highest up to rounding: ties are meant, not their last bits."""
    top = max(value(token) for token in tokens)
    return min(token for token in tokens if value(token) >= top - 1e-6 * max(1.0, abs(top)))


def _each(segment: list[Row], counts: list[Row], permille: int, count: int, slots: int, rule: Any) -> list[Row]:
    """`rule(b, members, how many)` gives the tokens of one segment."""
    result = []
    for b, scopes in enumerate(segment):
        taken: list[int] = []
        for scope in range(len(counts[b])):
            members = _members(scopes, scope)
            taken += rule(b, members, _budget(len(members), permille, count))
        result.append(_pad(sorted(taken), slots))
    return result


def max_min_keep(feature: Any, segment: Any, counts: Any, permille: int, count: int, slots: int) -> list[Row]:
    def rule(b: int, members: list[int], number: int) -> list[int]:
        unit = dict(enumerate(_directions(feature[b])))
        taken: list[int] = []
        while len(taken) < number:
            others = taken or members

            def distance(token: int, others: list[int] = others) -> float:
                return min((1 - _dot(unit[token], unit[other]) for other in others if other != token), default=3.0)

            taken.append(_first_best([token for token in members if token not in taken], distance))
        return taken

    return _each(segment, counts, permille, count, slots, rule)


def max_sum_keep(
    feature: Any, score: Any, segment: Any, counts: Any, permille: int, count: int, slots: int
) -> list[Row]:
    def rule(b: int, members: list[int], number: int) -> list[int]:
        unit = dict(enumerate(_directions(feature[b])))
        taken: list[int] = []
        while len(taken) < number:
            free = [token for token in members if token not in taken]
            if taken:
                best = _first_best(free, lambda token: -sum(_dot(unit[token], unit[other]) for other in taken))
            else:
                rated = [-1e30 if math.isnan(score[b][token]) else score[b][token] for token in free]
                best = free[rated.index(max(rated))]
            taken.append(best)
        return taken

    return _each(segment, counts, permille, count, slots, rule)


def _determinant(matrix: list[Row]) -> float:
    """By elimination with pivots, in double precision."""
    rows, result = [list(row) for row in matrix], 1.0
    for step in range(len(rows)):
        pivot = max(range(step, len(rows)), key=lambda row: abs(rows[row][step]))
        if rows[pivot][step] == 0:
            return 0.0
        if pivot != step:
            rows[step], rows[pivot], result = rows[pivot], rows[step], -result
        result *= rows[step][step]
        for row in range(step + 1, len(rows)):
            factor = rows[row][step] / rows[step][step]
            rows[row] = [a - factor * b for a, b in zip(rows[row], rows[step], strict=True)]
    return result


def log_det_keep(
    feature: Any, relevance: Any, segment: Any, counts: Any, permille: int, count: int, slots: int
) -> list[Row]:
    """By the definition: the next token is the one with which the determinant of the kernel is largest."""

    def rule(b: int, members: list[int], number: int) -> list[int]:
        unit = _directions(feature[b])
        weight = [(0.0 if math.isnan(value) else value) + 1e-6 for value in relevance[b]]
        taken: list[int] = []
        exhausted = False
        while len(taken) < number:
            free = [token for token in members if token not in taken]

            def gain(token: int, base: float, taken: list[int]) -> float:
                """Variance of a token that those taken leave unexplained, in units of its own."""
                chosen = [*taken, token]
                kernel = [[weight[i] * weight[j] * _dot(unit[i], unit[j]) for j in chosen] for i in chosen]
                left = _determinant(kernel) / base
                return left if left > 1e-5 * weight[token] ** 2 else 0.0

            kernel = [[weight[i] * weight[j] * _dot(unit[i], unit[j]) for j in taken] for i in taken]
            base = _determinant(kernel) if taken else 1.0
            exhausted = exhausted or all(gain(token, base, taken) == 0 for token in free)
            if exhausted:
                taken.append(free[0])
                continue
            gains = {token: gain(token, base, taken) for token in free}
            top = max(gains.values())
            taken.append(min(token for token in free if gains[token] >= top * (1 - 1e-5)))
        return taken

    return _each(segment, counts, permille, count, slots, rule)


def coverage_keep(
    feature: Any,
    text: Any,
    valid: Any,
    segment: Any,
    counts: Any,
    text_temperature: float,
    visual_temperature: float,
    visual: float,
    permille: int,
    count: int,
    slots: int,
) -> list[Row]:
    def shares(row: Row, columns: list[Row], temperature: float) -> Row:
        powers = [math.exp((_dot(row, column) - 1) / temperature) for column in columns]
        return [power / sum(powers) for power in powers]

    def rule(b: int, members: list[int], number: int) -> list[int]:
        unit, words = _directions(feature[b]), _directions(text[b])
        columns = [unit[token] for token in members]
        asked = [word for word, real in zip(words, valid[b], strict=True) if real]
        rows = [[s / len(asked) for s in shares(word, columns, text_temperature)] for word in asked]
        rows += [[visual * s / len(members) for s in shares(row, columns, visual_temperature)] for row in columns]
        covered = [0.0] * len(rows)
        taken: list[int] = []
        while len(taken) < number:
            free = [place for place in range(len(members)) if members[place] not in taken]

            def gain(place: int, covered: Row = covered) -> float:
                return sum(max(0.0, row[place] - have) for row, have in zip(rows, covered, strict=True))

            best = _first_best(free, lambda place, gain=gain: 1e3 * gain(place))
            covered = [max(row[best], have) for row, have in zip(rows, covered, strict=True)]
            taken.append(members[best])
        return taken

    return _each(segment, counts, permille, count, slots, rule)


def medoids_keep(
    feature: Any, segment: Any, counts: Any, permille: int, count: int, slots: int, rounds: int
) -> list[Row]:
    def rule(b: int, members: list[int], number: int) -> list[int]:
        rows = {i: [0.0 if math.isnan(value) else value for value in feature[b][i]] for i in members}

        def apart(one: int, other: int) -> float:
            return math.dist(rows[one], rows[other])

        medoids: list[int] = []
        while len(medoids) < number:
            free = [token for token in members if token not in medoids]
            if medoids:
                medoids.append(_first_best(free, lambda token: min(apart(token, other) for other in medoids)))
            else:
                medoids.append(_first_best(free, lambda token: math.hypot(*rows[token])))
        for _ in range(rounds if medoids else 0):
            groups: dict[int, list[int]] = {medoid: [] for medoid in sorted(medoids)}
            for token in members:
                home = token if token in groups else _first_best(list(groups), lambda m, t=token: -apart(t, m))
                groups[home].append(token)
            moved = [
                _first_best(group, lambda token, group=group: -sum(apart(token, other) for other in group))
                for group in groups.values()
            ]
            if sorted(moved) == sorted(medoids):
                break
            medoids = moved
        return medoids

    return _each(segment, counts, permille, count, slots, rule)


def density_keep(
    metric: Any, score: Any, segment: Any, counts: Any, permille: int, count: int, cutoff: float
) -> list[Row]:
    result = []
    for b, scopes in enumerate(segment):
        unit, taken = _directions(metric[b]), []
        for scope in range(len(counts[b])):
            members = _members(scopes, scope)
            pool = sorted(_best(members, score[b], _budget(len(members), permille, count)))

            def apart(one: int, other: int, unit: list[Row] = unit) -> float:
                return 0.0 if one == other else max(0.0, 1 - _dot(unit[one], unit[other]))

            density = {i: sum(math.exp(-((apart(i, j) / 2) ** 2)) for j in pool) for i in pool}
            centres: list[int] = []
            while pool:
                centre = _first_best(pool, lambda token, density=density: density[token])
                pool.remove(centre)
                if all(apart(centre, other) > cutoff for other in centres):
                    centres.append(centre)
            taken += centres
        result.append(sorted(taken))
    return [_pad(row, max(map(len, result))) for row in result]


ORACLES.update({f.__name__: f for f in (max_min_keep, max_sum_keep, log_det_keep, coverage_keep)})
ORACLES.update({f.__name__: f for f in (medoids_keep, density_keep)})
