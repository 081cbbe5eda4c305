"""What a policy says of all decoder layers at once, beside its steps: whom tokens see, what caches hold of frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from tvc.errors import SiteError
from tvc.kernels.op import Primitive
from tvc.policy.document import Document
from tvc.policy.explain import build
from tvc.program import Layout

_MANY = 1_000_000  # more frames than any prompt holds


class Option(Primitive):
    """What stands under the policy's own key `place`, by its name: `attention: {chunks: {frames: 4}}`."""

    place: ClassVar[str]


class Chunks(Option):
    """A visual token sees those of its own chunk of frames and of the chunks right before it; text is seen by all, and
    sees all.
    """

    place: ClassVar[str] = "attention"
    key: ClassVar[str] = "chunks"
    frames: int = Field(gt=0, le=_MANY, description="frames of a chunk; an image is a frame")
    previous: int = Field(0, ge=0, le=_MANY, description="chunks before its own that a visual token sees as well")


class Unrotated(Option):
    """Text reads visual tokens as if it stood where they stand: its logits are those of query and key before positions
    turn them, and caches hold visual keys like this. Visual tokens read each other, and all read text, as ever.

    A visual token of a later turn reads those of earlier ones as text does. Source: Vista-LLaMA, arXiv:2312.08870.
    """

    place: ClassVar[str] = "attention"
    key: ClassVar[str] = "unrotated"
    shorthand: ClassVar[str | None] = "keys"
    keys: Literal["visual"] = Field(description="whose keys text reads without the turn of positions")


class Pool(Option):
    """Once a prompt has been read, caches hold the mean key and value of several neighbours in a frame, at the place of
    the first of them; chunks of frames that are named stay as they are.
    """

    place: ClassVar[str] = "cache"
    key: ClassVar[str] = "pool"
    tokens: int = Field(gt=1, le=_MANY, description="tokens of a frame that become one entry; its last may be fewer")
    chunk: int = Field(1, gt=0, le=_MANY, description="frames of a chunk; an image is a frame")
    first: int = Field(0, ge=0, le=_MANY, description="chunks at the start that stay as they are")
    last: int = Field(0, ge=0, le=_MANY, description="chunks at the end that stay as they are")
    best: int = Field(
        0, ge=0, le=_MANY, description="chunks that stay as they are since they are most like the text behind them all"
    )

    def held(self, frames: Sequence[int], fires: bool) -> int:
        """How many entries caches hold of frames of so many tokens: the plan's side, the most; `fires`: the least."""
        chunks = [frames[start : start + self.chunk] for start in range(0, len(frames), self.chunk)]
        sizes = [(sum(chunk), sum(-(-tokens // self.tokens) for tokens in chunk)) for chunk in chunks]
        named = [n < self.first or n >= len(chunks) - self.last for n in range(len(chunks))]
        saved = sorted(whole - pooled for (whole, pooled), stays in zip(sizes, named, strict=True) if not stays)
        # The best may be among those that stay anyway.
        further = min(len(saved), max(0, self.best - sum(named)) if fires else self.best)
        return sum(whole for whole, _ in sizes) - sum(saved[further:] if fires else saved[: len(saved) - further])


OPTIONS: dict[str, tuple[type[Option], ...]] = {"attention": (Chunks, Unrotated), "cache": (Pool,)}


def read_options(document: Document) -> dict[str, Any]:
    """What the expanded policy says under each of the options' keys, None where it says nothing.

    Raises:
        PolicyError: another name than the option's, or a setting that it can't have.
    """
    return {place: _read(document, place, OPTIONS[place]) for place in OPTIONS}


def _read(document: Document, place: str, known: Sequence[type[Option]]) -> Primitive | None:
    written, named = document.data.get(place), {option.key: option for option in known}
    if written is None:
        return None
    if not isinstance(written, dict) or not written:
        raise document.error(
            (place,),
            f"`{place}` does not say what it asks for",
            got=written,
            want=f"{' or '.join(named)}, and its settings",
            fix=f"write {place}: {{{known[0].key}: {{{next(iter(known[0].model_fields))}: 4}}}}",
            slug="wrong-type",
        )
    for key in written:
        if key not in named:
            raise document.unknown((place, key), key, tuple(named), f"`{place}`")
    if len(written) > 1:
        raise document.error(
            (place,),
            f"`{place}` asks for two things, of which no more than one can be had",
            got=" and ".join(written),
            want=" or ".join(named),
            fix="remove one of them",
            slug="two-rules",
        )
    ((key, settings),) = written.items()
    return build(named[key], document, (place, key), settings)


def options_data(options: Mapping[str, Option | None]) -> dict[str, Any]:
    """What `read_options` reads, by the policy's keys; those that say nothing are left out."""
    return {place: {made.key: made.model_dump(mode="json")} for place, made in options.items() if made is not None}


def options_schema(template: Mapping[str, Any]) -> dict[str, Any]:
    """JSON Schemas of what stands under each of the keys; any setting may be a `template` as well."""
    found = {}
    for place, known in OPTIONS.items():
        one = {"type": "object", "additionalProperties": False, "minProperties": 1, "maxProperties": 1}
        found[place] = {**one, "properties": {option.key: _schema(option, template) for option in known}}
    return found


def _schema(option: type[Option], template: Mapping[str, Any]) -> dict[str, Any]:
    settings = option.model_json_schema()
    short = [] if option.shorthand is None else [dict(settings["properties"][option.shorthand]), template]
    for name, field in settings["properties"].items():
        said = {key: field.pop(key) for key in ("description", "default", "title") if key in field}
        settings["properties"][name] = {"anyOf": [field, template]} | said
    return {"anyOf": [settings, *short]} if short else settings


def check_options(
    document: Document, options: Mapping[str, Option | None], sites: Sequence[str], layout: Layout
) -> None:
    """Refuses chunks of frames where the decoder does not tell frames.

    Args:
        sites: of the policy's steps, as they are written.

    Raises:
        SiteError: with the reason.
    """
    for place, option in options.items():
        if option is None or isinstance(option, Unrotated):
            continue
        before = [site for site in sites if not site.startswith("language.")]
        crossing = any(layer.crosses for layer in layout.language)
        if crossing or before:
            raise SiteError(
                f"`{place}` divides the visual tokens of a prompt into chunks of whole frames",
                where=document.where((place, option.key)),
                got=f"{layout.model_type}, whose text reads visual tokens that are in no slot of the sequence"
                if crossing
                else f"{place}: {option.key}, and a step at {before[0]}, which leaves gaps in them",
                want="visual tokens in the decoder's sequence" if crossing else "steps at language sites alone",
                fix=f"leave {place} out" if crossing else "write at: language.0",
                slug="no-frames",
            )
