"""The model families that tests are made of, one `Family` record each; `support.py` builds models and inputs from them.

`FAMILIES` is what every test loops over; `FURTHER` holds families that only some do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

_TEXT_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_VISION_SIZES = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
}
_QFORMER_SIZES = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "vocab_size": 512,
    "layer_norm_eps": 1e-6,
    "pad_token_id": 0,
}


@dataclasses.dataclass(frozen=True)
class Family:
    """What differs between families; class names are those of `transformers`.

    `config` holds the fields of the model's configuration; a string value that is one of `specials` stands for its id.
    Where the processor needs a package that tests do without, `by_hand` names the function of `by_hand.py` that stands
    in for it and takes `image_options`; `marks` are the inputs that then say which tokens are visual.
    """

    config_class: str
    config: Mapping[str, Any]
    processor: str = ""
    processor_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    image_processor: str = ""
    image_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    by_hand: str = ""
    marks: tuple[str, ...] = ()
    specials: tuple[str, ...] = ("<image>",)
    named: Mapping[str, str] = dataclasses.field(default_factory=dict)  # tokenizer attributes that hold a special token
    placeholder: str = "<image>"  # what stands for an image in a prompt
    visual: str = "<image>"  # the token that holds one visual feature


FAMILIES: dict[str, Family] = {
    "llava": Family(
        config_class="LlavaConfig",
        config={
            "text_config": {"model_type": "llama", **_TEXT_SIZES},
            "vision_config": {"model_type": "clip_vision_model", "projection_dim": 48, **_VISION_SIZES},
            "image_token_index": "<image>",
            "image_seq_length": 16,
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
        },
        processor="LlavaProcessor",
        processor_options={
            "patch_size": 14,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        },
        image_processor="CLIPImageProcessorPil",
        image_options={"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}},
    ),
    "qwen2_5_vl": Family(
        config_class="Qwen2_5_VLConfig",
        config={
            "text_config": {
                "model_type": "qwen2_5_vl_text",
                **_TEXT_SIZES,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
            },
            "vision_config": {
                "model_type": "qwen2_5_vl_vision",
                "depth": 4,
                "hidden_size": 48,
                "intermediate_size": 80,
                "num_heads": 4,
                "patch_size": 14,
                "window_size": 56,
                "out_hidden_size": 64,
                "fullatt_block_indexes": [1, 3],
            },
            "image_token_id": "<|image_pad|>",
            "video_token_id": "<|video_pad|>",
            "vision_start_token_id": "<|vision_start|>",
            "vision_end_token_id": "<|vision_end|>",
        },
        processor="Qwen2_5_VLProcessor",
        processor_options={},
        image_processor="Qwen2VLImageProcessorPil",
        image_options={"min_pixels": 56 * 56, "max_pixels": 28 * 28 * 24},
        specials=("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
        placeholder="<|vision_start|><|image_pad|><|vision_end|>",
        visual="<|image_pad|>",
    ),
    "llava_onevision": Family(
        config_class="LlavaOnevisionConfig",
        config={
            "text_config": {"model_type": "qwen2", **_TEXT_SIZES},
            "vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False, **_VISION_SIZES},
            "image_token_index": "<image>",
            "video_token_index": "<video>",
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "image_grid_pinpoints": [[56, 56], [56, 112], [112, 56], [112, 112]],
        },
        processor="LlavaOnevisionProcessor",
        processor_options={"num_image_tokens": 16, "vision_feature_select_strategy": "full"},
        image_processor="LlavaOnevisionImageProcessorPil",
        image_options={
            "size": {"height": 56, "width": 56},
            "image_grid_pinpoints": [[56, 56], [56, 112], [112, 56], [112, 112]],
        },
        specials=("<image>", "<video>"),
    ),
    "smolvlm": Family(
        config_class="SmolVLMConfig",
        config={
            "text_config": {"model_type": "llama", **_TEXT_SIZES},
            "vision_config": {"model_type": "smolvlm_vision", **_VISION_SIZES, "image_size": 84},
            "image_token_id": "<image>",
            "scale_factor": 2,
            "pad_token_id": 0,
        },
        processor="SmolVLMProcessor",
        processor_options={"image_seq_len": 9},
        image_processor="SmolVLMImageProcessorPil",
        image_options={"size": {"longest_edge": 168}, "max_image_size": {"longest_edge": 84}},
        specials=(
            "<image>",
            "<fake_token_around_image>",
            "<end_of_utterance>",
            "<global-img>",
            *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)),
        ),
    ),
}


FURTHER: dict[str, Family] = {
    "qwen2_vl": Family(
        config_class="Qwen2VLConfig",
        config={
            "text_config": {
                "model_type": "qwen2_vl_text",
                **_TEXT_SIZES,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
            },
            "vision_config": {
                "model_type": "qwen2_vl_vision",
                "depth": 4,
                "embed_dim": 48,
                "hidden_size": 64,
                "mlp_ratio": 2,
                "num_heads": 4,
                "patch_size": 14,
            },
            "image_token_id": "<|image_pad|>",
            "video_token_id": "<|video_pad|>",
            "vision_start_token_id": "<|vision_start|>",
            "vision_end_token_id": "<|vision_end|>",
        },
        processor="Qwen2VLProcessor",
        processor_options={},
        image_processor="Qwen2VLImageProcessorPil",
        image_options={"min_pixels": 56 * 56, "max_pixels": 28 * 28 * 24},
        specials=("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
        placeholder="<|vision_start|><|image_pad|><|vision_end|>",
        visual="<|image_pad|>",
    ),
    "llava_next": Family(
        config_class="LlavaNextConfig",
        config={
            "text_config": {"model_type": "llama", **_TEXT_SIZES},
            "vision_config": {"model_type": "clip_vision_model", "projection_dim": 48, **_VISION_SIZES},
            "image_token_index": "<image>",
            "image_seq_length": 16,
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
            "image_grid_pinpoints": [[56, 112], [112, 56], [112, 112]],
        },
        processor="LlavaNextProcessor",
        processor_options={
            "patch_size": 14,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        },
        image_processor="LlavaNextImageProcessorPil",
        image_options={
            "size": {"shortest_edge": 56},
            "crop_size": {"height": 56, "width": 56},
            "image_grid_pinpoints": [[56, 112], [112, 56], [112, 112]],
        },
    ),
    "paligemma": Family(
        config_class="PaliGemmaConfig",
        config={
            # The processor adds 1,024 location and 128 segmentation tokens to whatever tokenizer it is given.
            "text_config": {"model_type": "gemma", **_TEXT_SIZES, "head_dim": 16, "vocab_size": 1600},
            "vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False, **_VISION_SIZES},
            "image_token_index": "<image>",
            "projection_dim": 64,
            "hidden_size": 64,
            "vocab_size": 1600,
        },
        processor="PaliGemmaProcessor",
        processor_options={},
        image_processor="SiglipImageProcessorPil",
        image_options={"size": {"height": 56, "width": 56}, "image_seq_length": 16},
    ),
    "gemma3": Family(
        config_class="Gemma3Config",
        config={
            "text_config": {
                "model_type": "gemma3_text",
                **_TEXT_SIZES,
                "head_dim": 16,
                "query_pre_attn_scalar": 16,
                "sliding_window": 24,
                "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
            },
            "vision_config": {
                "model_type": "siglip_vision_model",
                "vision_use_head": False,
                **_VISION_SIZES,
                "image_size": 84,
            },
            "mm_tokens_per_image": 9,
            "image_token_index": "<image_soft_token>",
            "boi_token_index": "<start_of_image>",
            "eoi_token_index": "<end_of_image>",
        },
        processor="Gemma3Processor",
        processor_options={"image_seq_length": 9},
        image_processor="Gemma3ImageProcessorPil",
        image_options={"size": {"height": 84, "width": 84}},
        specials=("<start_of_image>", "<image_soft_token>", "<end_of_image>"),
        named={
            "image_token": "<image_soft_token>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
        },
        placeholder="<start_of_image>",
        visual="<image_soft_token>",
    ),
    "internvl": Family(
        config_class="InternVLConfig",
        config={
            "text_config": {"model_type": "qwen2", **_TEXT_SIZES},
            "vision_config": {"model_type": "internvl_vision", **_VISION_SIZES},
            "image_token_id": "<IMG_CONTEXT>",
            "image_seq_length": 4,
            "downsample_ratio": 0.5,
        },
        processor="InternVLProcessor",
        processor_options={"image_seq_length": 4},
        image_processor="GotOcr2ImageProcessorPil",
        image_options={"size": {"height": 56, "width": 56}, "min_patches": 1, "max_patches": 4},
        specials=("<IMG_CONTEXT>", "<img>", "</img>", "<video>"),
        named={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        placeholder="<IMG_CONTEXT>",
        visual="<IMG_CONTEXT>",
    ),
    "qwen3_vl": Family(
        config_class="Qwen3VLConfig",
        config={
            "text_config": {
                "model_type": "qwen3_vl_text",
                **_TEXT_SIZES,
                "head_dim": 16,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "mrope_section": [4, 2, 2],
                    "mrope_interleaved": True,
                },
            },
            "vision_config": {
                "model_type": "qwen3_vl_vision",
                "depth": 4,
                "hidden_size": 48,
                "intermediate_size": 80,
                "num_heads": 4,
                "patch_size": 14,
                "out_hidden_size": 64,
                "num_position_embeddings": 64,
                "deepstack_visual_indexes": [0, 1, 2],
            },
            "image_token_id": "<|image_pad|>",
            "video_token_id": "<|video_pad|>",
            "vision_start_token_id": "<|vision_start|>",
            "vision_end_token_id": "<|vision_end|>",
        },
        processor="Qwen3VLProcessor",
        image_processor="Qwen2VLImageProcessorPil",
        image_options={"min_pixels": 56 * 56, "max_pixels": 28 * 28 * 24, "patch_size": 14},
        specials=("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
        placeholder="<|vision_start|><|image_pad|><|vision_end|>",
        visual="<|image_pad|>",
    ),
    "mistral3": Family(
        config_class="Mistral3Config",
        config={
            "text_config": {"model_type": "mistral", **_TEXT_SIZES, "head_dim": 16, "sliding_window": None},
            "vision_config": {"model_type": "pixtral", **_VISION_SIZES, "image_size": 168},
            "image_token_index": "[IMG]",
            "spatial_merge_size": 2,
            "tie_word_embeddings": False,
        },
        by_hand="whole_rows",
        image_options={
            "patch": 14,
            "merge": 2,
            "longest": 168,
            "token": "[IMG]",
            "row_end": "[IMG_BREAK]",
            "image_end": "[IMG_END]",
        },
        specials=("[IMG]", "[IMG_BREAK]", "[IMG_END]"),
        placeholder="[IMG]",
        visual="[IMG]",
    ),
    "pixtral": Family(
        config_class="LlavaConfig",
        config={
            "text_config": {"model_type": "mistral", **_TEXT_SIZES, "head_dim": 16, "sliding_window": 40},
            "vision_config": {"model_type": "pixtral", **_VISION_SIZES, "image_size": 112},
            "image_token_index": "[IMG]",
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
        },
        by_hand="whole_rows",
        image_options={
            "patch": 14,
            "merge": 1,
            "longest": 84,
            "token": "[IMG]",
            "row_end": "[IMG_BREAK]",
            "image_end": "[IMG_END]",
        },
        specials=("[IMG]", "[IMG_BREAK]", "[IMG_END]"),
        placeholder="[IMG]",
        visual="[IMG]",
    ),
    "idefics3": Family(
        config_class="Idefics3Config",
        config={
            "text_config": {"model_type": "llama", **_TEXT_SIZES},
            "vision_config": {"model_type": "idefics3_vision", **_VISION_SIZES, "image_size": 84},
            "image_token_id": "<image>",
            "scale_factor": 2,
            "pad_token_id": 0,
        },
        processor="Idefics3Processor",
        processor_options={"image_seq_len": 9},
        image_processor="Idefics3ImageProcessorPil",
        image_options={"size": {"longest_edge": 168}, "max_image_size": {"longest_edge": 84}},
        specials=(
            "<image>",
            "<fake_token_around_image>",
            "<end_of_utterance>",
            "<global-img>",
            *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)),
        ),
    ),
    "lfm2_vl": Family(
        config_class="Lfm2VlConfig",
        config={
            "text_config": {
                "model_type": "lfm2",
                **_TEXT_SIZES,
                "block_auto_adjust_ff_dim": False,
                "layer_types": ["conv", "full_attention", "conv", "conv", "full_attention", "conv"],
            },
            "vision_config": {
                "model_type": "siglip2_vision_model",
                **_VISION_SIZES,
                "num_patches": 36,
                "vision_use_head": False,
            },
            "image_token_id": "<image>",
            "projector_hidden_size": 80,
            "tie_word_embeddings": False,
        },
        by_hand="patch_rows",
        image_options={
            "patch": 14,
            "merge": 2,
            "longest": 168,
            "token": "<image>",
            "start": "<|image_start|>",
            "end": "<|image_end|>",
        },
        specials=("<image>", "<|image_start|>", "<|image_end|>"),
    ),
    "blip-2": Family(
        config_class="Blip2Config",
        config={
            "text_config": {
                "model_type": "opt",
                "vocab_size": 512,
                "hidden_size": 64,
                "word_embed_proj_dim": 64,
                "ffn_dim": 96,
                "num_hidden_layers": 6,
                "num_attention_heads": 4,
                "max_position_embeddings": 1024,
                "tie_word_embeddings": False,
                "pad_token_id": 0,
                "bos_token_id": 1,
                "eos_token_id": 2,
            },
            "vision_config": {"model_type": "blip_2_vision_model", **_VISION_SIZES},
            "qformer_config": {**_QFORMER_SIZES, "model_type": "blip_2_qformer"},
            "num_query_tokens": 16,
            "image_token_index": "<image>",
        },
        processor="Blip2Processor",
        processor_options={"num_query_tokens": 16},
        image_processor="BlipImageProcessorPil",
        image_options={"size": {"height": 56, "width": 56}},
        placeholder="",
    ),
    "instructblip": Family(
        config_class="InstructBlipConfig",
        config={
            "text_config": {"model_type": "llama", **_TEXT_SIZES},
            "vision_config": {"model_type": "instructblip_vision_model", **_VISION_SIZES},
            "qformer_config": {**_QFORMER_SIZES, "model_type": "instructblip_qformer"},
            "num_query_tokens": 16,
            "image_token_index": "<image>",
        },
        processor="InstructBlipProcessor",
        processor_options={"num_query_tokens": 16},
        image_processor="BlipImageProcessorPil",
        image_options={"size": {"height": 56, "width": 56}},
        placeholder="",
    ),
    "mllama": Family(
        config_class="MllamaConfig",
        config={
            "text_config": {"model_type": "mllama_text_model", **_TEXT_SIZES, "cross_attention_layers": [1, 4]},
            "vision_config": {
                "model_type": "mllama_vision_model",
                "hidden_size": 48,
                "intermediate_size": 80,
                "num_hidden_layers": 4,
                "num_global_layers": 2,
                "attention_heads": 4,
                "image_size": 56,
                "patch_size": 14,
                "max_num_tiles": 4,
                "intermediate_layers_indices": [1, 2],
                "vision_output_dim": 48 * 3,
            },
            "image_token_index": "<|image|>",
        },
        processor="MllamaProcessor",
        image_processor="MllamaImageProcessorPil",
        image_options={"size": {"height": 56, "width": 56}, "max_image_tiles": 4},
        specials=("<|image|>", "<|python_tag|>"),
        placeholder="<|image|>",
        visual="<|image|>",
    ),
    "llava_next_video": Family(
        config_class="LlavaNextVideoConfig",
        config={
            "text_config": {"model_type": "llama", **_TEXT_SIZES},
            "vision_config": {"model_type": "clip_vision_model", "projection_dim": 48, **_VISION_SIZES},
            "image_token_index": "<image>",
            "video_token_index": "<video>",
            "image_seq_length": 16,
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
            "image_grid_pinpoints": [[56, 112], [112, 56], [112, 112]],
        },
        # Its own processor differs for videos only.
        processor="LlavaNextProcessor",
        processor_options={
            "patch_size": 14,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        },
        image_processor="LlavaNextImageProcessorPil",
        image_options={
            "size": {"shortest_edge": 56},
            "crop_size": {"height": 56, "width": 56},
            "image_grid_pinpoints": [[56, 112], [112, 56], [112, 112]],
        },
        specials=("<image>", "<video>"),
    ),
    "video_llava": Family(
        config_class="VideoLlavaConfig",
        config={
            "text_config": {"model_type": "llama", **_TEXT_SIZES},
            "vision_config": {"model_type": "clip_vision_model", "projection_dim": 48, **_VISION_SIZES},
            "image_token_index": "<image>",
            "video_token_index": "<video>",
            "image_seq_length": 16,
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
        },
        by_hand="whole",
        image_options={"side": 56, "text": "<image>" * 16, "pixels": "pixel_values_images"},
        specials=("<image>", "<video>"),
    ),
}
