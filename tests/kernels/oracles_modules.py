"""Oracles of the ops that trained modules are made of."""

from __future__ import annotations

import math
from typing import Any

from kernel_oracles import ORACLES, Row, _best, _pad


def _gelu(x: float) -> float:
    return x * 0.5 * (1 + math.erf(x / math.sqrt(2)))


def _dot(one: Row, other: Row) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


def _even(row: Row) -> Row:
    return [x / math.sqrt(_dot(row, row) / len(row) + 1e-6) for x in row]


def text_states(text: Any, asked: list[list[bool]]) -> list[Any]:
    result = []
    for words, wanted in zip(text, asked, strict=True):
        rows = [row for row, ok in zip(words, wanted, strict=True) if ok]
        if not rows:
            width = len(words[0]) if words else 4
            result.append([[0.0] * width] * 2)
            continue
        before = rows[:-1] or rows
        result.append([[sum(column) / len(before) for column in zip(*before, strict=True)], rows[-1]])
    return result


def mlp_score(
    visual: Any, states: Any, visual_weight: Any, text_weight: Any, bias: Row, score_weight: Any, score_bias: Row
) -> list[Row]:
    result = []
    for b, tokens in enumerate(visual):
        scores = []
        for token in tokens:
            hidden = [_dot(w, _even(token)) + extra for w, extra in zip(visual_weight, bias, strict=True)]
            if states is not None:
                hidden = [x + _dot(w, _even(states[b])) for x, w in zip(hidden, text_weight, strict=True)]
            scores.append(_dot(score_weight[0], [_gelu(x) for x in hidden]) + score_bias[0])
        result.append(scores)
    return result


def exit_logits(states: Any, hidden_weight: Any, route_weight: Any) -> list[Row]:
    result = []
    for mean, last in states:
        hidden = [_gelu(_dot(w, [*mean, *last])) for w in hidden_weight]
        result.append([_dot(w, hidden) for w in route_weight])
    return result


ORACLES.update(text_states=text_states, mlp_score=mlp_score, exit_logits=exit_logits)


def segment_pool(logits: Any, value: Any, segment: list[Row], counts: list[Row], chosen: list[Row]) -> Any:
    result = []
    for b, places in enumerate(chosen):
        heads, rows, seen = len(logits[b]), [], dict.fromkeys(range(len(counts[b])), 0)
        for place in places:
            width = len(value[b][0]) if value[b] else 0
            if place < 0:
                rows.append([0.0] * width)
                continue
            own = segment[b][place]
            number, seen[own] = seen[own], seen[own] + 1
            members, row = [v for v, s in enumerate(segment[b]) if s == own], []
            for head in range(heads):
                most = max(logits[b][head][v][number] for v in members)
                powers = [math.exp(logits[b][head][v][number] - most) for v in members]
                for d in range(head * width // heads, (head + 1) * width // heads):
                    pairs = zip(powers, members, strict=True)
                    row.append(sum(p * value[b][v][d] for p, v in pairs) / sum(powers))
            rows.append(row)
        result.append(rows)
    return result


ORACLES["segment_pool"] = segment_pool


def _softmax(logits: Row) -> Row:
    powers = [math.exp(x - max(logits)) for x in logits]
    return [power / sum(powers) for power in powers]


def cross_score(query: Any, key: Any, asked: list[list[bool]], seen: list[list[bool]]) -> list[Row]:
    result = []
    for b, heads in enumerate(query):
        tokens = [v for v, ok in enumerate(seen[b]) if ok]
        best = [0.0] * len(seen[b])
        for h, words in enumerate(heads):
            keys = key[b][h * len(key[b]) // len(heads)]
            for t, word in enumerate(words):
                if asked[b][t] and tokens:
                    shares = _softmax([_dot(word, keys[v]) / math.sqrt(len(word)) for v in tokens])
                    for v, share in zip(tokens, shares, strict=True):
                        best[v] = max(best[v], share)
        result.append(best)
    return result


def share_states(score: list[Row], segment: list[Row], counts: list[Row]) -> Any:
    result = []
    for b, numbers in enumerate(counts):
        rows = []
        for scope, number in enumerate(numbers):
            values = [max(0.0, x) for x, s in zip(score[b], segment[b], strict=True) if s == scope]
            total = sum(values)
            shares = [x / total for x in values if x > 0] if total else []
            entropy = -sum(share * math.log(share) for share in shares)
            rows.append([math.log(max(1, number)), max(values, default=0.0), entropy])
        result.append(rows)
    return result


def numbered_keep(score: list[Row], segment: list[Row], counts: list[Row], number: list[Row]) -> list[Row]:
    kept = []
    for b, scopes in enumerate(segment):
        own = [
            v
            for scope, most in enumerate(number[b])
            for v in _best([v for v, s in enumerate(scopes) if s == scope], score[b], most)
        ]
        kept.append(own)
    return [_pad(own, max(map(len, kept))) for own in kept]


def segment_attention(query: Any, key: Any, value: Any, own: list[Row], segment: list[Row]) -> Any:
    result = []
    for b, places in enumerate(own):
        rows: list[Row] = []
        for k, scope in enumerate(places):
            row: Row = []
            for h, words in enumerate(query[b]):
                group = h * len(key[b]) // len(query[b])
                members = [v for v, s in enumerate(segment[b]) if s == scope >= 0]
                logits = [_dot(words[k], key[b][group][v]) / math.sqrt(len(words[k])) for v in members]
                shares = _softmax(logits)
                for d in range(len(words[k])):
                    pairs = zip(shares, members, strict=True)
                    row.append(sum((s * value[b][group][v][d] for s, v in pairs), 0.0))
            rows.append(row)
        result.append(rows)
    return result


ORACLES |= {function.__name__: function for function in (cross_score, numbered_keep, segment_attention, share_states)}
