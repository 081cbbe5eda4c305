"""What position ids tell of visual tokens, and what a decoder does with them: turn queries and keys by them, as
numbers, or look them up in a table; in its layers, or in front of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tvc.kernels.grid import neighbours_by_position
from tvc.trace.layout import residual_argument

A = torch.ops.aten
# The operators that look something up, and which of their arguments says where.
_LOOKUPS = {A.embedding.default: 1, A.index.Tensor: 1, A.index_select.default: 2, A.gather.default: 2}


def tells_grid(position_ids: torch.Tensor | None, visual: torch.Tensor) -> bool:
    """Whether positions [3, B, S], on axes of time, rows and columns, say which visual token [B, S] is beside which."""
    if position_ids is None or position_ids.dim() != 3 or position_ids.shape[0] != 3:
        return False
    pictures = torch.where(visual, 0, -1)
    return all(bool((side >= 0).any()) for side in neighbours_by_position(position_ids, pictures))


class PositionUse(TorchDispatchMode):
    """Follows `position_ids` (int64) through all operators inside the block, up to where they are whole no longer; and
    what is made of them up to the decoder's layers.
    """

    def __init__(self, position_ids: torch.Tensor):
        super().__init__()
        self._whole = [position_ids]  # held, so that no other tensor takes the place of one
        self._made = [position_ids]  # all that is computed of them in front of the layers
        self._layers_run = False
        self.computed = self.looked_up = self.in_layers = False

    def entering_layers(self, hidden: torch.Tensor) -> None:
        """The first layer is about to run on `hidden`; positions that were added to that came before all layers."""
        self._made = [made for made in self._made if made is not hidden]
        self._layers_run = True

    @contextlib.contextmanager
    def in_front_of(self, layer: torch.nn.Module) -> Iterator[None]:
        """Inside the block, `layer` is the decoder's first."""

        def told(_layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.entering_layers(args[0] if args else kwargs[residual_argument(layer)])

        handle = layer.register_forward_pre_hook(told, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self._note_layers((args, kwargs), out)
        if any(map(self._follows, tree_leaves((args, kwargs)))):
            place = _LOOKUPS.get(func)
            if place is not None and any(map(self._follows, tree_leaves(args[place]))):
                self.looked_up = True
                return out
            for made in _tensors(out):
                if made.is_floating_point():
                    self.computed = True
                elif made.dtype != torch.bool:
                    self._whole.append(made)
        return out

    def _note_layers(self, given: Any, out: Any) -> None:
        if self.in_layers or not any(value is made for value in tree_leaves(given) for made in self._made):
            return
        if self._layers_run:
            self.in_layers = True
        else:
            self._made += _tensors(out)

    def _follows(self, value: Any) -> bool:
        return any(value is known for known in self._whole)

    def whole(self, axes: int) -> str:
        """Why no position may be a fraction; empty where it may.

        Args:
            axes: rotary axes of the positions, 0 for plain ones.
        """
        if axes:
            return f"its tokens have positions on {axes} axes"
        if self.looked_up:
            return "it looks positions up in a table"
        return "" if self.computed else "it takes no positions"

    def kept(self, axes: int) -> str:
        """Why tokens keep their positions behind a cut of the decoder; empty where they may be numbered afresh.

        Args:
            axes: rotary axes of the positions, 0 for plain ones.
        """
        if axes:
            return f"its tokens have positions on {axes} axes"
        if self.in_layers:
            return ""
        added = self.looked_up or self.computed
        return "it adds positions to its tokens before its first layer" if added else "it takes no positions"


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))
