"""Trains the routers that decide after which decoder layer the bundled model needs its visual tokens no longer.

    python examples/train_exit_router.py [--examples N] [--epochs N] [--caution X] [--output FILE]

After DyVTE, arXiv 2411.19628: in front of each layer a small network looks at the text behind the image (the mean of
its tokens, and the last) and says whether all visual tokens may leave there. What it learns is whether the model,
without them from that layer on, still gives the answer that it gives with them. Questions are those of the `train`
split, which no evaluation asks. A few minutes on one core; `examples/policies/exit-router.yaml` uses what comes out:

    tvc eval examples/models/tiny-llava --policy examples/policies/exit-router.yaml --budgets as-written -o out/exits
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import time
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from tvc.evaluation import scenes
from tvc.runtime.prompts import chat, special_tokens

HERE = pathlib.Path(__file__).parent
MODEL = HERE / "models" / "tiny-llava"
WEIGHTS = HERE / "policies" / "exit-router.safetensors"
BATCH, HIDDEN, RATE = 50, 64, 1e-3
LAYERS = (2, 3, 4, 5)  # in front of which the visual tokens may leave


class Router(nn.Module):
    """The network of `when: {router: ...}`, its parameters named as the policy wants them."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.hidden = nn.Linear(2 * width, hidden, bias=False)
        self.route = nn.Linear(hidden, 2, bias=False)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[N, 2] logits for staying and for leaving, from the mean and the last state of the text [N, 2 D]."""
        logits: torch.Tensor = self.route(F.gelu(self.hidden(states)))
        return logits


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Questions with their right answers behind them, padded on the left."""

    inputs: dict[str, Any]
    text: torch.Tensor  # [B, T] int64 columns of everything but the visual tokens
    asked: torch.Tensor  # [B, S] bool: the text behind the image, up to where the answer begins
    told: torch.Tensor  # [B, T] bool: of `text`, what the tokens of the answer are predicted from


def prompts(model: Any, processor: Any, split: str, seed: int, indices: range) -> Prompts:
    drawn = [scenes.example(split, seed, index) for index in indices]
    questions = [chat(processor, question.text) for _, question in drawn]
    texts = [f"{asked} {question.answer}</s>" for asked, (_, question) in zip(questions, drawn, strict=True)]
    options = special_tokens(processor, texts[0])
    images = [[scene.image] for scene, _ in drawn]
    inputs = dict(
        processor(images=images, text=texts, padding=True, padding_side="left", return_tensors="pt", **options)
    )
    ids, column = inputs["input_ids"], torch.arange(inputs["input_ids"].shape[1])
    answers = [f" {question.answer}</s>" for _, question in drawn]
    lengths = [len(processor.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in answers]
    begins = len(column) - torch.tensor(lengths)[:, None]  # [B, 1] column of the answer's first token
    seen = ids == model.config.image_token_index
    last = seen.nonzero()[:, 1].reshape(len(ids), -1)[:, -1:]
    text = (~seen).nonzero()[:, 1].reshape(len(ids), -1)
    told = (text >= begins - 1) & (text < len(column) - 1)
    return Prompts(inputs, text, (column > last) & (column < begins), told)


@torch.no_grad()
def lessons(
    model: Any, processor: Any, split: str, seed: int, count: int
) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """For each layer the states [N, 2 D] that its router sees, and [N] whether leaving there keeps the answer."""
    made: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {layer: [] for layer in LAYERS}
    for first in range(0, count, BATCH):
        one = prompts(model, processor, split, seed, range(first, min(first + BATCH, count)))
        out = model(**one.inputs, output_hidden_states=True)
        answer = out.logits.argmax(-1).gather(1, one.text)
        last = one.asked.float().cumsum(1).argmax(1)
        before_last = one.asked.float().scatter(1, last[:, None], 0.0)
        for layer in LAYERS:
            hidden = out.hidden_states[layer]
            mean = torch.einsum("bsd,bs->bd", hidden, before_last) / before_last.sum(1, keepdim=True)
            same = without_image(model, one, hidden, layer).argmax(-1) == answer
            states = torch.cat([mean, hidden[torch.arange(len(hidden)), last]], 1)
            made[layer].append((states, (same | ~one.told).all(1)))
    return {layer: tuple(map(torch.cat, zip(*parts, strict=True))) for layer, parts in made.items()}  # type: ignore[misc]


def without_image(model: Any, one: Prompts, hidden: torch.Tensor, layer: int) -> torch.Tensor:
    """[B, T, vocabulary] what the decoder says at the text's places, run from `layer` on with the text alone."""
    decoder, mask = model.get_decoder(), one.inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0).gather(1, one.text)
    rows = hidden.gather(1, one.text[:, :, None].expand(-1, -1, hidden.shape[2]))
    real, length = mask.gather(1, one.text).bool(), one.text.shape[1]
    allowed = torch.ones(length, length, dtype=torch.bool).tril() & real[:, None, :]
    allowed |= torch.eye(length, dtype=torch.bool)  # a pad sees itself, so that no row is empty
    embeddings = decoder.rotary_emb(rows, positions)
    for block in decoder.layers[layer:]:
        rows = block(rows, attention_mask=allowed[:, None], position_embeddings=embeddings, position_ids=positions)
    logits: torch.Tensor = model.lm_head(decoder.norm(rows))
    return logits


def train(router: Router, states: torch.Tensor, leaves: torch.Tensor, epochs: int, caution: float) -> None:
    """Learns `leaves`; a sample that has to stay counts `caution` times, as leaving too early costs an answer."""
    optimizer = torch.optim.AdamW(router.parameters(), RATE, weight_decay=0.01)
    weight = torch.tensor([caution, 1.0])
    for _ in range(epochs):
        for rows in torch.randperm(len(states)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(router(states[rows]), leaves[rows].long(), weight).backward()
            optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--examples", type=int, default=6000)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--caution", type=float, default=4.0)
    parser.add_argument("--output", type=pathlib.Path, default=WEIGHTS)
    options = parser.parse_args()
    torch.manual_seed(0)
    started = time.perf_counter()
    model = transformers.AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32).eval()
    processor = transformers.AutoProcessor.from_pretrained(MODEL)
    taught = lessons(model, processor, "train", 1, options.examples)
    print(f"{options.examples} lessons after {time.perf_counter() - started:.0f} s", flush=True)
    tested = lessons(model, processor, "train", 2, max(1, options.examples // 10))
    tensors = {}
    for layer in LAYERS:
        router = Router(model.config.text_config.hidden_size, HIDDEN)
        train(router, *taught[layer], options.epochs, options.caution)
        states, right = tested[layer]
        with torch.no_grad():
            leaves = router(states).argmax(1) == 1
        wrong = float((leaves & ~right).float().mean())
        print(f"layer {layer}: {leaves.float().mean():.1%} leave of {right.float().mean():.1%}, {wrong:.1%} too early")
        tensors |= {f"language.{layer}.{name}": value.detach() for name, value in router.state_dict().items()}
    safetensors.torch.save_file({name: value.contiguous() for name, value in tensors.items()}, options.output)
    print(f"{options.output} after {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
