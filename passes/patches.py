"""The pixels of each visual token: what the patch embedding was given of the cells that ended in it.

A vision encoder turns patches into vectors by one convolution whose kernels lie side by side, or by one linear layer.
The patches are numbered, and their numbers are followed to where the first block begins; blocks leave tokens where they
are, so that the same numbers go on from behind the last one to the features (see token_map.py).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.fx as fx

from tvc.errors import SiteError
from tvc.graphs import Block, annotate, backward_closure, first_node, last_node
from tvc.passes.token_map import CASTS, TokenMap, in_shape_of
from tvc.passes.windows import CONVOLUTIONS, side_by_side

A = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Patches:
    """Where pixels become vectors."""

    pixels: fx.Node  # [n, C, *sizes] of a convolution, [..., R, P] of a linear layer; in the type of the graph's input
    embedding: fx.Node
    kernel: tuple[int, ...]  # () of a linear layer
    width: int  # numbers in one patch


def pixels_of(graph: fx.Graph, blocks: list[Block], features: fx.Node, note: str) -> tuple[fx.Node, int]:
    """([*places, P] float32 the pixels of each visual token, P), its places those of the features.

    Args:
        graph: of the vision component.
        blocks: those of its encoder.
        features: the visual features.

    Raises:
        SiteError: patches overlap, or are not followed to the features.
    """
    if not blocks:
        raise _unseen(note, "an encoder without transformer blocks", "blocks that leave tokens where they are")
    last = last_node(graph, blocks[-1])
    hidden, found = _entering(graph, blocks, note)
    if hidden.meta["val"].shape[:-1] != last.meta["val"].shape[:-1]:
        got = (
            f"{tuple(hidden.meta['val'].shape)} before the first block, {tuple(last.meta['val'].shape)} behind the last"
        )
        raise _unseen(_at(last, note), got, "blocks that leave tokens where they are")
    output = next(node for node in graph.nodes if node.op == "output")

    def call(function: Any, *arguments: Any) -> fx.Node:
        node = graph.call_function(function, arguments)
        annotate(node, note)
        return node

    with graph.inserting_before(output):
        numbers = call(number_patches, found.embedding, found.kernel)
    channels = int(found.embedding.meta["val"].shape[1 if found.kernel else -1])
    try:
        entered = TokenMap(graph, found.embedding, hidden, note, numbers, channels).followed()
        with graph.inserting_before(output):
            numbers = call(on_all_channels, entered, last)
        columns = TokenMap(graph, last, features, note, numbers)
        cells = columns.columns()
    except SiteError as lost:
        raise _unseen(lost.where, lost.got, lost.want) from lost
    with graph.inserting_before(output):
        rows = call(patch_rows, found.pixels, found.embedding, found.kernel)
        node = call(in_shape_of, features, call(cell_pixels, rows, cells), columns.packed)
    return node, found.width * columns.group


def number_patches(embedded: torch.Tensor, kernel: tuple[int, ...]) -> torch.Tensor:
    """int64 in the shape of `embedded`, [n, D, *cells] or [..., R, D]: the running number of the patch, all images."""
    places = embedded[:, 0] if kernel else embedded[..., 0]
    numbers = torch.arange(places.numel(), device=embedded.device).reshape(places.shape)
    return numbers.unsqueeze(1 if kernel else -1).expand(embedded.shape).contiguous()


def patch_rows(pixels: torch.Tensor, embedded: torch.Tensor, kernel: tuple[int, ...]) -> torch.Tensor:
    """[R, P] float32: the pixels of each patch, in the order of its number."""
    if not kernel:
        return pixels.float().flatten(0, -2)
    cells = embedded.shape[2:]
    for axis, (number, length) in enumerate(zip(cells, kernel, strict=True)):
        pixels = pixels.narrow(2 + 2 * axis, 0, number * length).unflatten(2 + 2 * axis, (number, length))
    axes = range(2, 2 + 2 * len(kernel))
    by_patch = pixels.float().permute(0, *axes[::2], 1, *axes[1::2])
    return by_patch.flatten(len(kernel) + 1).flatten(0, -2)


def on_all_channels(numbers: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """int64 in the shape of `hidden [..., T, C]`: the number of each token, which all channels of `numbers` hold."""
    return numbers[..., :1].expand(hidden.shape).contiguous()


def cell_pixels(rows: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    """[n, F, g P] the pixels of the patches `cells [n, F, g]`, zeros for -1."""
    padded = torch.nn.functional.pad(rows, (0, 0, 1, 0))
    return padded.index_select(0, cells.flatten() + 1).unflatten(0, cells.shape).flatten(2)


def _entering(graph: fx.Graph, blocks: list[Block], note: str) -> tuple[fx.Node, Patches]:
    """What enters the first block, and the patches that it is made from."""
    first = first_node(graph, blocks[0])
    before = [node for node in graph.nodes if node < first]
    for node in before:
        found = find_patches(node, note)
        if found is None:
            continue
        made = {node}
        for later in before:
            if isinstance(later.meta.get("val"), torch.Tensor) and not made.isdisjoint(later.all_input_nodes):
                made.add(later)
        entering = [n for n in before if n in made and any(blocks[0].holds(user) for user in n.users)]
        if entering:
            return entering[-1], found
    got = "no convolution or linear layer over pixels in front of it"
    raise _unseen(_at(first, note), got, "one that embeds patches")


def find_patches(node: fx.Node, note: str) -> Patches | None:
    """The patches that a node embeds; None where it embeds none."""
    if node.target is not A.linear.default and node.target not in CONVOLUTIONS:
        return None
    pixels: Any = node.args[0]
    while pixels.target in CASTS:
        pixels = pixels.args[0]
    given = [n for n in backward_closure([pixels]) if n.op == "placeholder"]
    if not any(n.meta["val"].is_floating_point() for n in given):
        return None
    weight: Any = node.args[1]
    sizes = weight.meta["val"].shape
    kernel = () if node.target is A.linear.default else tuple(int(size) for size in sizes[2:])
    if kernel and not side_by_side(node, kernel):
        got = f"a convolution {tuple(sizes)} with {node.args[3:]}"
        raise _unseen(_at(node, note), got, "kernels that lie side by side")
    return Patches(pixels, node, kernel, int(sizes[1:].numel()))


def _at(node: fx.Node, note: str) -> str:
    return f'{note}, vision, node "{node.name}" ({node.target})'


def _unseen(where: str, got: object, want: object) -> SiteError:
    return SiteError(
        "it cannot be told which pixels a visual token was made from",
        where=where,
        got=got,
        want=want,
        fix="choose by features instead, for example select: {max_min: 25%}",
        slug="pixels-not-traceable",
    )
