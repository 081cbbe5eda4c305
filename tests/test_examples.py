"""What the README and the examples say is run as it stands."""

from __future__ import annotations

import functools
import json
import pathlib
import re
import sys

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import support
import tvc
from tvc.evaluation import scenes
from tvc.evaluation.answering import ask
from tvc.evaluation.tasks import Example, SceneTask, batches
from tvc.policy import load_policy, presets
from tvc.policy.words import preset_table
from tvc.runtime.prompts import prepared

ROOT = pathlib.Path(__file__).parent.parent
MODEL = ROOT / "examples" / "models" / "tiny-llava"
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_bundled_model_is_small_and_whole() -> None:
    files = {path.name for path in MODEL.iterdir()}
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 12e6
    assert {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "processor_config.json",
        "chat_template.jinja",
    } <= files
    model = transformers.AutoModelForImageTextToText.from_pretrained(MODEL)
    assert 1e6 <= sum(weight.numel() for weight in model.parameters()) <= 6e6
    assert {weight.dtype for weight in model.parameters()} == {torch.float16}
    config = model.config
    assert config.image_seq_length >= 144
    assert min(config.vision_config.num_hidden_layers, config.text_config.num_hidden_layers) >= 6


def test_the_bundled_model_answers_questions_about_scenes_it_never_saw() -> None:
    model = transformers.AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32).eval()
    processor = transformers.AutoProcessor.from_pretrained(MODEL)
    right: dict[str, list[bool]] = {}
    for _, examples in batches(SceneTask(180, seed=12345), 0, 30):
        replies = ask(model, processor, examples, torch.device("cpu"), torch.float32, 8)
        for example, reply in zip(examples, replies, strict=True):
            right.setdefault(example.kind, []).append(reply.text == example.answers[0])
    # 30 questions of a kind: bounds below what is measured on many (benchmarks/results), above what is left by chance.
    assert all(sum(several) >= 20 for several in right.values()), right
    assert sum(map(sum, right.values())) >= 153


def test_the_readme_lists_the_presets() -> None:
    """As `tvc policies list --markdown` writes them."""
    listed = re.search(r"<!-- presets -->\n(.*?)\n<!-- /presets -->", README, flags=re.DOTALL)
    assert listed is not None
    assert listed.group(1) == preset_table([load_policy(name) for name in presets()])


def test_the_readme_example_runs(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = re.search(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert code is not None
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    exec(compile(code.group(1), "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "average visual tokens per decoder layer" in printed
    assert "[' left']" in printed
    assert (tmp_path / "out" / "fastv" / "tvc.json").is_file()


def test_the_readme_tells_the_accuracies_that_were_measured() -> None:
    script = support.script("benchmarks/accuracy.py")
    told = README.split(script.MARKS[0])[1].split(script.MARKS[1])[0]
    assert told.strip() == script.summary()


def test_rows_of_policies_that_are_asked_anew_take_the_place_of_theirs(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = support.script("benchmarks/accuracy.py")
    (tmp_path / "results").mkdir()
    before = script._result("accuracy")
    (tmp_path / "results" / "accuracy.json").write_text(json.dumps(before))
    monkeypatch.setattr(script, "HERE", tmp_path)
    theirs = [row for row in before["rows"] if row["policy"] == "fastv"]
    made = {
        "rows": [before["rows"][0], *({**row, "accuracy": 0.125} for row in theirs[:2])],
        "refused": [{"policy": "fastv", "budget": "5%", "reason": "too few"}],
        "facts": {**before["facts"], "budget_unit": "tokens of another kind"},
        "environment": {"cpu": "another"},
    }
    monkeypatch.setattr(script, "evaluate", lambda *_: made)
    script.again(["fastv"], 600, tmp_path)
    after = json.loads((tmp_path / "results" / "accuracy.json").read_text())
    assert [row["accuracy"] for row in after["rows"] if row["policy"] == "fastv"] == [0.125, 0.125]
    others = [row for row in before["rows"] if row["policy"] != "fastv"]
    assert [row for row in after["rows"] if row["policy"] != "fastv"] == others
    assert made["refused"][0] in after["refused"]
    assert after["again"]["fastv"] == {"cpu": "another"}
    assert "tokens of another kind" in (tmp_path / "results" / "accuracy.md").read_text()
    with pytest.raises(SystemExit, match="the study has no fastvv"):
        script.again(["fastvv"], 600, tmp_path)
    made["rows"][0] = {**before["rows"][0], "accuracy": 0.5}
    with pytest.raises(SystemExit, match="run all of them anew"):
        script.again(["fastv"], 600, tmp_path)


def test_what_kept_tokens_show_is_counted() -> None:
    script = support.script("benchmarks/seen.py")
    box = (0, 0, scenes.SIDE // 2, scenes.SIDE // 2)  # the upper left quarter
    drawn = scenes.Scene(
        np.zeros((scenes.SIDE, scenes.SIDE, 3), np.uint8), (scenes.Thing("1", "red", box),), None, None
    )
    asked = scenes.Question("what", "what is red?", "1", (box,))
    kept = np.array([[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]], bool)
    seen = script.look(drawn, asked, kept.ravel(), script.View(4, 4))
    assert seen == script.Seen(
        left=3, things=pytest.approx(2 / 3), known=1, asked=0.5, blind=0, clumped=pytest.approx((1 / 3 + 1 / 5) / 3)
    )
    assert script.look(drawn, asked, ~kept.ravel(), script.View(2, 8)).blind == 0
    unseen = kept.copy()
    unseen[0] = False
    assert script.look(drawn, asked, unseen.ravel(), script.View(4, 4)).blind == 1


def test_the_readme_policy_loads() -> None:
    from tvc.policy.load import load_policy

    text = re.search(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
    assert text is not None
    policy = load_policy(text.group(1))
    assert policy.name == "mine"
    assert len(policy.steps) == 1


def test_the_bundled_scene_is_the_one_of_the_demo(tmp_path: pathlib.Path) -> None:
    demo = support.script("examples/demo.py")
    images = ROOT / "examples" / "images"
    drawn, questions = demo.draw(images / "astronaut.jpg", 4, tmp_path / "scene.png")
    with Image.open(images / "scene.png") as committed:
        difference = np.abs(np.asarray(committed, int) - np.asarray(drawn, int))
    assert difference.max() <= 2  # decoders of JPEG differ by a step
    assert [question.kind for question in questions] == list(scenes.KINDS)


@pytest.mark.parametrize("targets", [("torch",), pytest.param(("torch", "ort"), marks=pytest.mark.conformance)])
def test_the_demo_prints_answers_and_costs_and_writes_the_overlays(
    targets: tuple[str, ...],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    demo = support.script("examples/demo.py")
    monkeypatch.setattr(demo, "TARGETS", targets)
    monkeypatch.setattr(demo, "REPEATS", 1)
    monkeypatch.setattr(demo, "POLICIES", {"visionzip": demo.POLICIES["visionzip"]})  # each takes half a minute
    monkeypatch.setattr(tvc, "compile", functools.partial(tvc.compile, verify=False))  # as other tests do it
    monkeypatch.setattr("sys.argv", ["demo.py", "--output", str(tmp_path), "--prompt", "what number is on the sign?"])
    demo.main()
    printed = capsys.readouterr().out
    for policy in ("dense", *demo.POLICIES):
        for target in demo.TARGETS:
            assert re.search(rf"\b{policy}\s*│\s*{target}\b", printed), (policy, target)
    assert "what dense and compiled models answer" in printed
    for policy in demo.POLICIES:
        assert (tmp_path / f"{policy}.png").stat().st_size > 10_000


def test_a_reply_is_as_sure_as_its_least_probable_token() -> None:
    """Against one run over the prompt and the reply, a sample at a time."""
    script = support.script("examples/two_resolutions.py")
    model = transformers.AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32).eval()
    processor = transformers.AutoProcessor.from_pretrained(MODEL)
    ((_, examples),) = batches(SceneTask(7, seed=5), 0, 7)
    replies, lengths = script.ask(model, processor, examples), set()
    for example, reply in zip(examples, replies, strict=True):
        inputs = prepared(processor, example.image, example.question)
        begins = inputs["input_ids"].shape[1]
        ids = model.generate(**inputs, max_new_tokens=script.NEW_TOKENS, do_sample=False)
        assert processor.decode(ids[0, begins:], skip_special_tokens=True).strip() == reply.text
        with torch.no_grad():
            logits = model(ids, pixel_values=inputs["pixel_values"]).logits[0, begins - 1 : -1]
        chances = logits.softmax(1).gather(1, ids[0, begins:, None])
        assert reply.sure == pytest.approx(float(chances.min()), abs=1e-4)
        lengths.add(len(chances))
    assert len(lengths) > 1  # so that some replies of the batch are filled up


def test_what_is_unsure_is_asked_again() -> None:
    script = support.script("examples/two_resolutions.py")
    first = [script.Said("red", 0.9), script.Said("blue", 0.5), script.Said("4", 0.2), script.Said("7", 0.6)]
    second = [script.Said("blue", 1.0), script.Said("green", 0.9), script.Said("5", 0.1), script.Said("8", 1.0)]
    asked = [Example(Image.new("RGB", (2, 2)), "", answers, "") for answers in (("red",), ("green",), ("4",), ("7",))]
    for bound, expected in ((0.0, (0.75, 0.0)), (0.5, (0.5, 0.25)), (0.6, (0.75, 0.5)), (2.0, (0.25, 1.0))):
        assert script.told(first, second, asked, bound) == expected


@pytest.mark.conformance  # the parts of the script are tested above
def test_a_picture_is_asked_about_twice_where_the_first_reply_is_unsure(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = support.script("examples/two_resolutions.py")
    drawn, question = scenes.example("test", 0, 3)
    drawn.image.save(tmp_path / "scene.png")
    options = ["--coarse", "uniform", "--image", str(tmp_path / "scene.png"), "--prompt", question.text, "--halve"]
    monkeypatch.setattr(sys, "argv", ["two_resolutions", *options, "--bound", "1.1"])
    script.main()
    first, second = (line for line in capsys.readouterr().out.splitlines() if ": " in line)
    assert first.startswith("first: ")
    assert second.startswith(f"second: {question.answer} (")
