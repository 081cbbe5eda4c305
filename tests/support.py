"""Tiny random vision-language models of real families, with processors made from scratch: nothing is downloaded.

A new one is one `Family` record in `families.py`. Everything is deterministic in its seed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import safetensors.torch
import skimage.data
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tvc.policy import Policy, resolve
from tvc.policy.weights import trained
from tvc.program import Layout
from tvc.trace.processor import image_only


def with_weights(policy: Policy, layout: Layout, folder: pathlib.Path, seed: int = 0) -> Policy:
    """The policy with files of random weights, as it takes them in this model, behind its parameter `weights`."""
    draw, tensors = torch.Generator().manual_seed(seed), {}
    for step, primitive in trained(resolve(policy, layout).steps):
        width = layout.vision_width if step.at.startswith("vision.") else layout.hidden_size
        for name, shape in primitive.shapes(width or 0).items():
            # Sizes that a file decides: a square number, as some stand for a grid.
            sizes = [16 if isinstance(size, str) else size for size in shape]
            full = f"{primitive.prefix}.{name}" if primitive.prefix else name
            tensors[full] = torch.randn(sizes, generator=draw) / max(sizes[-1], 1) ** 0.5
    if not tensors:
        return policy
    safetensors.torch.save_file(tensors, folder / "weights.safetensors")
    return policy.with_settings({"weights": str(folder / "weights.safetensors")})


def script(name: str) -> Any:
    """A file such as `examples/demo.py` as a module; its `main` does not run."""
    path = pathlib.Path(__file__).parent.parent / name
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


# The folder stays off `sys.path`, so that whoever loads this file need not know of the others.
families, by_hand = script("tests/families.py"), script("tests/by_hand.py")
Family, FAMILIES, FURTHER = families.Family, families.FAMILIES, families.FURTHER
# The families whose processors work with the packages that are installed here.
PROCESSED = [name for name, record in {**FAMILIES, **FURTHER}.items() if record.processor]

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


class _ConvolutionalTower(transformers.PreTrainedModel):
    """Stands in for Gemma 3n's MobileNet, which needs timm: a map of channels in a sixteenth of the picture's sides."""

    config_class = transformers.Gemma3nVisionConfig

    def __init__(self, config: Any):
        super().__init__(config)
        width = config.hidden_size
        self.stem = torch.nn.Conv2d(3, width, 8, 8)
        self.mix = torch.nn.Conv2d(width, width, 3, 2, 1)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, **_options: Any) -> Any:
        return BaseModelOutputWithPooling(last_hidden_state=self.mix(torch.nn.functional.gelu(self.stem(pixel_values))))


transformers.AutoModel.register(transformers.Gemma3nVisionConfig, _ConvolutionalTower, exist_ok=True)


def family_record(family: str) -> Family:
    return FAMILIES[family] if family in FAMILIES else FURTHER[family]


def build_model(family: str, seed: int = 0, layers: int | None = None) -> Any:
    """A random model of the family in float32, in eval mode, whose logits differ visibly between inputs.

    `layers`: of its decoder, where the record's few are not enough.
    """
    record, ids = family_record(family), tokenizer(family)
    described = record.config
    if layers is not None:
        text = {**described["text_config"], "num_hidden_layers": layers}
        if kinds := text.get("layer_types"):
            text["layer_types"] = [kinds[number % len(kinds)] for number in range(layers)]
        described = {**described, "text_config": text}
    config = getattr(transformers, record.config_class)(**_resolved(record, described, ids))
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    randomize(model, seed)
    return model


def build_processor(family: str) -> Any:
    """The family's processor over a tokenizer of a few hundred byte-level pieces, padding on the left.

    None where the record names none; `inputs` are then made by hand.
    """
    record = family_record(family)
    if not record.processor:
        return None
    images = getattr(transformers, record.image_processor)(**record.image_options)
    made = image_only(getattr(transformers, record.processor))
    parts = {name: tokenizer(family) for name in made.get_attributes() if name.endswith("tokenizer")}
    return made(image_processor=images, chat_template=template(record), **parts, **record.processor_options)


def build(family: str, seed: int = 0, layers: int | None = None) -> tuple[Any, Any]:
    """(model, processor)."""
    return build_model(family, seed, layers), build_processor(family)


def save_model(family: str, path: str | pathlib.Path, seed: int = 0) -> pathlib.Path:
    """Writes a Hugging Face directory as a user would download it: weights, configuration, tokenizer, processor."""
    model, made = build(family, seed)
    model.save_pretrained(path)
    (made or tokenizer(family)).save_pretrained(path)
    return pathlib.Path(path)


def inputs(
    family: str, batch: int = 1, padded: bool = True, seed: int = 0, images: int = 1, processor: Any = None
) -> dict[str, torch.Tensor]:
    """What the processor makes of real photos and questions, or a stand-in for it where it cannot be built.

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
    chat = getattr(made, "chat_template", None) or template(family_record(family))
    text = tokenizer(family).apply_chat_template(
        conversations, chat_template=chat, tokenize=False, add_generation_prompt=True
    )
    pictures = [
        [photo(seed + sample + number, _SIZES[(seed + move + number) % len(_SIZES)]) for number in range(images)]
        for sample, move in enumerate(shift)
    ]
    if made is None:
        return inputs_by_hand(family, pictures, text)
    tensors = made(images=pictures, text=text, padding=True, return_tensors="pt")
    return {name: value for name, value in tensors.items() if name != "labels"}


LLAVA_IMAGE, LLAVA_TOKENS = 190, 16  # the placeholder of `llava_around`, and how many of it an image takes


def llava_around(text: Mapping[str, Any], tower: Mapping[str, Any], spread: float, **config: Any) -> Any:
    """LLaVA with a decoder and an encoder of any kind, random weights of a standard deviation `spread`.

    Args:
        text, tower: a `model_type`, and what differs from sizes that most kinds know; `tower` may be empty, for CLIP.
    """
    heads = {"num_attention_heads": 4}
    sizes = {"hidden_size": 64, "num_key_value_heads": 2, "vocab_size": 200, "max_position_embeddings": 512}
    seen = {"model_type": "clip_vision_model", "hidden_size": 48, "image_size": 56, "patch_size": 14}
    made = transformers.LlavaConfig(
        text_config={"intermediate_size": 96, "num_hidden_layers": 4, "pad_token_id": 0, **heads, **sizes, **text},
        vision_config={"intermediate_size": 80, "num_hidden_layers": 3, **heads, **seen, **tower},
        image_token_id=LLAVA_IMAGE,
        **config,
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(made).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, spread)
    return model


def asked_of_llava(tokens: int = LLAVA_TOKENS) -> dict[str, torch.Tensor]:
    """A picture each for two samples of one length, text on both sides of it."""
    pictures = [LLAVA_IMAGE] * tokens
    ids = torch.tensor([[1, 60, 61, *pictures, 70, 71, 72], [1, 62, *pictures, 73, 74, 75, 76]])
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def inputs_by_hand(family: str, pictures: list[list[Image.Image]], text: list[str]) -> dict[str, torch.Tensor]:
    """What stands in for the family's processor makes of the pictures of every sample, and of its prompt."""
    record = family_record(family)
    options = dict(record.image_options)
    if record.image_processor:
        options["processor"] = record.image_processor
    expanded, tensors = getattr(by_hand, record.by_hand)(pictures, **options)
    left = iter(expanded)
    for number, sample in enumerate(text):
        first, *rest = sample.split(record.placeholder)
        text[number] = first + "".join(next(left) + part for part in rest)
    tokens = tokenizer(family)(text, padding=True, return_tensors="pt")
    ids = tokens["input_ids"]
    made = {"input_ids": ids, "attention_mask": tokens["attention_mask"], **tensors}
    for name, marked in record.marks.items():
        made[name] = torch.isin(ids, torch.tensor(tokenizer(family).convert_tokens_to_ids(list(marked)))).long()
    return made


def photo(index: int, size: tuple[int, int] | None = None) -> Image.Image:
    """One of scikit-image's bundled photos, resized to `size` (width, height)."""
    names = ("astronaut", "coffee", "chelsea")
    image = Image.fromarray(getattr(skimage.data, names[index % len(names)])())
    return image if size is None else image.resize(size, Image.Resampling.BICUBIC)


def visual_mask(family: str, input_ids: torch.Tensor) -> torch.Tensor:
    """[B, S] bool: the slots that hold an image placeholder."""
    return input_ids == tokenizer(family).convert_tokens_to_ids(family_record(family).visual)


def two_images() -> tuple[dict[str, torch.Tensor], int]:
    """Inputs of one prompt of llava with two images, and the slot where the second image begins."""
    both = inputs("llava", images=2)
    visual = visual_mask("llava", both["input_ids"])[0]
    return both, int(visual.nonzero().flatten()[visual.sum() // 2])


def conversation(
    compiled: Any, whole: Mapping[str, torch.Tensor], lengths: Sequence[int], pixels: Mapping[int, torch.Tensor]
) -> tuple[torch.Tensor, list[tuple[int, dict[str, torch.Tensor]]], Any]:
    """([B, calls, vocabulary] what each call answers, (slots, `kept`) of each, the cache behind the last).

    Args:
        whole: the ids and the mask of all calls together.
        lengths: slots of each call.
        pixels: of the calls that bring images, by their number.
    """
    start, cache, answers, parts = 0, None, [], []
    for number, length in enumerate(lengths):
        end = start + length
        given = {"input_ids": whole["input_ids"][:, start:end], "attention_mask": whole["attention_mask"][:, :end]}
        given |= {"pixel_values": pixels[number]} if number in pixels else {}
        out = compiled(**given, past_key_values=cache)
        start, cache = end, out.past_key_values
        answers.append(out.logits[:, 0])
        parts.append((length, out.kept))
    return torch.stack(answers, 1), parts, cache


def beams(compiled: Any, given: Mapping[str, torch.Tensor], new: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """([B] what `new` tokens of the best of three beams are worth, the prompts with these tokens behind them)."""
    options = {"num_beams": 3, "do_sample": False, "max_new_tokens": new, "length_penalty": 0.0, "eos_token_id": None}
    out = compiled.generate(**given, **options, return_dict_in_generate=True, output_scores=True)
    mask = torch.nn.functional.pad(given["attention_mask"], (0, new), value=1)
    return out.sequences_scores, {**given, "input_ids": out.sequences, "attention_mask": mask}


def worth(logits: torch.Tensor, ids: torch.Tensor, new: int) -> torch.Tensor:
    """[B] the log-probability of the last `new` of `ids` [B, S] by the logits [B, S, vocabulary] of all."""
    said = logits[:, -new - 1 : -1].log_softmax(-1)
    return said.gather(2, ids[:, -new:, None]).sum((1, 2))


@contextlib.contextmanager
def masked(model: Any, masks: Sequence[torch.Tensor]) -> Iterator[None]:
    """Every decoder layer under a mask of its own, [B, S, S] bool."""

    def under(mask: torch.Tensor) -> Any:
        def narrow(_module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            logits = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
            return args, {**kwargs, "attention_mask": logits[:, None]}

        return narrow

    with contextlib.ExitStack() as stack:
        for layer, mask in zip(model.get_decoder().layers, masks, strict=True):
            stack.callback(layer.register_forward_pre_hook(under(mask), with_kwargs=True).remove)
        yield


def randomize(model: Any, seed: int) -> None:
    """Fills every weight: matrices keep the variance of their input, times a gain; norms stay near where they start."""
    generator = torch.Generator().manual_seed(seed)
    # Where the embedding is the output head too, larger logits would make float32 noise look like a difference.
    embedding = 0.15 if getattr(model.config, "tie_word_embeddings", False) else 0.5
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
            elif weight.ndim == 3 and "experts" in name:
                weight.copy_(1.3 * noise / weight.shape[-1] ** 0.5)  # one matrix an expert
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


def template(record: Family) -> str:
    """The chat template of the family's prompts."""
    return _TEMPLATE.replace("IMAGE", record.placeholder)


def _resolved(record: Family, value: Any, ids: Any) -> Any:
    """`value` with special tokens replaced by their ids and every text model's vocabulary set to the tokenizer's."""
    if isinstance(value, Mapping):
        made = {key: _resolved(record, item, ids) for key, item in value.items()}
        if "num_key_value_heads" in made:
            made.setdefault("vocab_size", len(ids))
        return made
    if isinstance(value, list):
        return [_resolved(record, item, ids) for item in value]
    return ids.convert_tokens_to_ids(value) if isinstance(value, str) and value in record.specials else value
