"""Random small models and policies, as hypothesis draws them.

A primitive's settings are drawn from its own schema, so that a new primitive is covered as soon as it is registered.
Everything drawn is plain data: a case can be written to a file and run again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import hypothesis
import torch
from hypothesis import strategies as st

import support
from tvc.kernels.op import PRIMITIVES, Kind
from tvc.kernels.weights import SUFFIX, Trained
from tvc.policy import load_policy, presets
from tvc.policy.positions import WORDS
from tvc.policy.schema import COMPONENTS, NORMALIZE, SCOPES

Settings = dict[str, Any]

# Families of which sizes are changed, too.
FAMILIES = (
    *support.FAMILIES,
    "qwen2_vl",
    "gemma3",
    "vipllava",
    "internvl",
    "paligemma",
    "qwen3_vl",
    "llava_next",
    "deepseek_vl",
)
FURTHER = tuple(family for family in support.FURTHER if family not in FAMILIES)
# Families that can be cut inside the encoder as well take more turns; between any two of these comes a further one.
_OFTEN = (*FAMILIES, "llava", "vipllava", "paligemma", "deepseek_vl")
TURNS = tuple(family for place, further in enumerate(FURTHER) for family in (_OFTEN[place % len(_OFTEN)], further))
# Families whose videos are patches that pass through the vision path of images.
WITH_VIDEOS = ("qwen2_vl", "qwen2_5_vl")
# Presets made for videos, and tries to draw a policy that a model can do.
ON_VIDEOS = ("dycoke", "evs", "fastvid", "framefusion", "holitom", "prunevid", "stc")
ATTEMPTS = 24
DTYPES = ("float32", "float32", "float32", "float32", "bfloat16", "float16")
# Text models that stand in for LLaMA where the family takes any.
_DECODERS: tuple[Settings, ...] = (
    {},
    {"model_type": "qwen2", "layer_types": None},
    {"model_type": "qwen3", "head_dim": 16, "layer_types": None},
    {"model_type": "mistral", "head_dim": 16, "sliding_window": None},
)
# Some presets cut a dozen times: their shares of the depth are layers of their own in a deep model alone.
LAYERS = (2, 3, 3, 4, 6, 28)
_HEADS = ((4, 2), (4, 1), (4, 4), (2, 1), (8, 2))  # query heads, key heads
_NUMBERS = (-1.0, -0.1, 0.0, 1e-4, 0.001, 0.01, 0.03, 0.05, 0.1, 0.25, 0.5, 0.9, 1.0, 1.5, 2.0, 10.0, 100.0)
WEIGHTS = "{weights}"  # how a policy names its parameter
_SHARES = ("100%", "75%", "66.6%", "50%", "33%", "25%", "12.5%", "7%", "1%", "0.1%")


# Models ---------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Model:
    """A family with some sizes changed; `changes` mirrors the nesting of its configuration."""

    family: str
    changes: Settings
    seed: int
    dtype: str = "float32"

    @property
    def config(self) -> Settings:
        return _changed(support.family_record(self.family).config, self.changes)

    def build(self) -> Any:
        """The model with random weights."""
        record = dataclasses.replace(support.family_record(self.family), config=self.config)
        with mock.patch.dict(support.FAMILIES, {self.family: record}):
            return support.build_model(self.family, self.seed).to(getattr(torch, self.dtype))


def _changed(config: Mapping[str, Any], changes: Mapping[str, Any]) -> Settings:
    made = dict(config)
    for key, value in changes.items():
        made[key] = _changed(made.get(key, {}), value) if isinstance(value, Mapping) else value
    return made


@st.composite
def models(
    draw: st.DrawFn, families: tuple[str, ...] = FAMILIES, layers: tuple[int, ...] = (2, 3, 3, 4, 6, 28)
) -> Model:
    """A family in one of the types; of some, the text model has another depth, heads, windows or tied embeddings."""
    family, dtype = draw(st.sampled_from(families)), draw(st.sampled_from(DTYPES))
    if family not in FAMILIES:
        return Model(family, {}, draw(st.integers(0, 99)), dtype)
    config = support.family_record(family).config
    own = config["text_config"]
    text = dict(draw(st.sampled_from(_DECODERS))) if own["model_type"] in ("llama", "qwen2") else {}
    depth = draw(st.sampled_from(layers))
    heads, key_heads = draw(st.sampled_from(_HEADS))
    text |= {"num_hidden_layers": depth, "num_attention_heads": heads, "num_key_value_heads": key_heads}
    if "head_dim" in {**own, **text}:
        text["head_dim"] = draw(st.sampled_from((16, 8, 32)))
    if "rope_parameters" in own:
        width = text.get("head_dim", own["hidden_size"] // heads)
        text["rope_parameters"] = {
            "mrope_section": _sections(width // 2, "mrope_interleaved" in own["rope_parameters"])
        }
    text |= draw(_windows({**own, **text}, depth))
    changes: Settings = {"text_config": text}
    if draw(st.booleans()) and family not in ("paligemma", "gemma3"):
        text["tie_word_embeddings"] = changes["tie_word_embeddings"] = True
    if "num_hidden_layers" in config["vision_config"]:
        changes["vision_config"] = {"num_hidden_layers": draw(st.integers(2, 4))}
    if "vision_feature_layer" in config:
        changes["vision_feature_layer"] = draw(st.sampled_from((-1, -2)))
    return Model(family, changes, draw(st.integers(0, 99)), dtype)


def _sections(width: int, interleaved: bool) -> list[int]:
    """Rotary frequencies of time, height and width."""
    if interleaved:
        return [width - 2 * (width // 4), width // 4, width // 4]
    first = width // 4
    return [first, (width - first) // 2, width - first - (width - first) // 2]


def _windows(text: Mapping[str, Any], depth: int) -> st.SearchStrategy[Settings]:
    """Sliding windows in all layers, in some of them, or in none, as far as the text model has any."""
    window = st.sampled_from((5, 16, 24, 40))
    if "layer_types" in text:
        kinds = st.sampled_from(("full_attention", "sliding_attention"))
        mixed = {"layer_types": st.lists(kinds, min_size=depth, max_size=depth), "sliding_window": window}
        if text["model_type"] == "gemma3_text":
            return st.fixed_dictionaries(mixed)
        return st.just({}) | st.fixed_dictionaries({**mixed, "use_sliding_window": st.just(True)})
    if "sliding_window" in text:
        return st.fixed_dictionaries({"sliding_window": st.none() | window})
    return st.just({})


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
    return made if draw(st.integers(0, 4)) else {**made, "reselect": draw(_reselections(blocks))}


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
    made = {"version": 1, "name": "random", "steps": steps, "positions": positions}
    return {**made, "parameters": {"weights": f"drawn{SUFFIX}"}} if WEIGHTS in str(steps) else made


def published_in_turn(
    blocks: Mapping[str, int], videos: bool, number: int, seed: int, resolves: Callable[[Settings], bool]
) -> Settings:
    """The preset whose turn it is, every other time such that the model can do it where that is found soon.

    videos: every other one is made for them.
    """
    names = ON_VIDEOS if videos and number % 2 else presets()
    name = names[(number // (1 + videos)) % len(names)]
    for attempt in range(ATTEMPTS if number % 4 else 1):
        made = drawn(published(blocks, name), seed + 1009 * attempt)
        if resolves(made):
            break
    return made


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


@st.composite
def _steps(draw: st.DrawFn, blocks: Mapping[str, int], components: tuple[str, ...]) -> Settings:
    action = draw(st.sampled_from((*("select",) * 6, *("merge",) * 3, "exit", "exit")))
    often = action == "merge" and draw(st.booleans())
    if action == "exit" and draw(st.integers(0, 9)):
        components = ("language",)
    often = (often or not draw(st.integers(0, 9))) and components != ("projector",)
    sites = _ranges if often else _sites
    at = draw(sites(blocks, components))
    step: Settings = {"at": at, "scope": draw(st.sampled_from(SCOPES))}
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
