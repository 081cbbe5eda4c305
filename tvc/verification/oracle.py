"""The definition of a compiled model: the untouched one, in which a dropped token is masked from its layer on.

One call of the untouched model over the prompt and all that was generated gives every step's logits. Hooks in front of
its blocks narrow its own mask to the tokens that are left, put merged values in place and carry out the steps by hand.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from tvc.chunks import Crossing
from tvc.kernels.op import Attention, Tap
from tvc.policy.positions import Rescale, Stride
from tvc.trace.layout import blocks, has_attention, residual_argument
from tvc.trace.observe import Observer, Seen, kept_offsets, observed, plain_cache, replaced
from tvc.trace.parts import feature_owner
from tvc.verification.branches import asked, changes, watched
from tvc.verification.bypass import Bypass
from tvc.verification.encoder import EncoderTaps, feature_parts, tile_mask, token_map
from tvc.verification.entry import Entry
from tvc.verification.following import cached_values, followed, layer_of
from tvc.verification.masks import evicted, in_window, narrowed, running
from tvc.verification.numbering import Rotary, all_in_fractions, at_frequencies
from tvc.verification.options import Options
from tvc.verification.pictures import Pictures, token_pixels
from tvc.verification.reselection import Choice, Reselection
from tvc.verification.steps import Outcome, Sample, carry_out, constants, frames_in, text_behind, text_that_rates
from tvc.verification.turns import before, memories, parted

UNTURNED = "at position 0"  # behind a layer's name: what its probe saw when no position turned it


@dataclasses.dataclass
class Expected:
    """What the compiled model has to give."""

    logits: torch.Tensor  # [B, steps, vocabulary]
    cache: Any = None  # the model's own, over all places
    held: list[torch.Tensor] = dataclasses.field(default_factory=list)  # per layer [B, S] bool: columns in its cache
    doubts: list[float] = dataclasses.field(default_factory=list)  # per layer, see `carry_out`
    unsettled: float = 1.0  # how far rounding may move merged values where it settles choices otherwise
    outcomes: list[tuple[int, str, list[Outcome]]] = dataclasses.field(default_factory=list)  # step, site, per sample
    choices: list[Choice] = dataclasses.field(default_factory=list)  # of decode steps, where they choose
    memories: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)  # by output, see `turns.memories`


@dataclasses.dataclass(frozen=True)
class Case:
    """Inputs of one call, padded on the left, and what was generated behind them."""

    inputs: Mapping[str, torch.Tensor]
    tokens: torch.Tensor  # [B, steps - 1] int64
    kept: Mapping[str, torch.Tensor]  # the compiled model's
    axes: int  # rotary position axes; 0: plain positions
    visual_token_ids: tuple[int, ...]
    cached: Callable[[int], torch.Tensor | None] = lambda _layer: None  # its values [B, H, S, d] of a layer, or NaN
    chosen: Sequence[torch.Tensor] = ()  # [steps - 1] of [B, S] bool: what its decode steps attended to
    crossing: Crossing | None = None  # set where the text reads visual tokens by cross-attention
    turns: tuple[int, ...] = (0,)  # first columns of the calls that the inputs came in

    @property
    def prompt(self) -> int:
        return int(self.inputs["input_ids"].shape[1])


def expect(model: Any, policy: Any, case: Case, slack: float) -> Expected:
    """What `across.define` gives of a model whose visual tokens are in the decoder's sequence."""
    with torch.no_grad():
        oracle = _Oracle(model, policy, case, slack)
        expected = oracle.run()
        lost = [torch.zeros_like(held) for held in expected.held]
        if any(step.evict for step in policy.steps):
            # What leaves earlier caches is known when the last cut has been made: once more, with that masked.
            lost = evicted(policy.steps, expected.held)
            oracle = _Oracle(model, policy, case, slack, lost)
            expected = oracle.run()
        expected.held = oracle.options.left(expected.held, lost, expected.cache)
        return expected


class _Oracle(Observer):
    def __init__(self, model: Any, policy: Any, case: Case, slack: float, lost: Sequence[torch.Tensor] = ()):
        self.model, self.policy, self.case, self.slack = model, policy, case, slack
        self.depth, self.layer = len(blocks(model)[0]), 0
        self.lost = lost  # per decoder layer what `evicted` says
        self.primitives = [p for step in policy.steps for p in step.primitives()]
        self.steps: dict[str, list[tuple[int, Any]]] = {}
        for number, step in enumerate(policy.steps):
            self.steps.setdefault(step.at, []).append((number, step))
        taps = [tap for p in self.primitives for tap in p.taps().values()]
        self.tapped = {tap.layer for tap in taps if tap.layer}
        self.sees_pixels = any(tap.kind == "pixel" for tap in taps)
        inside = any(name.startswith("vision.") for name in (*self.tapped, *self.steps))
        self.sees_encoder = self.sees_pixels or inside
        self.seen: dict[str, list[Seen]] = {}
        self.inputs_of: dict[str, torch.Tensor] = {}  # hidden states that enter a tapped decoder layer
        self.expected = Expected(torch.empty(0))
        self.lengths: dict[str, list[int]] = {}  # visual tokens of each image and of each video
        self.frames_of: list[int] = []  # frames of each image and video of the batch, as `_owners` numbers them
        self.frames: list[tuple[torch.Tensor, torch.Tensor]] = []  # per sample (frame, place) of each visual token
        self.pictures = Pictures()
        self.pixels = torch.empty(0)  # [visual tokens of all samples, P], where a step looks at them
        self.samples: list[Sample] = []
        self.tiles: list[Sample] = []
        self.doubt = 1.0  # how many times more than rounding does elsewhere, merges in doubt may move what is behind
        self.proportional = False  # sizes of tokens are added to the encoder's logits from here on
        self.transitions = asked(taps)
        self.rates = any("raters" in tap.of for tap in taps)
        self.probing = False
        rule = policy.reselect
        self.reselection = None if rule is None else Reselection(rule, case.prompt, case.chosen, slack)
        self.closed: tuple[torch.Tensor, torch.Tensor] | None = None  # what `leaving` has to put back
        self.turned_by: Any = None  # the position embeddings that the block was given
        self.rotary, self.entry = Rotary(model.get_decoder()), Entry(model.get_decoder())
        self.options = Options(policy, case.prompt, slack)
        self.bypass = Bypass(policy.steps)
        self.fractions: torch.Tensor | None = None  # [B, S] positions, where visual tokens take fractions of one

    # The call ---------------------------------------------------------------------------------------------------------

    def run(self) -> Expected:
        inputs = self._inputs()
        if self.sees_encoder:
            with kept_offsets(self.model):
                self.map = token_map(self.model, self.case.inputs)
                if self.sees_pixels:
                    self.pixels = token_pixels(self.model, self.case.inputs, self.map, sum(self._visual_counts()))
        owner: Any = feature_owner(self.model)

        def noting(name: str, original: Any) -> Any:
            def get_features(*args: Any, **kwargs: Any) -> Any:
                output = original(*args, **kwargs)
                self.lengths[name] = [len(part) for part in feature_parts(output)]
                return output

            return get_features

        with contextlib.ExitStack() as stack:
            stack.enter_context(kept_offsets(self.model))
            for name in ("get_image_features", "get_video_features"):
                if hasattr(owner, name):
                    stack.enter_context(replaced(owner, name, noting(name, getattr(owner, name))))
            stack.enter_context(observed(self.model, self))
            for watch in (self.entry.watched(), self.rotary.watched(), watched(self.model, self.transitions)):
                stack.enter_context(watch)
            if isinstance(rule := self.policy.positions, Rescale):
                stack.enter_context(at_frequencies(self.rotary.modules[0], rule))
            steps = self.case.tokens.shape[1] + 1
            if "logits_to_keep" in inspect.signature(self.model.forward).parameters:
                inputs["logits_to_keep"] = steps
            self.expected.cache = plain_cache(self.model)
            given = {**inputs, "past_key_values": self.expected.cache, "use_cache": True}
            self.expected.logits = self.model(**given).logits[:, -steps:]
        return self.expected

    def _inputs(self) -> dict[str, Any]:
        """The case's inputs with the generated tokens behind them."""
        inputs, tokens = dict(self.case.inputs), self.case.tokens
        ids = inputs["input_ids"]
        self.mask = torch.cat([inputs["attention_mask"].bool(), torch.ones_like(tokens, dtype=torch.bool)], 1)
        for name, value in inputs.items():
            if value.shape == ids.shape and name != "attention_mask":
                more = tokens if name == "input_ids" else torch.zeros_like(tokens, dtype=value.dtype)
                inputs[name] = torch.cat([value, more], 1)
        inputs["attention_mask"] = self.mask.long()
        if not self.case.axes:  # what `generate` passes: places without the padding in front
            places = (self.mask.long().cumsum(1) - 1).clamp(min=0)
            rest = {name: value for name, value in inputs.items() if name != "input_ids"}
            prepared = self.model.prepare_inputs_for_generation(inputs["input_ids"], **rest, position_ids=places)
            self.positions = inputs["position_ids"] = prepared.get("position_ids", places)  # some families count from 1
        self.alive = self.mask.clone()
        return inputs

    # Blocks -----------------------------------------------------------------------------------------------------------

    def entering(self, component: str, index: int, block: torch.nn.Module, arguments: dict[str, Any]) -> None:
        name = residual_argument(block)
        hidden = arguments[name]
        if component == "vision":
            if index == 0 and hidden.dim() == 3:
                self._enter_encoder(hidden)
            arguments[name] = self._steps_at(f"vision.{index}", hidden, block, arguments)
            self.seen.pop(f"vision.{index}", None)  # a probe of this block
            return
        self.layer = index
        if index == 0:
            self.entry.reached(hidden)
            self._enter_decoder(hidden)
            features = self.entry.features(hidden)
            left = self._steps_at("projector", features, block, arguments)
            hidden = hidden if left is features else self.entry.hidden_of(left)
            if self.rates:
                told = [(sample, text_that_rates(sample, hidden[sample.row])) for sample in self.samples]
                self.samples = [dataclasses.replace(sample, raters=columns) for sample, columns in told]
        hidden = self.bypass.back(index, hidden, self.alive, self.samples)
        if f"language.{index}" in self.tapped:
            self.inputs_of[f"language.{index}"] = hidden
        self.turned_by = arguments.get("position_embeddings")
        self._number(index - 1, arguments)  # a step that asks this block finds what is left numbered already
        self.bypass.leaving(index, hidden, self.alive, self.samples)
        hidden = self._steps_at(f"language.{index}", hidden, block, arguments)
        arguments[name] = hidden
        if has_attention(block):
            arguments["attention_mask"] = self._narrowed(arguments["attention_mask"])
        else:
            self._close_up(name, arguments)
        self._number(index, arguments)
        if self.options.unrotated is not None and has_attention(block):
            zeros = self.rotary.unturned(self.mask, self.case.axes, self.turned_by)
            self.options.unrotated.look(block, arguments, zeros)
        self.seen.pop(f"language.{index}", None)
        self.expected.held.append(self.alive.clone())
        self.expected.doubts.append(self.doubt)

    def attention(self, component: str, index: int, seen: Seen) -> torch.Tensor | None:
        name = f"{component}.{index}"
        if component == "vision" and self.tiles and (name != "vision.0" or name in self.steps):
            seen.mask = tile_mask(seen, self.tile_alive, self.tiles if self.proportional else None)
        if component == "language" and seen.window and seen.mask is not None:
            seen.mask = in_window(seen.mask, seen.window, self.case.prompt)
        if name in self.tapped:
            self.seen.setdefault(name, []).append(dataclasses.replace(seen))
        if self.reselection is not None and name == self.reselection.rule.layer and not self.probing:
            self.reselection.look(seen, [sample.slots for sample in self.samples])
            self.expected.choices = self.reselection.choices
        return self.options.attend(index, seen) if component == "language" else seen.mask

    def _close_up(self, name: str, arguments: dict[str, Any]) -> None:
        """A block that mixes neighbours runs on the tokens that are left, side by side; masking would not do."""
        order = torch.argsort(self.alive.to(torch.int8), dim=1, stable=True)[:, -int(self.alive.sum(1).max()) :]
        hidden = arguments[name]
        index = order.unsqueeze(2).expand(-1, -1, hidden.shape[2])
        self.closed = (hidden, index)
        arguments[name] = hidden.gather(1, index)
        arguments["attention_mask"] = self.alive.gather(1, order)

    def leaving(self, component: str, index: int, output: Any) -> Any:
        if self.closed is None:
            return None
        hidden, places = self.closed
        self.closed = None
        if isinstance(output, tuple):
            return (hidden.scatter(1, places, output[0]), *output[1:])
        return hidden.scatter(1, places, output)

    def _narrowed(self, own: torch.Tensor | None) -> torch.Tensor:
        """The model's own mask without the keys that were dropped, or are left out by decode steps."""
        mask = self.options.narrowed(narrowed(own, self.alive, self._lost(), self.case.prompt))
        return mask if self.reselection is None else self.reselection.narrowed(mask, self.layer)

    def _lost(self) -> torch.Tensor:
        """[B, S] bool: what leaves the cache of the block at hand."""
        lost = self.lost[self.layer] if self.lost else torch.zeros_like(self.alive)
        return lost | self.options.away(self.layer, self.alive & ~lost)

    def _number(self, index: int, arguments: dict[str, Any]) -> None:
        """Puts other positions in the place of a block's: fractions, or running numbers of what a cut at `index` or
        before it has left.
        """
        positions = self.fractions
        if self.policy.positions == "renumber" and self.bypass.reduced(index):
            positions = running(self.alive, self._lost(), self.case.prompt)
        if positions is not None:
            arguments["position_embeddings"] = self.rotary.at(positions, self.turned_by)
            arguments["position_ids"] = positions

    # Steps ------------------------------------------------------------------------------------------------------------

    def _enter_encoder(self, hidden: torch.Tensor) -> None:
        if not any(site.startswith("vision.") for site in self.steps):
            return
        owner = self.map.reshape(hidden.shape[:2])
        for row in range(len(hidden)):
            columns = (owner[row] >= 0).nonzero().flatten()
            rest = (owner[row] < 0).nonzero().flatten()
            self.tiles.append(Sample.fresh(row, rest, columns, torch.zeros_like(columns)))
        self.tile_alive = torch.ones_like(owner, dtype=torch.bool)

    def _enter_decoder(self, hidden: torch.Tensor) -> None:
        ids = self.case.inputs["input_ids"]
        mask = self.case.inputs["attention_mask"].bool()
        visual = torch.isin(ids, torch.tensor(self.case.visual_token_ids, device=ids.device)) & mask
        owner = self._owners(ids, visual)
        if isinstance(self.policy.positions, Stride):
            self.fractions = all_in_fractions(self.mask, owner, self.positions, self.policy.positions.stride)
        for row in range(len(ids)):
            self.samples += parted(row, mask[row], visual[row], owner[row], self.case.turns)
            self.pictures.shown.append(owner[row, visual[row]])
            self.frames.append(frames_in(self.pictures.shown[row], self.frames_of))
        self.options.enter(self.samples, self.frames, hidden, self.case.cached, self.depth)
        self._drop_of_encoder()

    def _owners(self, ids: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
        """[B, S] which image or video of the batch each visual token is of."""
        owner = torch.full_like(ids, -1)
        found, left = 0, dict(self.lengths)  # the image's placeholder comes first, as its name does
        for token in self.case.visual_token_ids:
            places = (visual & (ids == token)).nonzero()
            kind = next((name for name in sorted(left) if sum(left[name]) == len(places)), "")
            lengths = left.pop(kind, None) or [int((places[:, 0] == row).sum()) for row in range(len(ids))]
            videos = kind == "get_video_features"
            grids = self.case.inputs.get("video_grid_thw" if videos else "image_grid_thw")
            self.frames_of += [1] * len(lengths) if grids is None or not videos else grids[:, 0].tolist()
            self.pictures.note(lengths, grids)
            for part in places.split(lengths):
                owner[part[:, 0], part[:, 1]] = found
                found += 1
        return owner

    def _drop_of_encoder(self) -> None:
        """Visual tokens whose encoder token was dropped never reach the decoder."""
        if not self.tiles:
            return
        left = {int(self.map.reshape(self.tile_alive.shape)[t.row, c]) for t in self.tiles for c in t.slots.tolist()}
        start = 0
        for number, sample in enumerate(self.samples):
            stays = [i for i in range(len(sample.slots)) if start + i in left]
            start += len(sample.slots)
            index = torch.tensor(stays, dtype=torch.int64, device=sample.slots.device)
            self.samples[number] = sample.taking(index).entering()
        self._mark_alive(self.samples, self.alive)

    def _mark_alive(self, samples: list[Sample], alive: torch.Tensor) -> None:
        for sample in samples:
            stays = torch.ones_like(alive[sample.row])
            stays[sample.start : sample.stop] = False
            stays[sample.text] = stays[sample.slots] = True
            alive[sample.row] &= stays

    def _steps_at(
        self, site: str, hidden: torch.Tensor, block: torch.nn.Module, arguments: dict[str, Any]
    ) -> torch.Tensor:
        """The hidden states behind all steps at `site`."""
        steps = self.steps.get(site, [])
        inside = site.startswith("vision.")
        samples, alive = (self.tiles, self.tile_alive) if inside and steps else (self.samples, self.alive)
        for place, (number, step) in enumerate(steps):
            if self._asks_own_layer(step, site):
                self._probe(block, arguments, hidden, inside)
            last = place == len(steps) - 1
            outcomes, entered, came = [], hidden, tuple(samples)

            def tap_value(tap: Tap, primitive: Any, sample: Sample, entered: torch.Tensor = entered) -> Any:
                return self._tap(tap, primitive, sample, entered, inside)

            self.expected.memories |= memories(step, came, tap_value)
            for index, sample in enumerate(came):
                theirs = self._theirs(site, sample) if last else None
                doubts = (self.slack, self.doubt)
                outcome = carry_out(step, sample, entered[sample.row], tap_value, theirs, *doubts, before(came, sample))
                outcomes.append(outcome)
                if outcome.feature is not None:
                    hidden = hidden.clone()
                    hidden[sample.row, outcome.sample.slots] = outcome.feature.to(hidden.dtype)
                samples[index] = outcome.sample if site != "projector" else outcome.sample.entering()
            self._mark_alive(samples, alive)
            theirs, settled = self._cached(site, block, arguments) if last and not inside else None, False
            if theirs is not None:
                given = {**arguments, "attention_mask": self._narrowed(arguments["attention_mask"])}
                values_of = functools.partial(cached_values, self.model, site, block, given, self.entry)
                hidden, settled = followed(hidden, outcomes, values_of, theirs, self.slack)
                samples[:] = [each.sample if site != "projector" else each.sample.entering() for each in outcomes]
            self.expected.unsettled = max([self.expected.unsettled, *(o.unsettled for o in outcomes)])
            self.doubt = max([self.doubt, *(o.doubt if settled else o.unsettled for o in outcomes)])
            self.proportional |= step.merge is not None and step.merge.proportional
            self.expected.outcomes.append((number, site, outcomes))
        return hidden

    def _cached(self, site: str, block: torch.nn.Module, arguments: dict[str, Any]) -> torch.Tensor | None:
        """What the compiled model's next block cached of the tokens that `site` left, where that can be said."""
        between = site == "projector" and "language.0" in self.steps
        known = not between and has_attention(block) and "past_key_values" in arguments and not self.options.pool
        return self.case.cached(layer_of(site)) if known else None

    def _theirs(self, site: str, sample: Sample) -> torch.Tensor | None:
        """Columns of the visual tokens that the compiled model kept."""
        if site not in self.case.kept:
            return None
        kept = self.case.kept[site]
        if site.startswith("vision."):
            owner = self.map.reshape(self.tile_alive.shape)[sample.row]
            numbers = self._global(kept)
            return torch.tensor(
                [c for c in sample.slots.tolist() if int(owner[c]) in numbers], dtype=torch.int64, device=owner.device
            )
        row = kept[sample.row][kept[sample.row] >= 0]
        return sample.slots[torch.isin(sample.number, row)] if site == "projector" else row

    def _global(self, kept: torch.Tensor) -> set[int]:
        """Numbers over all samples from numbers within each sample [B, T]."""
        counts = self._visual_counts()
        return {sum(counts[:b]) + i for b, row in enumerate(kept.tolist()) for i in row if i >= 0}

    def _asks_own_layer(self, step: Any, site: str) -> bool:
        kinds = ("attention", "key")
        return any(t.layer == site and t.kind in kinds for p in step.primitives() for t in p.taps().values())

    def _probe(self, block: torch.nn.Module, arguments: dict[str, Any], hidden: torch.Tensor, inside: bool) -> None:
        """Runs the block once on all tokens, for its own query and key."""
        given = {**arguments, residual_argument(block): hidden}
        given.pop("past_key_values", None)  # it comes once more, to stay
        if not inside:
            given["attention_mask"] = self._narrowed(arguments["attention_mask"])
        self.probing = True
        block.forward(**given)
        if not inside and any(not tap.rotary for p in self.primitives for tap in p.taps().values()):
            name = next(reversed(self.seen))
            turned = self.seen[name].copy()
            if "position_embeddings" in given:  # else positions turn nothing
                given["position_embeddings"] = self.rotary.unturned(self.mask, self.case.axes, self.turned_by)
            block.forward(**given)
            self.seen[f"{name} {UNTURNED}"] = [self.seen[name].pop()]
            self.seen[name] = turned
        self.probing = False

    # Taps -------------------------------------------------------------------------------------------------------------

    def _tap(self, tap: Tap, primitive: Any, sample: Sample, hidden: torch.Tensor, inside: bool) -> Any:
        layer = tap.layer or ""
        if tap.kind in ("weights", "memory"):
            return constants(tap, hidden)
        if tap.kind == "ordinal":
            return sample.origin[None]
        if tap.kind == "transition":
            number = int(layer.removeprefix("language."))
            there = sample.within(self.expected.held[number][sample.row].nonzero().flatten())
            return changes(self.transitions[number], sample, there)[None]
        if tap.kind == "spent":
            return sample.spent(int(layer.removeprefix("language.")))
        if tap.kind == "frame":
            return tuple(values[sample.number][None] for values in self.frames[sample.row])
        if tap.kind == "neighbour":
            return self.pictures.beside(sample, self.frames[sample.row], tap.columns)
        if tap.kind == "row":
            return self.pictures.rows(sample)
        if tap.kind == "pixel" or (not inside and layer.startswith("vision.")):
            return self._encoder_tap(tap, primitive, sample)
        if tap.kind in ("feature", "text") and layer in self.inputs_of:
            hidden = self.inputs_of[layer]
        if tap.kind == "feature":
            return hidden[sample.row, sample.slots][None]
        if tap.kind == "text":
            columns = text_behind(sample) if tap.of == ("behind",) else sample.text
            rows = hidden[sample.row, columns][None]
            return rows, torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device)
        seen = self.seen[layer if tap.rotary else f"{layer} {UNTURNED}"][-1]
        if tap.kind == "key":
            keys = seen.key[sample.row].float()
            joined = keys.transpose(0, 1).flatten(1) if tap.of == ("joined",) else keys.mean(0)
            return joined[sample.slots][None]
        row = slice(sample.row, sample.row + 1)
        mask = seen.mask if seen.mask is None or len(seen.mask) == 1 else seen.mask[row]
        rows = self._rows(tap.of[0], sample, inside, mask)[None]
        parts = (seen.query[row], seen.key[row], mask, rows, sample.slots[None, :, None], seen.scale)
        return Attention(*parts, softcap=seen.softcap)

    def _rows(self, of: str, sample: Sample, inside: bool, mask: torch.Tensor | None) -> torch.Tensor:
        if of == "cls":
            return torch.zeros(1, dtype=torch.int64, device=sample.slots.device)
        if of == "last":
            return torch.tensor([sample.stop or self.case.prompt], device=sample.slots.device) - 1
        if of == "text":
            return sample.text
        if of == "raters":
            return sample.raters if sample.raters is not None else sample.text
        if of == "visual":
            return sample.slots
        if mask is None:
            return torch.cat([sample.text, sample.slots]).sort().values
        allowed = mask if mask.dtype == torch.bool else mask >= 0
        # All that the tap's layer held of the call: what any row may attend to.
        return sample.within(allowed[0, 0].any(0).nonzero().flatten())

    def _encoder_tap(self, tap: Tap, primitive: Any, sample: Sample) -> torch.Tensor:
        visual = self._visual_counts()
        taps = EncoderTaps(self.map, sum(visual), self.lengths["get_image_features"])
        calls = self.seen.get(str(tap.layer), [])
        if tap.kind == "pixel":
            values = self.pixels
        elif tap.kind == "attention" and primitive.key == "global":
            values = taps.of_global(calls, primitive.above)
        elif tap.kind == "attention":
            values = taps.attention(calls, tap.of[0], primitive.heads)
        else:
            values = taps.keys(calls)
        return values[sum(visual[: sample.row]) + sample.number][None]

    def _visual_counts(self) -> list[int]:
        """Visual tokens of each sample before any step."""
        ids = self.case.inputs["input_ids"]
        visual = torch.isin(ids, torch.tensor(self.case.visual_token_ids, device=ids.device))
        return [int(count) for count in visual.sum(1)]
