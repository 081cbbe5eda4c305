"""One traced program of each kind, shared by the tests: a pass works on a copy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

import support
from tvc import compiler
from tvc.policy import load_policy, resolve
from tvc.program import Program
from tvc.trace.load import load
from tvc.trace.survey import Survey, survey


@dataclasses.dataclass
class Traced:
    """A tiny model, what was read of it and its graphs before any reduction."""

    model: Any
    survey: Survey
    program: Program

    def resolved(self, policy: Any, settings: tuple[str, ...] = ()) -> Any:
        return resolve(load_policy(policy, settings), self.survey.layout)


@pytest.fixture(scope="session")
def traced() -> Callable[[str], Traced]:
    """`traced(family)`: traced once a session."""
    made: dict[str, Traced] = {}

    def get(family: str) -> Traced:
        if family not in made:
            model, processor = support.build(family)
            surveyed = survey(load(model, processor=processor).meta, processor)
            made[family] = Traced(model, surveyed, compiler.trace(model, surveyed, progress=lambda _line: None))
        return made[family]

    return get
