"""What every op means, as loops over Python numbers: nothing here is shared with the code under test.

Each function takes the op's arguments (nested lists for tensors) and returns nested lists.
"""

from __future__ import annotations

import fractions
import math
from typing import Any

Row = list[Any]
NAN_LAST = float("-inf")


def attention_mask(
    query: list[Row],
    key: list[Row],
    window: int,
    spans: list[Row] | None = None,
    chunks: list[Row] | None = None,
    previous: int = 0,
) -> Any:
    def allowed(q: int, k: int, first: int, last: int) -> bool:
        if k < 0 or (k > q and k > last):
            return False
        return window == 0 or k > q - window or k >= first

    made = []
    for b, (queries, keys) in enumerate(zip(query, key, strict=True)):
        rows = []
        for i, q in enumerate(queries):
            row = [q < 0 or allowed(q, k, *(spans[b][i] if spans else (q, q))) for k in keys]
            if chunks and q >= 0 and chunks[b][i] >= 0:
                for j, other in enumerate(chunks[b]):
                    if 0 <= other < chunks[b][i] - previous:
                        row[len(keys) - len(queries) + j] = False
            rows.append(row)
        made.append([rows])
    return made


def shorten(
    chosen: list[Row], residual: Any, merged: Any, ids: Any, query: list[Row], *chunk: list[Row]
) -> tuple[Any, ...]:
    text, visual, segment, counts, origin = chunk
    axes = ids if ids and isinstance(ids[0][0], list) else [ids]
    made: list[list[Any]] = [[] for _ in range(8)]
    turned: list[list[Row]] = [[] for _ in axes]
    for b, picked in enumerate(chosen):
        slots = text[b] + [visual[b][token] if token >= 0 else -1 for token in picked]
        order = sorted(range(len(slots)), key=lambda column: (slots[column], column))
        rows = []
        for column in order:
            number = column - len(text[b])
            new = merged is not None and number >= 0 and slots[column] >= 0
            rows.append(merged[b][number] if new else residual[b][max(slots[column], 0)])
        moved = [order.index(column) if slots[column] >= 0 else -1 for column in range(len(slots))]
        kept = [slots[column] for column in order]
        for axis, own in zip(axes, turned, strict=True):
            own.append([axis[b][max(slot, 0)] for slot in kept])
        scopes = [segment[b][token] if token >= 0 else -1 for token in picked]
        parts = (
            rows,
            [query[b][slot] if slot >= 0 else -1 for slot in kept],
            moved[: len(text[b])],
            moved[len(text[b]) :],
            scopes,
            [scopes.count(number) for number in range(len(counts[b]))],
            [origin[b][token] if token >= 0 else -1 for token in picked],
            kept,
        )
        for all_samples, part in zip(made, parts, strict=True):
            all_samples.append(part)
    return made[0], turned if axes is ids else turned[0], *made[1:]


def restore(before: Any, kept: list[Row], inside: Any) -> Any:
    made = [list(rows) for rows in before]
    for own, slots, rows in zip(made, kept, inside, strict=True):
        for slot, row in zip(slots, rows, strict=True):
            if slot >= 0:
                own[slot] = row
    return made


def evict(held: Any, kept: list[Row], slots: list[Row]) -> Any:
    def left(entries: Row, places: bool, staying: Row, chunk: int) -> Row:
        past = len(entries) - chunk
        new = [-1 if places and slot < 0 else entries[past + max(slot, 0)] for slot in staying]
        return entries[:past] + new

    places = all(not isinstance(entry, list) for row in held for entry in row)
    return [
        left(own, True, staying, len(chunk)) if places else [left(head, False, staying, len(chunk)) for head in own]
        for own, staying, chunk in zip(held, kept, slots, strict=True)
    ]


def _softmax(values: list[float], allowed: list[bool]) -> list[float]:
    """Rows that may attend to nothing spread evenly; no rule depends on them."""
    if not any(allowed):
        return [1 / len(values)] * len(values)
    top = max(value for value, ok in zip(values, allowed, strict=True) if ok)
    powers = [math.exp(value - top) if ok else 0.0 for value, ok in zip(values, allowed, strict=True)]
    return [power / sum(powers) for power in powers]


def _weights(
    query: Row, keys: list[Row], scale: float, said: list[Any], cap: float = 0.0, temperature: float = 1.0
) -> list[float]:
    """`said`: of each key whether it may be seen, or what is added to its logit."""
    logits = [sum(a * b for a, b in zip(query, key, strict=True)) * scale for key in keys]
    if cap:
        logits = [math.tanh(logit / cap) * cap for logit in logits]
    if any(isinstance(word, float) for word in said):
        logits, said = [logit + word for logit, word in zip(logits, said, strict=True)], [True] * len(said)
    return _softmax([logit / temperature for logit in logits], said)


def _allowed(mask: Any, b: int, h: int, q: int, keys: int) -> list[Any]:
    if mask is None:
        return [True] * keys
    sample = mask[b if len(mask) > 1 else 0]
    return sample[h if len(sample) > 1 else 0][q]


def attention_score(
    query: Any, key: Any, mask: Any, rows: list[Row], columns: Any, scale: float, heads: str, cap: float = 0.0
) -> list[Row]:
    result = []
    for b, sample in enumerate(query):
        used = [row for row in rows[b] if row >= 0]
        received = []
        for h, head in enumerate(sample):
            keys = key[b][h * len(key[b]) // len(sample)]
            paid = [_weights(head[row], keys, scale, _allowed(mask, b, h, row, len(keys)), cap) for row in used]
            received.append([sum(row[n] for row in paid) / max(1, len(used)) for n in range(len(keys))])
        if heads == "joined":
            received = [_joined(sample, key[b], mask, b, used, scale, cap)]
        pooled = []
        for values in zip(*received, strict=True):
            mean = sum(values) / len(values)
            pooled.append({"mean": mean, "joined": mean, "sum": sum(values), "max": max(values)}[heads])
        taken = [[pooled[column] for column in group if column >= 0] for group in columns[b]]
        result.append([sum(values) / max(1, len(values)) for values in taken])
    return result


def attend_score(query: Any, key: Any, queries: list[Row], keys: list[Row], *rest: Any) -> list[Row]:
    return attention_score(query, key, attention_mask(queries, keys, 0), *rest)


def _joined(sample: Any, key: Any, mask: Any, b: int, used: Row, scale: float, cap: float) -> Row:
    """What `used` rows pay on average when all heads are one."""
    heads, number = len(sample), len(key[0])
    keys = [[x for h in range(heads) for x in key[h * len(key) // heads][n]] for n in range(number)]
    paid = []
    for row in used:
        masks = [_allowed(mask, b, h, row, number) for h in range(heads)]
        query = [x for head in sample for x in head[row]]
        strictest = [min(column) for column in zip(*masks, strict=True)]
        paid.append(_weights(query, keys, scale / heads**0.5, strictest, cap))
    return [sum(row[n] for row in paid) / max(1, len(used)) for n in range(number)]


def attention(query: Any, key: Any, value: Any, mask: Any, scale: float, softcap: float) -> Any:
    result = []
    for b, sample in enumerate(query):
        heads = []
        for h, head in enumerate(sample):
            group = h * len(key[b]) // len(sample)
            keys, values, rows = key[b][group], value[b][group], []
            columns = list(zip(*values, strict=True))
            for q, row in enumerate(head):
                weights = _weights(row, keys, scale, _allowed(mask, b, h, q, len(keys)), softcap)
                rows.append([sum(w * v for w, v in zip(weights, column, strict=True)) for column in columns])
            heads.append(rows)
        result.append(heads)
    return result


def packed_attention(query: Any, key: Any, value: Any, boundaries: list[int], scale: float) -> Any:
    length = len(query[0][0])
    segment = [sum(place >= edge for edge in boundaries[1:]) for place in range(length)]
    mask = [[[[segment[q] == segment[k] for k in range(length)] for q in range(length)]]]
    return attention(query, key, value, mask, scale, 0.0)


def _length(vector: Row, order: float = 2.0) -> float:
    return sum(abs(x) ** order for x in vector) ** (1 / order)


def _cosine(a: Row, b: Row) -> float:
    lengths = _length(a) * _length(b)
    return sum(x * y for x, y in zip(a, b, strict=True)) / lengths if lengths else 0.0


def cosine_score(feature: Any, anchor: Any, valid: list[Row]) -> list[Row]:
    result = []
    for rows, anchors, used in zip(feature, anchor, valid, strict=True):
        kept = [row for row, ok in zip(anchors, used, strict=True) if ok]
        mean = [sum(column) / max(1, len(kept)) for column in zip(*kept, strict=True)] or [0.0] * len(rows[0])
        result.append([_cosine(row, mean) for row in rows])
    return result


def norm_score(vector: Any, order: float) -> list[Row]:
    return [[_length(row, order) for row in rows] for rows in vector]


def random_score(ordinal: list[Row], seed: int) -> list[Row]:
    """The rounds in Python's exact integers, the constants drawn by the published splitmix64."""
    prime, word, state, drawn = 16777199, 2**64 - 1, seed, []
    while len(drawn) < 6:
        state = (state + 0x9E3779B97F4A7C15) & word
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & word
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & word
        drawn.append((z ^ (z >> 31)) % (prime - 1) + 1)

    def number(x: int) -> float:
        x += 1
        for i in range(0, 6, 2):
            x = pow(drawn[i] * x + drawn[i + 1], 3, prime)
        return x / 2**24

    return [[number(x) for x in row] for row in ordinal]


def uniform_score(ordinal: list[Row]) -> list[Row]:
    return [[1 - int(f"{max(x, 0) % 2**20:020b}"[::-1], 2) / 2**20 for x in row] for row in ordinal]


def normalize_score(score: list[Row], segment: list[Row], mode: str) -> list[Row]:
    result = []
    for values, scopes in zip(score, segment, strict=True):
        known = [v for v, s in zip(values, scopes, strict=True) if s >= 0 and not math.isnan(v)]
        row = []
        for value, scope in zip(values, scopes, strict=True):
            if scope < 0:
                row.append(0.0)
            elif mode == "none" or math.isnan(value):
                row.append(value)
            elif mode == "minmax":
                row.append((value - min(known)) / (max(known) - min(known)) if max(known) > min(known) else 0.0)
            elif mode == "softmax":
                row.append(math.exp(value - max(known)) / sum(math.exp(v - max(known)) for v in known))
            else:
                whole = sum(abs(v) for v in known)
                row.append(value / whole if whole else 0.0)
        result.append(row)
    return result


def _pad(index: Row, slots: int) -> Row:
    return [-1] * (slots - len(index)) + sorted(index)


def _members(scopes: Row, scope: int) -> Row:
    return [v for v, s in enumerate(scopes) if s == scope]


def _budget(size: int, permille: int, count: int) -> int:
    if count >= 0:
        return min(size, count) if count else size * permille // 1000
    rounded = (math.floor, round, math.ceil)[-count % 3]  # `round` goes to the even one of two
    return rounded(fractions.Fraction(size * permille, -count // 3))


def _best(members: Row, values: Row, number: int) -> Row:
    def rank(v: int) -> tuple[float, int]:
        return (-(NAN_LAST if math.isnan(values[v]) else values[v]), v)

    return sorted(members, key=rank)[:number]


def top_keep(
    score: list[Row], segment: list[Row], counts: list[Row], permille: int, count: int, slots: int
) -> list[Row]:
    result = []
    for values, scopes, sizes in zip(score, segment, counts, strict=True):
        kept: Row = []
        for scope, size in enumerate(sizes):
            members = _members(scopes, scope)
            assert len(members) == size
            kept += _best(members, values, _budget(size, permille, count))
        result.append(_pad(kept, slots))
    return result


def stride_keep(segment: list[Row], counts: list[Row], permille: int, count: int, slots: int) -> list[Row]:
    result = []
    for scopes, sizes in zip(segment, counts, strict=True):
        kept: Row = []
        for scope, n in enumerate(sizes):
            k = _budget(n, permille, count)
            kept += [_members(scopes, scope)[(2 * i + 1) * n // (2 * k)] for i in range(k)]
        result.append(_pad(kept, slots))
    return result


def threshold_keep(
    score: list[Row], segment: list[Row], counts: list[Row], threshold: float, relative: bool
) -> list[Row]:
    rows = []
    for values, scopes, sizes in zip(score, segment, counts, strict=True):
        kept: Row = []
        for scope in range(len(sizes)):
            members = [v for v in _members(scopes, scope) if not math.isnan(values[v])]
            if relative and members:
                best = max(values[v] for v in members)
                bar = best * (threshold if best >= 0 else 2 - threshold)
                kept += [v for v in members if values[v] >= bar]
            else:
                kept += [v for v in members if values[v] > threshold]
        rows.append(kept)
    return [_pad(row, max(len(row) for row in rows)) for row in rows]


def score_gate(score: list[Row], segment: list[Row], reduce: str, threshold: float, above: bool) -> list[bool]:
    result = []
    for values, scopes in zip(score, segment, strict=True):
        known = [v for v, s in zip(values, scopes, strict=True) if s >= 0 and not math.isnan(v)]
        if not known:
            result.append(False)
            continue
        value = {"max": max(known), "sum": sum(known), "mean": sum(known) / len(known)}[reduce]
        result.append(value > threshold if above else value < threshold)
    return result


def exit_keep(gate: list[bool], segment: list[Row]) -> list[Row]:
    stay = [[v for v, s in enumerate(row) if s >= 0 and not leaves] for leaves, row in zip(gate, segment, strict=True)]
    return [_pad(row, len(segment[0]) if any(stay) else 0) for row in stay]


def _merge_targets(left: Row, values: Row, targets: str, amount: int) -> Row:
    if targets == "top":
        return _best(left, values, amount)
    return left[:: max(1, len(left) // amount)][:amount]


def _merged(own: Row, own_size: float, rows: list[Row], sizes: Row, reduce: str) -> Row:
    if not rows:
        return own
    if reduce == "mean":
        return [(x + sum(column)) / (1 + len(rows)) for x, column in zip(own, zip(*rows, strict=True), strict=True)]
    if reduce == "target_mean":
        return [x + sum(column) / len(rows) for x, column in zip(own, zip(*rows, strict=True), strict=True)]
    if reduce == "halving":
        for row in rows:
            own = [(x + y) / 2 for x, y in zip(own, row, strict=True)]
        return own
    whole = own_size + sum(sizes)
    weighed = [[size * x for x in row] for row, size in zip(rows, sizes, strict=True)]
    return [(own_size * x + sum(c)) / whole for x, c in zip(own, zip(*weighed, strict=True), strict=True)]


def merge_nearest(
    feature: Any,
    metric: Any,
    size: list[Row],
    segment: list[Row],
    counts: list[Row],
    chosen: list[Row],
    score: list[Row],
    targets: str,
    amount: int,
    slots: int,
    reduce: str,
    permille: int = 0,
    within: float = 2.0,
) -> Any:
    indices, features, sizes = [], [], []
    # Without a token the lists cannot tell the width; the case without one has 6.
    width = max((len(row) for rows in feature for row in rows), default=6)
    for b, scopes in enumerate(segment):
        kept = [v for v in chosen[b] if v >= 0]
        into: dict[int, Row] = {}
        for scope in range(len(counts[b])):
            left = [v for v in _members(scopes, scope) if v not in kept]
            if targets == "kept":
                goals = [v for v in kept if scopes[v] == scope]
            else:
                number = amount or counts[b][scope] * permille // 1000
                goals = sorted(_merge_targets(left, score[b], targets, number)) if number else []
            into.update({goal: [] for goal in goals})
            for v in left:
                if goals and v not in goals:
                    # max returns the first of equals: the lowest index.
                    goal = max(goals, key=lambda goal, v=v: _cosine(metric[b][v], metric[b][goal]))
                    if within == 2.0 or 1 - _cosine(metric[b][v], metric[b][goal]) <= within:
                        into[goal].append(v)
        total = len(chosen[b]) + (0 if targets == "kept" else slots)
        index = _pad(sorted({*kept, *into}), total)
        indices.append(index)
        rows, row_sizes = [], []
        for v in index:
            members = into.get(v, [])
            if v < 0:
                rows.append([0.0] * width)
                row_sizes.append(0.0)
                continue
            parts, part_sizes = [feature[b][m] for m in members], [size[b][m] for m in members]
            rows.append(_merged(feature[b][v], size[b][v], parts, part_sizes, reduce))
            row_sizes.append(size[b][v] + sum(part_sizes))
        features.append(rows)
        sizes.append(row_sizes)
    return indices, features, sizes


def attention_runs(places: list[Row]) -> Any:
    """Starts of the pads and of the tokens of each sample, all samples in a row, and the end."""
    length, starts = len(places[0]), []
    for b, own in enumerate(places):
        starts += [b * length, b * length + sum(place < 0 for place in own)]
    return [*starts, len(places) * length]


def attend(
    query: Any, key: Any, value: Any, now: list[Row], places: list[Row], runs: list[int] | None, scale: float
) -> Any:
    return attention(query, key, value, attention_mask(now, places, 0), scale, 0.0)


ORACLES = {
    function.__name__: function
    for function in (
        attend,
        attention,
        attention_mask,
        attention_runs,
        attend_score,
        attention_score,
        shorten,
        restore,
        evict,
        cosine_score,
        exit_keep,
        merge_nearest,
        norm_score,
        normalize_score,
        packed_attention,
        random_score,
        score_gate,
        stride_keep,
        threshold_keep,
        top_keep,
        uniform_score,
    )
}
