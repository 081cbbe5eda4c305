"""Any policy either does what it says on any model or is refused by name: a few of them by default, many on request."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
import random_cases
import random_inputs
import random_models
import random_report
import random_sweep
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tvc.errors import TvcError
from tvc.policy import load_policy, resolve
from tvc.report.cost import one_image
from tvc.report.schedule import make_plan

# Two that can be cut inside the encoder, of which one has tiles, and one that cannot.
READ = ("llava", "smolvlm", "qwen2_5_vl")
# Slow draws and many refusals are what these strategies are made of.
DRAWN = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}


@pytest.fixture(scope="module")
def layouts() -> dict[str, tuple[Any, Any]]:
    """Blocks and layout of each family that policies are resolved against."""
    models = [random_models.Model(family, {}, 0) for family in READ]
    benches = [random_sweep.Bench.of(model) for model in models]
    return {bench.family: (bench.blocks, bench.prepared.survey.layout) for bench in benches}


@pytest.fixture(scope="module")
def bench() -> Any:
    """The cheapest model that can be cut everywhere."""
    small = {"text_config": {"num_hidden_layers": 2}, "vision_config": {"num_hidden_layers": 3}}
    model = random_models.Model("llava", small, 0)
    return random_sweep.Bench.of(model)


@settings(max_examples=150, **DRAWN)
@given(data=st.data(), family=st.sampled_from(READ))
def test_any_policy_is_planned_or_refused_by_name(layouts: Any, data: Any, family: str) -> None:
    blocks, layout = layouts[family]
    drawn = data.draw(random_cases.policies(blocks))
    try:
        policy = load_policy(drawn)
        assert load_policy(policy.to_yaml()) == policy
        resolved = resolve(policy, layout)
    except TvcError:
        return
    assert make_plan(resolved, one_image(layout)).layers
    assert resolve(load_policy(resolved.to_yaml()), layout).digest() == resolved.digest()


@settings(max_examples=3, **DRAWN)
@given(data=st.data(), calls=st.lists(random_inputs.inputs(), min_size=1, max_size=2))
def test_random_policies_equal_their_definition(bench: Any, data: Any, calls: list[Any]) -> None:
    policy = data.draw(random_cases.policies(bench.blocks, bench.components).filter(bench.resolves))
    _check(bench.run(policy, calls, "draft"))


@pytest.mark.conformance
@settings(max_examples=2, phases=[Phase.generate], **DRAWN)
@given(data=st.data(), calls=st.lists(random_inputs.inputs(), min_size=2, max_size=2))
def test_random_policies_equal_their_definition_once_exported(bench: Any, data: Any, calls: list[Any]) -> None:
    policy = data.draw(random_cases.policies(bench.blocks, bench.components).filter(bench.resolves))
    _check(bench.run(policy, calls))


def test_a_policy_that_cannot_be_read_is_refused(bench: Any) -> None:
    step = {"at": "language.1", "select": {"stride": "50%"}}
    assert bench.run({"version": 1, "steps": [step, step]}, []).label() == "refused(same-site)"


def _check(outcome: Any) -> None:
    assert outcome.fine, f"{outcome.label()} {outcome.where}\n{outcome.trace}"


@pytest.mark.conformance
@pytest.mark.parametrize("family", random_models.FAMILIES)
def test_random_policies_equal_their_definition_everywhere(
    family: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(random_sweep, "RESULTS", tmp_path / "cases.jsonl")
    random_sweep.sweep(cases=20, seed=0, minutes=10, families=(family,))
    rows = random_sweep.read()
    assert rows
    bad = [row for row in rows if row["outcome"] in ("failed", "crashed")]
    assert not bad, random_report.summary(rows)


def test_the_sweep_goes_on_where_it_stopped(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_sweep, "RESULTS", tmp_path / "cases.jsonl")
    monkeypatch.setattr(random_sweep.Bench, "run", lambda *_: random_sweep.Outcome("passed", comparisons=5))
    random_sweep.sweep(cases=4, seed=3, minutes=1, families=("llava",))
    before = random_sweep.read()
    random_sweep.sweep(cases=6, seed=3, minutes=1, families=("llava",))
    rows = random_sweep.read()
    assert rows[:4] == before
    assert [row["number"] for row in rows] == list(range(6))
    assert "6 cases, 30 comparisons" in random_report.summary(rows)
    model = random_sweep.model_of(3, 5, ("llava",))
    assert random_models.Model(**rows[5]["model"]) == model
    assert random_sweep.Case.from_json(rows[5]) == random_sweep.case_of(3, 5, model, random_sweep.Bench.of(model))


def test_what_was_in_the_cases_is_counted(tmp_path: pathlib.Path) -> None:
    photo, text = {"question": 0, "photos": [[0, 60, 60]]}, {"question": 0, "photos": []}
    steps = [
        {"at": "vision.1", "merge": {"bipartite": {"keep": "50%"}}},
        {"at": "language.2", "score": "norm", "select": {"top": 3}, "rest": "drop"},
    ]
    model = {"family": "llava", "changes": {}, "seed": 0, "dtype": "bfloat16"}
    row = {
        "number": 7,
        "seed": 5,
        "model": model,
        "policy": {"version": 1, "name": "random", "steps": steps},
        "inputs": [{"samples": [photo, text], "right": True, "turn": 2}],
        "target": "ort",
        "commit": "abc",
        "outcome": "passed",
        "what": "",
        "where": "",
        "comparisons": 9,
        "seconds": 6.0,
    }
    told = random_report.record([row, {**row, "outcome": "failed", "number": 8}], tmp_path / "record.json")
    assert "2 cases, 18 comparisons" in told
    made = json.loads((tmp_path / "record.json").read_text("utf-8"))
    assert made["outcomes"] == {"passed": 1, "failed": 1}
    assert made["bad"] == {"failed ": ["5:8"]}
    assert [(run["seed"], run["commit"], run["cases"]) for run in made["runs"]] == [(5, "abc", [7, 8])]
    assert made["earlier"] == []
    newer = {**row, "seed": 6}
    mended = {**row, "outcome": "passed", "number": 8, "commit": "abd", "was": "failed"}
    assert "1 cases, 9 comparisons" in random_report.record([newer, mended], tmp_path / "record.json")
    both = json.loads((tmp_path / "record.json").read_text("utf-8"))
    assert (both["cases"], both["mended"]) == (1, {"5:8": "failed, now passed"})
    assert [(one["cases"], one["outcomes"]) for one in both["earlier"]] == [(2, {"passed": 1, "failed": 1})]
    random_report.record([newer, mended, newer | {"number": 9}], tmp_path / "record.json")
    more = json.loads((tmp_path / "record.json").read_text("utf-8"))
    assert (more["cases"], len(more["earlier"])) == (2, 1)
    found = made["coverage"]
    assert found["components"] == {"vision+language": 2}
    assert (found["merge"]["bipartite"], found["merge"]["windows"], found["select"]["top"]) == (2, 0, 2)
    assert found["type"] == {"bfloat16": 2}
    assert found["inputs"] == dict.fromkeys(
        ("a sample without a picture beside others", "batch of 2", "later turn", "padded on the right"), 2
    )
