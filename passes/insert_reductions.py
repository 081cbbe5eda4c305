"""InsertReductions: the policy's steps become nodes of the graphs, in front of the blocks they name.

A step's node takes the chunk as it is and the taps its primitives ask for, and gives the chunk as it will be. Nothing
downstream uses that yet: `RebindCuts` rewires it. Scores that need the vision path's inside are computed there and
travel to the decoder as extra outputs of one component and extra inputs of the other.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx

from tvc.chunks import PAST_POSITIONS, SPANS, TAP, DecoderShape, Memory, memory_name
from tvc.errors import SiteError, TraceError
from tvc.graphs import annotate, find_blocks, first_node, identifier, open_draft, placeholders
from tvc.kernels.op import Tap
from tvc.kernels.segments import follow
from tvc.passes.base import Pass
from tvc.passes.branches import branches
from tvc.passes.cuts import RESULTS, ChunkState, Cut, Parting, cut_function, gather_tokens, start_sizes
from tvc.passes.insert_projector import add_projector
from tvc.passes.insert_vision import VisionInsertion
from tvc.passes.pool_caches import relevance
from tvc.passes.taps import DecoderTaps, crosses, crossing, frames_of, rater_mask, tap_name, transitions
from tvc.policy.options import Pool
from tvc.policy.positions import Rescale
from tvc.program import Change, Component, Program, Stage

COMPONENTS = ("vision", "projector", "language")


class InsertReductions(Pass):
    """Adds the steps of a resolved policy to the components they belong to."""

    gives = frozenset({"reductions-inserted"})
    may_be_idle = True  # a policy that edits masks alone has no step

    def __init__(self, policy: Any):
        self.policy = policy

    def run(self, program: Program) -> list[Change]:
        for step in self.policy.steps:
            _check_features(step)
        steps = {name: [s for s in self.policy.steps if s.at.split(".")[0] == name] for name in COMPONENTS}
        changes: list[Change] = []
        asked = [step for name in ("projector", "language") for step in steps[name]]
        if "vision" in program.components:
            changes += self._vision(program, steps["vision"], asked)
        if steps["projector"]:
            changes += add_projector(program, steps["projector"][0])
        component = program.components["decoder"]
        if stride := component.meta["shape"].stride:
            what = f"visual tokens take {stride}/256 of a position each"
            changes.append(Change("decoder", "position_ids", what, "positions"))
        if not self.policy.steps and self.policy.reselect is not None:
            changes.append(Change("decoder", f"{PAST_POSITIONS}0", "one stage, without a cut", "reselect"))
        if isinstance(self.policy.positions, Rescale):
            what = f"turns at frequencies for inputs {self.policy.positions.factor:g} times as long"
            changes.append(Change("decoder", "position_ids", what, "positions"))
        if component.draft is None:  # else an earlier pass has opened it
            component.draft = open_draft(component)
        component.meta = {**component.meta, "cuts": [], "partings": [], "stages": [], "tap_widths": {}}
        component.meta["remembered"] = {}
        insertion = _DecoderInsertion(component, program, self.policy.positions == "renumber")
        if self.policy.cache is not None:
            insertion.frames_that_stay(self.policy.cache)
        return changes + insertion.insert(steps["language"])

    def _vision(self, program: Program, steps: list[Any], asked: list[Any]) -> list[Change]:
        wanted = [(step, *tap) for step in asked for tap in crossing(step)]
        component = program.components["vision"]
        if steps or wanted:
            component.draft = open_draft(component)
            insertion = VisionInsertion(component, program.layout)
            insertion.cut(steps)
            for step, name, primitive, tap in wanted:
                note = f"InsertReductions: {step.where}"
                if tap.kind == "attention":
                    insertion.add_score(name, primitive, note)
                elif tap.kind == "pixel":
                    if name not in component.meta["tap_widths"]:
                        insertion.add_pixels(name, note)
                else:
                    insertion.add_keys(name, tap.layer or "", note)
            return insertion.changes
        return []


def _check_features(step: Any) -> None:
    """Hidden states can be had where the step stands; of other layers only attention and keys are kept in reach."""
    terms = step.exit.score if step.exit is not None else step.score
    for primitive in (*(term.primitive for term in terms), *step.parts().values()):
        for tap in primitive.taps().values():
            if tap.kind in ("feature", "text") and tap.layer not in (None, step.at):
                raise SiteError(
                    f"{primitive.key} asks for the hidden states of another layer",
                    where=step.where,
                    got=f"layer: {tap.layer} at {step.at}",
                    want=f"the hidden states at {step.at}",
                    fix="leave `layer` out, or score keys or attention of that layer",
                    slug="other-layers-features",
                )


class _DecoderInsertion:
    def __init__(self, component: Component, program: Program, renumber: bool):
        self.component, self.program, self.renumber = component, program, renumber
        assert_draft = component.draft
        self.graph: fx.Graph = assert_draft.graph  # type: ignore[union-attr]
        self.blocks = find_blocks(self.graph)
        self.inputs = placeholders(self.graph)
        self.changes: list[Change] = []
        self._rater_mask: fx.Node | None = None
        self._frame_pair: fx.Node | None = None
        self._transitions: dict[int, fx.Node] = {}

    def insert(self, steps: list[Any]) -> list[Change]:
        state = self._start()
        states = [state]
        stages = [Stage(0, range(len(self.blocks)), None)]
        openings = [state]  # the chunk as it is in each stage
        home: int | None = 0  # the stage whose caches hold what is there; None: it has none so far
        for number, step in enumerate(steps):
            layer = _layer(step.at)
            for start in sorted({_layer(one.evict) for one in steps if one.evict}):
                if stages[-1].layers.start < start < layer:
                    state = states[-1] = self._parted(start, state, stages, step.where)
                    openings.append(state)
            first = first_node(self.graph, self.blocks[layer])
            state = states[-1] = dataclasses.replace(state, residual=self._residual(first))
            if layer > 0:
                key_positions = self._stage(layer, step.at, state, stages)
            else:  # no block runs before the cut: the first stage opens with it
                stages[-1].site, key_positions = step.at, state.key_positions
                openings.pop()
                home = None
            after = self._insert_step(step, number, state, key_positions, first, states)
            cut = Cut(step.at, step.where, layer, first, state, after, _layer(step.evict) if step.evict else None)
            self.component.meta["cuts"].append(cut)
            openings.append(after)
            if step.until:
                following = next((_layer(one.at) for one in steps[number + 1 :]), None)
                state = states[-1] = self._returned(cut, _layer(step.until))
                if following != _layer(step.until):  # else the next cut opens a stage there
                    state, home = self._home(cut, _layer(step.until), state, stages, home)
                    openings.append(state)
                continue
            state, home = after, stages[-1].index
            states.append(state)
        self.program.stages[:] = stages
        self.component.meta["stages"] = openings
        return self.changes

    def frames_that_stay(self, rule: Pool) -> None:
        """Notes frames of the visual tokens, and which of these caches hold as they are, where the prompt enters."""
        note, first = "cache", first_node(self.graph, self.blocks[0])
        frames, score = self._frames(note), None
        with self.graph.inserting_before(first):
            if rule.best:
                arguments = (self._residual(first), self.inputs["visual_index"], self.inputs["text_index"])
                score = self.graph.call_function(relevance, arguments)
            number = self.graph.call_function(operator.getitem, (frames, 0))
            settings = (rule.chunk, rule.first, rule.last, rule.best)
            whole = self.graph.call_function(torch.ops.tvc.whole_chunks.default, (number, score, *settings))
        for node in (score, number, whole):
            if node is not None:
                annotate(node, note)
        self.component.meta["frames"] = (frames, whole)

    def _stage(self, layer: int, site: str | None, state: ChunkState, stages: list[Stage]) -> fx.Node:
        """Opens a stage in front of `layer`; returns the places of the tokens that it has cached."""
        stages[-1].layers = range(stages[-1].layers.start, layer)
        number = 1 + max(stage.index for stage in stages)
        stages.append(Stage(number, range(layer, len(self.blocks)), site))
        return self._placeholder(f"{PAST_POSITIONS}{number}", state.key_positions)

    def _parted(self, layer: int, state: ChunkState, stages: list[Stage], where: str) -> ChunkState:
        """The chunk in a stage that opens without a cut, as later cuts leave its layers' caches shorter."""
        state = dataclasses.replace(state, key_positions=self._stage(layer, None, state, stages))
        first = first_node(self.graph, self.blocks[layer])
        self.component.meta["partings"].append(Parting(where, layer, first, state))
        self.changes.append(Change("decoder", first.name, f"caches of their own from language.{layer} on", where))
        return state

    def _returned(self, cut: Cut, layer: int) -> ChunkState:
        """The chunk from `layer` on, in front of which the tokens come back that the cut dropped."""
        first = first_node(self.graph, self.blocks[layer])
        inside = self._residual(first)
        behind = [user for user in inside.users if _not_before(user, first)]
        with self.graph.inserting_before(first):
            arguments = (cut.before.residual, cut.after.kept, inside)
            cut.restored = self.graph.call_function(torch.ops.tvc.restore.default, arguments)
        annotate(cut.restored, f"InsertReductions: {cut.where}")
        cut.restored.meta["val"] = inside.meta["val"]
        for user in behind:
            user.replace_input_with(inside, cut.restored)
        what = f"tokens that passed by from {cut.site} on take part again before block language.{layer}"
        self.changes.append(Change("decoder", cut.restored.name, what, cut.where))
        return dataclasses.replace(cut.before, residual=None)

    def _home(
        self, cut: Cut, layer: int, state: ChunkState, stages: list[Stage], home: int | None
    ) -> tuple[ChunkState, int]:
        """The chunk from `layer` on, and the stage in whose caches its tokens are: the one in front of the cut."""
        if home is None:
            state = self._parted(layer, state, stages, cut.where)
            return state, stages[-1].index
        stages[-1].layers = range(stages[-1].layers.start, layer)
        stages.append(Stage(home, range(layer, len(self.blocks)), None))
        return state, home

    def _start(self) -> ChunkState:
        named = self.inputs
        with self.graph.inserting_after(list(named.values())[-1]):
            sizes = self.graph.call_function(start_sizes, (named["visual_index"],))
        with self.graph.inserting_after(sizes):
            size = self.graph.call_function(operator.getitem, (sizes, 0))
            origin = self.graph.call_function(operator.getitem, (sizes, 1))
        return ChunkState(
            None,
            named["position_ids"],
            named["query_positions"],
            named["text_index"],
            named["visual_index"],
            named["visual_segment"],
            named["visual_counts"],
            size,
            origin,
            named[identifier(f"{PAST_POSITIONS}0")],
            named.get(SPANS),
            self.component.meta.get("chunks"),
        )

    def _placeholder(self, name: str, after: fx.Node, axes: int = 2) -> fx.Node:
        with self.graph.inserting_after(after):
            node = self.graph.placeholder(identifier(name))
        inputs = list(self.component.inputs)
        position = [identifier(i) for i in inputs].index(str(after.target)) + 1
        self.component.inputs = (*inputs[:position], name, *inputs[position:])
        annotate(node, "InsertReductions")
        return node

    def _residual(self, first: fx.Node) -> fx.Node:
        """The hidden states that cross the cut: the newest [B, S, D] value made from the embeddings."""
        entry = self.inputs["inputs_embeds"]
        embeds = entry.meta["val"]
        found = None
        made = {entry}
        for node in self.graph.nodes:
            if node is first:
                break
            if not made.isdisjoint(node.all_input_nodes):
                made.add(node)
            value = node.meta.get("val")
            if node not in made or not isinstance(value, torch.Tensor) or value.dim() != 3:
                continue
            same = value.shape[2] == embeds.shape[2] and _same_size(value.shape[1], embeds.shape[1])
            if same and any(_not_before(user, first) for user in node.users):
                found = node
        if found is None:
            raise TraceError(
                "no hidden states cross this cut",
                where=f'node "{first.name}"',
                got="no [batch, sequence, width] value before the block that the block uses",
                want="a residual stream",
                fix="choose a cut before another block",
                slug="no-residual",
            )
        return found

    def _insert_step(
        self,
        step: Any,
        number: int,
        state: ChunkState,
        key_positions: fx.Node,
        first: fx.Node,
        states: list[ChunkState],
    ) -> ChunkState:
        note = f"InsertReductions: {step.where}"
        cuts = [cut for cut in self.component.meta["cuts"] if cut.restored is None]
        shared = (self._raters, self._transition, self._frames, self.inputs["position_ids"])
        resolver = DecoderTaps(self.graph, self.blocks, states, cuts, note, key_positions, *shared)
        with self.graph.inserting_before(first):
            scores, taps = self._step_taps(step, number, resolver, first)
            self._remember(step, state, scores, note)
            node = self.graph.call_function(
                cut_function(step, self.renumber, f"cut_{identifier(step.at)}"),
                (
                    state.residual,
                    state.position_ids,
                    state.query_positions,
                    state.text_index,
                    state.visual_index,
                    state.segment,
                    state.counts,
                    state.size,
                    state.origin,
                    key_positions,
                    scores,
                    taps,
                ),
            )
            annotate(node, note)
            parts = {name: self.graph.call_function(operator.getitem, (node, i)) for i, name in enumerate(RESULTS)}
            if state.spans is not None:
                parts["spans"] = self.graph.call_function(gather_tokens, (state.spans, parts["kept"], (1,)))
            if state.chunks is not None:
                parts["chunks"] = self.graph.call_function(follow, (state.chunks, parts["kept"]))
        for name, part in parts.items():
            annotate(part, note)
            if name in (
                "residual",
                "position_ids",
                "query_positions",
                "spans",
            ):  # stale sizes tell where the token axis is
                part.meta["val"] = getattr(state, name).meta["val"]
        self.changes.append(Change("decoder", node.name, f"reduction before block {step.at}", step.where))
        return ChunkState(key_positions=key_positions, **parts)

    def _raters(self, note: str) -> fx.Node:
        """[B, T] bool: the text tokens that rate visual tokens, found once, where both enter the decoder."""
        if self._rater_mask is None:
            first = first_node(self.graph, self.blocks[0])
            arguments = (self._residual(first), self.inputs["visual_index"], self.inputs["text_index"])
            with self.graph.inserting_before(first):
                self._rater_mask = self.graph.call_function(rater_mask, arguments)
            annotate(self._rater_mask, note)
        return self._rater_mask

    def _frames(self, note: str) -> fx.Node:
        """Frame and place of every visual token, found once, where they enter the decoder."""
        if self._frame_pair is None:
            names = ("position_ids", "visual_index", "visual_segment", "visual_counts")
            with self.graph.inserting_before(first_node(self.graph, self.blocks[0])):
                self._frame_pair = self.graph.call_function(frames_of, tuple(self.inputs[name] for name in names))
            annotate(self._frame_pair, note)
        return self._frame_pair

    def _transition(self, layer: int, state: ChunkState, note: str) -> fx.Node:
        """[B, V] how much `layer` changed the visual tokens of its stage, found where the layer ends."""
        if layer not in self._transitions:
            width = int(self.inputs["inputs_embeds"].meta["val"].shape[2])
            ends = branches(self.graph, self.blocks[layer], width, note)
            with self.graph.inserting_before(first_node(self.graph, self.blocks[layer + 1])):
                node = self.graph.call_function(transitions, (*ends, state.visual_index, state.query_positions))
            annotate(node, note)
            self._transitions[layer] = node
        return self._transitions[layer]

    def _step_taps(
        self, step: Any, number: int, resolver: DecoderTaps, first: fx.Node
    ) -> tuple[list[Any], dict[str, Any]]:
        terms = step.exit.score if step.exit is not None else step.score
        scores: list[Any] = []
        for index, term in enumerate(terms):
            wanted = term.primitive.taps()
            if any(crosses(tap) for tap in wanted.values()):
                scores.append(resolver.entered(self._tap_input(tap_name(step, "score", str(index)))))
            else:
                found = {name: resolver.resolve(tap, step.at, first) for name, tap in wanted.items() if not tap.states}
                scores.append(found | self._memories(step, index, term.primitive))
        taps: dict[str, Any] = {}
        if step.scope == "frame":
            taps["scope"] = {"frames": resolver.resolve(Tap("frame"), step.at, first)}
        for group, primitive in step.parts().items():
            taps[group] = {}
            for name, tap in primitive.taps().items():
                if crosses(tap):
                    taps[group][name] = resolver.entered(self._tap_input(tap_name(step, group, name, tap.kind)))
                else:
                    taps[group][name] = resolver.resolve(tap, step.at, first)
        return scores, taps

    def _memories(self, step: Any, term: int, primitive: Any) -> dict[str, dict[str, fx.Node]]:
        """The states of a score's memory, as inputs of the decoder, by the names of the tap and of the states."""
        made: dict[str, dict[str, fx.Node]] = {}
        for name, tap in primitive.taps().items():
            for state in tap.states:
                shape: DecoderShape = self.component.meta["shape"]
                before = shape.memories[-1].name if shape.memories else f"{PAST_POSITIONS}0"
                sizes = tuple(shape.width if size == "width" else size for size in state.sizes)
                memory = Memory(memory_name(step.at, term, state.name), sizes, str(state.dtype).removeprefix("torch."))
                shape = dataclasses.replace(shape, memories=(*shape.memories, memory))
                self.component.meta["shape"] = shape
                node = self._placeholder(memory.name, placeholders(self.graph)[identifier(before)])
                made.setdefault(name, {})[state.name] = node
        return made

    def _remember(self, step: Any, state: ChunkState, scores: list[Any], note: str) -> None:
        """What each score of a step hands on to the next call, noted for the decoder's outputs."""
        for index, (term, taps) in enumerate(zip(step.score, scores, strict=False)):  # those of an exit have none
            for tap, wanted in term.primitive.taps().items():
                if not wanted.states:
                    continue
                made = self.graph.call_function(_behind(term.primitive), (taps,))
                annotate(made, note)
                for name, before in taps[tap].items():
                    after = self.graph.call_function(operator.getitem, (made, name))
                    kept = self.graph.call_function(torch.ops.tvc.remember.default, (before, after, state.visual_index))
                    output = memory_name(step.at, index, name).removeprefix("past_")
                    self.component.meta["remembered"][output] = kept
                    self.changes.append(Change("decoder", kept.name, f"goes on as {output}", step.where))
                    for node in (after, kept):
                        annotate(node, note)

    def _tap_input(self, name: str) -> fx.Node:
        if name in self.component.inputs:
            return placeholders(self.graph)[identifier(name)]
        self.component.meta["tap_widths"][name] = self.program.components["vision"].meta["tap_widths"][name]
        taps = [n for n in self.component.inputs if n.startswith(TAP)]
        last = identifier(taps[-1] if taps else "visual_counts")
        return self._placeholder(name, next(n for n in self.graph.nodes if n.op == "placeholder" and n.target == last))


def _behind(primitive: Any) -> Callable[[dict[str, Any]], dict[str, torch.Tensor]]:
    """What a score remembers behind a chunk, as a function of its taps."""

    def remembered(taps: dict[str, Any]) -> dict[str, torch.Tensor]:
        made: dict[str, torch.Tensor] = primitive.remembered(**taps)
        return made

    return remembered


def _layer(site: str) -> int:
    return int(site.removeprefix("language."))


def _not_before(node: fx.Node, first: fx.Node) -> bool:
    return node is first or first < node


def _same_size(one: Any, other: Any) -> bool:
    return str(one) == str(other)
