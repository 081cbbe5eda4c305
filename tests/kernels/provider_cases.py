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


def compact(sizes: tuple[int, ...]) -> Iterator[Case]:
    for total in sizes:
        order = torch.stack([torch.randperm(2 * total)[:total].sort().values for _ in range(2)])
        picked = torch.rand(total) < 0.5
        text, visual = order[:, picked].clone(), order[:, ~picked].clone()
        text[1, : text.shape[1] // 3], visual[0, : visual.shape[1] // 2] = -1, -1
        yield f"S{total}", (text, visual)
        yield f"S{total}-strided", (strided(text), strided(visual))
    yield "unsorted", (torch.tensor([[9, 3, -1]]), torch.tensor([[4, -1, 0]]))
    yield "nothing", (torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2, 0, dtype=torch.int64))


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


def sized(cases: Iterable[Case]) -> Iterator[Case]:
    """Those of the cases whose names start with a size."""
    return (case for case in cases if re.match(r"[VNS]\d", case[0]))


def refused(name: str) -> Iterator[Case]:
    """Arguments that the op takes and its provider does not."""
    column = torch.arange(3)[None, :, None]
    query, key = torch.randn(1, 2, 3, 8), torch.randn(1, 1, 3, 8)
    rows, scope = torch.tensor([[2]]), one_scope(1, 3)
    places = torch.arange(3)[None]
    double = torch.randn(1, 3, 4, dtype=torch.float64)
    if name == "attend":
        yield "many-queries", (query, key, key, places, places, torch.tensor([0, 0, 3], dtype=torch.int32), 1.0)
        yield "float64", (query[:, :, :1].double(), key.double(), key.double(), places[:, :1], places, None, 1.0)
        wide = (torch.randn(1, 1, 1, 300), torch.randn(1, 1, 3, 300), torch.randn(1, 1, 3, 8))
        yield "wide", (*wide, places[:, :1], places, None, 1.0)
    if name == "top_keep":
        yield "float64", (torch.randn(1, 3, dtype=torch.float64), *scope, 500, 0, 1)
    if name == "attention_score":
        yield "float64", (query.double(), key.double(), None, rows, column, 1.0, "mean")
        yield "wide", (torch.randn(1, 1, 3, 300), torch.randn(1, 1, 3, 300), None, rows, column, 1.0, "mean")
        yield "many-keys", (query, key, None, rows, torch.zeros(1, 2, 65, dtype=torch.int64), 1.0, "mean")
    if name == "compact":
        yield "many", (torch.arange(4500)[None], torch.arange(4500, 9000)[None])
    if name == "merge_nearest":
        single = double.float()
        yield "halving", (single, single, single[..., 0], *scope, rows, single[..., 0], "kept", 0, 0, "halving")
        yield "float64", (double, double, double[..., 0], *scope, rows, double[..., 0], "kept", 0, 0, "mean")
    if name == "bipartite_merge":
        yield "float64", (double, double, double[..., 0], *scope, 500, 0, 2, "mean", False)
        long = torch.randn(1, 4097, 2)
        yield "many", (long, long, long[..., 0].abs(), *one_scope(1, 4097), 500, 0, 2049, "mean", False)
    many = one_scope(1, 8193)
    if name == "max_min_keep":
        yield "many", (torch.randn(1, 8193, 2), *many, 0, 1, 1)
        yield "many-samples", (torch.randn(5, 8000, 1), *one_scope(5, 8000), 0, 1, 1)
    if name in ("max_sum_keep", "log_det_keep"):
        yield "many", (torch.randn(1, 8193, 2), torch.rand(1, 8193), *many, 0, 1, 1)
    if name == "coverage_keep":
        text = (torch.randn(1, 2, 2), torch.ones(1, 2, dtype=torch.bool))
        yield "many", (torch.randn(1, 1537, 2), *text, *one_scope(1, 1537), 0.3, 0.4, 0.5, 0, 1, 1)


EXTRA: dict[str, Callable[..., Iterator[Case]]] = {
    made.__name__: made
    for made in (
        attend,
        attention_score,
        bipartite_merge,
        compact,
        coverage_keep,
        log_det_keep,
        max_min_keep,
        max_sum_keep,
        merge_nearest,
        top_keep,
    )
}
