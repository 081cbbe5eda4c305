"""Vision paths that are not traced: loops over images, sizes read from tensors, several encoders.

Such a path stays the model's own code. The host keeps its real modules, shared with the user's model, and only the
decoder is compiled: in this process, since no other runtime could run the path.
"""

from __future__ import annotations

import dataclasses

import torch

from tvc.trace.host import Boundary, Host
from tvc.trace.parts import language_paths


@dataclasses.dataclass(frozen=True)
class Borrowed:
    """The user's model, whose modules a host takes for its vision path, and why that is not traced."""

    model: torch.nn.Module
    reason: str

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def host(self, meta: torch.nn.Module) -> Host:
        """A host made of `meta`, a copy of the model without weights."""
        borrow_vision(meta, self.model)
        host = Host(meta, untraced_boundary(meta))
        host.device = self.device
        return host


def borrow_vision(meta: torch.nn.Module, real: torch.nn.Module) -> None:
    """Puts the modules of `real` into `meta`, a copy without weights, all but the decoder and the output head."""
    left_out = {id(part) for part in (meta.get_decoder(), meta.get_output_embeddings())}  # type: ignore[operator]
    inside = {id(meta.get_decoder())}  # type: ignore[operator]

    def walk(copy: torch.nn.Module, original: torch.nn.Module) -> None:
        for name, child in list(copy.named_children()):
            if id(child) in left_out:
                continue
            if any(id(part) in inside for part in child.modules()):
                walk(child, getattr(original, name))
            else:
                setattr(copy, name, getattr(original, name))

    walk(meta, real)


def untraced_boundary(model: torch.nn.Module) -> Boundary:
    """A boundary without a vision path: only the decoder and the token embedding are stood in for."""
    return Boundary("", (), "", **language_paths(model), exit_structure=None, features=(), junk={}, images=0)
