"""How the rotary embedding numbers tokens: as the model does, anew behind cuts, or visual ones in fractions."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

from tvc.errors import SiteError
from tvc.policy.document import Document, nearest
from tvc.program import Layout

WHOLE = 256  # visual tokens that a stride of 256 gives a position each
Word = Literal["keep", "renumber"]
WORDS = get_args(Word)


@dataclasses.dataclass(frozen=True)
class Stride:
    """A visual token stands `stride` / 256 of a position behind the one before it; text goes on at whole positions.

    Source: V2PE, arXiv:2412.09616.
    """

    stride: int


Positions = Word | Stride
PATH = ("positions",)


def read_positions(document: Document) -> Positions:
    """What the expanded policy says under `positions`, `keep` where it says nothing.

    Raises:
        PolicyError: a word or a key that there is not, or a stride out of range.
    """
    value = document.data.get("positions", "keep")
    if isinstance(value, dict):
        for key in value:
            if key != "stride":
                raise document.unknown((*PATH, key), key, ("stride",), "`positions`")
        stride = value.get("stride")
        if isinstance(stride, int) and not isinstance(stride, bool) and 1 <= stride <= WHOLE:
            return Stride(stride)
        raise document.error(
            (*PATH, "stride"),
            "`stride` has a value that it can't have",
            got="nothing" if stride is None else stride,
            want=f"a whole number from 1 to {WHOLE}: the positions that {WHOLE} visual tokens take",
            fix="write positions: {stride: 64}",
            slug="bad-value",
        )
    if value in WORDS:
        return value  # type: ignore[no-any-return]
    close = nearest(value, WORDS) if isinstance(value, str) else None
    raise document.error(
        PATH,
        "`positions` has a value that it can't have",
        got=value,
        want=f"one of {', '.join(WORDS)}, or {{stride: N}}",
        fix=f'write "{close or WORDS[0]}"',
        slug="bad-value",
    )


def positions_data(positions: Positions) -> str | dict[str, int]:
    """What `read_positions` reads as `positions`."""
    return dataclasses.asdict(positions) if isinstance(positions, Stride) else positions


def stride_of(positions: Positions) -> int:
    """256ths of a position that a visual token takes, 0 where positions are the model's own."""
    return positions.stride if isinstance(positions, Stride) else 0


def positions_schema() -> list[dict[str, Any]]:
    """JSON Schemas, one of which `positions` fits."""
    number = {"type": "integer", "minimum": 1, "maximum": WHOLE}
    fractions = {
        "type": "object",
        "additionalProperties": False,
        "required": ["stride"],
        "properties": {"stride": {"anyOf": [number, {"$ref": "#/$defs/template"}]}},
        "description": f"positions that {WHOLE} visual tokens take",
    }
    return [{"enum": list(WORDS)}, fractions]


def check_positions(document: Document, positions: Positions, layout: Layout) -> None:
    """Refuses fractions of a position where the decoder cannot take them.

    Raises:
        SiteError: with the reason.
    """
    if isinstance(positions, Stride) and layout.whole_positions:
        raise SiteError(
            f"the positions of {layout.model_type} cannot be fractions",
            where=document.where(PATH),
            got=f"stride: {positions.stride}, and {layout.whole_positions}",
            want="a decoder that turns queries and keys by one number a token (rotary embedding of one axis)",
            fix="write positions: keep",
            slug="no-fractions",
        )
