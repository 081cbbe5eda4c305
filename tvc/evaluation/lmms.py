"""The adapter for lmms-eval: dense and compiled models of any size, asked the questions of public tasks.

    lmms-eval --model tvc --model_args artifact=out/fastv --tasks mme --batch_size 4
    lmms-eval --model tvc --model_args pretrained=MODEL,policy=fastv,device=cuda --tasks mme
    lmms-eval --model tvc --model_args pretrained=MODEL --tasks mme

lmms-eval finds it by the entry point `lmms_eval.models`, which names `manifest`. From Python, `TvcModel(artifact=...)`
is what `lmms_eval.evaluator.simple_evaluate(model, ...)` takes.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from tvc.errors import ArgumentError, InputError
from tvc.runtime.prompts import special_tokens

try:
    from lmms_eval.api.instance import GenerationResult
    from lmms_eval.api.model import lmms
except ImportError as problem:
    raise ArgumentError(
        "lmms-eval is not installed, or a package that it needs is missing",
        where="tvc.evaluation.lmms",
        got=f"{type(problem).__name__}: {problem}",
        want="lmms-eval 0.7.3 or newer",
        fix="pip install 'tvc[lmms]'",
        slug="no-lmms-eval",
    ) from problem

IMAGE_MARK = "<image>"  # how the texts of tasks say where an image stands, whatever the family's own placeholder is
NEW_TOKENS = 1024  # where a task sets no limit; lmms-eval's own adapter of LLaVA says the same
NO_TOKEN = 2**31 - 1  # as the end token: no answer ends by itself
BEAMS = ("num_beams", "length_penalty", "early_stopping")
ALWAYS = (*BEAMS, "min_new_tokens", "repetition_penalty", "no_repeat_ngram_size")
SAMPLING = ("temperature", "top_p", "top_k", "min_p")

_log = logging.getLogger(__name__)


def manifest() -> Any:
    """What the entry point gives to lmms-eval's registry of models."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="tvc", simple_class_path=f"{__name__}.{TvcModel.__name__}")


@dataclasses.dataclass(frozen=True)
class Choice:
    """What to open, as `--model_args` says it."""

    artifact: str | None
    pretrained: str | None
    policy: str | None
    target: str | None
    dtype: str | None
    device: str | None

    def __post_init__(self) -> None:
        given = [field.name for field in dataclasses.fields(self) if getattr(self, field.name) is not None]
        if (self.artifact is None) == (self.pretrained is None):
            raise _bad_choice("one model is evaluated at a time", given, "artifact=DIR", "pretrained=MODEL")
        if self.artifact is not None and not {"artifact", "device"}.issuperset(given):
            raise _bad_choice("what an artifact runs is settled", given, "artifact=DIR", "artifact=DIR,device=DEVICE")
        if self.policy is None and self.target is not None:
            raise _bad_choice("a target needs a policy", given, "pretrained=MODEL,policy=POLICY,target=TARGET")

    def open(self) -> tuple[Any, Any]:
        """The model on its device, compiled or a Hugging Face one, and its processor, set to pad on the left.

        Raises:
            TvcError: it cannot be loaded or compiled, or has no processor.
        """
        from tvc import api, placement
        from tvc.trace.load import load

        if self.artifact is not None:
            model: Any = api.load(self.artifact, device=self.device)
            processor = model.processor
        elif self.policy is not None:
            options: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
            model = api.compile(str(self.pretrained), self.policy, self.target or "torch", **options)
            processor = model.processor
        else:
            device, dtype = placement.device_of(self.device), placement.dtype_of(self.dtype)
            source = load(str(self.pretrained), device=device, dtype=dtype)
            model, processor = source.model, source.processor
        if processor is None:
            raise ArgumentError(
                "the model comes without a processor",
                where="--model_args",
                got=self.artifact or self.pretrained,
                want="a directory that holds a tokenizer and an image processor beside the model",
                fix="save the processor there: processor.save_pretrained(directory), and compile again",
                slug="no-processor",
            )
        processor.tokenizer.padding_side = "left"  # answers begin where the prompts of a batch end
        if processor.tokenizer.pad_token is None:
            processor.tokenizer.pad_token = processor.tokenizer.eos_token
        return model, processor


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One request's conversation, its text up to where the answer begins, and its images in the text's order."""

    messages: list[dict[str, Any]]
    text: str
    images: list[Any]


@dataclasses.dataclass(frozen=True)
class Score:
    """How likely a continuation is: natural logarithm, summed over its tokens, and whether greedy search writes it."""

    log_probability: float
    tokens: int
    greedy: bool


class Likelihood(tuple[float, bool], GenerationResult):
    """`(loss, greedy)`, which is its own `text`, as lmms-eval 0.7.3 would turn a bare pair into its printed form."""

    def __init__(self, _pair: tuple[float, bool]):
        GenerationResult.__init__(self, text=self)

    def strip(self) -> str:
        """Nothing: by this the response cache decides what to keep, and what it keeps it would give back bare."""
        return ""


class TvcModel(lmms):
    """A dense or compiled model as lmms-eval wants one; its tasks take the "simple" form, `doc_to_visual`.

    Args:
        artifact: a directory that `tvc compile` wrote.
        pretrained: a model directory or hub id; by itself it is evaluated dense.
        policy: preset name or policy file to compile `pretrained` with, and to verify it.
        target: what to compile for; default: torch.
        dtype: float32, float16 or bfloat16; default: that of the weights.
        device: cpu, cuda or cuda:N; default: the CPU.
        batch_size: requests that are answered at once.

    Raises:
        TvcError: an argument is unknown or contradicts another one, or the model cannot be opened.
    """

    is_simple = True

    def __init__(
        self,
        artifact: str | None = None,
        pretrained: str | None = None,
        policy: str | None = None,
        target: str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
        **unknown: Any,
    ):
        super().__init__()
        names = [field.name for field in dataclasses.fields(Choice)]
        if unknown:
            raise ArgumentError(
                "the adapter has no such argument",
                where="--model_args",
                got=", ".join(unknown),
                want=f"some of {', '.join([*names, 'batch_size'])}",
                fix=f"leave {next(iter(unknown))} out, or correct its spelling",
                slug="unknown-argument",
            )
        self.batch_size = _batch_size(batch_size)
        # lmms-eval turns arguments that look like numbers into numbers, names of directories too.
        given = [artifact, pretrained, policy, target, dtype, device]
        self.choice = Choice(*(None if value is None else str(value) for value in given))
        self._opened: tuple[Any, Any] | None = self.choice.open()
        self._left_out: set[str] = set()

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> TvcModel:
        """The model that `--model_args` describes; what it says goes before `--batch_size` and `--device`."""
        more = additional_config or {}
        free = {name: value for name, value in more.items() if not re.search(rf"(^|,)\s*{name}\s*=", arg_string)}
        return super().create_from_arg_string(arg_string, free)

    @property
    def model(self) -> Any:
        self._opened = self._opened or self.choice.open()
        return self._opened[0]

    @property
    def processor(self) -> Any:
        self._opened = self._opened or self.choice.open()
        return self._opened[1]

    @property
    def device(self) -> torch.device:
        return self.model.device

    def clean(self) -> None:
        """Makes room on the device, as lmms-eval asks for after a run; the next request opens the model again."""
        self._opened = None
        super().clean()

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answers, in the order of the requests, whose `args` are `(context, options, doc_to_visual, document...)`.

        Options: `until` (strings that end an answer), `max_new_tokens`, `do_sample` and those of `ALWAYS` and
        `SAMPLING`. Others, made for one family's own code, are left out and named in the log.
        """
        answers = [""] * len(requests)
        arguments = [request.args for request in requests]
        options = [json.dumps(given[1], sort_keys=True, default=str) for given in arguments]
        for numbers in self._batches(options, [given[0] for given in arguments]):
            batch = [arguments[number] for number in numbers]
            prompts = [self._prompt(given[0], self._images(*given[2:])) for given in batch]
            for number, answer in zip(numbers, self._answers(prompts, batch[0][1]), strict=True):
                answers[number] = answer
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[Likelihood]:
        """For each request the mean of -log p over its continuation's tokens, and whether greedy search writes it.

        This is a loss, the lower the better: lmms-eval's multiple choice takes the smallest one, and its own adapters
        return the same, whatever the base class says. `scores` gives log-probabilities.
        """
        return [Likelihood((-score.log_probability / score.tokens, score.greedy)) for score in self.scores(requests)]

    def scores(self, requests: Sequence[Any]) -> list[Score]:
        """How likely the model is to answer with each request's continuation, end of turn not counted.

        The `args` of a request are `(context, continuation or doc_to_target, doc_to_visual, document...)`, or the first
        two of them where there is nothing to see.
        """
        made: list[Score | None] = [None] * len(requests)
        arguments = [request.args for request in requests]
        for numbers in self._batches([""] * len(requests), [given[0] for given in arguments]):
            prompts, continuations = [], []
            for context, continuation, *seen in (arguments[number] for number in numbers):
                prompts.append(self._prompt(context, self._images(*seen) if seen else []))
                said = continuation if isinstance(continuation, str) else continuation(self._document(*seen[1:]))
                continuations.append(self._continuation(prompts[-1], str(said)))
            for number, score in zip(numbers, self._scores(prompts, continuations), strict=True):
                made[number] = score
        return [score for score in made if score is not None]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """The answers of each request's rounds: after each one the task says what to ask next, or that it is over.

        The `args` of a request are `(context, options, doc_to_visual, doc_to_text, document...)`.
        """
        return [self._rounds(*request.args) for request in requests]

    def _rounds(
        self, context: str, options: Mapping[str, Any], see: Callable[..., Any], ask: Callable[..., Any], *place: Any
    ) -> list[str]:
        visuals, answers, state = self._images(see, *place), list[str](), None
        while True:
            answers += self._answers([self._prompt(context, visuals)], options)
            seen, context, over, past, state = ask(
                self._document(*place), previous_output=answers, round_idx=len(answers), previous_round_info=state
            )
            if over:
                return list(past)
            answers, visuals = list(past), _pictures(seen)

    def _batches(self, kinds: Sequence[str], contexts: Sequence[str]) -> Iterator[list[int]]:
        """Numbers of requests that are answered together: of one kind, of similar length, the longest ones first."""
        groups: dict[str, list[int]] = {}
        for number, kind in enumerate(kinds):
            groups.setdefault(kind, []).append(number)
        with tqdm(total=len(kinds), disable=self.rank != 0, desc="tvc") as bar:
            for group in groups.values():
                group.sort(key=lambda number: -len(contexts[number]))
                for start in range(0, len(group), self.batch_size):
                    batch = group[start : start + self.batch_size]
                    yield batch
                    bar.update(len(batch))

    def _document(self, number: int, task: str, split: str) -> Any:
        return self.task_dict[task][split][number]

    def _images(self, see: Callable[..., Any], *place: Any) -> list[Any]:
        return _pictures(see(self._document(*place)))

    def _prompt(self, context: str, images: list[Any]) -> Prompt:
        messages = [{"role": "user", "content": _content(context, len(images))}]
        return Prompt(messages, self._rendered(messages, True), images)

    def _rendered(self, messages: list[dict[str, Any]], generating: bool) -> str:
        """The conversation as text, by the model's chat template or, where it has none, one part after the other."""
        if getattr(self.processor, "chat_template", None):
            return str(self.processor.apply_chat_template(messages, add_generation_prompt=generating))
        parts = [part for message in messages for part in message["content"]]
        return " ".join(part["text"] if part["type"] == "text" else self.processor.image_token for part in parts)

    def _encoded(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """The processor's tensors on the model's device: `input_ids` [B, S] padded on the left, pixels and the rest."""
        texts = [prompt.text for prompt in prompts]
        # Nested: processors that take several images a sample tell by it which image is whose.
        images = [prompt.images for prompt in prompts] if any(prompt.images for prompt in prompts) else None
        options = {"padding": True, "return_tensors": "pt", **special_tokens(self.processor, texts[0])}
        made = self.processor(images=images, text=texts, **options)
        return dict(made.to(device=self.model.device, dtype=self.model.dtype))

    def _answers(self, prompts: Sequence[Prompt], options: Mapping[str, Any]) -> list[str]:
        settings, unknown = generation_settings(options)
        if not self._left_out.issuperset(unknown):
            self._left_out.update(unknown)
            _log.warning("generation settings of the task that are left out: %s", ", ".join(sorted(unknown)))
        inputs = self._encoded(prompts)
        length = inputs["input_ids"].shape[1]
        ends = Ends.of(options.get("until"), self.processor, length)
        ids = self.model.generate(**inputs, **settings, stopping_criteria=[ends])
        return [ends.cut(row) for row in ids[:, length:].tolist()]

    def _continuation(self, prompt: Prompt, continuation: str) -> list[int]:
        """Ids of the continuation's tokens, after the space or line break that the template puts before an answer."""
        words = continuation.strip()
        if not words:
            raise InputError(
                "a continuation without words has no likelihood",
                where="loglikelihood",
                got=repr(continuation),
                want="at least one character",
                fix="give every choice of the task a text",
                slug="empty-continuation",
            )
        answer = {"role": "assistant", "content": [{"type": "text", "text": words}]}
        said = self._rendered([*prompt.messages, answer], False)
        place = said.find(words, len(prompt.text)) if said.startswith(prompt.text) else -1
        text = continuation if place < 0 else said[len(prompt.text) : place] + words
        encode, special = self.processor.tokenizer, special_tokens(self.processor, prompt.text)
        before, joined = (encode(part, **special)["input_ids"] for part in (prompt.text, prompt.text + text))
        if joined[: len(before)] == before:
            return list(joined[len(before) :])
        # The tokenizer joined letters across the border, which no answer to this prompt can.
        return list(encode(text, add_special_tokens=False)["input_ids"])

    def _scores(self, prompts: Sequence[Prompt], continuations: Sequence[list[int]]) -> list[Score]:
        """`generate` writes the given tokens, so that places and caches are those of an answer in every family."""
        inputs = self._encoded(prompts)
        lengths = [len(ids) for ids in continuations]
        pad = self.processor.tokenizer.pad_token_id
        rows = [ids + [pad] * (max(lengths) - len(ids)) for ids in continuations]
        tokens = torch.tensor(rows, device=inputs["input_ids"].device)  # [B, N]
        out = self.model.generate(
            **inputs,
            max_new_tokens=max(lengths),
            do_sample=False,
            num_beams=1,
            logits_processor=[Dictation(tokens, inputs["input_ids"].shape[1])],
            output_logits=True,
            return_dict_in_generate=True,
            eos_token_id=NO_TOKEN,
            pad_token_id=pad,
        )
        logits = torch.stack(out.logits, 1).float()  # [B, N, vocabulary]
        chosen = logits.log_softmax(-1).gather(2, tokens.unsqueeze(2)).squeeze(2)
        best = logits.argmax(-1) == tokens
        return [
            Score(float(chosen[row, :length].sum()), length, bool(best[row, :length].all()))
            for row, length in enumerate(lengths)
        ]


class Dictation:
    """A logits processor after which only the next token of `tokens` [B, N] can be written."""

    def __init__(self, tokens: torch.Tensor, start: int):
        self.tokens, self.start = tokens, start

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        following = self.tokens[:, input_ids.shape[1] - self.start].unsqueeze(1)
        return torch.full_like(scores, -torch.inf).scatter(1, following, 0.0)


@dataclasses.dataclass(frozen=True)
class Ends:
    """What ends an answer beside the model's own end token; a stopping criterion of `generate`."""

    strings: tuple[str, ...]
    tokens: frozenset[int]  # of ends that are special tokens, which decoding leaves out
    processor: Any
    start: int  # length of the prompts

    @classmethod
    def of(cls, until: Any, processor: Any, start: int) -> Ends:
        """From what a task gives as `until`: a string, several or none."""
        ends = [until] if isinstance(until, str) else [str(end) for end in until or () if end]
        tokenizer = processor.tokenizer
        special = {end: tokenizer.convert_tokens_to_ids(end) for end in ends if end in tokenizer.all_special_tokens}
        strings = tuple(end for end in ends if end and end not in special)
        return cls(strings, frozenset(special.values()), processor, start)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """[B] bool: which answers are over."""
        # Every token is one byte at least: an end that was just completed lies within as many tokens. A few more, as
        # decoding may take the space off the first one.
        window = max((len(end.encode()) for end in self.strings), default=0) + 4
        rows = input_ids[:, max(self.start, input_ids.shape[1] - window) :].tolist()
        over = [self._holds(row) for row in rows]
        return torch.tensor(over, dtype=torch.bool, device=input_ids.device)

    def _holds(self, row: list[int]) -> bool:
        return not self.tokens.isdisjoint(row) or any(end in self._text(row) for end in self.strings)

    def cut(self, row: list[int]) -> str:
        """The text of an answer's tokens up to the first end."""
        place = next((place for place, token in enumerate(row) if token in self.tokens), len(row))
        text = self._text(row[:place])
        found = [text.find(end) for end in self.strings]
        return text[: min((start for start in found if start >= 0), default=len(text))].strip()

    def _text(self, row: list[int]) -> str:
        return str(self.processor.batch_decode([row], skip_special_tokens=True)[0])


def generation_settings(options: Mapping[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """Arguments of `generate` for a task's options, and the names of the options that it has no use for."""
    given = {name: value for name, value in options.items() if value is not None}
    sampling = bool(given.get("do_sample", given.get("temperature", 0) > 0)) and given.get("temperature") != 0
    names = (*ALWAYS, *SAMPLING) if sampling else ALWAYS
    settings = {name: given[name] for name in names if name in given}
    settings |= {"do_sample": sampling, "max_new_tokens": int(given.get("max_new_tokens", NEW_TOKENS))}
    return settings, set(given) - {*ALWAYS, *SAMPLING, "do_sample", "max_new_tokens", "until"}


def _content(context: str, images: int) -> list[dict[str, str]]:
    """The parts of a user's turn: images where the text marks each of them, else before it."""
    pieces = context.split(IMAGE_MARK)
    if len(pieces) - 1 != images:
        return [{"type": "image"}] * images + [{"type": "text", "text": "".join(pieces)}]
    parts = [{"type": "text", "text": pieces[0]}]
    for piece in pieces[1:]:
        parts += [{"type": "image"}, {"type": "text", "text": piece}]
    return [part for part in parts if part.get("text") != ""]


def _pictures(visuals: Any) -> list[Any]:
    """The images of a document, in RGB.

    Raises:
        InputError: there is a video or a sound among them.
    """
    for visual in visuals or ():
        if not isinstance(visual, Image.Image):
            raise InputError(
                "the task shows something that is no image",
                where="doc_to_visual",
                got=f"{type(visual).__name__}: {visual}"[:200],
                want="images (PIL.Image.Image)",
                fix="choose a task on images: neither videos nor sounds are supported",
                slug="no-image",
            )
    return [visual.convert("RGB") for visual in visuals or ()]


def _batch_size(given: Any) -> int:
    try:
        size = int(given)
    except (TypeError, ValueError):
        size = 0
    if size < 1:
        raise ArgumentError(
            "the batch size is no positive whole number",
            where="--batch_size",
            got=given,
            want="1, 2, 3, ...; sizes are not tried out",
            fix="--batch_size 1 always fits",
            slug="bad-batch-size",
        )
    return size


def _bad_choice(summary: str, given: Sequence[str], *wanted: str) -> ArgumentError:
    return ArgumentError(
        summary,
        where="--model_args",
        got=", ".join(given) or "neither artifact nor pretrained",
        want=" or ".join(wanted),
        fix=f"write --model_args {wanted[0]}",
        slug="bad-model-args",
    )
