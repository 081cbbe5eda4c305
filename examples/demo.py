"""Compiles the bundled model for a photo and measures it: two policies, two runtimes, dense beside them.

    python examples/demo.py [--model DIRECTORY] [--image FILE] [--prompt TEXT] [--output DIRECTORY]

The path is the one of any Hugging Face vision-language model; the bundled one has random weights, so its answers are
gibberish. Everything is written below the output directory, nothing is opened.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from PIL import Image
from rich.console import Console
from rich.table import Table

import tvc

HERE = pathlib.Path(__file__).parent
POLICIES = ("visionzip", "fastv")
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
the weights are random, so the answers are gibberish
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
    answer: str = ""

    @property
    def prefill(self) -> float:
        return statistics.median(self.prefills)

    @property
    def decode(self) -> float:
        return statistics.median(self.decodes)


def main() -> None:
    options = _arguments()
    console = Console(width=None if sys.stdout.isatty() else 120)
    processor = transformers.AutoProcessor.from_pretrained(options.model)
    inputs = prepare(processor, options.image, options.prompt)
    dense = transformers.AutoModelForImageTextToText.from_pretrained(options.model, dtype=torch.float32).eval()

    variants = [Variant("dense", "torch", dense, {"logits_to_keep": 1})]
    policies: list[tuple[str, Any]] = [("dense", KEEP_ALL), *((name, name) for name in POLICIES)]
    for (name, policy), target in itertools.product(policies, TARGETS):
        if (name, target) == ("dense", "torch"):
            continue
        with console.status(f"compiling {name} for {target}, then checking it against the untouched model"):
            compiled = tvc.compile(str(options.model), policy, target=target, inputs=inputs, dtype=torch.float32)
            compiled.save_pretrained(options.output / f"{name}-{target}")
        variants.append(Variant(name, target, compiled))
    with console.status("measuring"):
        measure(variants, inputs, processor)

    console.print(table(variants, {name: plan(options.model, name, dense, inputs) for name in POLICIES}))
    console.print(NOTE.format(repeats=REPEATS, threads=torch.get_num_threads()), highlight=False)
    for row in variants:
        console.print(f"[bold]{row.policy} {row.target}[/]: {row.answer!r}", highlight=False)
    for name in POLICIES:
        overlay = options.output / f"{name}.png"
        show(options.output / f"{name}-torch", options.image, options.prompt, overlay)
        console.print(f"kept patches of {name}: {overlay}")


def prepare(processor: Any, image: pathlib.Path, prompt: str) -> dict[str, torch.Tensor]:
    """The processor's tensors for one photo and one question."""
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return dict(processor(images=[Image.open(image).convert("RGB")], text=[text], return_tensors="pt"))


@torch.no_grad()
def measure(variants: list[Variant], inputs: dict[str, torch.Tensor], processor: Any) -> None:
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
    for row in variants:
        answer = generate(row.model, NEW_TOKENS)[0, inputs["input_ids"].shape[1] :]
        row.answer = processor.decode(answer, skip_special_tokens=True)


def milliseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - start)


def plan(model: pathlib.Path, policy: str, dense: Any, inputs: dict[str, torch.Tensor]) -> Any:
    """What the policy promises for this prompt."""
    text_tokens = int((inputs["input_ids"] != dense.config.image_token_id).sum())
    return tvc.plan(str(model), policy, text_tokens=text_tokens)


def table(rows: list[Variant], plans: dict[str, Any]) -> Table:
    """One line a policy and runtime; shares and speed-ups against dense in the same runtime."""
    made = Table(title="one photo, one question")
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


def show(artifact: pathlib.Path, image: pathlib.Path, prompt: str, overlay: pathlib.Path) -> None:
    """The command that a user would type; it lies beside the interpreter, on PATH or not."""
    command = pathlib.Path(sys.executable).with_name("tvc")
    arguments = [artifact, "--image", image, "--prompt", prompt, "-o", overlay]
    subprocess.run([str(part) for part in (command, "show", *arguments)], check=True, stdout=subprocess.DEVNULL)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=pathlib.Path, default=HERE / "models" / "tiny-llava")
    parser.add_argument("--image", type=pathlib.Path, default=HERE / "images" / "astronaut.jpg")
    parser.add_argument("--prompt", default="what is in the picture?")
    parser.add_argument("--output", type=pathlib.Path, default=HERE.parent / "out" / "demo")
    return parser.parse_args()


if __name__ == "__main__":
    main()
