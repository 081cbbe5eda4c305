"""The host: the user's own HF class with its heavy modules taken out.

What a family does around its heavy modules (splitting images into tiles and dropping padding images before the vision
tower, packing tile features with newline tokens after the projector, scattering features over placeholders, computing
rotary positions, preparing inputs for `generate`) is ordinary code of the HF class. It is not rewritten here and it is
not traced: it runs as it is, on a copy of the model that lives on the meta device, with stubs in the places of the
vision path and of the decoder. So any image size, any number of tiles and any family's positions are right by
construction, and no family needs code.

The vision path is everything from the first module that `get_image_features` calls (the *entry*, the tower) to the
last one (the *exit*, the projector; the same module where the tower projects by itself). The decoder is the model's
text decoder; the host stops where it is called.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from tvc.errors import ModelError, TraceError
from tvc.trace.attention import NAME as TRACED_ATTENTION
from tvc.trace.attention import attention_as
from tvc.trace.crossing import image_function
from tvc.trace.exporters import any_experts, prepare_vision_inputs
from tvc.trace.parts import PIXEL_NAMES, feature_owner, insists_on_pixels, keywords, language_paths, path_of


@dataclasses.dataclass(frozen=True)
class Boundary:
    """Where the heavy modules stand: dotted paths inside the HF model."""

    entry: str
    between: tuple[str, ...]
    exit: str
    decoder: str
    embeddings: str
    language: str  # what gives logits of embeddings: the innermost module that holds decoder and output head
    exit_structure: Any  # the exit's output with `Leaf(i)` where the graph's i-th output goes, meta tensors elsewhere
    features: tuple[torch.Size, ...]  # shapes of the sample's features, [..., D] each
    junk: Mapping[str, Any]  # what entry and the modules between return while the host runs: meta tensors
    images: int  # first size of the entry's first tensor in the sample

    @property
    def traced(self) -> bool:
        """Whether the vision path is stood in for; else its real modules are the host's."""
        return bool(self.entry)

    @property
    def vision(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((self.entry, *self.between, self.exit)))


@dataclasses.dataclass(frozen=True)
class Leaf:
    """Stands for the i-th output of the vision graph."""

    index: int


@dataclasses.dataclass
class DecoderCall:
    """What reached the decoder: the host's answer to one call of the model."""

    inputs_embeds: torch.Tensor  # [B, S, D]
    position_ids: torch.Tensor | None  # [B, S] or [A, B, S]
    extra: dict[str, Any]


class _Reached(Exception):
    """Carries the decoder's arguments out of the host's forward."""

    def __init__(self, arguments: dict[str, Any]):
        self.arguments = arguments


@dataclasses.dataclass
class _Stubs:
    """What the stubs do at the moment; swapped for the length of a call."""

    vision: Callable[[dict[str, Any]], list[torch.Tensor]] | None = None
    entry: Callable[[dict[str, Any]], Any] | None = None  # set while the interior itself is traced
    between: Mapping[str, Callable[..., Any]] = dataclasses.field(default_factory=dict)
    exit: Callable[..., Any] | None = None
    embed: Callable[[torch.Tensor, str], torch.Tensor] | None = None
    pending: dict[str, Any] = dataclasses.field(default_factory=dict)


def _to(value: Any, device: str) -> Any:
    """Tensors moved to `device`; off the meta device they come as zeros."""

    def move(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or leaf.device.type == device:
            return leaf
        return torch.zeros(leaf.shape, dtype=leaf.dtype) if leaf.is_meta else leaf.to(device)

    return map_outputs(value, move)


def map_outputs(value: Any, function: Callable[[Any], Any]) -> Any:
    """`tree_map` that also walks HF's ModelOutput (which registers itself as a pytree only sometimes)."""
    if hasattr(value, "to_tuple") and isinstance(value, dict):
        return type(value)(**{key: map_outputs(item, function) for key, item in value.items()})
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(map_outputs(item, function) for item in value)
    return pytree.tree_map(function, value)


@dataclasses.dataclass
class _Call:
    path: str
    output: Any
    images: int  # first size of the first tensor that went in


@contextlib.contextmanager
def _observed(model: torch.nn.Module, device: str) -> Iterator[list[_Call]]:
    """Lists the outermost module calls made inside the block; they run on `device`, their callers see the CPU."""
    calls: list[_Call] = []
    depth = [0]
    images = [0]
    handles = []

    def before(module: torch.nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        depth[0] += 1
        if depth[0] > 1:
            return args, kwargs
        signature = inspect.signature(module.forward)
        given = _flat_arguments(signature, args, kwargs)
        # What is prepared for one kind of encoder need not be known to a module between encoder and projector.
        prepared = prepare_vision_inputs(module, given)
        if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.parameters.values()):
            prepared = {name: value for name, value in prepared.items() if name in signature.parameters}
        images[0] = first_size(prepared)
        return (), _to(prepared, device)

    def after(path: str) -> Callable[..., Any]:
        def hook(_module: torch.nn.Module, _args: Any, _kwargs: Any, output: Any) -> Any:
            depth[0] -= 1
            if depth[0]:
                return None
            calls.append(_Call(path, output, images[0]))
            return _to(output, "cpu")

        return hook

    for path, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
        handles.append(module.register_forward_hook(after(path), with_kwargs=True))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def find_boundary(model: torch.nn.Module, sample: Mapping[str, Any]) -> Boundary:
    """Makes visual tokens once on the meta model and reads off what that called, in what order."""
    owner = feature_owner(model)
    function = image_function(owner)
    with (
        torch.no_grad(),
        attention_as(model, TRACED_ATTENTION),
        any_experts(model),
        _observed(model, "meta") as calls,
    ):
        function(**keywords(function, sample))
    paths = [call.path for call in calls]
    if not paths:
        raise TraceError(
            "the vision path calls no module",
            where=f"{type(owner).__name__}, the way of images",
            got="no module call",
            want="a vision tower",
            fix="report the model class",
            slug="no-vision-path",
        )
    last = calls[-1].output
    structure, features = _exit_structure(last)
    return Boundary(
        entry=paths[0],
        between=tuple(dict.fromkeys(p for p in paths[1:-1] if p not in (paths[0], paths[-1]))),
        exit=paths[-1],
        **language_paths(model),
        exit_structure=structure,
        features=tuple(feature.shape for feature in features),
        junk={call.path: map_outputs(call.output, lambda leaf: leaf) for call in calls[:-1]},
        images=calls[0].images,
    )


def first_size(arguments: Mapping[str, Any]) -> int:
    """The first size of the first tensor among `arguments`: as many images, or tiles, as go in."""
    return next((value.shape[0] for value in arguments.values() if isinstance(value, torch.Tensor) and value.dim()), 0)


# Fields of a vision output that hold the tower's inside; where a pooled output exists they are not features.
_INSIDE = ("last_hidden_state", "hidden_states", "attentions")


def _exit_structure(output: Any) -> tuple[Any, list[torch.Tensor]]:
    """The exit's output with `Leaf`s in the places of its features, and those features."""
    leaves: list[torch.Tensor] = []

    def mark(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            leaves.append(value)
            return Leaf(len(leaves) - 1)
        return value

    if hasattr(output, "to_tuple") and isinstance(output, dict):
        pooled = output.get("pooler_output") is not None
        fields = {k: v if pooled and k in _INSIDE else map_outputs(v, mark) for k, v in output.items()}
        return type(output)(**fields), leaves
    return map_outputs(output, mark), leaves


def exit_leaves(output: Any) -> list[torch.Tensor]:
    """The feature tensors of an exit's output, in the order of its `Leaf`s."""
    return _exit_structure(output)[1]


class Host:
    """Runs the family's own code around the graphs. `model` is a meta copy of the user's model, changed in place."""

    def __init__(self, model: torch.nn.Module, boundary: Boundary):
        self.model, self.boundary = model, boundary
        self.owner = feature_owner(model)
        self.reads_across = not hasattr(self.owner, "get_image_features")
        self.hf_forward = model.forward  # bound here: a runtime may put another forward in its place
        self.entry_module = model.get_submodule(boundary.entry) if boundary.traced else model
        self.feature_lengths: dict[str, list[int]] = {}  # visual tokens of each image and video in the last call
        self.tables: tuple[str, ...] = (boundary.embeddings,)  # embeddings that family code looked up so far
        self.image_route: Any = None  # a `Route`, where videos might go another way
        self.device = torch.device("cpu")  # where the values are that the family's code works on
        self._stubs = _Stubs()
        self._install()
        self._watch_lengths()
        self._say_device()

    def _install(self) -> None:
        if self.boundary.traced:
            self._install_vision()
        decoder_signature = inspect.signature(self.model.get_submodule(self.boundary.decoder).forward)

        def decoder(*args: Any, **kwargs: Any) -> Any:
            given = _flat_arguments(decoder_signature, args, kwargs)
            # What its forward does not name came along from the processor, and is passed on to nobody who reads it.
            raise _Reached({name: value for name, value in given.items() if name in decoder_signature.parameters})

        self.model.get_submodule(self.boundary.decoder).forward = decoder
        for path in (self.boundary.embeddings, *_tables(self.model, self.boundary)):
            module: Any = self.model.get_submodule(path)
            module.forward = functools.partial(self._embed, path, module.forward)
        # Zeros without storage: family code may take a row of it, which only counts where no ids are given.
        table: Any = self.model.get_submodule(self.boundary.embeddings)
        zeros = torch.zeros(1, dtype=table.weight.dtype).expand(table.weight.shape)
        table.weight = torch.nn.Parameter(zeros, requires_grad=False)

    def _install_vision(self) -> None:
        stubs, boundary = self._stubs, self.boundary
        signature = inspect.signature(self.model.get_submodule(boundary.entry).forward)

        def entry(*args: Any, **kwargs: Any) -> Any:
            bound = _flat_arguments(signature, args, kwargs)
            if stubs.entry is not None:
                return stubs.entry(bound)
            stubs.pending = bound
            return finish() if boundary.entry == boundary.exit else junk(boundary, boundary.entry, first_size(bound))

        def finish(*_args: Any, **_kwargs: Any) -> Any:
            if stubs.exit is not None:
                return stubs.exit(*_args, **_kwargs)
            outputs = stubs.vision(stubs.pending) if stubs.vision is not None else []
            return map_outputs(
                boundary.exit_structure, lambda leaf: outputs[leaf.index] if isinstance(leaf, Leaf) else leaf
            )

        self.model.get_submodule(boundary.entry).forward = entry
        for path in boundary.between:
            self.model.get_submodule(path).forward = _between(stubs, boundary, path)
        if boundary.exit != boundary.entry:
            self.model.get_submodule(boundary.exit).forward = finish

    def _watch_lengths(self) -> None:
        for kind in ("image", "video"):
            name = f"get_{kind}_features"
            if hasattr(self.owner, name):
                setattr(self.owner, name, self._watched(kind, getattr(self.owner, name)))
        self.get_image_features: Any = (
            self._watched("image", image_function(self.owner)) if self.reads_across else self.owner.get_image_features
        )

    def _watched(self, kind: str, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def get_features(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            pooled = getattr(output, "pooler_output", output)
            if pooled is None and not self.boundary.traced:
                return output  # made outside, by code that is the model's own
            if pooled is None:
                raise ModelError(
                    f"get_{kind}_features gives no features",
                    where=type(self.owner).__name__,
                    got="no pooler_output",
                    want="the visual tokens as the decoder takes them",
                    fix="models that make them outside of it cannot be compiled",
                    slug="no-visual-features",
                )
            parts = list(pooled) if isinstance(pooled, (list, tuple)) or pooled.dim() == 3 else [pooled]
            self.feature_lengths[kind] = [part.shape[0] for part in parts]
            return output

        return get_features

    def _say_device(self) -> None:
        """Family code moves values to `self.device`, which would be where the weights are: nowhere."""
        family = type(self.owner)
        members = {"device": property(lambda _: self.device), "__module__": family.__module__}
        self.owner.__class__ = type(family.__name__, (family,), members)

    def _embed(
        self, path: str, own: Callable[..., torch.Tensor], input_ids: torch.Tensor, *more: Any, **named: Any
    ) -> torch.Tensor:
        if more or named or input_ids.is_meta:  # no look-up by token; or the decoder's own code, run for its shapes
            return own(input_ids, *more, **named)
        if self._stubs.embed is None:
            raise TraceError(
                "the host was called without an embedding graph",
                where="host",
                got="no embedding",
                want="a bound runtime",
                fix="use tvc.compile or tvc.load",
                slug="unbound-host",
            )
        self.tables = tuple(dict.fromkeys((*self.tables, path)))
        return self._stubs.embed(input_ids, path)

    @contextlib.contextmanager
    def bound(
        self,
        vision: Callable[[dict[str, Any]], list[torch.Tensor]] | None = None,
        embed: Callable[[torch.Tensor, str], torch.Tensor] | None = None,
        entry: Callable[[dict[str, Any]], Any] | None = None,
        between: Mapping[str, Callable[..., Any]] | None = None,
        leave: Callable[..., Any] | None = None,
    ) -> Iterator[None]:
        """The stubs call these for the duration of the block."""
        before = dataclasses.replace(self._stubs)
        self._stubs.vision, self._stubs.embed = vision or before.vision, embed or before.embed
        self._stubs.entry, self._stubs.between, self._stubs.exit = entry, between or {}, leave
        try:
            yield
        finally:
            for field in dataclasses.fields(_Stubs):
                setattr(self._stubs, field.name, getattr(before, field.name))

    def constants(self) -> dict[str, torch.nn.Parameter]:
        """The family's own parameters (newline embeddings), by path: those of no heavy module."""
        owners = {path_of(self.model, module): module for module in (self.owner, self.model)}
        return {
            f"{path}.{name}".lstrip("."): parameter
            for path, module in owners.items()
            for name, parameter in module.named_parameters(recurse=False)
        }

    def adopt_constants(self, values: Mapping[str, torch.Tensor]) -> None:
        """Takes the constants' values, and with them their device and type."""
        for path in self.constants():
            owner, _, name = path.rpartition(".")
            value = torch.nn.Parameter(values[path].detach().clone(), requires_grad=False)
            setattr(self.model.get_submodule(owner), name, value)

    @contextlib.contextmanager
    def without_constants(self) -> Iterator[None]:
        """The family's own constants (newline embeddings) are zero for the duration of the block."""
        own = list(self.constants().values())
        before = [parameter.detach().clone() for parameter in own]
        with torch.no_grad():
            for parameter in own:
                parameter.zero_()
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(own, before, strict=True):
                    parameter.copy_(value)

    def lengths_of(self, inputs: Mapping[str, Any]) -> list[int]:
        """Visual tokens of each image, by the family's own code; only where the vision path is its own, too.

        Empty where the features are made outside of `get_image_features`.
        """
        with torch.no_grad():
            self.image_features(inputs)
        return list(self.feature_lengths.get("image", ()))

    def image_features(self, inputs: Mapping[str, Any]) -> Any:
        """What the family's own code makes of images around the bound vision path."""
        return self.get_image_features(**keywords(self.get_image_features, inputs))

    def reach_decoder(self, **inputs: Any) -> DecoderCall:
        """Runs the model's forward up to its decoder; a chunk without pixels goes to the language model where the
        model's own forward takes none without.
        """
        forward: Any = self.hf_forward
        if insists_on_pixels(self.model) and not any(inputs.get(name) is not None for name in PIXEL_NAMES):
            forward = language = self.model.get_submodule(self.boundary.language)
            embeds = self.model.get_submodule(self.boundary.embeddings)(inputs.pop("input_ids"))
            inputs = {**keywords(type(language).forward, inputs), "inputs_embeds": embeds}
        try:
            forward(**inputs)
        except _Reached as reached:
            arguments = reached.arguments
            embeds = arguments.pop("inputs_embeds", None)
            ids = arguments.pop("input_ids", None)
            if embeds is None:  # the decoder looks them up itself
                embeds = self.model.get_submodule(self.boundary.embeddings)(ids)
            return DecoderCall(embeds, arguments.pop("position_ids", None), arguments)
        raise TraceError(
            "the model's forward returned without calling its decoder",
            where=type(self.model).__name__,
            got="no decoder call",
            want=f"a call of {self.boundary.decoder}",
            fix="report the model class",
            slug="decoder-not-reached",
        )


def _tables(model: torch.nn.Module, boundary: Boundary) -> list[str]:
    """Embeddings inside the decoder beside that of its tokens: some models look them up outside of it."""
    decoder = model.get_submodule(boundary.decoder)
    found = [name for name, part in decoder.named_modules() if isinstance(part, torch.nn.Embedding)]
    return [path for name in found if (path := f"{boundary.decoder}.{name}") != boundary.embeddings]


def _flat_arguments(signature: inspect.Signature, args: Any, kwargs: Any) -> dict[str, Any]:
    """Arguments by name, `**kwargs` of the callee flattened in, None dropped."""
    bound = signature.bind(*args, **kwargs)
    flat: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            flat.update(value)
        else:
            flat[name] = value
    return {name: value for name, value in flat.items() if value is not None}


def _between(stubs: _Stubs, boundary: Boundary, path: str) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        own = stubs.between.get(path)
        return own(*args, **kwargs) if own else junk(boundary, path, first_size(stubs.pending))

    return forward


def junk(boundary: Boundary, path: str, images: int) -> Any:
    """What the module at `path` would return for as many images: family code looks at its shape."""

    def sized(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.dim() or value.shape[0] != boundary.images:
            return value
        return value.new_empty(images, *value.shape[1:])

    return map_outputs(boundary.junk[path], sized)
