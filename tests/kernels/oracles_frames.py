"""What ops over the frames of videos mean, as loops over Python numbers; see oracles.py."""

from __future__ import annotations

import math
from typing import Any

from kernel_oracles import ORACLES, Row

NEW = 255.0


def _unit(row: Row) -> Row:
    length = math.sqrt(sum(x * x for x in row))
    return [x / length if length > 1e-12 else 0.0 for x in row]


def _videos(segment: Row, frame: Row) -> dict[int, list[list[int]]]:
    """Segment -> its frames in order, each the indices of its tokens."""
    found: dict[int, dict[int, list[int]]] = {}
    for index, (video, number) in enumerate(zip(segment, frame, strict=True)):
        if video >= 0:
            found.setdefault(video, {}).setdefault(number, []).append(index)
    return {video: [frames[number] for number in sorted(frames)] for video, frames in found.items()}


def change_score(feature: Any, segment: Any, counts: Any, frame: Any, place: Any, window: int) -> list[Row]:
    result = []
    for rows, videos, numbers in zip(feature, segment, frame, strict=True):
        units, row = [_unit(one) for one in rows], [0.0] * len(rows)
        for frames in _videos(videos, numbers).values():
            for j, tokens in enumerate(frames):
                earlier = j - 1
                if window:
                    earlier = -1 if j % window == 0 else (j - 1 if j % window % 2 else j - 2)
                for p, token in enumerate(tokens):
                    row[token] = NEW
                    if earlier >= 0 and p < len(frames[earlier]):
                        other = units[frames[earlier][p]]
                        row[token] = 1 - sum(a * b for a, b in zip(units[token], other, strict=True))
        result.append(row)
    return result


def novelty_score(
    feature: Any, segment: Any, counts: Any, frame: Any, total: Any = None, earlier: Any = None
) -> list[Row]:
    result = []
    for b, (rows, videos, numbers) in enumerate(zip(feature, segment, frame, strict=True)):
        row = [0.0] * len(rows)
        if total is not None:  # one video, whatever is shown; of the frames before it each is their mean
            videos = [min(video, 0) for video in videos]
        for frames in _videos(videos, numbers).values():
            memory: list[Row] = []
            if total is not None:
                memory = [[x / earlier[b] for x in total[b]] for _ in range(earlier[b])]
            for tokens in frames:
                columns = list(zip(*(rows[token] for token in tokens), strict=True))
                mean = [sum(column) / len(column) for column in columns]
                varies = [sum((x - m) ** 2 for x in column) for column, m in zip(columns, mean, strict=True)]
                # Rounding makes equal variances differ in the last bits.
                channels = sorted(range(len(varies)), key=lambda c: (round(varies[c], 9), c))
                channels = channels[: max(1, len(channels) // 2)]
                memory.append(mean)
                units = {token: _unit([rows[token][c] for c in channels]) for token in tokens}
                middle = [sum(unit[i] for unit in units.values()) / len(tokens) for i in range(len(channels))]
                past = _unit([sum(one[c] for one in memory) / len(memory) for c in channels])
                for token, unit in units.items():
                    row[token] = -_alike(unit, middle) - _alike(unit, past)
        result.append(row)
    return result


def frame_memory(feature: Any, frame: Any, total: Any, frames: Any) -> tuple[list[Row], Row]:
    sums, counts = [list(row) for row in total], list(frames)
    for b, (rows, numbers) in enumerate(zip(feature, frame, strict=True)):
        for number in set(numbers) - {-1}:
            tokens = [row for row, own in zip(rows, numbers, strict=True) if own == number]
            sums[b] = [
                s + sum(column) / len(tokens) for s, column in zip(sums[b], zip(*tokens, strict=True), strict=True)
            ]
            counts[b] += 1
    return sums, counts


def remember(before: Any, after: Any, visual_index: list[Row]) -> list[Any]:
    return [
        new if any(slot >= 0 for slot in own) else old
        for old, new, own in zip(before, after, visual_index, strict=True)
    ]


def _alike(a: Row, b: Row) -> float:
    apart = sum((x - y) ** 2 for x, y in zip(a, b, strict=True))
    return sum(math.exp(-apart / (2 * width)) for width in (1 / 8, 1 / 4, 1 / 2, 1, 2))


def frames_keep(
    score: Any,
    segment: Any,
    counts: Any,
    frame: Any,
    permille: int,
    count: int,
    together: bool,
    window: int,
    open_ends: bool,
) -> list[Row]:
    def budget(number: int) -> int:
        return min(count, number) if count else number * permille // 1000

    rows = []
    for values, videos, numbers in zip(score, segment, frame, strict=True):
        values = [float("-inf") if math.isnan(value) else value for value in values]
        kept: set[int] = set()
        for frames in _videos(videos, numbers).values():
            if together:
                tokens = [token for one in frames for token in one]
                room = max(budget(len(tokens)), max(map(len, frames)))
                kept |= set(sorted(tokens, key=lambda t: (-values[t], t))[:room])
            for j, tokens in enumerate(frames):
                best = sorted(tokens, key=lambda t: (-values[t], t))
                if not together:
                    kept |= set(best[: max(1, budget(len(tokens)))])
                if window and j % window == 0:
                    kept |= set(tokens)
            if window and open_ends:
                for j, tokens in enumerate(frames):
                    if j % 2 == 0 and j >= len(frames) - 2:
                        kept |= set(tokens)
                if len(frames) % 2 and len(frames) > 1:
                    kept -= set(frames[-1])
        rows.append(sorted(kept))
    width = max(map(len, rows))
    return [[-1] * (width - len(row)) + row for row in rows]


def every_keep(segment: Any, counts: Any, frame: Any, step: int) -> list[Row]:
    rows = [
        [token for frames in _videos(videos, numbers).values() for one in frames[::step] for token in one]
        for videos, numbers in zip(segment, frame, strict=True)
    ]
    width = max(map(len, rows))
    return [[-1] * (width - len(row)) + sorted(row) for row in rows]


def frame_windows(
    feature: Any,
    size: Any,
    segment: Any,
    counts: Any,
    frame: Any,
    place: Any,
    columns: Any,
    group: int,
    near: int,
    far: int,
    over: int,
) -> tuple[Any, Any, Any]:
    made = []
    for b, frames in enumerate(frame):
        windows: dict[tuple[int, ...], Row] = {}
        for v, f in enumerate(frames):
            if f < 0:
                continue
            before = min(g for g, s in zip(frames, segment[b], strict=True) if s == segment[b][v])
            opening = f - (f - before) % over
            if [columns[b][w] for w, g in enumerate(frames) if g == opening] != [
                columns[b][w] for w, g in enumerate(frames) if g == f
            ]:
                opening = f
            side = far if (opening - before) % group else near
            row, column = divmod(place[b][v], columns[b][v])
            windows.setdefault((opening, row // side, column // side), []).append(v)
        left = {}
        for tokens in windows.values():
            weight = sum(size[b][v] for v in tokens)
            rows = zip(*([size[b][v] * x for x in feature[b][v]] for v in tokens), strict=True)
            left[tokens[0]] = ([sum(row) / weight for row in rows], weight)
        made.append(dict(sorted(left.items())))
    width = max(map(len, made))
    depth = len(feature[0][0]) if feature[0] else 3
    index = [[-1] * (width - len(left)) + list(left) for left in made]
    values = [[[0.0] * depth] * (width - len(left)) + [row for row, _ in left.values()] for left in made]
    return index, values, [[0.0] * (width - len(left)) + [weight for _, weight in left.values()] for left in made]


ORACLES["frame_windows"] = frame_windows
ORACLES |= {"change_score": change_score, "novelty_score": novelty_score, "frames_keep": frames_keep}
ORACLES["every_keep"] = every_keep
ORACLES |= {"frame_memory": frame_memory, "remember": remember}
