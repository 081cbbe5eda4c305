"""The adapter for lmms-eval: answers, likelihoods and rounds, compared with what the models themselves say.

lmms-eval with all that it needs is too large to be installed for tests. Where it is missing, a stand-in with the names
and signatures of version 0.7.3 takes its place; the adapter cannot tell.
"""

from __future__ import annotations

import abc
import copy
import dataclasses
import functools
import importlib
import importlib.util
import json
import pathlib
import pydoc
import sys
import tomllib
import types

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import support
from tvc.errors import ArgumentError, InputError

ROOT = pathlib.Path(__file__).parents[2]
MODEL = str(ROOT / "examples" / "models" / "tiny-llava")
ADAPTER = "tvc.evaluation.lmms"
TASK, SPLIT = "stub", "test"
PHOTO = Image.open(ROOT / "examples" / "images" / "astronaut.jpg")
DOCUMENTS = [
    {"question": "what is it?", "images": [PHOTO]},
    {"question": "how many people can you see in the photo, and what do they wear?", "images": [PHOTO.rotate(90)]},
    {"question": "is it one?\n<image>\nor is it two?\n<image>", "images": [PHOTO, PHOTO.rotate(180).convert("L")]},
    {"question": "where is the cat?", "images": []},
    {"question": "what colour is the largest object?", "images": [PHOTO.crop((0, 0, 200, 100))]},
]
MARKED = 2  # the document whose question says where its images stand
# Beyond the end token, so that answers differ whatever the model knows.
LONG = {"max_new_tokens": 6, "min_new_tokens": 6}
# As many visual tokens stay as one image has: it changes nothing, unless a document has two images.
POLICY = """
version: 1
name: one image's worth
steps:
  - at: language.2
    scope: sequence
    score: {{attention: {{of: last, layer: previous}}}}
    select: {{top: {{keep: {tokens}}}}}
    rest: drop
"""
GREEDY = {**LONG, "temperature": 0, "do_sample": False, "top_p": None, "num_beams": 1, "until": []}


# lmms-eval 0.7.3, as far as an adapter sees it ----------------------------------------------------------------------


class lmms(abc.ABC):  # noqa: N801  its name there
    is_simple = True

    def __init__(self):
        self._rank, self._world_size, self.task_dict = 0, 1, {}

    @abc.abstractmethod
    def loglikelihood(self, requests): ...

    @abc.abstractmethod
    def generate_until(self, requests): ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests): ...

    @classmethod
    def create_from_arg_string(cls, arg_string, additional_config=None):
        pairs = [pair.split("=", 1) for pair in arg_string.split(",") if pair]
        arguments = {name: int(value) if value.isnumeric() else value for name, value in pairs}
        return cls(**arguments, **{k: v for k, v in (additional_config or {}).items() if v is not None})

    @property
    def rank(self):
        return self._rank

    def clean(self):
        for name in list(vars(self)):
            if isinstance(getattr(self, name), torch.nn.Module):
                delattr(self, name)


@dataclasses.dataclass
class Instance:
    request_type: str
    arguments: tuple
    idx: int
    metadata: dict = dataclasses.field(default_factory=dict)

    @property
    def args(self):
        return self.arguments if isinstance(self.arguments, tuple) else (self.arguments,)


@dataclasses.dataclass
class GenerationResult:
    text: str
    token_counts: object = None


def unwrap_generation_output(output):
    if isinstance(output, GenerationResult):
        return output.text, output.token_counts
    strings = isinstance(output, list) and all(isinstance(part, str) for part in output)
    return (output if strings else str(output)), None


@dataclasses.dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


STAND_IN = {
    "lmms_eval": [],
    "lmms_eval.api": [],
    "lmms_eval.api.model": [lmms],
    "lmms_eval.api.instance": [Instance, GenerationResult, unwrap_generation_output],
    "lmms_eval.models": [],
    "lmms_eval.models.registry_v2": [ModelManifest],
}


@pytest.fixture(scope="module", autouse=True)
def lmms_eval():
    """Puts the stand-in where `import lmms_eval` finds it, unless the package itself is installed."""
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("lmms_eval") is None:
            for name, members in STAND_IN.items():
                module = types.ModuleType(name)
                vars(module).update({member.__name__: member for member in members})
                patch.setitem(sys.modules, name, module)
        yield
        sys.modules.pop(ADAPTER, None)


@pytest.fixture(scope="module")
def adapter():
    return importlib.import_module(ADAPTER)


# The stub task ------------------------------------------------------------------------------------------------------


def requests(kind, *arguments):
    """One request for each (context, second argument, what comes between the images and the document, document)."""
    instance = importlib.import_module("lmms_eval.api.instance").Instance
    made = []
    for index, (context, second, more, number) in enumerate(arguments):
        given = (context, second, lambda document: document["images"], *more, number, TASK, SPLIT)
        made.append(instance(kind, given, index, {"task": TASK, "doc_id": number, "repeats": 1}))
    return made


def unwrapped(result):
    """What the evaluator reads a result as."""
    return importlib.import_module("lmms_eval.api.instance").unwrap_generation_output(result)[0]


def questions(options, numbers=(0, 1, 2, 3, 4)):
    asked = ((DOCUMENTS[number]["question"], options, (), number) for number in numbers)
    return requests("generate_until", *asked)


def opened(adapter, arguments, **more):
    """The way of the command line: by the manifest's class path, from the text of `--model_args`."""
    model = pydoc.locate(adapter.manifest().simple_class_path).create_from_arg_string(arguments, more)
    model.task_dict[TASK] = {SPLIT: DOCUMENTS}
    return model


def around(adapter, model, processor):
    """The adapter over a model that is in memory."""
    processor = copy.deepcopy(processor)
    processor.tokenizer.padding_side = "left"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapter.Choice, "open", lambda choice: (model, processor))
        made = adapter.TvcModel(pretrained="in memory", batch_size=3)
    made.task_dict[TASK] = {SPLIT: DOCUMENTS}
    return made


@pytest.fixture(scope="module")
def dense(adapter):
    return opened(adapter, f"pretrained={MODEL},dtype=float32", batch_size="3", device=None)


@pytest.fixture(scope="module")
def compiled(adapter, tmp_path_factory):
    """Compiled on the fly, and verified."""
    policy = tmp_path_factory.mktemp("policy") / "policy.yaml"
    config = json.loads((pathlib.Path(MODEL) / "config.json").read_text(encoding="utf-8"))
    policy.write_text(POLICY.format(tokens=config["image_seq_length"]), encoding="utf-8")
    return opened(adapter, f"pretrained={MODEL},policy={policy},dtype=float32,device=cpu", batch_size=3)


@pytest.fixture(scope="module")
def artifact(adapter, compiled, tmp_path_factory):
    place = tmp_path_factory.mktemp("artifact") / "out"
    compiled.model.save_pretrained(place)
    return opened(adapter, f"artifact={place},batch_size=3", batch_size=1)


# What is expected, computed by hand from the models ------------------------------------------------------------------


reference = functools.cache(lambda: AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32).eval())
processor = functools.cache(lambda: AutoProcessor.from_pretrained(MODEL))


def inputs_of(number):
    """The tensors of one document's question, its images where the text marks them, or before a text without marks."""
    question, images = DOCUMENTS[number]["question"], DOCUMENTS[number]["images"]
    parts = ["is it one?\n", None, "\nor is it two?\n", None] if number == MARKED else [*[None] * len(images), question]
    content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
    text = processor().apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    pictures = [image.convert("RGB") for image in images] or None
    return dict(processor()(images=pictures, text=[text], return_tensors="pt"))


def answer(model, number, **options):
    inputs = inputs_of(number)
    ids = model.generate(**inputs, **{"do_sample": False, **LONG, **options})
    return processor().batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip()


def likelihood(number, continuation):
    """Of the continuation's tokens [N], from one call of the untouched model on prompt and continuation."""
    inputs = inputs_of(number)
    ids = processor().tokenizer(" " + continuation, add_special_tokens=False, return_tensors="pt")["input_ids"]
    length = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.no_grad():
        logits = reference()(**inputs).logits[0, length - 1 : -1]
    return logits.log_softmax(-1).gather(1, ids.T).squeeze(1), bool((logits.argmax(-1) == ids[0]).all())


# generate_until ------------------------------------------------------------------------------------------------------


def test_answers_are_those_of_the_untouched_model_in_the_order_of_the_requests(dense):
    less = {"max_new_tokens": 2, "min_new_tokens": 2}
    mixed = [*questions(GREEDY, [3, 0, 1]), *questions({**GREEDY, **less}, [0, 4]), *questions(GREEDY, [2, 4])]
    order = ((3, {}), (0, {}), (1, {}), (0, less), (4, less), (2, {}), (4, {}))
    wanted = [answer(reference(), number, **options) for number, options in order]
    assert dense.generate_until(mixed) == wanted
    assert len(set(wanted)) > 2


def test_compiled_models_answer_as_they_do_by_themselves(compiled, artifact):
    assert (compiled.batch_size, artifact.batch_size) == (3, 3)
    assert compiled.model.verification["passed"]
    wanted = [answer(compiled.model, number) for number in range(len(DOCUMENTS))]
    assert compiled.generate_until(questions(GREEDY)) == wanted
    assert artifact.generate_until(questions(GREEDY)) == wanted


@pytest.mark.parametrize("kind", ["compiled", "artifact"])
def test_where_everything_is_kept_answers_and_likelihoods_are_those_of_the_untouched_model(kind, dense, request):
    model, whole = request.getfixturevalue(kind), [number for number in range(len(DOCUMENTS)) if number != MARKED]
    assert model.generate_until(questions(GREEDY, whole)) == dense.generate_until(questions(GREEDY, whole))
    for one, other in zip(model.scores(choices(whole)), dense.scores(choices(whole)), strict=True):
        assert (one.tokens, one.greedy) == (other.tokens, other.greedy)
        assert one.log_probability == pytest.approx(other.log_probability, abs=2e-3)


def test_an_answer_ends_before_the_first_of_the_given_strings_and_is_not_written_on(dense, monkeypatch):
    long = {"max_new_tokens": 16, "min_new_tokens": 16}
    free = answer(reference(), 0, **long)
    ends = [free[place : place + 3].strip() for place in (len(free) // 2, len(free) // 3)]
    assert all(ends)
    first, second = (free[: free.index(end)].strip() for end in ends)
    written = []
    plain = dense.model.generate
    monkeypatch.setattr(dense.model, "generate", lambda **given: written.append(plain(**given)) or written[-1])
    for until, wanted in ((ends, min(first, second, key=len)), (ends[0], first), (None, free), (["\0"], free)):
        assert dense.generate_until(questions({**long, "until": until}, [0])) == [wanted]
    both, one, *whole = [ids.shape[1] for ids in written]
    assert both <= one < whole[0] == whole[1]


def test_a_special_token_ends_an_answer(adapter, dense):
    tokenizer = dense.processor.tokenizer
    ends = adapter.Ends.of(["", tokenizer.eos_token, "stop"], dense.processor, 2)
    say = tokenizer("a photo", add_special_tokens=False)["input_ids"]
    assert ends.cut([*say, tokenizer.eos_token_id, *say]) == "a photo"
    rows = torch.tensor([[1, 2, *say, tokenizer.eos_token_id], [1, tokenizer.eos_token_id, *say, say[0]]])
    assert ends(rows, None).tolist() == [True, False]


def test_sampling_is_what_the_task_asks_for(dense):
    options = {**LONG, "do_sample": True, "temperature": 5.0, "top_p": 0.9, "top_k": 30}
    torch.manual_seed(5)
    wanted = answer(reference(), 1, do_sample=True, temperature=5.0, top_p=0.9, top_k=30)
    torch.manual_seed(5)
    assert dense.generate_until(questions(options, [1])) == [wanted]
    assert wanted != answer(reference(), 1)


@pytest.mark.parametrize(
    ("options", "wanted", "unknown"),
    [
        ({}, {"do_sample": False, "max_new_tokens": 1024}, set()),
        ({"temperature": 0, "do_sample": True, "top_p": 0.5}, {"do_sample": False, "max_new_tokens": 1024}, set()),
        ({"temperature": 0.5}, {"do_sample": True, "temperature": 0.5, "max_new_tokens": 1024}, set()),
        ({"temperature": 0.5, "do_sample": False, "num_beams": 2}, {"do_sample": False, "num_beams": 2}, set()),
        ({"max_new_tokens": "7", "image_aspect_ratio": "pad"}, {"max_new_tokens": 7}, {"image_aspect_ratio"}),
    ],
)
def test_options_of_tasks_become_arguments_of_generate(adapter, options, wanted, unknown):
    settings, left_out = adapter.generation_settings(options)
    assert wanted.items() <= settings.items()
    assert left_out == unknown
    assert ("temperature" in settings) == settings["do_sample"]


def test_options_without_a_use_are_named_once(dense, caplog):
    options = {**GREEDY, "image_aspect_ratio": "original"}
    dense.generate_until(questions(options, [0]) * 2)
    dense.generate_until(questions(options, [1]))
    told = [record.message for record in caplog.records if record.name == ADAPTER]
    assert told == ["generation settings of the task that are left out: image_aspect_ratio"]


# loglikelihood -------------------------------------------------------------------------------------------------------

CHOICES = ["a cat with green eyes", "two", "a woman in an orange suit and a flag behind her"]


def choices(numbers):
    asked = ((DOCUMENTS[number]["question"], f" {said}", (), number) for number in numbers for said in CHOICES)
    return requests("loglikelihood", *asked)


def test_likelihoods_are_those_of_the_untouched_model(dense):
    asked = choices([0, 2, 3])
    wanted = [likelihood(number, said) for number in (0, 2, 3) for said in CHOICES]
    scores = dense.scores(asked)
    for score, (logs, greedy) in zip(scores, wanted, strict=True):
        assert (score.tokens, score.greedy) == (len(logs), greedy)
        # Float32 sums over the same numbers in another order, at most 40 tokens of about -6 each.
        assert score.log_probability == pytest.approx(float(logs.sum()), abs=2e-3)
    pairs = dense.loglikelihood(asked)
    assert [loss for loss, _ in pairs] == pytest.approx([-float(logs.mean()) for logs, _ in wanted], abs=1e-4)
    # The evaluator makes text of results that it does not know.
    assert [unwrapped(pair) for pair in pairs] == pairs


def test_likelier_answers_have_smaller_losses_and_only_the_likeliest_one_is_greedy(dense):
    """Answers of one token, in the order of the untouched model's logits."""
    with torch.no_grad():
        logits = reference()(**inputs_of(0)).logits[0, -1]
    encode, decode = processor().tokenizer, processor().tokenizer.decode
    said = [(token, decode([token]).strip()) for token in logits.argsort(descending=True).tolist()]
    whole = [
        (token, text) for token, text in said if encode(f" {text}", add_special_tokens=False)["input_ids"] == [token]
    ]
    asked = [(DOCUMENTS[0]["question"], text, (), 0) for _, text in whole[:8] if text]
    losses, greedy = zip(*dense.loglikelihood(requests("loglikelihood", *asked)), strict=True)
    assert list(losses) == sorted(losses)
    assert list(greedy) == [token == int(logits.argmax()) for token, text in whole[:8] if text]
    assert len(losses) > 3


def test_a_compiled_model_scores_as_its_own_logits_say(artifact):
    """One call after the other, each with one token and the cache of the call before; here tokens are dropped."""
    model, inputs, said = artifact.model, inputs_of(MARKED), CHOICES[0]
    ids = processor().tokenizer(" " + said, add_special_tokens=False, return_tensors="pt")["input_ids"]
    wanted, mask, out = 0.0, inputs["attention_mask"], model(**inputs)
    assert out.kept["language.2"].shape[1] < inputs["input_ids"].shape[1]
    for token in ids[0]:
        wanted += float(out.logits[0, -1].log_softmax(-1)[token])
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        out = model(input_ids=token.view(1, 1), attention_mask=mask, past_key_values=out.past_key_values)
    score = artifact.scores(choices([1, MARKED, 3]))[len(CHOICES)]
    assert score.log_probability == pytest.approx(wanted, abs=2e-3)
    assert score.log_probability != pytest.approx(float(likelihood(MARKED, said)[0].sum()), abs=2e-3)


def test_a_continuation_is_told_by_the_task_or_stands_without_a_document(dense):
    told = requests("loglikelihood", (DOCUMENTS[3]["question"], lambda document: document["question"][:5], (), 3))
    bare = copy.deepcopy(told)
    bare[0].arguments = (DOCUMENTS[3]["question"], "where")
    assert dense.scores(told) == dense.scores(bare)


def test_a_continuation_without_words_is_refused(dense):
    with pytest.raises(InputError, match="empty-continuation"):
        dense.loglikelihood(requests("loglikelihood", ("what is it?", " ", (), 0)))


# generate_until_multi_round ------------------------------------------------------------------------------------------


def test_rounds_go_on_with_what_the_task_asks_next(dense):
    seen = []

    def next_round(document, previous_output, round_idx, previous_round_info):
        seen.append((document["question"], list(previous_output), round_idx, previous_round_info))
        if round_idx == 2:
            return None, None, True, [*previous_output, "over"], None
        return DOCUMENTS[4]["images"], DOCUMENTS[4]["question"], False, previous_output, "state"

    asked = requests("generate_until_multi_round", (DOCUMENTS[0]["question"], GREEDY, (next_round,), 0))
    first, second = answer(reference(), 0), answer(reference(), 4)
    assert dense.generate_until_multi_round(asked) == [[first, second, "over"]]
    assert seen == [("what is it?", [first], 1, None), ("what is it?", [first, second], 2, "state")]


# What it is given ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llava", "llava_onevision", "qwen2_5_vl", "smolvlm"])
def test_every_family_takes_a_batch_with_and_without_images(adapter, family):
    model = around(adapter, *support.build(family))
    model.batch_size = 4
    alone = [model.generate_until(questions(GREEDY, [number]))[0] for number in range(4)]
    assert model.generate_until(questions(GREEDY, [0, 1, 2, 3])) == alone
    alone = [score for number in range(4) for score in model.scores(choices([number]))]
    for one, other in zip(alone, model.scores(choices(range(4))), strict=True):
        assert one.log_probability == pytest.approx(other.log_probability, abs=2e-3)


def test_a_video_is_refused(dense):
    dense.task_dict["video"] = {SPLIT: [{"images": ["a.mp4"]}]}
    asked = questions(GREEDY, [0])[0]
    asked.arguments = (*asked.arguments[:3], 0, "video", SPLIT)
    with pytest.raises(InputError, match=r"no-image.*\n.*\n.*a\.mp4"):
        dense.generate_until([asked])


@pytest.mark.parametrize(
    ("arguments", "slug", "names"),
    [
        ("", "bad-model-args", "artifact=DIR or pretrained=MODEL"),
        ("artifact=a,pretrained=b", "bad-model-args", "artifact, pretrained"),
        ("artifact=a,policy=fastv", "bad-model-args", "artifact, policy"),
        ("artifact=a,dtype=float16", "bad-model-args", "artifact, dtype"),
        ("pretrained=a,target=ort", "bad-model-args", "policy=POLICY"),
        ("pretrained=a,max_lenght=3,polcy=x", "unknown-argument", "max_lenght, polcy"),
        ("pretrained=a,batch_size=auto", "bad-batch-size", "auto"),
        ("pretrained=a,batch_size=0", "bad-batch-size", "0"),
        (f"pretrained={MODEL},dtype=float8", "unknown-dtype", "float8"),
        (f"pretrained={MODEL},device=abacus", "unknown-device", "abacus"),
    ],
)
def test_wrong_arguments_are_refused_by_name(adapter, arguments, slug, names):
    with pytest.raises(ArgumentError, match=slug) as caught:
        opened(adapter, arguments)
    assert names in caught.value.render()


def test_a_model_without_a_processor_is_refused(adapter, tmp_path):
    reference().save_pretrained(tmp_path)
    with pytest.raises(ArgumentError, match="no-processor"):
        opened(adapter, f"pretrained={tmp_path}")


# How it is found -----------------------------------------------------------------------------------------------------


def test_the_registry_of_lmms_eval_gets_a_class_of_the_simple_form(adapter, dense):
    """`opened` took it from there."""
    assert (adapter.manifest().model_id, adapter.manifest().chat_class_path) == ("tvc", None)
    assert isinstance(dense, importlib.import_module("lmms_eval.api.model").lmms)
    assert dense.is_simple


def test_the_entry_point_names_the_manifest():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"]["lmms_eval.models"] == {"tvc": f"{ADAPTER}:manifest"}
    assert any(line.startswith("lmms-eval") for line in project["optional-dependencies"]["lmms"])


def test_a_cleaned_model_is_opened_again(dense):
    before = dense.generate_until(questions(GREEDY, [0]))
    dense.clean()
    assert dense._opened is None
    assert dense.generate_until(questions(GREEDY, [0])) == before


def test_without_lmms_eval_the_adapter_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, ADAPTER, raising=False)
    monkeypatch.setitem(sys.modules, "lmms_eval.api.model", None)
    with pytest.raises(ArgumentError, match="no-lmms-eval") as caught:
        importlib.import_module(ADAPTER)
    assert "pip install 'tvc[lmms]'" in caught.value.fix
