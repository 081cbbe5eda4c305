"""The decoder's interface: what a chunk consists of, by input name.

inputs_embeds          [B, S, D]   left-packed: pads first, the last slot is always real
position_ids           [B, S] or [A, B, S] where the model has A rotary axes; int64, float32 where they are fractions
query_positions        [B, S] int64 place of each slot in the sample's sequence, -1 pads
text_index             [B, T] int64 slots of the text tokens, -1 pads
visual_index           [B, V] int64 slots of the visual tokens, -1 pads; V = 0 in a decode step
visual_segment         [B, V] int64 image of the sample that each visual token belongs to, -1 pads
visual_counts          [B, N] int64 visual tokens of each image, 0 pads; N = 0 where no image came with the chunk
query_spans            [B, S, 2] int64 first and last place of the span that a slot attends to in both directions, only
                       for models that have such spans (see kernels/attention_mask.py)
cross_states           [B, V', D] visual tokens that are in no slot, for models whose text reads them by
                       cross-attention; one column of zeros where the chunk brings none
cross_mask             [B, S, P_c + V'] bool which of them, cached ones first, each slot reads
cross_rows             [B, S] 1 where a slot reads any of them, else 0
extra.*                [B, S, ...] what else the model hands to its decoder for every slot (see `Extra`)
tap.*                  [B, V] or [B, V, d] what the vision path says of each visual token
past_key_positions.s   [B, P_s] int64 places of the tokens cached by stage s, -1 pads
past_key.i past_value.i  [B, G, P_s, d] the cache of layer i, as long as its stage's
                       (P_c tokens in layers with cross-attention, which cache visual tokens alone)
past_state.i           [B, C, L] the cache of a layer without attention: the last L inputs of its convolution
past_visual.s          [B, P_s] bool which of the tokens cached by stage s are visual; only where text reads these
                       unrotated, or decode steps choose among them, as the next two (see kernels/reselect.py)
past_seen.s            [B, P_s] float32 the attention that the last decode step paid each of them, zeros behind others
past_chosen.s          [B, P_s] bool which of them it attended to; an output alone where nothing asks
past_memory.SITE.i.n   [B, ...] state n that score term i of the step at SITE has kept of earlier calls, see `Memory`

Every past_ input is an output without `past_`. Beside these and the logits there may be:

entered.s              [B, S_s] int64 places of the chunk's tokens that ran through stage s, -1 pads; where later cuts
                       take some of them out of its caches again, or one entry of these stands for several of them
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch

CHUNK_INPUTS = (
    "inputs_embeds",
    "position_ids",
    "query_positions",
    "text_index",
    "visual_index",
    "visual_segment",
    "visual_counts",
)
PAST_POSITIONS = "past_key_positions."
PAST_KEY, PAST_VALUE, PAST_STATE = "past_key.", "past_value.", "past_state."
PAST_VISUAL, PAST_SEEN, PAST_CHOSEN = "past_visual.", "past_seen.", "past_chosen."
PAST_MEMORY = "past_memory."
PAST_MARKS = {PAST_VISUAL: torch.bool, PAST_SEEN: torch.float32, PAST_CHOSEN: torch.bool}
TAP = "tap."
SPANS = "query_spans"
EXTRA = "extra."
ENTERED = "entered."
CROSS_STATES, CROSS_MASK, CROSS_ROWS = "cross_states", "cross_mask", "cross_rows"


@dataclasses.dataclass(frozen=True)
class Extra:
    """An argument of the decoder beside embeddings and positions that says something of every slot of the chunk.

    Attributes:
        name: Its input: `extra.` and the argument's name, with the place inside a list or mapping behind it.
        visual: The model gives a row for each visual token; the graph takes one for each slot, zeros at text tokens.
        trailing: Sizes behind [B, S].
        dtype: Name of a torch type, or "" for that of the decoder.
    """

    name: str
    visual: bool
    trailing: tuple[int, ...]
    dtype: str


@dataclasses.dataclass(frozen=True)
class Crossing:
    """How a decoder reads visual tokens that are not in its sequence: by cross-attention in some of its layers.

    Attributes:
        layers: Those layers. Their keys and values are the visual tokens' and nothing else's.
        states: The decoder's argument with the visual tokens, [B, V', D].
        mask: The argument with what is added to the logits, [B, 1, S, V'].
        rows: The argument with 1 for slots that read any visual token and 0 for others, [B, 1, S, 1]; "" for none.
    """

    layers: tuple[int, ...]
    states: str
    mask: str
    rows: str


@dataclasses.dataclass(frozen=True)
class Memory:
    """A tensor that a step hands from call to call beside the caches, zeros where no call came before.

    Attributes:
        name: Its input, see `memory_name`; its output is the same without `past_`.
        sizes: Those behind [B].
        dtype: Name of a torch type.
    """

    name: str
    sizes: tuple[int, ...]
    dtype: str

    def empty(self, batch: int) -> torch.Tensor:
        """[B, *sizes] where no call came before."""
        return torch.zeros(batch, *self.sizes, dtype=getattr(torch, self.dtype))


def memory_name(site: str, term: int, state: str) -> str:
    """The input for a state of a score term, which is numbered within the step at `site`."""
    return f"{PAST_MEMORY}{site}.{term}.{state}"


@dataclasses.dataclass(frozen=True)
class DecoderShape:
    """The fixed sizes of a decoder's inputs."""

    width: int
    axes: int  # rotary position axes; 0 for plain [B, S] positions
    # Of each layer (groups, key width, value width); (channels, length) of a state; () where it reads another layer's.
    caches: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    device: torch.device
    spans: bool = False  # some tokens attend to later ones
    extras: tuple[Extra, ...] = ()
    crossing: Crossing | None = None
    stride: int = 0  # 256ths of a position that a visual token takes; 0: positions are the model's own
    real: bool = False  # the model's own positions are float numbers
    memories: tuple[Memory, ...] = ()  # what steps of a policy remember

    @property
    def chunk_inputs(self) -> tuple[str, ...]:
        """The inputs that describe the chunk, caches and taps apart."""
        spans = (SPANS,) if self.spans else ()
        crossing = (CROSS_STATES, CROSS_MASK, CROSS_ROWS) if self.crossing is not None else ()
        return (*CHUNK_INPUTS, *spans, *crossing, *(extra.name for extra in self.extras))

    def crosses(self, layer: int) -> bool:
        """Whether the layer's keys and values are those of visual tokens that are not in the sequence."""
        return self.crossing is not None and layer in self.crossing.layers

    def holds_state(self, layer: int) -> bool:
        """Whether the layer keeps a state of fixed length in the place of keys and values."""
        return len(self.caches[layer]) == 2

    def cached(self, layer: int) -> tuple[str, ...]:
        """The outputs that hold a layer's cache; its inputs are the same behind `past_`."""
        if not self.caches[layer]:
            return ()
        return (f"state.{layer}",) if self.holds_state(layer) else (f"key.{layer}", f"value.{layer}")

    def empty_cache(self, name: str, batch: int, length: int) -> torch.Tensor:
        """Zeros for the cache input `name` of a layer that holds `length` tokens."""
        sizes = self.caches[int(name.split(".")[1])]
        if name.startswith(PAST_STATE):
            return torch.zeros(batch, *sizes, dtype=self.dtype)
        return torch.zeros(batch, sizes[0], length, sizes[1 + name.startswith(PAST_VALUE)], dtype=self.dtype)

    def empty_memory(self, name: str, batch: int) -> torch.Tensor:
        """Zeros for the input `name` of what a step remembers."""
        return next(memory for memory in self.memories if memory.name == name).empty(batch)


def batch_axis(name: str, shape: DecoderShape) -> int:
    """The axis of an input along which samples lie."""
    return varying_axes(name, shape)[0]


def varying_axes(name: str, shape: DecoderShape) -> tuple[int, ...]:
    """The axes of an input that may differ from call to call."""
    if name.startswith((PAST_STATE, PAST_MEMORY)):
        return (0,)
    if name.startswith((PAST_KEY, PAST_VALUE)):
        return (0, 2)
    if name == CROSS_MASK:
        return (0, 1, 2)
    return (1, 2) if name == "position_ids" and shape.axes else (0, 1)


def mark_type(name: str) -> torch.dtype | None:
    """The type of an input that says something of every cached token, None where the input is another one."""
    return next((dtype for prefix, dtype in PAST_MARKS.items() if name.startswith(prefix)), None)


def blank(extra: Extra, batch: int, slots: int, dtype: torch.dtype) -> torch.Tensor:
    """What a chunk without the extra says in its place: zeros."""
    return torch.zeros(batch, slots, *extra.trailing, dtype=getattr(torch, extra.dtype) if extra.dtype else dtype)


def sample_inputs(
    names: Sequence[str],
    shape: DecoderShape,
    stage_of_layer: Sequence[int],
    tap_widths: Mapping[str, int],
    visual: int = 16,
    text: int = 12,
    past: int = 12,
    crossed: int = 20,
) -> tuple[torch.Tensor, ...]:
    """Tensors to trace with, by name: two samples of two images, no varying size below 2."""
    batch, slots, half = 2, visual + text, visual // 2
    positions = (torch.arange(slots) + past).repeat(batch, 1)
    rotary = positions.expand(shape.axes, -1, -1).contiguous() if shape.axes else positions
    chunk = {
        "inputs_embeds": torch.zeros(batch, slots, shape.width, dtype=shape.dtype),
        "position_ids": rotary.float() if shape.real or shape.stride else rotary,
        "query_positions": positions.clone(),
        "text_index": torch.cat([torch.zeros(1, dtype=torch.long), torch.arange(visual + 1, slots)]).repeat(batch, 1),
        "visual_index": (torch.arange(visual) + 1).repeat(batch, 1),
        "visual_segment": (torch.arange(visual) >= half).long().repeat(batch, 1),
        "visual_counts": torch.tensor([half, visual - half]).repeat(batch, 1),
        SPANS: positions.unsqueeze(2).repeat(1, 1, 2),
        CROSS_STATES: torch.zeros(batch, crossed, shape.width, dtype=shape.dtype),
        CROSS_MASK: torch.ones(batch, slots, crossed + _crossed_past(past), dtype=torch.bool),
        CROSS_ROWS: torch.ones(batch, slots, dtype=shape.dtype),
        **{extra.name: blank(extra, batch, slots, shape.dtype) for extra in shape.extras},
    }

    def make(name: str) -> torch.Tensor:
        if name in chunk:
            return chunk[name]
        if name.startswith(PAST_POSITIONS):
            return torch.arange(past + 3 * int(name.removeprefix(PAST_POSITIONS))).repeat(batch, 1)
        if (mark := mark_type(name)) is not None:
            return torch.ones(batch, past + 3 * int(name.split(".")[1]), dtype=mark)
        if name.startswith(PAST_MEMORY):
            return shape.empty_memory(name, batch)
        if name.startswith(TAP):
            tap = torch.rand(batch, visual, max(tap_widths[name], 1))
            return tap if tap_widths[name] else tap[..., 0].clone()
        layer = int(name.split(".")[1])
        held = _crossed_past(past) if shape.crosses(layer) else past + 3 * stage_of_layer[layer]
        return shape.empty_cache(name, batch, held)

    return tuple(make(name).to(shape.device) for name in names)


def _crossed_past(past: int) -> int:
    """A number of cached visual tokens that no other size of the sample has."""
    return past + 100
