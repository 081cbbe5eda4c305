"""A whole evaluation of a tiny random model: replies against its own `generate`, kills, and what is written."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import support
import tvc
from tvc.errors import ArgumentError, ModelError, PolicyError
from tvc.evaluation.records import Records
from tvc.evaluation.study import Options, evaluate
from tvc.evaluation.tasks import FileTask
from tvc.runtime.prompts import prepared

KEEP_ALL = """
version: 1
name: keep-all
steps:
  - at: language.1
    select: {stride: {keep: 100%}}
    rest: drop
"""
QUICK = Options(budgets=("50%",), seeds=2, batch_size=4, new_tokens=3, verify=False)
ALONE = dataclasses.replace(QUICK, baselines=False)  # each baseline would be compiled


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return support.save_model("llava", tmp_path_factory.mktemp("eval") / "model")


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Six questions of unequal length; answers are what the model says to some of them."""
    folder = tmp_path_factory.mktemp("questions")
    rows = []
    for number in range(6):
        support.photo(number).save(folder / f"{number}.png")
        question = "what is it?" + " and where?" * (number % 3)
        kind = "odd" if number % 2 else "even"
        rows.append({"image": f"{number}.png", "question": question, "answer": "nothing", "kind": kind})
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return FileTask(path)


@pytest.fixture(scope="module")
def result(model, task, tmp_path_factory):
    folder = tmp_path_factory.mktemp("result")
    return folder, evaluate(model, ["fastv"], task, folder, QUICK)


def replies(folder, name):
    lines = (folder / "answers" / f"{name}.jsonl").read_text().splitlines()[1:]
    return [json.loads(line) for line in lines]


def alone(model, processor, example):
    """The model's reply to one question, by itself."""
    inputs = prepared(processor, example.image, example.question)
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return processor.decode(ids, skip_special_tokens=True).strip(), int(ids[0])


def test_replies_are_those_of_the_model_asked_one_by_one(model, task, result):
    folder, _ = result
    dense, processor = support.build("llava")
    half = tvc.load_policy("fastv").with_settings(["steps.0.select.top.keep=50%"])
    compiled = tvc.compile(dense, half, verify=False, processor=processor)
    for name, one in (("dense", dense), ("fastv-50-torch", compiled)):
        kept = [(reply["text"], reply["first"]) for reply in replies(folder, name)]
        assert kept == [alone(one, processor, task[index]) for index in range(len(task))]


def test_rows_hold_every_policy_and_the_baselines(task, result):
    folder, made = result
    names = [(row["policy"], row["seeds"]) for row in made["rows"]]
    assert names == [("dense", 1), ("fastv", 1), ("random", 2), ("uniform", 1)]
    rows = {row["policy"]: row for row in made["rows"]}
    assert all(row["examples"] == 6 for row in made["rows"])
    assert rows["dense"]["flops_ratio"] == rows["dense"]["kv_ratio"] == rows["dense"]["agreement"] == 1
    assert rows["uniform"]["kv_ratio"] < rows["fastv"]["kv_ratio"] < 1
    assert json.loads((folder / "results.json").read_text())["rows"][0]["policy"] == "dense"
    page = (folder / "results.md").read_text()
    assert "| fastv | 50% |" in page
    assert "even | odd" in page
    assert (folder / "accuracy.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.conformance
def test_keeping_all_says_what_the_dense_model_says(model, task, tmp_path):
    everything = dataclasses.replace(ALONE, budgets=("as-written",))
    made = evaluate(model, [KEEP_ALL], task, tmp_path, everything)
    row = next(row for row in made["rows"] if row["policy"] == "keep-all")
    assert row["agreement"] == 1
    assert [r["text"] for r in replies(tmp_path, "keep-all-as-written-torch")] == [
        r["text"] for r in replies(tmp_path, "dense")
    ]


def test_accuracy_counts_right_replies_by_kind(model, task, result, tmp_path):
    """The same questions with answers that fit: the model's own replies to the first three."""
    folder, _ = result
    said = [reply["text"] for reply in replies(folder, "dense")]
    rows = [
        {**row, "image": str(task.path.parent / row["image"]), "answer": said[n] if n < 3 else "nothing at all"}
        for n, row in enumerate(map(json.loads, task.path.read_text().splitlines()))
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({**row, "answer": row["answer"] or "-"}) + "\n" for row in rows))
    made = evaluate(model, [], FileTask(path), tmp_path / "out", ALONE)
    (dense,) = made["rows"]
    right = [reply["right"] for reply in replies(tmp_path / "out", "dense")]
    assert right[:3] == [bool(text) for text in said[:3]]
    assert dense["accuracy"] == sum(right) / 6
    assert dense["kinds"] == {"even": sum(right[::2]) / 3, "odd": sum(right[1::2]) / 3}


def test_a_killed_evaluation_goes_on_where_it_was(model, task, result, tmp_path, monkeypatch):
    folder, whole = result
    asked = 0
    append = Records.append

    def dying(self, name, head, records):
        nonlocal asked
        append(self, name, head, records)
        asked += len(records)
        if asked >= 10:
            raise Killed

    monkeypatch.setattr(Records, "append", dying)
    with pytest.raises(Killed):
        evaluate(model, ["fastv"], task, tmp_path, ALONE)
    assert not (tmp_path / "results.json").exists()
    monkeypatch.setattr(Records, "append", append)
    counted = []
    again = evaluate(
        model, ["fastv"], task, tmp_path, ALONE, lambda what, done, total: counted.append((what, done, total))
    )
    assert again["rows"] == [row for row in whole["rows"] if row["policy"] not in ("random", "uniform")]
    assert not any(what == "asking dense" for what, _, _ in counted)
    assert ("asking fastv-50-torch", 10, 12) in counted  # four of its six were there
    made = sorted((tmp_path / "answers").iterdir())
    assert [path.stem for path in made] == ["dense", "fastv-50-torch"]
    for path in made:
        assert (folder / "answers" / path.name).read_text() == path.read_text()


def test_another_task_in_the_same_directory_is_refused(model, task, result, tmp_path):
    folder, _ = result
    with pytest.raises(ArgumentError, match="another evaluation"):
        evaluate(model, ["fastv"], FileTask(task.path, 3), folder, QUICK)


@pytest.mark.conformance
def test_targets_are_compared_reply_by_reply(model, task, tmp_path):
    both = Options(**{**vars(QUICK), "targets": ("torch", "torchscript"), "seeds": 1})
    made = evaluate(model, [], task, tmp_path, both)
    assert [(row["policy"], row["target"]) for row in made["rows"][1:]] == [
        (policy, target) for policy in ("random", "uniform") for target in both.targets
    ]
    assert [(entry["policy"], entry["same"], entry["replies"]) for entry in made["agreement"]] == [
        ("random", 6, 6),
        ("uniform", 6, 6),
    ]


@pytest.mark.conformance
def test_a_policy_that_the_model_cannot_run_is_listed(model, task, tmp_path):
    deep = tvc.load_policy("fastv").with_settings(["before_layer=40"])
    made = evaluate(model, [deep], task, tmp_path, QUICK)
    assert [(entry["policy"], entry["budget"]) for entry in made["refused"]] == [("fastv", "50%")]
    assert "Not run: fastv at 50%" in (tmp_path / "results.md").read_text()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"seeds": 0}, ArgumentError),
        ({"batch_size": 0}, ArgumentError),
        ({"budgets": ()}, ArgumentError),
        ({"budgets": ("0.5",)}, ArgumentError),
        ({"targets": ()}, ArgumentError),
        ({"targets": ("tpu",)}, ArgumentError),
        ({"device": "cuda:77"}, ArgumentError),
        ({"dtype": "int8"}, ArgumentError),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(model, task, tmp_path, change, error):
    with pytest.raises(error):
        evaluate(model, ["fastv"], task, tmp_path / "out", Options(**{**vars(QUICK), **change}))
    assert not (tmp_path / "out").exists()


def test_a_bad_policy_or_model_is_refused(model, task, tmp_path):
    with pytest.raises(PolicyError):
        evaluate(model, ["fastvv"], task, tmp_path / "out", QUICK)
    with pytest.raises(ModelError):
        evaluate(tmp_path, ["fastv"], task, tmp_path / "out", QUICK)
    (bare := tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((model / name).read_bytes())
    with pytest.raises(ModelError, match="no processor"):
        evaluate(bare, ["fastv"], task, tmp_path / "out", QUICK)
