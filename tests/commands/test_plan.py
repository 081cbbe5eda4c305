"""tvc plan: what it asks of the library, and what it prints."""

from __future__ import annotations

import json
import sys
import types

import pytest
from typer.testing import CliRunner

import tvc
from tvc.cli import build_app
from tvc.program import Layer, Layout, Site
from tvc.report.schedule import plan_policy

LAYOUT = Layout(
    model_type="llava",
    hidden_size=64,
    vocabulary=100,
    language=(Layer(1000, 4, 2, 16),) * 8,
    vision=(Layer(500, 2, 2, 8),) * 2,
    prefix_tokens=1,
    group=1,
    tiles=1,
    tile_tokens=101,
    visual_tokens=(100,),
    patch_linear=588,
    projector_linear=90,
    head_linear=6400,
    element_size=2,
    sites=tuple(Site(f"language.{i}", True) for i in range(8)),
)


@pytest.fixture(autouse=True)
def library(monkeypatch):
    """The library's plan, over a layout that needs no model."""
    asked = {}

    def plan(model, policy, *, image_size=None, budget=None, frames=None, **options):
        asked.update(model=model, image_size=image_size, budget=budget, frames=frames)
        return plan_policy(policy, LAYOUT, **options)

    fake = types.SimpleNamespace(plan=plan)
    monkeypatch.setitem(sys.modules, "tvc.api", fake)
    monkeypatch.setattr(tvc, "api", fake, raising=False)
    return asked


def run(*arguments: str):
    return CliRunner().invoke(build_app(), ["plan", "somewhere", *arguments])


def test_it_prints_the_table(library):
    asked = ("--text-tokens", "20", "--image-size", "480x640", "--budget", "25%", "--frames", "32")
    done = run("--policy", "fastv", *asked)
    assert done.exit_code == 0, done.output
    assert "fastv on llava: 100 visual + 20 text tokens" in done.output
    assert library == {"model": "somewhere", "image_size": (480, 640), "budget": "25%", "frames": 32}


def test_json_holds_the_plan():
    done = run("--policy", "fastv", "--json", "--set", "keep=20%")
    assert [layer["visual"] for layer in json.loads(done.output)["layers"]] == [100] * 2 + [20] * 6


def test_an_average_is_solved_and_its_settings_are_printed():
    done = run("--policy", "fastv", "--average-tokens", "40")
    assert "average visual tokens per decoder layer: 40.0 of 100" in done.output
    assert "--set steps.0.select.top.keep=20%" in done.output


@pytest.mark.parametrize("arguments", [("--average-tokens", "5"), ("--image-size", "480"), ("--image-size", "0x3")])
def test_impossible_wishes_are_five_lines(arguments):
    done = run("--policy", "fastv", *arguments)
    assert done.exit_code == 2
    assert [line.split(":")[0].strip() for line in done.output.splitlines()[1:]] == ["where", "got", "want", "fix"]
