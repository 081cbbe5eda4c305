"""Random small models, as hypothesis draws them: a family with some of its sizes changed, and a type."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any
from unittest import mock

import torch
from hypothesis import strategies as st

import support

Settings = dict[str, Any]

# Families of which sizes are changed, too.
FAMILIES = (
    *support.FAMILIES,
    "qwen2_vl",
    "gemma3",
    "vipllava",
    "internvl",
    "paligemma",
    "qwen3_vl",
    "llava_next",
    "deepseek_vl",
)
FURTHER = tuple(family for family in support.FURTHER if family not in FAMILIES)
# Families that can be cut inside the encoder as well take more turns; between any two of these comes a further one.
_OFTEN = (*FAMILIES, "llava", "vipllava", "paligemma", "deepseek_vl")
TURNS = tuple(family for place, further in enumerate(FURTHER) for family in (_OFTEN[place % len(_OFTEN)], further))
# Families whose videos are patches that pass through the vision path of images.
WITH_VIDEOS = ("qwen2_vl", "qwen2_5_vl")
DTYPES = ("float32", "float32", "float32", "float32", "bfloat16", "float16")
# Text models that stand in for LLaMA where the family takes any.
_DECODERS: tuple[Settings, ...] = (
    {},
    {"model_type": "qwen2", "layer_types": None},
    {"model_type": "qwen3", "head_dim": 16, "layer_types": None},
    {"model_type": "mistral", "head_dim": 16, "sliding_window": None},
)
_HEADS = ((4, 2), (4, 1), (4, 4), (2, 1), (8, 2))  # query heads, key heads
# Some presets cut a dozen times: their shares of the depth are layers of their own in a deep model alone.
LAYERS = (2, 3, 3, 4, 6, 28)


@dataclasses.dataclass(frozen=True)
class Model:
    """A family with some sizes changed; `changes` mirrors the nesting of its configuration."""

    family: str
    changes: Settings
    seed: int
    dtype: str = "float32"

    @property
    def config(self) -> Settings:
        return _changed(support.family_record(self.family).config, self.changes)

    def build(self) -> Any:
        """The model with random weights."""
        record = dataclasses.replace(support.family_record(self.family), config=self.config)
        with mock.patch.dict(support.FAMILIES, {self.family: record}):
            return support.build_model(self.family, self.seed).to(getattr(torch, self.dtype))


def _changed(config: Mapping[str, Any], changes: Mapping[str, Any]) -> Settings:
    made = dict(config)
    for key, value in changes.items():
        made[key] = _changed(made.get(key, {}), value) if isinstance(value, Mapping) else value
    return made


@st.composite
def models(draw: st.DrawFn, families: tuple[str, ...] = FAMILIES, layers: tuple[int, ...] = LAYERS) -> Model:
    """A family in one of the types; of some, the text model has another depth, heads, windows or tied embeddings."""
    family, dtype = draw(st.sampled_from(families)), draw(st.sampled_from(DTYPES))
    if family not in FAMILIES:
        return Model(family, {}, draw(st.integers(0, 99)), dtype)
    config = support.family_record(family).config
    own = config["text_config"]
    text = dict(draw(st.sampled_from(_DECODERS))) if own["model_type"] in ("llama", "qwen2") else {}
    depth = draw(st.sampled_from(layers))
    heads, key_heads = draw(st.sampled_from(_HEADS))
    text |= {"num_hidden_layers": depth, "num_attention_heads": heads, "num_key_value_heads": key_heads}
    if "head_dim" in {**own, **text}:
        text["head_dim"] = draw(st.sampled_from((16, 8, 32)))
    if "rope_parameters" in own:
        width = text.get("head_dim", own["hidden_size"] // heads)
        text["rope_parameters"] = {
            "mrope_section": _sections(width // 2, "mrope_interleaved" in own["rope_parameters"])
        }
    text |= draw(_windows({**own, **text}, depth))
    changes: Settings = {"text_config": text}
    if draw(st.booleans()) and family not in ("paligemma", "gemma3"):
        text["tie_word_embeddings"] = changes["tie_word_embeddings"] = True
    if "num_hidden_layers" in config["vision_config"]:
        changes["vision_config"] = {"num_hidden_layers": draw(st.integers(2, 4))}
    if "vision_feature_layer" in config:
        changes["vision_feature_layer"] = draw(st.sampled_from((-1, -2)))
    return Model(family, changes, draw(st.integers(0, 99)), dtype)


def _sections(width: int, interleaved: bool) -> list[int]:
    """Rotary frequencies of time, height and width."""
    if interleaved:
        return [width - 2 * (width // 4), width // 4, width // 4]
    first = width // 4
    return [first, (width - first) // 2, width - first - (width - first) // 2]


def _windows(text: Mapping[str, Any], depth: int) -> st.SearchStrategy[Settings]:
    """Sliding windows in all layers, in some of them, or in none, as far as the text model has any."""
    window = st.sampled_from((5, 16, 24, 40))
    if "layer_types" in text:
        kinds = st.sampled_from(("full_attention", "sliding_attention"))
        mixed = {"layer_types": st.lists(kinds, min_size=depth, max_size=depth), "sliding_window": window}
        if text["model_type"] == "gemma3_text":
            return st.fixed_dictionaries(mixed)
        return st.just({}) | st.fixed_dictionaries({**mixed, "use_sliding_window": st.just(True)})
    if "sliding_window" in text:
        return st.fixed_dictionaries({"sliding_window": st.none() | window})
    return st.just({})
