"""What ops over the scenes of videos mean, as loops over Python numbers; see oracles.py."""

from __future__ import annotations

import itertools
import math
from typing import Any

from kernel_oracles import ORACLES, Row


def _unit(row: Row) -> Row:
    length = math.sqrt(sum(x * x for x in row))
    return [x / length if length > 1e-12 else 0.0 for x in row]


def _dot(a: Row, b: Row) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def _mean(rows: list[Row]) -> Row:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def _videos(segment: Row, frame: Row) -> list[list[list[int]]]:
    """The frames of each segment in order, each the indices of its tokens."""
    found: dict[int, dict[int, list[int]]] = {}
    for index, (video, number) in enumerate(zip(segment, frame, strict=True)):
        if video >= 0:
            found.setdefault(number, {}).setdefault(video, []).append(index)
    videos: dict[int, list[list[int]]] = {}
    for number in sorted(found):
        ((video, tokens),) = found[number].items()
        videos.setdefault(video, []).append(tokens)
    return list(videos.values())


def _numbered(segment: Row, scenes: list[list[int]]) -> Row:
    """The number of each token's scene, from the tokens of each in order."""
    row = [-1] * len(segment)
    for number, tokens in enumerate(sorted(scenes)):
        for token in tokens:
            row[token] = number
    return row


def _apart(a: Row, b: Row) -> float:
    """Squared distance over D channels, divided by D; copies are at 0."""
    square = sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / len(a)
    return 0.0 if square < 1e-9 else square


def density_peaks(rows: list[Row], number: int, neighbours: int) -> tuple[list[int], list[int]]:
    """(the centres, ascending; the centre of each row) of one group."""
    apart = [[_apart(a, b) for b in rows] for a in rows]
    k = max(1, min(neighbours, len(rows)))
    density = [math.exp(-sum(sorted(row)[:k]) / k) for row in apart]

    def denser(j: int, i: int) -> bool:
        if abs(density[j] - density[i]) <= 1e-6 * max(density[i], density[j]):
            return j < i
        return density[j] > density[i]

    value = []
    for i, row in enumerate(apart):
        ahead = [row[j] for j in range(len(rows)) if denser(j, i)]
        value.append(density[i] * math.sqrt(min(ahead) if ahead else max(map(max, apart))))
    centres = sorted(sorted(range(len(rows)), key=lambda i: (-value[i], i))[:number])
    to = [
        i if i in centres else min(centres, key=lambda c, i=i: (apart[i][c], c)) if centres else i
        for i in range(len(rows))
    ]
    return centres, to


def refined(labels: list[int]) -> list[int]:
    """Where the scenes of labelled frames begin."""
    runs = [(label, list(group)) for label, group in itertools.groupby(range(len(labels)), key=lambda t: labels[t])]
    longest = {label: max(len(run) for other, run in runs if other == label) for label in labels}
    stay = [len(run) == longest[label] > 1 for label, run in runs]
    kept = [(run[0], run[-1], len(run)) for (_, run), ok in zip(runs, stay, strict=True) if ok]
    if not kept:
        return [0]
    begins = [0]
    for (_, end, one), (start, _, other) in itertools.pairwise(kept):
        begins.append(start if one >= other else end + 1)
    return begins


def scene_runs(feature: Any, segment: Any, counts: Any, frame: Any, permille: int, neighbours: int) -> list[Row]:
    result = []
    for rows, videos, numbers in zip(feature, segment, frame, strict=True):
        scenes = []
        for frames in _videos(videos, numbers):
            means = [_mean([rows[token] for token in tokens]) for tokens in frames]
            _, labels = density_peaks(means, max(1, len(frames) * permille // 1000), neighbours)
            begins = [*refined(labels), len(frames)]
            for start, end in itertools.pairwise(begins):
                scenes.append([token for tokens in frames[start:end] for token in tokens])
        result.append(_numbered(videos, scenes))
    return result


def scene_windows(
    feature: Any, segment: Any, counts: Any, frame: Any, place: Any, above: float, longest: int
) -> list[Row]:
    result = []
    for rows, videos, numbers in zip(feature, segment, frame, strict=True):
        units, scenes = [_unit(row) for row in rows], []
        for frames in _videos(videos, numbers):
            for start, end in windows(frames, units, above, longest):
                scenes.append([token for tokens in frames[start:end] for token in tokens])
        result.append(_numbered(videos, scenes))
    return result


def windows(frames: list[list[int]], units: list[Row], above: float, longest: int) -> list[tuple[int, int]]:
    """[start, end) of each scene, by the recursion of the paper."""

    def still(t: int, p: int) -> bool:
        if p >= len(frames[t]) or p >= len(frames[t + 1]):
            return False
        return _dot(units[frames[t][p]], units[frames[t + 1][p]]) > above

    def saves(start: int, last: int) -> int:
        places = max(map(len, frames))
        return (last - start) * sum(all(still(t, p) for t in range(start, last)) for p in range(places))

    saved, window = [0], [0]
    for i in range(len(frames)):
        best, width = saved[i], 1
        for w in range(2, min(i + 1, longest) + 1):
            gain = saved[i + 1 - w] + saves(i - w + 1, i)
            if gain > best:
                best, width = gain, w
        saved.append(best)
        window.append(width)
    found, end = [], len(frames)
    while end:
        found.append((end - window[end], end))
        end -= window[end]
    return found[::-1]


def scene_cuts(feature: Any, segment: Any, counts: Any, frame: Any, scenes: int, below: float) -> list[Row]:
    result = []
    for rows, videos, numbers in zip(feature, segment, frame, strict=True):
        made = []
        for frames in _videos(videos, numbers):
            units = [_unit(_mean([rows[token] for token in tokens])) for tokens in frames]
            # Rounding makes equal cosines differ in the last bits.
            cosine = {t: round(_dot(units[t - 1], units[t]), 6) for t in range(1, len(frames))}
            cuts = set(sorted(cosine, key=lambda t: (cosine[t], t))[: scenes - 1])
            cuts |= {t for t, value in cosine.items() if value < below}
            for start, end in itertools.pairwise([0, *sorted(cuts), len(frames)]):
                made.append([token for tokens in frames[start:end] for token in tokens])
        result.append(_numbered(videos, made))
    return result


def scenes_merge(
    feature: Any,
    size: Any,
    segment: Any,
    counts: Any,
    frame: Any,
    place: Any,
    scene: Any,
    above: float,
    every: bool,
    permille: int,
    whole: bool,
    spare: int,
    neighbours: int,
    blend: float,
) -> Any:
    made = []
    for rows, sizes, videos, numbers, scenes in zip(feature, size, segment, frame, scene, strict=True):
        left: dict[int, tuple[Row, float]] = {}
        for frames in _videos(videos, numbers):
            groups = _groups(frames, rows, sizes, scenes, above, every)
            alive = sum(len(tokens) for _, tokens in groups)
            for moves, tokens in groups:
                n = len(tokens)
                number = n * permille // 1000
                if whole:
                    share = n * permille * sum(map(len, frames)), 1000 * alive
                    number = -(-share[0] // share[1]) if moves else _half_even(*share)
                number = n if n <= spare else min(n, max(1, number))
                left |= _clustered(tokens, number, min(neighbours, number), blend)
        made.append(left)
    return _packed(made, feature)


def _packed(made: list[dict[int, tuple[Row, float]]], feature: Any) -> Any:
    """(index, feature, size), pads in front."""
    width, channels = max(map(len, made)), len(feature[0][0]) if feature[0] else 0
    index, merged, total = [], [], []
    for left in made:
        pads = width - len(left)
        index.append([-1] * pads + sorted(left))
        merged.append([[0.0] * channels] * pads + [left[i][0] for i in sorted(left)])
        total.append([0.0] * pads + [left[i][1] for i in sorted(left)])
    return index, merged, total


def _half_even(top: int, bottom: int) -> int:
    down, over = divmod(top, bottom)
    return down + (2 * over > bottom or (2 * over == bottom and down % 2 == 1))


Group = tuple[bool, list[tuple[int, Row, float]]]  # whether it moves; (place in the sample, values, size) of its tokens


def _groups(
    frames: list[list[int]], rows: list[Row], sizes: Row, scenes: Row, above: float, every: bool
) -> list[Group]:
    """What stands still in each scene and what moves in each frame."""
    groups: list[Group] = []
    for _, members in itertools.groupby(frames, key=lambda tokens: scenes[tokens[0]]):
        window = list(members)
        still = []
        for p in range(len(window[0]) if len(window) > 1 else 0):
            if any(p >= len(tokens) for tokens in window):
                continue
            units = [_unit(rows[tokens[p]]) for tokens in window]
            if every:
                stands = all(_dot(a, b) > above for a, b in itertools.pairwise(units))
            else:
                pairs = [_dot(a, b) for a, b in itertools.permutations(units, 2)]
                stands = sum(pairs) / len(pairs) > above
            if stands:
                still.append(p)
        mean = [
            (window[0][p], _mean([rows[tokens[p]] for tokens in window]), sum(sizes[tokens[p]] for tokens in window))
            for p in still
        ]
        groups.append((False, mean))
        for tokens in window:
            moving = [token for p, token in enumerate(tokens) if p not in still]
            groups.append((True, [(token, rows[token], sizes[token]) for token in moving]))
    return groups


def _clustered(
    tokens: list[tuple[int, Row, float]], number: int, neighbours: int, blend: float
) -> dict[int, tuple[Row, float]]:
    if not tokens:
        return {}
    centres, to = density_peaks([row for _, row, _ in tokens], number, neighbours)
    made = {}
    for c in centres:
        members = [i for i, other in enumerate(to) if other == c]
        others = [tokens[i][1] for i in members if i != c]
        own = tokens[c][1]
        if others and blend:
            own = [blend * x + (1 - blend) * y for x, y in zip(own, _mean(others), strict=True)]
        elif others:
            own = _mean([own, *others])
        made[tokens[c][0]] = (own, sum(tokens[i][2] for i in members))
    return made


def anchor_frames_merge(
    feature: Any,
    size: Any,
    segment: Any,
    counts: Any,
    chosen: Any,
    frame: Any,
    scene: Any,
    every: int,
    permille: int,
    neighbours: int,
    blend: float,
) -> Any:
    made = []
    for rows, sizes, videos, numbers, kept, scenes in zip(feature, size, segment, frame, chosen, scene, strict=True):
        left = {token: (rows[token], sizes[token]) for token in kept if token >= 0}
        for frames in _videos(videos, numbers):
            for _, members in itertools.groupby(frames, key=lambda tokens: scenes[tokens[0]]):
                left |= _anchored(list(members), rows, sizes, set(kept), every, permille, neighbours, blend)
        made.append(left)
    return _packed(made, feature)


def _anchored(
    window: list[list[int]],
    rows: list[Row],
    sizes: Row,
    kept: set[int],
    every: int,
    permille: int,
    neighbours: int,
    blend: float,
) -> dict[int, tuple[Row, float]]:
    """What becomes of the tokens of one scene that were not chosen."""
    frames = [[token for token in tokens if token not in kept] for tokens in window]
    wanted = [t for t in range(len(window)) if (len(window) - 1 - t) % every == 0]
    made: dict[int, tuple[Row, float]] = {}
    for t in wanted:
        number = sum(len(tokens) * permille // 1000 for tokens in window) // len(wanted)
        if not frames[t] or not number:
            continue
        centres, _ = density_peaks([rows[token] for token in frames[t]], number, neighbours)
        anchors = [frames[t][c] for c in centres]
        goes: dict[int, list[int]] = {anchor: [] for anchor in anchors}
        for token in (token for tokens in frames for token in tokens):
            # Rounding makes the cosines of copies differ in the last bits; max returns the first of equals.
            near = {a: round(_dot(_unit(rows[token]), _unit(rows[a])), 6) for a in anchors}
            goes[token if token in anchors else max(anchors, key=lambda a, near=near: near[a])].append(token)
        for anchor, members in goes.items():
            weight = max(1 / (len(members) + 1), blend)
            mean = _mean([rows[token] for token in members])
            row = [weight * x + (1 - weight) * y for x, y in zip(rows[anchor], mean, strict=True)]
            made[anchor] = (row, sum(sizes[token] for token in members) / len(wanted))
    return made


def repeats_merge(
    feature: Any, size: Any, segment: Any, counts: Any, frame: Any, place: Any, room: Any, above: float
) -> Any:
    made = []
    for b, rows in enumerate(feature):
        lines: dict[tuple[int, int], list[int]] = {}
        for token in sorted(range(len(rows)), key=lambda i, b=b: frame[b][i]):
            if segment[b][token] >= 0:
                lines.setdefault((segment[b][token], place[b][token]), []).append(token)
        near = {
            later: _dot(_unit(rows[token]), _unit(rows[later]))
            for line in lines.values()
            for token, later in itertools.pairwise(line)
        }
        joins: set[int] = set()
        for video, number in enumerate(counts[b]):
            alike = [i for i, value in near.items() if value >= above and segment[b][i] == video]
            # Rounding makes the cosines of copies differ in the last bits.
            alike.sort(key=lambda i, near=near: (-round(near[i], 6), i))
            joins |= set(alike[: max(0, number - room[b][video])])
        left = {}
        for line in lines.values():
            runs: list[list[int]] = []
            for token in line:
                if token in joins:
                    runs[-1].append(token)
                else:
                    runs.append([token])
            left |= {run[0]: (_mean([rows[i] for i in run]), sum(size[b][i] for i in run)) for run in runs}
        made.append(left)
    return _packed(made, feature)


ORACLES |= {
    "repeats_merge": repeats_merge,
    "anchor_frames_merge": anchor_frames_merge,
    "scene_cuts": scene_cuts,
    "scene_runs": scene_runs,
    "scene_windows": scene_windows,
    "scenes_merge": scenes_merge,
}
