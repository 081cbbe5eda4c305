"""tvc show on the processors of real families, with a stand-in for the compiled model that keeps known tokens."""

from __future__ import annotations

import types

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import support
import tvc
from tvc.cli import build_app


class Keeper:
    """Answers as a compiled model does: every second visual token stays before layer 2, three before layer 4."""

    def __init__(self, family: str):
        self.family = family
        self.processor = support.build_processor(family)
        self.config = support.build_model(family).config
        merge, drop = types.SimpleNamespace(key="merge"), types.SimpleNamespace(key="drop")
        steps = [
            types.SimpleNamespace(site=site, rest=rest, merge=None)
            for site, rest in (("language.2", merge), ("language.4", drop))
        ]
        self.policy = types.SimpleNamespace(steps=steps)

    def __call__(self, **inputs):
        visual = support.visual_mask(self.family, inputs["input_ids"])[0]
        text, image = (~visual).nonzero().flatten(), visual.nonzero().flatten()
        kept = {
            "language.2": torch.cat((text, image[::2])).sort().values,
            "language.4": torch.cat((text, image[:6:2])).sort().values,
        }
        return types.SimpleNamespace(kept={site: positions[None] for site, positions in kept.items()})


@pytest.fixture
def photo(tmp_path):
    support.photo(1).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def run(*arguments: object):
    return CliRunner().invoke(build_app(), [str(part) for part in arguments])


@pytest.mark.parametrize("family", list(support.FAMILIES))
def test_every_family_is_drawn_on_its_photo(family, photo, tmp_path, monkeypatch):
    from tvc.commands.show import kept_panels

    keeper = Keeper(family)
    monkeypatch.setattr(tvc, "load", lambda path: keeper, raising=False)
    done = run("show", tmp_path, "--image", photo, "-o", tmp_path / "deep" / "out.png")
    assert done.exit_code == 0, done.output
    with Image.open(tmp_path / "deep" / "out.png") as drawn:
        assert drawn.width > 800
    first, second = kept_panels(keeper, Image.open(photo).convert("RGB"), "what is it?")
    assert first.views
    assert first.kept == list(range(0, first.total, 2))
    assert (second.kept, second.merged) == ([0, 2, 4], list(range(1, first.total, 2)))
    assert second.dropped == list(range(6, first.total, 2))


def test_a_file_that_is_no_photo_is_refused(tmp_path):
    (tmp_path / "photo.png").write_text("no picture")
    done = run("show", tmp_path, "--image", tmp_path / "photo.png", "-o", tmp_path / "out.png")
    assert done.exit_code == 2
    assert "bad-image" in done.output
