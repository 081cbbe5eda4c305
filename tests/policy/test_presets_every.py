"""Every preset by its name against its paper's formula: other sizes, ties, equal tokens, a budget of one and of all."""

from __future__ import annotations

import ast
import dataclasses
import pathlib

import pytest
from policy_cases import layout
from policy_formulas_everywhere import METHODS, number
from preset_given import KINDS, Given, differs

from tvc.policy import Policy, Step, load_policy, presets, resolve

CASES = [(name, kind) for name in METHODS for kind in KINDS if kind not in METHODS[name].none]


def steps_of(name: str, kind: str, weights: pathlib.Path) -> tuple[Step, ...]:
    """The steps of a preset, on a model with such pictures as the case has."""
    method = METHODS[name]
    frames, rows, columns = method.grid(kind)
    tokens = frames * rows * columns
    # A step is given tokens of its own, whatever an earlier one may leave: of a film there are enough for all.
    entering = tokens * (100 if method.film else 1)
    model = layout(vision=method.vision.get(kind, 9), language=32, visual=(entering,) * method.images)
    # Positions tell the rows of a film, as in Qwen2-VL; a picture is one tile.
    model = dataclasses.replace(model, tile_tokens=tokens + 1, spatial=method.film, in_order=not method.film)
    files = {"weights": str(weights)} if "weights" in load_policy(name).parameters else {}
    texts = [f"{key}={value}" for key, value in {**method.set(kind), **files}.items()]
    return resolve(load_policy(name, set=texts), model).steps[: method.steps]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_preset_is_its_formula(name: str, kind: str, tmp_path: pathlib.Path) -> None:
    method, weights = METHODS[name], tmp_path / "trained.safetensors"
    steps = steps_of(name, kind, weights)
    assert [step.at for step in steps] == method.sites()[: method.vision.get(kind, 9)]
    numbers = {key: number(value) for key, value in method.set(kind).items()}
    numbers["blocks"] = method.vision.get(kind, 9)
    for stage, step in enumerate(steps):
        given = Given(kind, method.grid(kind), seed=stage + method.seeds.get(kind, 0), numbers=numbers)
        given.train(steps, method.sizes(kind, given.tokens), weights)
        want = method.formula(given, method.value(kind), stage)
        assert differs(given.run(step), want, given) == "", f"step {stage} at {step.at}"
        if kind in ("one", "all") and stage == 0:
            assert len(want) == (method.fewest if kind == "one" else given.tokens)
        assert kind != "odd" or given.tokens % 2 == 1


def whole(policy: Policy) -> bool:
    """Whether a policy says something of all layers, beside its steps or in their place."""
    return policy.attention is not None or policy.cache is not None or policy.positions != "keep"


def test_every_preset_is_compared_with_its_formula() -> None:
    """Its steps here, and what it says of all layers in the tests of such presets, by its name."""
    loaded = {name: load_policy(name) for name in presets()}
    assert set(METHODS) == {name for name, policy in loaded.items() if policy.steps}
    tests = ast.parse(pathlib.Path(__file__).with_name("test_presets_whole.py").read_text())
    asked = {
        node.args[0].value  # type: ignore[attr-defined]
        for test in ast.walk(tests)
        if isinstance(test, ast.FunctionDef) and test.name.startswith("test_")
        for node in ast.walk(test)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "policy_of"
    }
    assert asked == {name for name, policy in loaded.items() if whole(policy)}


def test_no_case_is_missing_without_a_reason() -> None:
    for method in METHODS.values():
        assert set(method.none) <= {"one", "all"}
        assert all(method.none.values())
