"""Runs the graphs of a compiled model around the family's own code: one call of the model, any target."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

from tvc.chunks import (
    CROSS_MASK,
    ENTERED,
    PAST_KEY,
    PAST_MARKS,
    PAST_MEMORY,
    PAST_POSITIONS,
    PAST_STATE,
    PAST_VALUE,
    SPANS,
    TAP,
    Crossing,
    DecoderShape,
    Extra,
    Memory,
    mark_type,
)
from tvc.errors import InputError
from tvc.runtime.cache import StagedCache, remembered
from tvc.runtime.chunk import Chunk, chunk_inputs, left_packed, put_back, ragged, rows_at, take
from tvc.runtime.crossed import brought, check_rows, decoder_inputs, reduced
from tvc.runtime.inputs import (
    check_call,
    check_handed_on,
    check_options,
    check_traced,
    count_mismatch,
    no_video,
    placeholders,
    video_inside_encoder,
)
from tvc.runtime.positions import in_strides, of_slots
from tvc.trace.attention import NAME as TRACED_ATTENTION
from tvc.trace.attention import attention_as
from tvc.trace.crossing import each_image_apart, images_of, images_together
from tvc.trace.decoder import embedding_component
from tvc.trace.exporters import prepare_vision_inputs
from tvc.trace.extras import laid_out
from tvc.trace.host import DecoderCall, Host
from tvc.trace.parts import PIXEL_NAMES, VIDEO, keywords
from tvc.trace.route import video_departs
from tvc.trace.spans import read_spans
from tvc.trace.vision import OUTPUT, PIXELS, each_image

Runner = Callable[[str, Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]
PLACE = "visual_place"  # vision output [n, F]: row of each original token among those that stay, -1 where dropped


@dataclasses.dataclass(frozen=True)
class Interface:
    """What the runtime has to know of the graphs; written to and read from the manifest."""

    inputs: Mapping[str, tuple[str, ...]]  # per component
    outputs: Mapping[str, tuple[str, ...]]
    sites: Mapping[str, str]  # cut site -> component, or output `key_positions.s` or `entered.s`, that tells what stays
    stage_of_layer: tuple[int, ...]
    shape: DecoderShape
    visual_token_ids: tuple[int, ...]
    taps: Mapping[str, int] = dataclasses.field(default_factory=dict)  # width of each tap; 0: one number a token
    windows: tuple[int, ...] = ()  # sliding windows of the decoder's layers; needed where the model has spans
    by_image: bool = False  # the vision graph takes one image at a time
    words: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # the encoder's options, as they were traced

    @property
    def stages(self) -> int:
        return max(self.stage_of_layer) + 1

    def to_json(self) -> dict[str, Any]:
        shape = dataclasses.asdict(self.shape) | {"dtype": str(self.shape.dtype).removeprefix("torch.")}
        del shape["device"]
        return {**{f.name: getattr(self, f.name) for f in dataclasses.fields(self)}, "shape": shape}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], device: torch.device) -> Interface:
        shape = data["shape"]
        caches = tuple(tuple(map(int, sizes)) for sizes in shape["caches"])
        dtype = getattr(torch, shape["dtype"])
        extras = tuple(
            Extra(str(e["name"]), bool(e["visual"]), tuple(map(int, e["trailing"])), str(e["dtype"]))
            for e in shape["extras"]
        )
        across = shape.get("crossing")
        crossing = None
        if across is not None:
            names = (str(across[name]) for name in ("states", "mask", "rows"))
            crossing = Crossing(tuple(map(int, across["layers"])), *names)
        return cls(
            inputs={name: tuple(names) for name, names in data["inputs"].items()},
            outputs={name: tuple(names) for name, names in data["outputs"].items()},
            sites=dict(data["sites"]),
            stage_of_layer=tuple(data["stage_of_layer"]),
            shape=DecoderShape(
                int(shape["width"]),
                int(shape["axes"]),
                caches,
                dtype,
                device,
                bool(shape["spans"]),
                extras,
                crossing,
                int(shape.get("stride", 0)),
                bool(shape.get("real", False)),
                tuple(Memory(m["name"], tuple(map(int, m["sizes"])), m["dtype"]) for m in shape.get("memories", ())),
            ),
            visual_token_ids=tuple(data["visual_token_ids"]),
            taps=dict(data["taps"]),
            windows=tuple(map(int, data["windows"])),
            by_image=bool(data["by_image"]),
            words=dict(data.get("words", {})),
        )


@dataclasses.dataclass
class Answer:
    """One call's result."""

    logits: torch.Tensor  # [B, 1, vocabulary]
    cache: StagedCache
    kept: dict[str, torch.Tensor]


@dataclasses.dataclass
class _VisionState:
    """What the vision graph is given and gives beside pixels and features in the call under way."""

    taps: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)  # [n, V] by visual token, all samples
    place: torch.Tensor | None = None  # [n, F]
    raw: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    given: dict[str, Any] = dataclasses.field(default_factory=dict)  # the call's inputs


class Engine:
    """Binds a runner to a host."""

    def __init__(self, host: Host, interface: Interface, run: Runner):
        self.host, self.interface, self.run = host, interface, run
        self._state = _VisionState()
        self._tables = host.tables  # as the survey saw them: the order of the components

    def call(self, inputs: dict[str, Any]) -> Answer:
        cache = inputs.get("past_key_values")
        past = cache if isinstance(cache, StagedCache) else None
        check_call(inputs, self.interface.visual_token_ids)
        inputs = {k: v for k, v in inputs.items() if k != "past_key_values" and v is not None}
        ids = inputs["input_ids"]
        self._state = _VisionState(given=inputs)
        seen = past.seen if past is not None else 0
        mask = _mask(inputs.get("attention_mask"), ids)
        with torch.no_grad(), self.host.bound(vision=self._vision, embed=self._embed):
            chunk = self._chunk(inputs, ids, mask, past, seen)
            kept: dict[str, torch.Tensor] = {}
            taps: dict[str, torch.Tensor] = {}
            if inputs.get(VIDEO) is not None and (self._state.raw or self._state.place is not None):
                raise video_inside_encoder()
            if self._state.raw:
                taps = self._packed_taps(inputs, chunk)
            chunk, taps = self._before_decoder(chunk, taps, kept)
            return self._decode(chunk, taps, past, kept)

    def _embed(self, input_ids: torch.Tensor, path: str) -> torch.Tensor:
        component = embedding_component(self._tables.index(path))
        return self.run(component, {"input_ids": input_ids})["inputs_embeds"]

    def _vision(self, pending: dict[str, Any]) -> list[torch.Tensor]:
        names = self.interface.inputs["vision"]
        if self._state.given.get(VIDEO) is None:  # a video's way is compared with that of images beforehand
            check_traced(pending, self.interface.words)
        prepared = prepare_vision_inputs(self.host.entry_module, pending)
        if any(name not in prepared for name in names):
            handed_on = keywords(self.host.get_image_features, self._state.given)
            check_handed_on(handed_on, [*names, *pending])
            prepared = {**handed_on, **prepared}
        missing = [name for name in names if name not in prepared]
        if missing:
            raise InputError(
                "the vision graph lacks an input",
                where="vision",
                got=f"{sorted(prepared)}",
                want=f"also {missing}",
                fix="pass everything the processor returned",
                slug="missing-input",
            )
        if self.interface.by_image:
            outputs = _side_by_side([self.run("vision", {PIXELS: image}) for image in each_image(prepared)])
        elif self.interface.shape.crossing is not None:
            tensors = {name: prepared[name] for name in names}
            outputs = images_together(self.run("vision", each_image_apart(tensors)), tensors)
        else:
            outputs = self.run("vision", {name: prepared[name] for name in names})
        features = [outputs[name] for name in self.interface.outputs["vision"] if name.startswith("visual_features")]
        self._state.raw = {name: value for name, value in outputs.items() if name.startswith(TAP)}
        self._state.place = outputs.get(PLACE)
        if self._state.place is not None:
            features = [_restored(feature, self._state.place) for feature in features]
        return features

    def _chunk(
        self, inputs: dict[str, Any], ids: torch.Tensor, mask: torch.Tensor, past: StagedCache | None, seen: int
    ) -> Chunk:
        if inputs.get(VIDEO) is not None and (departs := video_departs(self.host, inputs)):
            raise no_video(departs)
        if self.host.boundary.traced:
            check_options(self.host.owner, inputs)
        self.host.feature_lengths = {}
        crossing = self.interface.shape.crossing
        if crossing is not None:
            check_rows(inputs, crossing, (ids.shape[0], ids.shape[1]), past)
        try:
            with self._masks_made(ids):
                call = self.host.reach_decoder(**{**inputs, "past_key_values": past, "use_cache": True})
        except (ValueError, RuntimeError, TypeError, LookupError) as problem:
            lengths = [length for each in self.host.feature_lengths.values() for length in each]
            tokens = placeholders(ids, self.interface.visual_token_ids)
            if isinstance(problem, ValueError) and lengths and sum(lengths) != tokens:
                raise count_mismatch(tokens, lengths) from problem
            if inputs.get(VIDEO) is not None:
                raise no_video(f"{type(problem).__name__}: {problem}") from problem
            raise
        has_pixels = any(inputs.get(name) is not None for name in PIXEL_NAMES)
        visual = torch.zeros_like(ids, dtype=torch.bool)
        segment, images = torch.full_like(ids, -1), 0
        crossed, made = None, dict[str, torch.Tensor]()
        if crossing is not None:
            shape = self.interface.shape
            slots = (ids.shape[0], ids.shape[1])
            crossed, made[CROSS_MASK] = brought(call.extra, shape, past, images_of(inputs) or 1, slots)
        elif has_pixels:
            for token in self.interface.visual_token_ids:
                visual |= ids == token
            visual &= mask
            segment, images = _segments(ids, visual, self.interface.visual_token_ids, self.host.feature_lengths)
        given = call.position_ids
        if given is None:  # what `generate` numbers tokens by, and decoders that look at the mask
            given = _places(inputs.get("attention_mask"), mask, seen)
        positions, saved = of_slots(given, self.interface.shape, ids), None
        if stride := self.interface.shape.stride:
            before = past.saved if past is not None and past.saved is not None else ids.new_zeros(len(ids))
            positions, saved = in_strides(positions, visual, segment, stride, before.to(ids.device))
        embeds = call.inputs_embeds.to(self.interface.shape.dtype)
        made |= self._extras(call, mask, visual, seen)
        more: dict[str, Any] = {"extras": made, "crossed": crossed, "saved": saved}
        return Chunk(embeds, positions, mask, visual, segment, images, seen, **more)

    def _masks_made(self, ids: torch.Tensor) -> contextlib.AbstractContextManager[None]:
        """The model's own masks are tensors inside the block, where they say more than positions do."""
        wanted = self.interface.shape.spans and ids.shape[1] > 1  # one token by itself sees nothing ahead
        return attention_as(self.host.model, TRACED_ATTENTION) if wanted else contextlib.nullcontext()

    def _extras(
        self, call: DecoderCall, mask: torch.Tensor, visual: torch.Tensor, seen: int
    ) -> dict[str, torch.Tensor]:
        shape = self.interface.shape
        made = laid_out(call.extra, shape.extras, visual, shape.dtype)
        if shape.spans:
            spans = None
            if mask.shape[1] > 1:
                spans = read_spans(call.extra.get("attention_mask"), mask, seen, self.interface.windows)
            places = torch.arange(mask.shape[1], device=mask.device) + seen
            own = places[:, None].expand(*mask.shape, 2).contiguous()
            made[SPANS] = own if spans is None else spans
        return made

    def _packed_taps(self, inputs: dict[str, Any], chunk: Chunk) -> dict[str, torch.Tensor]:
        """Taps [B, V(, d)], packed the way the family packs features: its own code runs again on them."""
        raw, width, place = self._state.raw, self.interface.shape.width, self._state.place
        columns, start, parts = {}, 0, []
        for name, tap in raw.items():
            values = tap if self.interface.taps[name] else tap.unsqueeze(-1)
            columns[name] = slice(start, start + values.shape[-1])
            start += values.shape[-1]
            parts.append(values.float())
        joined = torch.cat(parts, -1)
        rows = []
        for begin in range(0, start, width):
            piece = joined[..., begin : begin + width]
            padded = torch.nn.functional.pad(piece, (0, width - piece.shape[-1]))
            padded = _restored(padded, place) if place is not None else padded
            giving = _giving(padded, len(self.host.boundary.features))
            with self.host.bound(vision=giving), self.host.without_constants():
                features = self.host.image_features(inputs)
            rows.append(_flat_features(features, width)[:, : piece.shape[-1]])
        table = torch.cat(rows, -1)  # [tokens of all samples, channels]
        slots = ragged(chunk.visual)
        number = chunk.visual.reshape(-1).long().cumsum(0).reshape(chunk.visual.shape) - 1
        index = take(number, slots)
        spread = table[index.clamp(min=0)] * (index >= 0).unsqueeze(-1)
        taps = {name: spread[..., part] for name, part in columns.items()}
        return {name: tap if self.interface.taps[name] else tap.squeeze(-1) for name, tap in taps.items()}

    def _before_decoder(
        self, chunk: Chunk, taps: dict[str, torch.Tensor], kept: dict[str, torch.Tensor]
    ) -> tuple[Chunk, dict[str, torch.Tensor]]:
        """Drops the placeholders of features that the vision path or the projector's cut dropped."""
        numbers = None  # [B, V] of the visual tokens that are left, among all of the sample's
        if self._state.place is not None:
            present = _place_mask(self._state.place, chunk.visual)
            numbers = ragged(_by_token(present, chunk.visual))
            for site, source in self.interface.sites.items():
                if source == "vision":
                    kept[site] = numbers
            chunk, taps = _without(chunk, taps, chunk.visual & ~present)
        if "projector" in self.interface.inputs and chunk.crossed is not None:
            chunk = dataclasses.replace(chunk, crossed=reduced(chunk.crossed, self._project, kept))
        elif "projector" in self.interface.inputs and chunk.images:
            slots = ragged(chunk.visual)
            segment = take(chunk.segment, slots)
            images = torch.arange(chunk.images, device=segment.device)
            given = {
                "visual_features": rows_at(chunk.embeds, slots),
                "visual_segment": segment,
                "visual_counts": (segment.unsqueeze(2) == images).sum(1),
                **taps,
            }
            out = self._project(given)
            chosen = out["chosen"]
            kept["projector"] = chosen if numbers is None else take(numbers, chosen)
            embeds, present = put_back(chunk.embeds, take(slots, chosen), out["reduced_features"])
            chunk = dataclasses.replace(chunk, embeds=embeds)
            chunk, taps = _without(chunk, taps, chunk.visual & ~present)
        return chunk, taps

    def _project(self, given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return self.run("projector", {name: given[name] for name in self.interface.inputs["projector"]})

    def _decode(
        self, chunk: Chunk, taps: dict[str, torch.Tensor], past: StagedCache | None, kept: dict[str, torch.Tensor]
    ) -> Answer:
        interface = self.interface
        seen = chunk.seen + chunk.valid.shape[1]
        chunk = left_packed(chunk)
        inputs = chunk_inputs(chunk)
        columns, offered = None, 0
        if interface.shape.crossing is not None:
            offered = inputs[CROSS_MASK].shape[2]
            across, columns = decoder_inputs(chunk.crossed, inputs[CROSS_MASK], past, interface.shape)
            inputs |= across
        batch = chunk.valid.shape[0]
        names = interface.inputs["decoder"]
        for name in names:
            if name.startswith(TAP):
                inputs[name] = taps[name] if name in taps else _no_tap(name, inputs["visual_index"], interface)
            elif name.startswith(PAST_POSITIONS):
                stage = int(name.removeprefix(PAST_POSITIONS))
                empty = torch.zeros(batch, 0, dtype=torch.int64, device=chunk.embeds.device)
                inputs[name] = past.key_positions[stage] if past is not None else empty
            elif (mark := mark_type(name)) is not None:
                empty = torch.zeros(batch, 0, dtype=mark, device=chunk.embeds.device)
                inputs[name] = past.marks[name.removeprefix("past_")] if past is not None else empty
            elif name.startswith(PAST_MEMORY):
                held = remembered(past, name, interface.shape, batch)
                inputs[name] = held.to(chunk.embeds.device)
            elif name.startswith((PAST_KEY, PAST_VALUE, PAST_STATE)):
                held = past.tensor(name) if past is not None else interface.shape.empty_cache(name, batch, 0)
                inputs[name] = held.to(chunk.embeds.device)
        outputs = self.run("decoder", {name: inputs[name] for name in names})
        cache = StagedCache(
            interface.shape,
            outputs,
            [outputs[f"key_positions.{s}"] for s in range(interface.stages)],
            seen,
            columns,
            offered,
            chunk.saved,
            {n: value for n, value in outputs.items() if f"past_{n}".startswith((*PAST_MARKS, PAST_MEMORY))},
        )
        for site, source in interface.sites.items():
            if source.startswith("key_positions."):
                before = inputs[f"past_{source}"].shape[1]
                kept[site] = outputs[source][:, before:]
            elif source.startswith(ENTERED):
                kept[site] = outputs[source]
        return Answer(outputs["logits"], cache, kept)


def _side_by_side(outputs: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The outputs of several images as those of one sequence: features [F, D] and taps [F(, d)], or [1, F, ...]."""
    tokens = outputs[0][OUTPUT].dim() - 2
    return {name: torch.cat([each[name] for each in outputs], tokens) for name in outputs[0]}


def _mask(mask: torch.Tensor | None, ids: torch.Tensor) -> torch.Tensor:
    """[B, S] bool: which slots of the new chunk are real."""
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    return mask[:, -ids.shape[1] :].bool()


def _segments(
    ids: torch.Tensor, visual: torch.Tensor, tokens: tuple[int, ...], lengths: Mapping[str, list[int]]
) -> tuple[torch.Tensor, int]:
    """[B, S] number (within its sample, in order) of the image or video of each visual slot, -1 elsewhere; and how many
    a sample has at most. Images and videos have placeholders of their own; `lengths` lists the tokens of each by kind.
    Where both are as many in all, the first of `tokens` is the image's.
    """
    # On the host: a dozen small steps, most of which would wait for the device.
    device, visual, ids = visual.device, visual.cpu(), ids.cpu()
    segment = torch.full(visual.shape, -1, dtype=torch.int64)
    found, kinds = 0, sorted(lengths)  # image, video
    for token in tokens:
        own = visual & (ids == token)
        total = int(own.sum())
        kind = next((kind for kind in kinds if sum(lengths[kind]) == total), None)
        # Where the family does not say, every sample's tokens are one image.
        each = own.sum(1).tolist() if kind is None else lengths[kind]
        kinds = [other for other in kinds if other != kind]
        owner = torch.repeat_interleave(torch.arange(len(each)), torch.tensor(each, dtype=torch.int64))
        segment[own] = owner + found
        found += len(each)
    if not bool(visual.any()):
        return segment.to(device), 0
    place = torch.arange(visual.numel())
    first = torch.full((found,), visual.numel())
    first = first.scatter_reduce(0, segment[visual], place[visual.reshape(-1)], "amin")
    rank = first.argsort().argsort()
    segment = torch.where(visual, rank[segment.clamp(min=0)], -1)
    before = torch.where(visual, segment, found).amin(1, keepdim=True)
    segment = torch.where(visual, segment - before, -1)
    return segment.to(device), int(segment.max()) + 1


def _places(whole: torch.Tensor | None, mask: torch.Tensor, seen: int) -> torch.Tensor:
    """[B, S] the chunk's slots numbered without the padding in front of them; `mask` [B, S] bool is the chunk's.

    Args:
        whole: the mask that was given: of the chunk, or of what was `seen` before it as well.
    """
    if whole is None or whole.shape[1] == mask.shape[1]:
        return (mask.long().cumsum(1) - 1).clamp(min=0) + seen
    return (whole.long().cumsum(1) - 1).clamp(min=0)[:, -mask.shape[1] :]


def _restored(feature: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """[n, F, D] features at their original rows, zeros where a token was dropped."""
    rows = place.clamp(min=0).unsqueeze(2).expand(-1, -1, feature.shape[2])
    return feature.gather(1, rows) * (place >= 0).unsqueeze(2)


def _place_mask(place: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
    """[B, S] bool: visual slots whose feature stays."""
    present = torch.zeros_like(visual)
    present[visual] = place.reshape(-1) >= 0
    return present


def _by_token(values: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
    """[B, V] bool `values` [B, S] at each sample's visual tokens; pads False."""
    slots = ragged(visual)
    return values.gather(1, slots.clamp(min=0)) & (slots >= 0)


def _without(
    chunk: Chunk, taps: dict[str, torch.Tensor], dropped: torch.Tensor
) -> tuple[Chunk, dict[str, torch.Tensor]]:
    staying = ragged(_by_token(chunk.visual & ~dropped, chunk.visual))
    shorter = dataclasses.replace(chunk, valid=chunk.valid & ~dropped, visual=chunk.visual & ~dropped)
    return shorter, {name: _rows(tap, staying) for name, tap in taps.items()}


def _rows(tap: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    index = index.clamp(min=0)
    return tap.gather(1, index) if tap.dim() == 2 else tap.gather(1, index.unsqueeze(2).expand(-1, -1, tap.shape[2]))


def _giving(features: torch.Tensor, times: int) -> Callable[[dict[str, Any]], list[torch.Tensor]]:
    """A vision path of `times` outputs that gives `features` for each of them."""
    return lambda _pending: [features] * times


def _flat_features(output: Any, width: int) -> torch.Tensor:
    """[tokens, D] what `get_image_features` returned, all images one after the other."""
    pooled = getattr(output, "pooler_output", output)
    if isinstance(pooled, torch.Tensor):
        return pooled.reshape(-1, width)
    return torch.cat([part.reshape(-1, width) for part in pooled])


def _no_tap(name: str, visual_index: torch.Tensor, interface: Interface) -> torch.Tensor:
    """What a chunk without an image says of its visual tokens: nothing, in the right shape."""
    width = interface.taps[name]
    shape = (*visual_index.shape, width) if width else tuple(visual_index.shape)
    return torch.zeros(shape, device=visual_index.device)
