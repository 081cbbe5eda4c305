"""Methods that divide a video into scenes: their papers' formulas on numpy arrays of frames [T, P, D]."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy

Film = numpy.ndarray  # [T, P, D]


def unit(x: numpy.ndarray) -> numpy.ndarray:
    return x / numpy.linalg.norm(x, axis=-1, keepdims=True)


def dpc(x: numpy.ndarray, number: int, k: int) -> tuple[list[int], numpy.ndarray]:
    """DPC-KNN of [n, D]: (the centres, the centre of each); of equally dense tokens the first is denser."""
    apart = (numpy.linalg.norm((x[:, None] - x[None]).astype(float), axis=-1) / math.sqrt(x.shape[1])).round(9)
    density = numpy.exp(-(numpy.sort(apart, axis=1)[:, :k] ** 2).mean(1))
    ahead = numpy.unique(density.round(9), return_inverse=True)[1] * len(x) - numpy.arange(len(x))
    lead = numpy.array([apart[i][ahead > ahead[i]].min(initial=apart.max()) for i in range(len(x))])
    order = numpy.argsort(-(lead * density).round(9), kind="stable")
    if number < len(x):
        within, beyond = (lead * density)[order[number - 1]], (lead * density)[order[number]]
        # Copies behind the first have no lead, and alone a token is as dense as it can be; other ties would be settled
        # by what rounding makes of the products.
        assert within - beyond > 1e-6 or within == 0 or density[order[number - 1]] == 1
    centres = sorted(order[:number].tolist())
    to = numpy.array(centres)[apart[:, centres].argmin(1)]
    to[centres] = centres
    return centres, to


def refine(labels: list[int]) -> list[int]:
    """The lengths of the scenes: each cluster's longest runs, and what goes to them."""
    runs = [[label, len(list(group))] for label, group in itertools.groupby(labels)]
    most = {label: max(length for one, length in runs if one == label) for label, _ in runs}
    scenes: list[list[int]] = []  # length of the run that stays, length with what joined it
    waiting = 0
    for label, length in runs:
        if length < 2 or length < most[label]:
            waiting += length
            continue
        if scenes and scenes[-1][0] >= length:
            scenes[-1][1] += waiting
            scenes.append([length, length])
        else:
            scenes.append([length, length + waiting])
        waiting = 0
    if not scenes:
        return [len(labels)]
    scenes[-1][1] += waiting
    return [total for _, total in scenes]


def scenes_by_clusters(x: Film) -> list[int]:
    labels = dpc(x.mean(1), max(1, int(len(x) * 0.25)), 7)[1].tolist()
    return refine(labels)


def spans(lengths: list[int]) -> list[tuple[int, int]]:
    ends = list(itertools.accumulate(lengths))
    return list(zip([0, *ends[:-1]], ends, strict=True))


def prunevid(x: Film, still: float, share: float = 0.5) -> dict[int, tuple[numpy.ndarray, int]]:
    places, left = x.shape[1], {}

    def put(tokens: list[tuple[int, numpy.ndarray, int]]) -> None:
        if len(tokens) <= 14:
            left.update({index: (row, size) for index, row, size in tokens})
            return
        number = max(1, int(len(tokens) * share))
        # The published share of a half leaves 7 clusters or more.
        centres, to = dpc(numpy.stack([row for _, row, _ in tokens]), number, min(7, number))
        for c in centres:
            members = [tokens[i] for i in range(len(tokens)) if to[i] == c]
            mean = numpy.mean([row for _, row, _ in members], axis=0)
            left[tokens[c][0]] = (mean, sum(size for _, _, size in members))

    for start, end in spans(scenes_by_clusters(x)):
        window, frames = x[start:end], end - start
        near = numpy.einsum("wpd,tpd->pwt", unit(window), unit(window))
        pairs = near.sum((1, 2)) - near.trace(axis1=1, axis2=2)
        rests = pairs / (frames * (frames - 1)) > still if frames > 1 else numpy.zeros(places, bool)
        put([(start * places + p, window[:, p].mean(0), frames) for p in range(places) if rests[p]])
        for t in range(frames):
            put([((start + t) * places + p, window[t, p], 1) for p in range(places) if not rests[p]])
    return left


def windows(x: Film, still: float) -> list[int]:
    """HoliTom's scenes: frame by frame, the windows that save most; of equals a frame of its own, then the shortest."""
    found: list[tuple[int, list[int]]] = [(0, [])]
    for end in range(1, len(x) + 1):
        most, made = found[end - 1][0], [*found[end - 1][1], 1]
        for wide in range(2, end + 1):
            before, lengths = found[end - wide]
            if before + saved(x, end - wide, end, still) > most:
                most, made = before + saved(x, end - wide, end, still), [*lengths, wide]
        found.append((most, made))
    return found[-1][1]


def saved(x: Film, start: int, end: int, still: float) -> int:
    """Tokens that a window [start, end) saves."""
    near = (unit(x[start : end - 1]) * unit(x[start + 1 : end])).sum(-1) > still
    return (end - start - 1) * int(near.all(0).sum())


def holitom(x: Film, windows: list[int], still: float, keep: float, blend: float) -> dict[int, tuple[Any, int]]:
    places, left, groups = x.shape[1], {}, []
    for start, end in spans(windows):
        window = x[start:end]
        near = (unit(window[:-1]) * unit(window[1:])).sum(-1) > still
        rests = near.all(0) if end - start > 1 else numpy.zeros(places, bool)
        groups.append(
            (True, [(start * places + p, window[:, p].mean(0), end - start) for p in range(places) if rests[p]])
        )
        for t in range(start, end):
            groups.append((False, [(t * places + p, x[t, p], 1) for p in range(places) if not rests[p]]))
    total, alive = x.shape[0] * places, sum(len(tokens) for _, tokens in groups)
    share = min(keep / (alive / total), 1.0)
    for rests, tokens in groups:
        n = len(tokens)
        if not n:
            continue
        number = max(1, round(n * share) if rests else math.ceil(round(n * share, 9)))
        centres, to = dpc(numpy.stack([row for _, row, _ in tokens]), number, min(7, number))
        for c in centres:
            others = [i for i in range(n) if to[i] == c != i]
            row = tokens[c][1]
            if others:
                row = blend * row + (1 - blend) * numpy.mean([tokens[i][1] for i in others], axis=0)
            left[tokens[c][0]] = (row, tokens[c][2] + sum(tokens[i][2] for i in others))
    return left


def fastvid(
    x: Film, attention: numpy.ndarray, scenes: int, below: float, salient: int, context: int
) -> dict[int, tuple[Any, float]]:
    """x [T, P, D], attention [T, P]; token -> (row, size)."""
    frames, places, _ = x.shape
    means = unit(x.mean(1))
    near = (means[:-1] * means[1:]).sum(1)
    cuts = set(numpy.argsort(near, kind="stable")[: scenes - 1].tolist()) | set(
        numpy.flatnonzero(near < below).tolist()
    )
    ends = [*sorted(cut + 1 for cut in cuts), frames]
    best = [set(numpy.argsort(-attention[t], kind="stable")[:salient].tolist()) for t in range(frames)]
    left: dict[int, tuple[Any, float]] = {t * places + p: (x[t, p], 1.0) for t in range(frames) for p in best[t]}
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        rest = [(t, p) for t in range(start, end) for p in range(places) if p not in best[t]]
        if not rest:
            continue
        rows = numpy.stack([x[t, p] for t, p in rest])
        anchored = list(range(end - 1, start - 1, -4))
        for t in anchored:
            own = [p for one, p in rest if one == t]
            number = context * (end - start) // len(anchored)
            if not number:
                continue
            anchors = [own[c] for c in dpc(x[t, own], number, 4)[0]]
            to = (unit(rows) @ unit(x[t, anchors]).T).round(9).argmax(1)
            to[[rest.index((t, p)) for p in anchors]] = range(len(anchors))  # an anchor goes to itself
            for number, p in enumerate(anchors):
                members = rows[to == number]
                weight = max(1 / (len(members) + 1), 0.6)
                left[t * places + p] = (weight * x[t, p] + (1 - weight) * members.mean(0), len(members) / len(anchored))
    return left
