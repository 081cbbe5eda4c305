"""Asks a program that sees little first, and one that sees more only where the first is unsure: a two-resolution run.

    python examples/two_resolutions.py [--coarse POLICY] [--fine POLICY] [--budgets COARSE FINE] [--examples N]
    python examples/two_resolutions.py --model DIRECTORY --halve --image FILE --prompt TEXT

Both programs are of one model and share its weights. A reply is as sure as the least probable of its tokens was; below
a bound, the question is asked again. On the questions of the built-in benchmark a table tells what each bound costs and
gains. Where a model's visual tokens follow the size of a picture (Qwen2-VL's do), `--halve` gives the first program the
picture with half its sides, a quarter of the tokens.

VisionThink (arXiv 2507.13348) trains a model to ask for the larger picture by itself. That needs its weights; this is
the serving half of it, with a bound in the place of what it learned.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from PIL import Image
from rich.console import Console
from rich.table import Table

from tvc import api
from tvc.evaluation.tasks import Example, SceneTask, batches
from tvc.policy import load_policy
from tvc.runtime.prompts import prepared_batch

HERE = pathlib.Path(__file__).parent
MODEL = HERE / "models" / "tiny-llava"
BOUNDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
BATCH, NEW_TOKENS = 25, 12


@dataclasses.dataclass(frozen=True)
class Said:
    """A reply, and how probable the least probable of its tokens was."""

    text: str
    sure: float


@torch.no_grad()
def ask(model: Any, processor: Any, examples: Sequence[Example], halve: bool = False) -> list[Said]:
    """One reply an example, by greedy search; the examples run as one batch."""
    pictures = [halved(one.image) if halve else one.image for one in examples]
    inputs = prepared_batch(processor, pictures, [one.question for one in examples])
    said = model.generate(
        **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, output_scores=True, return_dict_in_generate=True
    )
    new = said.sequences[:, inputs["input_ids"].shape[1] :]
    chances = torch.stack(said.scores, 1).float().softmax(2).gather(2, new[:, :, None]).squeeze(2)
    # What is said ends with the first token that ends a reply; fills behind it say nothing.
    ends = torch.isin(new, torch.tensor(ending(model)))
    told = ends.long().cumsum(1) - ends.long() == 0
    sure = chances.masked_fill(~told, 1.0).amin(1)
    texts = processor.batch_decode(new, skip_special_tokens=True)
    return [Said(text.strip(), float(chance)) for text, chance in zip(texts, sure, strict=True)]


def ending(model: Any) -> list[int]:
    """Ids that end a reply."""
    ids = model.generation_config.eos_token_id
    return [] if ids is None else list(ids) if isinstance(ids, (list, tuple)) else [ids]


def halved(picture: Image.Image) -> Image.Image:
    """The picture with half its width and height."""
    width, height = picture.size
    return picture.resize((max(width // 2, 1), max(height // 2, 1)), Image.Resampling.LANCZOS)


def programs(options: argparse.Namespace, processor: Any) -> tuple[Any, Any]:
    """The first program and the second; without a policy, the model as it is."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(options.model, dtype=torch.float32).eval()
    prepared = api.Prepared(model, processor=processor)
    layout = prepared.survey.layout

    def made(name: str | None, budget: str) -> Any:
        return model if name is None else prepared.compile(api.at_budget(load_policy(name), layout, budget))

    return made(options.coarse, options.budgets[0]), made(options.fine, options.budgets[1])


def told(first: Sequence[Said], second: Sequence[Said], right: Sequence[Example], bound: float) -> tuple[float, float]:
    """Of all questions the share that is answered right, and the share that is asked twice."""
    replies = [one if one.sure >= bound else other for one, other in zip(first, second, strict=True)]
    hits = sum(reply.text in example.answers for reply, example in zip(replies, right, strict=True))
    return hits / len(right), sum(one.sure < bound for one in first) / len(right)


def study(coarse: Any, fine: Any, processor: Any, options: argparse.Namespace, console: Console) -> None:
    """The table: each program alone, and both of them at several bounds."""
    first, second, asked = [], [], []
    for _, examples in batches(SceneTask(options.examples), 0, BATCH):
        asked += examples
        first += ask(coarse, processor, examples, options.halve)
        second += ask(fine, processor, examples)
    table = Table("asked", "right", "asked twice", title=f"{len(asked)} questions")
    for label, bound in (("first alone", 0.0), ("second alone", 2.0)):
        table.add_row(label, f"{told(first, second, asked, bound)[0]:.1%}", "")
    for bound in BOUNDS:
        hits, twice = told(first, second, asked, bound)
        table.add_row(f"second where the first is below {bound:g}", f"{hits:.1%}", f"{twice:.1%}")
    console.print(table)


def main() -> None:
    options = _arguments()
    console = Console(width=100)
    processor = transformers.AutoProcessor.from_pretrained(options.model)
    coarse, fine = programs(options, processor)
    if options.image is None:
        study(coarse, fine, processor, options, console)
        return
    with Image.open(options.image) as opened:
        example = Example(opened.convert("RGB"), options.prompt, (), "yours")
    (reply,) = ask(coarse, processor, [example], options.halve)
    console.print(f"first: {reply.text} ({reply.sure:.2f})")
    if reply.sure < options.bound:
        (reply,) = ask(fine, processor, [example])
        console.print(f"second: {reply.text} ({reply.sure:.2f})")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=pathlib.Path, default=MODEL)
    parser.add_argument("--coarse", default="divprune", help="the policy that is asked first")
    parser.add_argument("--fine", help="the policy that is asked second; default: the model as it is")
    parser.add_argument("--budgets", nargs=2, default=("11%", "50%"), help="of both, as `tvc compile --budget`")
    parser.add_argument("--halve", action="store_true", help="ask first with half the width and height")
    parser.add_argument("--examples", type=int, default=300)
    parser.add_argument("--image", type=pathlib.Path, help="one picture in the place of the benchmark")
    parser.add_argument("--prompt", default="what is in the picture?")
    parser.add_argument("--bound", type=float, default=0.9, help="with --image: ask again below it")
    options = parser.parse_args()
    if options.image is not None and not options.image.is_file():
        parser.error(f"--image: there is no file {options.image}")
    return options


if __name__ == "__main__":
    main()
