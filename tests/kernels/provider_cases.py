"""Arguments that the providers of ops are tested with, beside each op's own cases: odd sizes, ties, pads, strides."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

Case = tuple[str, tuple[Any, ...]]


def scopes(batch: int, visual: int, number: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(segment, counts) of tokens that fall into `number` segments anyhow, some of them pads."""
    segment = torch.randint(-1, number, (batch, visual), generator=torch.Generator().manual_seed(seed))
    return segment, torch.stack([(segment == n).sum(1) for n in range(number)], 1)


def one_scope(batch: int, visual: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(batch, visual, dtype=torch.int64), torch.full((batch, 1), visual)


def pads_alone(batch: int, visual: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((batch, visual), -1), torch.zeros(batch, 2, dtype=torch.int64)


def strided(values: torch.Tensor) -> torch.Tensor:
    """The same numbers, with every axis of the memory in the opposite order and a gap behind each row."""
    axes = tuple(reversed(range(values.dim())))
    wide = torch.empty(*(2 * size for size in (values.shape[a] for a in axes)), dtype=values.dtype)
    view = wide[tuple(slice(None, None, 2) for _ in axes)].permute(axes)
    return view.copy_(values)


def features(visual: int) -> torch.Tensor:
    """Wider than a stretch of channels, but for sizes that take the interpreter long enough as they are."""
    return torch.randn(2, visual, 130 if visual < 100 else 3)


def signs(visual: int) -> torch.Tensor:
    """Directions whose cosines are exact in every dtype, in whatever order they are summed; many of them are equal."""
    return torch.randint(0, 2, (2, visual, 16)) * 2.0 - 1.0


def top_keep(sizes: tuple[int, ...]) -> Iterator[Case]:
    for visual in sizes:
        segment, counts = scopes(2, visual, 3, seed=visual)
        levels = torch.randint(-3, 4, (2, visual)).float()
        levels[torch.rand(2, visual) < 0.1] = float("nan")
        levels[torch.rand(2, visual) < 0.1] = -0.0
        levels[torch.rand(2, visual) < 0.1] = float("-inf")
        yield f"V{visual}-levels", (levels, segment, counts, 333, 0, visual)
        yield f"V{visual}-one-scope", (torch.randn(2, visual), *one_scope(2, visual), 0, 5, 5)
    score, (segment, counts) = torch.randn(2, 63), scopes(2, 63, 2, seed=1)
    for rounding in range(3):
        yield f"fraction-{rounding}", (score, segment, counts, 5, -(3 * 14 + rounding), 63)
        yield f"tenths-{rounding}", (score, segment, counts, 999, -(3 * 1000 + rounding), 63)
    yield "none-stay", (score, segment, counts, 1, 0, 3)
    yield "all-pads", (score, *pads_alone(2, 63), 500, 0, 4)
    yield "strided", (strided(score), strided(segment), strided(counts), 500, 0, 63)
    yield "no-visual-token", (score[:, :0], segment[:, :0], counts[:, :0], 0, 4, 4)


def attention_score(sizes: tuple[int, ...]) -> Iterator[Case]:
    for length in sizes:
        for rows, heads in ((1, "mean"), (2, "joined"), (40, "sum"), (40, "max"), (70, "joined")):
            query, key = torch.randn(2, 4, 3, 24), torch.randn(2, 2, length, 24)
            mask = torch.rand(2, 1, 3, length) > 0.3
            mask[:, :, 0] = False  # a row that may attend to nothing
            columns = torch.randint(-1, length, (2, 5, 3))
            which = torch.randint(-1, 3, (2, rows))
            yield f"N{length}-R{rows}-{heads}", (query, key, mask, which, columns, 24**-0.5, heads)
    query, key = torch.randn(2, 7, 4, 80).transpose(1, 2), torch.randn(2, 7, 2, 80).transpose(1, 2)
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool).expand(1, 1, 7, 7)
    rows, columns = torch.tensor([[-1, 6], [2, 6]]), torch.arange(7)[None, :, None].expand(2, 7, 1)
    yield "transposed", (query, key, mask, rows, columns, 80**-0.5, "mean")
    yield "strided", (strided(query), strided(key), None, rows, columns, 80**-0.5, "max")
    yield "all-pads", (query, key, mask, torch.full((2, 3), -1), torch.full((2, 7, 1), -1), 1.0, "mean")
    yield "no-visual-token", (query, key, mask, rows, columns[:, :0], 1.0, "mean")


def pagerank_score(sizes: tuple[int, ...]) -> Iterator[Case]:
    for length in sizes:
        queries = (length + 1) // 2  # the others are in the cache
        query, key = torch.randn(2, 4, queries, 24), torch.randn(2, 2, length, 24)
        mask = torch.rand(2, 1, queries, length) > 0.3
        mask[:, :, :1] = False  # a row that may attend to nothing
        rows = torch.where(torch.rand(2, queries) < 0.2, -1, torch.arange(queries))
        columns = torch.randint(-1, length, (2, 5, 3))
        yield f"N{length}", (query, key, mask, rows, columns, 24**-0.5, 0.5, 3)
    query, key = torch.randn(2, 2, 9, 8), torch.randn(2, 1, 9, 8)
    rows, columns = torch.arange(9).repeat(2, 1), torch.arange(9)[None, :, None].repeat(2, 1, 1)
    yield "sharp", (query, key, torch.ones(9, 9, dtype=torch.bool).tril()[None, None], rows, columns, 1.0, 0.1, 5)
    yield "no-mask", (strided(query), strided(key), None, strided(rows), strided(columns), 1.0, 0.5, 1)
    yield "all-pads", (query, key, None, torch.full((2, 4), -1), columns, 1.0, 0.5, 2)
    yield "no-rows", (query, key, None, rows[:, :0], columns, 1.0, 0.5, 2)


def attend(sizes: tuple[int, ...]) -> Iterator[Case]:
    for length in sizes:
        for heads, groups, width, depth in ((4, 4, 24, 24), (7, 1, 64, 40)):
            query, key = torch.randn(2, heads, 1, width), torch.randn(2, groups, length, width)
            places = torch.randint(-1, 3 * length, (2, length))
            places[:, 0] = 0  # at least one key may be seen
            now = torch.tensor([[3 * length], [-1]])  # everything, and a pad
            given = (now, places, None, width**-0.5)
            yield f"N{length}-H{heads}-G{groups}", (query, key, torch.randn(2, groups, length, depth), *given)
            late = (torch.tensor([[0], [3 * length]]), places, None, width**-0.5)  # most parts hold no key that counts
            yield f"N{length}-H{heads}-late", (query, key, torch.randn(2, groups, length, depth), *late)
    query, key, value = torch.randn(2, 6, 1, 24), torch.randn(2, 2, 40, 24), torch.randn(2, 2, 40, 16)
    places = torch.arange(40).expand(2, 40)
    yield "strided", (strided(query), strided(key), strided(value), places[:, -1:], strided(places), None, 0.2)
    yield "first-token", (query, key[:, :, :1], value[:, :, :1], places[:, :1], places[:, :1], None, 0.2)


def attention_runs(sizes: tuple[int, ...]) -> Iterator[Case]:
    for length in sizes:
        places = torch.arange(length).repeat(3, 1)
        places[1, : length // 3], places[2] = -1, -1
        yield f"N{length}", (places,)
        yield f"N{length}-strided", (strided(places),)
    yield "no-keys", (torch.zeros(2, 0, dtype=torch.int64),)


def attend_score(sizes: tuple[int, ...]) -> Iterator[Case]:
    for name, (query, key, _, rows, columns, scale, heads) in attention_score(sizes):
        length, past = key.shape[2], key.shape[2] - query.shape[2]
        if past < 0:
            continue
        places = torch.arange(length).repeat(len(query), 1) * 2
        places[0, : length // 4] = -1
        yield name, (query, key, places[:, past:].clone(), places, rows, columns, scale, heads)
        if length == sizes[0] and length < 100:
            yield (
                f"{name}-places-strided",
                (query, key, *map(strided, (places[:, past:], places)), rows, columns, scale, heads),
            )


def shorten(sizes: tuple[int, ...]) -> Iterator[Case]:
    for total in sizes:
        places = torch.stack([torch.randperm(2 * total)[:total].sort().values for _ in range(2)])
        slots, picked = torch.arange(total).expand(2, total), torch.rand(total) < 0.7
        text, visual = slots[:, ~picked].clone(), slots[:, picked].clone()
        text[1, : text.shape[1] // 3], visual[0, : visual.shape[1] // 2] = -1, -1
        segment, counts = scopes(2, visual.shape[1], 3, seed=total)
        keep = torch.rand(visual.shape[1]) < 0.4
        chosen = torch.arange(visual.shape[1])[keep].expand(2, -1).clone()
        chosen = torch.where(visual.gather(1, chosen) < 0, -1, chosen)
        residual, merged = torch.randn(2, total, 70), torch.randn(2, chosen.shape[1], 70)
        chunk = (places, text, visual, segment, counts, visual * 3)
        yield f"S{total}", (chosen, residual, None, places * 2, *chunk)
        yield f"S{total}-merged", (chosen, residual, merged, places * 2, *chunk)
        turned = strided(torch.stack([places, places + 1, places * 2]))
        others = tuple(strided(value) for value in chunk)
        yield f"S{total}-strided", (strided(chosen), strided(residual), strided(merged), turned, *others)
    many, none = torch.arange(20)[None], torch.zeros(1, 0, dtype=torch.int64)
    each = torch.eye(20, dtype=torch.int64).sum(0)[None]
    wide = (torch.randn(1, 21, 600), None, torch.arange(21)[None], torch.arange(21)[None])
    yield "a-segment-a-token", (many[:, ::3].clone(), *wide, many[:, :1] + 20, many, many, each, many)
    yield "no-visual-token", (none, *wide, torch.arange(21)[None], none, none, none, none)
    yield "pads-without-tokens", (torch.full((1, 3), -1), *wide, torch.arange(21)[None], none, none, none, none)


def merge_nearest(sizes: tuple[int, ...]) -> Iterator[Case]:
    for visual in sizes:
        segment, counts = scopes(2, visual, 2, seed=visual)
        chosen = torch.where(segment[:, ::5] < 0, -1, torch.arange(0, visual, 5)).sort().values
        for kind, metric in (("random", torch.randn(2, visual, 9)), ("tied", signs(visual))):
            plain = (features(visual), metric, torch.rand(2, visual) + 0.5, segment, counts, chosen)
            yield f"V{visual}-{kind}-stride", (*plain, torch.zeros(2, visual), "stride", 4, 8, "target_mean")
        yield f"V{visual}-tied-kept", (*plain, torch.zeros(2, visual), "kept", 0, 0, "size_weighted")
    segment, counts = pads_alone(2, 6)
    pads = (torch.randn(2, 6, 4), torch.randn(2, 6, 4), torch.ones(2, 6), segment, counts, torch.full((2, 3), -1))
    yield "all-pads", (*pads, torch.zeros(2, 6), "top", 2, 4, "mean")
    some = (strided(torch.randn(2, 6, 4)), strided(torch.randn(2, 6, 4)), strided(torch.ones(2, 6)), *one_scope(2, 6))
    yield "strided", (*some, strided(torch.tensor([[1, 4], [0, 5]])), torch.randn(2, 6), "top", 2, 2, "mean")


def bipartite_merge(sizes: tuple[int, ...]) -> Iterator[Case]:
    for visual in sizes:
        size, gone = torch.rand(2, visual) + 0.5, visual // 3
        plain = (features(visual), torch.randn(2, visual, 9), size)
        yield f"V{visual}", (*plain, *scopes(2, visual, 2, seed=visual), 700, 0, visual, "size_weighted", False)
        tied = (features(visual), signs(visual), size, *one_scope(2, visual))
        yield f"V{visual}-tied-whole", (*tied, 0, gone, visual - gone, "mean", True)
    pads = (torch.randn(2, 6, 4), torch.randn(2, 6, 4), torch.ones(2, 6), *pads_alone(2, 6))
    yield "all-pads", (*pads, 500, 0, 3, "mean", False)
    some = (strided(torch.randn(2, 6, 4)), strided(torch.randn(2, 6, 4)), strided(torch.ones(2, 6)), *one_scope(2, 6))
    yield "strided", (*some, 0, 2, 4, "size_weighted", True)


def _greedy(arguments: Callable[[int], tuple[Any, ...]], sizes: tuple[int, ...]) -> Iterator[Case]:
    for visual in sizes:
        yield f"V{visual}", (*arguments(visual), *scopes(2, visual, 2, seed=visual), 0, 6, 12)
        yield f"V{visual}-one-scope", (*arguments(visual), *one_scope(2, visual), 0, 9, 9)
    yield "every-token", (*arguments(21), *one_scope(2, 21), 1000, 0, 21)
    yield "all-pads", (*arguments(6), *pads_alone(2, 6), 500, 0, 3)
    moved = tuple(strided(a) if torch.is_tensor(a) else a for a in (*arguments(21), *scopes(2, 21, 2, seed=0)))
    yield "strided", (*moved, 0, 4, 8)
    yield "nearest", (*arguments(21), *scopes(2, 21, 2, seed=0), 500, -3001, 21)


def _directions(visual: int) -> torch.Tensor:
    """Half of them duplicates of the other half, and some without a direction."""
    feature = torch.randn(2, visual, 24)
    feature[:, visual // 2 :] = feature[:, : visual - visual // 2]
    feature[:, ::17] = 0.0
    return feature


def max_min_keep(sizes: tuple[int, ...]) -> Iterator[Case]:
    yield from _greedy(lambda visual: (_directions(visual),), sizes)


def max_sum_keep(sizes: tuple[int, ...]) -> Iterator[Case]:
    yield from _greedy(lambda visual: (_directions(visual), torch.randn(2, visual)), sizes)


def log_det_keep(sizes: tuple[int, ...]) -> Iterator[Case]:
    yield from _greedy(lambda visual: (_directions(visual), torch.rand(2, visual)), sizes)


def coverage_keep(sizes: tuple[int, ...]) -> Iterator[Case]:
    for name, arguments in _greedy(lambda visual: (_directions(visual),), sizes):
        feature, segment, counts, *budget = arguments
        text, valid = torch.randn(2, 5, 24), torch.rand(2, 5) > 0.3
        yield name, (feature, text, valid, segment, counts, 0.3, 0.4, 0.5, *budget)


def density_keep(sizes: tuple[int, ...]) -> Iterator[Case]:
    for visual in sizes:
        score, several, one = torch.randn(2, visual), scopes(2, visual, 3, seed=visual), one_scope(2, visual)
        yield f"V{visual}", (features(visual), score, *several, 600, 0, 0.9)
        yield f"V{visual}-tied", (signs(visual), torch.zeros(2, visual), *one, 700, 0, 0.625)
        yield f"V{visual}-copies", (_directions(visual), score, *one, 0, 40, 0.5)
    metric, score, (segment, counts) = torch.randn(2, 21, 7), torch.randn(2, 21), scopes(2, 21, 2, seed=0)
    yield "every-token", (metric, score, *one_scope(2, 21), 1000, 0, 1e-3)
    yield "one-centre", (metric, score, segment, counts, 1000, 0, 2.5)
    endless = metric.index_fill(1, torch.tensor([3, 8]), float("inf"))
    yield "not-finite", (endless, score, *one_scope(2, 21), 1000, 0, 0.5)
    lowest = torch.where(torch.rand(2, 21) < 0.5, float("nan"), float("-inf"))
    yield "lowest-scores", (metric, lowest, *one_scope(2, 21), 300, 0, 0.5)
    for rounding in range(3):
        yield f"fraction-{rounding}", (metric, score, segment, counts, 5, -(3 * 7 + rounding), 0.5)
    yield "no-pool", (metric, score, segment, counts, 1, 0, 0.5)
    yield "all-pads", (metric, score, *pads_alone(2, 21), 500, 0, 0.5)
    yield "strided", (*(strided(a) for a in (metric, score, segment, counts)), 700, 0, 0.5)


def merge_clusters(sizes: tuple[int, ...]) -> Iterator[Case]:
    def given(feature: torch.Tensor, scope: tuple[torch.Tensor, torch.Tensor], permille: int, per: int) -> Any:
        visual, number = feature.shape[1], scope[1].shape[1]
        chosen = torch.where(scope[0][:, ::9] < 0, -1, torch.arange(0, visual, 9)).sort().values
        room = visual * permille // 1000 + number
        plain = (feature, torch.rand(2, visual) + 0.5, *scope, chosen, torch.randn(2, visual))
        return (*plain, permille, per, room, room // per + number)

    for visual in sizes:
        several = scopes(2, visual, 2, seed=visual)
        yield f"V{visual}", given(features(visual), several, 700, 10)
        yield f"V{visual}-copies", given(_directions(visual), several, 500, 4)
        yield f"V{visual}-far-off", given(torch.randn(2, visual, 5) + 30.0, one_scope(2, visual), 900, 7)
    yield "two-tiles", given(torch.randn(2, 90, 5), one_scope(2, 90), 1000, 6)
    yield "mutual-neighbours", given(torch.randn(2, 40, 5), one_scope(2, 40), 1000, 40)
    yield "all-pads", given(torch.randn(2, 21, 5), pads_alone(2, 21), 500, 5)
    moved = given(torch.randn(2, 40, 5), scopes(2, 40, 2, seed=1), 600, 5)
    yield "strided", tuple(strided(a) if torch.is_tensor(a) else a for a in moved)


def medoids_keep(sizes: tuple[int, ...]) -> Iterator[Case]:
    for name, arguments in _greedy(lambda visual: (_directions(visual),), sizes):
        yield name, (*arguments, 100)
    for visual in sizes:
        segment, counts = scopes(2, visual, 3, seed=visual)
        # Of so many channels that rounding to a half type makes no two distances equal.
        yield f"V{visual}-far-off", (torch.randn(2, visual, 16) + 30.0, segment, counts, 100, 0, visual // 10, 2)
    yield "two-tiles", (torch.randn(2, 70, 5), *scopes(2, 70, 2, seed=0), 0, 4, 8, 100)
    # Each segment is a token between two others, as far from the one as from the other up to rounding.
    middle, off, segment = torch.randn(2, 21, 7), torch.randn(2, 21, 7), torch.arange(21).repeat(2, 3)
    between = torch.cat([middle, middle - off, middle + off], 1)
    yield "between", (between, segment, torch.full((2, 21), 3), 0, 2, 42, 100)
    # Of each segment two tokens have the same sum up to rounding.
    cross = torch.cat([middle - off, middle + off, middle - 2.0 * off.roll(1, 2), middle + 2.0 * off.roll(1, 2)], 1)
    yield "crosses", (cross, torch.arange(21).repeat(2, 4), torch.full((2, 21), 4), 0, 1, 21, 100)
    yield "copies", (torch.ones(2, 21, 3), *one_scope(2, 21), 0, 4, 4, 100)
    endless = torch.randn(2, 21, 3).index_fill(1, torch.tensor([2, 9]), float("inf"))
    yield "not-finite", (endless, *one_scope(2, 21), 0, 4, 4, 100)
    yield "start", (torch.randn(2, 21, 3), *scopes(2, 21, 2, seed=3), 0, 3, 6, 0)
    yield "none-stay", (torch.randn(2, 21, 3), *one_scope(2, 21), 1, 0, 0, 100)


def segment_pool(sizes: tuple[int, ...]) -> Iterator[Case]:
    for visual in sizes:
        for name, heads, (segment, counts) in (
            ("several", 2, scopes(2, visual, 3, seed=visual)),
            ("one-scope", 1, one_scope(2, visual)),
        ):
            chosen = torch.where(segment[:, ::3] < 0, -1, torch.arange(0, visual, 3)).sort().values
            logits = 4.0 * torch.randn(2, heads, visual, 5)
            yield f"V{visual}-{name}", (logits, torch.randn(2, visual, 70 * heads), segment, counts, chosen)
    logits, value, scope = torch.randn(2, 2, 21, 3), torch.randn(2, 21, 8), scopes(2, 21, 2, seed=2)
    logits[:, :, ::2] = torch.finfo(torch.float32).min
    chosen = torch.where(scope[0][:, ::4] < 0, -1, torch.arange(0, 21, 4))  # pads between tokens
    yield "lowest-logits", (logits, value, *scope, chosen)
    yield "all-pads", (logits, value, *pads_alone(2, 21), torch.full((2, 3), -1))
    yield "strided", tuple(strided(a) for a in (torch.randn(2, 2, 21, 3), value, *scope, chosen))


def _frames(visual: int, length: int) -> tuple[torch.Tensor, ...]:
    """(segment, counts, frame, place) of two videos a sample and the pads in front of them; frames have a length."""
    index = torch.stack([torch.arange(visual), torch.arange(visual) - visual // 4])  # the second starts behind pads
    segment = torch.where(index < 0, -1, (index >= visual // 2).long())
    place = torch.where(index < visual // 2, index, index - visual // 2)
    frame = place // length + torch.where(segment == 1, (visual // 2 + length - 1) // length, 0)
    counts = torch.stack([(segment == n).sum(1) for n in range(2)], 1)
    return segment, counts, torch.where(index < 0, -1, frame), torch.where(index < 0, -1, place % length)


def change_score(sizes: tuple[int, ...]) -> Iterator[Case]:
    for visual in sizes:
        for window in (0, 4):
            yield f"V{visual}-window{window}", (torch.randn(2, visual, 300), *_frames(visual, 7), window)
    yield "longer-than-a-tile", (torch.randn(2, 40, 6), *_frames(40, 5), 3)
    still = torch.randn(2, 1, 6).repeat(1, 40, 1).index_fill(1, torch.tensor([6, 30]), 0.0)
    yield "still", (still.index_fill(1, torch.tensor([13, 22]), float("inf")), *_frames(40, 5), 0)
    pads = torch.full((2, 21), -1)
    yield "all-pads", (torch.randn(2, 21, 6), *pads_alone(2, 21), pads, pads, 4)
    yield "strided", (*(strided(a) for a in (torch.randn(2, 40, 6), *_frames(40, 5))), 4)


def threshold_keep(sizes: tuple[int, ...]) -> Iterator[Case]:
    for visual in sizes:
        several, levels = scopes(2, visual, 3, seed=visual), torch.randint(-4, 5, (2, visual)) / 4.0
        levels[torch.rand(2, visual) < 0.1] = float("nan")
        yield f"V{visual}-above", (levels, *several, 0.25, False)
        yield f"V{visual}-share", (levels, *several, 0.5, True)
        yield f"V{visual}-below-zero", (levels - 3.0, *several, 0.5, True)
        yield f"V{visual}-one-scope", (torch.randn(2, visual), *one_scope(2, visual), 0.3, True)
    score, endless = torch.randn(2, 21), torch.full((2, 21), float("-inf"))
    yield "none-passes", (score, *one_scope(2, 21), 9.0, False)
    yield "no-number", (score * float("nan"), *one_scope(2, 21), 0.5, True)
    yield "lowest-scores", (endless, *one_scope(2, 21), 0.5, True)
    yield "highest-scores", (torch.where(score > 0, -endless, score), *one_scope(2, 21), 0.5, True)
    yield "all-pads", (score, *pads_alone(2, 21), -9.0, False)
    yield "no-visual-token", (score[:, :0], *one_scope(2, 0), 0.5, True)
    yield "strided", (*(strided(a) for a in (score, *scopes(2, 21, 2, seed=5))), 0.5, True)


def window_merge(sizes: tuple[int, ...]) -> Iterator[Case]:
    for visual in sizes:
        feature, several = features(visual) + 0.5, scopes(2, visual, 2, seed=visual)
        rows = torch.full((2, visual), 5)
        yield f"V{visual}-side2", (feature, torch.rand(2, visual) + 0.5, *several, rows, 2, 0.2)
        yield f"V{visual}-side3", (feature, torch.rand(2, visual) + 0.5, *one_scope(2, visual), rows + 2, 3, 0.1)
        ragged = torch.where(several[0] == 1, 6, rows)
        yield f"V{visual}-ragged", (feature, torch.rand(2, visual) + 0.5, *several, ragged, 2, 0.2)
    plain, six = (torch.randn(2, 42, 5), torch.rand(2, 42) + 0.5), torch.full((2, 42), 6)
    yield "side1", (*plain, *one_scope(2, 42), six, 1, -0.1)
    yield "side5", (*plain, *one_scope(2, 42), six, 5, -1.0)
    yield "longer-rows-than-tokens", (*plain, *one_scope(2, 42), six + 44, 2, -1.0)
    yield "all-pads", (*plain, *pads_alone(2, 42), six, 2, -1.0)
    endless = plain[0].index_fill(1, torch.tensor([3, 20]), float("nan"))
    yield "not-finite", (endless, plain[1], *one_scope(2, 42), six, 2, 0.0)
    yield "strided", (*(strided(a) for a in (*plain, *scopes(2, 42, 2, seed=6), six - 1)), 2, 0.0)


def novelty_score(sizes: tuple[int, ...]) -> Iterator[Case]:
    for visual in sizes:
        yield f"V{visual}", (torch.randn(2, visual, 300), *_frames(visual, 7)[:3])
        yield f"V{visual}-one-channel", (torch.randn(2, visual, 1), *_frames(visual, 11)[:3])
        memory = (torch.randn(2, 300), torch.tensor([0, 4]))
        yield f"V{visual}-remembered", (torch.randn(2, visual, 300), *_frames(visual, 7)[:3], *memory)
    endless = torch.randn(2, 40, 7).index_fill(1, torch.tensor([6, 30]), float("inf"))
    yield "not-finite", (endless, *_frames(40, 5)[:3])
    yield "all-pads", (torch.randn(2, 21, 6), *pads_alone(2, 21), torch.full((2, 21), -1))
    yield "strided", tuple(strided(a) for a in (torch.randn(2, 40, 7), *_frames(40, 5)[:3]))


def sized(cases: Iterable[Case]) -> Iterator[Case]:
    """Those of the cases whose names start with a size."""
    return (case for case in cases if re.match(r"[VNS]\d", case[0]))


def _of_another_dtype(name: str) -> Iterator[Case]:
    """Arguments in float64."""
    double, scope = torch.randn(1, 3, 4, dtype=torch.float64), one_scope(1, 3)
    number, places, rows = double[..., 0], torch.arange(3)[None], torch.tensor([[2]])
    none = torch.zeros(1, 0, dtype=torch.int64)
    query, key = torch.randn(1, 2, 3, 8, dtype=torch.float64), torch.randn(1, 1, 3, 8, dtype=torch.float64)
    made: dict[str, tuple[Any, ...]] = {
        "attend": (query[:, :, :1], key, key, places[:, :1], places, None, 1.0),
        "attend_score": (query, key, places, places, rows, places[:, :, None], 1.0, "mean"),
        "attention_score": (query, key, None, rows, places[:, :, None], 1.0, "mean"),
        "bipartite_merge": (double, double, number, *scope, 500, 0, 2, "mean", False),
        "change_score": (double, *scope, places, torch.zeros_like(places), 0),
        "density_keep": (double, number, *scope, 500, 0, 0.5),
        "medoids_keep": (double, *scope, 0, 1, 1, 100),
        "merge_clusters": (double, number, *scope, none, number, 300, 10, 1, 1),
        "merge_nearest": (double, double, number, *scope, rows, number, "kept", 0, 0, "mean"),
        "novelty_score": (double, *scope, places),
        "pagerank_score": (query, key, None, rows, places[:, :, None], 1.0, 0.5, 2),
        "segment_pool": (double[:, None], double, *scope, rows),
        "shorten": (none, double, None, *[places] * 3, none, none, none, none),
        "threshold_keep": (number, *scope, 0.5, False),
        "top_keep": (number, *scope, 500, 0, 1),
        "window_merge": (double, number, *scope, places + 1, 2, 0.0),
    }
    if name in made:
        yield "float64", made[name]


def refused(name: str) -> Iterator[Case]:
    """Arguments that the op takes and its provider does not."""
    yield from _of_another_dtype(name)
    column = torch.arange(3)[None, :, None]
    query, key = torch.randn(1, 2, 3, 8), torch.randn(1, 1, 3, 8)
    rows, scope, many = torch.tensor([[2]]), one_scope(1, 3), one_scope(1, 8193)
    places = torch.arange(3)[None]
    if name == "attend":
        yield "many-queries", (query, key, key, places, places, torch.tensor([0, 0, 3], dtype=torch.int32), 1.0)
        wide = (torch.randn(1, 1, 1, 300), torch.randn(1, 1, 3, 300), torch.randn(1, 1, 3, 8))
        yield "wide", (*wide, places[:, :1], places, None, 1.0)
    if name == "attention_score":
        yield "wide", (torch.randn(1, 1, 3, 300), torch.randn(1, 1, 3, 300), None, rows, column, 1.0, "mean")
        yield "many-keys", (query, key, None, rows, torch.zeros(1, 2, 65, dtype=torch.int64), 1.0, "mean")
    if name == "pagerank_score":
        yield "wide", (torch.randn(1, 1, 3, 300), torch.randn(1, 1, 3, 300), None, rows, column, 1.0, 0.5, 2)
    if name == "merge_clusters":
        none, pool = torch.zeros(1, 0, dtype=torch.int64), (1000, 20000, 16386, 1)
        yield "many", (torch.randn(1, 3, 2), torch.ones(1, 3), *scope, none, torch.randn(1, 3), *pool)
    if name == "merge_nearest":
        single = torch.randn(1, 3, 4)
        yield "halving", (single, single, single[..., 0], *scope, rows, single[..., 0], "kept", 0, 0, "halving")
    if name == "bipartite_merge":
        long = torch.randn(1, 4097, 2)
        yield "many", (long, long, long[..., 0].abs(), *one_scope(1, 4097), 500, 0, 2049, "mean", False)
    if name == "density_keep":
        yield "many", (torch.randn(1, 16385, 1), torch.rand(1, 16385), *one_scope(1, 16385), 1000, 0, 0.5)
        yield "many-samples", (torch.zeros(33, 16384, 1), torch.zeros(33, 16384), *one_scope(33, 16384), 1000, 0, 0.5)
    if name == "max_min_keep":
        yield "many", (torch.randn(1, 8193, 2), *many, 0, 1, 1)
        yield "many-samples", (torch.randn(5, 8000, 1), *one_scope(5, 8000), 0, 1, 1)
    if name == "medoids_keep":
        yield "many", (torch.randn(1, 8193, 2), *many, 0, 1, 1, 100)
        yield "many-samples", (torch.randn(5, 8000, 1), *one_scope(5, 8000), 0, 1, 1, 100)
    if name in ("max_sum_keep", "log_det_keep"):
        yield "many", (torch.randn(1, 8193, 2), torch.rand(1, 8193), *many, 0, 1, 1)
    if name == "coverage_keep":
        text = (torch.randn(1, 2, 2), torch.ones(1, 2, dtype=torch.bool))
        # On as many sizes alone as a refusal needs: a matrix of coverings would fill the memory.
        segment, given = torch.zeros(1, 1, dtype=torch.int64).expand(1, 16385), (0.3, 0.4, 0.5, 0, 1, 1)
        counts = torch.zeros(1, 200, dtype=torch.int64)
        yield "many-segments", (torch.randn(1, 1537, 2), *text, segment[:, :1537], counts, *given)
        yield "many", (torch.randn(1, 1, 2).expand(1, 16385, 2), *text, segment, counts, *given)


EXTRA: dict[str, Callable[..., Iterator[Case]]] = {
    made.__name__: made
    for made in (
        attend,
        attend_score,
        attention_runs,
        attention_score,
        bipartite_merge,
        change_score,
        coverage_keep,
        density_keep,
        log_det_keep,
        max_min_keep,
        max_sum_keep,
        medoids_keep,
        merge_clusters,
        merge_nearest,
        novelty_score,
        pagerank_score,
        segment_pool,
        shorten,
        threshold_keep,
        top_keep,
        window_merge,
    )
}
