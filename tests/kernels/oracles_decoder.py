"""Oracles of the ops that act between decoder layers."""

from __future__ import annotations

import math
from typing import Any

from kernel_oracles import ORACLES, Row, _allowed, _best, _budget, _cosine, _members, _pad, _weights


def pivot_keep(
    feature: Any,
    text: Any,
    length: list[Row],
    text_length: list[Row],
    after: list[Row],
    segment: list[Row],
    counts: list[Row],
    visual: int,
    words: int,
    permille: int,
    count: int,
    slots: int,
) -> list[Row]:
    result = []
    for b, scopes in enumerate(segment):
        asked = [t for t, ok in enumerate(after[b]) if ok]
        shared = [text[b][t] for t in _best(asked, text_length[b], words)]
        kept: Row = []
        for scope, size in enumerate(counts[b]):
            budget, members = _budget(size, permille, count), _members(scopes, scope)
            own = _best(members, length[b], min(visual, budget))
            taken, pivots = list(own), [feature[b][v] for v in own] + (shared if own else [])
            for turn, pivot in enumerate(pivots):
                part = math.ceil((budget - len(taken)) / (len(pivots) - turn))
                free = [v for v in members if v not in taken]
                likeness = {v: _cosine(feature[b][v], pivot) for v in free}
                taken += sorted(free, key=lambda v, likeness=likeness: (likeness[v], v))[:part]
            assert len(taken) == budget
            kept += taken
        result.append(_pad(kept, slots))
    return result


def text_raters(visual: Any, seen: list[Row], text: Any, asked: list[Row]) -> list[Row]:
    result = []
    for b, words in enumerate(text):
        shares = [_weights(v, words, 1.0, asked[b]) for v, ok in zip(visual[b], seen[b], strict=True) if ok]
        means = [sum(row[t] for row in shares) / max(1, len(shares)) for t in range(len(words))]
        chosen = [means[t] for t in range(len(words)) if asked[b][t]]
        average = sum(chosen) / max(1, len(chosen))
        # Equal shares differ from their own mean by a rounding, so that all or none would be above it: all rate then.
        above = [ok and mean > average + 1e-9 for mean, ok in zip(means, asked[b], strict=True)]
        result.append(above if any(above) else asked[b])
    return result


def pagerank_score(
    query: Any,
    key: Any,
    mask: Any,
    rows: list[Row],
    columns: Any,
    scale: float,
    temperature: float,
    steps: int,
    cap: float = 0.0,
) -> list[Row]:
    result = []
    for b, sample in enumerate(query):
        used, past = [row for row in rows[b] if row >= 0], len(key[b][0]) - len(sample[0])
        ends = []
        for h, head in enumerate(sample):
            keys = key[b][h * len(key[b]) // len(sample)]
            moves = {
                row: _weights(head[row], keys, scale, _allowed(mask, b, h, row, len(keys)), cap, temperature)
                for row in used
            }
            chance = {row: 1 / len(used) for row in used}
            for _ in range(steps):
                chance = {to: sum(chance[at] * moves[at][to + past] for at in used) for to in used}
            ends.append(chance)
        rank = {row + past: math.sqrt(sum(end[row] ** 2 for end in ends) / len(ends)) for row in used}
        taken = [[rank.get(column, 0.0) for column in group if column >= 0] for group in columns[b]]
        result.append([sum(values) / max(1, len(values)) for values in taken])
    return result


def _distance(a: Row, b: Row) -> float:
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / len(a)


def groups_by_density(pool: Row, rows: dict[int, Row], number: int) -> dict[int, Row]:
    """Centre -> members, for tokens with the given rows."""
    near = {v: sorted(_distance(rows[v], rows[w]) for w in pool)[:number] for v in pool}
    density = {v: math.exp(-sum(near[v]) / number) for v in pool}
    widest = max((_distance(rows[v], rows[w]) for v in pool for w in pool), default=0.0)
    weight = {}
    for v in pool:
        denser = [w for w in pool if (density[w], -w) > (density[v], -v)]
        weight[v] = density[v] * math.sqrt(min((_distance(rows[v], rows[w]) for w in denser), default=widest))
    centres = sorted(sorted(pool, key=lambda v: (-weight[v], v))[:number])
    groups: dict[int, Row] = {centre: [centre] for centre in centres}
    for v in pool:
        if v not in groups:
            groups[min(centres, key=lambda centre, v=v: _distance(rows[v], rows[centre]))].append(v)
    return groups


def merge_clusters(
    feature: Any,
    size: list[Row],
    segment: list[Row],
    counts: list[Row],
    chosen: list[Row],
    score: list[Row],
    permille: int,
    per: int,
    room: int,
    slots: int,
) -> Any:
    indices, features, sizes = [], [], []
    # Without a token the lists cannot tell the width; the cases without one have 6.
    width = max((len(row) for rows in feature for row in rows), default=6)
    for b, scopes in enumerate(segment):
        kept = [v for v in chosen[b] if v >= 0]
        at = {v: (feature[b][v], size[b][v]) for v in kept}
        for scope in range(len(counts[b])):
            left = [v for v in _members(scopes, scope) if v not in kept]
            pool = sorted(_best(left, score[b], min(len(left), len(left) * permille // 1000 + 1)))
            number = min(len(pool), len(pool) // per + 1)
            rows = {v: feature[b][v] for v in pool}
            for centre, members in groups_by_density(pool, rows, number).items() if pool else ():
                mean = [sum(column) / len(members) for column in zip(*(rows[v] for v in members), strict=True)]
                at[centre] = (mean, sum(size[b][v] for v in members))
        assert len(at) - len(kept) <= slots
        index = _pad(list(at), len(chosen[b]) + slots)
        indices.append(index)
        features.append([at[v][0] if v >= 0 else [0.0] * width for v in index])
        sizes.append([at[v][1] if v >= 0 else 0.0 for v in index])
    return indices, features, sizes


def transition_score(before: Any, after: Any, real: list[Row]) -> list[Row]:
    result = []
    for b, rows in enumerate(before):
        powers = {s: math.exp(1 - _cosine(row, after[b][s])) for s, row in enumerate(rows) if real[b][s]}
        lengths = [(math.sqrt(_dot(row, row)), math.sqrt(_dot(after[b][s], after[b][s]))) for s, row in enumerate(rows)]
        result.append(
            [
                leaving / entering * powers[s] / sum(powers.values()) if s in powers and entering else 0.0
                for s, (entering, leaving) in enumerate(lengths)
            ]
        )
    return result


def _dot(a: Row, b: Row) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def mean_query_score(
    feature: Any, query: Any, key: Any, rows: Any, columns: Any, segment: Any, scale: float
) -> list[Row]:
    result = []
    for b, videos in enumerate(segment):
        past = len(key[b][0]) - len(query[b][0])
        visual = {v: group[0] for v, group in enumerate(columns[b]) if group[0] >= 0}
        used = [row for row in rows[b] if 0 <= row <= max(visual.values(), default=-1) - past]
        score = [0.0] * len(videos)
        for h, head in enumerate(query[b]):
            keys = key[b][h * len(key[b]) // len(query[b])]
            mean = [sum(column) / len(used) for column in zip(*(head[row] for row in used), strict=True)]
            for image in set(videos) - {-1}:
                tokens = [v for v, owner in enumerate(videos) if owner == image]
                paid = _weights(mean, [keys[visual[v]] for v in tokens], scale, [True] * len(tokens))
                for v, share in zip(tokens, paid, strict=True):
                    score[v] += share / len(query[b]) * math.sqrt(sum(x * x for x in feature[b][v]))
        result.append(score)
    return result


def reselect(
    attention: list[Row],
    before: list[Row],
    chosen_before: list[Row] | None,
    visual: list[Row],
    single: Row,
    permille: int,
    count: int,
    alike: float,
) -> tuple[list[Row], list[Row]]:
    chosen, seen = [], []
    for b, (paid, there) in enumerate(zip(attention, visual, strict=True)):
        if not single[b]:
            chosen.append([True] * len(paid))
            seen.append([0.0] * len(paid))
            continue
        paid = [0.0 if math.isnan(value) else value for value in paid]
        keys = [n for n, ok in enumerate(there) if ok]
        now, then = ({n: row[n] for n in keys if n < len(row)} for row in (paid, before[b]))
        size = math.hypot(*now.values()) * math.hypot(*before[b])
        cosine = sum(now[n] * then.get(n, 0.0) for n in keys) / size if size else 0.0
        own = set(_best(keys, paid, _budget(len(keys), permille, count)))
        if alike and cosine >= alike:
            last = [True] * len(before[b]) if chosen_before is None else chosen_before[b]
            chosen.append([*last, *[True] * (len(paid) - len(last))])
        else:
            chosen.append([n in own or not ok for n, ok in enumerate(there)])
        seen.append([value if ok else 0.0 for value, ok in zip(paid, there, strict=True)])
    return chosen, seen


ORACLES |= {
    function.__name__: function
    for function in (
        mean_query_score,
        merge_clusters,
        pagerank_score,
        pivot_keep,
        reselect,
        text_raters,
        transition_score,
    )
}
