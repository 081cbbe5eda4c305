"""What a family's own code does between the modules of its vision path, for images and for videos.

A graph of the vision path holds what lies between its entry and its exit as the code for images has it. Code that
calls other modules for videos, takes other values of the tower or pools them before the projector must not be handed
that graph's features. So both ways are followed once without weights, and compared: the arguments of the entry, the
modules in their order, and the operations that lead from what they give to what the exit is given.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from tvc.trace.host import Host, first_size, junk, map_outputs
from tvc.trace.parts import keywords

_TENSOR = "a tensor"
# Operations that leave a value what it is: they give it another shape, type or place.
_SAME = (
    "alias",
    "clone",
    "detach",
    "_to_copy",
    "view",
    "_unsafe_view",
    "_reshape_alias",
    "squeeze",
    "unsqueeze",
)


@dataclasses.dataclass(frozen=True)
class Route:
    """One way from pixels to features."""

    inputs: Mapping[str, Any]  # the entry's arguments: numbers and words as they are, of all else the kind
    known: frozenset[str]  # those that the entry's signature names; others may be options of the function, left unread
    modules: tuple[str, ...]  # from entry to exit
    leaving: tuple[tuple[str, int], ...] | None  # how each tensor that the exit is given was made, and its width

    def difference(self, other: Route) -> str:
        """In what `other` departs from this route, in words; empty where in nothing."""
        both = self.inputs.keys() & other.inputs.keys()
        for name in sorted(both | self.known | other.known):
            mine, theirs = self.inputs.get(name), other.inputs.get(name)
            if mine != theirs:
                return f"{self.modules[0]} is given {name}={theirs}, for images {name}={mine}"
        if self.modules != other.modules:
            return f"the way leads through {', '.join(other.modules) or 'no module'}, not {', '.join(self.modules)}"
        return "" if self.leaving == other.leaving else f"what enters {self.modules[-1]} is computed in another way"


class _End(Exception):
    """Ends the family's code at the exit."""


class _Recorder(TorchDispatchMode):
    """Names every tensor that is made from what the modules gave by how it is made, sizes aside."""

    def __init__(self) -> None:
        super().__init__()
        self.active = False
        self._names: dict[int, str] = {}
        self._kept: list[torch.Tensor] = []  # so that no other tensor gets the place of a named one

    def name(self, value: torch.Tensor, made: str) -> None:
        self._names[id(value)] = made
        self._kept.append(value)

    def named(self, value: torch.Tensor) -> str:
        return self._names.get(id(value), "another tensor")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if not self.active:
            return output
        given = [self._told(value) for value in (*args, *(kwargs or {}).values())]
        short = func.overloadpacket.__name__
        leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        for number, leaf in enumerate(leaves):
            made = hashlib.sha256(repr((short, number, given)).encode()).hexdigest()
            self.name(leaf, str(given[0]) if short in _SAME else made)
        return output

    def _told(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self.named(value)
        if isinstance(value, (list, tuple)):
            return [self._told(item) for item in value if isinstance(item, torch.Tensor)]  # else sizes
        return value if isinstance(value, (int, float, str, bool)) else None


def note_images(host: Host, sample: Mapping[str, Any]) -> None:
    """Keeps the way of the sample's images with the host, where there are videos to compare with it."""
    if host.boundary.traced and hasattr(host.owner, "get_video_features"):
        owner: Any = host.owner
        host.image_route = follow(host, owner.get_image_features, sample)


def video_departs(host: Host, inputs: Mapping[str, Any]) -> str:
    """Why the vision graph does not give the features of the video among `inputs`, in words; empty where it does."""
    if host.image_route is None:
        return ""
    owner: Any = host.owner
    try:
        route = follow(host, owner.get_video_features, inputs)
    except (ValueError, RuntimeError, TypeError, LookupError, AttributeError) as problem:
        return f"{type(problem).__name__}: {problem}"
    difference: str = host.image_route.difference(route)
    return difference


def follow(host: Host, function: Callable[..., Any], inputs: Mapping[str, Any]) -> Route:
    """The way that `function`, a `get_image_features` or `get_video_features` of the host, takes."""
    boundary, recorder = host.boundary, _Recorder()
    entered: dict[str, Any] = {}
    modules: list[str] = []
    leaving: list[tuple[str, int]] | None = None
    images = [0]

    def stand_in(path: str) -> Any:
        recorder.active = False
        modules.append(path)
        made = junk(boundary, path, images[0])
        count = [0]

        def mark(leaf: Any) -> Any:
            if isinstance(leaf, torch.Tensor):
                recorder.name(leaf, f"{path}.{count[0]}")
                count[0] += 1
            return leaf

        map_outputs(made, mark)
        recorder.active = True
        return made

    def entry(pending: dict[str, Any]) -> Any:
        entered.update({name: _kind(value) for name, value in pending.items()})
        images[0] = first_size(pending)
        if boundary.entry == boundary.exit:
            return leave()
        return stand_in(boundary.entry)

    def leave(*args: Any, **kwargs: Any) -> Any:
        nonlocal leaving
        recorder.active = False
        modules.append(boundary.exit)
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        leaving = [(recorder.named(leaf), leaf.shape[-1] if leaf.dim() else 0) for leaf in given]
        raise _End

    def between(path: str) -> Callable[..., Any]:
        return lambda *_args, **_kwargs: stand_in(path)

    stubs = {path: between(path) for path in boundary.between}
    try:
        with torch.no_grad(), host.bound(entry=entry, between=stubs, leave=leave), recorder:
            function(**keywords(function, inputs))
    except _End:
        pass
    names = frozenset(inspect.signature(type(host.entry_module).forward).parameters)
    known = frozenset(name for name in entered if name in names or entered[name] == _TENSOR)
    return Route(entered, known, tuple(modules), None if leaving is None else tuple(leaving))


def _kind(value: Any) -> Any:
    if value is None or isinstance(value, (int, float, str, bool)):
        return value
    return _TENSOR if isinstance(value, torch.Tensor) else type(value).__name__
