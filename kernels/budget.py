"""How many visual tokens of a scope stay: a count, a share, or an average over the decoder's layers.

A share is stored as integers, because a float share of a symbolic length leaves guards behind that `torch.export`
cannot prove: `V * 125 // 1000` traces, `int(V * 0.125)` does not.
"""

from __future__ import annotations

import decimal
import fractions
import re
from typing import Annotated, Any

import torch
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    GetJsonSchemaHandler,
    WithJsonSchema,
    model_serializer,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

from tvc.errors import PolicyError
from tvc.kernels.portions import ROUNDINGS, Portion

WANT = "a count (54), a share (25%, 2/3) or an average over the layers ({average: 64})"
LARGEST = 1_000_000_000  # of any count: times a number of images it stays in 64 bits
FINEST = 1_000_000  # parts of a whole: times twice a count it stays in 64 bits
_PERCENT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*")
_FRACTION = re.compile(r"\s*(\d{1,20})\s*/\s*(\d{0,9}[1-9]\d{0,9})\s*")
_BY_ZERO = re.compile(r"\s*\d+\s*/\s*0+\s*")
_TENTHS = {"type": "string", "pattern": r"^\d+(\.\d)?%$"}
_TEMPLATE = {"type": "string", "pattern": r"^\{[A-Za-z_][A-Za-z0-9_]*\}$"}  # a parameter's value


def _refuse(slug: str, summary: str, got: object, fix: str, want: str = WANT) -> PydanticCustomError:
    return PydanticCustomError(slug, "{summary}", {"summary": summary, "got": str(got), "want": want, "fix": fix})  # type: ignore[arg-type]


def _percent(permille: int) -> str:
    """The share as it is written in a policy: 250 is `25%`, 125 is `12.5%`."""
    return f"{permille // 10}.{permille % 10}%" if permille % 10 else f"{permille // 10}%"


def _float_fix(value: float) -> str:
    """What the writer of a bare float most likely meant, said both ways."""
    if 0 < value <= 1:
        return f"write {_percent(max(1, round(value * 1000)))} if that share is kept, or a count such as 64"
    return "write a share that is kept, such as 50%, or a whole count such as 64"


def _written(share: Portion) -> str:
    """The fraction as it is written in a policy: in percent where tenths of one are enough, else `6/7`."""
    permille, left = divmod(1000 * share.parts, share.whole)
    return f"{share.parts}/{share.whole}" if left else _percent(permille)


class Budget(BaseModel):
    """What stays of the visual tokens that enter a step; exactly one of the four fields is set.

    In YAML it is written `54`, `25%`, `6/7`, `{share: 6/7, round: nearest}` or `{average: 64}`, and dumps to text that
    reads as the same budget.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    count: int | None = None
    permille: int | None = None  # rounded down
    exact: Portion | None = None  # any other share
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
        return {"count": cls._positive(value)} if isinstance(value, int) else cls._fields(cls._share(value))

    @classmethod
    def _from_mapping(cls, value: dict[str, Any]) -> dict[str, Any]:
        """`{average: 64}` and `{share: 25%, round: up}` from YAML; Python builds a budget from its fields."""
        if "share" in value and value.keys() <= {"share", "round"}:
            return cls._rounded(value["share"], value.get("round", "down"))
        if isinstance(exact := value.get("exact"), Portion):
            return cls._fields(exact)
        if len(value) != 1 or next(iter(value)) not in ("average", "count", "permille"):
            share = "share" in value or "round" in value
            summary = "a budget mapping has other keys than `average`, or `share` and `round`"
            fix = "write {share: 25%, round: nearest}" if share else "write {average: 64}"
            raise _refuse("bad-budget", summary, value, fix)
        ((name, number),) = value.items()
        if isinstance(number, bool) or not isinstance(number, int):
            raise _refuse("bad-budget", f"the budget's `{name}` is no whole number", number, f"write {{{name}: 64}}")
        if name == "permille" and not 0 < number <= 1000:
            raise _refuse("bad-budget", "a share lies outside 1 to 1000 permille", number, "write a share up to 100%")
        return {name: cls._positive(number)}

    @classmethod
    def _rounded(cls, share: Any, rounding: Any) -> dict[str, Any]:
        """The fields of `{share: ..., round: ...}`, whose share may be a parameter.

        What that stands for is rounded by `round` where it is a plain share; any other budget is what it is.
        """
        if rounding not in ROUNDINGS:
            raise _refuse(
                "bad-budget",
                "a share is rounded in a way that does not exist",
                rounding,
                "write round: nearest",
                want=f"one of {', '.join(ROUNDINGS)}",
            )
        inside: dict[str, Any] = cls._parse(share)  # type: ignore[operator]
        if not isinstance(share, str):
            return inside
        part = inside.get("exact") or Portion(inside["permille"])
        return cls._fields(part._replace(rounding=rounding))

    @staticmethod
    def _fields(share: Portion) -> dict[str, Any]:
        """The field that holds a share: thousandths that are rounded down are most of them, and numbers that read."""
        least = fractions.Fraction(share.parts, share.whole)
        permille = 1000 * least
        if permille.denominator == 1:
            plain = Portion(int(permille), 1000, share.rounding)
            return {"permille": plain.parts} if share.rounding == "down" else {"exact": plain}
        return {"exact": Portion(least.numerator, least.denominator, share.rounding)}

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
    def _share(cls, text: str) -> Portion:
        percent = _PERCENT.fullmatch(text)
        if percent is None:
            fraction = _FRACTION.fullmatch(text)
            if fraction is None:
                if _BY_ZERO.fullmatch(text):
                    raise _refuse("bad-budget", "a share is divided by zero", text, "write a fraction such as 2/3")
                fix = f"write {text.strip()} without quotes" if text.strip().isdigit() else "write a share such as 25%"
                raise _refuse("bad-budget", "a budget text is not a share", text, fix)
            part = fractions.Fraction(int(fraction[1]), int(fraction[2]))
        else:
            part = fractions.Fraction(decimal.Decimal(percent[1])) / 100
        if part == 0:
            raise _refuse(
                "empty-budget",
                "a budget keeps nothing",
                text,
                "write at least 0.1%; to drop every visual token use `exit: {when: always}`",
            )
        if part > 1:
            raise _refuse("bad-budget", "a share is above 100%", text, "write a share up to 100%, or a count")
        if percent is not None and (1000 * part).denominator != 1:
            nearest = _percent(max(1, round(1000 * part)))
            exact = f", or {part}" if part.denominator <= FINEST else ""
            raise _refuse("bad-budget", "a share is finer than a tenth of a percent", text, f"write {nearest}{exact}")
        if part.denominator > FINEST:
            near = max(part.limit_denominator(FINEST), fractions.Fraction(1, FINEST))
            raise _refuse("bad-budget", f"a fraction is of more than {FINEST} parts", text, f"write {near}")
        return Portion(part.numerator, part.denominator)

    @model_serializer
    def _dump(self) -> int | str | dict[str, int | str]:
        if self.share is not None:
            text, rounding = _written(self.share), self.share.rounding
            return text if rounding == "down" else {"share": text, "round": rounding}
        return self.count if self.count is not None else {"average": self.average or 0}

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        number = {"type": "integer", "minimum": 1}
        fraction = {"type": "string", "pattern": r"^\d+/\d+$"}
        share = {"anyOf": [_TENTHS, fraction, number, _TEMPLATE]}
        rounding = {"anyOf": [{"enum": list(ROUNDINGS)}, _TEMPLATE], "default": "down"}
        return {
            "title": "Budget",
            "description": WANT,
            "anyOf": [
                number,
                _TENTHS,
                fraction,
                _mapping({"average": number}, "average"),
                _mapping({"share": share, "round": rounding}, "share"),
            ],
        }

    def __str__(self) -> str:
        dumped = self._dump()
        if isinstance(dumped, dict):
            return "{" + ", ".join(f"{key}: {value}" for key, value in dumped.items()) + "}"
        return str(dumped)

    @property
    def share(self) -> Portion | None:
        """The share that stays, None of a count or an average."""
        return self.exact if self.permille is None else Portion(self.permille)

    @property
    def numbers(self) -> tuple[int, int]:
        """(permille, count) for an op, see `tvc.kernels.portions`."""
        return (0, self._counted()) if self.share is None else self.share.numbers

    def slots(self, visual: int, scopes: int) -> int:
        """The static number of slots the kept tokens of a chunk take; enough for every sample, never above V.

        Args:
            visual: V, the visual slots of the chunk (int or SymInt).
            scopes: how many scopes share the chunk at most (int or SymInt); 0 where it has no visual token.
        """
        if self.share is not None:
            return self.share.room(visual, scopes)
        return torch.sym_min(self._counted() * scopes, visual)

    def kept(self, entering: int) -> int:
        """How many of the `entering` visual tokens of one scope stay (0 where a share of them rounds down to 0)."""
        return self.share.of(entering) if self.share is not None else min(self._counted(), entering)

    def scaled(self, factor: fractions.Fraction) -> Budget:
        """The budget times a factor, a share in tenths of a percent up to all, a count 1 at least; rounding stays."""
        if self.share is not None:
            permille = int(factor * fractions.Fraction(1000 * self.share.parts, self.share.whole))
            return Budget(exact=Portion(min(1000, max(1, permille)), rounding=self.share.rounding))
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


def _mapping(properties: dict[str, Any], required: str) -> JsonSchemaValue:
    return {"type": "object", "properties": properties, "required": [required], "additionalProperties": False}


def _plain(budget: Budget) -> Budget:
    if budget.exact is not None:
        share = budget.exact
        raise _refuse(
            "bad-budget",
            "a share is exact or rounded where the step has a rounding of its own",
            budget,
            f"write {_percent(max(1, 1000 * share.parts // share.whole))}",
            want="a share in tenths of a percent (25%)",
        )
    return budget


# Of a primitive that says by itself how it rounds.
OwnRounding = Annotated[
    Budget,
    AfterValidator(_plain),
    WithJsonSchema(
        {
            "title": "Budget",
            "description": WANT.replace(", 2/3", ""),
            "anyOf": [{"type": "integer", "minimum": 1}, _TENTHS],
        }
    ),
]
