"""Trains a small network that rates visual tokens in front of the decoder, for the bundled model.

    python examples/train_scorer.py [--examples N] [--epochs N] [--output FILE]

The model is its own teacher (as in the first stage of CoViPAL, arXiv 2508.17243): the scorer, which sees a visual token
as it enters the decoder and the mean of the question's tokens, learns what the question attends to in the fourth of the
six decoder layers. Questions are those of the `train` split, which no evaluation asks. A few minutes on one core;
`examples/policies/scorer.yaml` uses what comes out:

    tvc eval examples/models/tiny-llava --policy examples/policies/scorer.yaml --policy fastv -o out/scorer
"""

from __future__ import annotations

import argparse
import pathlib
import time
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from tvc.evaluation import scenes
from tvc.runtime.prompts import prepared_batch

HERE = pathlib.Path(__file__).parent
MODEL = HERE / "models" / "tiny-llava"
WEIGHTS = HERE / "policies" / "scorer.safetensors"
BATCH, HIDDEN, RATE = 50, 128, 2e-3
TEACHER = 3  # the decoder layer whose attention is learned

Lessons = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Scorer(nn.Module):
    """The network of `score: {mlp: {weights: ..., text: mean}}`, its parameters named as the policy wants them."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.visual = nn.Linear(width, hidden, bias=False)
        self.text = nn.Linear(width, hidden, bias=False)
        self.hidden = nn.ParameterDict({"bias": nn.Parameter(torch.zeros(hidden))})
        self.score = nn.Linear(hidden, 1)

    def forward(self, visual: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """[B, V] from visual tokens [B, V, D] and the mean of the text [B, D]."""
        mixed = self.visual(even(visual)) + self.text(even(text))[:, None] + self.hidden["bias"]
        scores: torch.Tensor = self.score(F.gelu(mixed)).squeeze(2)
        return scores


def even(values: torch.Tensor) -> torch.Tensor:
    return values * torch.rsqrt(values.square().mean(-1, keepdim=True) + 1e-6)


@torch.no_grad()
def lessons(model: Any, processor: Any, split: str, seed: int, count: int) -> Lessons:
    """Visual tokens [N, V, D], mean of the question [N, D] and shares [N, V] of what it attends to."""
    made: list[Lessons] = []
    for first in range(0, count, BATCH):
        drawn = [scenes.example(split, seed, index) for index in range(first, min(first + BATCH, count))]
        inputs = prepared_batch(processor, [s.image for s, _ in drawn], [q.text for _, q in drawn])
        out = model(**inputs, output_attentions=True, output_hidden_states=True)
        seen = inputs["input_ids"] == model.config.image_token_index
        places = seen.nonzero()[:, 1].reshape(len(seen), -1)  # [B, V]
        column = torch.arange(seen.shape[1])
        asked = (column > places[:, -1:]).float()
        before_last = asked * (column < column[-1])
        entering = out.hidden_states[0]
        visual = entering.gather(1, places[:, :, None].expand(-1, -1, entering.shape[2]))
        text = torch.einsum("bsd,bs->bd", entering, before_last) / before_last.sum(1, keepdim=True)
        paid = torch.einsum("bqk,bq->bk", out.attentions[TEACHER].mean(1), asked).gather(1, places)
        made.append((visual, text, paid / paid.sum(1, keepdim=True)))
    visual, text, shares = (torch.cat(part) for part in zip(*made, strict=True))
    return visual, text, shares


def train(scorer: Scorer, taught: Lessons, epochs: int) -> None:
    """Makes the softmax of the scores what the shares of attention are."""
    visual, text, shares = taught
    optimizer = torch.optim.AdamW(scorer.parameters(), RATE, weight_decay=0.01)
    steps = epochs * -(-len(visual) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(visual)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(scorer(visual[rows], text[rows]), shares[rows]).backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def caught(scorer: Scorer, taught: Lessons) -> tuple[float, float]:
    """What of the question's attention goes to a tenth of the visual tokens: the scorer's, and the teacher's own."""
    visual, text, shares = taught
    best, number = scorer(visual, text), shares.shape[1] // 10
    own = shares.topk(number).values.sum(1).mean()
    return float(shares.gather(1, best.topk(number).indices).sum(1).mean()), float(own)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--examples", type=int, default=4000)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--output", type=pathlib.Path, default=WEIGHTS)
    options = parser.parse_args()
    torch.manual_seed(0)
    started = time.perf_counter()
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        MODEL, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    processor = transformers.AutoProcessor.from_pretrained(MODEL)
    taught = lessons(model, processor, "train", 1, options.examples)
    print(f"{options.examples} lessons after {time.perf_counter() - started:.0f} s", flush=True)
    scorer = Scorer(model.config.text_config.hidden_size, HIDDEN)
    train(scorer, taught, options.epochs)
    share, most = caught(scorer, lessons(model, processor, "train", 2, max(1, options.examples // 20)))
    print(f"a tenth of the tokens gets {share:.1%} of the question's attention, of {most:.1%} at best")
    tensors = {name: value.detach().contiguous() for name, value in scorer.state_dict().items()}
    safetensors.torch.save_file(tensors, options.output)
    print(f"{options.output} after {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
