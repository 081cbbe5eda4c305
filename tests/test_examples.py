"""What the README and the examples say is run as it stands."""

from __future__ import annotations

import importlib.util
import pathlib
import re
import sys
import types

import pytest
import safetensors.torch
import torch

from tvc.policy.load import presets

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _script(name: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def test_the_bundled_model_is_what_its_script_writes(tmp_path: pathlib.Path) -> None:
    script = _script("make_tiny_llava")
    script.main(tmp_path)
    committed, made = (
        safetensors.torch.load_file(folder / "model.safetensors") for folder in (script.TARGET, tmp_path)
    )
    assert committed.keys() == made.keys()
    for name, weight in committed.items():
        assert torch.equal(weight, made[name]), name
    assert sum(file.stat().st_size for file in script.TARGET.iterdir()) <= 6e6


def test_the_readme_lists_the_presets() -> None:
    listed = re.search(r"<!-- presets -->(.*?)<!-- /presets -->", README)
    assert listed is not None
    assert listed.group(1).split(", ") == sorted(presets())


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
    assert "USER:" in printed
    assert (tmp_path / "out" / "fastv" / "tvc.json").is_file()


def test_the_readme_policy_loads() -> None:
    from tvc.policy.load import load_policy

    text = re.search(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
    assert text is not None
    policy = load_policy(text.group(1))
    assert policy.name == "mine"
    assert len(policy.steps) == 1


def test_the_demo_prints_its_table_and_writes_the_overlays(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    demo = _script("demo")
    monkeypatch.setattr(demo, "REPEATS", 1)
    monkeypatch.setattr("sys.argv", ["demo.py", "--output", str(tmp_path)])
    demo.main()
    printed = capsys.readouterr().out
    for policy in ("dense", *demo.POLICIES):
        for target in demo.TARGETS:
            assert re.search(rf"\b{policy}\s*│\s*{target}\b", printed), (policy, target)
    for policy in demo.POLICIES:
        assert (tmp_path / f"{policy}.png").stat().st_size > 1000
