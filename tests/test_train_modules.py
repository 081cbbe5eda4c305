"""The scripts that train a scorer and exit routers, and what they made of the bundled model."""

from __future__ import annotations

import pathlib
import sys
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

import support
from tvc import api
from tvc.policy import load_policy, resolve
from tvc.policy.weights import check_weights, trained

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"
MODEL = EXAMPLES / "models" / "tiny-llava"
MODULES = {"train_scorer": "scorer", "train_exit_router": "exit-router"}


@pytest.fixture(scope="module")
def bundled() -> tuple[Any, Any]:
    model = transformers.AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32)
    return model.eval(), transformers.AutoProcessor.from_pretrained(MODEL)


@pytest.mark.parametrize("name", MODULES)
def test_a_script_trains_what_its_policy_takes(
    name: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tmp_path / f"{MODULES[name]}.safetensors"
    monkeypatch.setattr(sys, "argv", [name, "--examples", "20", "--epochs", "1", "--output", str(made)])
    support.script(f"examples/{name}.py").main()
    policy = (EXAMPLES / "policies" / f"{MODULES[name]}.yaml").read_text()
    (tmp_path / "policy.yaml").write_text(policy)
    layout = api.layout_of(MODEL)
    for text in (tmp_path / "policy.yaml", EXAMPLES / "policies" / f"{MODULES[name]}.yaml"):
        check_weights(resolve(load_policy(text), layout).steps, layout)
    assert made.stat().st_size == (EXAMPLES / "policies" / made.name).stat().st_size < 1e6


def test_the_bundled_scorer_finds_what_questions_attend_to(bundled: tuple[Any, Any]) -> None:
    model, processor = bundled
    script = support.script("examples/train_scorer.py")
    model.set_attn_implementation("eager")
    taught = script.lessons(model, processor, "test", 3, 30)
    model.set_attn_implementation("sdpa")
    weights = safetensors.torch.load_file(script.WEIGHTS)
    scorer = script.Scorer(128, script.HIDDEN)
    scorer.load_state_dict(weights)
    share, most = script.caught(scorer, taught)
    assert share > (most + taught[2].shape[1] // 10 / taught[2].shape[1]) / 2  # nearer to the best than to chance
    ((_, primitive),) = trained(resolve(load_policy(EXAMPLES / "policies" / "scorer.yaml"), api.layout_of(MODEL)).steps)
    visual, text, _ = taught
    words = text[:, None].expand(-1, 2, -1), torch.ones(len(text), 2, dtype=torch.bool)  # the mean, and a last token
    score = primitive.apply(feature=visual, text=words, weights=primitive.tensors())  # type: ignore[attr-defined]
    torch.testing.assert_close(score, scorer(visual, text).detach(), rtol=1e-4, atol=1e-4)


def test_the_bundled_routers_seldom_let_go_too_early(bundled: tuple[Any, Any]) -> None:
    script = support.script("examples/train_exit_router.py")
    taught = script.lessons(*bundled, "test", 3, 50)
    weights = safetensors.torch.load_file(script.WEIGHTS)
    wrong = leaves = 0.0
    for layer, (states, right) in taught.items():
        router = script.Router(128, script.HIDDEN)
        router.load_state_dict({n: weights[f"language.{layer}.{n}"] for n in ("hidden.weight", "route.weight")})
        told = router(states).argmax(1) == 1
        wrong, leaves = wrong + float((told & ~right).sum()), leaves + float(told.sum())
    assert leaves > 75  # of four layers and fifty questions
    assert wrong < 0.05 * leaves
