"""Which encoder tokens each visual token was made from, read off the graph behind the encoder.

A tensor that holds its own token numbers is sent along the path from the last block to the features. Operators that
only move data (views, permutations, slices, indexing) move the numbers the same way, and tokens that are put beside
them (a class token) have the number -1. Where channels are mixed (a linear layer, a norm) every output channel depends
on all channels of its row: the numbers found there are spread over the new channels in blocks, and so are those of a
window where a pooling or a convolution makes one place of it, or of an axis that a mean goes over. At the end, one
number per block names the encoder tokens of each visual token.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
import torch.fx as fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from tvc.errors import SiteError
from tvc.graphs import annotate
from tvc.passes.windows import (
    UNFOLDING,
    WINDOWED,
    block_of_channel,
    share_axis,
    share_windows,
    unfold_windows,
    window,
)

A = torch.ops.aten
_MOVES = {
    A.view.default,
    A._unsafe_view.default,
    A.reshape.default,
    A.permute.default,
    A.transpose.int,
    A.t.default,
    A.slice.Tensor,
    A.select.int,
    A.unsqueeze.default,
    A.squeeze.dim,
    A.squeeze.default,
    A.flatten.using_ints,
    A.unflatten.int,
    A.index.Tensor,
    A.index_select.default,
    A.gather.default,
    A.contiguous.default,
    A.clone.default,
    A.expand.default,
    # Several tensors made of one, and one of these.
    A.split.Tensor,
    A.split_with_sizes.default,
    A.chunk.default,
    A.unbind.int,
    operator.getitem,
}
CASTS = {A.to.dtype, A.to.device, A._to_copy.default, A.alias.default, A.detach.default}


def number_tokens(hidden: torch.Tensor) -> torch.Tensor:
    """Every channel of a token holds the token's number: [n, T, C] or [P, C] int64."""
    axis = hidden.dim() - 2
    numbers = torch.arange(hidden.shape[axis], device=hidden.device).unsqueeze(1)
    return numbers.expand(hidden.shape).contiguous()


def unnumbered(hidden: torch.Tensor) -> torch.Tensor:
    """The number of tokens that are none of those followed, in their shape: -1."""
    return torch.full_like(hidden, -1, dtype=torch.int64)


class Spread(NamedTuple):
    """How numbers lie on an axis of channels: each on `run` next to each other, and all of them `rounds` times.

    Where channels were mixed, every one depends on all numbers, whichever it holds.
    """

    run: int
    rounds: int = 1
    mixed: bool = False

    def count(self, width: int) -> int:
        """How many numbers `width` channels hold."""
        return max(1, width // (self.run * self.rounds))


def mix_channels(numbers: torch.Tensor, count: int, width: int, rounds: int = 1) -> torch.Tensor:
    """[..., C] holding `count` numbers in equal blocks, `rounds` times -> [..., width] holding them in equal blocks."""
    return first_of_blocks(numbers, count, rounds)[..., block_of_channel(count, width, numbers.device)]


def sample_groups(numbers: torch.Tensor, count: int, rounds: int = 1, packed: bool = False) -> torch.Tensor:
    """[n, F, count]: the encoder tokens of each visual token; n is 1 where all are in one row (`packed`)."""
    groups = first_of_blocks(numbers, count, rounds)
    return groups.flatten(0, -2).unsqueeze(0) if packed else groups.flatten(1, -2)


def in_shape_of(features: torch.Tensor, value: torch.Tensor, packed: bool) -> torch.Tensor:
    """`value` [n, F, ...] of each visual token, its places laid out as those of the features [*places, D]."""
    value, first = (value[0].clone(), 0) if packed else (value, 1)
    grid = features.shape[first + 1 : -1]
    return value.unflatten(first, (-1, *grid)) if grid else value


def first_of_blocks(numbers: torch.Tensor, count: int, rounds: int = 1) -> torch.Tensor:
    """[..., count]: what the first channel of each block of a round holds."""
    width = numbers.shape[-1] // rounds
    return numbers[..., (torch.arange(count, device=numbers.device) * width + count - 1) // count]


class TokenMap:
    """Inserts the map's nodes in front of the output; `columns` is the node [n, F, g].

    `numbers` is the node with the numbers, in the shape of `source`; without it tokens are counted. `channels` is how
    many of them, next to each other on the last axis, hold the same number; default: all of `source`.
    """

    def __init__(
        self,
        graph: fx.Graph,
        source: fx.Node,
        features: fx.Node,
        note: str,
        numbers: fx.Node | None = None,
        channels: int | None = None,
    ):
        self.graph, self.source, self.features, self.note = graph, source, features, note
        self.numbers, self.channels = numbers, channels
        self.shadows: dict[fx.Node, fx.Node] = {}
        self.spread: dict[fx.Node, Spread] = {}  # of the numbers in the shadow of a node
        self.downstream = {source}  # what is computed from the source
        self.group = 0  # numbers of each feature

    def columns(self) -> fx.Node:
        followed = self.followed()
        spread = self.spread[self.features]
        self.group = spread.count(int(self.features.meta["val"].shape[-1]))
        with self.graph.inserting_before(self._output()):
            return self._call(sample_groups, followed, self.group, spread.rounds, self.packed)

    @property
    def packed(self) -> bool:
        """Whether the encoder has all its tokens in one row, and the features' first axis is another."""
        given, made = self.source.meta["val"], self.features.meta["val"]
        apart = given.dim() == 3 and not statically_known_true(given.shape[0] == 1)
        return made.dim() == 2 or not (apart or statically_known_true(made.shape[0] == 1))

    def followed(self) -> fx.Node:
        """The numbers in the shape of `features`."""
        path = self._path()
        with self.graph.inserting_before(self._output()):
            self.shadows[self.source] = self.numbers or self._call(number_tokens, self.source)
            self.spread[self.source] = Spread(self.channels or int(self.source.meta["val"].shape[-1]))
            for node in path:
                self._follow(node)
        if self.features not in self.shadows:
            raise _untraceable(self.features, "values that are no longer those of the encoder's tokens")
        return self.shadows[self.features]

    def _output(self) -> fx.Node:
        return next(node for node in self.graph.nodes if node.op == "output")

    def _path(self) -> list[fx.Node]:
        """The nodes between source and features, in order."""
        for node in self.graph.nodes:
            size = isinstance(node.meta.get("val"), torch.SymInt | torch.SymFloat | torch.SymBool)
            if not size and any(n in self.downstream for n in node.all_input_nodes):
                self.downstream.add(node)
        upstream, stack = set(), [self.features]
        while stack:
            node = stack.pop()
            if node in self.downstream and node not in upstream:
                upstream.add(node)
                stack += node.all_input_nodes
        return [n for n in self.graph.nodes if n in upstream and n is not self.source]

    def _call(self, function: Any, *arguments: Any) -> fx.Node:
        node = self.graph.call_function(function, arguments)
        annotate(node, self.note)
        return node

    def _follow(self, node: fx.Node) -> None:
        inputs = [n for n in node.all_input_nodes if n in self.shadows]
        if not inputs:
            return
        data = next((n for n in inputs if _same_shape(n, node)), inputs[0])
        if (whole := self._narrowed(node)) is not None:
            self._mixed(node, whole)
        elif node.target in _MOVES and data is node.args[0]:
            self._moved(node, data)
        elif not isinstance(node.meta.get("val"), torch.Tensor):
            return
        elif node.target in WINDOWED and data is node.args[0]:
            self._windowed(node, data)
        elif node.target is A.mean.dim and (axis := _averaged(node, data)) is not None:
            self._shared(node, data, axis)
        elif node.target is A.cat.default and not _same_rows(data, node):
            self.shadows[node], self.spread[node] = self._joined(node), self.spread[data]
        elif _same_shape(data, node) or node.target in CASTS:
            self.shadows[node], self.spread[node] = self.shadows[data], self.spread[data]
        elif _same_rows(data, node):
            self._mixed(node, data)
        else:
            raise _untraceable(node, f"{tuple(data.meta['val'].shape)} -> {tuple(node.meta['val'].shape)}")

    def _moved(self, node: fx.Node, data: fx.Node) -> None:
        """The numbers moved the same way; where rows were joined, the channels of each depend on its own alone."""
        copy = self.graph.node_copy(node, lambda n: self.shadows[n] if n is data else n)
        annotate(copy, self.note)
        copy.meta.pop("val", None)
        spread, before, after = self.spread[data], _sizes(data)[-1:], _sizes(node)[-1:]
        joined = bool(before and after) and not _same_sizes(before, after)
        self.shadows[node], self.spread[node] = copy, spread._replace(mixed=spread.mixed and not joined)

    def _narrowed(self, node: fx.Node) -> fx.Node | None:
        """Of whose mixed channels a node takes some: they were made of all numbers of their row (a gate's half)."""
        if node.target not in (operator.getitem, A.slice.Tensor):
            return None
        whole: Any = node.args[0]
        whole = whole.args[0] if node.target is operator.getitem else whole
        mixed = whole in self.shadows and self.spread[whole].mixed
        return whole if mixed and _same_rows(whole, node) and not _same_shape(whole, node) else None

    def _mixed(self, node: fx.Node, data: fx.Node) -> None:
        """Numbers in blocks of the new channels."""
        before, after = (int(one.meta["val"].shape[-1]) for one in (data, node))
        count = self.spread[data].count(before)
        if after < count:  # a statistic over channels: never the carrier of the features
            return
        self.spread[node] = _in_blocks(node, count, after)
        self.shadows[node] = self._call(mix_channels, self.shadows[data], count, after, self.spread[data].rounds)

    def _windowed(self, node: fx.Node, data: fx.Node) -> None:
        """The numbers of windows that lie side by side; channels are on the second axis."""
        laid, (rows, columns) = data.meta["val"], window(node)
        if laid.dim() != 4 or not rows:
            raise _untraceable(node, "windows that overlap or reach over the edge")
        width = self._alone(node, data, 1)
        if node.target is UNFOLDING:
            self.shadows[node] = self._call(unfold_windows, self.shadows[data], rows, columns)
            self.spread[node] = Spread(1, width)
        else:
            after = int(node.meta["val"].shape[1])
            self.spread[node] = _in_blocks(node, rows * columns, after)
            self.shadows[node] = self._call(share_windows, self.shadows[data], rows, columns, after)

    def _shared(self, node: fx.Node, data: fx.Node, axis: int) -> None:
        """The numbers of all that lie along an axis of which a mean was taken."""
        width, count = self._alone(node, data, -1), int(data.meta["val"].shape[axis])
        keep = node.meta["val"].dim() == data.meta["val"].dim()
        self.spread[node] = _in_blocks(node, count, width)
        self.shadows[node] = self._call(share_axis, self.shadows[data], axis, width, keep)

    def _alone(self, node: fx.Node, data: fx.Node, axis: int) -> int:
        """The channels of one place, where all of them hold one number: several would have to share it once more."""
        width = int(data.meta["val"].shape[axis])
        if self.spread[data].count(width) > 1:
            raise _untraceable(node, "places that were made of several encoder tokens already")
        return width

    def _joined(self, node: fx.Node) -> fx.Node:
        """The numbers of tokens that are put beside others, which have none."""
        whole: Any = node.args[0]
        if lost := [part for part in whole if part in self.downstream and part not in self.shadows]:
            raise _untraceable(lost[0], "values that are no longer those of the encoder's tokens")
        parts = [self.shadows.get(part) or self._call(unnumbered, part) for part in whole]
        return self._call(torch.cat, parts, *node.args[1:])


def _in_blocks(node: fx.Node, count: int, width: int) -> Spread:
    """How `count` numbers lie on the channels of a node that mixes what holds them."""
    spread = Spread(max(1, width // count), mixed=True)
    if spread.count(width) != count:
        raise _untraceable(node, f"{width} channels for {count} encoder tokens")
    return spread


def _averaged(node: fx.Node, data: fx.Node) -> int | None:
    """The one axis of rows, of a length known beforehand, that a mean goes over."""
    given: Any = node.args[1]
    value = data.meta["val"]
    axes = [axis % value.dim() for axis in given or range(value.dim())]
    one = len(axes) == 1 and axes[0] != value.dim() - 1 and isinstance(value.shape[axes[0]], int)
    return axes[0] if one else None


def _untraceable(node: fx.Node, got: str) -> SiteError:
    return SiteError(
        "the way from encoder tokens to visual tokens cannot be followed",
        where=f'vision, node "{node.name}" ({node.target})',
        got=got,
        want="operators that move tokens, mix channels, or make one of windows that lie side by side",
        fix="take the score from a decoder layer: layer: previous at language.2",
        slug="tokens-not-traceable",
    )


def _same_shape(one: fx.Node, other: fx.Node) -> bool:
    return _same_sizes(_sizes(one), _sizes(other))


def _same_rows(one: fx.Node, other: fx.Node) -> bool:
    return _same_sizes(_sizes(one)[:-1], _sizes(other)[:-1])


def _same_sizes(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Whether it is known beforehand, however the sizes are written: `s // 4` may be known to be 1."""
    return len(one) == len(other) and all(statically_known_true(a == b) for a, b in zip(one, other, strict=True))


def _sizes(node: fx.Node) -> tuple[Any, ...]:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()
