"""Writes the bundled model: LLaVA-1.5's shape at 1/1000 of its size, with random weights.

    python examples/make_tiny_llava.py [DIRECTORY]

The result is an ordinary Hugging Face directory (weights, configuration, tokenizer, processor, chat template), so what
works on it is what works on a downloaded model. Its answers are gibberish: it exists to show the path and the timing.
A 168-pixel picture gives 12 x 12 = 144 visual tokens and a CLS token.
"""

from __future__ import annotations

import pathlib
import sys

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TARGET = pathlib.Path(__file__).parent / "models" / "tiny-llava"
SEED = 20240306
IMAGE, PATCH, WIDTH, LAYERS, HEADS = 168, 14, 128, 8, 4

CORPUS = (
    "USER: ASSISTANT: what is in the picture? the picture shows a person, an animal, a building, a tree and the sky.",
    "describe the image in one sentence. where is it? who is it? what colour is it? how many are there? is it large?",
    "there is a woman in front of a flag. she wears an orange suit and smiles. behind her stands a model of a rocket.",
    "a cup of coffee stands on a wooden table beside a spoon. a cat looks at the camera with green eyes and whiskers.",
)

TEMPLATE = """\
{{ bos_token }}{% for message in messages %}{{ message['role'] | upper }}: \
{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}\
{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}\
{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %} {% endfor %}\
{% if add_generation_prompt %}ASSISTANT:{% endif %}"""


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on four sentences: any text can be encoded, familiar words are short."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<pad>", "<s>", "</s>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        additional_special_tokens=["<image>"],
    )


def make_processor(tokenizer: transformers.PreTrainedTokenizerFast) -> transformers.LlavaProcessor:
    """CLIP's preprocessing at the model's resolution."""
    images = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE}, crop_size={"height": IMAGE, "width": IMAGE}
    )
    return transformers.LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def make_model(tokenizer: transformers.PreTrainedTokenizerFast) -> transformers.LlavaForConditionalGeneration:
    """The model in float16, weights drawn so that activations keep their scale through all layers."""
    shape = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    config = transformers.LlavaConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "intermediate_size": 3 * WIDTH,
            "image_size": IMAGE,
            "patch_size": PATCH,
            "projection_dim": WIDTH,
            **shape,
        },
        text_config={
            "model_type": "llama",
            "intermediate_size": 2 * WIDTH,
            "num_key_value_heads": HEADS // 2,
            "max_position_embeddings": 2048,
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            **shape,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(IMAGE // PATCH) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                weight.copy_(1 + 0.1 * noise)
            elif name.endswith("bias"):
                weight.copy_(0.05 * noise)
            elif weight.ndim < 2 or "embedding" in name or "embed_tokens" in name:
                weight.copy_(0.5 * noise if "patch" not in name else noise / weight[0].numel() ** 0.5)
            else:
                weight.copy_(1.5 * noise / weight[0].numel() ** 0.5)
        # Single bytes are never the likeliest token, so that the gibberish is made of words.
        model.lm_head.weight[
            : tokenizer.convert_tokens_to_ids("<image>") + 1 + len(pre_tokenizers.ByteLevel.alphabet())
        ] = 0
    # End of sequence is never the likeliest token, so that an answer is as long as it was asked for.
    model.generation_config.suppress_tokens = [tokenizer.eos_token_id]
    return model.half()


def main(target: pathlib.Path = TARGET) -> None:
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    model.save_pretrained(target)
    make_processor(tokenizer).save_pretrained(target)
    size = sum(file.stat().st_size for file in target.iterdir())
    print(f"{target}: {sum(weight.numel() for weight in model.parameters())} weights, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main(*(pathlib.Path(argument) for argument in sys.argv[1:2]))
