"""The harness on a clock that is moved by hand, and on real calls."""

from __future__ import annotations

import json
import subprocess

import pytest

from tvc.errors import ArgumentError
from tvc.report.timing import Timing, Variant, environment, measure, rows, text


class Clock:
    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def __call__(self) -> float:
        return self.now

    def variant(self, name: str, seconds: float, setup: float = 0.0) -> Variant:
        def move(amount: float) -> str:
            self.now += amount
            return name

        return Variant(lambda _: self.order.append(move(seconds)), lambda: move(setup))


def test_variants_take_turns_and_setup_is_not_timed():
    clock = Clock()
    measured = measure({"a": clock.variant("a", 0.002), "b": clock.variant("b", 0.004, setup=5)}, 4, 2, clock=clock)
    assert clock.order == ["a", "b", "b", "a"] * 3
    assert measured["a"].times == pytest.approx((2.0,) * 4)
    assert measured["b"].times == pytest.approx((4.0,) * 4)


def test_the_device_is_waited_for_before_the_clock_is_read():
    events = []
    clock = lambda: events.append("clock") or 0.0  # noqa: E731
    measure(
        {"a": Variant(lambda _: events.append("call"))}, 1, 0, synchronize=lambda: events.append("wait"), clock=clock
    )
    assert events == ["wait", "clock", "call", "wait", "clock"]


def test_spread_is_interpolated():
    timing = Timing((5.0, 1.0, 3.0, 2.0, 4.0, 6.0))
    assert timing.median == 3.5
    assert timing.quantile(0.2) == pytest.approx(2.0)
    assert timing.quantile(0.8) == pytest.approx(5.0)


def test_ratios_are_taken_within_turns():
    # A slow spell in the second half falls on both: the ratio does not move.
    dense, compiled = Timing((10.0, 10.0, 30.0, 30.0)), Timing((5.0, 5.0, 15.0, 15.0))
    ideal = Timing((4.0, 4.0, 12.0, 12.0))
    made = {row["variant"]: row for row in rows({"dense": dense, "compiled": compiled, "ideal": ideal}, case="c")}
    assert made["compiled"]["speedup"] == 2.0
    assert made["compiled"]["efficiency"] == pytest.approx(0.8)
    assert made["ideal"]["efficiency"] == 1.0
    assert made["dense"]["case"] == "c"
    assert rows({"compiled": compiled})[0]["speedup"] is None


def test_nothing_to_measure_is_refused():
    with pytest.raises(ArgumentError, match="nothing-to-measure"):
        measure({}, 3)


def test_the_environment_is_json_and_knows_its_commit(tmp_path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "file").write_text("one")
    for arguments in (["init", "-q"], ["add", "file"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *arguments], check=True)
    facts = json.loads(json.dumps(environment(tmp_path)))
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert (facts["commit"], facts["dirty"]) == (head, False)
    (tmp_path / "file").write_text("two")
    assert environment(tmp_path)["dirty"] is True
    assert facts["versions"]["torch"]
    assert facts["cpu"]


def test_a_folder_outside_a_repository_has_no_commit(tmp_path):
    assert environment(tmp_path)["commit"] is None


def test_a_table_shows_filled_columns():
    made = rows({"dense": Timing((10.0,)), "compiled": Timing((4.0,))}, case="c")
    lines = text(made, ("case", "variant", "median_ms", "speedup", "efficiency")).splitlines()
    assert lines[0].split() == ["case", "variant", "median", "ms", "speedup"]
    assert lines[2].split() == ["c", "compiled", "4.00", "2.50"]
