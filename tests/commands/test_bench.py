"""tvc bench with untouched models in the place of artifacts."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

import support
import tvc
from tvc.cli import build_app


@pytest.fixture
def artifacts(tmp_path, monkeypatch):
    """A saved model and a photo; `tvc.load` gives the same model for any directory."""
    support.save_model("llava", tmp_path / "model")
    support.photo(0).save(tmp_path / "photo.png")
    model, processor = support.build("llava")
    model.processor = processor
    monkeypatch.setattr(tvc, "load", lambda path: model, raising=False)
    return tmp_path


def run(*arguments: object):
    return CliRunner().invoke(build_app(), ["bench", *(str(part) for part in arguments)])


def test_rows_say_phase_variant_and_speedup(artifacts):
    out = artifacts / "rows.json"
    done = run(
        "a/one", "b/one", "--model", artifacts / "model", "--image", artifacts / "photo.png", "--repeats", 2, "-o", out
    )
    assert done.exit_code == 0, done.output
    content = json.loads(out.read_text())
    named = [(row["phase"], row["variant"]) for row in content["rows"]]
    assert named == [(phase, name) for phase in ("prefill", "decode") for name in ("one", "b/one", "dense")]
    assert all(row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] for row in content["rows"])
    assert content["environment"]["torch_threads"] >= 1
    assert done.stdout.split()[:4] == ["phase", "variant", "median", "ms"]


def test_without_the_untouched_model_there_is_no_speedup(artifacts):
    done = run("one", "--image", artifacts / "photo.png", "--repeats", 1, "--json")
    assert [row["speedup"] for row in json.loads(done.stdout)["rows"]] == [None, None]
