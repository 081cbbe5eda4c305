"""tvc compile, run and inspect, as a user types them."""

from __future__ import annotations

import json
import pathlib
import re

import pytest
import torch
from typer.testing import CliRunner

import support
import tvc
from tvc.cli import build_app


def run(*arguments):
    """(stdout, stderr) of a command that succeeds."""
    done = CliRunner().invoke(build_app(), [str(part) for part in arguments])
    assert done.exit_code == 0, done.stderr
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    support.photo(0, (131, 97)).save(path)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return support.save_model("llava", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def compiled(model, photo, tmp_path_factory):
    """(directory, stdout, stderr) of one compile with everything that takes a photo."""
    place = tmp_path_factory.mktemp("compiled") / "out"
    question = ("--image", photo, "--prompt", "what is it?")
    return place, *run("compile", model, "-p", "fastv", "--set", "keep=25%", "-o", place, *question)


def test_compile_writes_an_artifact_and_says_what_it_did(compiled):
    place, out, err = compiled
    steps = re.findall(r"^ *(\d+) (.+) \[\d+\.\d s]$", err, flags=re.MULTILINE)
    assert [int(number) for number, _ in steps] == list(range(1, len(steps) + 1))
    names = [name for _, name in steps]
    assert names[:2] == ["load", "survey"]
    assert names[-2:] == ["verify", f"write {place}"]
    assert out.startswith("fastv on llava: 16 visual + 64 text tokens")
    assert float(re.search(r"worst difference (\S+) \(", out).group(1)) < 1e-4
    assert f"wrote {place}: torch" in out
    loaded = tvc.load(place)
    assert loaded.verification["passed"]
    assert loaded.policy.policy.steps[0].at == "language.2"
    assert [layer.visual for layer in loaded.plan.layers] == [16, 16, 4, 4, 4, 4]


def test_run_answers_as_the_loaded_model_does(compiled, photo):
    place, *_ = compiled
    facts = json.loads(
        run("run", place, "--image", photo, "--prompt", "what is it?", "--json", "--max-new-tokens", 9)[0]
    )
    loaded = tvc.load(place)
    made = support.build_processor("llava")
    conversation = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}]
    text = made.apply_chat_template(conversation, add_generation_prompt=True)
    inputs = made(images=[support.photo(0, (131, 97))], text=[text], return_tensors="pt")
    ids = loaded.generate(**inputs, max_new_tokens=9, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert facts["tokens"] == ids.tolist()
    assert facts["prompt_tokens"] == inputs["input_ids"].shape[1]
    assert facts["text"] == made.decode(ids, skip_special_tokens=True).strip()
    plain, _ = run("run", place, "--image", photo, "--prompt", "what is it?", "--max-new-tokens", 9)
    streamed, _ = run("run", place, "--image", photo, "--prompt", "what is it?", "--max-new-tokens", 9, "--stream")
    assert plain.strip() == streamed.strip() == facts["text"]


def test_a_dry_run_shows_plan_and_policy_and_writes_nothing(model, photo, tmp_path):
    command = ("compile", model, "-p", "fastv", "-o", tmp_path / "out", "--dry-run")
    out, err = run(*command)
    plan, _, policy = out.partition("\n\nversion: ")
    assert plan.startswith("fastv on llava")
    assert "language 2-5  language.2" in plan
    assert tvc.load_policy(f"version: {policy}").steps[0].at == "language.2"
    assert not re.search(r"^ *1 load", err, flags=re.MULTILINE)
    facts = json.loads(run(*command, "--json", "--set", "before_layer=3", "--image", photo)[0])
    assert facts["policy"]["steps"][0]["at"] == "language.3"
    assert [layer["visual"] for layer in facts["plan"]["layers"]] == [16, 16, 16, 8, 8, 8]
    half = json.loads(run(*command, "--json", "--budget", "25%")[0])
    assert half["policy"]["steps"][0]["select"] == {"top": {"keep": "25%"}}
    assert list(tmp_path.iterdir()) == []


def test_json_names_what_was_written(model, tmp_path):
    command = ("compile", model, "-p", "random", "-o", tmp_path / "out", "-t", "torch", "--no-verify", "--json")
    facts = json.loads(run(*command, "--budget", "50%")[0])
    assert [layer["visual"] for layer in facts["plan"]["layers"]] == [8] * 6
    assert facts["output"] == str(tmp_path / "out")
    assert facts["target"] == "torch"
    assert facts["verification"] is None
    assert facts["bytes"] == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert "survey" in facts["seconds"]
    assert tvc.load(tmp_path / "out").target == "torch"


def test_overwrite_replaces_an_artifact(model, tmp_path, artifacts, monkeypatch):
    made = artifacts("llava", "fastv")
    monkeypatch.setattr(tvc, "compile", lambda *args, **kwargs: made.compiled, raising=False)
    (tmp_path / "out").mkdir()
    run("compile", model, "-p", "fastv", "-o", tmp_path / "out", "--no-verify")
    out, _ = run("compile", model, "-p", "fastv", "-o", tmp_path / "out", "--no-verify", "--overwrite")
    assert "not verified" in out
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("family", ["llava", "smolvlm"])
def test_inspect_lists_components_and_sites(family, tmp_path, monkeypatch):
    place = support.save_model(family, tmp_path / "model")
    program = tvc.inspect(place)
    monkeypatch.setattr(tvc, "inspect", lambda model: program, raising=False)
    out, _ = run("inspect", place)
    facts = json.loads(run("inspect", place, "--json")[0])
    graph, _ = run("inspect", place, "--graph", "embed")
    assert graph.startswith("# component embed: input_ids -> inputs_embeds")
    assert "torch.ops.aten.embedding" in graph
    assert json.loads(run("inspect", place, "--graph", "embed", "--json")[0])["graph"] == graph.rstrip("\n")
    assert [part["name"] for part in facts["components"]] == list(program.components)
    assert facts["sites"] == [{"name": s.name, "legal": s.legal, "reason": s.reason} for s in program.sites]
    reasons = {site["reason"] for site in facts["sites"] if not site["legal"]}
    assert reasons
    assert all(f"no: {reason}" in out for reason in reasons)
    model = support.build_model(family)
    read = [*model.get_decoder().layers.parameters(), *model.get_decoder().norm.parameters(), model.lm_head.weight]
    decoder = next(part for part in facts["components"] if part["name"] == "decoder")
    weights = sum(parameter.numel() * parameter.element_size() for parameter in read)
    assert weights <= decoder["bytes"] < weights + 4096  # and the rotary frequencies
    visual = support.visual_mask(family, support.inputs(family)["input_ids"])
    assert facts["visual_tokens"] > 0
    if family == "llava":
        assert facts["visual_tokens"] == int(visual.sum())


@pytest.mark.conformance
def test_half_precision_is_asked_for_by_name(model, tmp_path):
    run("compile", model, "-p", "random", "-o", tmp_path / "out", "--no-verify", "--dtype", "bfloat16")
    loaded = tvc.load(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    assert loaded(**support.inputs("llava")).logits.dtype == torch.bfloat16


def test_a_model_in_half_precision_runs_in_onnx_runtime(tmp_path, photo):
    """The bundled model is stored in float16, a processor writes float32: the runtime takes its pixels all the same."""
    bundled = pathlib.Path(__file__).parents[2] / "examples" / "models" / "tiny-llava"
    settings = ("-p", "uniform", "--set", "keep=50%", "--target", "ort")
    out, _ = run("compile", bundled, *settings, "-o", tmp_path / "out")
    assert "verified" in out
    answer, _ = run("run", tmp_path / "out", "--image", photo, "--prompt", "what is this?")
    assert answer.strip()
