"""The decoder of a case alone: one graph of one target, with the inputs of a prefill and of the step after it.

Vision, embedding and the family's own code around the graph cost every variant the same and are left out. The ideal has
no second output head: its first part ends in the hidden states that its second part would start from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from tvc import compiler
from tvc.chunks import PAST_KEY, PAST_POSITIONS, PAST_VALUE
from tvc.export import manifest
from tvc.export.base import Options
from tvc.export.base import target as find_target
from tvc.report.timing import Variant
from tvc.trace.load import load
from tvc.trace.survey import survey

Tensors = Mapping[str, torch.Tensor]
Runner = Callable[[str, Tensors], dict[str, torch.Tensor]]


@dataclasses.dataclass
class Graph:
    """A decoder's runner and the inputs it is timed on."""

    run: Runner
    inputs: Mapping[str, Tensors]  # by phase: prefill, decode
    open: Callable[[], Runner] | None = None

    def renew(self) -> None:
        """Opens the runner's files anew: its weights lie elsewhere in memory, which a decode step can feel."""
        if self.open is not None:
            self.run = self.open()

    def variant(self, phase: str) -> Variant:
        given = self.inputs[phase]
        return Variant(lambda _: self.run("decoder", given))


@dataclasses.dataclass
class Recorder:
    """A runner that remembers what the decoder was given."""

    run: Runner
    given: list[Tensors] = dataclasses.field(default_factory=list)

    def __call__(self, component: str, inputs: Tensors) -> dict[str, torch.Tensor]:
        if component == "decoder":
            self.given.append(dict(inputs))
        return self.run(component, inputs)


@dataclasses.dataclass
class Native:
    """The decoder of a model without any reduction, as a graph of one target."""

    run: Runner
    open: Callable[[], Runner] | None
    names: tuple[str, ...]
    caches: tuple[tuple[int, ...], ...]
    device: torch.device
    dtype: torch.dtype

    def graph(self, chunk: Tensors) -> Graph:
        """On what a prefill gives the decoder, cache apart, as `chunk` makes it."""
        batch = chunk["inputs_embeds"].shape[0]
        given = {name: chunk[name] if name in chunk else _empty(name, self.caches, batch) for name in self.names}
        prefill = {
            name: value.to(self.device, self.dtype if value.is_floating_point() else value.dtype)
            for name, value in given.items()
        }
        decode = _step(self.names, prefill, self.run("decoder", prefill))
        return Graph(self.run, {"prefill": prefill, "decode": decode}, self.open)


def native(model: Any, inputs: Tensors, target: str, folder: Path, threads: int) -> Native:
    """The decoder of `model` alone, written into `folder` where the target needs files.

    Args:
        inputs: processor outputs to trace with.
        threads: threads of one operator in ONNX Runtime; 0 leaves the choice to it.
    """
    source = load(model)
    surveyed = survey(source.meta, None, inputs)
    program = compiler.trace(model, surveyed, None, _silent)
    program.components = {"decoder": program.components["decoder"]}
    program.facts |= {"cuts-rebound"}  # nothing was inserted
    lowered = compiler.lower(program, target, _silent)
    again = None
    if target != "torch":
        folder.mkdir()
        find_target(target).write(lowered, folder, Options())
        again = opener(folder, {"components": manifest.interface(lowered), "target": target}, threads)
    weight = next(model.parameters())
    return Native(
        compiler.GraphRunner(lowered) if again is None else again(),
        again,
        lowered.components["decoder"].inputs,
        surveyed.caches,
        weight.device,
        weight.dtype,
    )


def opener(folder: Path, content: Mapping[str, Any], threads: int) -> Callable[[], Runner]:
    """What opens the files of a target that a manifest describes."""
    return lambda: find_target(content["target"]).open(folder, content, torch.device("cpu"), Options(threads=threads))


def chunk(width: int, visual: int, text: int, batch: int = 1, seed: int = 0) -> dict[str, torch.Tensor]:
    """Prompts of random embeddings: half of the text, one image, the other half."""
    length, before = visual + text, text // 2
    slots = torch.arange(length).repeat(batch, 1)
    return {
        "inputs_embeds": torch.randn(batch, length, width, generator=torch.Generator().manual_seed(seed)),
        "position_ids": slots,
        "query_positions": slots,
        "text_index": torch.cat((slots[:, :before], slots[:, before + visual :]), 1),
        "visual_index": slots[:, before : before + visual].contiguous(),
        "visual_segment": torch.zeros(batch, visual, dtype=torch.int64),
        "visual_counts": torch.full((batch, 1), visual),
    }


def headless(model: Any) -> Any:
    """The model without its last norm and its output head: what hands its hidden states to more layers."""
    model.lm_head, model.model.language_model.norm = torch.nn.Identity(), torch.nn.Identity()
    return model


def _silent(_line: str) -> None:
    return None


def _empty(name: str, caches: tuple[tuple[int, ...], ...], batch: int) -> torch.Tensor:
    """An input that the prompt leaves empty: nothing is cached yet."""
    if name.startswith(PAST_POSITIONS):
        return torch.zeros(batch, 0, dtype=torch.int64)
    groups, *widths = caches[int(name.split(".")[1])]
    return torch.zeros(batch, groups, 0, widths[name.startswith(PAST_VALUE)])


def _step(names: tuple[str, ...], prefill: Tensors, outputs: Tensors) -> Tensors:
    """The inputs of the decode step that follows a prefill."""
    place = prefill["query_positions"][:, -1:] + 1
    none = place[:, :0]
    fresh = {
        "inputs_embeds": prefill["inputs_embeds"][:, -1:].contiguous(),
        "position_ids": place,
        "query_positions": place,
        "text_index": torch.zeros_like(place),
        "visual_index": none,
        "visual_segment": none,
        "visual_counts": none,
    }
    kinds = (PAST_POSITIONS, PAST_KEY, PAST_VALUE)
    return {name: outputs[name.removeprefix("past_")] if name.startswith(kinds) else fresh[name] for name in names}
