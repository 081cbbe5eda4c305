"""Asks the bundled model about a photo, dense and compiled: two policies, two runtimes.

    python examples/demo.py [--model DIRECTORY] [--image FILE] [--scene N] [--prompt TEXT] [--output DIRECTORY]

The bundled model knows handwritten digits, coloured shapes and signs, so some are put onto the photo: scene number N,
whose right answers are known. The path is the one of any Hugging Face vision-language model. Everything is written
below the output directory, nothing is opened.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table

import tvc
from tvc.commands.show import kept_panels
from tvc.evaluation import scenes
from tvc.report.overlay import overlay

HERE = pathlib.Path(__file__).parent
# A quarter of the 144 visual tokens: before the decoder, and from its fourth layer on.
POLICIES = {"visionzip": ["keep=30", "contextual=6"], "fastv": ["before_layer=3", "keep=25%"]}
TARGETS = ("torch", "ort")
# ONNX Runtime has no untouched model to compare with: this one is exported by the same code and keeps every token.
KEEP_ALL = {
    "version": 1,
    "name": "dense",
    "steps": [{"at": "language.0", "select": {"stride": {"keep": "100%"}}, "rest": "drop"}],
}
NEW_TOKENS, REPEATS = 16, 9
NOTE = """\
medians of {repeats} interleaved runs, {threads} torch threads; prefill includes the vision encoder
speed-ups are against dense in the same runtime
KV and FLOPs are the plan's, at the checkpoint's number format; a model this small shows less than a real one
"""


@dataclasses.dataclass
class Variant:
    """One policy in one runtime, and what was measured of it, in milliseconds."""

    policy: str
    target: str
    model: Any
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    prefills: list[float] = dataclasses.field(default_factory=list)
    decodes: list[float] = dataclasses.field(default_factory=list)
    answers: list[str] = dataclasses.field(default_factory=list)

    @property
    def prefill(self) -> float:
        return statistics.median(self.prefills)

    @property
    def decode(self) -> float:
        return statistics.median(self.decodes)


def main() -> None:
    options = _arguments()
    console = Console(width=None if sys.stdout.isatty() else 120)
    options.output.mkdir(parents=True, exist_ok=True)
    photo, questions = draw(options.image, options.scene, options.output / "scene.png")
    if options.prompt:
        questions.append(scenes.Question("yours", options.prompt, "", ()))
    processor = transformers.AutoProcessor.from_pretrained(options.model)
    inputs = prepare(processor, photo, questions[0].text)
    dense = transformers.AutoModelForImageTextToText.from_pretrained(options.model, dtype=torch.float32).eval()

    variants = [Variant("dense", "torch", dense, {"logits_to_keep": 1})]
    policies = {"dense": tvc.load_policy(KEEP_ALL)}
    policies |= {name: tvc.load_policy(name, set=settings) for name, settings in POLICIES.items()}
    for (name, policy), target in itertools.product(policies.items(), TARGETS):
        if (name, target) == ("dense", "torch"):
            continue
        with console.status(f"compiling {name} for {target}, then checking it against the untouched model"):
            compiled = tvc.compile(str(options.model), policy, target=target, inputs=inputs, dtype=torch.float32)
            compiled.save_pretrained(options.output / f"{name}-{target}", overwrite=True)
        variants.append(Variant(name, target, compiled))
    with console.status("asking"):
        ask(variants, processor, photo, questions)
    console.print(replies(variants, questions))
    with console.status("measuring"):
        measure(variants, inputs)
    text_tokens = int((inputs["input_ids"] != dense.config.image_token_id).sum())
    plans = {name: tvc.plan(str(options.model), policies[name], text_tokens=text_tokens) for name in POLICIES}
    console.print(table(variants, plans))
    console.print(NOTE.format(repeats=REPEATS, threads=torch.get_num_threads()), highlight=False)
    console.print(f"the photo with things on it: {options.output / 'scene.png'}")
    for row in variants:
        if row.policy in POLICIES and row.target == "torch":
            page = options.output / f"{row.policy}.png"
            album(row, photo, questions).save(page)
            console.print(f"what {row.policy} kept for each question: {page}")


def draw(background: pathlib.Path, number: int, path: pathlib.Path) -> tuple[Image.Image, list[scenes.Question]]:
    """Things on a photo, saved as `path`; and one question of each kind about them."""
    with Image.open(background) as opened:
        photo = opened.convert("RGB")
    photo.thumbnail((4 * scenes.SIDE // 3, 4 * scenes.SIDE // 3))
    side = max(1.0, scenes.SIDE / min(photo.size))
    photo = photo.resize((round(photo.width * side), round(photo.height * side)))
    scene = scenes.scene("test", 0, number, np.asarray(photo))
    asked: dict[str, scenes.Question] = {}
    for question in itertools.islice(scenes.questions(scene, 0, number), 60):
        asked.setdefault(question.kind, question)
    scene.image.save(path)
    return scene.image, [asked[kind] for kind in scenes.KINDS if kind in asked]


def prepare(processor: Any, photo: Image.Image, prompt: str) -> dict[str, torch.Tensor]:
    """The processor's tensors for one photo and one question."""
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return dict(processor(images=[photo], text=[text], return_tensors="pt"))


@torch.no_grad()
def ask(variants: list[Variant], processor: Any, photo: Image.Image, questions: list[scenes.Question]) -> None:
    """Every question to every variant, by greedy search."""
    for question in questions:
        inputs = prepare(processor, photo, question.text)
        for row in variants:
            ids = row.model.generate(**inputs, max_new_tokens=8, do_sample=False)
            answer = ids[0, inputs["input_ids"].shape[1] :]
            row.answers.append(processor.decode(answer, skip_special_tokens=True).strip())


def replies(variants: list[Variant], questions: list[scenes.Question]) -> Table:
    """One line a question: what is right, and what each variant says."""
    made = Table(title="one photo: what dense and compiled models answer")
    for name in ("question", "right", *(f"{row.policy}\n{row.target}" for row in variants)):
        made.add_column(name)
    for place, question in enumerate(questions):
        said = [row.answers[place] for row in variants]
        marked = [text if text == question.answer or not question.answer else f"[red]{text}[/]" for text in said]
        made.add_row(question.text, question.answer, *marked)
    return made


@torch.no_grad()
def measure(variants: list[Variant], inputs: dict[str, torch.Tensor]) -> None:
    """Times a forward pass over the prompt and the further tokens of an answer.

    The variants take turns, so that a busy moment of the machine hits all of them; the first two rounds warm up.
    """

    def generate(model: Any, count: int) -> torch.Tensor:
        return model.generate(**inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False)

    for turn, row in itertools.product(range(-2, REPEATS), variants):
        prefill = milliseconds(lambda row=row: row.model(**inputs, **row.options))
        first = milliseconds(lambda row=row: generate(row.model, 1))
        whole = milliseconds(lambda row=row: generate(row.model, 1 + NEW_TOKENS))
        if turn >= 0:
            row.prefills.append(prefill)
            row.decodes.append((whole - first) / NEW_TOKENS)


def milliseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - start)


def table(rows: list[Variant], plans: dict[str, Any]) -> Table:
    """One line a policy and runtime; shares and speed-ups against dense in the same runtime."""
    made = Table(title="what it costs: one photo, one question")
    made.add_column("policy")
    made.add_column("target")
    for name in ("tokens per layer", "prefill MFLOPs", "KV KiB", "prefill ms", "decode ms/token"):
        made.add_column(name, justify="right", no_wrap=True)
    baseline = {row.target: row for row in rows if row.policy == "dense"}
    some_plan = next(iter(plans.values()))
    for row in rows:
        cost = plans[row.policy].compiled if row.policy in plans else some_plan.dense
        layers = [layer.tokens for layer in plans[row.policy].layers] if row.policy in plans else []
        untouched = [sum(some_plan.visual_tokens) + some_plan.text_tokens] * len(some_plan.layers)
        dense = baseline[row.target]
        made.add_row(
            row.policy,
            row.target,
            runs(layers or untouched),
            f"{cost.prefill / 1e6:.0f} ({cost.prefill / some_plan.dense.prefill:.0%})",
            f"{cost.kv_bytes / 1024:.0f} ({cost.kv_bytes / some_plan.dense.kv_bytes:.0%})",
            f"{row.prefill:.2f} ({dense.prefill / row.prefill:.2f}x)",
            f"{row.decode:.2f} ({dense.decode / row.decode:.2f}x)",
        )
    return made


def runs(counts: list[int]) -> str:
    """`159 x 2, 87 x 6` for two layers of 159 tokens and six of 87."""
    return ", ".join(f"{count} x {len(list(group))}" for count, group in itertools.groupby(counts))


def album(row: Variant, photo: Image.Image, questions: list[scenes.Question]) -> Image.Image:
    """For each question the patches that stay at the policy's last cut; two columns."""
    cells = []
    for place, question in enumerate(questions):
        panel = kept_panels(row.model, photo, question.text)[-1]
        drawn = overlay(photo, [panel])
        cell = Image.new("RGB", (drawn.width, drawn.height + 30), "white")
        cell.paste(drawn, (0, 30))
        said = f"{question.text}  {row.answers[place]}"
        ImageDraw.Draw(cell).text((18, 10), said, fill="black", font=ImageFont.load_default(18))
        cells.append(cell)
    width, height = cells[0].size
    page = Image.new("RGB", (2 * width, height * -(-len(cells) // 2)), "white")
    for place, cell in enumerate(cells):
        page.paste(cell, (width * (place % 2), height * (place // 2)))
    return page


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=pathlib.Path, default=HERE / "models" / "tiny-llava")
    parser.add_argument("--image", type=pathlib.Path, default=HERE / "images" / "astronaut.jpg")
    parser.add_argument("--scene", type=int, default=4, help="which things lie where on the photo")
    parser.add_argument("--prompt", help="one more question")
    parser.add_argument("--output", type=pathlib.Path, default=HERE.parent / "out" / "demo")
    return parser.parse_args()


if __name__ == "__main__":
    main()
