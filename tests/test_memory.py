"""Scores that remember earlier calls on the same cache: several turns against the published memory, a list of mean
tokens that goes on, written out here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import support
import tvc
from tvc.api import Prepared
from tvc.errors import InputError
from tvc.verification.check import compare

KEEP = 3
SITE = "language.0"
STATES = {"memory.language.0.0.total", "memory.language.0.0.frames"}
Inputs = dict[str, torch.Tensor]


class Made:
    def __init__(self, layers: int | None) -> None:
        self.model, self.processor = support.build("llava", layers=layers)
        self.prepared = Prepared(self.model, processor=self.processor)
        self.compiled = self.prepared.compile(tvc.load_policy("stc", [f"keep={KEEP}"]), verify=False)
        self.token = support.tokenizer("llava").convert_tokens_to_ids(support.family_record("llava").visual)
        self.pixels = support.inputs("llava")["pixel_values"].shape[1:]
        self.visual = int((support.inputs("llava")["input_ids"] == self.token).sum())

    def turn(self, seed: int, images: Sequence[int], words: Sequence[int]) -> Inputs:
        """A call of samples with so many images and so many words around each, padded on the left."""
        generator = torch.Generator().manual_seed(seed)
        rows = []
        for count, number in zip(images, words, strict=True):
            text = torch.randint(40, 90, (count + 1, number), generator=generator).tolist()
            rows.append([*text[0], *(token for part in text[1:] for token in (*[self.token] * self.visual, *part))])
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        made = {"input_ids": ids, "attention_mask": mask}
        if sum(images):  # each brighter and coarser than the one before, so that their means differ
            noise = torch.randn(sum(images), *self.pixels, generator=generator)
            made["pixel_values"] = noise * torch.rand(sum(images), 1, 1, 1, generator=generator) * 3 + seed % 3 - 1
        return made

    def features(self, turn: Inputs, images: Sequence[int]) -> list[list[torch.Tensor]]:
        """Per sample the tokens [V, D] of each of its images, by the untouched model."""
        if "pixel_values" not in turn:
            return [[] for _ in images]
        with torch.no_grad():
            output = self.model.model.get_image_features(turn["pixel_values"])
        found = iter(getattr(output, "pooler_output", output))
        return [
            [next(found).double().reshape(-1, self.model.config.text_config.hidden_size) for _ in range(n)]
            for n in images
        ]


@pytest.fixture(scope="module")
def made() -> Made:
    return Made(2)  # enough for a step at the entry


@pytest.fixture(scope="module")
def deep() -> Made:
    return Made(None)


def published(frames: Sequence[torch.Tensor], memory: list[torch.Tensor]) -> list[list[int]]:
    """The tokens [V, D] that stay of each frame; `memory` gets its mean token."""
    left = []
    for frame in frames:
        channels = frame.var(0, correction=0).sort(stable=True).indices[: frame.shape[1] // 2]
        memory.append(frame.mean(0))
        unit = torch.nn.functional.normalize(frame[:, channels], dim=1)
        anchors = unit.mean(0), torch.nn.functional.normalize(torch.stack(memory).mean(0)[channels], dim=0)
        alike = sum(
            (-(unit - anchor).square().sum(1) / (2 * width)).exp()
            for anchor in anchors
            for width in (1 / 8, 1 / 4, 1 / 2, 1, 2)
        )
        left.append(sorted(alike.sort(stable=True).indices[:KEEP].tolist()))
    return left


def kept(answer: Any, turn: Inputs, start: int, token: int) -> list[list[int]]:
    """Per sample the visual tokens that stay of a call which begins at column `start`, numbered through the call."""
    found = []
    for row, places in enumerate(answer.kept[SITE].tolist()):
        slots = (turn["input_ids"][row] == token).nonzero().flatten().tolist()
        found.append([number for number, slot in enumerate(slots) if slot + start in places])
    return found


def numbered(frames: list[list[int]], size: int) -> list[int]:
    return [size * number + token for number, own in enumerate(frames) for token in own]


def talk(compiled: Any, turns: Sequence[Inputs]) -> list[Any]:
    answers: list[Any] = []
    mask = torch.empty(len(turns[0]["input_ids"]), 0, dtype=torch.int64)
    for turn in turns:
        mask = torch.cat([mask, turn["attention_mask"]], 1)
        cache = answers[-1].past_key_values if answers else None
        answers.append(compiled(**{**turn, "attention_mask": mask}, past_key_values=cache))
    return answers


def test_turns_keep_what_a_memory_of_all_frames_so_far_keeps(made: Made) -> None:
    """Three samples of different lengths; one shows nothing in the second turn, another nothing in the first."""
    images = ([1, 2, 0], [2, 0, 1], [1, 1, 2])
    words = ([3, 7, 5], [2, 9, 4], [5, 3, 8])
    turns = [made.turn(seed, *both) for seed, both in enumerate(zip(images, words, strict=True))]
    answers = talk(made.compiled, turns)
    memories: list[list[torch.Tensor]] = [[], [], []]
    start, forgetful = 0, []
    for turn, numbers, answer in zip(turns, images, answers, strict=True):
        shown = made.features(turn, numbers)
        want = [numbered(published(own, memory), made.visual) for own, memory in zip(shown, memories, strict=True)]
        forgetful += [numbered(published(own, []), made.visual) != one for own, one in zip(shown, want, strict=True)]
        assert kept(answer, turn, start, made.token) == want
        marks = answer.past_key_values.marks
        assert marks["memory.language.0.0.frames"].tolist() == [len(memory) for memory in memories]
        total = torch.stack([sum(memory, torch.zeros(64, dtype=torch.float64)) for memory in memories])
        torch.testing.assert_close(marks["memory.language.0.0.total"].double(), total, rtol=1e-5, atol=1e-5)
        start += turn["input_ids"].shape[1]
    assert any(forgetful)  # else nothing here would hang on the memory
    one, two = (answer.past_key_values.marks for answer in answers[:2])
    for name in STATES:  # the second sample showed nothing
        assert torch.equal(one[name][1], two[name][1])


def test_two_turns_equal_one_call(made: Made) -> None:
    first, second = made.turn(3, [2], [4]), made.turn(4, [1], [6])
    whole = {name: torch.cat([first[name], second[name]], 0 if name == "pixel_values" else 1) for name in first}
    together, (one, two) = made.compiled(**whole), talk(made.compiled, [first, second])
    assert torch.cat([one.kept[SITE], two.kept[SITE]], 1).tolist() == together.kept[SITE].tolist()
    torch.testing.assert_close(two.logits, together.logits, rtol=1e-5, atol=5e-5)
    for name in STATES:
        torch.testing.assert_close(two.past_key_values.marks[name], together.past_key_values.marks[name])


def test_a_call_without_a_past_remembers_nothing(made: Made) -> None:
    first, second = made.turn(1, [2], [4]), made.turn(2, [1], [6])
    made.compiled(**first)
    answer = made.compiled(**second)
    (want,) = made.features(second, [1])
    assert kept(answer, second, 0, made.token) == [numbered(published(want, []), made.visual)]


def test_decode_steps_hand_the_memory_on(made: Made) -> None:
    turn = made.turn(5, [1, 2], [4, 2])
    out = made.compiled.generate(
        **turn, max_new_tokens=4, do_sample=False, eos_token_id=None, return_dict_in_generate=True
    )
    before = made.compiled(**turn).past_key_values.marks
    assert set(before) == STATES
    for name in STATES:
        assert torch.equal(out.past_key_values.marks[name], before[name])


def test_generation_goes_on_with_a_clip_of_a_later_turn(made: Made) -> None:
    """As a chat does it: the whole conversation's tokens, the new pictures, and the cache of the answer before."""
    first, second = made.turn(5, [1, 2], [4, 2]), made.turn(6, [2, 1], [3, 5])
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    said = made.compiled.generate(**first, **options)
    cache, seen = said.past_key_values, said.sequences[:, :-1]  # the last token has not been read yet
    ids = torch.cat([seen, second["input_ids"]], 1)
    mask = torch.nn.functional.pad(first["attention_mask"], (0, seen.shape[1] - first["input_ids"].shape[1]), value=1)
    mask = torch.cat([mask, second["attention_mask"]], 1)
    given = {"input_ids": ids, "attention_mask": mask, "pixel_values": second["pixel_values"]}
    out = made.compiled.generate(**given, past_key_values=cache, **options)
    want = []
    for one, other in zip(made.features(first, [1, 2]), made.features(second, [2, 1]), strict=True):
        want.append(torch.stack([frame.mean(0) for frame in (*one, *other)]).sum(0))
    marks = out.past_key_values.marks
    assert marks["memory.language.0.0.frames"].tolist() == [3, 3]
    torch.testing.assert_close(marks["memory.language.0.0.total"].double(), torch.stack(want), rtol=1e-5, atol=1e-5)


def test_beams_carry_the_memory_of_their_prompt(made: Made) -> None:
    """Three beams of two prompts; every row of the cache that the search leaves behind goes on with a turn."""
    first, images = made.turn(6, [2, 1], [4, 6]), [1, 1]
    out = made.compiled.generate(
        **first, max_new_tokens=4, do_sample=False, num_beams=3, eos_token_id=None, return_dict_in_generate=True
    )
    cache = out.past_key_values
    assert cache.marks["memory.language.0.0.frames"].tolist() == [2, 2, 2, 1, 1, 1]
    second = made.turn(7, images, [3, 5])
    rows = {name: value.repeat_interleave(3, 0) for name, value in second.items()}
    seen = torch.nn.functional.pad(
        first["attention_mask"], (0, cache.get_seq_length() - first["input_ids"].shape[1]), value=1
    )
    mask = torch.cat([seen.repeat_interleave(3, 0), rows["attention_mask"]], 1)
    start = cache.get_seq_length()
    answer = made.compiled(**{**rows, "attention_mask": mask}, past_key_values=cache)
    want = []
    for shown, new in zip(made.features(first, [2, 1]), made.features(second, images), strict=True):
        memory: list[torch.Tensor] = []
        published(shown, memory)
        want += [numbered(published(new, memory), made.visual)] * 3
    assert kept(answer, rows, start, made.token) == want


def test_a_cache_of_another_batch_is_refused(made: Made) -> None:
    first, second = made.turn(1, [1, 1], [4, 4]), made.turn(2, [1], [6])
    cache = made.compiled(**first).past_key_values
    with pytest.raises(InputError) as caught:
        made.compiled(**second, past_key_values=cache)
    assert caught.value.slug == "other-batch"
    assert "batch_select_indices" in caught.value.fix
    cache.batch_select_indices(torch.tensor([1]))
    assert made.compiled(**second, past_key_values=cache).logits.isfinite().all()


def test_a_cache_without_the_memory_is_refused(made: Made) -> None:
    """As one of the same policy with `memory: call`, which remembers nothing, leaves it."""
    turn = made.turn(1, [1], [4])
    cache = made.compiled(**turn).past_key_values
    cache.marks.clear()
    with pytest.raises(InputError) as caught:
        made.compiled(**turn, past_key_values=cache)
    assert caught.value.slug == "foreign-cache"


def test_verification_compares_a_later_call(made: Made) -> None:
    rows = compare(made.compiled, made.model, support.inputs("llava"), steps=2).comparisons
    assert all(row.passed for row in rows)
    later = {row.output for row in rows if row.name == "later call, batch 3"}
    assert {"selection", "plan", "kept", "memory", "logits.0", "logits.1"} <= later


def test_verification_sees_a_memory_that_is_lost(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second call starts from nothing: its memory is wrong, and what it keeps where that hangs on it."""
    run = made.compiled.engine.run

    def forgetting(component: str, given: Any) -> Any:
        return run(component, {n: torch.zeros_like(v) if n.startswith("past_memory") else v for n, v in given.items()})

    monkeypatch.setattr(made.compiled.engine, "run", forgetting)
    rows = compare(made.compiled, made.model, support.inputs("llava"), steps=2).comparisons
    wrong = {(row.name, row.output) for row in rows if not row.passed}
    assert ("later call, batch 3", "memory") in wrong
    assert {name for name, _ in wrong} <= {"later call, batch 3", "batch 1", "padded batch 3"}
    assert not [row for row in rows if not row.passed and row.output not in ("memory", "selection")]


def alike(one: Sequence[Any], other: Sequence[Any]) -> None:
    for here, there in zip(one, other, strict=True):
        assert here.kept[SITE].tolist() == there.kept[SITE].tolist()
        torch.testing.assert_close(here.logits, there.logits, rtol=1e-5, atol=1e-4)
        for name in STATES:
            torch.testing.assert_close(here.past_key_values.marks[name], there.past_key_values.marks[name])


@pytest.mark.parametrize(
    "target", ["ort", *(pytest.param(name, marks=pytest.mark.conformance) for name in ("torch", "pt2", "torchscript"))]
)
def test_artifacts_carry_the_same_memory_and_name_it(made: Made, target: str, tmp_path: Path) -> None:
    policy = tvc.load_policy("stc", [f"keep={KEEP}"])
    made.prepared.compile(policy, target, verify=False).save_pretrained(tmp_path / "out")
    turns = [made.turn(1, [1, 2], [3, 4]), made.turn(2, [2, 0], [5, 6]), made.turn(3, [1, 1], [2, 2])]
    alike(talk(tvc.load(tmp_path / "out"), turns), talk(made.compiled, turns))
    content = json.loads((tmp_path / "out" / "tvc.json").read_text())
    decoder = content["components"]["decoder"]
    assert {f"past_{name}" for name in STATES} <= set(decoder["inputs"])
    assert set(decoder["outputs"]) >= STATES
    described = {m["name"]: (m["sizes"], m["dtype"]) for m in content["runtime"]["shape"]["memories"]}
    assert described == {
        "past_memory.language.0.0.total": ([64], "float32"),
        "past_memory.language.0.0.frames": ([], "int64"),
    }
    readme = (tmp_path / "out" / "README.md").read_text()
    assert "`past_memory.language.0.0.total` [batch, 64] float32" in readme
    assert "`past_memory.language.0.0.frames` [batch] int64" in readme


NOVELTY = {"novelty": {"memory": "conversation"}}
LAST = {"attention": {"of": "last", "layer": "previous"}}


def step(at: str, score: Any, keep: str, **more: Any) -> dict[str, Any]:
    return {"at": at, "score": score, "select": {"top": keep}, **more}


def term(score: dict[str, Any]) -> dict[str, Any]:
    return {**score, "weight": 1.0, "normalize": "minmax"}


BESIDE: dict[str, dict[str, Any]] = {
    "deeper": {"steps": [step("language.2", NOVELTY, "50%")]},
    "with-attention": {
        "steps": [step("language.2", [term(NOVELTY), term(LAST), term({"attention": {"of": "raters"}})], "50%")]
    },
    "in-front-of-others": {
        "positions": "renumber",
        "steps": [
            step("language.1", NOVELTY, "80%", scope="sequence"),
            step("language.3", {"attention": {"of": "text", "layer": "previous"}}, "50%", scope="sequence"),
        ],
    },
    "in-front-of-an-exit": {
        "steps": [
            step("language.0", NOVELTY, "50%"),
            {"at": "language.3", "exit": {"when": {"score": LAST, "reduce": "max", "above": 0.03}}},
        ]
    },
    "merging": {"steps": [step("language.1", NOVELTY, "50%", rest={"merge": {"targets": "kept"}})]},
    "transitions": {
        "steps": [
            step("language.0", NOVELTY, "80%"),
            step("language.3", {"transition": {"layer": "previous"}}, "50%"),
        ]
    },
    "in-fractions": {"positions": {"stride": 64}, "steps": [step("language.0", NOVELTY, "50%")]},
}


@pytest.mark.conformance
@pytest.mark.parametrize("name", BESIDE)
def test_policies_with_a_memory_are_what_they_say_in_a_later_call(deep: Made, name: str) -> None:
    compiled = deep.prepared.compile({"version": 1, **BESIDE[name]}, verify=False)
    rows = compare(compiled, deep.model, support.inputs("llava"), steps=3).comparisons
    assert not [row for row in rows if not row.passed]
    assert "logits.2" in {row.output for row in rows if row.name.startswith("later call")}


@pytest.mark.conformance
@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3", "paligemma", "lfm2_vl", "idefics3", "llava_next"])
def test_families_are_verified_in_a_later_call(family: str) -> None:
    """Several rotary axes, windows and spans, a prompt that is seen whole, layers without attention, tiles."""
    model, processor = support.build(family)
    prepared = Prepared(model, processor=processor, inputs=None if processor is not None else support.inputs(family, 2))
    compiled = prepared.compile(tvc.load_policy("stc", [f"keep={KEEP}"]), verify=False)
    rows = compare(compiled, model, support.inputs(family), steps=2).comparisons
    assert not [row for row in rows if not row.passed]
    assert {"selection", "memory"} <= {row.output for row in rows if row.name.startswith("later call")}
