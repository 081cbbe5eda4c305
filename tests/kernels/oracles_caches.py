"""What caches hold of frames and of visual keys, and attention to these, by loops over plain lists."""

from __future__ import annotations

import math
from typing import Any

from kernel_oracles import ORACLES, Row, _softmax


def whole_chunks(frame: list[Row], score: list[Row] | None, size: int, first: int, last: int, best: int) -> Any:
    made = []
    for b, frames in enumerate(frame):
        chunks = sorted({f // size for f in frames if f >= 0})
        stays = {c for c in chunks if c < first or c > chunks[-1] - last}
        if score:
            means = {}
            for c in chunks:
                own = [s for s, f in zip(score[b], frames, strict=True) if f >= 0 and f // size == c]
                mean = sum(own) / len(own)
                means[c] = -math.inf if math.isnan(mean) else mean
            stays |= set(sorted(chunks, key=lambda c: (-means[c], c))[:best])
        made.append([f >= 0 and f // size in stays for f in frames])
    return made


def pool_entries(query: list[Row], visual: list[Row], frame: list[Row], whole: list[Row], tokens: int) -> Any:
    groups = []
    for b, positions in enumerate(query):
        shown = {slot: v for v, slot in enumerate(visual[b]) if slot >= 0}
        own: list[Row] = []
        filling: dict[int, Row] = {}  # the run of each frame that has room
        for slot, position in enumerate(positions):
            if position < 0:
                continue
            v = shown.get(slot)
            if v is None or whole[b][v]:
                own.append([slot])
                continue
            run = filling.get(frame[b][v])
            if run is None or len(run) == tokens:
                run = filling[frame[b][v]] = []
                own.append(run)
            run.append(slot)
        groups.append(own)
    most = max(len(own) for own in groups)
    entry, kept = [], []
    for own, positions in zip(groups, query, strict=True):
        kept.append([-1] * (most - len(own)) + [group[0] for group in own])
        entry.append([next((e for e, group in enumerate(own) if slot in group), -1) for slot in range(len(positions))])
    return entry, kept


def pool_cache(held: Any, entry: list[Row], kept: list[Row]) -> Any:
    made = []
    for heads, own, slots in zip(held, entry, kept, strict=True):
        sample, pads = [], sum(slot < 0 for slot in slots)
        for rows in heads:
            past = len(rows) - len(own)
            new = list(rows[:past])
            for e in range(len(slots)):
                members = [rows[past + slot] for slot, place in enumerate(own) if 0 <= place == e - pads]
                width = len(rows[0])
                new.append([sum(m[d] for m in members) / len(members) if members else 0.0 for d in range(width)])
            sample.append(new)
        made.append(sample)
    return made


def unrotated_keys(key: Any, raw_key: Any, visual: list[Row]) -> Any:
    made = [[list(rows) for rows in heads] for heads in key]
    for b, slots in enumerate(visual):
        for group, rows in enumerate(made[b]):
            for slot in (slot for slot in slots if slot >= 0):
                rows[slot] = raw_key[b][group][slot]
    return made


def unrotated_attention(
    query: Any, key: Any, value: Any, mask: Any, raw_query: Any, raw_key: Any, raw: Any, scale: float, softcap: float
) -> Any:
    def logit(b: int, h: int, q: int, n: int) -> float:
        group = h * len(key[b]) // len(query[b])
        queries, keys = (raw_query, raw_key) if raw[b][0][q][n] else (query, key)
        found = sum(one * other for one, other in zip(queries[b][h][q], keys[b][group][n], strict=True)) * scale
        return math.tanh(found / softcap) * softcap if softcap else found

    def row(b: int, h: int, q: int) -> Row:
        values = value[b][h * len(value[b]) // len(query[b])]
        weights = _softmax([logit(b, h, q, n) for n in range(len(values))], mask[b][0][q])
        return [sum(w * v for w, v in zip(weights, column, strict=True)) for column in zip(*values, strict=True)]

    return [[[row(b, h, q) for q in range(len(rows))] for h, rows in enumerate(heads)] for b, heads in enumerate(query)]


ORACLES |= {
    function.__name__: function
    for function in (whole_chunks, pool_entries, pool_cache, unrotated_keys, unrotated_attention)
}
