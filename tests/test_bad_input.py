"""What a user may get wrong: each mistake ends in five lines that say what to do, and in the exit code of its kind."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import transformers
from transformers import DynamicCache, GenerationConfig
from typer.testing import CliRunner

import support
import tvc
from tvc.cli import build_app
from tvc.errors import ArgumentError, ArtifactError, InputError, ModelError, PolicyError, SiteError, TvcError

SLOW = (pytest.param(name, marks=pytest.mark.conformance) for name in ("qwen2_5_vl", "smolvlm", "llava_onevision"))
GOLDEN = pathlib.Path(__file__).parent / "golden" / "errors"
LINES = re.compile(r"error\[TVC\d{3}] [a-z0-9-]+: \S.*\n  where: \S.*\n  got:   \S.*\n  want:  \S.*\n  fix:   \S.*\n")


def run(*arguments):
    """(exit code, stdout, stderr) of a command that may not end in a trace."""
    done = CliRunner().invoke(build_app(), [str(part) for part in arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout, done.stderr


def refused(result, *, code, slug):
    """The five lines of a command that failed, and nothing beside them."""
    status, out, err = result
    assert (status, out) == (code, ""), err
    assert LINES.fullmatch(err), err
    assert f" {slug}: " in err.splitlines()[0]
    return err


def raised(error, slug, call, *args, **kwargs):
    """The five lines that a call raises."""
    with pytest.raises(TvcError) as caught:
        call(*args, **kwargs)
    assert type(caught.value) is error
    assert caught.value.slug == slug
    assert LINES.fullmatch(caught.value.render() + "\n")
    return caught.value.render() + "\n"


def golden(name, text, **places):
    """`text` is what the file says, paths of this run replaced by their names."""
    for placeholder, path in places.items():
        text = text.replace(str(path), f"<{placeholder}>")
    assert text == (GOLDEN / f"input-{name}.txt").read_text("utf-8")


@pytest.fixture(scope="session")
def directory(tmp_path_factory):
    return support.save_model("llava", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def siglip(tmp_path_factory):
    return support.save_model("llava_onevision", tmp_path_factory.mktemp("siglip"))


@pytest.fixture(scope="session")
def text_only(tmp_path_factory):
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    place = tmp_path_factory.mktemp("text_only")
    transformers.LlamaForCausalLM(config).save_pretrained(place)
    return place


@pytest.fixture(scope="session")
def bare(directory, tmp_path_factory):
    """A model directory without a processor."""
    place = tmp_path_factory.mktemp("bare") / "model"
    shutil.copytree(directory, place)
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (place / name).unlink()
    return place


@pytest.fixture(scope="session")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    support.photo(0, (131, 97)).save(path)
    return path


@pytest.fixture(scope="session")
def fastv(artifacts):
    return artifacts("llava", "fastv")


@pytest.fixture
def artifact(fastv, tmp_path):
    """A copy that a test may damage."""
    return pathlib.Path(shutil.copytree(fastv.folder, tmp_path / "out"))


# Policies ------------------------------------------------------------------------------------------------------------

_HEAD = "version: 1\nname: mine\nsteps:\n"
POLICIES = {
    "unknown-key": ("- at: language.2\n  selekt: {top: {keep: 4}}\n  rest: drop\n", PolicyError),
    "bare-float": ("- at: language.2\n  score: {norm: {}}\n  select: {top: {keep: 0.5}}\n  rest: drop\n", PolicyError),
    "no-such-layer": ("- at: language.6\n  select: {stride: {keep: 4}}\n  rest: drop\n", SiteError),
    "two-steps-at-one-site": (2 * "- at: language.2\n  select: {stride: {keep: 4}}\n  rest: drop\n", PolicyError),
    "a-budget-of-nothing": ("- at: language.2\n  select: {stride: {keep: 1%}}\n  rest: drop\n", SiteError),
}


@pytest.mark.parametrize("name", POLICIES)
def test_a_wrong_policy_is_refused_before_anything_is_traced(name, directory, tmp_path):
    steps, error = POLICIES[name]
    path = tmp_path / "mine.yaml"
    path.write_text(_HEAD + steps)
    status, out, err = run("compile", directory, "-p", path, "-o", tmp_path / "out")
    text = err[err.index("error[") :]
    assert (status, out) == (2, "")
    assert LINES.fullmatch(text)
    assert "trace" not in err.replace(text, "")
    golden(f"policy-{name}", text, policy=path, model=directory)
    with pytest.raises(error):
        tvc.compile(directory, path)
    assert not (tmp_path / "out").exists()


def test_attention_of_a_cls_token_that_siglip_lacks(siglip, tmp_path):
    policy = {
        "version": 1,
        "name": "mine",
        "steps": [
            {
                "at": "language.0",
                "score": {"attention": {"of": "cls", "layer": "vision.2"}},
                "select": {"top": {"keep": "50%"}},
                "rest": "drop",
            }
        ],
    }
    with pytest.raises(SiteError) as caught:
        tvc.compile(siglip, policy)
    golden("cls-on-siglip", caught.value.render() + "\n", model=siglip)


# Models --------------------------------------------------------------------------------------------------------------


def test_a_text_only_model_is_refused_from_a_directory_and_from_memory(text_only, tmp_path):
    for command in (
        ("compile", text_only, "-p", "fastv", "-o", tmp_path / "out"),
        ("compile", text_only, "-p", "fastv", "-o", tmp_path / "out", "--dry-run"),
        ("inspect", text_only),
        ("plan", text_only, "-p", "fastv"),
    ):
        status, out, err = run(*command)
        text = err[err.index("error[") :]
        assert (status, out) == (2, "")
        golden("text-only", text, model=text_only)
    model = transformers.LlamaForCausalLM.from_pretrained(text_only)
    text = raised(ModelError, "not-a-vlm", tvc.compile, model, "fastv")
    golden("text-only-in-memory", text)
    raised(ModelError, "not-a-vlm", tvc.inspect, model)


def test_a_directory_that_does_not_exist(tmp_path):
    for command in (("compile", "-p", "fastv", "-o", tmp_path / "out"), ("inspect",), ("plan", "-p", "fastv")):
        status, out, err = run(command[0], tmp_path / "none", *command[1:])
        text = err[err.index("error[") :]
        assert (status, out) == (2, "")
        assert LINES.fullmatch(text)
        assert " no-configuration: " in text
    raised(ModelError, "no-configuration", tvc.compile, tmp_path / "none", "fastv")


def test_a_directory_without_weights(directory, tmp_path):
    place = pathlib.Path(shutil.copytree(directory, tmp_path / "model"))
    (place / "model.safetensors").unlink()
    raised(ModelError, "no-weights", tvc.compile, place, "fastv")
    damaged = (directory / "model.safetensors").read_bytes()[:1000]
    (place / "model.safetensors").write_bytes(damaged)
    raised(ModelError, "no-weights", tvc.compile, place, "fastv")


def test_a_directory_with_a_configuration_that_is_not_json(directory, tmp_path):
    place = pathlib.Path(shutil.copytree(directory, tmp_path / "model"))
    (place / "config.json").write_text("{")
    raised(ModelError, "no-configuration", tvc.compile, place, "fastv")


def test_a_photo_needs_the_models_processor(bare, photo, tmp_path):
    command = ("compile", bare, "-p", "fastv", "-o", tmp_path / "out", "--image", photo, "--prompt", "what is it?")
    golden("no-processor", refused(run(*command), code=2, slug="no-processor"), model=bare)


def test_a_model_without_a_processor_plans_and_compiles(bare, tmp_path):
    status, out, err = run("compile", bare, "-p", "fastv", "-o", tmp_path / "out", "--dry-run")
    assert status == 0, err
    assert out.startswith("fastv on llava: 16 visual + 64 text tokens")
    assert not (tmp_path / "out").exists()


# Arguments -----------------------------------------------------------------------------------------------------------


def test_an_unknown_target(directory, tmp_path):
    err = refused(
        run("compile", directory, "-p", "fastv", "-o", tmp_path, "-t", "tensorrt"), code=2, slug="unknown-target"
    )
    assert "one of ort, pt2, torch, torchscript" in err
    raised(ArgumentError, "unknown-target", tvc.compile, directory, "fastv", "tensorrt")


@pytest.mark.parametrize(
    ("option", "slug"),
    [
        (("--dtype", "float8"), "unknown-dtype"),
        (("--device", "gpu"), "unknown-device"),
        (("--device", "cuda:99"), "unknown-device"),
        (("--prompt", "what is it?"), "no-image"),
        (("--image", "none.png"), "bad-image"),
    ],
)
def test_options_of_compile_that_mean_nothing(directory, tmp_path, option, slug):
    command = ("compile", directory, "-p", "fastv", "-o", tmp_path / "out", *option)
    refused(run(*command), code=2, slug=slug)


def test_an_output_directory_in_use(directory, artifact, tmp_path):
    begun = time.perf_counter()
    command = ("compile", directory, "-p", "fastv", "-o")
    refused(run(*command, artifact), code=2, slug="output-exists")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "letter.txt").write_text("dear")
    for more in ((), ("--overwrite",)):
        refused(run(*command, tmp_path / "files", *more), code=2, slug="output-exists")
    assert (tmp_path / "files" / "letter.txt").read_text() == "dear"
    assert time.perf_counter() - begun < 5  # refused before the compile, not after it


def test_an_output_below_a_file(fastv, tmp_path, directory, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(tvc, "compile", lambda *args, **kwargs: fastv.compiled, raising=False)
    status, out, err = run("compile", directory, "-p", "fastv", "-o", tmp_path / "file" / "out")
    assert (status, out) == (2, "")
    assert LINES.fullmatch(err[err.index("error[") :])


def test_missing_arguments_are_usage_errors(directory):
    for command in (
        ("compile",),
        ("compile", directory),
        ("run",),
        ("inspect",),
        ("inspect", directory, "--grapf", "x"),
    ):
        status, _, err = run(*command)
        assert status == 2
        assert "Traceback" not in err


def test_inspect_names_the_components(directory):
    status, out, err = run("inspect", directory, "--graph", "projector")
    assert (status, out) == (2, "")
    assert "one of vision, embed, decoder" in err


@pytest.mark.parametrize(
    ("inputs", "slug"),
    [
        ([1, 2], "bad-inputs"),
        ({}, "bad-inputs"),
        ({"input_ids": [[1, 2]]}, "bad-inputs"),
        ({"input_ids": torch.ones(1, 4, dtype=torch.long)}, "no-image"),
        (
            {
                "input_ids": torch.ones(1, 4, dtype=torch.long),
                "attention_mask": torch.ones(1, 5, dtype=torch.long),
                "pixel_values": torch.zeros(1, 3, 56, 56),
            },
            "bad-inputs",
        ),
    ],
)
def test_sample_inputs_that_cannot_be_traced_with(directory, inputs, slug):
    raised(ArgumentError, slug, tvc.compile, directory, "fastv", inputs=inputs)


# Calls ---------------------------------------------------------------------------------------------------------------


def _pixels_without_placeholders(inputs):
    image = support.tokenizer("llava").convert_tokens_to_ids("<image>")
    return {**inputs, "input_ids": inputs["input_ids"].masked_fill(inputs["input_ids"] == image, 40)}


CALLS = {
    "no-pixels": lambda given: {k: v for k, v in given.items() if k != "pixel_values"},
    "no-placeholders": _pixels_without_placeholders,
    "placeholder-count": lambda given: {
        **given,
        "input_ids": given["input_ids"][:, :-20],
        "attention_mask": given["attention_mask"][:, :-20],
    },
    "mask-shape": lambda given: {**given, "attention_mask": given["attention_mask"][:, 3:]},
    "no-input-ids": lambda given: {k: v for k, v in given.items() if k != "input_ids"},
    "bad-input-ids": lambda given: {**given, "input_ids": given["input_ids"].float()},
}


@pytest.mark.parametrize("slug", CALLS)
@pytest.mark.parametrize("way", ["call", "generate"])
def test_inputs_that_contradict_each_other(fastv, slug, way):
    wrong = CALLS[slug](support.inputs("llava", batch=2))
    if way == "call":
        text = raised(InputError, slug, fastv.compiled, **wrong)
        golden(slug, text)
    else:
        raised(InputError, slug, fastv.compiled.generate, **wrong, max_new_tokens=2)


@pytest.mark.parametrize("family", SLOW)
def test_placeholders_are_counted_in_every_family(artifacts, family):
    compiled = artifacts(family, "random", settings=("at=language.2", "keep=50%")).compiled
    given = support.inputs(family)
    first = int(support.visual_mask(family, given["input_ids"])[0].nonzero()[0])
    keep = [place for place in range(given["input_ids"].shape[1]) if place != first]
    tokens = ("input_ids", "attention_mask", "mm_token_type_ids")
    fewer = {name: value[:, keep] if name in tokens else value for name, value in given.items()}
    raised(InputError, "placeholder-count", compiled, **fewer)
    raised(InputError, "placeholder-count", compiled.generate, **fewer, max_new_tokens=2)
    blind = {name: value for name, value in given.items() if name in tokens}
    raised(InputError, "no-pixels", compiled, **blind)
    raised(InputError, "no-pixels", compiled.generate, **blind, max_new_tokens=2)
    compiled(**given)  # a refusal leaves nothing behind


@pytest.mark.parametrize("kind", [list, lambda pixels: pixels.numpy()], ids=["list", "numpy"])
def test_pixels_that_are_no_tensor(fastv, kind):
    given = support.inputs("llava", batch=2)
    wrong = {**given, "pixel_values": kind(given["pixel_values"])}
    raised(InputError, "bad-pixels", fastv.compiled, **wrong)
    raised(InputError, "bad-pixels", fastv.compiled.generate, **wrong, max_new_tokens=2)


def test_a_mask_of_another_batch(fastv):
    given = support.inputs("llava", batch=2)
    raised(InputError, "mask-shape", fastv.compiled, **{**given, "attention_mask": given["attention_mask"][:1]})


def test_a_cache_of_another_model(fastv):
    cache = DynamicCache()
    cache.update(torch.zeros(1, 2, 5, 16), torch.zeros(1, 2, 5, 16), 0)
    ids = torch.full((1, 3), 40)
    raised(InputError, "foreign-cache", fastv.compiled, input_ids=ids, past_key_values=cache)
    raised(InputError, "foreign-cache", fastv.compiled.generate, input_ids=ids, past_key_values=cache)


@pytest.mark.parametrize("way", ["argument", "configuration"])
@pytest.mark.parametrize(
    ("name", "value"), [("prompt_lookup_num_tokens", 3), ("cache_implementation", "static"), ("assistant_model", None)]
)
def test_modes_that_roll_the_cache_back(fastv, name, value, way):
    given = support.inputs("llava")
    if name == "assistant_model":
        value = fastv.model
        raised(ArgumentError, "no-such-mode", fastv.compiled.generate, **given, assistant_model=value)
    elif way == "argument":
        raised(ArgumentError, "no-such-mode", fastv.compiled.generate, **given, **{name: value})
    else:
        raised(
            ArgumentError,
            "no-such-mode",
            fastv.compiled.generate,
            **given,
            generation_config=GenerationConfig(**{name: value}),
        )


# Artifacts -----------------------------------------------------------------------------------------------------------


def _run(artifact, photo, *more):
    return run("run", artifact, "--image", photo, "--prompt", "what is it?", *more)


def test_run_needs_a_photo_and_a_question(fastv, photo):
    folder = fastv.folder
    golden("run-without-image", refused(run("run", folder, "--prompt", "what is it?"), code=2, slug="no-image"))
    refused(run("run", folder, "--image", photo), code=2, slug="no-prompt")
    refused(run("run", folder), code=2, slug="no-image")
    refused(run("run", folder, "--image", "none.png", "--prompt", "what is it?"), code=2, slug="bad-image")
    refused(_run(folder, photo, "--stream", "--json"), code=2, slug="stream-and-json")
    assert run("run", folder, "--image", photo, "--prompt", "x", "--max-new-tokens", "0")[0] == 2


def test_what_is_no_artifact(tmp_path, photo):
    for place in (tmp_path, tmp_path / "none"):
        refused(_run(place, photo), code=1, slug="not-an-artifact")
        raised(ArtifactError, "not-an-artifact", tvc.load, place)


def test_a_truncated_artifact(artifact, photo):
    weights = artifact / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    err = refused(_run(artifact, photo), code=1, slug="truncated-file")
    assert "model.safetensors" in err
    weights.unlink()
    refused(_run(artifact, photo), code=1, slug="missing-file")


def test_a_truncated_manifest(artifact, photo):
    manifest = artifact / "tvc.json"
    os.truncate(manifest, manifest.stat().st_size // 2)
    refused(_run(artifact, photo), code=1, slug="truncated-file")


@pytest.mark.parametrize(
    "name", ["decoder.pt2", "config.json", "policy.resolved.yaml", "host.safetensors", "tokenizer.json"]
)
def test_an_artifact_with_a_changed_file(artifact, photo, name):
    content = bytearray((artifact / name).read_bytes())
    content[len(content) // 2] ^= 1
    (artifact / name).write_bytes(content)
    err = refused(_run(artifact, photo), code=1, slug="changed-file")
    assert name in err


def test_an_artifact_of_a_newer_format(artifact, photo):
    content = json.loads((artifact / "tvc.json").read_text())
    (artifact / "tvc.json").write_text(json.dumps({**content, "format": content["format"] + 1}))
    golden("newer-format", refused(_run(artifact, photo), code=1, slug="unknown-format"), artifact=artifact)


def test_an_artifact_without_a_processor(fastv, artifact, photo, monkeypatch):
    """As it is written where the model had none."""
    manifest = json.loads((artifact / "tvc.json").read_text())
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (artifact / name).unlink()
        del manifest["files"][name]
    (artifact / "tvc.json").write_text(json.dumps(manifest))
    golden("artifact-without-processor", refused(_run(artifact, photo), code=1, slug="no-processor"), artifact=artifact)
    loaded = tvc.load(artifact)
    given = support.inputs("llava")
    torch.testing.assert_close(loaded(**given).logits, fastv.compiled(**given).logits, rtol=1e-6, atol=1e-6)


def test_a_loaded_model_is_not_saved_again(fastv, tmp_path):
    raised(ArgumentError, "already-saved", tvc.load(fastv.folder).save_pretrained, tmp_path / "again")


# Processes -----------------------------------------------------------------------------------------------------------

MAIN = (sys.executable, "-P", "-c", "from tvc.cli import main; main()")


def test_a_process_ends_without_a_trace(tmp_path):
    for arguments, code in (
        (("compile", tmp_path / "none", "-p", "fastv", "-o", tmp_path / "out"), 2),
        (("compile", tmp_path / "none", "-p", "fastw", "-o", tmp_path / "out"), 2),
        (("run", tmp_path, "--image", tmp_path / "none.png", "--prompt", "what?"), 2),
    ):
        done = subprocess.run([*MAIN, *map(str, arguments)], capture_output=True, text=True, check=False)
        assert done.returncode == code
        assert LINES.fullmatch(done.stderr[done.stderr.index("error[") :])
        assert "Traceback" not in done.stderr


def test_a_compile_killed_while_it_writes_leaves_no_artifact(directory, fastv, tmp_path):
    place = tmp_path / "out"
    command = [*MAIN, "compile", str(directory), "-p", "fastv", "-o", str(place), "--no-verify"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if " write " in line:
                break
        while not any(tmp_path.glob(".out.partial-*/*")) and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL
    assert not place.exists()
    assert len(list(tmp_path.iterdir())) == 1  # what it had written so far
    fastv.compiled.save_pretrained(place)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    given = support.inputs("llava")
    torch.testing.assert_close(tvc.load(place)(**given).logits, fastv.compiled(**given).logits, rtol=1e-6, atol=1e-6)
