"""Reads the cost-relevant shape of a model off its modules: blocks, heads, weights per token. No weights are needed.

Nothing here knows a family by name. A block is an entry of the longest `ModuleList` whose entries hold attention; what
stands before the blocks of the vision encoder embeds patches, what stands after them (or outside both encoder and
decoder) projects features into the decoder's space.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from tvc.errors import ModelError
from tvc.program import Layer

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_POOLING = re.compile(
    r"(^|\.)(head|pooler)(\.|$)"
)  # summarises an image into one vector; its output is no visual token
_MATRICES = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d, Conv1D)


def meta_model(source: str | os.PathLike[str] | PretrainedConfig | torch.nn.Module) -> torch.nn.Module:
    """The model of a configuration, a directory or a hub id, on the `meta` device: every shape and no weight.

    Raises:
        ModelError: there is no configuration at `source`, or it is not one of a vision-language model.
    """
    if isinstance(source, torch.nn.Module):
        return source
    config = source if isinstance(source, PretrainedConfig) else _config(os.fspath(source))
    try:
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(config)
    except ValueError as error:
        raise ModelError(
            "the model is not a vision-language model",
            where=f"configuration of {_name(source)}",
            got=f"model_type {config.model_type}",
            want="a model type that transformers.AutoModelForImageTextToText knows",
            fix="name a model that takes images and text, for example a LLaVA, Qwen2.5-VL or SmolVLM checkpoint",
            slug="not-vision-language",
        ) from error
    except (TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError, AssertionError) as error:
        raise ModelError(
            "the model's own code makes no model of this configuration",
            where=f"configuration of {_name(source)}, model_type {config.model_type}",
            got=f"{type(error).__name__}: {error}".splitlines()[0],
            want="a configuration that says every size its model needs",
            fix="name a checkpoint, or fill in what config.json leaves out; defaults of some model types have gaps",
            slug="incomplete-configuration",
        ) from error


def _config(source: str) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ModelError(
            "no model configuration can be read",
            where=f"model {source}",
            got=str(error).splitlines()[0] if str(error) else type(error).__name__,
            want="a directory with a config.json, or the id of a model on the hub",
            fix="check the path or the id; a directory must hold the files that save_pretrained writes",
            slug="no-configuration",
        ) from error


def _name(source: object) -> str:
    return type(source).__name__ if isinstance(source, PretrainedConfig) else str(source)


def blocks(model: torch.nn.Module) -> tuple[torch.nn.ModuleList, torch.nn.ModuleList]:
    """The transformer blocks of the language model and of the vision encoder (none where that is no transformer).

    Raises:
        ModelError: the language model has none.
    """
    decoder = model.get_decoder()  # type: ignore[operator]
    language = _stack(decoder)
    if language is None:
        raise _missing(model, "language model", type(decoder).__name__)
    tower = encoder(model)
    vision = _stack(tower) if tower is not None else None
    return language, vision if vision is not None else torch.nn.ModuleList()


def encoder(model: torch.nn.Module) -> torch.nn.Module | None:
    """The vision encoder: what the model says it is, else the first module beside the decoder that holds blocks."""
    decoder = model.get_decoder()  # type: ignore[operator]
    named = model.get_encoder("image")  # type: ignore[operator]
    if isinstance(named, torch.nn.Module) and not any(
        named is m or part is decoder for m in (model, decoder) for part in named.modules()
    ):
        return named
    inside = {id(part) for part in decoder.modules()}
    for part in model.modules():
        holds_decoder = any(id(child) == id(decoder) for child in part.modules())
        if id(part) not in inside and not holds_decoder and _stack(part) is not None:
            return part
    return None


def resampler(model: torch.nn.Module, entry: str, behind: Iterable[str]) -> str:
    """The first module between the encoder's blocks and the decoder in which tokens attend to each other; empty where
    every token goes that way by itself, or with its neighbours.

    A second stack of blocks like the encoder's own (Mllama's global layers) is more of the encoder.

    Args:
        entry: path of the encoder.
        behind: paths of the modules that follow it.
    """
    stack = blocks(model)[1]
    kinds = {type(block) for block in stack}
    alike = (part for part in model.get_submodule(entry).modules() if type(part) in kinds)
    held = {id(part) for block in (stack, *alike) for part in block.modules()}
    parts = list(model.get_submodule(entry).named_modules(prefix=entry))
    start = next((i for i, (_, part) in enumerate(parts) if part is stack), len(parts))
    parts = parts[start:] + [named for path in behind for named in model.get_submodule(path).named_modules(prefix=path)]
    return next(
        (name for name, part in parts if id(part) not in held and not _POOLING.search(name) and _attends(name, part)),
        "",
    )


def has_attention(block: torch.nn.Module) -> bool:
    return _attention(block) is not None


def residual_argument(block: torch.nn.Module) -> str:
    """The name under which a block takes its hidden states: that of its first parameter."""
    return next(iter(inspect.signature(block.forward).parameters))


def _missing(model: torch.nn.Module, what: str, got: str) -> ModelError:
    return ModelError(
        f"the {what} has no list of transformer blocks",
        where=f"model class {type(model).__name__}",
        got=got,
        want="a ModuleList whose entries contain attention",
        fix="use a model whose language model is a transformer",
        slug="no-blocks",
    )


def _stack(module: torch.nn.Module) -> torch.nn.ModuleList | None:
    """The longest `ModuleList` of blocks with attention inside `module`; the outermost of equals."""
    found = [
        part
        for part in module.modules()
        if isinstance(part, torch.nn.ModuleList) and any(_attention(block) is not None for block in part)
    ]
    return max(found, key=len, default=None)


def _attention(block: torch.nn.Module) -> torch.nn.Module | None:
    """The outermost module of a block that is named after attention and multiplies by weights."""
    for name, part in block.named_modules():
        if name and _attends(name, part):
            return part
    return None


def _attends(name: str, part: torch.nn.Module) -> bool:
    """Whether a module is named after attention and multiplies by weights."""
    named = _ATTENTION.search(name.rsplit(".", 1)[-1])
    return named is not None and any(isinstance(child, _MATRICES) for child in part.modules())


def linear_weights(module: torch.nn.Module) -> int:
    """Weights of all matrix products in `module` that act on one token; of experts, those that a token visits."""
    total = sum(part.weight.numel() for part in module.modules() if isinstance(part, _MATRICES))
    for part in module.modules():
        stacked = [p for p in part.parameters(recurse=False) if p.dim() == 3]
        experts = getattr(part, "num_experts", None)
        if stacked and isinstance(experts, int):
            visited = _first(part, module, names=("top_k", "num_experts_per_tok"))
            total += sum(p.numel() for p in stacked) // experts * (visited or experts)
    return total


def read_layer(block: torch.nn.Module, config: PretrainedConfig | None = None, index: int = 0) -> Layer:
    """The cost of one transformer block, of a decoder or of a vision encoder.

    Attributes of the attention module come first, then those of the nearest configuration; the sizes of separate
    query and key projections settle the number of key-value heads where neither says it.

    Raises:
        ModelError: the number of its heads is written nowhere.
    """
    attention = _attention(block)
    if attention is None:  # tokens are mixed by a short convolution, which costs next to nothing
        return Layer(linear_weights(block), 0, 0, 0)
    near = _at_layer(getattr(attention, "config", None) or getattr(block, "config", None) or config, index)
    heads = _first(attention, near, names=("num_heads", "num_attention_heads", "n_heads", "n_head"))
    width = _first(near, names=("hidden_size", "embed_dim", "d_model"))
    head_dim = _first(attention, near, names=("head_dim",)) or (width // heads if heads and width else None)
    if not heads or not head_dim:
        raise _unreadable(block, "num_attention_heads and head_dim (or hidden_size) on the module or its configuration")
    key = next((p for n, p in attention.named_modules() if n.rsplit(".", 1)[-1] in ("k_proj", "key", "wk")), None)
    kv_heads = _first(attention, near, names=("num_key_value_heads", "num_kv_heads")) or heads
    if isinstance(key, torch.nn.Linear) and key.out_features % head_dim == 0:
        kv_heads = key.out_features // head_dim
    return Layer(linear_weights(block), heads, kv_heads, head_dim, _window(attention, near, index))


def _at_layer(config: Any, index: int) -> Any:
    """What a configuration says of one layer, where it says something else of another."""
    return config.per_layer_config[index] if getattr(config, "is_heterogeneous", False) else config


def _nearest_config(tower: torch.nn.Module | None, stack: torch.nn.Module) -> Any:
    """The configuration of the innermost module of an encoder that holds its blocks, and has one."""
    holding = (part for part in tower.modules() if any(child is stack for child in part.modules())) if tower else ()
    return next((found for part in [*holding][::-1] if (found := getattr(part, "config", None)) is not None), None)


def _first(*owners: object, names: tuple[str, ...]) -> int | None:
    """The first of `names` that an owner, or an owner's configuration, holds as a number."""
    for owner in owners:
        for holder in (owner, getattr(owner, "config", None)):
            several = getattr(holder, "per_layer_attributes", None) or ()  # no one number for all layers
            for name in names:
                value = None if name in several else getattr(holder, name, None)
                if isinstance(value, int) and not isinstance(value, bool):
                    return value
    return None


def _unreadable(block: torch.nn.Module, want: str) -> ModelError:
    return ModelError(
        "the shape of a transformer block cannot be read",
        where=f"block {type(block).__name__}",
        got=", ".join(name for name, _ in block.named_children()) or "no parts",
        want=want,
        fix="use a model of transformers whose attention follows its naming (num_attention_heads, head_dim)",
        slug="unreadable-block",
    )


def _window(attention: torch.nn.Module, config: Any, index: int) -> int:
    """How many tokens one token attends to at most in this block; 0 for all of them.

    Decoders give a sliding window (or a chunk) in tokens and say per layer whether it holds. Windowed vision encoders
    give a side in pixels and list the blocks that are exempt.
    """
    exempt = getattr(config, "fullatt_block_indexes", None)
    if exempt is not None:
        side = config.window_size // config.patch_size
        return 0 if index in exempt else side * side
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and index < len(kinds):
        sizes = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
        return getattr(config, sizes.get(kinds[index], ""), None) or 0
    own = getattr(attention, "sliding_window", None)
    return own if isinstance(own, int) and not isinstance(own, bool) else 0


def _outside(model: torch.nn.Module, *parts: torch.nn.Module | None) -> Iterator[tuple[str, torch.nn.Module]]:
    hidden = {id(child) for part in parts if part is not None for child in part.modules()}
    return ((name, part) for name, part in model.named_modules() if id(part) not in hidden)


def _weights(parts: Iterator[tuple[str, torch.nn.Module]]) -> int:
    return sum(p.weight.numel() for name, p in parts if isinstance(p, _MATRICES) and not _POOLING.search(name))


def cost_fields(model: torch.nn.Module) -> dict[str, Any]:
    """The fields of `tvc.program.Layout` that say what a token costs, from a model on any device, `meta` included.

    Returns:
        language, vision, patch_linear, projector_linear, head_linear, hidden_size, vision_width, vocabulary,
        element_size.

    Raises:
        ModelError: the blocks were not found or cannot be read.
    """
    language, vision = blocks(model)
    decoder, tower, head = model.get_decoder(), encoder(model), model.get_output_embeddings()  # type: ignore[operator]
    text_config, image_config = decoder.config, getattr(tower, "config", None)
    assigned = dict(tower.named_modules()) if tower is not None else {}
    names = list(assigned)
    start = next((i for i, part in enumerate(assigned.values()) if part is vision), 0)
    before = ((name, assigned[name]) for name in names[:start])
    held = {id(child) for child in vision.modules()}
    after = ((name, assigned[name]) for name in names[start:] if id(assigned[name]) not in held)
    return {
        "language": tuple(read_layer(block, text_config, i) for i, block in enumerate(language)),
        "vision": tuple(read_layer(block, _nearest_config(tower, vision), i) for i, block in enumerate(vision)),
        "patch_linear": _weights(before),
        "projector_linear": _weights(after) + _weights(_outside(model, tower, decoder, head)),
        "head_linear": head.weight.numel(),
        "hidden_size": text_config.hidden_size,
        "vision_width": _first(image_config, names=("embed_dim", "hidden_size")),
        "vocabulary": head.weight.shape[0],
        "element_size": next(decoder.parameters()).element_size(),
    }


def used_vision_blocks(model: torch.nn.Module) -> int:
    """How many blocks of the vision encoder the visual features depend on.

    Some models take their features before the last block (LLaVA: the last but one); the blocks behind are computed by
    the untouched model and disappear from a traced graph.
    """
    depth = len(blocks(model)[1])
    layers = getattr(model.config, "vision_feature_layer", None)
    if layers is None:
        return depth
    chosen = layers if isinstance(layers, (list, tuple)) else [layers]
    # Hidden state 0 is the input of block 0, so that hidden state n needs n blocks and -1 needs all of them.
    return max(layer if layer >= 0 else depth + 1 + layer for layer in chosen)
