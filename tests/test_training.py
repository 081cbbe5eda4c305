"""The script that trained the bundled model: its shortcuts against Hugging Face's own forward pass, kills, labels."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import support
from tvc.evaluation import scenes

MODEL = pathlib.Path(__file__).parent.parent / "examples" / "models" / "tiny-llava"


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def script() -> Any:
    made = support.script("examples/train_tiny_llava.py")
    made.AttentionInterface.register("shared_prefix", made.shared_prefix_attention)
    return made


@pytest.fixture(scope="module")
def learner(script: Any) -> Any:
    torch.manual_seed(3)
    tokenizer = script.make_tokenizer()
    made = script.Learner(script.make_model(tokenizer, 64, (2, 2)), script.TokenIds.of(tokenizer)).eval()
    made.vlm.set_attn_implementation("shared_prefix")
    return made


def test_questions_that_share_a_picture_are_answered_as_alone(script: Any, learner: Any) -> None:
    """Logits of several questions in one pass equal those of the processor's whole prompt through the whole model."""
    tokenizer = script.make_tokenizer()
    processor = script.make_processor(tokenizer)
    batch = script.Batches(script.TokenIds.of(tokenizer), "test", 5, 2, 4, 1)[0]
    with torch.no_grad():
        logits, targets, _ = learner.answer(learner.see(batch)[0], batch)
    learner.vlm.set_attn_implementation("sdpa")
    for place in range(2):
        drawn = scenes.scene("test", 5, place)
        asked = scenes.questions(drawn, 5, place)
        for number in range(4):
            question = next(asked)
            chat = [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]},
                {"role": "assistant", "content": question.answer},
            ]
            inputs = processor(images=[drawn.image], text=[processor.apply_chat_template(chat)], return_tensors="pt")
            with torch.no_grad():
                whole = learner.vlm(**inputs).logits[0]
            ids = inputs["input_ids"][0]
            end = int((ids == tokenizer.eos_token_id).nonzero()[0])
            learned = targets[place, number]
            count = int((learned != script.IGNORED).sum())
            wanted = ids[end + 1 - count : end + 1]
            assert learned[learned != script.IGNORED].tolist() == wanted.tolist()
            assert tokenizer.decode(wanted, skip_special_tokens=True).strip() == question.answer
            expected = whole[end - count : end]
            found = logits[place, number][learned != script.IGNORED]
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    learner.vlm.set_attn_implementation("shared_prefix")


def test_pixels_are_those_of_the_processor(script: Any) -> None:
    tokenizer = script.make_tokenizer()
    batch = script.Batches(script.TokenIds.of(tokenizer), "train", 0, 3, 1, 1)[0]
    images = [scenes.scene("train", 0, place).image for place in range(3)]
    made = script.make_processor(tokenizer).image_processor(images=images, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(batch.pixels, made, atol=1e-5, rtol=0)


def test_labels_lie_inside_their_things(script: Any) -> None:
    for index in range(40):
        drawn = scenes.scene("train", 1, index)
        things, colours, contents = script.label(drawn)
        grid, tints = things.reshape(12, 12), colours.reshape(12, 12)
        marked = np.zeros((12, 12), bool)
        for one in drawn.things:
            left, top, right, bottom = one.box
            name, tint = scenes.THINGS.index(one.name), list(scenes.COLOURS).index(one.colour)
            inside = [
                (row, column)
                for row in range(12)
                for column in range(12)
                if left < 8 * column + 4 < right and top < 8 * row + 4 < bottom
            ]
            hit = [place for place in inside if grid[place] == 1 + name and tints[place] == 1 + tint]
            assert hit, "a thing without a labelled patch cannot be learned"
            assert contents[name * 6 + tint] == 1
            marked[tuple(zip(*inside, strict=True))] = True
        if drawn.sign_box is not None:
            left, top, right, bottom = drawn.sign_box
            marked[top // 8 : -(-bottom // 8), left // 8 : -(-right // 8)] = True
            numbers = contents[96:].reshape(2, 10).argmax(1)
            assert "".join(map(str, numbers)) == drawn.sign
        assert not grid[~marked].any()


def options(script: Any, folder: pathlib.Path) -> Any:
    parser = script.parser()
    small = ["--width", "64", "--layers", "2", "2", "--batch", "2", "--questions", "2", "--scale", "0.001"]
    return parser.parse_args([*small, "--state", str(folder), "--log-every", "1", "--device", "cpu"])


def test_a_killed_training_ends_with_the_weights_of_one_that_was_not(
    script: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "EXAMINED", 1)
    whole = script.train(options(script, tmp_path / "whole")).state_dict()
    log = script._log

    def dying(folder: pathlib.Path, row: dict[str, Any]) -> None:
        log(folder, row)
        if row["step"] == 6:
            raise Killed

    monkeypatch.setattr(script, "_log", dying)
    with pytest.raises(Killed):
        script.train(options(script, tmp_path / "killed"))
    monkeypatch.setattr(script, "_log", log)
    again = script.train(options(script, tmp_path / "killed")).state_dict()
    for name, weight in whole.items():
        assert torch.equal(weight, again[name]), name
    rows = [json.loads(line) for line in (tmp_path / "killed" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert {row["stage"] for row in rows} == {"see", "look up", "answer"}
    assert {"overall"} < set(rows[-1]["accuracy"]) <= {*scenes.KINDS, "overall"}


def test_what_is_saved_loads_in_half_precision(script: Any, learner: Any, tmp_path: pathlib.Path) -> None:
    script.save(learner.vlm, tmp_path)
    learner.vlm.float()
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert {weight.dtype for weight in loaded.parameters()} == {torch.float16}
    assert not any("patch_thing" in name or "contents" in name for name in loaded.state_dict())
    processor = transformers.AutoProcessor.from_pretrained(tmp_path)
    assert processor.tokenizer.padding_side == "left"


def test_the_bundled_files_are_those_of_the_script(script: Any, tmp_path: pathlib.Path) -> None:
    """Tokenizer, processor and template byte by byte; the weights by name and shape."""
    tokenizer = script.make_tokenizer()
    script.make_processor(tokenizer).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "processor_config.json", "chat_template.jinja"):
        assert (tmp_path / name).read_text() == (MODEL / name).read_text(), name
    defaults = script.parser().parse_args([])
    made = script.make_model(tokenizer, defaults.width, tuple(defaults.layers)).state_dict()
    kept = transformers.AutoModelForImageTextToText.from_pretrained(MODEL).state_dict()
    assert {name: weight.shape for name, weight in kept.items()} == {
        name: weight.shape for name, weight in made.items()
    }
