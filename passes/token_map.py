"""Which encoder tokens each visual token was made from, read off the graph behind the encoder.

A tensor that holds its own token numbers is sent along the path from the last block to the features. Operators that
only move data (views, permutations, slices, indexing) move the numbers the same way, and tokens that are put beside
them (a class token) have the number -1. Where channels are mixed (a linear layer, a norm) every output channel depends
on all channels of its row: the numbers found there are spread over the new channels in blocks, and so are those of a
window where a pooling makes one place of it. At the end, one number per block names the encoder tokens of each visual
token.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx

from tvc.errors import SiteError
from tvc.graphs import annotate

A = torch.ops.aten
_MOVES = {
    A.view.default,
    A._unsafe_view.default,
    A.reshape.default,
    A.permute.default,
    A.transpose.int,
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


def mix_channels(numbers: torch.Tensor, count: int, width: int) -> torch.Tensor:
    """[..., C] holding `count` numbers in equal blocks -> [..., width] holding them in equal blocks."""
    return first_of_blocks(numbers, count)[..., block_of_channel(count, width, numbers.device)]


def sample_groups(numbers: torch.Tensor, count: int) -> torch.Tensor:
    """[n, F, count]: the encoder tokens of each visual token."""
    groups = first_of_blocks(numbers, count)
    return groups if groups.dim() == 3 else groups.unsqueeze(0)


def block_of_channel(count: int, width: int, device: torch.device) -> torch.Tensor:
    """[width] int64: which of `count` blocks each channel is in, as equal in length as they can be."""
    return (torch.arange(width, device=device) * count) // width


def first_of_blocks(numbers: torch.Tensor, count: int) -> torch.Tensor:
    """[..., count]: what the first channel of each block holds."""
    width = numbers.shape[-1]
    return numbers[..., (torch.arange(count, device=numbers.device) * width + count - 1) // count]


def share_windows(numbers: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """[n, C, H, W], one number a place -> [n, C, H // rows, W // columns]: those of each window, in blocks of C."""
    _, width, high, wide = numbers.shape
    whole = numbers[:, :, : high // rows * rows, : wide // columns * columns]
    members = whole.unflatten(3, (-1, columns)).unflatten(2, (-1, rows)).transpose(3, 4).flatten(4)
    place = block_of_channel(rows * columns, width, numbers.device)[:, None, None, None]
    return members.gather(4, place.expand(*members.shape[:4], 1)).squeeze(4)


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
        self.blocks: dict[fx.Node, int] = {}  # channels per number in the shadow of a node
        self.downstream = {source}  # what is computed from the source
        self.group = 0  # numbers of each feature

    def columns(self) -> fx.Node:
        followed = self.followed()
        self.group = self._count(self.features, int(self.features.meta["val"].shape[-1]))
        with self.graph.inserting_before(self._output()):
            return self._call(sample_groups, followed, self.group)

    def followed(self) -> fx.Node:
        """The numbers in the shape of `features`."""
        path = self._path()
        with self.graph.inserting_before(self._output()):
            self.shadows[self.source] = self.numbers or self._call(number_tokens, self.source)
            self.blocks[self.source] = self.channels or int(self.source.meta["val"].shape[-1])
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

    def _count(self, node: fx.Node, width: int) -> int:
        """How many numbers the last axis of the node's shadow holds."""
        return max(1, width // self.blocks[node])

    def _follow(self, node: fx.Node) -> None:
        inputs = [n for n in node.all_input_nodes if n in self.shadows]
        value = node.meta.get("val")
        if not inputs or not isinstance(value, torch.Tensor):
            return
        data = next((n for n in inputs if _same_shape(n, node)), inputs[0])
        if node.target in _MOVES and data is node.args[0]:
            copy = self.graph.node_copy(node, lambda n: self.shadows[n] if n is data else n)
            annotate(copy, self.note)
            copy.meta.pop("val", None)
            self.shadows[node], self.blocks[node] = copy, self.blocks[data]
        elif node.target is A.avg_pool2d.default:
            self._pooled(node, data)
        elif node.target is A.cat.default and not _same_rows(data, node):
            self.shadows[node], self.blocks[node] = self._joined(node), self.blocks[data]
        elif _same_shape(data, node) or node.target in CASTS:
            self.shadows[node], self.blocks[node] = self.shadows[data], self.blocks[data]
        elif _same_rows(data, node):
            before, after = int(data.meta["val"].shape[-1]), int(value.shape[-1])
            count = self._count(data, before)
            if after < count:  # a statistic over channels: never the carrier of the features
                return
            self.blocks[node] = max(1, after // count)
            if self._count(node, after) != count:
                raise _untraceable(node, f"{after} channels for {count} encoder tokens")
            self.shadows[node] = self._call(mix_channels, self.shadows[data], count, after)
        else:
            raise _untraceable(node, f"{tuple(data.meta['val'].shape)} -> {tuple(value.shape)}")

    def _pooled(self, node: fx.Node, data: fx.Node) -> None:
        """The numbers of windows that lie side by side; channels are on the second axis."""
        rows, columns = _window(node)
        width = int(node.meta["val"].shape[1])
        # Numbers that share a place already would have to share it once more.
        if node.meta["val"].dim() != 4 or not rows or self.blocks[data] != width or width % (rows * columns):
            raise _untraceable(node, "windows that overlap or reach over the edge, or channels that they do not divide")
        self.shadows[node] = self._call(share_windows, self.shadows[data], rows, columns)
        self.blocks[node] = width // (rows * columns)

    def _joined(self, node: fx.Node) -> fx.Node:
        """The numbers of tokens that are put beside others, which have none."""
        whole: Any = node.args[0]
        if lost := [part for part in whole if part in self.downstream and part not in self.shadows]:
            raise _untraceable(lost[0], "values that are no longer those of the encoder's tokens")
        parts = [self.shadows.get(part) or self._call(unnumbered, part) for part in whole]
        return self._call(torch.cat, parts, *node.args[1:])


def _window(node: fx.Node) -> tuple[int, int]:
    """(rows, columns) of what a pooling takes the mean of; (0, 0) unless every place is in one window at most."""
    given: dict[int, Any] = dict(enumerate(node.args))
    rows, columns = _pair(given[1])
    apart = not (stride := given.get(2)) or _pair(stride) == (rows, columns)
    whole = _pair(given.get(3, 0)) == (0, 0) and not given.get(4, False)
    return (rows, columns) if apart and whole else (0, 0)


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    first, *others = value
    return int(first), int(others[0] if others else first)


def _untraceable(node: fx.Node, got: str) -> SiteError:
    return SiteError(
        "the way from encoder tokens to visual tokens cannot be followed",
        where=f'vision, node "{node.name}" ({node.target})',
        got=got,
        want="operators that move tokens or mix channels",
        fix="take the score from a decoder layer: layer: previous at language.2",
        slug="tokens-not-traceable",
    )


def _same_shape(one: fx.Node, other: fx.Node) -> bool:
    return _sizes(one) == _sizes(other)


def _same_rows(one: fx.Node, other: fx.Node) -> bool:
    return _sizes(one)[:-1] == _sizes(other)[:-1]


def _sizes(node: fx.Node) -> list[str]:
    value = node.meta.get("val")
    return [str(size) for size in value.shape] if isinstance(value, torch.Tensor) else []
