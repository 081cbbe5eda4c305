"""Trains the bundled model from scratch: LLaVA-1.5's architecture at 1/2500 of its size, on generated scenes.

    python examples/train_tiny_llava.py [--output DIRECTORY] [--device cuda] [--scale 0.01]

The result is an ordinary Hugging Face directory. Training goes through three stages, each with a step count of its own:

1. `see`: the vision tower alone learns to say at each patch which thing of which colour it lies on and where in the
   picture it lies, and at its CLS token what the picture holds.
2. `look up`: the vision tower rests; projector and decoder learn to find the answer among its features. Half-way
   through the decoder each thing's name in a question says where that thing lies, so that two places are at hand to be
   compared, and one layer further the end of a question says how far apart the two things are that it relates.
   Answers alone teach both slowly. Where things are is the last to be learned: half of the questions are about it.
3. `answer`: everything together.

The heads behind the losses on patches, names and the CLS token are dropped at the end. All follows from the seed and
the step numbers: a run that was killed goes on from its last checkpoint (`--state`), with the same batches. Scenes are
drawn as they are needed and never repeat; digits of the test split are never shown. Eight questions about a scene share
one pass over it.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import math
import os
import pathlib
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers.modeling_utils import AttentionInterface

from tvc.evaluation import scenes

HERE = pathlib.Path(__file__).parent
PATCH = 8
GRID = scenes.SIDE // PATCH
VISUAL = GRID * GRID
IGNORED = -100

# The place of a picture in the prompt is fixed, so that the tokens before a question are the same for all of them.
TEMPLATE = """\
{{ bos_token }}{% for message in messages %}{{ message['role'] | upper }}: \
{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}\
{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}\
{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %} {% endfor %}\
{% if add_generation_prompt %}ASSISTANT:{% endif %}"""
BEFORE = "<s>USER: "
BEHIND = "\n"


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of the training; `lr` is reached after the warm-up and falls along a cosine to `last` of it."""

    name: str
    steps: int
    lr: float
    last: float
    sees: bool  # the vision tower learns
    answers: bool  # projector and decoder learn


STAGES = (
    Stage("see", 2600, 2e-3, 0.3, sees=True, answers=False),
    Stage("look up", 400, 2e-3, 0.7, sees=False, answers=True),
    Stage("answer", 2600, 1.4e-3, 0.01, sees=True, answers=True),
)
ASKED = ("where", "relation", "count", "relation", "what", "where", "relation", "read", "colour")  # in turn
WARM_UP = 60
EXAMINED = 8  # batches of held-out questions


# The model


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text can be encoded, each word of the questions is one token, each digit too."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        min_frequency=1,
        special_tokens=["<pad>", "<s>", "</s>", "<image>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    wordings = [text for choices in scenes.WORDING.values() for text in choices]
    filled = [
        text.format(thing=thing, other=other, colour=colour)
        for text in wordings
        for thing, other, colour in itertools.product(scenes.THINGS, scenes.SHAPES, scenes.COLOURS)
    ]
    answers = [f" {word}" for word in (*scenes.THINGS, *scenes.COLOURS, *scenes.PLACES, "above", "below")]
    backend.train_from_iterator(["USER: ASSISTANT:", *filled, *answers], trainer)
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
        size={"shortest_edge": scenes.SIDE},
        crop_size={"height": scenes.SIDE, "width": scenes.SIDE},
        image_mean=[0.3] * 3,
        image_std=[0.3] * 3,
    )
    return transformers.LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def make_model(
    tokenizer: transformers.PreTrainedTokenizerFast, width: int, layers: tuple[int, int]
) -> transformers.LlavaForConditionalGeneration:
    """The untrained model; `layers` of the vision tower and of the decoder."""
    heads = width // 32
    config = transformers.LlavaConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": layers[0],
            "num_attention_heads": heads,
            "image_size": scenes.SIDE,
            "patch_size": PATCH,
            "projection_dim": width,
        },
        text_config={
            "model_type": "llama",
            "hidden_size": width,
            "intermediate_size": 5 * width // 2,
            "num_hidden_layers": layers[1],
            "num_attention_heads": heads,
            "num_key_value_heads": heads // 2,
            "max_position_embeddings": 2048,
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=VISUAL,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    return transformers.LlavaForConditionalGeneration(config)


Losses = dict[str, torch.Tensor]


class Learner(nn.Module):
    """The model and the heads of the losses that are dropped after the training."""

    def __init__(self, model: transformers.LlavaForConditionalGeneration, ids: TokenIds):
        super().__init__()
        width = model.config.text_config.hidden_size
        self.vlm = model
        self.patch_thing = nn.Linear(width, 1 + len(scenes.THINGS))
        self.patch_colour = nn.Linear(width, 2 + len(scenes.COLOURS))
        self.contents = nn.ModuleList(nn.Linear(width, contents_size()) for _ in range(2))
        self.patch_place = nn.Linear(width, 2)
        self.named_place = nn.Linear(width, 2)
        self.apart = nn.Linear(width, 2)
        steps = torch.linspace(-1, 1, GRID)
        self.register_buffer("places", torch.cartesian_prod(steps, steps), persistent=False)  # [V, 2] down, across
        self.register_buffer("before", torch.tensor(ids.before), persistent=False)
        self.register_buffer("behind", torch.tensor(ids.behind), persistent=False)

    def see(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Patch features [B, V, D] and the losses on them."""
        seen = self.vlm.model.vision_tower(batch.pixels, output_hidden_states=True)
        states = seen.hidden_states[self.vlm.config.vision_feature_layer]
        features = states[:, 1:]
        thing, colour = self.patch_thing(features), self.patch_colour(features)
        losses = {
            "thing": F.cross_entropy(thing.flatten(0, 1).float(), batch.patch_things.flatten()),
            "colour": F.cross_entropy(colour.flatten(0, 1).float(), batch.patch_colours.flatten()),
        }
        # The CLS token of the layer that the decoder reads, and the pooled one behind the last layer.
        for name, head, state in zip(("cls", "pooled"), self.contents, (states[:, 0], seen.pooler_output), strict=True):
            losses[name] = F.binary_cross_entropy_with_logits(head(state).float(), batch.contents)
        losses["place"] = F.mse_loss(self.patch_place(features).float(), self.places.expand(len(features), -1, -1))
        with torch.no_grad():
            on = batch.patch_things > 0
            losses["patch accuracy"] = (thing.argmax(-1) == batch.patch_things)[on].float().mean()
        return features, losses

    def answer(self, features: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, Losses]:
        """Logits [B, M, T - 1, vocabulary] for the texts behind the picture, their targets, and losses on questions."""
        B, M, T = batch.text.shape
        vlm, embed = self.vlm.model, self.vlm.get_input_embeddings()
        pieces = (embed(self.before), vlm.multi_modal_projector(features), embed(self.behind))
        prefix = torch.cat([piece.expand(B, -1, -1) for piece in pieces], 1)
        P = prefix.shape[1]
        embeddings = torch.cat([prefix, embed(batch.text).flatten(1, 2)], 1)
        places = torch.arange(P + T, device=prefix.device)
        places = torch.cat([places[:P], places[P:].repeat(M)])[None]
        out = vlm.language_model(
            inputs_embeds=embeddings,
            position_ids=places,
            attention_mask=torch.zeros(1, 1, 1, 1, device=prefix.device),  # not read: see `shared_prefix_attention`
            use_cache=False,
            output_hidden_states=True,
            shared_prefix=P,
            shared_length=T,
        )
        hidden = out.last_hidden_state[:, P:].unflatten(1, (M, T))
        middle = len(out.hidden_states) // 2 + 1
        losses = {}
        for name, head, layer, wanted in (
            ("named", self.named_place, middle, batch.named),
            ("apart", self.apart, middle + 1, batch.apart),
        ):
            told = head(out.hidden_states[min(layer, len(out.hidden_states) - 1)][:, P:].unflatten(1, (M, T))).float()
            known = ~wanted.isnan()
            losses[name] = F.mse_loss(told[known], wanted[known]) if known.any() else told.sum() * 0
        return self.vlm.lm_head(hidden[:, :, :-1]).float(), batch.targets[:, :, 1:], losses


def shared_prefix_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    shared_prefix: int | None = None,
    shared_length: int = 0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention [B, S, H, D] over a prefix that several texts of `shared_length` tokens share, blind to each other.

    Without `shared_prefix` every token sees every other. Written out, as this is twice as fast as the fused attention
    of a CPU in bfloat16.
    """
    groups = query.shape[1] // key.shape[1]
    query, key, value = query * scaling, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if shared_prefix is None:
        return _weighted(query @ key.transpose(2, 3), value).transpose(1, 2), None
    P, T = shared_prefix, shared_length
    first = _weighted(query[:, :, :P] @ key[:, :, :P].transpose(2, 3) + _causal(P, query), value[:, :, :P])
    texts = query[:, :, P:]
    own_query, own_key, own_value = (x[:, :, P:].unflatten(2, (-1, T)) for x in (query, key, value))
    to_prefix = texts @ key[:, :, :P].transpose(2, 3)
    to_own = (own_query @ own_key.transpose(3, 4) + _causal(T, query)).flatten(2, 3)
    weights = torch.cat([to_prefix, to_own], -1).softmax(-1)
    own = weights[..., P:].unflatten(2, (-1, T)) @ own_value
    behind = weights[..., :P] @ value[:, :, :P] + own.flatten(2, 3)
    return torch.cat([first, behind], 2).transpose(1, 2), None


def _weighted(scores: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return scores.softmax(-1) @ value


def _causal(length: int, like: torch.Tensor) -> torch.Tensor:
    return torch.full((length, length), -1e4, dtype=like.dtype, device=like.device).triu(1)


# The data


def contents_size() -> int:
    """What the picture holds: each thing in each colour, and the digits of the sign by place."""
    return len(scenes.THINGS) * len(scenes.COLOURS) + 20


@dataclasses.dataclass(frozen=True)
class TokenIds:
    """Tokens of the fixed text before and behind the picture, and of what may follow."""

    before: list[int]
    behind: list[int]
    tokenizer: Any

    @classmethod
    def of(cls, tokenizer: transformers.PreTrainedTokenizerFast) -> TokenIds:
        return cls(*(tokenizer.encode(text, add_special_tokens=False) for text in (BEFORE, BEHIND)), tokenizer)

    @functools.cache  # noqa: B019  one instance lives as long as the run
    def text(self, question: str, answer: str) -> tuple[list[int], int]:
        """Tokens of question and answer, and how many of them are the question's."""
        asked = self.tokenizer.encode(f"{question} ASSISTANT:", add_special_tokens=False)
        return asked + self.tokenizer.encode(f" {answer}</s>", add_special_tokens=False), len(asked)

    @functools.cache  # noqa: B019
    def name(self, thing: str) -> int:
        """The token of a thing's name in a question."""
        (token,) = self.tokenizer.encode(f" {thing}", add_special_tokens=False)
        return int(token)

    def __hash__(self) -> int:
        return id(self)


@dataclasses.dataclass(frozen=True)
class Batch:
    """B scenes with M questions each; texts are padded at their end to T tokens."""

    pixels: torch.Tensor  # [B, 3, SIDE, SIDE] float32
    patch_things: torch.Tensor  # [B, V] int64, 0 for none
    patch_colours: torch.Tensor  # [B, V] int64, 0 for none
    contents: torch.Tensor  # [B, contents_size()] float32
    text: torch.Tensor  # [B, M, T] int64
    targets: torch.Tensor  # [B, M, T] int64, IGNORED where no answer is
    named: torch.Tensor  # [B, M, T, 2] float32, down and across in -1..1 of what a token names; NaN where it names none
    apart: torch.Tensor  # [B, M, T, 2] float32, at a relation's last token: how far the first thing is from the second
    kinds: list[list[str]]

    def to(self, device: torch.device) -> Batch:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return Batch(**{k: v.to(device) if torch.is_tensor(v) else v for k, v in fields.items()})


class Batches(torch.utils.data.Dataset):
    """Batch number `index` of a split."""

    def __init__(
        self,
        ids: TokenIds,
        split: str,
        seed: int,
        scenes_each: int,
        questions_each: int,
        count: int,
        kinds: tuple[str, ...] = scenes.KINDS,
    ):
        """`count` batches; `kinds`: what is asked about a scene, in turn."""
        self.ids, self.split, self.seed = ids, split, seed
        self.scenes_each, self.questions_each = scenes_each, questions_each
        self.count, self.kinds = count, kinds

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Batch:
        first = index * self.scenes_each
        drawn = [scenes.scene(self.split, self.seed, first + place) for place in range(self.scenes_each)]
        asked = [
            list(itertools.islice(scenes.questions(one, self.seed, first + place, self.kinds), self.questions_each))
            for place, one in enumerate(drawn)
        ]
        texts = [[self.ids.text(question.text, question.answer) for question in row] for row in asked]
        T = max(len(tokens) for row in texts for tokens, _ in row)
        text = torch.zeros(len(drawn), self.questions_each, T, dtype=torch.int64)
        targets = torch.full_like(text, IGNORED)
        for b, row in enumerate(texts):
            for m, (tokens, question) in enumerate(row):
                text[b, m, : len(tokens)] = torch.tensor(tokens)
                targets[b, m, question : len(tokens)] = text[b, m, question : len(tokens)]
        named = torch.full((*text.shape, 2), torch.nan)
        for b, one in enumerate(drawn):
            for name, (x, y) in single(one).items():
                asks = (text[b] == self.ids.name(name)) & (targets[b] == IGNORED)
                named[b][asks] = torch.tensor([y, x]) / (scenes.SIDE / 2) - 1
        apart = torch.full((*text.shape, 2), torch.nan)
        for b, m in itertools.product(range(len(drawn)), range(self.questions_each)):
            if asked[b][m].kind == "relation":
                (x, y), (other_x, other_y) = map(middle_of, asked[b][m].boxes)
                apart[b, m, texts[b][m][1] - 1] = torch.tensor([y - other_y, x - other_x]) / (scenes.SIDE / 2)
        labels = [label(one) for one in drawn]
        pixels = torch.from_numpy(np.stack([one.pixels for one in drawn])).permute(0, 3, 1, 2)
        return Batch(
            pixels=(pixels / 255 - 0.3) / 0.3,
            patch_things=torch.from_numpy(np.stack([things for things, _, _ in labels])),
            patch_colours=torch.from_numpy(np.stack([colours for _, colours, _ in labels])),
            contents=torch.from_numpy(np.stack([contents for _, _, contents in labels])),
            text=text,
            targets=targets,
            named=named,
            apart=apart,
            kinds=[[question.kind for question in row] for row in asked],
        )


def middle_of(box: tuple[int, int, int, int]) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def single(drawn: scenes.Scene) -> dict[str, tuple[float, float]]:
    """Centres (across, down) of the things of which there is one."""
    names = [one.name for one in drawn.things]
    return {one.name: one.centre for one in drawn.things if names.count(one.name) == 1}


def label(drawn: scenes.Scene) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Things [V] and colours [V] at patches whose centre is in the middle of a thing, and the picture's contents."""
    things, colours = np.zeros((2, GRID, GRID), np.int64)
    contents = np.zeros(contents_size(), np.float32)
    names, tints = list(scenes.THINGS), list(scenes.COLOURS)

    def mark(box: tuple[float, float, float, float], thing: int, colour: int) -> None:
        left, top, right, bottom = box
        inset_x, inset_y = 0.14 * (right - left), 0.14 * (bottom - top)
        rows = slice(math.ceil((top + inset_y) / PATCH - 0.5), math.floor((bottom - inset_y) / PATCH - 0.5) + 1)
        columns = slice(math.ceil((left + inset_x) / PATCH - 0.5), math.floor((right - inset_x) / PATCH - 0.5) + 1)
        things[rows, columns], colours[rows, columns] = thing, colour

    for thing in drawn.things:
        name, tint = names.index(thing.name), tints.index(thing.colour)
        mark(thing.box, 1 + name, 1 + tint)
        contents[name * len(tints) + tint] = 1
    if drawn.sign is not None and drawn.sign_box is not None:
        left, top = drawn.sign_box[:2]
        for place, digit in enumerate(drawn.sign):
            start = left + 1 + 14 * place
            mark((start, top + 2, start + 14, top + 18), 1 + int(digit), 1 + len(tints))
            contents[len(names) * len(tints) + 10 * place + int(digit)] = 1
    return things.reshape(-1), colours.reshape(-1), contents


# The training


class Optimizers:
    """Muon for the matrices of the layers, AdamW for all else; Muon's rate is scaled to AdamW's."""

    def __init__(self, learner: Learner):
        matrices, others = [], []
        for name, weight in learner.named_parameters():
            inner = ".layers." in name and weight.ndim == 2
            (matrices if inner else others).append(weight)
        self.each = (
            torch.optim.Muon(matrices, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.02),
        )

    def step(self, lr: float) -> None:
        for optimizer in self.each:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, Any]]:
        return [optimizer.state_dict() for optimizer in self.each]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        for optimizer, state in zip(self.each, states, strict=True):
            optimizer.load_state_dict(state)


def scaled(stage: Stage, scale: float) -> Stage:
    """The stage with `scale` times as many steps."""
    return dataclasses.replace(stage, steps=max(1, round(stage.steps * scale)))


def rate(stage: Stage, step: int) -> float:
    """The learning rate at a step of a stage."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / stage.steps))
    return stage.lr * min(1, (step + 1) / WARM_UP) * (stage.last + (1 - stage.last) * cosine)


def losses_of(learner: Learner, stage: Stage, batch: Batch) -> dict[str, torch.Tensor]:
    """All losses of a stage, and their weighted `sum`."""
    with torch.set_grad_enabled(stage.sees):
        features, losses = learner.see(batch)
    # Contents are many zeros: their mean is small.
    total = losses["thing"] + 0.5 * losses["colour"] + 4 * losses["cls"] + 2 * losses["pooled"]
    total = total + 2 * losses["place"]
    if stage.answers:
        logits, targets, asked = learner.answer(features if stage.sees else features.detach(), batch)
        losses |= asked
        losses["answer"] = F.cross_entropy(logits.flatten(0, 2), targets.flatten(), ignore_index=IGNORED)
        told = losses["answer"] + losses["named"] + losses["apart"]
        total = told + 0.5 * total if stage.sees else told
    return {**losses, "sum": total}


@torch.no_grad()
def examine(learner: Learner, batches: list[Batch], autocast: Any) -> dict[str, float]:
    """The share of held-out questions that are answered exactly, by kind: every token is the likeliest one."""
    right: dict[str, list[bool]] = defaultdict(list)
    learner.eval()
    for batch in batches:
        with autocast():
            logits, targets, _ = learner.answer(learner.see(batch)[0], batch)
        exact = ((logits.argmax(-1) == targets) | (targets == IGNORED)).all(-1)
        for kinds, row in zip(batch.kinds, exact.tolist(), strict=True):
            for kind, correct in zip(kinds, row, strict=True):
                right[kind].append(correct)
    learner.train()
    each = {kind: sum(right[kind]) / len(right[kind]) for kind in scenes.KINDS if right[kind]}
    return {**each, "overall": sum(each.values()) / len(each)}


def train(options: argparse.Namespace) -> transformers.LlavaForConditionalGeneration:
    """Runs the stages, or what is left of them."""
    torch.manual_seed(options.seed)
    device = torch.device(options.device)
    tokenizer = make_tokenizer()
    ids = TokenIds.of(tokenizer)
    learner = Learner(make_model(tokenizer, options.width, tuple(options.layers)), ids).to(device).train()
    AttentionInterface.register("shared_prefix", shared_prefix_attention)
    learner.vlm.set_attn_implementation("shared_prefix")
    optimizers = Optimizers(learner)
    stages = [scaled(stage, options.scale) for stage in STAGES]
    total = sum(stage.steps for stage in stages)
    done, spent = _restore(options.state, learner, optimizers)

    def autocast() -> Any:
        return torch.autocast(device.type, dtype=torch.bfloat16)

    def batches(split: str, count: int, kinds: tuple[str, ...]) -> Batches:
        return Batches(ids, split, options.seed, options.batch, options.questions, count, kinds)

    held_out = batches("test", EXAMINED, scenes.KINDS)
    tests = [held_out[index].to(device) for index in range(len(held_out))]
    data = batches("train", total, ASKED)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.Subset(data, range(done, total)), batch_size=None, num_workers=options.workers
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    since = time.perf_counter() - spent
    with Progress(*columns) as progress:
        bar = progress.add_task("", total=total, completed=done)
        for number, (batch, (stage, step)) in enumerate(
            zip(loader, itertools.islice(_steps(stages), done, None), strict=True), start=done + 1
        ):
            with autocast():
                losses = losses_of(learner, stage, batch.to(device))
            losses["sum"].backward()
            torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
            optimizers.step(rate(stage, step))
            last = number == total
            if number % options.log_every and not last:
                continue
            row: dict[str, Any] = {"stage": stage.name, "step": number, "scenes": number * options.batch}
            row["seconds"] = round(time.perf_counter() - since, 1)
            row |= {name: round(value.item(), 4) for name, value in losses.items()}
            if stage.answers and (number % (10 * options.log_every) == 0 or last):
                row["accuracy"] = {kind: round(share, 4) for kind, share in examine(learner, tests, autocast).items()}
            _log(options.state, row)
            shown = f"{row['accuracy']['overall']:.1%}" if "accuracy" in row else ""
            progress.update(bar, completed=number, description=f"{stage.name} {losses['sum']:.3f} {shown}")
            if number % (5 * options.log_every) == 0 or last:
                _checkpoint(options.state, learner, optimizers, number, row["seconds"])
    return learner.vlm


def _steps(stages: list[Stage]) -> Iterator[tuple[Stage, int]]:
    for stage in stages:
        for step in range(stage.steps):
            yield stage, step


def _checkpoint(folder: pathlib.Path, learner: Learner, optimizers: Optimizers, done: int, seconds: float) -> None:
    """Written beside its place and moved there, so that a killed run leaves the one before."""
    state = {"learner": learner.state_dict(), "optimizers": optimizers.state_dict(), "done": done, "seconds": seconds}
    torch.save(state, folder / "checkpoint.new")
    os.replace(folder / "checkpoint.new", folder / "checkpoint.pt")


def _restore(folder: pathlib.Path, learner: Learner, optimizers: Optimizers) -> tuple[int, float]:
    """How many steps are done, and the seconds that they took; the log is cut back to them."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "checkpoint.pt").is_file():
        (folder / "log.jsonl").unlink(missing_ok=True)
        return 0, 0.0
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    learner.load_state_dict(state["learner"])
    optimizers.load_state_dict(state["optimizers"])
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if json.loads(line)["step"] <= state["done"]]
    (folder / "log.jsonl").write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    return state["done"], state["seconds"]


def _log(folder: pathlib.Path, row: dict[str, Any]) -> None:
    with (folder / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def save(model: transformers.LlavaForConditionalGeneration, folder: pathlib.Path) -> None:
    """Writes the model in float16, its tokenizer, processor and chat template."""
    model.set_attn_implementation("sdpa")
    model.half().save_pretrained(folder)
    make_processor(make_tokenizer()).save_pretrained(folder)
    weights = sum(weight.numel() for weight in model.parameters())
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder}: {weights / 1e6:.2f} M weights, {size / 1e6:.1f} MB")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=pathlib.Path, default=HERE / "models" / "tiny-llava")
    parser.add_argument("--state", type=pathlib.Path, default=HERE.parent / "out" / "train", help="checkpoint and log")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, nargs=2, default=(6, 6), help="of the vision tower and of the decoder")
    parser.add_argument("--batch", type=int, default=32, help="scenes in a step")
    parser.add_argument("--questions", type=int, default=8, help="questions about each scene")
    parser.add_argument("--scale", type=float, default=1.0, help="times the steps of each stage")
    parser.add_argument("--workers", type=int, default=0, help="processes that draw scenes; 8 keep up with a GPU")
    parser.add_argument("--log-every", type=int, default=20, help="steps between two lines of the log")
    return parser


def main() -> None:
    options = parser().parse_args()
    save(train(options), options.output)


if __name__ == "__main__":
    main()
