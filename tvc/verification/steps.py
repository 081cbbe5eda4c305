"""Carries out a policy step by hand: on one sample, on the untouched model's own hidden states, without padding."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tvc.kernels.combine_scores import combine
from tvc.kernels.op import Frames, Scope, Tap
from tvc.verification.ties import FINER, SHARES, Drawn, doubts, explained, fallen_short, moved

TapValue = Callable[[Tap, Any, "Sample"], Any]


@dataclasses.dataclass
class Sample:
    """The tokens of one sample (or of one tile of the vision encoder) that are still there.

    `slots` are the visual tokens' columns in the sequence; the other tensors run along with them.
    """

    row: int
    text: torch.Tensor  # [T] int64 columns that a step never touches
    slots: torch.Tensor  # [V] int64
    segment: torch.Tensor  # [V] int64 image of the sample
    images: int
    size: torch.Tensor  # [V] float32 originals per token
    origin: torch.Tensor  # [V] int64 number among the tokens that entered the component
    number: torch.Tensor  # [V] int64 number among all visual tokens of the sample
    past: tuple[tuple[int, torch.Tensor], ...] = ()  # (decoder layer, [images] tokens from there on) at entry and cuts
    start: int = 0  # the first column of the call that brought the tokens
    stop: int | None = None  # and the one behind its last; None: it brought all there are
    raters: torch.Tensor | None = None  # columns of the text that rates visual tokens

    @classmethod
    def fresh(cls, row: int, text: torch.Tensor, slots: torch.Tensor, segment: torch.Tensor) -> Sample:
        numbers = torch.arange(len(slots), device=slots.device)
        images = int(segment.max()) + 1 if len(segment) else 0
        size = torch.ones(len(slots), device=slots.device)
        return cls(row, text, slots, segment, images, size, numbers, numbers).passing(0)

    def taking(self, index: torch.Tensor) -> Sample:
        return dataclasses.replace(
            self,
            slots=self.slots[index],
            segment=self.segment[index],
            size=self.size[index],
            origin=self.origin[index],
            number=self.number[index],
        )

    def behind(self, earlier: Sequence[Sample]) -> Sample:
        """The tokens of earlier calls and, behind them, this one's, as one call would have brought them."""
        parts, images = [*earlier, self], 0
        segments = []
        for part in parts:
            segments.append(part.segment + images)
            images += part.images
        names = ("text", "slots", "size", "origin", "number")
        joined: dict[str, Any] = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
        return dataclasses.replace(self, **joined, segment=torch.cat(segments), images=images)

    def within(self, columns: torch.Tensor) -> torch.Tensor:
        """Those of the columns [N] that came in the sample's own call."""
        own = columns[columns >= self.start]
        return own if self.stop is None else own[own < self.stop]

    def entering(self) -> Sample:
        """The same tokens, numbered and counted afresh: they enter another component, which takes each for one."""
        origin = torch.arange(len(self.slots), device=self.slots.device)
        return dataclasses.replace(self, origin=origin, size=torch.ones_like(self.size), past=()).passing(0)

    def passing(self, layer: int) -> Sample:
        """The same, with a note of how many tokens each image has from a decoder layer on."""
        counts = torch.bincount(self.segment, minlength=self.images)
        return dataclasses.replace(self, past=(*self.past, (layer, counts)))

    def spent(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """([1, images] tokens of each image at the entry, [1, images] their sum over the layers before `layer`)."""
        starts = [start for start, _ in self.past]
        total = torch.zeros_like(self.past[0][1])
        for (start, counts), end in zip(self.past, [*starts[1:], layer], strict=True):
            total += counts * (end - start)
        return self.past[0][1][None], total[None]

    def scope(self, name: str, frame: torch.Tensor | None = None) -> Scope:
        """The scopes of a step of that name; `frame [V]` of each token, for `frame`."""
        if frame is not None:
            counts = torch.bincount(frame)[None]
            return Scope(frame[None], counts, counts.shape[1])
        counts = torch.bincount(self.segment, minlength=self.images)[None]
        if name == "image":
            return Scope(self.segment[None], counts, self.images)
        return Scope(torch.zeros_like(self.segment)[None], counts.sum(1, keepdim=True), 1)


@dataclasses.dataclass
class Outcome:
    """What a step left: the sample behind it, and values of its visual tokens where it merges."""

    sample: Sample
    feature: torch.Tensor | None  # [V', D]
    planned: int  # visual tokens that the plan counts behind the step
    exact: bool  # the plan's count is what stays, not just a bound
    different: int = 0  # tokens that the compiled model decided otherwise
    gap: float = 0.0  # how far their scores lie from the cut
    scale: float = 0.0  # the largest score
    doubt: float = 1.0  # how many times more than elsewhere rounding may move its merged values, choices being equal
    unsettled: float = 1.0  # the same where rounding may settle choices otherwise, too
    drawn: tuple[Drawn, ...] = ()  # what else rounding may make of the merged values; see `stayed`
    stayed: torch.Tensor | None = None  # [V] bool: those of the tokens that entered which stay


def carry_out(
    step: Any,
    sample: Sample,
    hidden: torch.Tensor,
    tap_value: TapValue,
    theirs: torch.Tensor | None,
    slack: float,
    doubt: float = 1.0,
    earlier: Sequence[Sample] = (),
) -> Outcome:
    """The step on one sample.

    Args:
        step: the resolved policy step.
        sample: the tokens that enter.
        hidden: [S, D] the hidden states of the sample's sequence.
        tap_value: gives the value of a tap, for a batch of this one sample.
        theirs: columns of the visual tokens that the compiled model kept; None where it does not say.
        slack: relative difference of scores that rounding explains. Within it the compiled model's choice is followed.
        doubt: how many times more the hidden states may be off, behind earlier merges.
        earlier: the same sample in earlier calls on its cache, as it came to the step, where scores remember these.
    """
    if not len(sample.slots):
        return Outcome(sample, None, 0, True)
    by_hand = _ByHand(step, sample, hidden, tap_value, earlier)
    outcome = _chosen(by_hand, theirs, slack)
    if outcome.feature is not None:
        stays = torch.isin(sample.slots, outcome.sample.slots)
        own = Drawn.of(1.0, (stays.nonzero().flatten(), outcome.feature, outcome.sample.size), len(stays))
        outcome.drawn, outcome.stayed = by_hand.drawn(slack * doubt, by_hand.again), stays
        outcome.doubt, outcome.unsettled = doubts(own, outcome.drawn, slack, doubt)
    if step.site.component == "language":
        outcome.sample = outcome.sample.passing(step.site.index)
    return outcome


def _chosen(by_hand: _ByHand, theirs: torch.Tensor | None, slack: float) -> Outcome:
    sample, score = by_hand.sample, by_hand.score()
    index, feature, size = by_hand.decide(score)
    planned, exact = _planned(by_hand)
    made = dataclasses.replace(sample.taking(index), size=size)
    outcome = Outcome(made, feature, planned, exact)
    if theirs is None:
        return outcome
    mine = torch.isin(sample.slots, made.slots)
    wanted = torch.isin(sample.slots, theirs)
    if bool((mine == wanted).all()):
        return outcome
    outcome.different = int((mine != wanted).sum())
    outcome.gap = float("inf")
    if score is not None:
        outcome.scale = float(score.abs().max())
        outcome.gap = _gap(score[0], mine, wanted, by_hand.decide, sample, slack)
        if outcome.gap <= slack * outcome.scale:  # rounding decided: go on with what the compiled model chose
            nudge = 4 * slack * outcome.scale
            nudged = score + nudge * (wanted & ~mine).float() - nudge * (mine & ~wanted).float()
            index, feature, size = by_hand.chosen_by(score, nudged, wanted)
            made = dataclasses.replace(sample.taking(index), size=size)
            outcome.sample, outcome.feature = made, feature
    if outcome.gap > slack * outcome.scale:

        def again() -> Any:
            other, other_score = by_hand.shaken(score, slack)
            return other.decide(other_score)

        found = fallen_short(lambda: by_hand.decide(score), again, wanted)
        if found is not None:
            short, unsure, (index, feature, size) = found
            outcome.gap, outcome.scale = short, unsure / slack
            outcome.sample, outcome.feature = dataclasses.replace(sample.taking(index), size=size), feature
    if outcome.gap > slack * outcome.scale:  # no ranking that could tell by how much: whether it can be at all
        own = Drawn.of(1.0, by_hand.decide(score), len(wanted))
        settled = explained(own, by_hand.drawn(slack, by_hand.decided_again, FINER), wanted)
        if settled is not None:
            made = sample.taking(wanted.nonzero().flatten())
            outcome.gap, outcome.feature = 0.0, settled[0]
            outcome.sample = dataclasses.replace(made, size=settled[1])
            by_hand.again = by_hand.decided_again
    if not torch.equal(outcome.sample.slots, sample.slots[wanted]):  # reported; what follows is compared all the same
        outcome.sample, outcome.feature = sample.taking(wanted.nonzero().flatten()), None
    return outcome


def _gap(
    score: torch.Tensor,
    mine: torch.Tensor,
    wanted: torch.Tensor,
    decide: Callable[..., Any],
    sample: Sample,
    slack: float,
) -> float:
    """How far the scores of the tokens that were decided differently lie from the cut of their image."""
    shift = slack * float(score.abs().max())

    def explains(moved: torch.Tensor) -> bool:
        return torch.equal(decide(moved[None])[0], wanted.nonzero().flatten())

    if explains(score + shift) or explains(score - shift):  # thresholds and gates: everything moves at once
        return 0.0
    worst = 0.0
    for image in sample.segment[mine != wanted].unique():
        here = sample.segment == image
        kept = score[here & mine]
        cut = kept.min() if len(kept) else score[here].max()
        worst = max(worst, float((score[here & (mine != wanted)] - cut).abs().max()))
    # A selector that is more than a cut of the ranking: what it makes of scores that rounding moved apart.
    if worst > shift and explains(score + shift * (wanted.float() - mine.float())):
        return 0.0
    return worst


class _ByHand:
    """One step's primitives on one sample."""

    def __init__(self, step: Any, sample: Sample, hidden: torch.Tensor, tap_value: TapValue, earlier: Sequence[Sample]):
        self.step, self.sample, self.hidden, self.tap_value = step, sample, hidden, tap_value
        self.earlier = earlier
        self.feature = hidden[sample.slots][None]
        self.scope = self._scope(sample)
        self.ranked: torch.Tensor | None = None  # what the last decision was made of: the score
        self.chosen: torch.Tensor | None = None  # and the tokens selected
        self.again = self.merged_again  # how it is made once more; from scratch where rounding settled it otherwise

    def _scope(self, sample: Sample) -> Scope:
        by_frame = self.step.scope == "frame"
        frame = self.tap_value(Tap("frame"), None, sample)[0][0] if by_frame else None
        return sample.scope(self.step.scope, frame)

    def _taps(self, primitive: Any) -> dict[str, Any]:
        return taps_of(primitive, self.sample, self.tap_value)

    def score(self) -> torch.Tensor | None:
        """[1, V] float32."""
        step = self.step
        terms = step.exit.score if step.exit is not None else step.score
        if not terms:
            return None
        parts = [(self._one(term.primitive), term.weight, term.normalize) for term in terms]
        segment = self.sample.segment[None]
        if step.exit is None and step.select.terms:
            apart = [combine([part], segment) for part in parts]
            joined: torch.Tensor = step.select.joined(apart, self.scope, **self._taps(step.select))
            return joined
        return combine(parts, segment)

    def _one(self, primitive: Any) -> torch.Tensor:
        taps, scope = self._taps(primitive), self.scope
        if remembers(primitive) and self.earlier:  # what it would say had all come at once, of the last tokens
            whole = self.sample.behind(self.earlier)
            taps, scope = taps_of(primitive, whole, self.tap_value), self._scope(whole)
        given = taps.get("attention")
        if isinstance(given, torch.Tensor):  # an attention of the vision encoder arrives as the score itself
            return given
        value: torch.Tensor = primitive.apply(scope=scope, **taps) if primitive.scoped else primitive.apply(**taps)
        return value[:, -len(self.sample.slots) :]

    def shaken(self, score: torch.Tensor | None, slack: float, seed: int = 0) -> tuple[_ByHand, torch.Tensor | None]:
        """The same with features, taps and score moved by as much as rounding may."""
        generator = torch.Generator().manual_seed(seed)

        def tap_value(tap: Tap, primitive: Any, sample: Sample) -> Any:
            return moved(self.tap_value(tap, primitive, sample), slack, generator)

        other = _ByHand(self.step, self.sample, moved(self.hidden, slack, generator), tap_value, self.earlier)
        if score is not None:
            noise = torch.randn(score.shape, generator=generator).to(score.device)
            score = score + slack * score.abs().max() * noise
        return other, score

    def decided_again(self, slack: float, seed: int) -> Any:
        """What `decide` gives on inputs that are moved by `slack`."""
        other, score = self.shaken(self.ranked, slack, seed)
        return other.decide(score)

    def merged_again(self, slack: float, seed: int) -> Any:
        """The same, the tokens that are selected being those of the last decision."""
        other, score = self.shaken(self.ranked, slack, seed)
        return other.merge_of(self.chosen, score)

    def drawn(
        self, slack: float, again: Callable[[float, int], Any], shares: tuple[float, ...] = SHARES
    ) -> tuple[Drawn, ...]:
        """What `again` gives on inputs that are moved in several ways, by `shares` of `slack`."""
        visual = len(self.sample.slots)
        return tuple(Drawn.of(share, again(share * slack, seed), visual) for seed, share in enumerate(shares))

    def chosen_by(self, score: torch.Tensor, nudged: torch.Tensor, wanted: torch.Tensor) -> Any:
        """What `decide` gives where `nudged` scores select the tokens `wanted` [V] bool.

        What becomes of the others goes by the scores as they are: nudged ones rank the tokens that are left otherwise.
        """
        decision = self.decide(nudged)
        if self.chosen is None:
            return decision
        chosen, self.ranked = self.chosen, score
        merged = self.merge_of(chosen, score)
        if torch.equal(merged[0], wanted.nonzero().flatten()):
            return merged
        return self.decide(nudged)

    def decide(self, score: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """(numbers of the visual tokens that stay, their merged values [K, D], their sizes [K])."""
        step, size = self.step, self.sample.size
        self.ranked, self.chosen = score, None
        if step.merge is not None:
            return self.merge_of(None, score)
        if step.exit is not None:
            leaves = bool(step.exit.gate.apply(score, self.scope, **self._taps(step.exit.gate)).all())
            index = torch.arange(0 if leaves else len(size), device=size.device)
            return index, None, size[index]
        self.chosen = step.select.apply(score, self.scope, **self._taps(step.select))
        return self.merge_of(self.chosen, score)

    def merge_of(
        self, chosen: torch.Tensor | None, score: torch.Tensor | None
    ) -> tuple[torch.Tensor, Any, torch.Tensor]:
        """What `decide` gives, once the tokens are `chosen`; None where the step merges without a selection."""
        step, size, made = self.step, self.sample.size, None
        if chosen is None:
            made = step.merge.apply(self.feature, size[None], self.scope, **self._taps(step.merge))
        elif step.rest is not None:
            arguments = (self.feature, size[None], chosen, score, self.scope)
            made = step.rest.apply(*arguments, **self._taps(step.rest))
        if made is None:
            index = chosen[0][chosen[0] >= 0]  # type: ignore[index]
            return index, None, size[index]
        real = made[0][0] >= 0
        index, feature, sizes = made[0][0][real], made[1][0][real], made[2][0][real]
        return index, feature, sizes


def taps_of(primitive: Any, sample: Sample, tap_value: TapValue) -> dict[str, Any]:
    """The taps of a primitive by name."""
    return {name: tap_value(tap, primitive, sample) for name, tap in primitive.taps().items()}


def constants(tap: Tap, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a tap gives whatever the sample: trained weights; of a memory zeros, since all calls are looked at together.

    Args:
        hidden: [..., D] for the device and the width.
    """
    if tap.tensors is not None:
        return {name: tensor.to(hidden.device) for name, tensor in tap.tensors().items()}
    sizes = [[hidden.shape[-1] if size == "width" else size for size in state.sizes] for state in tap.states]
    return {
        state.name: torch.zeros(1, *size, dtype=state.dtype, device=hidden.device)
        for state, size in zip(tap.states, sizes, strict=True)
    }


def remembers(primitive: Any) -> bool:
    """Whether a score goes by what earlier calls on the same cache have shown."""
    return any(tap.states for tap in primitive.taps().values())


def _planned(by_hand: _ByHand) -> tuple[int, bool]:
    """How many visual tokens the plan counts behind the step, and whether that is exact or the most there can be."""
    step, frames = by_hand.step, _frames(by_hand)
    if step.exit is not None:
        always = step.exit.gate.key == "always"
        return (0 if always else sum(map(sum, frames))), always
    if step.merge is not None:
        return sum(step.merge.kept_of_frames(frames)), step.merge.sure
    chosen = step.select.kept_of_frames(frames)
    left = step.rest.kept_of_frames(frames, chosen) if step.rest is not None else chosen
    return sum(left), step.select.sure and (step.rest is None or step.rest.exact)


def _frames(by_hand: _ByHand) -> Frames:
    """Visual tokens of each frame of each of the step's scopes; of all of them where it does not ask for frames."""
    step, scope = by_hand.step, by_hand.scope
    parts = (part for part in (step.select, step.rest, step.merge) if part is not None)
    taps = ((tap, part) for part in parts for tap in part.taps().values() if tap.kind == "frame")
    tap, part = next(taps, (None, None))
    if tap is None:
        return [[count] for count in scope.counts[0].tolist()]
    number = by_hand.tap_value(tap, part, by_hand.sample)[0][0]
    each = [number[scope.segment[0] == one] for one in range(scope.counts.shape[1])]
    return [torch.unique(own, return_counts=True)[1].tolist() for own in each]


def text_behind(sample: Sample) -> torch.Tensor:
    """Columns of the text behind the last visual token, or of all text where none is behind."""
    asked = sample.text
    if len(sample.slots) and bool((asked > sample.slots.max()).any()):
        asked = asked[asked > sample.slots.max()]
    return asked


def text_that_rates(sample: Sample, hidden: torch.Tensor) -> torch.Tensor:
    """Columns of the text tokens that the visual tokens resemble more than the average one, from hidden states [S, D].

    Text behind the last visual token, or all of it where none is behind. Where none stands out, all of it rates.
    """
    asked = text_behind(sample)
    if not len(sample.slots):
        return asked
    shares = (hidden[sample.slots].double() @ hidden[asked].double().T).softmax(1).mean(0)
    above = asked[shares > shares.mean()]
    return above if len(above) else asked


def frames_in(owner: torch.Tensor, frames: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """([V] frame, [V] place there) of a sample's visual tokens, from the image or video [V] that each is of.

    `frames` says how many equal ones each of these has; they are counted through the sample.
    """
    number, place = torch.zeros_like(owner), torch.zeros_like(owner)
    before = 0
    for one in dict.fromkeys(owner.tolist()):
        tokens = (owner == one).nonzero().flatten()
        length = len(tokens) // frames[one]
        running = torch.arange(len(tokens), device=owner.device)
        number[tokens], place[tokens] = before + running // length, running % length
        before += frames[one]
    return number, place
