"""What ops of windows, peaks and filters by several scores mean, as loops over Python numbers; see oracles.py."""

from __future__ import annotations

import math
from typing import Any

from kernel_oracles import ORACLES, Row, _allowed, _best, _cosine, _members, _weights


def window_merge(
    feature: Any, size: Any, segment: Any, counts: Any, columns: Any, side: int, above: float
) -> tuple[Any, Any, Any]:
    made = []
    for b, scopes in enumerate(segment):
        left: dict[int, tuple[Row, float]] = {}
        for scope in range(len(counts[b])):
            members = _members(scopes, scope)
            left |= {token: (feature[b][token], size[b][token]) for token in members}
            across = columns[b][members[0]] if members else 1
            for top in range(0, len(members) // across // side * side, side):
                for start in range(0, across // side * side, side):
                    spots = [(top + r) * across + start + c for r in range(side) for c in range(side)]
                    tokens = [members[spot] for spot in spots]
                    pairs = [_cosine(feature[b][i], feature[b][j]) for i in tokens for j in tokens if i != j]
                    if not pairs or sum(pairs) / len(pairs) < above:
                        continue
                    weight = sum(size[b][i] for i in tokens)
                    columns_of = zip(*([size[b][i] * x for x in feature[b][i]] for i in tokens), strict=True)
                    for token in tokens:
                        del left[token]
                    left[tokens[len(tokens) // 2]] = ([sum(column) / weight for column in columns_of], weight)
        made.append(dict(sorted(left.items())))
    width = max(map(len, made))
    depth = len(feature[0][0]) if feature[0] else 5
    index = [[-1] * (width - len(left)) + list(left) for left in made]
    rows = [[[0.0] * depth] * (width - len(left)) + [row for row, _ in left.values()] for left in made]
    return index, rows, [[0.0] * (width - len(left)) + [weight for _, weight in left.values()] for left in made]


def pixel_blocks(feature: Any, size: Any, segment: Any, counts: Any, columns: Any, side: int) -> tuple[Any, Any, Any]:
    made = []
    for b, scopes in enumerate(segment):
        left: dict[int, tuple[Row, float]] = {}
        for scope in range(len(counts[b])):
            members = _members(scopes, scope)
            across = columns[b][members[0]] if members else 1
            grid = [members[start : start + across] for start in range(0, len(members), across)]
            nothing = [0.0] * len(feature[b][0]) if members else []
            for top in range(0, len(grid), side):
                for start in range(0, len(grid[top]), side):
                    cells = [line[start : start + side] for line in grid[top : top + side]]
                    cells = [[*line, *[-1] * (side - len(line))] for line in (*cells, *[[]] * (side - len(cells)))]
                    tokens = [token for line in cells for token in line]
                    row = [x for token in tokens for x in (nothing if token < 0 else feature[b][token])]
                    left[grid[top][start]] = (row, sum(size[b][token] for token in tokens if token >= 0))
        made.append(dict(sorted(left.items())))
    width = max(map(len, made))
    depth = side * side * (len(feature[0][0]) if feature[0] else 5)
    index = [[-1] * (width - len(left)) + list(left) for left in made]
    rows = [[[0.0] * depth] * (width - len(left)) + [row for row, _ in left.values()] for left in made]
    return index, rows, [[0.0] * (width - len(left)) + [weight for _, weight in left.values()] for left in made]


def peak_score(
    query: Any, key: Any, mask: Any, rows: Any, columns: Any, scale: float, over: str = "mean", cap: float = 0.0
) -> list[Row]:
    result = []
    for b, sample in enumerate(query):
        paid = []
        for row in (row for row in rows[b] if row >= 0):
            heads = []
            for h, head in enumerate(sample):
                keys = key[b][h * len(key[b]) // len(sample)]
                heads.append(_weights(head[row], keys, scale, _allowed(mask, b, h, row, len(keys)), cap))
            paid += heads if over == "max" else [[sum(values) / len(values) for values in zip(*heads, strict=True)]]
        taken = [[n for n in group if n >= 0] for group in columns[b]]
        result.append([max((sum(one[n] for n in g) / max(1, len(g)) for one in paid), default=0.0) for g in taken])
    return result


def either_score(
    total: Any,
    single: Any,
    guard: Any,
    segment: Any,
    counts: Any,
    share: float,
    least: float,
    permille: int,
    count: int,
) -> list[Row]:
    result = []
    for b, scopes in enumerate(segment):
        row = [0.0] * len(scopes)
        for scope in range(len(counts[b])):
            members = _members(scopes, scope)
            known = {i: [0.0 if math.isnan(v) else v for v in (total[b][i], single[b][i])] for i in members}
            whole = sum(value for value, _ in known.values()) * share
            number = min(count, len(members)) if count else math.ceil(len(members) * permille / 1000)
            guarded = _best(members, guard[b], number)
            for i, (value, other) in known.items():
                row[i] = 1e6 if i in guarded else max(value / whole if whole else 0.0, other / least)
        result.append(row)
    return result


ORACLES |= {
    "window_merge": window_merge,
    "pixel_blocks": pixel_blocks,
    "peak_score": peak_score,
    "either_score": either_score,
}
