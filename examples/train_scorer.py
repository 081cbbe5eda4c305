"""Trains a small network that rates visual tokens in front of the decoder, for the bundled model.

    python examples/train_scorer.py [--examples N] [--epochs A,B] [--output FILE]

The model is its own teacher (CoViPAL, arXiv 2508.17243, in two stages). First the scorer, which sees a visual token as
it enters the decoder and the mean of the question's tokens, learns what the question attends to in the fourth of the
six decoder layers. Then the scores decide, softly at first, how much of a token the decoder sees, and the answer has to
stay what it was. Questions are those of the `train` split, which no evaluation asks. Ten minutes on one core;
`examples/policies/scorer.yaml` uses what comes out:

    tvc eval examples/models/tiny-llava --policy examples/policies/scorer.yaml --policy fastv -o out/scorer
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
from tvc.runtime.prompts import prepared_batch

HERE = pathlib.Path(__file__).parent
MODEL = HERE / "models" / "tiny-llava"
WEIGHTS = HERE / "policies" / "scorer.safetensors"
BATCH, HIDDEN = 50, 128
TEACHER = 3  # the decoder layer whose attention is learned
BUDGETS = (0.5, 0.25, 0.11, 0.05)  # shares of the visual tokens, one drawn a step of the second stage
SOFT, HARD = 0.3, 0.03  # how gradual the border between kept and dropped is, at the start and at the end


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
        return self.score(F.gelu(mixed)).squeeze(2)


def even(values: torch.Tensor) -> torch.Tensor:
    return values * torch.rsqrt(values.square().mean(-1, keepdim=True) + 1e-6)


@dataclasses.dataclass(frozen=True)
class Lesson:
    """A batch of questions, padded on the left, and what the model does with them."""

    entering: torch.Tensor  # [B, S, D] what enters the decoder
    real: torch.Tensor  # [B, S] bool
    places: torch.Tensor  # [B, V] int64 columns of the visual tokens
    text: torch.Tensor  # [B, D] mean of the tokens behind the image, the last of them left out
    shares: torch.Tensor  # [B, V] what of the question's attention each visual token gets
    answer: torch.Tensor  # [B, vocabulary] log-probabilities of the first token of the answer

    def visual(self) -> torch.Tensor:
        return self.entering.gather(1, self.places[:, :, None].expand(-1, -1, self.entering.shape[2]))


@torch.no_grad()
def lesson(model: Any, processor: Any, seed: int, indices: range) -> Lesson:
    drawn = [scenes.example("train", seed, index) for index in indices]
    inputs = prepared_batch(processor, [s.image for s, _ in drawn], [q.text for _, q in drawn])
    out = model(**inputs, output_attentions=True, output_hidden_states=True)
    real, seen = inputs["attention_mask"].bool(), inputs["input_ids"] == model.config.image_token_index
    places = seen.nonzero()[:, 1].reshape(len(seen), -1)
    column = torch.arange(seen.shape[1])
    asked = (column > places[:, -1:]).float()
    before_last = asked * (column < column[-1])
    paid = torch.einsum("bqk,bq->bk", out.attentions[TEACHER].mean(1), asked).gather(1, places)
    text = torch.einsum("bsd,bs->bd", out.hidden_states[0], before_last) / before_last.sum(1, keepdim=True)
    shares = paid / paid.sum(1, keepdim=True)
    return Lesson(out.hidden_states[0], real, places, text, shares, out.logits[:, -1].log_softmax(-1))


def imitate(scorer: Scorer, lessons: list[Lesson], epochs: int) -> None:
    """First stage: the scores are the logarithms of the shares of attention."""
    optimizer, schedule = optimization(scorer, 2e-3, epochs * len(lessons))
    for _ in range(epochs):
        for number in torch.randperm(len(lessons)).tolist():
            one = lessons[number]
            step(F.cross_entropy(scorer(one.visual(), one.text), one.shares), optimizer, schedule)


def answer(model: Any, scorer: Scorer, lessons: list[Lesson], epochs: int) -> None:
    """Second stage: the decoder sees as much of a token as its score lies above the border of a budget."""
    optimizer, schedule = optimization(scorer, 1e-3, epochs * len(lessons))
    steps = epochs * len(lessons)
    order = torch.cat([torch.randperm(len(lessons)) for _ in range(epochs)]).tolist()
    for done, number in enumerate(order):
        one = lessons[number]
        score = scorer(one.visual(), one.text)
        keep = max(1, round(BUDGETS[int(torch.randint(len(BUDGETS), ()))] * score.shape[1]))
        border = score.detach().topk(keep + 1).values[:, -2:].mean(1, keepdim=True)
        softness = SOFT * (HARD / SOFT) ** (done / steps)
        seen = F.logsigmoid((score - border) / softness)
        told = decode(model, one, seen)
        step(F.kl_div(told, one.answer, reduction="batchmean", log_target=True), optimizer, schedule)
        if done % 20 == 19:
            right = float((told.argmax(-1) == one.answer.argmax(-1)).float().mean())
            print(f"step {done + 1} of {steps}: {keep} tokens, {right:.0%} answered as before", flush=True)


def decode(model: Any, one: Lesson, seen: torch.Tensor) -> torch.Tensor:
    """[B, vocabulary] log-probabilities behind the prompt, `seen` [B, V] added to the attention to visual tokens."""
    added = torch.zeros_like(one.real, dtype=seen.dtype).scatter(1, one.places, seen)
    length = one.real.shape[1]
    hidden = torch.full((length, length), -1e9).triu(1) + torch.where(one.real, 0.0, -1e9)[:, None, None]
    positions = (one.real.long().cumsum(1) - 1).clamp(min=0)
    decoder = model.get_decoder()
    out = decoder(inputs_embeds=one.entering, attention_mask=hidden + added[:, None, None], position_ids=positions)
    return model.lm_head(out.last_hidden_state[:, -1]).log_softmax(-1)


def optimization(scorer: Scorer, rate: float, steps: int) -> tuple[Any, Any]:
    optimizer = torch.optim.AdamW(scorer.parameters(), rate, weight_decay=0.01)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)


def step(loss: torch.Tensor, optimizer: Any, schedule: Any) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--examples", type=int, default=4000)
    parser.add_argument("--epochs", default="10,3", help="of the two stages")
    parser.add_argument("--output", type=pathlib.Path, default=WEIGHTS)
    options = parser.parse_args()
    first, second = (int(number) for number in options.epochs.split(","))
    torch.manual_seed(0)
    started = time.perf_counter()
    model = transformers.AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32).eval()
    model.requires_grad_(False).set_attn_implementation("eager")
    processor = transformers.AutoProcessor.from_pretrained(MODEL)
    starts = range(0, options.examples, BATCH)
    lessons = [lesson(model, processor, 1, range(n, min(n + BATCH, options.examples))) for n in starts]
    print(f"{options.examples} lessons after {time.perf_counter() - started:.0f} s", flush=True)
    scorer = Scorer(model.config.text_config.hidden_size, HIDDEN)
    imitate(scorer, lessons, first)
    print(f"attention imitated after {time.perf_counter() - started:.0f} s", flush=True)
    model.set_attn_implementation("sdpa")
    answer(model, scorer, lessons, second)
    tensors = {name: value.detach().contiguous() for name, value in scorer.state_dict().items()}
    safetensors.torch.save_file(tensors, options.output)
    print(f"{options.output} after {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
