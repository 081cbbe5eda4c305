"""How many visual tokens of a scope stay: a count, a share, or an average over the decoder's layers.

A share is stored as an integer permille, because a float share of a symbolic length leaves guards behind that
`torch.export` cannot prove: `V * 125 // 1000` traces, `int(V * 0.125)` does not.
"""

from __future__ import annotations

import decimal
import fractions
import re
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, model_serializer, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

from tvc.errors import PolicyError

WANT = "a count (54), a share (25%) or an average over the layers ({average: 64})"
LARGEST = 1_000_000_000  # of any count: times a number of images it stays in 64 bits
_SHARE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*")


def _refuse(slug: str, summary: str, got: object, fix: str) -> PydanticCustomError:
    return PydanticCustomError(slug, "{summary}", {"summary": summary, "got": str(got), "want": WANT, "fix": fix})  # type: ignore[arg-type]


def _percent(permille: int) -> str:
    """The share as it is written in a policy: 250 is `25%`, 125 is `12.5%`."""
    return f"{permille // 10}.{permille % 10}%" if permille % 10 else f"{permille // 10}%"


def _float_fix(value: float) -> str:
    """What the writer of a bare float most likely meant, said both ways."""
    if 0 < value <= 1:
        return f"write {_percent(max(1, round(value * 1000)))} if that share is kept, or a count such as 64"
    return "write a share that is kept, such as 50%, or a whole count such as 64"


class Budget(BaseModel):
    """What stays of the visual tokens that enter a step; exactly one of the three fields is set.

    In YAML it is written `54`, `25%` or `{average: 64}` and dumps back to the same text.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    count: int | None = None
    permille: int | None = None
    average: int | None = None

    @model_validator(mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        if isinstance(value, Budget):
            return {name: number for name, number in value.__dict__.items() if number is not None}
        if isinstance(value, dict):
            return cls._from_mapping(value)
        if isinstance(value, float):
            raise _refuse(
                "bare-float",
                "a budget is a bare number between counts and shares: papers use it for what stays and for what goes",
                value,
                _float_fix(value),
            )
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            raise _refuse(
                "bad-budget", "a budget is of the wrong kind", value, "write 50% (kept) or a count such as 64"
            )
        return {"count": cls._positive(value)} if isinstance(value, int) else {"permille": cls._share(value)}

    @classmethod
    def _from_mapping(cls, value: dict[str, Any]) -> dict[str, int]:
        """`{average: 64}` from YAML; `{count: ...}` and `{permille: ...}` are how Python code builds a budget."""
        if len(value) != 1 or next(iter(value)) not in ("average", "count", "permille"):
            raise _refuse("bad-budget", "a budget mapping has other keys than `average`", value, "write {average: 64}")
        ((name, number),) = value.items()
        if isinstance(number, bool) or not isinstance(number, int):
            raise _refuse("bad-budget", f"the budget's `{name}` is no whole number", number, f"write {{{name}: 64}}")
        if name == "permille" and not 0 < number <= 1000:
            raise _refuse("bad-budget", "a share lies outside 1 to 1000 permille", number, "write a share up to 100%")
        return {name: cls._positive(number)}

    @staticmethod
    def _positive(value: int) -> int:
        if value <= 0:
            raise _refuse(
                "empty-budget",
                "a budget keeps nothing",
                value,
                "write a count of at least 1; to drop every visual token use `exit: {when: always}`",
            )
        if value > LARGEST:
            raise _refuse("bad-budget", "a count is larger than any number of tokens", value, "write 100% to keep all")
        return value

    @classmethod
    def _share(cls, text: str) -> int:
        match = _SHARE.fullmatch(text)
        if match is None:
            fix = f"write {text.strip()} without quotes" if text.strip().isdigit() else "write a share such as 25%"
            raise _refuse("bad-budget", "a budget text is not a share", text, fix)
        permille = decimal.Decimal(match[1]) * 10
        if permille == 0:
            raise _refuse(
                "empty-budget",
                "a budget keeps nothing",
                text,
                "write at least 0.1%; to drop every visual token use `exit: {when: always}`",
            )
        if permille > 1000:
            raise _refuse("bad-budget", "a share is above 100%", text, "write a share up to 100%, or a count")
        if permille != int(permille):
            nearest = _percent(max(1, int(permille.to_integral_value())))
            raise _refuse("bad-budget", "a share is finer than a tenth of a percent", text, f"write {nearest}")
        return int(permille)

    @model_serializer
    def _dump(self) -> int | str | dict[str, int]:
        if self.permille is not None:
            return _percent(self.permille)
        return self.count if self.count is not None else {"average": self.average or 0}

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        average = {"type": "integer", "minimum": 1}
        return {
            "title": "Budget",
            "description": WANT,
            "anyOf": [
                {"type": "integer", "minimum": 1},
                {"type": "string", "pattern": r"^\d+(\.\d)?%$"},
                {
                    "type": "object",
                    "properties": {"average": average},
                    "required": ["average"],
                    "additionalProperties": False,
                },
            ],
        }

    def __str__(self) -> str:
        dumped = self._dump()
        return f"{{average: {self.average}}}" if isinstance(dumped, dict) else str(dumped)

    def slots(self, visual: int, scopes: int) -> int:
        """The static number of slots the kept tokens of a chunk take; enough for every sample, never above V.

        Args:
            visual: V, the visual slots of the chunk (int or SymInt).
            scopes: how many scopes share the chunk at most (int or SymInt); 0 where it has no visual token.
        """
        if self.permille is not None:
            return visual * self.permille // 1000
        return torch.sym_min(self._counted() * scopes, visual)

    def kept(self, entering: int) -> int:
        """How many of the `entering` visual tokens of one scope stay (0 where a share of them rounds down to 0)."""
        return entering * self.permille // 1000 if self.permille is not None else min(self._counted(), entering)

    def scaled(self, factor: fractions.Fraction) -> Budget:
        """The budget times a factor: a share stays between a tenth of a percent and all, a count is at least 1."""
        if self.permille is not None:
            return Budget(permille=min(1000, max(1, int(self.permille * factor))))
        return Budget(count=max(1, int(self._counted() * factor)))

    def _counted(self) -> int:
        if self.count is None:
            raise PolicyError(
                "an average over the layers has no count yet",
                where="budget",
                got=self,
                want="a count or a share",
                fix="resolve the policy for a model first: tvc.policy.resolve(policy, layout)",
                slug="unresolved-average",
            )
        return self.count
