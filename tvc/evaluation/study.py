"""Runs an evaluation: the untouched model and each policy at each budget answer the same questions.

```
task ─► dense replies ─┐
policies × budgets ─► compiled models ─► replies (kept as they come) ─► rows ─► results.json, results.md, accuracy.png
```
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from tvc import placement
from tvc.api import Prepared, layout_of
from tvc.errors import ArgumentError, ModelError
from tvc.evaluation import figures, pages
from tvc.evaluation.answering import ask, prompt_tokens
from tvc.evaluation.records import Record, Records, write_whole
from tvc.evaluation.tasks import Match, Task, batches, is_right
from tvc.evaluation.variants import DENSE, Refused, Variant, labelled, shares, variants
from tvc.export.base import target as find_target
from tvc.program import Layout
from tvc.report.cost import one_image
from tvc.report.schedule import make_plan
from tvc.report.timing import environment
from tvc.trace.load import Source, load

BUDGETS = ("50%", "25%", "11%", "5%")
Progress = Callable[[str, int, int], None]  # what, examples done, examples in all


@dataclasses.dataclass(frozen=True)
class Options:
    """How to ask.

    seeds: models of a policy that draws at random. average: budgets are means over the decoder's layers instead of what
    each policy measures. baselines: random and uniform choices are asked too. verify: each compiled model is compared
    with the untouched one first. match: whether a reply must be the answer or hold it.
    """

    budgets: tuple[str, ...] = BUDGETS
    targets: tuple[str, ...] = ("torch",)
    seeds: int = 3
    average: bool = False
    baselines: bool = True
    batch_size: int = 25
    new_tokens: int = 8
    match: Match = "exact"
    verify: bool = True
    device: str | None = None
    dtype: str | None = None


@dataclasses.dataclass(frozen=True)
class Untouched:
    """A policy without steps, for the costs of the dense model."""

    name: str = DENSE
    steps: tuple[Any, ...] = ()
    reselect: Any = None
    attention: None = None
    cache: None = None


def _silent(_what: str, _done: int, _total: int) -> None:
    return None


def evaluate(
    model: str | os.PathLike[str],
    policies: Sequence[Any],
    task: Task,
    output: str | os.PathLike[str],
    options: Options | None = None,
    progress: Progress = _silent,
) -> dict[str, Any]:
    """What each policy does to a model's answers; `random` and `uniform` are always compared with.

    Args:
        model: directory or hub id, with a processor.
        policies: preset names, paths, texts or `Policy` values.
        task: the questions.
        output: a directory for replies and results; an evaluation that was stopped goes on from what is there.
        options: how to ask.
        progress: told how far the evaluation is.

    Returns:
        What is also written to `results.json`: facts, the rows of `tvc.evaluation.figures`, and what was refused.

    Raises:
        ArgumentError: an option is wrong, or the directory holds another evaluation.
        PolicyError: a policy is wrong. ModelError: the model or its processor cannot be loaded.
    """
    options = check(options or Options())
    named, budgets = labelled(policies, options.baselines), shares(options.budgets)
    for target in options.targets:
        find_target(target)
    device = placement.device_of(options.device) or torch.device("cpu")
    dtype = placement.dtype_of(options.dtype or ("float32" if device.type == "cpu" else None))
    source = load(model, device=device, dtype=dtype)
    if source.processor is None:
        raise ModelError(
            "the model has no processor, so no question can be put to it",
            where=os.fspath(model),
            got="weights alone",
            want="a tokenizer and an image processor beside them",
            fix="save the model's processor into its directory: processor.save_pretrained(directory)",
            slug="no-processor",
        )
    folder = pathlib.Path(output)
    asked = Asked(source, task, options, device, Records(folder, _facts(source, task, options)), progress)
    planned = list(variants(named, asked.layout, budgets, options.seeds, options.average, asked.text_tokens))
    chosen = [variant for variant in planned if isinstance(variant, Variant)]
    asked.expect(1 + len(chosen) * len(options.targets))
    dense = asked.dense()
    rows = [figures.dense_row(dense, make_plan(Untouched(), asked.layout, asked.text_tokens))]
    agreements = []
    for group in _groups(chosen):
        replies = {target: [asked.compiled(variant, target) for variant in group] for target in options.targets}
        rows += [figures.row(group[0], target, several, dense) for target, several in replies.items()]
        agreements += figures.agreement_of_targets(group[0], replies)
    result = {
        "facts": {**_facts(source, task, options), "text_tokens": asked.text_tokens, "budget_unit": _unit(options)},
        "environment": environment(),
        "seconds": {name: round(value, 1) for name, value in asked.seconds.items()},
        "rows": [dataclasses.asdict(row) for row in rows],
        "agreement": agreements,
        "refused": [
            {"policy": refused.label, "budget": refused.budget, "reason": refused.reason}
            for refused in planned
            if isinstance(refused, Refused)
        ],
    }
    write_whole(folder / "results.json", json.dumps(result, indent=1) + "\n")
    write_whole(folder / "results.md", pages.markdown(result))
    pages.plot(result, folder / "accuracy.png")
    return result


class Asked:
    """The examples of a task as they are put to one model after another."""

    def __init__(
        self, source: Source, task: Task, options: Options, device: torch.device, records: Records, progress: Progress
    ):
        self.source, self.task, self.options, self.device = source, task, options, device
        self.records, self.progress = records, progress
        self.dtype: torch.dtype = next(source.model.parameters()).dtype  # type: ignore[union-attr]
        _, first = next(batches(task, 0, min(options.batch_size, 8)))
        self.layout: Layout = one_image(layout_of(source.model, processor=source.processor))  # type: ignore[arg-type]
        self.text_tokens = prompt_tokens(source.processor, first, sum(self.layout.visual_tokens))
        self.seconds: dict[str, float] = {}
        self._models, self._model = 1, 0
        self._traced: Prepared | None = None

    def expect(self, models: int) -> None:
        self._models = models

    def dense(self) -> list[Record]:
        return self._replies(DENSE, "", {"model": DENSE}, lambda: self.source.model)

    def compiled(self, variant: Variant, target: str) -> list[Record]:
        """The replies of a variant; it is compiled only where some are missing."""
        head = {"policy": variant.policy.digest(), "budget": variant.budget, "target": target}

        def make() -> Any:
            self.progress(f"compiling {variant.name} for {target}", self._done(0), self._total())
            return self._prepared().compile(variant.policy, target, verify=self.options.verify)

        return self._replies(variant.name, target, head, make)

    def _prepared(self) -> Prepared:
        """The model, traced once for all policies; not before one is compiled, as all replies may be there."""
        if self._traced is None:
            self._traced = Prepared(self.source.model, processor=self.source.processor)  # type: ignore[arg-type]
        return self._traced

    def _replies(self, name: str, target: str, head: Mapping[str, Any], make: Callable[[], Any]) -> list[Record]:
        file = f"{name}-{target}" if target else name
        found = self.records.read(file, head)
        if len(found) < len(self.task):
            model, match, started = make(), self.options.match, time.perf_counter()
            for first, examples in batches(self.task, len(found), self.options.batch_size):
                self.progress(f"asking {file}", self._done(first), self._total())
                replies = ask(model, self.source.processor, examples, self.device, self.dtype, self.options.new_tokens)
                made = [
                    Record(example.kind, reply.text, reply.first, is_right(reply.text, example.answers, match))
                    for reply, example in zip(replies, examples, strict=True)
                ]
                self.records.append(file, head, made)
                found += made
            self.seconds[file] = time.perf_counter() - started
            del model
            gc.collect()
        self._model += 1
        return found

    def _done(self, examples: int) -> int:
        return self._model * len(self.task) + examples

    def _total(self) -> int:
        return self._models * len(self.task)


def _groups(chosen: Sequence[Variant]) -> Iterator[list[Variant]]:
    """Variants that differ in their seed alone."""
    groups: dict[tuple[str, str], list[Variant]] = {}
    for variant in chosen:
        groups.setdefault((variant.label, variant.budget), []).append(variant)
    yield from groups.values()


def _facts(source: Source, task: Task, options: Options) -> dict[str, Any]:
    """What every reply follows from, but for the policy."""
    return {
        "model": source.name,
        "weights": _digest(source.model),  # type: ignore[arg-type]
        "dtype": str(next(source.model.parameters()).dtype).removeprefix("torch."),  # type: ignore[union-attr]
        "new_tokens": options.new_tokens,
        "match": options.match,
        **task.facts(),
    }


def _digest(model: torch.nn.Module) -> str:
    """Tells two models apart: a hash over some numbers of each weight."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        flat = weight.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // 64)][:128].float().cpu().numpy()
        digest.update(f"{name} {tuple(weight.shape)}".encode() + np.ascontiguousarray(some).tobytes())
    return digest.hexdigest()[:16]


def _unit(options: Options) -> str:
    if options.average:
        return "visual tokens in a decoder layer, mean over the layers"
    return (
        "visual tokens that are left behind the last cut, or in a decoder layer on average where a policy measures so"
    )


def check(options: Options) -> Options:
    """The options, if they make sense.

    Raises:
        ArgumentError: a number is below one, or there is no target or no budget.
    """
    for name, value in (("--seeds", options.seeds), ("--batch-size", options.batch_size)):
        if value < 1:
            raise _bad_option(name, value, "at least 1")
    if not options.budgets:
        raise _bad_option("--budgets", "nothing", "shares such as 50%,25%")
    if not options.targets:
        raise _bad_option("--target", "nothing", "torch or ort")
    return options


def _bad_option(where: str, got: object, want: str) -> ArgumentError:
    return ArgumentError("an option is wrong", where=where, got=got, want=want, fix=f"give {want}", slug="bad-option")
