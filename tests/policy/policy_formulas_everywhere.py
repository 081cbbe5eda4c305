"""Every preset whose steps choose or merge: its formula, with settings and pictures on which the two are compared."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import numpy
import policy_formulas_merge as merge
import policy_formulas_scenes as scenes
import policy_formulas_select as select
import policy_formulas_trained as trained
import policy_formulas_video as video
from policy_formulas import Left, best, cosine, kept, mean

Grid = tuple[int, int, int]  # frames, rows, columns
PICTURE, ODD = (1, 8, 8), (1, 7, 7)
FILM, ODD_FILM = (8, 4, 4), (7, 3, 5)
EXIT = "an exit leaves all or nothing"


def counted(text: str, tokens: int) -> int:
    """How many tokens a budget means."""
    return tokens * round(float(text[:-1]) * 10) // 1000 if text.endswith("%") else min(int(text), tokens)


def nearest(text: str, tokens: int) -> int:
    """How many tokens a budget means whose share goes to the nearest number, of two as near to the even one."""
    whole = text.endswith("%")
    return round(Fraction(round(float(text[:-1]) * 10), 1000) * tokens) if whole else counted(text, tokens)


def share(text: str) -> float:
    return round(float(text[:-1]) * 10) / 1000


def number(text: str) -> float:
    return share(text) if text.endswith("%") else float(text)


@dataclasses.dataclass(frozen=True)
class Method:
    """How a preset is compared with its paper.

    formula: of what is given, the value of the parameter `keep` and the number of the step: what is left.
    keep: the value of the parameter by kind of case; also: parameters that have the same value.
    settings: further settings, of all kinds (`""`) or of one.
    grids: by kind of case; sizes: those that the file of weights decides, by kind of case.
    at: sites of the steps that are compared, in encoders of 9 and decoders of 32 layers, whose number alone is written;
    steps: the most of them; none: why there is no case of a kind.
    fewest: what a budget of one leaves, where a row of a picture or the targets of a merge stay beside it.
    """

    formula: Callable[[Any, str, int], Left]
    keep: Mapping[str, str] = dataclasses.field(default_factory=dict)
    parameter: str = "keep"
    also: tuple[str, ...] = ()
    settings: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    grids: Mapping[str, Grid] = dataclasses.field(default_factory=dict)
    sizes: Callable[[str, int], dict[str, int]] = lambda kind, tokens: {}
    none: Mapping[str, str] = dataclasses.field(default_factory=dict)
    steps: int = 9
    at: tuple[int | str, ...] = (0,)
    vision: Mapping[str, int] = dataclasses.field(default_factory=dict)
    film: bool = False
    seeds: Mapping[str, int] = dataclasses.field(default_factory=dict)  # where others meet what rounding decides
    fewest: int = 1
    images: int = 1  # of the prompt; one of them is looked at

    def sites(self) -> list[str]:
        return [f"language.{site}" if isinstance(site, int) else site for site in self.at]

    def value(self, kind: str) -> str:
        return {"one": "1", "all": "100%", **self.keep}.get(kind, self.keep.get("", "30%"))

    def grid(self, kind: str) -> Grid:
        plain, odd = (FILM, ODD_FILM) if self.film else (PICTURE, ODD)
        return self.grids.get(kind, odd if kind == "odd" else plain)

    def set(self, kind: str) -> dict[str, str]:
        """The parameters of the policy that are not as they are published."""
        same = {name: self.value(kind) for name in (self.parameter, *self.also) if name}
        others = (*self.settings.get("", ()), *self.settings.get(kind, ()))
        return same | dict(one.split("=") for one in others)


def drops(formula: Callable[[Any, int, int], Left], **more: Any) -> Method:
    """A method whose budget is a number of tokens of the picture."""
    return Method(lambda g, keep, stage: formula(g, counted(keep, g.tokens), stage), **more)


def learns(formula: Callable[[Any, int], Left], **more: Any) -> Method:
    return drops(lambda g, keep, stage: formula(g, keep), **more)


def merges_by_key(**more: Any) -> Method:
    """ToMe's rounds: a block merges its part of all that go."""
    return Method(
        lambda g, keep, stage: merge.by_key(g, int(g.tokens * (1 - share(keep)) / g.numbers["blocks"] + 1e-9), stage),
        keep={"one": "50%"},
        grids={"one": (1, 1, 2)},
        vision={"one": 1},
        steps=3,
        at=("vision.0", "vision.1", "vision.2"),
        **more,
    )


def of_grid(formula: Callable[[Any, int], Left], **more: Any) -> Method:
    """A method whose only number is the side of a cell, a block or a window."""
    return Method(lambda g, side, stage: formula(g, int(side)), parameter="side", **more)


# Films ----------------------------------------------------------------------------------------------------------------


def frames(g: Any) -> numpy.ndarray:
    return numpy.asarray(g.x).reshape(g.frames, g.places, -1)


def rows_of(found: Mapping[int, tuple[Any, Any]]) -> Left:
    """Without sizes."""
    return {token: list(row) for token, (row, _) in found.items()}


def change(g: Any, keep: str, stage: int) -> Left:
    return kept(g.x, video.evs(g.x, g.frames, g.places, counted(keep, g.tokens)))


def of_pairs(g: Any, keep: str, stage: int) -> Left:
    return kept(g.x, video.dycoke(g.x, g.frames, g.places, max(1, counted(keep, g.places))))


def novelty(g: Any, keep: str, stage: int) -> Left:
    return kept(g.x, video.stc(g.x, g.frames, g.places, max(1, counted(keep, g.places))))


def prunevid(g: Any, keep: str, stage: int) -> Left:
    """At 35% of 32 layers the head and the word that look hardest decide."""
    if stage == 0:
        return rows_of(scenes.prunevid(frames(g), 0.8, share(keep) if keep.endswith("%") else 0.001))
    paid = [row for head in g.paid("language.10", g.text) for row in head]
    return kept(g.x, best([max(row[slot] for row in paid) for slot in g.visual], max(1, counted(keep, g.tokens))))


def holitom(g: Any, keep: str, stage: int) -> Left:
    """At 65% of 32 layers what goes is halved into what stays and is most like it, one after another."""
    if stage == 0:
        x, still = frames(g), g.numbers.get("still", 0.65)
        return rows_of(scenes.holitom(x, scenes.windows(x, still), still, share(keep), 0.6))
    number = round(g.tokens * g.numbers["inside"])
    made = kept(g.x, best(g.received("language.19", [g.length - 1]), number))
    staying = list(made)
    for i, row in enumerate(g.x):
        if i not in staying:
            goal = max(staying, key=lambda j, row=row: (round(cosine(row, g.x[j]), 9), -j))
            made[goal] = mean([made[goal], row])
    return made


def fastvid(g: Any, keep: str, stage: int) -> Left:
    attention = numpy.asarray(g.of_class("vision.7")).reshape(g.frames, g.places)
    salient = max(1, counted(keep, g.places))
    return rows_of(scenes.fastvid(frames(g), attention, 3, 0.9, salient, int(g.places * g.numbers["context"] + 1e-9)))


def framefusion(g: Any, cost: str, stage: int) -> Left:
    """Everything has been in all of the layers in front of the step's, of 32."""
    room = max(1, min(g.tokens, math.floor((share(cost) * 32 - stage) * g.tokens / (32 - stage) + 1e-9)))
    if stage == 3:
        return kept(g.x, best(g.received("language.2", [g.length - 1]), room))
    whole = {(p, t): (frames(g)[t, p], 1) for t in range(g.frames) for p in range(g.places)}
    left = video.merged(whole, g.numbers.get("above", 0.6), g.tokens - room)
    return {t * g.places + p: list(row) for (p, t), (row, _) in left.items()}


# All presets whose steps choose or merge ------------------------------------------------------------------------------

BY_KEY = merges_by_key()
HEADS = ("heads=2", "groups=1")
NEIGHBOURS = {"all": "outliers are never all of them"}

METHODS: dict[str, Method] = {
    "aim": Method(
        lambda g, keep, stage: merge.aim(g, share(keep), stage),
        keep={"one": "1.6%"},
        images=8,
        at=(0, 17, 18, 19, 21, 22, 23, 24, 26),
    ),
    "auroracap": BY_KEY,
    "b-vllm-sampler": learns(
        trained.qformer,
        settings={"": ("heads=2", "layers=2")},
        sizes=lambda kind, tokens: {"queries": tokens, "hidden": 6, "inner": 5},
    ),
    "cdpruner": drops(select.largest_volume),
    "centerclip": drops(select.middles, at=("vision.4",)),
    "centerclip-spectral": drops(select.middles_of_neighbourhoods, at=("vision.4",)),
    "covipal": learns(trained.rated_by_network, sizes=lambda kind, tokens: {"hidden": 6}),
    "dart": drops(select.from_pivots, at=(2,)),
    "divprune": Method(lambda g, keep, stage: select.far_apart(g, nearest(keep, g.tokens), stage)),
    "dycoke": Method(of_pairs, film=True, fewest=3 * 16 + 5),
    "dyvte": Method(
        lambda g, keep, stage: {} if trained.leaves(g, stage) else kept(g.x, list(range(g.tokens))),
        parameter="",
        sizes=lambda kind, tokens: {"hidden": 6},
        none={"one": EXIT},
        at=tuple(range(1, 10)),
    ),
    "evs": Method(change, film=True, grids={"one": (8, 1, 1)}),
    "fastervlm": drops(select.by_class),
    "fastv": drops(select.by_last, at=(2,)),
    "fastvid": Method(
        fastvid,
        parameter="salient",
        settings={"": ("scenes=3", "context=10%"), "one": ("context=0.1%",)},
        grids={"one": (1, 3, 4)},
        film=True,
    ),
    "flash-latents": learns(trained.latents, sizes=lambda kind, tokens: {"latents": tokens}),
    "fopru-rank": drops(select.by_all),
    "fopru-row": drops(select.by_rows, keep={"one": "8"}, fewest=8),
    "frame-stride": Method(
        lambda g, every, stage: select.every_frame(g, int(every)),
        parameter="every",
        keep={"": "3", "one": "9", "all": "1"},
        grids={"one": (8, 1, 1)},
        film=True,
    ),
    "framefusion": Method(
        framefusion,
        parameter="cost",
        keep={"one": "0.1%"},
        settings={"one": ("above=-1",)},
        grids={"one": (8, 1, 1)},
        film=True,
        at=(0, 1, 2, 3),
    ),
    "hiprune": drops(select.anchored, keep={"": "80%"}),
    "holitom": Method(
        holitom,
        also=("inside",),
        keep={"one": "1%"},
        settings={"one": ("inside=8.4%",), "all": ("still=1",)},
        grids={"one": (1, 3, 4)},
        film=True,
        seeds={"ties": 40},
        at=(0, 20),
    ),
    "holov": drops(select.in_stretches),
    "illava": Method(
        lambda g, keep, stage: merge.folded(g, (nearest if stage < 2 else counted)(keep, g.tokens), stage),
        also=("encoder_keep",),
        at=("vision.2", "vision.3", "language.9"),
    ),
    "mmtok": drops(select.covering, keep={"odd": "34%"}, grids={"odd": (1, 3, 3)}),
    "mqt": learns(
        trained.resampled,
        settings={"": ("heads=2",)},
        sizes=lambda kind, tokens: {"queries": tokens if kind == "all" else 25},
    ),
    "mustdrop": Method(
        lambda g, guarded, stage: merge.mustdrop(
            g, stage, g.numbers["alike"], int(guarded), g.numbers["share"], g.numbers["least"]
        ),
        parameter="guarded",
        keep={"": "4", "all": "1"},
        settings={
            "": ("alike=0.02", "share=0.03", "least=0.055"),
            "one": ("alike=-1", "share=1", "least=3"),
            "all": ("alike=1", "share=0.000001", "least=0.000003"),
        },
        grids={"one": (1, 3, 3)},
        at=(0, 3, 7, 11, 15),
    ),
    "pact": Method(
        lambda g, keep, stage: merge.pact(g, counted(keep, g.tokens), g.numbers["cutoff"]),
        settings={
            "": ("cutoff=0.6", "reach=0.9"),
            "ties": ("cutoff=0.4", "reach=0.6"),
            "all": ("cutoff=0.001", "reach=0.0015"),
        },
        at=(4,),
    ),
    "pixel-shuffle": of_grid(
        trained.shuffled_pixels,
        keep={"": "2", "one": "8"},
        sizes=lambda kind, tokens: {"channels": 6},
        none={"all": "a block has four tokens or more"},
    ),
    "pool": of_grid(lambda g, side: merge.windows(g, side, -1), keep={"": "2", "one": "8", "all": "9"}),
    "pool-3d": of_grid(
        lambda g, side: merge.pooled_frames(g, side, side, 1, int(g.numbers["frames"])),
        keep={"": "2", "one": "4", "all": "1"},
        settings={"": ("frames=3",), "one": ("frames=8",), "all": ("frames=1",)},
        film=True,
    ),
    "prumerge": Method(
        lambda g, keep, stage: merge.prumerge(g, False, counted(keep, g.tokens)),
        fewest=1 + 1,
        keep={"": "100%"},
        settings={"": ("neighbours=5",)},
        none=NEIGHBOURS,
    ),
    "prumerge-plus": Method(
        lambda g, keep, stage: merge.prumerge(g, True, counted(keep, g.tokens)),
        fewest=1 + 1,
        keep={"": "100%"},
        settings={"": ("neighbours=5",)},
        none=NEIGHBOURS,
    ),
    "prunevid": Method(
        prunevid, also=("clusters",), keep={"one": "5%"}, film=True, grids={"one": (1, 4, 5)}, at=(0, 11)
    ),
    "pyramiddrop": drops(select.by_last_thrice, at=(8, 16, 24)),
    "qtsplus": Method(
        lambda g, least, stage: trained.asked_for(g, float(least), g.numbers.get("most", 0.5)),
        parameter="least",
        keep={"": "0.05", "one": "0.001", "all": "1"},
        settings={"": HEADS, "formula": ("most=0.5",), "one": ("most=0.001",), "all": ("most=1",)},
        sizes=lambda kind, tokens: {"hidden": 6},
    ),
    "random": drops(select.shuffled),
    "recoverable": drops(merge.recoverable, keep={"": "100%"}, settings={"": ("neighbours=6",)}, none=NEIGHBOURS),
    "reread": learns(trained.reread, settings={"": HEADS}),
    "showui": Method(
        lambda g, keep, stage: select.thinned_regions(g, share(keep), g.numbers.get("within", 1.0)),
        keep={"": "50%", "one": "1%"},
        settings={"one": ("within=1000",)},
        at=(1,),
    ),
    "sparsevlm": drops(merge.rated, also=("keep_second", "keep_third"), fewest=1 + 2, at=(3, 7, 16)),
    "stc": Method(novelty, keep={"": "4", "all": "60"}, grids={"one": (1, 3, 4)}, film=True),
    "tinychart": BY_KEY,
    "todre": drops(select.unlike_in_sum),
    "todre-exit": Method(
        lambda g, below, stage: select.where_little_is_exchanged(g, float(below)),
        parameter="below",
        keep={"formula": "0.659", "odd": "0.655", "ties": "0.65", "equal": "0.9", "all": "0.1"},
        none={"one": EXIT},
        at=(28,),
    ),
    "tokenflex": of_grid(
        trained.celled, keep={"": "3", "one": "1", "all": "8"}, sizes=lambda kind, tokens: {"hidden": 6}
    ),
    "tome": BY_KEY,
    "transprune": drops(select.by_change_and_text, also=("keep_second", "keep_third"), at=(7, 9, 12)),
    "uniform": drops(select.uniform),
    "vflowopt": drops(
        merge.flowing, also=("second_keep", "third_keep"), settings={"": ("above=1.2",)}, fewest=1 + 9, at=(0, 10, 20)
    ),
    "visiondrop": drops(
        merge.visiondrop,
        also=("keep_first", "keep_second", "keep_third"),
        settings={"": ("contextual=4", *(f"contextual_{stage}=4" for stage in ("first", "second", "third")))},
        fewest=1 + 4,
        at=(0, 8, 16, 24),
    ),
    "visionzip": drops(merge.visionzip, settings={"": ("contextual=4",)}, fewest=1 + 4),
    "vispruner": drops(select.without_pairs),
    "visual-context-window": Method(
        lambda g, near, stage: merge.pooled_frames(g, int(near), int(g.numbers["far"]), 3, 1),
        parameter="near",
        keep={"": "1", "one": "4", "all": "1"},
        settings={"": ("group=3", "far=2"), "all": ("far=1",)},
        grids={"one": (1, 3, 4)},
        film=True,
    ),
    "vtc-cls": drops(select.by_class_of_late_layers),
}
