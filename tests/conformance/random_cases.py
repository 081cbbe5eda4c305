"""Random policies, as hypothesis draws them.

A primitive's settings are drawn from its own schema, so that a new primitive is covered as soon as it is registered.
Everything drawn is plain data: a case can be written to a file and run again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import hypothesis
from hypothesis import strategies as st

from tvc.kernels.op import PRIMITIVES, Kind
from tvc.kernels.weights import SUFFIX, Trained
from tvc.policy import load_policy, presets
from tvc.policy.bypass import NEXT
from tvc.policy.evictions import EARLIER
from tvc.policy.options import OPTIONS
from tvc.policy.positions import WHOLE, WORDS, Rescale
from tvc.policy.schema import COMPONENTS, NORMALIZE, SCOPES

Settings = dict[str, Any]

# Presets made for videos, and tries to draw a policy that a model can do.
ON_VIDEOS = ("dycoke", "evs", "fastvid", "framefusion", "holitom", "prunevid", "stc")
ATTEMPTS = 24
_NUMBERS = (-1.0, -0.1, 0.0, 1e-4, 0.001, 0.01, 0.03, 0.05, 0.1, 0.25, 0.5, 0.9, 1.0, 1.5, 2.0, 10.0, 100.0)
WEIGHTS = "{weights}"  # how a policy names its parameter
_SHARES = ("100%", "75%", "66.6%", "50%", "33%", "25%", "12.5%", "7%", "1%", "0.1%")


# Policies -------------------------------------------------------------------------------------------------------------


@st.composite
def policies(draw: st.DrawFn, blocks: Mapping[str, int], components: tuple[str, ...] = COMPONENTS) -> Settings:
    """One to three steps at random sites of the `components`, or one in each of them; most of them in order."""
    if draw(st.integers(0, 4)):
        steps = draw(st.lists(_steps(blocks, components), min_size=1, max_size=3))
    else:
        steps = [draw(_steps(blocks, (component,))) for component in components]
    if draw(st.integers(0, 9)):
        steps.sort(key=lambda step: _place(step["at"], blocks))
    # Numbering afresh needs a cut in the decoder, so it is refused for many policies.
    made = _as_policy(steps, draw(st.sampled_from((*WORDS, "keep", "keep"))))
    return made if draw(st.integers(0, 4)) else {**made, **draw(_beside_steps(blocks))}


@st.composite
def wholes(draw: st.DrawFn, blocks: Mapping[str, int]) -> Settings:
    """What acts on all layers, with at most one step of the decoder; steps of which the last one's tokens leave earlier
    caches; or a step that needs pictures or frames whole, which no other may have thinned out.
    """
    what = draw(st.sampled_from(("option", "option", "evict", "until", "whole")))
    fewest, most = {"option": (0, 1), "evict": (1, 2), "until": (1, 2), "whole": (0, 1)}[what]
    actions = ("select",) if what == "until" else _ACTIONS
    steps = draw(st.lists(_steps(blocks, ("language",), actions), min_size=fewest, max_size=most))
    steps.sort(key=lambda step: _place(step["at"], blocks))
    if what == "evict":
        steps[-1]["evict"] = draw(_evictions(blocks))
    if what == "until":
        number = draw(st.integers(0, len(steps) - 1))
        steps[number] |= {"rest": "drop", "until": draw(st.just(NEXT) | _sites(blocks, ("language",)))}
    if what == "whole":
        steps.insert(0, draw(_of_whole(blocks)))
    made = _as_policy(steps, draw(st.sampled_from((*WORDS, "keep", "keep"))) if steps else "keep")
    return {**made, **draw(_beside_steps(blocks))} if what == "option" or not draw(st.integers(0, 3)) else made


@st.composite
def _of_whole(draw: st.DrawFn, blocks: Mapping[str, int]) -> Settings:
    """A step at the decoder's beginning with a primitive that needs pictures or frames whole."""
    kind, key = draw(st.sampled_from([(kind, key) for kind, keys in needing_whole().items() for key in keys]))
    step = draw(_steps(blocks, ("language",), ("merge",) if kind == "merge" else ("select",)))
    made = {key: draw(settings(PRIMITIVES[kind][key], blocks))}
    if kind == "score":
        step |= {"score": [made], "select": {"top": {"keep": draw(st.sampled_from(_SHARES[1:6]))}}}
    else:
        step[kind] = made
    return {**step, "at": draw(st.sampled_from(("language.0", "language.1")))}


def _evictions(blocks: Mapping[str, int]) -> st.SearchStrategy[str]:
    return st.just(EARLIER) | _sites(blocks, ("language",))


@functools.cache
def needing_whole() -> dict[str, tuple[str, ...]]:
    """Primitives of each kind that look at rows of a grid, at frames or at pixels."""
    kinds: tuple[Kind, ...] = ("score", "select", "merge")
    return {kind: tuple(key for key, cls in PRIMITIVES[kind].items() if _whole(cls)) for kind in kinds}


def _whole(cls: Any) -> bool:
    if "columns" in cls.model_fields:
        return True
    some = cls.model_validate(_with_file(drawn(settings(cls, {"vision": 2, "language": 2}), 0)))
    return any(tap.kind in ("frame", "neighbour", "pixel") for tap in some.taps().values())


@st.composite
def _beside_steps(draw: st.DrawFn, blocks: Mapping[str, int]) -> Settings:
    """One or two of the things that a policy may say beside its steps."""
    says: dict[str, st.SearchStrategy[Any]] = {
        "positions": _positions(),
        "reselect": _reselections(blocks),
        **{place: st.one_of(*(_few(one).map(_keyed(one.key)) for one in known)) for place, known in OPTIONS.items()},
    }
    names = draw(st.lists(st.sampled_from(sorted(says)), min_size=1, max_size=2, unique=True))
    return {name: draw(says[name]) for name in names}


def _few(option: Any) -> st.SearchStrategy[Settings]:
    """Small numbers for an option: a prompt holds a few pictures and frames; a word where it takes no other."""
    schema = option.model_json_schema()
    few: dict[str, st.SearchStrategy[Any]] = {}
    for name, one in schema["properties"].items():
        least = one.get("minimum", one.get("exclusiveMinimum", -1) + 1)
        few[name] = st.just(one["const"]) if "const" in one else st.integers(least, least + 2)
    needed = {name: few.pop(name) for name in schema["required"]}
    return st.fixed_dictionaries(needed, optional=few)


def _keyed(key: str) -> Callable[[Settings], Settings]:
    return lambda drawn: {key: drawn}


def _positions() -> st.SearchStrategy[Any]:
    """Fractions of a position, or other frequencies of the rotary embedding."""
    stride = st.sampled_from((1, 16, 64, 100, 255, WHOLE))
    return st.builds(lambda n: {"stride": n}, stride) | settings(Rescale, {}).map(_keyed(Rescale.key))


@st.composite
def _reselections(draw: st.DrawFn, blocks: Mapping[str, int]) -> Settings:
    """What decode steps attend to, most often from the last layer on: cuts stand in front of it."""
    made: Settings = {"at": draw(st.one_of(st.just("language.-1"), _sites(blocks, ("language",))))}
    made["keep"] = draw(st.sampled_from(("10%", "30%", "50%", "100%", 1, 3)))
    if draw(st.booleans()):
        made |= {"unless_alike": draw(st.sampled_from((0.5, 0.9, 0.99))), "bug_compatible": draw(st.booleans())}
    return made


def everywhere(blocks: Mapping[str, int], seed: int, resolves: Callable[[Settings], bool]) -> Settings:
    """One step in each component, of which each resolves by itself where one such is found soon."""
    steps = []
    for place, component in enumerate(COMPONENTS):
        for attempt in range(ATTEMPTS):
            step = drawn(_steps(blocks, (component,)), 97 * seed + len(COMPONENTS) * attempt + place)
            if "exit" not in step and resolves(_as_policy([step])):
                break
        steps.append(step)
    return _as_policy(steps)


def _as_policy(steps: list[Settings], positions: str = "keep") -> Settings:
    made = {"version": 1, "name": "random", **({"steps": steps} if steps else {}), "positions": positions}
    return {**made, "parameters": {"weights": f"drawn{SUFFIX}"}} if WEIGHTS in str(steps) else made


def published_in_turn(
    blocks: Mapping[str, int], videos: bool, number: int, seed: int, resolves: Callable[[Settings], bool]
) -> Settings:
    """The preset whose turn it is, every other time such that the model can do it where that is found soon.

    videos: every other one is made for them.
    """
    names = ON_VIDEOS if videos and number % 2 else presets()
    name = names[(number // (1 + videos)) % len(names)]
    return soon(published(blocks, name), seed, resolves, ATTEMPTS if number % 4 else 1)


@st.composite
def published(draw: st.DrawFn, blocks: Mapping[str, int], name: str) -> Settings:
    """A preset at some of its own sites and some others, with settings of which some are its own."""
    made = _preset(name)
    if not draw(st.integers(0, 3)):
        return made
    parameters = dict(made.get("parameters", {}))
    for name, value in parameters.items():
        if draw(st.integers(0, 3)):
            parameters[name] = draw(_like(value, blocks))
    steps = [dict(step) for step in made.get("steps", ())]
    for step in steps:
        if draw(st.booleans()) and "{" not in step["at"]:
            step["at"] = draw(_sites(blocks, (step["at"].partition(".")[0],)))
    return {**made, **({"steps": steps} if steps else {}), "parameters": parameters}


def _preset(name: str) -> Settings:
    """What a preset does; not what it says about itself."""
    told = ("about", "reference", "covers", "deviations", "unverified")
    return {key: value for key, value in load_policy(name).document.data.items() if key not in told}


def _like(value: Any, blocks: Mapping[str, int]) -> st.SearchStrategy[Any]:
    """Values of a parameter's kind that suit small models; a file of weights stays what it is."""
    if isinstance(value, bool):
        return st.booleans()
    if isinstance(value, int):
        return st.integers(1, 12) | st.integers(1, max(blocks["language"] - 1, 1))
    if isinstance(value, float):
        return st.sampled_from([number for number in _NUMBERS if 0 < number <= 1.5])
    if isinstance(value, str) and value.endswith("%"):
        return st.sampled_from(_SHARES)
    return st.just(value)


def gathered(policy: Settings, blocks: Mapping[str, int], seed: int) -> Settings:
    """The policy with its single sites inside the encoder moved to two of them: every choice of sites is one trace."""
    first = seed % blocks["vision"]
    two = (first, min(first + 1 + seed % 2, blocks["vision"] - 1))
    steps, seen = [], 0
    for step in policy["steps"]:
        inside = step["at"].startswith("vision.") and ".." not in step["at"] and not step["at"].endswith("all")
        steps.append({**step, "at": f"vision.{two[min(seen, 1)]}"} if inside else step)
        seen += inside
    return {**policy, "steps": steps}


def _place(at: str, blocks: Mapping[str, int]) -> tuple[int, float]:
    """Roughly where a step acts; `all` and ranges count from their start."""
    component, _, rest = at.partition(".")
    if component == "projector":
        return 1, 0.0
    first = rest.split("..")[0].replace("all", "0")
    number = float(first.rstrip("%")) * (blocks[component] / 100 if first.endswith("%") else 1)
    return (0 if component == "vision" else 2), number + blocks[component] * (number < 0)


@st.composite
def _sites(draw: st.DrawFn, blocks: Mapping[str, int], components: tuple[str, ...] = COMPONENTS) -> str:
    """A site that the model most likely has."""
    component = draw(st.sampled_from([name for name in components for _ in range(3 if name in blocks else 1)]))
    if component == "projector":
        return component
    depth = blocks[component]
    written = [*range(depth), *range(depth), *range(-depth, 0), "25%", "50%", "90%", depth]
    return f"{component}.{draw(st.sampled_from(written))}"


@st.composite
def _ranges(draw: st.DrawFn, blocks: Mapping[str, int], components: tuple[str, ...] = COMPONENTS) -> str:
    component = draw(st.sampled_from([name for name in components if name in blocks]))
    depth = blocks[component]
    first = draw(st.integers(0, depth - 1))
    last = draw(st.integers(first, depth - 1) | st.integers(first - depth, -1))
    return f"{component}.{draw(st.sampled_from((f'{first}..{last}', 'all')))}"


def _layers(blocks: Mapping[str, int]) -> st.SearchStrategy[str]:
    """What a `layer` may say."""
    return st.sampled_from(("previous", "previous", "self")) | _sites(blocks) | _ranges(blocks)


_ACTIONS = (*("select",) * 6, *("merge",) * 3, "exit", "exit")


@st.composite
def _steps(
    draw: st.DrawFn, blocks: Mapping[str, int], components: tuple[str, ...], actions: tuple[str, ...] = _ACTIONS
) -> Settings:
    action = draw(st.sampled_from(actions))
    often = action == "merge" and draw(st.booleans())
    if action == "exit" and draw(st.integers(0, 9)):
        components = ("language",)
    often = (often or not draw(st.integers(0, 9))) and components != ("projector",)
    sites = _ranges if often else _sites
    at = draw(sites(blocks, components))
    step: Settings = {"at": at, "scope": draw(st.sampled_from(tuple(SCOPES)))}
    if at.startswith("language.") and not draw(st.integers(0, 5)):
        step["evict"] = draw(_evictions(blocks))
    if action == "merge":
        return {**step, "merge": draw(_named("merge", blocks))}
    if action == "exit":
        return {**step, "exit": {"when": draw(_gates(blocks))}}
    select, rest = draw(_named("select", blocks)), draw(_named("rest", blocks))
    chooser, other = _made("select", select), _made("rest", rest)
    if chooser.needs_score or other.needs_score or (chooser.weighs_score and draw(st.booleans())):
        several = chooser.terms or draw(st.sampled_from((1, 1, 1, 2, 3)))
        step["score"] = draw(st.lists(_terms(blocks), min_size=several, max_size=several))
    return {**step, "select": select, "rest": rest}


@st.composite
def _gates(draw: st.DrawFn, blocks: Mapping[str, int]) -> Any:
    ((key, settings),) = draw(_named("when", blocks)).items()
    if key != "threshold":
        return {key: settings}
    return {"score": draw(st.lists(_terms(blocks), min_size=1, max_size=2)), **settings}


@st.composite
def _terms(draw: st.DrawFn, blocks: Mapping[str, int]) -> Settings:
    term = draw(_named("score", blocks))
    if draw(st.booleans()):
        term["weight"] = draw(st.sampled_from((1.0, -1.0, 0.5, 2.0)))
        term["normalize"] = draw(st.sampled_from(NORMALIZE))
    return term


def _made(kind: Kind, named: Settings) -> Any:
    ((key, settings),) = named.items()
    return PRIMITIVES[kind][key].model_validate(_with_file(settings))


def _with_file(settings: Settings) -> Settings:
    """The settings with the name of a file where they name the policy's weights."""
    return {**settings, "weights": f"drawn{SUFFIX}"} if "weights" in settings else settings


def _named(kind: Kind, blocks: Mapping[str, int]) -> st.SearchStrategy[Settings]:
    """`{key: settings}` of any registered primitive of a kind."""
    made = [settings(cls, blocks).map(lambda drawn, key=key: {key: drawn}) for key, cls in PRIMITIVES[kind].items()]
    return st.one_of(made)


def settings(cls: Any, blocks: Mapping[str, int]) -> st.SearchStrategy[Settings]:
    """Settings that the primitive accepts on its own."""
    schema = cls.model_json_schema()

    def accepted(drawn: Settings) -> bool:
        try:
            cls.model_validate(_with_file(drawn))
        except ValueError:
            return False
        return True

    drawn = _of_schema(schema, schema.get("$defs", {}), blocks)
    if issubclass(cls, Trained):  # each with tensors of its own in the policy's one file
        parts = st.integers(0, 999).map(lambda number: {"weights": WEIGHTS, "prefix": f"part{number}"})
        drawn = st.builds(lambda own, part: {**own, **part}, drawn, parts)
    return drawn.filter(accepted)


def _of_schema(schema: Mapping[str, Any], named: Mapping[str, Any], blocks: Mapping[str, int]) -> st.SearchStrategy:
    """Values of a JSON schema as pydantic writes it; free texts are layers."""
    if "$ref" in schema:
        return _of_schema(named[schema["$ref"].rpartition("/")[2]], named, blocks)
    if "const" in schema:
        return st.just(schema["const"])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "anyOf" in schema:
        return st.one_of([_of_schema(one, named, blocks) for one in schema["anyOf"]])
    match schema["type"]:
        case "object":
            return _objects(schema, named, blocks)
        case "array":
            return st.lists(_of_schema(schema["items"], named, blocks), min_size=1, max_size=3, unique=True)
        case "integer":
            return _integers(schema)
        case "number":
            return _floats(schema)
        case "string":
            return st.sampled_from(_SHARES) if "pattern" in schema else _layers(blocks)
        case "boolean":
            return st.booleans()
        case "null":
            return st.none()
    raise NotImplementedError(f"no values for {schema}")


@st.composite
def _objects(
    draw: st.DrawFn, schema: Mapping[str, Any], named: Mapping[str, Any], blocks: Mapping[str, int]
) -> Settings:
    """What has to be said, and some of what may be."""
    required = schema.get("required", ())
    drawn = {}
    for name, field in schema.get("properties", {}).items():
        if name in ("heads", "groups") and field.get("type") == "integer":  # which have to divide widths
            drawn[name] = draw(st.sampled_from((1, 2, 4)))
        elif name in required or draw(st.booleans()):
            drawn[name] = draw(_of_schema(field, named, blocks))
    return drawn


def _integers(schema: Mapping[str, Any]) -> st.SearchStrategy[int]:
    least = schema.get("minimum", schema.get("exclusiveMinimum", -1) + 1)
    most = schema.get("maximum", schema.get("exclusiveMaximum", least + 1001) - 1)
    near = st.integers(least, min(most, least + 12))
    return st.one_of([near] * 6 + [st.integers(least, min(most, least + 60)), st.just(most)])


def _floats(schema: Mapping[str, Any]) -> st.SearchStrategy[float]:
    above, below = schema.get("exclusiveMinimum", -2.0), schema.get("exclusiveMaximum", 1000.0)
    least, most = schema.get("minimum", above), schema.get("maximum", below)
    usual = [n for n in _NUMBERS if above < n < below and least <= n <= most]
    return st.sampled_from(usual)


# Drawing without a test -----------------------------------------------------------------------------------------------


def drawn(strategy: st.SearchStrategy[Any], seed: int) -> Any:
    """One value of a strategy, the same for the same seed."""
    values: list[Any] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=2,  # the first one is the simplest there is
        phases=[hypothesis.Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(strategy)
    def collect(value: Any) -> None:
        values.append(value)

    collect()
    return values[-1]


def soon(
    strategy: st.SearchStrategy[Settings],
    seed: int,
    resolves: Callable[[Settings], bool],
    attempts: int = ATTEMPTS,
) -> Settings:
    """A policy that the model can do where one is found soon, else the last one that was tried."""
    for attempt in range(attempts):
        made = drawn(strategy, seed + 1009 * attempt)
        if resolves(made):
            break
    return made
