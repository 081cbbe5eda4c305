"""The contract of a pass: Program -> Program, with declared needs and evidence of what it changed."""

from __future__ import annotations

import abc
import dataclasses
from typing import ClassVar, final

from tvc.errors import PassError
from tvc.program import Change, Program


class Pass(abc.ABC):
    """Facts in `needs` must hold before; `gives` hold afterwards and `ends` no longer do.

    A pass reports every change it makes; one that changes nothing has failed unless it is `may_be_idle`.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    gives: ClassVar[frozenset[str]] = frozenset()
    ends: ClassVar[frozenset[str]] = frozenset()
    may_be_idle: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return type(self).__name__

    @final
    def __call__(self, program: Program) -> Program:
        missing = self.needs - program.facts
        if missing:
            raise PassError(
                f"{self.name} ran before what it builds on",
                where=self.name,
                got=f"facts {sorted(program.facts)}",
                want=f"also {sorted(missing)}",
                fix="run the passes in the order of tvc.compiler",
                slug="pass-order",
            )
        fresh = dataclasses.replace(
            program,
            components={name: dataclasses.replace(part) for name, part in program.components.items()},
            stages=list(program.stages),
            history=list(program.history),
        )
        try:
            changes = self.run(fresh)
        except (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError) as problem:
            raise PassError(
                f"{self.name} cannot deal with a graph of this model",
                where=self.name,
                got=f"{type(problem).__name__}: {problem}",
                want="a graph that this pass can rewrite",
                fix="try another site or method, and report the model and the policy",
            ) from problem
        if not changes and not self.may_be_idle:
            raise PassError(
                f"{self.name} found nothing to do",
                where=self.name,
                got="no match",
                want="at least one change",
                fix="check that the policy names sites of this model",
                slug="nothing-matched",
            )
        fresh.facts = (program.facts - self.ends) | self.gives
        fresh.history.append((self.name, tuple(changes)))
        return fresh

    @abc.abstractmethod
    def run(self, program: Program) -> list[Change]:
        """Changes `program`, a copy made for this call, in place; returns the evidence."""
