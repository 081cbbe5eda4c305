"""Windows that lie side by side: which operators make one place of each, and the numbers of what was in them.

Every place is then in one window at most, and what fills no window at the edge is in none.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx

A = torch.ops.aten
CONVOLUTIONS = {A.conv2d.default, A.conv2d.padding, A.conv3d.default, A.conv3d.padding, A.convolution.default}
UNFOLDING = A.im2col.default
WINDOWED = {UNFOLDING, A.avg_pool2d.default, A.adaptive_avg_pool2d.default, *CONVOLUTIONS}


def share_windows(numbers: torch.Tensor, rows: int, columns: int, width: int) -> torch.Tensor:
    """[n, C, H, W], one number a place -> [n, width, H // rows, W // columns]: those of each window, in blocks."""
    members = _windows(numbers[:, :1], rows, columns).squeeze(1)
    return members[..., block_of_channel(rows * columns, width, numbers.device)].permute(0, 3, 1, 2)


def unfold_windows(numbers: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """[n, C, H, W] -> [n, C * rows * columns, L]: each of the L windows as a row of channels, as `unfold` has them."""
    return _windows(numbers, rows, columns).permute(0, 1, 4, 2, 3).flatten(3).flatten(1, 2)


def share_axis(numbers: torch.Tensor, axis: int, width: int, keep: bool) -> torch.Tensor:
    """[..., T, ..., C], one number a row -> [..., width]: those along the axis, in blocks; `keep`: 1 in its place."""
    members = numbers[..., :1].movedim(axis, -1).squeeze(-2)
    shared = members[..., block_of_channel(members.shape[-1], width, numbers.device)]
    return shared.unsqueeze(axis) if keep else shared


def block_of_channel(count: int, width: int, device: torch.device) -> torch.Tensor:
    """[width] int64: which of `count` blocks each channel is in, as equal in length as they can be."""
    return (torch.arange(width, device=device) * count) // width


def _windows(numbers: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """[n, C, H // rows, W // columns, rows * columns]."""
    high, wide = numbers.shape[2:]
    whole = numbers[:, :, : high // rows * rows, : wide // columns * columns]
    return whole.unflatten(3, (-1, columns)).unflatten(2, (-1, rows)).transpose(3, 4).flatten(4)


def window(node: fx.Node) -> tuple[int, int]:
    """(rows, columns) of what a node of `WINDOWED` makes one place of; (0, 0) where windows do not lie side by side."""
    if node.target is A.adaptive_avg_pool2d.default:
        return _divided(node)
    if node.target in CONVOLUTIONS:
        weight: Any = node.args[1]
        kernel = tuple(int(size) for size in weight.meta["val"].shape[2:])
        return (kernel[0], kernel[1]) if len(kernel) == 2 and side_by_side(node, kernel) else (0, 0)
    if node.target is UNFOLDING:
        box, dilation, padding, stride = (_pair(value) for value in node.args[1:])
        return box if (dilation, padding, stride) == ((1, 1), (0, 0), box) else (0, 0)
    return _averaged(node)


def _averaged(node: fx.Node) -> tuple[int, int]:
    given: dict[int, Any] = dict(enumerate(node.args))
    rows, columns = _pair(given[1])
    apart = not (stride := given.get(2)) or _pair(stride) == (rows, columns)
    whole = _pair(given.get(3, 0)) == (0, 0) and not given.get(4, False)
    return (rows, columns) if apart and whole else (0, 0)


def side_by_side(node: fx.Node, kernel: tuple[int, ...]) -> bool:
    """Whether a convolution puts each place into one window at most, and each window is a box of places."""
    general = node.target is A.convolution.default
    names = ("stride", "padding", "dilation", *(("transposed", "output_padding") if general else ()), "groups")
    given = {**dict(zip(names, node.args[3:], strict=False)), **node.kwargs}

    def each(name: str, default: int) -> tuple[int, ...]:
        value: Any = given.get(name, default)
        return (value,) * len(kernel) if isinstance(value, int) else tuple(value) * (len(kernel) // len(value))

    padded = given.get("padding", 0)
    bare = padded == "valid" if isinstance(padded, str) else not any(each("padding", 0))
    plain = not given.get("transposed", False) and given.get("groups", 1) == 1 and set(each("dilation", 1)) == {1}
    return bare and plain and each("stride", 1) == kernel


def _divided(node: fx.Node) -> tuple[int, int]:
    """The windows of a pooling to a given size, where that divides the size that comes in."""
    given: Any = node.args[0]
    sizes = [(*given.meta["val"].shape[-2:],), (*node.meta["val"].shape[-2:],)]
    if not all(isinstance(size, int) for pair in sizes for size in pair):
        return 0, 0
    (high, wide), (rows, columns) = sizes
    return (0, 0) if high % rows or wide % columns else (high // rows, wide // columns)


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    first, *others = value
    return int(first), int(others[0] if others else first)
