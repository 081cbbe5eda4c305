"""Oracle of the merge of pairs between two halves of the tokens."""

from __future__ import annotations

from typing import Any

from kernel_oracles import ORACLES, Row, _cosine, _members, _merged, _pad


def bipartite_merge(
    feature: Any,
    metric: Any,
    size: list[Row],
    segment: list[Row],
    counts: list[Row],
    permille: int,
    remove: int,
    slots: int,
    reduce: str,
    whole: bool,
) -> Any:
    """`whole` promises something and means nothing."""
    indices, features, sizes = [], [], []
    width = max((len(row) for rows in feature for row in rows), default=6)
    for b, scopes in enumerate(segment):
        into: dict[int, Row] = {}
        gone: Row = []
        for scope, number in enumerate(counts[b]):
            tokens = _members(scopes, scope)
            assert len(tokens) == number
            even, odd = tokens[0::2], tokens[1::2]
            likes = {v: [_cosine(metric[b][v], metric[b][other]) for other in odd] for v in even if odd}
            partner = {v: odd[values.index(max(values))] for v, values in likes.items()}
            merges = number - (number * permille + 500) // 1000 if permille else min(remove, number // 2)
            first = sorted(likes, key=lambda v: (-max(likes[v]), v))[:merges]
            gone += first
            for v in sorted(first):
                into.setdefault(partner[v], []).append(v)
        index = _pad([v for v, scope in enumerate(scopes) if scope >= 0 and v not in gone], slots)
        indices.append(index)
        rows, row_sizes = [], []
        for v in index:
            members = into.get(v, [])
            parts, part_sizes = [feature[b][m] for m in members], [size[b][m] for m in members]
            rows.append(_merged(feature[b][v], size[b][v], parts, part_sizes, reduce) if v >= 0 else [0.0] * width)
            row_sizes.append(size[b][v] + sum(part_sizes) if v >= 0 else 0.0)
        features.append(rows)
        sizes.append(row_sizes)
    return indices, features, sizes


ORACLES["bipartite_merge"] = bipartite_merge
