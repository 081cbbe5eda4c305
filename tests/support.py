"""Tiny random vision-language models of real families, with processors made from scratch: nothing is downloaded.

`FAMILIES` is what every test loops over; `FURTHER` holds families that only some do. A new one is one `Family` record.
Everything is deterministic in its seed.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import skimage.data
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tvc.trace.processor import image_only

_TEXT = """the photo shows a woman in an orange suit, a cup of coffee on a wooden table and a cat with green eyes.
describe the picture in one sentence. what colour is the largest object? how many people can you see? where is the cat?
a short answer is enough. a long answer may name the objects from left to right, the light, the background and the mood.
what is written on the patch? the flag stands behind her. the spoon lies on the saucer. the cat looks at the camera."""

_QUESTIONS = (
    "where is the cat?",
    "describe the picture in one sentence and name every colour that you can see.",
    "how many people can you see in the photo, and what do they wear?",
    "what is it?",
)

# Odd sizes (width, height): landscape, portrait and nearly square, so that tiles, padding and grids all differ.
_SIZES = ((131, 97), (101, 163), (117, 121), (203, 89))

_TEMPLATE = """\
{{ '<s>' }}{% for message in messages %}{{ message['role'] | upper }}: \
{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}\
{% if part['type'] == 'image' %}{{ 'IMAGE' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}\
{% if message['role'] == 'assistant' %}{{ '</s>' }}{% endif %} {% endfor %}\
{% if add_generation_prompt %}ASSISTANT:{% endif %}"""

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


@dataclasses.dataclass(frozen=True)
class Family:
    """What differs between families; class names are those of `transformers`.

    `config` holds the fields of the model's configuration; a string value that is one of `specials` stands for its id.
    """

    config_class: str
    config: Mapping[str, Any]
    processor: str
    processor_options: Mapping[str, Any]
    image_processor: str
    image_options: Mapping[str, Any]
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
}


def family_record(family: str) -> Family:
    return FAMILIES[family] if family in FAMILIES else FURTHER[family]


def build_model(family: str, seed: int = 0) -> Any:
    """A random model of the family in float32, in eval mode, whose logits differ visibly between inputs."""
    record, ids = family_record(family), tokenizer(family)
    config = getattr(transformers, record.config_class)(**_resolved(record.config, ids))
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    randomize(model, seed)
    return model


def build_processor(family: str) -> Any:
    """The family's processor over a tokenizer of a few hundred byte-level pieces, padding on the left."""
    record = family_record(family)
    images = getattr(transformers, record.image_processor)(**record.image_options)
    made = image_only(getattr(transformers, record.processor))
    template = _TEMPLATE.replace("IMAGE", record.placeholder)
    return made(image_processor=images, tokenizer=tokenizer(family), chat_template=template, **record.processor_options)


def build(family: str, seed: int = 0) -> tuple[Any, Any]:
    """(model, processor)."""
    return build_model(family, seed), build_processor(family)


def save_model(family: str, path: str | pathlib.Path, seed: int = 0) -> pathlib.Path:
    """Writes a Hugging Face directory as a user would download it: weights, configuration, tokenizer, processor."""
    model, made = build(family, seed)
    model.save_pretrained(path)
    made.save_pretrained(path)
    return pathlib.Path(path)


def inputs(
    family: str, batch: int = 1, padded: bool = True, seed: int = 0, images: int = 1, processor: Any = None
) -> dict[str, torch.Tensor]:
    """What the processor makes of real photos and questions.

    padded: each sample has its own question and image sizes, so that the shorter ones are padded on the left (and the
      visual token counts are ragged where the family's depend on the image); else all have the same length.
    images: photos per sample.
    """
    made = processor or build_processor(family)
    shift = [sample if padded else 0 for sample in range(batch)]
    conversations = [
        [
            {
                "role": "user",
                "content": [{"type": "image"}] * images
                + [{"type": "text", "text": _QUESTIONS[(seed + move) % len(_QUESTIONS)]}],
            }
        ]
        for move in shift
    ]
    text = made.apply_chat_template(conversations, add_generation_prompt=True)
    pictures = [
        [photo(seed + sample + number, _SIZES[(seed + move + number) % len(_SIZES)]) for number in range(images)]
        for sample, move in enumerate(shift)
    ]
    tensors = made(images=pictures, text=text, padding=True, return_tensors="pt")
    return {name: value for name, value in tensors.items() if name != "labels"}


def photo(index: int, size: tuple[int, int] | None = None) -> Image.Image:
    """One of scikit-image's bundled photos, resized to `size` (width, height)."""
    names = ("astronaut", "coffee", "chelsea")
    image = Image.fromarray(getattr(skimage.data, names[index % len(names)])())
    return image if size is None else image.resize(size, Image.Resampling.BICUBIC)


def visual_mask(family: str, input_ids: torch.Tensor) -> torch.Tensor:
    """[B, S] bool: the slots that hold an image placeholder."""
    return input_ids == tokenizer(family).convert_tokens_to_ids(family_record(family).visual)


def randomize(model: Any, seed: int) -> None:
    """Fills every weight: matrices keep the variance of their input, times a gain; norms stay near where they start."""
    generator = torch.Generator().manual_seed(seed)
    # Where the embedding is the output head too, larger logits would make float32 noise look like a difference.
    embedding = 0.15 if model.config.tie_word_embeddings else 0.5
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "norm" in name and name.endswith("weight") and weight.ndim == 1:
                weight.add_(0.1 * noise)
            elif name.endswith("bias"):
                weight.copy_(0.05 * noise)
            elif name.endswith("embed_tokens.weight"):
                weight.copy_(embedding * noise)
            elif weight.ndim < 2 or ("embed" in name and "patch" not in name):
                weight.copy_(0.5 * noise)
            else:
                weight.copy_(1.3 * noise / weight[0].numel() ** 0.5)


@functools.cache
def tokenizer(family: str) -> Any:
    """A byte-level BPE tokenizer trained on one paragraph; ids 0..2 are pad, begin, end, then the family's specials."""
    record = family_record(family)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=448,
        special_tokens=["<pad>", "<s>", "</s>", *record.specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_TEXT.splitlines(), trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        additional_special_tokens=list(record.specials),
        **record.named,
    )


def _resolved(value: Any, ids: Any) -> Any:
    """`value` with special tokens replaced by their ids and every text model's vocabulary set to the tokenizer's."""
    if isinstance(value, Mapping):
        made = {key: _resolved(item, ids) for key, item in value.items()}
        if "num_key_value_heads" in made:
            made.setdefault("vocab_size", len(ids))
        return made
    if isinstance(value, str) and value.startswith("<"):
        return ids.convert_tokens_to_ids(value)
    return value


def script(name: str) -> Any:
    """A script such as `examples/demo.py` as a module; its `main` does not run."""
    path = pathlib.Path(__file__).parent.parent / name
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module
