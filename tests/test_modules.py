"""Trained modules of a policy, end to end: what they decide against plain torch on the untouched model's own states."""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
from typing import Any
from unittest import mock

import pytest
import safetensors.torch
import torch

import support
import tvc
from tvc import api
from tvc.errors import ArtifactError
from tvc.modules import check_carried
from tvc.policy import load_policy, resolve

EXIT, CUT, LAYERS, HIDDEN = 1, 2, 3, 5  # an exit in front of one layer, a cut in front of another
POLICY = """
version: 1
name: two-modules
steps:
  - at: language.1..1
    exit: {when: {router: routers.safetensors}}
  - at: language.2
    score: {mlp: {weights: scorer.safetensors, text: last}}
    select: {top: 50%}
"""


@dataclasses.dataclass
class Setting:
    """A policy with its weights in a folder, and what they have to decide."""

    model: Any
    processor: Any
    inputs: dict[str, torch.Tensor]
    folder: pathlib.Path
    fires: list[bool]
    kept: list[list[int]]  # columns of the visual tokens that stay at the cut, where none have left before


def shallow() -> Any:
    """A model with few layers, which compiles in half the time."""
    record = support.family_record("llava")
    text = {**record.config["text_config"], "num_hidden_layers": LAYERS}
    fewer = dataclasses.replace(record, config={**record.config, "text_config": text})
    with mock.patch.dict(support.FAMILIES, {"llava": fewer}):
        return support.build_model("llava")


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    model, processor = shallow(), support.build_processor("llava")
    inputs = support.inputs("llava", 3)
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
    visual = support.visual_mask("llava", inputs["input_ids"])
    last = [int(row.nonzero().max()) for row in visual]
    width, folder = states[0].shape[2], tmp_path_factory.mktemp("modules")
    for seed in range(100):  # until one sample's visual tokens leave, and another's do not
        draw = torch.Generator().manual_seed(seed)
        first, route = torch.randn(HIDDEN, 2 * width, generator=draw), torch.randn(2, HIDDEN, generator=draw)
        fires = []
        for b, behind in enumerate(last):
            text = states[EXIT][b, behind + 1 :]
            seen = torch.cat([text[:-1].mean(0), text[-1]])
            stay, leave = route @ torch.nn.functional.gelu(first @ seen)
            fires.append(bool(leave > stay))
        if set(fires) == {True, False}:
            break
    tensors = {"language.1.hidden.weight": first, "language.1.route.weight": route}
    safetensors.torch.save_file(tensors, folder / "routers.safetensors")
    parts = {name: torch.nn.Linear(width, HIDDEN, bias=name == "visual") for name in ("visual", "text")}
    output, kept = torch.nn.Linear(HIDDEN, 1), []
    norm = torch.nn.RMSNorm(width, eps=1e-6, elementwise_affine=False)
    with torch.no_grad():
        for b in range(len(last)):
            slots = visual[b].nonzero()[:, 0]
            mixed = parts["visual"](norm(states[CUT][b, slots])) + parts["text"](norm(states[CUT][b, -1]))
            score = output(torch.nn.functional.gelu(mixed))[:, 0]
            kept.append(sorted(slots[score.topk(len(slots) // 2).indices].tolist()))
    tensors = {
        "visual.weight": parts["visual"].weight,
        "text.weight": parts["text"].weight,
        "hidden.bias": parts["visual"].bias,
        "score.weight": output.weight,
        "score.bias": output.bias,
    }
    safetensors.torch.save_file({n: t.detach() for n, t in tensors.items()}, folder / "scorer.safetensors")
    (folder / "policy.yaml").write_text(POLICY)
    return Setting(model, processor, inputs, folder, fires, kept)


def decides_as_expected(compiled: Any, setting: Setting) -> None:
    kept = compiled(**setting.inputs).kept
    visual = support.visual_mask("llava", setting.inputs["input_ids"])
    for b, fired in enumerate(setting.fires):
        for site, wanted in (
            (f"language.{EXIT}", visual[b].nonzero()[:, 0].tolist()),
            (f"language.{CUT}", setting.kept[b]),
        ):
            held = [column for column in kept[site][b].tolist() if column >= 0 and visual[b, column]]
            assert held == ([] if fired else wanted)


def test_modules_decide_as_plain_torch_does_and_travel_with_the_artifact(
    setting: Setting, tmp_path: pathlib.Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(setting.folder, source)
    compiled = tvc.compile(setting.model, source / "policy.yaml", processor=setting.processor, verify=False)
    decides_as_expected(compiled, setting)
    shutil.rmtree(source)  # what was compiled is saved, whatever becomes of the files
    compiled.save_pretrained(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out" / "modules").iterdir()) == [
        "routers.safetensors",
        "scorer.safetensors",
    ]
    for name in ("policy.yaml", "policy.resolved.yaml", "tvc.json"):
        text = (tmp_path / "out" / name).read_text()
        assert "modules/scorer.safetensors" in text
        assert str(tmp_path) not in text
    loaded = tvc.load(tmp_path / "out")
    decides_as_expected(loaded, setting)
    (tmp_path / "out" / "modules" / "scorer.safetensors").write_bytes(b"changed")
    with pytest.raises(ArtifactError, match="modules/scorer"):
        tvc.load(tmp_path / "out")


@pytest.mark.conformance
@pytest.mark.parametrize("target", ["torch", "ort", "pt2", "torchscript"])
def test_modules_decide_the_same_in_every_target(setting: Setting, target: str, tmp_path: pathlib.Path) -> None:
    policy = setting.folder / "policy.yaml"
    compiled = tvc.compile(setting.model, policy, target, processor=setting.processor, verify=True)
    compiled.save_pretrained(tmp_path / "out")
    loaded = tvc.load(tmp_path / "out")
    decides_as_expected(loaded, setting)
    assert tvc.verify(loaded, setting.model, setting.inputs, steps=2).passed


@pytest.mark.conformance
def test_a_scorer_acts_in_every_component(tmp_path: pathlib.Path) -> None:
    model, processor = support.build("llava")
    sites = {"vision.1": model.config.vision_config, "projector": model.config.text_config}
    steps = []
    for site, config in sites.items():
        width, file = config.hidden_size, tmp_path / f"{site}.safetensors"
        tensors = {
            "visual.weight": torch.randn(HIDDEN, width),
            "hidden.bias": torch.randn(HIDDEN),
            "score.weight": torch.randn(1, HIDDEN),
            "score.bias": torch.randn(1),
        }
        safetensors.torch.save_file(tensors, file)
        steps.append({"at": site, "score": {"mlp": str(file)}, "select": {"top": "50%"}})
    for target in ("torch", "ort"):
        compiled = tvc.compile(model, {"version": 1, "steps": steps}, target, processor=processor, verify=False)
        inputs = support.inputs("llava", 2)
        assert set(compiled(**inputs).kept) == set(sites)
        assert tvc.verify(compiled, model, inputs).passed


def test_an_artifact_whose_policy_names_a_file_elsewhere_is_refused(setting: Setting, tmp_path: pathlib.Path) -> None:
    layout = api.layout_of(setting.model, processor=setting.processor)
    policy = resolve(load_policy(setting.folder / "policy.yaml"), layout)
    with pytest.raises(ArtifactError, match="unsafe-path"):
        check_carried(tmp_path, policy, {})
    with pytest.raises(ArtifactError, match="unsafe-path"):
        check_carried(setting.folder, policy, {"scorer.safetensors": {}})
    check_carried(setting.folder, policy, {"scorer.safetensors": {}, "routers.safetensors": {}})
