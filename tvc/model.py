"""A compiled model: called and generated with like the Hugging Face model it was made from."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import inspect
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from tvc.errors import ArgumentError, InputError
from tvc.policy import ResolvedPolicy
from tvc.report.plan import Plan
from tvc.runtime.beams import image_inputs, once_each, repeated
from tvc.runtime.engine import Engine
from tvc.runtime.inputs import check_call, unplaced
from tvc.trace.parts import PIXEL_NAMES, insists_on_pixels


@dataclasses.dataclass
class ReducedOutput(CausalLMOutputWithPast):
    """`logits` [B, 1, vocabulary] of the last token, `past_key_values` (a `StagedCache`) and `kept`.

    `kept[site]` is [B, T] int64, -1 padded: for a decoder site the places in the sequence (columns of `input_ids`,
    earlier turns counted in) of every token, text and visual, that stays from there on, ascending; for `vision.K` and
    `projector` the numbers of the sample's visual tokens that stay.
    """

    kept: dict[str, torch.Tensor] | None = None


@dataclasses.dataclass
class Repeats:
    """How often `generate`, while it runs, has repeated every prompt."""

    times: int = 1


def generating(
    engine: Engine, generation_config: GenerationConfig | None, device: torch.device, repeats: Repeats
) -> Any:
    """The host model made callable: its own class, so that `generate` prepares inputs as the family does."""
    # A copy that shares every module: other models made from the same host keep their own class.
    host: Any = copy.copy(engine.host.model)
    family: Any = type(host)
    images = image_inputs(engine.host.owner)

    names = [name for name in _signature(family) if name != "self"]

    @functools.wraps(family.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = {**dict(zip(names, args, strict=False)), **kwargs}
        refuse_misspelt(kwargs, names)
        if repeats.times > 1 and any(inputs.get(name) is not None for name in PIXEL_NAMES):
            answer = repeated(engine.call(once_each(inputs, repeats.times, images)), repeats.times)
        else:
            answer = engine.call(inputs)
        # Without a cache `generate` sends the whole sequence, pixels included, each time: a cache would double it.
        cache = None if inputs.get("use_cache") is False else answer.cache
        return ReducedOutput(logits=answer.logits, past_key_values=cache, kept=answer.kept)

    def positions(self: Any, tokens: torch.Tensor, model_kwargs: dict[str, Any]) -> torch.Tensor:
        try:
            made = family._prepare_position_ids_for_generation(self, tokens, model_kwargs)
        except (RuntimeError, ValueError, LookupError, StopIteration) as problem:
            if not any(model_kwargs.get(name) is not None for name in PIXEL_NAMES):
                raise
            raise unplaced(problem) from problem
        mask = model_kwargs.get("attention_mask")
        return made if mask is None else going_on(made, mask)

    def expand(
        self: Any, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **given: Any
    ) -> Any:
        repeats.times = expand_size
        own = {name: given.pop(name) for name in [*given] if name in images}
        own_class = super(made, self)  # a static method in some releases
        options = (expand_size, is_encoder_decoder, input_ids)
        ids, more = own_class._expand_inputs_for_generation(*options, **given)  # type: ignore[attr-defined]
        return ids, {**more, **own}

    members = {
        "forward": forward,
        "_expand_inputs_for_generation": expand,
        "device": property(lambda self: device),
        "dtype": property(lambda self: engine.interface.shape.dtype),
        "main_input_name": "input_ids",
        # Pixels go to `forward`, whose answer says what was dropped, instead of being encoded beforehand.
        "_supports_mm_encoder_outputs": lambda self: False,
        "_prepare_position_ids_for_generation": positions,
        "__module__": family.__module__,
    }
    if insists_on_pixels(engine.host.model):  # what it has of its own leads around `forward`
        members["generate"] = GenerationMixin.generate
    made = type(family.__name__, (family,), members)
    host.__class__ = made
    engine.host.device = device
    if generation_config is not None:
        host.generation_config = generation_config
    return host


def going_on(positions: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Rotary positions [..., B, S] in which padding at a row's end repeats its last token's, for `mask` [B, S].

    `generate` numbers new tokens from the last column on, which would be that of the padding.
    """
    columns = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask.bool(), columns, -1).amax(1, keepdim=True).clamp(min=0)
    return positions.gather(-1, torch.minimum(columns, last).expand(positions.shape))


def _signature(family: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(family.forward).parameters)


def refuse_misspelt(given: Iterable[str], names: Sequence[str]) -> None:
    """Hugging Face models swallow names that they do not know; one that is nearly a parameter is surely meant as it."""
    for name in given:
        # Longer or shorter names are other families' inputs (mm_token_type_ids), not slips.
        alike = [known for known in names if abs(len(known) - len(name)) <= 2]
        nearest = [] if name in names else difflib.get_close_matches(name, alike, n=1, cutoff=0.85)
        if nearest:
            raise InputError(
                "an input has a name that the model does not know",
                where="forward",
                got=name,
                want=", ".join(names),
                fix=f"write {nearest[0]}",
                slug="unknown-input",
            )


def refuse_modes(kwargs: dict[str, Any]) -> None:
    """Generation modes that a reduced cache cannot serve are refused by name."""
    refused = {
        "assistant_model": "assisted decoding takes tokens back out of the cache",
        "prompt_lookup_num_tokens": "prompt lookup takes tokens back out of the cache",
        "cache_implementation": "a compiled model keeps its own cache, one length per stage",
    }
    configured = kwargs.get("generation_config")
    for name, reason in refused.items():
        value = kwargs.get(name, getattr(configured, name, None))
        if value is not None:
            raise ArgumentError(
                f"generate cannot take {name} here: {reason}",
                where=f"generate({name}=...)",
                got=type(value).__name__ if isinstance(value, torch.nn.Module) else value,
                want="greedy search, sampling or beam search",
                fix=f"leave {name} out",
                slug="no-such-mode",
            )


class CompiledModel:
    """A model with its policy compiled in.

    Called and asked to `generate` like the Hugging Face model it was made from: `compiled(**processor_outputs)` gives a
    `ReducedOutput`, `compiled.generate(**processor_outputs, max_new_tokens=32)` token ids.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        target: str,
        policy: ResolvedPolicy,
        plan: Plan,
        config: PreTrainedConfig,
        generation_config: GenerationConfig | None,
        processor: Any,
        device: torch.device,
        folder: TemporaryDirectory[str] | None = None,
    ):
        self.engine, self.target, self.policy, self.plan = engine, target, policy, plan
        self.config, self.processor, self.device = config, processor, device
        self.verification: dict[str, Any] | None = None
        self.saver: Callable[[Path, bool], None] | None = None
        self._folder = folder  # lives as long as the model whose files it holds
        self._repeats = Repeats()
        self._model = generating(engine, generation_config, device, self._repeats)

    @property
    def files(self) -> str | None:
        """Where the target's files lie that this model runs, if it was compiled just now."""
        return self._folder.name if self._folder is not None else None

    @property
    def dtype(self) -> torch.dtype:
        return self.engine.interface.shape.dtype

    @property
    def generation_config(self) -> GenerationConfig:
        return self._model.generation_config

    def __call__(self, **inputs: Any) -> ReducedOutput:
        """One call: `logits` [B, 1, vocabulary] of each sample's last token, the cache and what was kept."""
        return self._model(**inputs)

    def generate(self, **inputs: Any) -> Any:
        """Token ids (or what `return_dict_in_generate` asks for), by the `generate` of the model's own class."""
        refuse_modes(inputs)
        check_call(inputs, self.engine.interface.visual_token_ids, "generate")
        try:
            return self._model.generate(**inputs)
        finally:
            self._repeats.times = 1

    def torch_compile(self, **options: Any) -> CompiledModel:
        """The same model with its graphs run through `torch.compile`, sharing weights with this one.

        Operators are joined into fewer, larger kernels, which is what a decode step of one sample waits for. The first
        prefill and the first decode step take as long as their compilation; sizes stay free after that.

        Args:
            options: for `torch.compile`; `dynamic=True` unless given.

        Raises:
            ArgumentError: the model's target runs elsewhere than in PyTorch.
        """
        compiled = getattr(self.engine.run, "compiled", None)
        if compiled is None:
            raise ArgumentError(
                "torch.compile takes graphs that run in PyTorch",
                where="torch_compile",
                got=f"target {self.target}",
                want="target torch",
                fix="tvc.compile(..., target='torch')",
                slug="not-in-torch",
            )
        made = copy.copy(self)
        made.engine = Engine(self.engine.host, self.engine.interface, compiled({"dynamic": True, **options}))
        made._repeats = Repeats()
        made._model = generating(made.engine, self.generation_config, self.device, made._repeats)
        return made

    def save_pretrained(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Writes the artifact directory; nothing is left behind when it is interrupted."""
        if self.saver is None:
            raise ArgumentError(
                "this model was loaded from an artifact already",
                where="save_pretrained",
                got=os.fspath(folder),
                want="a freshly compiled model",
                fix="copy the artifact directory instead",
                slug="already-saved",
            )
        self.saver(Path(folder), overwrite)
