"""The shapes read off a model against its published numbers and against counted FLOPs."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForImageTextToText, LlamaConfig

from tvc.errors import ModelError
from tvc.program import Layer
from tvc.trace.layout import blocks, cost_fields, meta_model, used_vision_blocks

# The published hyper-parameters of the checkpoints, from their config.json.
LLAVA_7B = {
    "model_type": "llava",
    "vision_feature_layer": -2,
    "dtype": "float16",
    "text_config": {"model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096},
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "projection_dim": 768,
    },
}
ONEVISION_7B = {
    "model_type": "llava_onevision",
    "vision_feature_layer": -1,
    "dtype": "float16",
    "text_config": {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152000,
    },
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 26,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
        "vision_use_head": False,
    },
}
QWEN_7B = {
    "model_type": "qwen2_5_vl",
    "dtype": "bfloat16",
    "text_config": {
        "model_type": "qwen2_5_vl_text",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
    "vision_config": {
        "model_type": "qwen2_5_vl",
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    },
}
SMOLVLM_2B = {
    "model_type": "smolvlm",
    "dtype": "bfloat16",
    "scale_factor": 3,
    "text_config": {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 64,
        "vocab_size": 49280,
    },
    "vision_config": {
        "model_type": "smolvlm_vision",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
    },
}
FAMILIES = {"llava": LLAVA_7B, "llava_onevision": ONEVISION_7B, "qwen2_5_vl": QWEN_7B, "smolvlm": SMOLVLM_2B}


def config_of(values: dict) -> object:
    return AutoConfig.for_model(**values)


def small(values: dict) -> object:
    """The same family with few, narrow layers whose sizes are all different."""
    text = {
        **values["text_config"],
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "vocab_size": 160,
    }
    text |= {"num_key_value_heads": 2, "head_dim": 8}
    if values["model_type"] == "qwen2_5_vl":
        text["rope_parameters"] = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
        vision = {
            "depth": 4,
            "hidden_size": 40,
            "intermediate_size": 56,
            "num_heads": 5,
            "out_hidden_size": 48,
            "fullatt_block_indexes": [1, 3],
        }
    else:
        vision = {
            "hidden_size": 40,
            "intermediate_size": 56,
            "num_hidden_layers": 4,
            "num_attention_heads": 5,
            "image_size": 84,
        }
    extra = {"image_token_index": 7} if "llava" in values["model_type"] else {"image_token_id": 7}
    return config_of({**values, **extra, "text_config": text, "vision_config": {**values["vision_config"], **vision}})


@pytest.mark.parametrize(
    ("family", "language", "first", "vision", "window", "patch", "projector"),
    [
        # 4 D^2 + 3 D I; LLaMA-7B has as many key-value heads as heads.
        (
            "llava",
            32,
            Layer(4 * 4096**2 + 3 * 4096 * 11008, 32, 32, 128),
            24,
            0,
            3 * 14**2 * 1024,
            1024 * 4096 + 4096**2,
        ),
        (
            "llava_onevision",
            28,
            Layer(2 * 3584**2 + 2 * 3584 * 512 + 3 * 3584 * 18944, 28, 4, 128),
            26,
            0,
            3 * 14**2 * 1152,
            1152 * 3584 + 3584**2,
        ),
        (
            "qwen2_5_vl",
            28,
            Layer(2 * 3584**2 + 2 * 3584 * 512 + 3 * 3584 * 18944, 28, 4, 128),
            32,
            64,
            3 * 2 * 14**2 * 1280,
            5120**2 + 5120 * 3584,
        ),
        ("smolvlm", 24, Layer(4 * 2048**2 + 3 * 2048 * 8192, 32, 32, 64), 27, 0, 3 * 14**2 * 1152, 9 * 1152 * 2048),
    ],
)
def test_published_models_give_their_published_shapes(family, language, first, vision, window, patch, projector):
    fields = cost_fields(meta_model(config_of(FAMILIES[family])))
    assert len(fields["language"]) == language
    assert set(fields["language"]) == {first}
    assert len(fields["vision"]) == vision
    assert fields["vision"][0].window == window
    assert fields["patch_linear"] == patch
    assert fields["projector_linear"] == projector
    assert fields["element_size"] == 2
    assert fields["head_linear"] == fields["hidden_size"] * fields["vocabulary"]


def test_windows_hold_in_all_but_the_exempt_blocks():
    fields = cost_fields(meta_model(config_of(QWEN_7B)))
    assert [i for i, layer in enumerate(fields["vision"]) if layer.window == 0] == [7, 15, 23, 31]
    assert (fields["vision"][0].heads, fields["vision"][0].head_dim) == (16, 80)


def test_sliding_decoder_layers_have_their_window():
    text = {**QWEN_7B["text_config"], "use_sliding_window": True, "sliding_window": 100, "max_window_layers": 20}
    fields = cost_fields(meta_model(config_of({**QWEN_7B, "text_config": text})))
    assert [layer.window for layer in fields["language"]] == [0] * 20 + [100] * 8


def test_a_mixture_counts_the_experts_that_one_token_visits():
    text = {
        "model_type": "qwen3_vl_moe_text",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "vocab_size": 100,
    }
    config = AutoConfig.for_model("qwen3_vl_moe", text_config=text)
    layer = cost_fields(meta_model(config))["language"][0]
    router = 64 * 8
    matrices = 64 * 64 * 2 + 64 * 32 * 2 + 2 * 3 * 64 * 24
    assert layer.linear in (matrices, matrices + router)


@functools.cache
def tiny(family: str) -> torch.nn.Module:
    """A small model with weights; its attention is eager, because fused attention on the CPU is not counted."""
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(
        small(FAMILIES[family]), dtype=torch.float32, attn_implementation="eager"
    ).eval()


def _count(module: torch.nn.Module, *arguments: object, **named: object) -> tuple[int, int, int]:
    """FLOPs of a run: (matrix products of weights, convolutions, everything else); eager attention is all `bmm`."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*arguments, **named)
    counts = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    attention = sum(n for op, n in counts.items() if "bmm" in op)
    convolution = sum(n for op, n in counts.items() if "conv" in op)
    return sum(counts.values()) - attention - convolution, convolution, attention


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_decoder_costs_what_is_counted(family):
    decoder, layers = tiny(family).get_decoder(), cost_fields(tiny(family))["language"]
    batch, length = 2, 37
    linear, _, attention = _count(decoder, input_ids=torch.zeros(batch, length, dtype=torch.long), use_cache=False)
    assert linear == 2 * batch * length * sum(layer.linear for layer in layers)
    assert attention == batch * sum(4 * layer.heads * layer.head_dim * length**2 for layer in layers)


@pytest.mark.parametrize("family", ["llava", "llava_onevision", "smolvlm"])
def test_the_vision_path_costs_what_is_counted(family):
    tower, fields = tiny(family).get_encoder("image"), cost_fields(tiny(family))
    tiles, patches = 3, 36
    tokens = patches + (family == "llava")
    linear, convolution, attention = _count(tower, torch.zeros(tiles, 3, 84, 84))
    assert linear == 2 * tiles * tokens * sum(layer.linear for layer in fields["vision"])
    assert convolution == 2 * tiles * patches * fields["patch_linear"]
    assert attention == tiles * sum(4 * layer.heads * layer.head_dim * tokens**2 for layer in fields["vision"])


def test_the_windowed_vision_path_costs_what_is_counted():
    tower, fields = tiny("qwen2_5_vl").get_encoder("image"), cost_fields(tiny("qwen2_5_vl"))
    side = 16  # patches: a multiple of the window of 8, so that every window is full
    pixels = torch.zeros(side * side, 3 * 2 * 14 * 14)
    linear, convolution, attention = _count(tower, pixels, grid_thw=torch.tensor([[1, side, side]]))
    layers, tokens = fields["vision"], side * side
    merged = 2 * (tokens // 4) * fields["projector_linear"]
    assert linear == 2 * tokens * sum(layer.linear for layer in layers) + merged
    assert convolution == 2 * tokens * fields["patch_linear"]
    assert attention == sum(4 * layer.heads * layer.head_dim * tokens * (layer.window or tokens) for layer in layers)


@pytest.mark.parametrize(("family", "group"), [("llava", 1), ("llava_onevision", 1), ("smolvlm", 9)])
def test_the_projector_costs_what_is_counted(family, group):
    model, fields = tiny(family), cost_fields(tiny(family))
    projector = next(
        part
        for name, part in model.named_modules()
        if name.rsplit(".", 1)[-1] in ("multi_modal_projector", "connector")
    )
    linear, _, _ = _count(projector, torch.zeros(3, 36, 40))
    assert linear == 2 * 3 * 36 // group * fields["projector_linear"]


@pytest.mark.parametrize(
    ("family", "used"), [("llava", 23), ("llava_onevision", 26), ("qwen2_5_vl", 32), ("smolvlm", 27)]
)
def test_blocks_behind_the_features_are_known(family, used):
    model = meta_model(config_of(FAMILIES[family]))
    assert used_vision_blocks(model) == used
    language, vision = blocks(model)
    assert len(vision) >= used
    assert len(language) > 20


def test_a_text_only_model_is_refused():
    with pytest.raises(ModelError, match="not-vision-language"):
        meta_model(LlamaConfig())


@pytest.mark.parametrize("kind", ("diffusion_gemma", "qwen4_exp"))
def test_a_configuration_with_gaps_is_refused(kind, tmp_path):
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    with pytest.raises(ModelError) as caught:
        meta_model(tmp_path)
    assert caught.value.slug == "incomplete-configuration"
    assert kind in caught.value.where


def test_a_directory_without_a_configuration_is_refused(tmp_path):
    with pytest.raises(ModelError, match="no-configuration"):
        meta_model(tmp_path)
