"""tvc policies, and the frame of the command line."""

from __future__ import annotations

import json
import pathlib
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from tvc.cli import build_app
from tvc.policy import json_schema, load_policy, presets


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(build_app(), list(arguments))
    return result.exit_code, result.stdout, result.stderr


def test_help_imports_no_torch() -> None:
    code = "import sys; from tvc.cli import build_app; build_app(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0


def test_list_names_every_preset() -> None:
    code, out, _ = run("policies", "list")
    assert code == 0
    assert all(name in out for name in presets())
    code, out, _ = run("policies", "list", "--json")
    assert code == 0
    assert [entry["name"] for entry in json.loads(out)] == list(presets())


@pytest.mark.parametrize("frames", [(), ("--frames", "8")])
def test_list_says_which_presets_act_on_a_model(frames: tuple[str, ...]) -> None:
    model = str(pathlib.Path(__file__).parents[2] / "examples" / "models" / "tiny-llava")
    code, out, _ = run("policies", "list", "--model", model, *frames)
    assert code == 0
    found = {one["name"]: one for one in json.loads(run("policies", "list", "--model", model, *frames, "--json")[1])}
    assert list(found) == list(presets())
    for name in ("fastv", "pact", "frame-stride"):
        plan = json.loads(run("plan", model, "--policy", name, *frames, "--json")[1])
        assert found[name]["visual_tokens"] == plan["average_visual_tokens"]
    assert (found["fastv"]["at_most"], found["pact"]["at_most"]) == (False, True)
    # Six layers are too few for three cuts in the first quarter.
    refused = found["sparsevlm"]["refusal"]
    code, _, err = run("plan", model, "--policy", "sparsevlm", *frames)
    assert code == 2
    assert f"error[{refused['code']}] {refused['slug']}: {refused['summary']}" in err
    acting = sum(one["refusal"] is None for one in found.values())
    assert f"{acting} of {len(found)} act on this model" in out


def test_what_a_list_cannot_be_asked_for_is_refused() -> None:
    for arguments, why in ((("--frames", "8"), "give --model too"), (("--markdown", "--model", "m"), "no model")):
        code, _, err = run("policies", "list", *arguments)
        assert code == 2
        assert why in " ".join(err.replace("│", " ").split())


def test_show_prints_a_policy_that_loads() -> None:
    code, out, _ = run("policies", "show", "fastv", "--set", "keep=25%")
    assert code == 0
    assert load_policy(out) == load_policy("fastv", set=["keep=25%"])
    assert json.loads(run("policies", "show", "fastv", "--json")[1]) == load_policy("fastv").document.data


def test_show_says_in_words_what_each_step_does() -> None:
    _, out, _ = run("policies", "show", "visionzip")
    words = [line for line in out.splitlines() if line.startswith("#")]
    assert words[0] == f"# {load_policy('visionzip').about}"
    assert "# 1. Before language.0, in each image:" in words
    assert any("attention (of: [cls, all]" in line for line in words)
    assert any("top (keep: 54): The best-scored tokens" in line for line in words)
    assert any("merge" in line and "{stride: 10}" in line for line in words)


@pytest.mark.parametrize("name", presets())
def test_show_describes_every_preset_and_stays_a_policy(name: str) -> None:
    _, out, _ = run("policies", "show", name)
    assert load_policy(out) == load_policy(name)
    steps = load_policy(name).steps
    assert sum(line.startswith("# ") and ". Before " in line for line in out.splitlines()) == len(steps)
    for part in {primitive.key for step in steps for primitive in step.primitives()}:
        assert part in "".join(line for line in out.splitlines() if line.startswith("# "))


def test_show_adds_the_plan_on_a_model() -> None:
    model = pathlib.Path(__file__).parents[2] / "examples" / "models" / "tiny-llava"
    code, out, _ = run("policies", "show", "fastv", "--model", str(model))
    assert code == 0
    assert load_policy(out) == load_policy("fastv")
    assert f"# On {model}:" in out
    assert "language.2" in out
    facts = json.loads(run("policies", "show", "fastv", "--model", str(model), "--json")[1])
    assert facts["policy"] == load_policy("fastv").document.data
    assert facts["plan"]
    budgets = facts["budgets"]
    assert {share: rung["visual_tokens"] for share, rung in budgets.items()} == {
        "50%": 72, "33%": 47, "22%": 31, "11%": 15, "5%": 7,
    }  # fmt: skip
    assert [share for share, rung in budgets.items() if rung["published"]] == ["50%"]
    assert budgets["33%"]["settings"] == {"steps.0.select.top.keep": "32.7%"}
    for share, rung in budgets.items():
        assert re.search(rf"# +{share} +{rung['visual_tokens']:.1f} +{rung['kv_ratio']:.1%} ", out)


@pytest.mark.parametrize(
    ("name", "meant"), [("flash", "flash-latents"), ("b-vllm", "b-vllm-sampler"), ("FastVV", "fastv")]
)
def test_a_name_that_is_none_is_told_the_nearest(name: str, meant: str) -> None:
    assert f'fix:   write "{meant}"' in run("policies", "show", name)[2]


def test_show_plans_a_video_on_a_model() -> None:
    """Frames come as images where positions tell none of a video: every fourth of nine is three of them."""
    model = pathlib.Path(__file__).parents[2] / "examples" / "models" / "tiny-llava"
    code, out, _ = run("policies", "show", "frame-stride", "--model", str(model), "--frames", "9", "--json")
    assert code == 0
    plan = json.loads(out)["plan"]
    assert plan["visual_tokens"] == [144] * 9
    assert [layer["visual"] for layer in plan["layers"]] == [3 * 144] * len(plan["layers"])
    assert (plan["frames"], plan["alone"], plan["fired"]) == (1, [], None)
    _, out, _ = run("policies", "show", "frame-stride", "--model", str(model))
    assert "# language.0: about the frames of a video, and an image is one; plan a video with --frames N" in out
    code, _, err = run("policies", "show", "frame-stride", "--frames", "9")
    assert code == 2
    assert "give --model too" in err


def test_show_says_what_a_policy_does_before_it_says_that_a_model_cannot() -> None:
    model = pathlib.Path(__file__).parents[2] / "examples" / "models" / "tiny-llava"
    code, out, err = run("policies", "show", "sparsevlm", "--model", str(model))
    assert code == 2
    assert "# 1. Before language." in out
    assert "  fix:   act at a later site: at: language.1\n" in err  # no encoder has text whose attention could count
    out = run("policies", "show", "dycoke", "--model", str(model))[1]
    assert re.search(r"# +5%  no budgets of policy dycoke give 7.2 visual tokens", out)


def test_check_says_ok_with_the_parameters(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("version: 1\nextends: fastv\nparameters: {before_layer: 3}\n")
    assert run("policies", "check", str(path)) == (
        0,
        "ok fastv-variant: 1 step(s) at language.3; before_layer=3, keep=50%\n",
        "",
    )
    facts = json.loads(run("policies", "check", str(path), "--json")[1])
    assert facts["ok"] is True
    assert facts["parameters"] == {"before_layer": 3, "keep": "50%"}


def test_check_writes_the_five_lines_to_stderr_and_exits_with_2() -> None:
    code, out, err = run("policies", "check", "fastv", "--set", "keep=0.5")
    assert (code, out) == (2, "")
    golden = pathlib.Path(__file__).parent.parent / "golden" / "errors" / "policy-set-float.txt"
    assert err == golden.read_text("utf-8")


def test_check_reports_a_mistake_as_json_too() -> None:
    code, out, err = run("policies", "check", "fastvv", "--json")
    assert (code, err) == (2, "")
    assert json.loads(out)["slug"] == "unknown-preset"


@pytest.mark.parametrize("arguments", [("policies", "chek"), ("policies", "check"), ("nonsense",), ("--nonsense",)])
def test_wrong_usage_exits_with_2(arguments: tuple[str, ...]) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert "Usage" in err


def test_schema_prints_the_schema() -> None:
    code, out, _ = run("policies", "schema")
    assert code == 0
    assert json.loads(out) == json_schema()
