"""Surveys a model without its weights: its heavy modules, the tokens they make, and where cuts are legal."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import DynamicCache

from tvc.chunks import Crossing, DecoderShape, Extra
from tvc.errors import ModelError
from tvc.program import Layer, Layout, Site
from tvc.trace.attention import NAME as TRACED_ATTENTION
from tvc.trace.attention import attention_as, decoder_masks
from tvc.trace.block_entry import BlockEntries
from tvc.trace.crossing import beside, crossing_arguments, read_crossing, seen_by
from tvc.trace.exporters import any_experts
from tvc.trace.extras import arguments, laid_out, on_all_slots, read_extras, structure
from tvc.trace.frequencies import fixed
from tvc.trace.host import Boundary, DecoderCall, Host, find_boundary
from tvc.trace.layout import blocks, cost_fields, resampler, used_vision_blocks
from tvc.trace.parts import decoder_weight, no_decoder
from tvc.trace.position_use import PositionUse, tells_grid
from tvc.trace.route import note_images
from tvc.trace.sample import default_size, doubled, pixel_inputs, visual_token_ids, with_text
from tvc.trace.spans import read_spans
from tvc.trace.untraced import Borrowed
from tvc.trace.videos import tells_frames
from tvc.trace.vision import entry_inputs


@dataclasses.dataclass
class Survey:
    """What tracing and planning start from."""

    layout: Layout
    host: Host
    sample: dict[str, torch.Tensor]
    caches: tuple[tuple[int, ...], ...]
    axes: int
    visual_token_ids: tuple[int, ...]
    spans: bool  # some tokens attend to later ones
    extras: tuple[Extra, ...]
    arguments: Mapping[str, Any]  # how the decoder's arguments nest the extras
    crossing: Crossing | None = None
    real: bool = False  # the model's own positions are float numbers

    @property
    def boundary(self) -> Boundary:
        return self.host.boundary

    def shape(self, dtype: torch.dtype, device: torch.device, stride: int = 0) -> DecoderShape:
        sizes = (self.layout.hidden_size, self.axes, self.caches)
        return DecoderShape(*sizes, dtype, device, self.spans, self.extras, self.crossing, stride, self.real)


def survey(
    meta: torch.nn.Module,
    processor: Any = None,
    inputs: Mapping[str, Any] | None = None,
    image_size: tuple[int, int] | None = None,
    double: bool = True,
    borrowed: Borrowed | None = None,
) -> Survey:
    """Reads a model on the meta device; `meta` becomes the host and is changed in place.

    `inputs` are doubled along their first axis unless `double` is False, for inputs that come from an earlier survey.
    With `borrowed`, the vision path stays the model's own code.

    Raises:
        ModelError, TraceError: the model is of a kind that cannot be compiled; which one, it says.
    """
    try:
        return _survey(meta, processor, inputs, image_size, double, borrowed)
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError) as problem:
        raise ModelError(
            "the model's own code cannot be followed from images to its decoder",
            where=type(meta).__name__,
            got=_in_words(problem),
            want="a vision path and a decoder that run on shapes alone, without weights",
            fix="pass inputs made by the model's processor; if they were, this model cannot be compiled",
            slug="not-surveyed",
        ) from problem


def _in_words(problem: Exception) -> str:
    """What PyTorch says of code that does not run on shapes alone, as what that code does."""
    told = f"{type(problem).__name__}: {problem}"
    if re.search(r"meta tensors?\b", told) and re.search(r"item\(\)|no data|copy out", told):
        return "code that reads numbers out of tensors, which are not there without weights and pixels"
    if re.search(r"on device (meta|cpu) is not on the expected device (meta|cpu)", told):
        return "code that makes tensors of its own on the CPU, wherever those are that it was given"
    return told


def _survey(
    meta: torch.nn.Module,
    processor: Any,
    inputs: Mapping[str, Any] | None,
    image_size: tuple[int, int] | None,
    double: bool,
    borrowed: Borrowed | None,
) -> Survey:
    tokens = _known_placeholders(meta)
    _check_kind(meta)
    size = image_size or default_size(meta)
    fields = cost_fields(meta)
    given = pixel_inputs(meta, processor, size) if inputs is None else inputs
    sample = doubled(meta, given) if inputs is not None and double else dict(given)
    # Without weights everything is computed beside the model, on the CPU; what is borrowed stays where it is.
    device = torch.device("cpu") if borrowed is None else borrowed.device
    sample = {name: value.to(device) for name, value in sample.items()}
    for parameter_owner in (getattr(meta, "base_model", meta), meta):
        _materialise(parameter_owner)
    entries = BlockEntries(meta)
    if borrowed is None:
        with entries.noted():
            host = Host(meta, find_boundary(meta, sample))
        note_images(host, sample)
        identity, lengths = _probe_packing(host, sample)
    else:
        host = borrowed.host(meta)
        with host.bound(embed=_zero_embedding(meta, decoder_weight(borrowed.model).dtype)):
            identity, lengths = False, host.lengths_of(sample) or _placeholders(sample, tokens)
    if inputs is None:
        sample = with_text(meta, sample, [1, 1] if host.reads_across else _per_sample(lengths, 2))
    dtype = decoder_weight(meta).dtype
    embed, features = _zero_embedding(meta, dtype), host.boundary.features
    with (
        torch.no_grad(),
        host.bound(vision=lambda _p: [torch.zeros(f, dtype=dtype, device=device) for f in features], embed=embed),
    ):
        call = _reach(host, sample)
    valid, visual = _slots(sample, tokens)
    crossing = read_crossing(call.extra, *visual.shape) if host.reads_across else None
    if crossing is not None:
        visual, lengths = torch.zeros_like(visual), _read_tokens(call, crossing)
    extras = read_extras(beside(call.extra, crossing), visual)
    caches, told, crossing, use = _decoder_shapes(meta, call, extras, visual, crossing)
    fields["language"] = _told_windows(_marked(fields["language"], crossing), told)
    windows = {layer.window for layer in fields["language"]}
    spans = read_spans(call.extra.get("attention_mask"), valid, 0, windows) is not None
    axes = call.position_ids.shape[0] if call.position_ids is not None and call.position_ids.dim() == 3 else 0
    shape = host.boundary.features[0] if borrowed is None else torch.Size((sum(lengths), 1))
    # An encoder without transformer blocks is seen from behind: by the visual tokens that it gives.
    images = host.boundary.images or len(lengths)
    first = entries.first or torch.Size((images, shape[:-1].numel() // images, 1))
    untraced = borrowed.reason if borrowed is not None else ""
    resampled = reason = _resampled(meta, host.boundary, crossing) if borrowed is None else ""
    if not (reason or untraced) and entry_inputs(host, sample).by_image:
        reason = "the encoder takes images of several sizes one by one"
    layout = entries.refuse(_layout(meta, fields, first, shape, identity, lengths, size, untraced or reason))
    layout = _with_shared_caches(layout, caches, getattr(meta.get_decoder().config, "layer_types", None))
    layout = dataclasses.replace(
        layout,
        untraced=untraced,
        resampled=resampled,
        whole_positions=use.whole(axes),
        kept_positions=use.kept(axes),
        unturned=use.kept(0) or ("" if all(caches) else "some of its layers read the keys of others"),
        spatial=tells_grid(call.position_ids, visual),
        serial=borrowed is None and tells_frames(host, sample, embed),
        fixed_frequencies=fixed(meta.get_decoder()),
    )
    real = call.position_ids is not None and call.position_ids.is_floating_point()
    found = (caches, axes, tokens, spans, extras, structure(beside(call.extra, crossing)), crossing, real)
    return Survey(layout, host, sample, *found)


def _slots(sample: Mapping[str, torch.Tensor], tokens: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(valid, visual) [B, S] bool: which slots are no padding, and which of them are of visual tokens."""
    ids = sample["input_ids"]
    valid = sample["attention_mask"].bool() if "attention_mask" in sample else torch.ones_like(ids, dtype=torch.bool)
    return valid, sum((ids == token for token in tokens), torch.zeros_like(ids, dtype=torch.bool)) & valid


def _known_placeholders(meta: torch.nn.Module) -> tuple[int, ...]:
    tokens = visual_token_ids(meta)
    if not tokens:
        raise ModelError(
            "the configuration names no placeholder token for images",
            where=type(meta).__name__,
            got="no image_token_id",
            want="image_token_id in the configuration",
            fix="only models that scatter visual features over placeholder tokens can be compiled",
            slug="no-placeholder",
        )
    return tokens


# What positions and windows say. Other kinds (chunks, sparse selections) hide keys by rules of their own.
_KINDS = {"full_attention", "sliding_attention", "conv"}


def _check_kind(meta: torch.nn.Module) -> None:
    """Refuses decoders of a kind that no cut can be made in, before anything is run."""
    if meta.config.is_encoder_decoder or meta.config.get_text_config().is_encoder_decoder:  # type: ignore[operator, union-attr]
        raise no_decoder(meta, "an encoder and a decoder of text, with cross-attention between them")
    kinds = set(getattr(meta.get_decoder().config, "layer_types", None) or ()) - _KINDS  # type: ignore[operator]
    if "linear_attention" in kinds:
        raise _keeps_nothing(type(meta).__name__, "layers of the kind linear_attention")
    if kinds:
        raise ModelError(
            "the decoder has layers of a kind that no cut is known for",
            where=type(meta).__name__,
            got=", ".join(sorted(kinds)),
            want=f"layers of the kinds {', '.join(sorted(_KINDS))}",
            fix="a model of another attention pattern cannot be compiled",
            slug="unknown-attention",
        )


def _reach(host: Host, sample: Mapping[str, Any]) -> DecoderCall:
    try:
        with attention_as(host.model, TRACED_ATTENTION):
            return host.reach_decoder(**{**sample, "use_cache": True})
    except (ValueError, RuntimeError, IndexError) as problem:
        raise ModelError(
            "the model's own code refuses the sample inputs",
            where=type(host.model).__name__,
            got=f"{type(problem).__name__}: {problem}",
            want="a consistent configuration, and inputs that fit it",
            fix="check the configuration (widths of vision and text), or pass inputs made by the model's processor",
            slug="sample-refused",
        ) from problem


def _placeholders(sample: Mapping[str, torch.Tensor], tokens: tuple[int, ...]) -> list[int]:
    """Visual tokens of each sample, told by its placeholders."""
    if "input_ids" not in sample:
        raise ModelError(
            "the model does not say how many visual tokens an image has",
            where="get_image_features",
            got="no pooler_output, and no inputs to count placeholders in",
            want="inputs made by the model's processor",
            fix="pass inputs=processor(images=..., text=..., return_tensors='pt')",
            slug="no-visual-features",
        )
    ids = sample["input_ids"]
    counts: list[int] = torch.isin(ids, torch.tensor(tokens, device=ids.device)).sum(1).tolist()
    return counts


def _per_sample(lengths: list[int], samples: int) -> list[int]:
    """Placeholders per sample when each has one image (whose tiles may be listed one by one)."""
    each = len(lengths) // samples
    if each * samples == len(lengths) and each:
        return [sum(lengths[i * each : (i + 1) * each]) for i in range(samples)]
    return [sum(lengths) // samples] * samples


def _materialise(module: torch.nn.Module) -> None:
    """The module's own parameters (newline embeddings) become zeros on the CPU, so that family code can use them."""
    for name, value in list(module.named_parameters(recurse=False)):
        if value.is_meta:
            setattr(module, name, torch.nn.Parameter(torch.zeros(value.shape, dtype=value.dtype), requires_grad=False))


def _read_tokens(call: DecoderCall, crossing: Crossing) -> list[int]:
    """Visual tokens of each sample that its text reads by cross-attention: padding is read by none."""
    seen = seen_by(call.extra, crossing)
    counts: list[int] = [] if seen is None else seen.any(1).sum(1).tolist()
    return counts


def _marked(layers: tuple[Layer, ...], crossing: Crossing | None) -> tuple[Layer, ...]:
    """The layers, of which those with cross-attention are told apart."""
    crossed = () if crossing is None else crossing.layers
    return tuple(dataclasses.replace(layer, crosses=i in crossed) for i, layer in enumerate(layers))


def _told_windows(layers: tuple[Layer, ...], told: list[int]) -> tuple[Layer, ...]:
    """The layers with the windows that their attention was called with, which no configuration need say."""
    attending = [i for i, layer in enumerate(layers) if layer.heads and not layer.crosses]
    if len(told) != len(attending):
        return layers
    found = dict(zip(attending, told, strict=True))
    return tuple(dataclasses.replace(one, window=found.get(i) or one.window) for i, one in enumerate(layers))


def _decoder_shapes(
    meta: torch.nn.Module,
    call: DecoderCall,
    extras: tuple[Extra, ...],
    visual: torch.Tensor,
    crossing: Crossing | None,
) -> tuple[tuple[tuple[int, ...], ...], list[int], Crossing | None, PositionUse]:
    """What each layer of the decoder caches, the windows that its attention calls tell, in their order, which layers
    cache what the text reads by cross-attention, and how positions are used.
    """
    told: list[int] = []

    def mask(window: int) -> torch.Tensor:
        told.append(window)
        return everything

    decoder = meta.get_decoder()  # type: ignore[operator]
    batch, slots, width = call.inputs_embeds.shape
    given = {
        name: value.to("meta") for name, value in laid_out(call.extra, extras, visual, call.inputs_embeds.dtype).items()
    }
    own = arguments(extras, given, structure(beside(call.extra, crossing)))
    crossed, length = None, slots + 1  # no layer caches as many tokens of the text
    if crossing is not None:
        states = torch.zeros(batch, length, width, dtype=call.inputs_embeds.dtype, device="meta")
        crossed = torch.ones(batch, 1, slots, length, dtype=torch.bool, device="meta")
        own |= crossing_arguments(crossing, states, crossed, states.new_ones(batch, slots))
    positions = call.position_ids if call.position_ids is not None else torch.zeros(batch, slots, dtype=torch.long)
    positions = positions.to("meta")
    use = PositionUse(positions)
    fakes = torch.fx.experimental._config.patch(meta_nonzero_assume_all_nonzero=True)  # type: ignore[attr-defined]
    everything = torch.ones(batch, 1, slots, slots, dtype=torch.bool, device="meta")
    with contextlib.ExitStack() as stack:
        masks = decoder_masks(mask, crossed)
        for held in (torch.no_grad(), attention_as(meta, TRACED_ATTENTION), any_experts(meta), masks):
            stack.enter_context(held)
        stack.enter_context(on_all_slots(extras))
        stack.enter_context(fakes)
        stack.enter_context(use)
        stack.enter_context(use.in_front_of(blocks(meta)[0][0]))
        out = type(decoder).forward(  # the instance's own leads back to the host
            decoder,
            inputs_embeds=torch.zeros(batch, slots, width, dtype=call.inputs_embeds.dtype, device="meta"),
            position_ids=positions,
            attention_mask=everything,
            past_key_values=DynamicCache(config=decoder.config),
            use_cache=True,
            **own,
        )
    if crossing is not None:
        held_by = [getattr(layer, "keys", None) for layer in out.past_key_values.layers]
        crossing_layers = (i for i, keys in enumerate(held_by) if keys is not None and keys.shape[2] == length)
        crossing = dataclasses.replace(crossing, layers=tuple(crossing_layers))
    return _cached_shapes(decoder, out.past_key_values.layers), told, crossing, use


def _cached_shapes(decoder: torch.nn.Module, layers: Sequence[Any]) -> tuple[tuple[int, ...], ...]:
    """What each layer of the decoder has cached, as `DecoderShape.caches` says it."""
    shapes: list[tuple[int, ...]] = []
    for layer in layers:
        state = _state(layer)
        if state is not None:
            shapes.append(tuple(state.shape[1:]))
            continue
        empty = getattr(layer, "keys", None) is None
        if shapes and empty and not hasattr(layer, "conv_states"):  # the layer reads an earlier one's
            shapes.append(())
            continue
        if empty:
            raise _keeps_nothing(type(decoder).__name__, type(layer).__name__)
        shapes.append((layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]))
    return tuple(shapes)


def _keeps_nothing(where: str, got: str) -> ModelError:
    return ModelError(
        "a decoder layer keeps no keys and values",
        where=where,
        got=got,
        want="attention in every layer, or short convolutions",
        fix="models with recurrent (linear attention, state-space) layers cannot be compiled",
        slug="no-kv-layer",
    )


def _state(layer: Any) -> torch.Tensor | None:
    """[B, C, L] what a layer without attention remembers, where that is the last inputs of one convolution alone."""
    states = getattr(layer, "conv_states", None)
    recurrent = any(value is not None for value in getattr(layer, "recurrent_states", {}).values())
    return states[0] if states and len(states) == 1 and not recurrent else None


def _zero_embedding(model: torch.nn.Module, dtype: torch.dtype) -> Callable[[torch.Tensor, str], torch.Tensor]:
    def embed(ids: torch.Tensor, path: str) -> torch.Tensor:
        table: Any = model.get_submodule(path)
        return torch.zeros(*ids.shape, table.embedding_dim, dtype=dtype, device=ids.device)

    return embed


def _probe_packing(host: Host, sample: Mapping[str, Any]) -> tuple[bool, list[int]]:
    """Whether the family's packing hands every feature on in order, and the visual tokens of each image."""
    shape, *more = host.boundary.features
    rows = shape[:-1].numel()
    numbers = (torch.arange(rows) + 1.0).reshape(*shape[:-1], 1).expand(shape).contiguous()
    others = [torch.zeros(other) for other in more]
    with torch.no_grad(), host.bound(vision=lambda _p: [numbers, *others]):
        output = host.image_features(sample)
    pooled = getattr(output, "pooler_output", output)
    parts = list(pooled) if isinstance(pooled, (list, tuple)) else [pooled]
    flat = torch.cat([part.reshape(-1, shape[-1])[:, 0] for part in parts])
    identity = flat.shape[0] == rows and bool((flat == torch.arange(rows) + 1.0).all())
    return identity, list(host.feature_lengths["image"])


def _layout(
    meta: torch.nn.Module,
    fields: dict[str, Any],
    entering: torch.Size,
    features: torch.Size,
    identity: bool,
    lengths: list[int],
    size: tuple[int, int],
    known: str,
) -> Layout:
    """`known`: why no cut inside the encoder has a meaning, where that is known already."""
    packed = len(entering) == 2
    tiles = 1 if packed else entering[0]
    tile_tokens = entering[0] if packed else entering[1]
    per_tile = features[:-1].numel() // tiles
    group = max(1, tile_tokens // per_tile)
    prefix = tile_tokens - group * per_tile
    reason = known or _meaningless(group, identity, packed)
    used = used_vision_blocks(meta)
    vision = [
        Site(
            f"vision.{k}",
            not reason and k < used,
            reason or ("" if k < used else "the features are taken before this block"),
        )
        for k in range(len(fields["vision"]))
    ]
    crossed = [k for k, layer in enumerate(fields["language"]) if layer.crosses]
    beyond = (
        f"no visual token is in the decoder's sequence: blocks {', '.join(map(str, crossed))} read them by "
        "cross-attention, whose keys and values are made once, of what is left at the projector"
        if crossed
        else ""
    )
    language = [Site(f"language.{k}", not crossed, beyond) for k in range(len(fields["language"]))]
    return Layout(
        model_type=str(meta.config.model_type),
        prefix_tokens=prefix,
        group=group,
        tiles=tiles,
        tile_tokens=tile_tokens,
        visual_tokens=tuple(_per_sample(lengths, 2)),
        sites=(*vision, Site("projector", True), *language),
        used_vision_blocks=used,
        image_size=size,
        in_order=identity and not packed and not known,
        **fields,
    )


def _resampled(meta: torch.nn.Module, boundary: Boundary, crossing: Crossing | None) -> str:
    """Why no visual token stands for a token of the encoder, or for some; empty where each does."""
    found = resampler(meta, boundary.entry, boundary.vision[1:])
    if not found and crossing is not None:
        return "tokens of the encoder are not followed to what the text reads by cross-attention"
    return (
        f"{found} makes each visual token of all tokens of the encoder, so that it stands for none of them"
        if found
        else ""
    )


def _with_shared_caches(layout: Layout, caches: tuple[tuple[int, ...], ...], kinds: list[str] | None) -> Layout:
    """Layers that read the keys and values of an earlier one hold its tokens: no cut may come between the two."""
    shared = [i for i, sizes in enumerate(caches) if not sizes]
    if not shared:
        return layout
    alike = [[j for j in range(shared[0]) if kinds is None or kinds[j] == kinds[i]] for i in shared]
    first = min(found[-1] if found else 0 for found in alike)
    reason = f"later layers read the keys and values of language.{first}, which are those of the tokens it has seen"
    sites = [
        Site(site.name, False, reason)
        if site.name.startswith("language.") and int(site.name.removeprefix("language.")) > first
        else site
        for site in layout.sites
    ]
    return dataclasses.replace(layout, sites=tuple(sites))


def _meaningless(group: int, identity: bool, packed: bool) -> str:
    """Why a cut inside the encoder has no meaning; empty where it has one."""
    if group > 1:
        return (
            f"{group} neighbouring encoder tokens are joined into one visual token behind the encoder, "
            "so all of them have to reach that point"
        )
    if not identity:
        return (
            "the tiles' features are stitched into one grid behind the projector (unpadding, newline tokens), "
            "so every tile has to be whole"
        )
    return "the encoder packs all images into one sequence with fixed boundaries" if packed else ""
