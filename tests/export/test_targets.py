"""Every target's runner equals the traced program: prefill, decode steps and a later turn over uneven caches."""

from __future__ import annotations

import json
import pathlib

import pytest
import stand_in
import torch

from tvc.errors import ArgumentError, InputError
from tvc.export import base, manifest

TARGETS = ("ort", "pt2", "torchscript")
# (batch, padded, visual tokens): a single sample, a padded batch, a chunk without visual tokens, padded again
CONVERSATIONS = ((1, False, 10), (3, True, 10), (1, False, 0), (2, True, 0))


@pytest.fixture(scope="session")
def artifacts(program, tmp_path_factory):
    """An artifact per target, written when first asked for."""
    made: dict[str, pathlib.Path] = {}

    def artifact(name: str) -> pathlib.Path:
        if name not in made:
            place = tmp_path_factory.mktemp("artifacts") / name
            with manifest.writing(place) as (folder, seal):
                base.target(name).write(program, folder, base.Options())
                seal(manifest.describe(program, name, model={"source": "stand-in"}, policy={}))
            made[name] = place
        return made[name]

    return artifact


@pytest.fixture(scope="session")
def runners(artifacts):
    made = {}

    def runner(name):
        if name not in made:
            place = artifacts(name)
            made[name] = base.target(name).open(place, manifest.read(place), "cpu", base.Options(threads=1))
        return made[name]

    return runner


def test_targets_are_found_by_walking_the_package():
    assert {*TARGETS, "torch"} <= set(base.targets())
    with pytest.raises(ArgumentError, match="torchscript"):
        base.target("tensorflow")


@pytest.mark.parametrize("case", CONVERSATIONS, ids=lambda c: f"B{c[0]}-{'padded' if c[1] else 'full'}-V{c[2]}")
@pytest.mark.parametrize("name", TARGETS)
def test_a_conversation_equals_the_traced_program(name, case, runners, eager, shape):
    batch, padded, visual = case
    want = stand_in.conversation(eager, shape, batch, padded, visual=visual)
    got = stand_in.conversation(runners(name), shape, batch, padded, visual=visual)
    lengths = {want[0][f"key.{i}"].shape[2] for i in range(shape.layers)}
    assert len(lengths) == (2 if visual else 1)
    worst = stand_in.differences(shape, got, want)
    assert max(worst.values()) < 2e-6, worst


@pytest.mark.parametrize("name", TARGETS)
def test_the_vision_tower_takes_any_number_of_tiles(name, runners, eager):
    for tiles in (1, 3):
        pixels = {"pixel_values": torch.randn(tiles, 3, 32, 32)}
        got, want = runners(name)("vision", pixels)["features"], eager("vision", pixels)["features"]
        torch.testing.assert_close(got, want, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", TARGETS)
def test_weights_are_stored_once(name, artifacts, program):
    tensors = {}
    for part in program.components.values():
        used = {spec.target for spec in part.exported.graph_signature.input_specs if spec.target is not None}
        tensors |= {t.data_ptr(): t.nbytes for n, t in part.exported.state_dict.items() if n in used}
    files = [f for f in artifacts(name).iterdir() if f.suffix in (".onnx_data", ".safetensors", ".ts")]
    content = b"".join(f.read_bytes() for f in files)
    # Names, graph code and padding between tensors are allowed for.
    slack = {"ort": 20_000, "pt2": 20_000, "torchscript": 250_000}[name]
    assert abs(len(content) - sum(tensors.values())) < slack
    table = program.components["embed"].exported.state_dict["embed_tokens.weight"].detach()
    assert content.count(table[7:9].contiguous().numpy().tobytes()) == 1


@pytest.mark.parametrize("name", TARGETS)
def test_a_missing_input_is_named(name, runners):
    with pytest.raises(InputError, match="pixel_values"):
        runners(name)("vision", {"image": torch.zeros(1)})


@pytest.mark.parametrize("name", TARGETS)
def test_no_file_names_the_machine_that_compiled(name, artifacts):
    here = str(pathlib.Path(__file__).parent).encode()
    for file in artifacts(name).iterdir():
        assert here not in file.read_bytes(), file.name


def test_the_manifest_holds_what_a_runner_needs(artifacts, program, shape):
    content = json.loads((artifacts("ort") / manifest.FILE).read_text())
    assert content["components"]["decoder"]["outputs"][0] == "logits"
    assert [stage["layers"] for stage in content["stages"]] == [[0, shape.before], [shape.before, shape.layers]]
    assert content["fusions"]["decoder"]["cached_attention"] == shape.layers
    assert set(content["files"]) == {"model.onnx_data", "vision.onnx", "embed.onnx", "decoder.onnx"}
