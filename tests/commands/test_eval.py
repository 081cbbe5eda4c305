"""tvc eval: a small run of the command, and what it says to mistakes."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

import support
from tvc.cli import build_app
from tvc.evaluation import variants


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return support.save_model("llava", tmp_path_factory.mktemp("eval") / "model")


def run(*arguments: object):
    done = CliRunner().invoke(build_app(), ["eval", *(str(part) for part in arguments)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def test_a_table_json_and_a_plot(model, tmp_path, monkeypatch):
    monkeypatch.setattr(variants, "BASELINES", ("uniform",))
    out = tmp_path / "out"
    quick = ("--budgets", "50%", "--examples", 6, "--seeds", 1, "--no-verify", "-o", out)
    done = run(model, "-p", "fastv", *quick)
    assert done.exit_code == 0, done.output
    head, *lines = done.stdout.splitlines()
    for kind in ("policy", "accuracy", "what", "colour", "count", "where", "relation", "read", "FLOPs", "KV"):
        assert kind in head
    assert [line.split()[0] for line in lines[:3]] == ["dense", "fastv", "uniform"]
    assert {path.name for path in out.iterdir()} == {
        "accuracy.png", "answers", "results.json", "results.md", "study.json",
    }  # fmt: skip
    again = run(model, "-p", "fastv", *quick, "--json")
    assert json.loads(again.stdout)["rows"] == json.loads((out / "results.json").read_text())["rows"]


@pytest.mark.parametrize(
    ("arguments", "slug"),
    [
        (("-p", "fastvv"), "unknown-preset"),
        (("-p", "fastv", "--budgets", "0.25"), "bad-budget"),
        (("-p", "fastv", "--budgets", ","), "bad-option"),
        (("-p", "fastv", "--match", "fuzzy"), "unknown-match"),
        (("-p", "fastv", "--target", "tpu"), "unknown-target"),
        (("-p", "fastv", "--questions", "absent.jsonl"), "bad-questions"),
    ],
)
def test_mistakes_end_in_five_lines(model, tmp_path, arguments, slug):
    done = run(model, *arguments, "-o", tmp_path / "out")
    assert done.exit_code == 2
    assert done.stdout == ""
    assert f" {slug}: " in done.stderr
    assert done.stderr.count("\n") == 5
    assert not (tmp_path / "out").exists()
