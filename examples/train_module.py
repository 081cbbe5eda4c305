"""Trains modules that policies have at the decoder's entry for the bundled model, their teacher, which stays as it is.

    python examples/train_module.py POLICY... [--steps N] [--lessons N] [--size NAME=N] [--output DIRECTORY]

The policy's own primitives run with weights that learn: what the model says of the tokens that they leave is to be what
it says of all of them. Two things are compared behind the picture, at a question and its right answer: the distribution
of the answer's tokens, and the states behind every decoder layer, as answers alone teach a frozen decoder's lookups
slowly. In each step the policy has another budget, one of those that it names, or any share of the tokens where it
names none, so that one file serves all. A score learns besides what the question attends to in the fourth of the six
decoder layers, and a head that says how many tokens stay, whether the answer was the same with as many.

Questions are those of the `train` split, which no evaluation asks. All follows from the seed and the step's number: a
run that was killed goes on from its last checkpoint (`--state`). A minute or two on one core for each policy whose
tokens do not depend on the question. Those in `examples/policies` were made by

    python examples/train_module.py benchmarks/policies/{tokenflex,pixel-shuffle}-trained.yaml --steps 200
    python examples/train_module.py benchmarks/policies/{flash-latents,b-vllm-sampler,mqt}-trained.yaml
    python examples/train_module.py benchmarks/policies/reread-trained.yaml --steps 1600 --lessons 300

and what a policy does to answers is told by

    tvc eval examples/models/tiny-llava --policy benchmarks/policies/tokenflex-trained.yaml -o out/tokenflex
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import os
import pathlib
import random
import time
from collections.abc import Mapping
from typing import Any, ClassVar

import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from torch.overrides import TorchFunctionMode

from tvc import api
from tvc.errors import ArgumentError
from tvc.evaluation import scenes
from tvc.kernels.merge_grid_mlp import GridMlp
from tvc.kernels.merge_pixel_shuffle import PixelShuffle
from tvc.kernels.merge_queries import Queries, enlarged, sines
from tvc.kernels.op import OPS, Scope
from tvc.kernels.score_query_attention import Grouped, QueryAttention
from tvc.kernels.select_predicted import Predicted
from tvc.kernels.weights import Trained, Weights
from tvc.policy import Policy, load_policy, resolve
from tvc.policy.schema import Step
from tvc.policy.weights import trained
from tvc.report.budget import settings_at
from tvc.runtime.prompts import chat

HERE = pathlib.Path(__file__).parent
MODEL = HERE / "models" / "tiny-llava"
SCENES, QUESTIONS = 8, 4  # of a step
RATE, WARM_UP, EVERY = 3e-3, 20, 10
SHARES = (50, 500)  # permille of the tokens, where the policy names no budgets
TEACHER = 3  # the decoder layer whose attention a score learns
SHARPER = math.sqrt(3)  # makes a query that looks at a place see little beyond its neighbours
EVENLY = (0.7548776662466927, 0.5698402909980532)  # powers of the plastic number: multiples fill a square evenly
CAUTION = 4.0  # how many times more a wrong answer moves a head than a right one
SIZES = {"queries": 81, "latents": 72, "channels": 256}  # that a file decides; any other is the width of the tokens

Tensors = dict[str, torch.Tensor]


class References(TorchFunctionMode):
    """Runs the references of ops, through which gradients flow, in the place of the ops."""

    by_overload: ClassVar[dict[Any, Any]] = {op.overload: op.reference for op in OPS.values()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = self.by_overload.get(func, func)
        if found is func:
            return func(*args, **(kwargs or {}))
        with self:
            return found(*args, **(kwargs or {}))


class Learned(Weights):
    """Weights that are being learned, in the place of a file."""

    def __init__(self, learned: Mapping[str, torch.Tensor]):
        super().__init__("learned.safetensors")
        self.learned = learned

    def tensors(self, prefix: str = "") -> Tensors:
        return {n.removeprefix(prefix): value for n, value in self.learned.items() if n.startswith(prefix)}


# The data


@dataclasses.dataclass(frozen=True)
class Batch:
    """B scenes with M questions each; texts begin behind the picture and are padded at their end."""

    pixels: torch.Tensor  # [B, 3, height, width] float32
    before: torch.Tensor  # [P] int64 tokens in front of every picture
    text: torch.Tensor  # [B, M, T] int64
    asked: torch.Tensor  # [B, M, T] bool: the question
    told: torch.Tensor  # [B, M, T] bool: what tokens of the answer are predicted from
    real: torch.Tensor  # [B, M, T] bool: no pads


def batch_of(processor: Any, seed: int, number: int, count: int = SCENES, each: int = QUESTIONS) -> Batch:
    """Batch `number` of the train split."""
    drawn = [scenes.scene("train", seed, index) for index in range(number * count, (number + 1) * count)]
    encode = processor.tokenizer.encode
    rows: list[tuple[list[int], int]] = []
    for place, scene in enumerate(drawn):
        for question in itertools.islice(scenes.questions(scene, seed, number * count + place), each):
            before, behind = chat(processor, question.text).split(processor.image_token)
            asked = encode(behind, add_special_tokens=False)
            rows.append((asked + encode(f" {question.answer}</s>", add_special_tokens=False), len(asked)))
    T = max(len(tokens) for tokens, _ in rows)
    text = torch.tensor([tokens + [0] * (T - len(tokens)) for tokens, _ in rows]).reshape(count, each, T)
    lengths = torch.tensor([len(tokens) for tokens, _ in rows]).reshape(count, each, 1)
    begins = torch.tensor([asked for _, asked in rows]).reshape(count, each, 1)
    column = torch.arange(T)
    pixels = processor.image_processor(images=[scene.image for scene in drawn], return_tensors="pt")["pixel_values"]
    told = (column >= begins - 1) & (column < lengths - 1)
    return Batch(
        pixels, torch.tensor(encode(before, add_special_tokens=False)), text, column < begins, told, column < lengths
    )


# The model


@dataclasses.dataclass(frozen=True)
class Said:
    """What the decoder makes of the texts."""

    logits: torch.Tensor  # [B, M, T, vocabulary]
    states: torch.Tensor  # [L, B, M, T, D] behind each layer
    shares: torch.Tensor  # [B, M, V] of what the question attends to; without `looks` empty


def said(
    model: Any, batch: Batch, visual: torch.Tensor, chosen: torch.Tensor, places: int, looks: bool = False
) -> Said:
    """Runs the decoder on each picture once, and on the texts behind it.

    Args:
        visual: [B, K, D] or, where each question has its own, [B M, K, D].
        chosen: like it without D, int64: where the tokens stand among the `places` of a picture.
        looks: whether to tell what questions attend to.
    """
    B, M, T = batch.text.shape
    decoder, embed = model.get_decoder(), model.get_input_embeddings()
    front, rows = len(batch.before), len(visual)
    before = embed(batch.before).expand(rows, -1, -1)
    positions = torch.cat([torch.arange(front).expand(rows, -1), front + chosen], 1)
    cache = transformers.DynamicCache(config=decoder.config)
    decoder(
        inputs_embeds=torch.cat([before, visual], 1),
        position_ids=positions,
        attention_mask=causal(positions, positions),
        past_key_values=cache,
    )
    if rows == B:
        cache.batch_repeat_interleave(M)
        positions = positions.repeat_interleave(M, 0)
    behind = (front + places + torch.arange(T)).expand(B * M, -1)
    out = decoder(
        inputs_embeds=embed(batch.text.flatten(0, 1)),
        position_ids=behind,
        attention_mask=causal(behind, torch.cat([positions, behind], 1)),
        past_key_values=cache,
        output_hidden_states=True,
        output_attentions=looks,
    )
    states = torch.stack(out.hidden_states[1:]).unflatten(1, (B, M))
    shares = torch.empty(0)
    if looks:
        paid = out.attentions[TEACHER].mean(1)[:, :, front : front + visual.shape[1]].unflatten(0, (B, M))
        paid = torch.einsum("bmtv,bmt->bmv", paid, batch.asked.float())
        shares = paid / paid.sum(2, keepdim=True)
    return Said(model.lm_head(states[-1]), states, shares)


def causal(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """[B, 1, Q, K] float32, for positions [B, Q] and [B, K]: what no token may see is the lowest number."""
    later = key[:, None, None, :] > query[:, None, :, None]
    return torch.zeros(later.shape).masked_fill(later, torch.finfo(torch.float32).min)


# The module


def entry(policy: Policy, layout: Any) -> Step:
    """The policy's one step.

    Raises:
        ArgumentError: there are others, or it acts elsewhere than at the decoder's entry.
    """
    steps = resolve(policy, layout).steps
    if [step.at for step in steps] == ["language.0"] and list(trained(steps)):
        return steps[0]
    raise ArgumentError(
        "this script cannot train the modules of the policy",
        where=policy.name,
        got=", ".join(step.at for step in steps) or "no steps",
        want="one step at language.0 that names weights",
        fix="train its modules by a script of their own, as examples/train_exit_router.py does",
        slug="cannot-train",
    )


def started(model: Any, step: Step, feature: torch.Tensor, sizes: Mapping[str, int]) -> Tensors:
    """Weights as they are before the training, for visual tokens [N, V, D] as they enter the decoder.

    Norms start at 1, biases at 0, square matrices as what changes nothing but lengths, which become those of the tokens
    where a module ends; what is known better as `known` says, all else at random.
    """
    width, made = feature.shape[2], {}
    for _, primitive in trained((step,)):
        own: Tensors = {}
        for name, shape in primitive.shapes(width).items():
            full = [size if isinstance(size, int) else sizes.get(size, width) for size in shape]
            if len(full) == 1:
                own[name] = torch.zeros(full) if name.endswith("bias") else torch.ones(full)
            elif full == [width, width] and name.endswith("weight"):
                own[name] = torch.eye(width) * (feature.square().mean().sqrt() if name.startswith("project") else 1)
            else:
                own[name] = torch.randn(full) / math.sqrt(full[-1])
        front = f"{primitive.prefix}." if primitive.prefix else ""
        made |= {f"{front}{name}": value for name, value in {**own, **known(model, primitive, feature, own)}.items()}
    return made


def known(model: Any, primitive: Trained, feature: torch.Tensor, own: Tensors) -> Tensors:
    """Better starts: queries that look about places all over the picture, an open gate, the decoder's own heads."""
    mean = feature.mean((0, 1))
    if isinstance(primitive, Queries):
        table = sines(math.isqrt(len(own["queries"])), len(mean))
        turn = torch.linalg.qr(torch.randn(len(mean), len(mean)))[0]  # every head sees rows and columns
        return {
            "queries": spread(enlarged(table, primitive.columns or 1), len(table)) - table,
            "attention.in_proj_weight": torch.cat([SHARPER * turn, SHARPER * turn, turn]),
            "attention.out_proj.weight": turn.T.clone(),
        }
    if isinstance(primitive, GridMlp):  # silu(1.278) is 1
        return {"gate.weight": 1.278 * (mean / mean.square().sum()).repeat(len(own["gate.weight"]), 1)}
    if isinstance(primitive, PixelShuffle):  # gelu(x) - gelu(-x) is x: the mean of a block, as long as its tokens
        part = torch.eye(len(mean)).repeat(1, primitive.side**2) / primitive.side**2
        both = torch.cat([part, -part])
        length = feature.square().mean().sqrt()
        return {"first.weight": both, "second.weight": both[:, : len(mean)].T * primitive.side**2 * length}
    if isinstance(primitive, Grouped):
        attention = model.get_decoder().layers[0].self_attn
        names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
        theirs = {f"{n}.weight": getattr(attention, part).weight.detach().clone() for n, part in names.items()}
        return {n: value for n, value in theirs.items() if n in own and own[n].shape == value.shape}
    return {}


def spread(table: torch.Tensor, number: int) -> torch.Tensor:
    """[number, D] rows of a square grid's table [P, D], the first few of them spread as evenly as all of them."""
    columns = math.isqrt(len(table))
    steps = torch.arange(number, dtype=torch.float64)[:, None] * torch.tensor(EVENLY, dtype=torch.float64)
    down, across = ((steps + 0.5).frac() * columns).long().T
    return table[down * columns + across]


def learning(step: Step, weights: Mapping[str, torch.Tensor]) -> Step:
    """The step with weights that learn, and nothing folded away."""

    def own(primitive: Any) -> Any:
        if not isinstance(primitive, Trained):
            return primitive
        unfolded = {"fold": False} if "fold" in type(primitive).model_fields else {}
        return primitive.model_copy(update={"weights": Learned(weights), **unfolded})

    scores = tuple(dataclasses.replace(term, primitive=own(term.primitive)) for term in step.score)
    return dataclasses.replace(step, score=scores, select=own(step.select), rest=own(step.rest), merge=own(step.merge))


@dataclasses.dataclass(frozen=True)
class Left:
    """What a step leaves of the visual tokens of R prompts, and what its modules said of them."""

    chosen: torch.Tensor  # [R, K] int64
    visual: torch.Tensor  # [R, K, D]
    score: torch.Tensor | None  # [R, V]
    part: torch.Tensor | None  # [R] of the tokens, that a head says


def carried_out(step: Step, feature: torch.Tensor, text: torch.Tensor, asked: torch.Tensor, part: float) -> Left:
    """The step on visual tokens [R, V, D] with texts [R, T, D], of which `asked` [R, T] bool is the question.

    Where a head says how many tokens stay, it is told, but `part` of them stays.
    """
    R, V, _ = feature.shape
    numbers = torch.arange(V).expand(R, -1)
    scope = Scope(torch.zeros_like(numbers), torch.full((R, 1), V), 1)
    values = {"feature": feature, "ordinal": numbers, "text": (text, asked)}

    def taps(primitive: Any) -> dict[str, Any]:
        return {n: tap.tensors() if tap.tensors else values[tap.kind] for n, tap in primitive.taps().items()}

    size, score, told, select = torch.ones(R, V), None, None, step.select
    with References():
        if step.merge is not None:
            chosen, visual, _ = step.merge.apply(feature, size, scope, **taps(step.merge))
            return Left(chosen, visual, None, None)
        if step.score:
            score = step.score[0].primitive.apply(**taps(step.score[0].primitive))
        if isinstance(select, Predicted):
            told = select.part(score, scope, **taps(select)).squeeze(1)
            select = select.model_copy(update={"least": part, "most": part})
        chosen = select.apply(score, scope, **taps(select))
        made = step.rest.apply(feature, size, chosen, score, scope, **taps(step.rest))
    if made is None:
        return Left(chosen, feature.gather(1, chosen[:, :, None].expand(-1, -1, feature.shape[2])), score, told)
    return Left(made[0], made[1], score, told)


# The training


@dataclasses.dataclass(frozen=True)
class Lesson:
    """What the untouched model makes of a batch."""

    batch: Batch
    feature: torch.Tensor  # [B, V, D] visual tokens as they enter the decoder
    text: torch.Tensor  # [B M, T, D] texts as they enter it
    answer: torch.Tensor  # [N, vocabulary] logarithms of what it expects where an answer's token comes next
    states: torch.Tensor  # [L, n, D] text behind each layer, without pads
    shares: torch.Tensor  # [B M, V] of what the question attends to


@torch.no_grad()
def lessons(model: Any, processor: Any, seed: int, count: int) -> list[Lesson]:
    model.set_attn_implementation("eager")  # the other one tells no attention
    made = []
    for number in range(count):
        batch = batch_of(processor, seed, number)
        feature = torch.stack(list(model.get_image_features(pixel_values=batch.pixels).pooler_output))
        B, V, _ = feature.shape
        taught = said(model, batch, feature, torch.arange(V).expand(B, -1), V, True)
        text = model.get_input_embeddings()(batch.text.flatten(0, 1))
        answer = taught.logits[batch.told].log_softmax(1)
        made.append(Lesson(batch, feature, text, answer, taught.states[:, batch.real], taught.shares.flatten(0, 1)))
    model.set_attn_implementation("sdpa")
    return made


def losses_of(model: Any, lesson: Lesson, step: Step, part: float) -> dict[str, torch.Tensor]:
    """What is to become small, by name."""
    batch, feature = lesson.batch, lesson.feature
    if step.score:  # what is left depends on the question
        feature = feature.repeat_interleave(batch.text.shape[1], 0)
    rows = len(feature)
    left = carried_out(step, feature, lesson.text[:rows], batch.asked.flatten(0, 1)[:rows], part)
    losses = {}
    if left.score is not None:
        logits = left.score.log() if isinstance(step.score[0].primitive, QueryAttention) else left.score
        losses["score"] = F.cross_entropy(logits, lesson.shares)
    makes = step.merge is not None or isinstance(step.rest, Trained)  # tokens that were not there before
    if not makes and left.part is None:
        return losses
    learned = said(model, batch, left.visual, left.chosen, feature.shape[1], False)
    answer = learned.logits[batch.told].log_softmax(1)
    if makes:
        losses["answer"] = F.kl_div(answer, lesson.answer, log_target=True, reduction="batchmean")
        apart = (learned.states[:, batch.real] - lesson.states).square().sum(2)
        losses["states"] = (apart / lesson.states.square().sum(2)).mean()
    if left.part is not None:
        same = torch.ones_like(batch.told).masked_scatter(batch.told, answer.argmax(1) == lesson.answer.argmax(1))
        right = same.all(2).flatten()
        losses["part"] = torch.where(right, (left.part - part).relu(), CAUTION * (part - left.part).relu()).mean()
    return losses


def train(model: Any, taught: list[Lesson], policy: Policy, options: argparse.Namespace) -> Tensors:
    """Runs the training, or what is left of it; the weights in float16."""
    torch.manual_seed(options.seed)
    layout = api.layout_of(MODEL)
    feature = torch.cat([lesson.feature for lesson in taught])
    start = started(model, entry(policy, layout), feature, {**SIZES, **dict(options.size)})
    weights = {name: torch.nn.Parameter(value) for name, value in start.items()}
    optimizer = torch.optim.AdamW(weights.values(), RATE, weight_decay=0.01)
    options.state.mkdir(parents=True, exist_ok=True)
    checkpoint = options.state / f"{policy.name}.pt"
    done, spent = restored(checkpoint, weights, optimizer)
    since = time.perf_counter() - spent
    for number in range(done, options.steps):
        draw = random.Random(f"{options.seed} {number}")
        share, part = budget(policy, draw), draw.uniform(*(permille / 1000 for permille in SHARES))
        step = learning(entry(policy.with_settings(settings_at(policy, layout, share)), layout), weights)
        losses = losses_of(model, taught[number % len(taught)], step, part)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        for group in optimizer.param_groups:
            falling = (1.02 + math.cos(math.pi * number / options.steps)) / 2
            group["lr"] = RATE * min(1, (number + 1) / WARM_UP) * falling
        optimizer.step()
        if (number + 1) % EVERY == 0 or number + 1 == options.steps:
            told = ", ".join(f"{name} {value.item():.3f}" for name, value in losses.items())
            seconds = time.perf_counter() - since
            print(f"{policy.name}: step {number + 1} at {share}: {told}; {seconds:.0f} s", flush=True)
            save(checkpoint, weights, optimizer, number + 1, seconds)
    return {name: value.detach().half().contiguous() for name, value in weights.items()}


def budget(policy: Policy, draw: random.Random) -> str:
    """One of the shares that the policy names, else any between SHARES, small ones as often as large ones."""
    if policy.budgets:
        return draw.choice(list(policy.budgets))
    permille = round(math.exp(draw.uniform(*map(math.log, SHARES))))
    return f"{permille / 10:g}%"


def save(file: pathlib.Path, weights: Tensors, optimizer: torch.optim.Optimizer, done: int, seconds: float) -> None:
    """Written beside its place and moved there, so that a killed run leaves the one before."""
    beside = file.with_suffix(".new")
    torch.save({"weights": weights, "optimizer": optimizer.state_dict(), "done": done, "seconds": seconds}, beside)
    os.replace(beside, file)


def restored(file: pathlib.Path, weights: Tensors, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    """How many steps are done, and the seconds that they took."""
    if not file.is_file():
        return 0, 0.0
    state = torch.load(file, weights_only=True)
    with torch.no_grad():
        for name, value in state["weights"].items():
            weights[name].copy_(value)
    optimizer.load_state_dict(state["optimizer"])
    return state["done"], state["seconds"]


def sized(text: str) -> tuple[str, int]:
    name, number = text.split("=")
    return name, int(number)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("policies", nargs="+", help="policy files with one step, at language.0, that names weights")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--lessons", type=int, default=60, help=f"batches of {SCENES} scenes, asked in turn")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--size", type=sized, action="append", default=[], help="NAME=N, where the weights decide it")
    parser.add_argument("--output", type=pathlib.Path, help="a folder for the weights; default: as the policies say")
    parser.add_argument("--state", type=pathlib.Path, default=HERE.parent / "out" / "modules", help="checkpoints")
    return parser


def main() -> None:
    options = parser().parse_args()
    layout = api.layout_of(MODEL)
    policies = [load_policy(name) for name in options.policies]
    files = [next(primitive.weights.path for _, primitive in trained((entry(one, layout),))) for one in policies]
    model = transformers.AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32)
    model.eval().requires_grad_(False)
    processor = transformers.AutoProcessor.from_pretrained(MODEL)
    taught = lessons(model, processor, options.seed, min(options.lessons, options.steps))
    for policy, file in zip(policies, files, strict=True):
        made = (options.output or file.parent) / file.name
        safetensors.torch.save_file(train(model, taught, policy, options), made)
        print(f"{made}: {made.stat().st_size / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    main()
