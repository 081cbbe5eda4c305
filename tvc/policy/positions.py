"""How the rotary embedding numbers tokens: as the model does, anew behind cuts or in fractions; its frequencies."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, get_args

from pydantic import Field

from tvc.errors import SiteError
from tvc.kernels.op import Primitive
from tvc.policy.document import Document, nearest
from tvc.policy.explain import build
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


class Rescale(Primitive):
    """The rotary embedding turns more slowly, so that longer inputs stay within the turns trained on: frequencies that
    turn seldom within the window are divided by the factor, fast ones stay, and logits grow with its logarithm.

    Source: YaRN, arXiv:2309.00071.
    """

    key: ClassVar[str] = "rescale"
    factor: float = Field(gt=1, le=1024, description="by how much longer than the window inputs may be")
    window: int | None = Field(None, gt=0, le=1 << 30, description="positions trained on; default: those of the model")
    fast: float = Field(32, gt=0, le=1024, description="turns within the window from which on a frequency stays")
    slow: float = Field(1, gt=0, le=1024, description="turns within the window up to which it is divided by all")


Positions = Word | Stride | Rescale
PATH = ("positions",)


def read_positions(document: Document) -> Positions:
    """What the expanded policy says under `positions`, `keep` where it says nothing.

    Raises:
        PolicyError: a word or a key that there is not, or a stride out of range.
    """
    value = document.data.get("positions", "keep")
    if isinstance(value, dict):
        for key in value:
            if key not in ("stride", "rescale"):
                raise document.unknown((*PATH, key), key, ("stride", "rescale"), "`positions`")
        if "rescale" in value and len(value) == 1:
            return build(Rescale, document, (*PATH, "rescale"), value["rescale"])  # type: ignore[return-value]
        if len(value) > 1:
            raise document.error(
                PATH,
                "`positions` asks for two things, of which no more than one can be had",
                got=" and ".join(value),
                want="stride or rescale",
                fix="remove one of them",
                slug="two-positions",
            )
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
        want=f"one of {', '.join(WORDS)}, {{stride: N}} or {{rescale: {{factor: F}}}}",
        fix=f'write "{close or WORDS[0]}"',
        slug="bad-value",
    )


def positions_data(positions: Positions) -> str | dict[str, Any]:
    """What `read_positions` reads as `positions`."""
    if isinstance(positions, Rescale):
        return {"rescale": positions.model_dump(mode="json", exclude_none=True)}
    return dataclasses.asdict(positions) if isinstance(positions, Stride) else positions


def stride_of(positions: Positions) -> int:
    """256ths of a position that a visual token takes, 0 where positions are the model's own."""
    return positions.stride if isinstance(positions, Stride) else 0


def traced_as(positions: Positions) -> Positions:
    """What of it the trace of a decoder knows: renumbering comes with the cuts."""
    return positions if isinstance(positions, (Stride, Rescale)) else "keep"


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
    return [{"enum": list(WORDS)}, fractions, _rescale_schema()]


def _rescale_schema() -> dict[str, Any]:
    settings = Rescale.model_json_schema()
    for name, field in settings["properties"].items():
        said = {key: field.pop(key) for key in ("description", "default", "title") if key in field}
        settings["properties"][name] = {"anyOf": [field, {"$ref": "#/$defs/template"}]} | said
    one = {"type": "object", "additionalProperties": False, "required": ["rescale"]}
    return {**one, "properties": {"rescale": settings}}


def check_positions(document: Document, positions: Positions, sites: Sequence[str], layout: Layout) -> None:
    """Refuses new numbers, fractions of a position, and other frequencies, where the decoder cannot take them.

    Args:
        sites: where the steps act.

    Raises:
        SiteError: with the reason.
    """
    if positions == "renumber":
        _check_numbers(document, sites, layout)
    if isinstance(positions, Stride) and layout.whole_positions:
        raise SiteError(
            f"the positions of {layout.model_type} cannot be fractions",
            where=document.where(PATH),
            got=f"stride: {positions.stride}, and {layout.whole_positions}",
            want="a decoder that turns queries and keys by one number a token (rotary embedding of one axis)",
            fix="write positions: keep",
            slug="no-fractions",
        )
    crosses = any(layer.crosses for layer in layout.language)
    if isinstance(positions, Rescale) and (layout.fixed_frequencies or crosses):
        raise SiteError(
            f"the frequencies of {layout.model_type} cannot be rescaled",
            where=document.where((*PATH, "rescale")),
            got=layout.fixed_frequencies or "its text reads visual tokens that have no position",
            want="a decoder whose layers share one rotary embedding as it was trained",
            fix="write positions: keep",
            slug="fixed-frequencies",
        )


def _check_numbers(document: Document, sites: Sequence[str], layout: Layout) -> None:
    if not any(site.startswith("language.") for site in sites):
        raise SiteError(
            "positions are numbered afresh behind a cut of the decoder, and there is none",
            where=document.where(PATH),
            got=f"renumber, and {'steps at ' + ', '.join(sites) if sites else 'no step'}",
            want="a step at a language site",
            fix="write positions: keep, or move a step to language.0",
            slug="nothing-to-renumber",
        )
    if layout.kept_positions:
        raise SiteError(
            f"the tokens of {layout.model_type} cannot be numbered afresh behind a cut",
            where=document.where(PATH),
            got=f"renumber, and {layout.kept_positions}",
            want="a decoder whose layers turn queries and keys by one number a token (rotary embedding of one axis)",
            fix="write positions: keep",
            slug="no-renumber",
        )
