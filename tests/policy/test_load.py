"""Sources, parameters, extends, settings; and that writing a policy out loses nothing."""

from __future__ import annotations

import pathlib
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from policy_cases import policy, step

from tvc.kernels.budget import Budget
from tvc.kernels.rest_merge import StrideTargets
from tvc.policy import Policy, json_schema, load_policy, parse_site, presets
from tvc.policy.document import from_yaml
from tvc.policy.options import Chunks, Pool, Unrotated
from tvc.policy.positions import Rescale, Stride
from tvc.policy.schema import dump_yaml, steps_data

KNOWN = (
    "aim",
    "auroracap",
    "b-vllm-sampler",
    "cdpruner",
    "centerclip",
    "centerclip-spectral",
    "covipal",
    "dart",
    "divprune",
    "dycoke",
    "dyvte",
    "evs",
    "fastervlm",
    "fastv",
    "fastvid",
    "flash-latents",
    "fopru-rank",
    "fopru-row",
    "frame-stride",
    "framefusion",
    "hiprune",
    "holitom",
    "holov",
    "illava",
    "mmtok",
    "mqt",
    "mustdrop",
    "pact",
    "pixel-shuffle",
    "pool",
    "pool-3d",
    "prumerge",
    "prumerge-plus",
    "prunevid",
    "pyramiddrop",
    "qtsplus",
    "random",
    "recoverable",
    "reread",
    "showui",
    "sparsevlm",
    "stc",
    "tinychart",
    "todre",
    "todre-exit",
    "tokenflex",
    "tome",
    "transprune",
    "uniform",
    "v2pe",
    "vflowopt",
    "video-xl-2",
    "visiondrop",
    "visionzip",
    "vispruner",
    "vista-unrotated",
    "visual-context-window",
    "vtc-cls",
)


def test_the_presets_are_these() -> None:
    assert presets() == KNOWN


def test_the_folder_of_the_presets_does_not_hide_their_list() -> None:
    code = "import importlib, tvc.policy; importlib.import_module('tvc.policy.presets'); tvc.policy.presets()"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", KNOWN)
def test_a_preset_states_what_it_is(name: str) -> None:
    loaded = load_policy(name)
    assert loaded.name == name
    assert loaded.about.endswith(".")
    assert set(loaded.reference) == {"paper", "code"}
    assert loaded.parameters
    others = {"v2pe": Stride(64), "visual-context-window": Rescale(factor=4)}
    assert loaded.positions == others.get(name, "keep")


@pytest.mark.parametrize("name", KNOWN)
def test_a_preset_writes_out_and_loads_back(name: str) -> None:
    loaded = load_policy(name)
    again = load_policy(loaded.to_yaml())
    assert again == loaded
    assert again.document.data == loaded.document.data
    assert again.digest() == loaded.digest()


def test_fastv_says_what_the_paper_says() -> None:
    (only,) = load_policy("fastv").steps
    assert only.at == "language.2"
    assert only.score[0].primitive.model_dump() == {"of": "last", "layer": "previous", "heads": "mean"}
    assert only.select is not None
    assert only.select.kept([576]) == [288]


def test_pyramiddrop_halves_three_times() -> None:
    kept, count = [], 576
    for each in load_policy("pyramiddrop").steps:
        assert each.select is not None
        (count,) = each.select.kept([count])
        kept.append(count)
    assert kept == [288, 144, 72]


def test_visionzip_keeps_dominant_and_contextual() -> None:
    (only,) = load_policy("visionzip").steps
    assert only.select is not None
    assert only.rest is not None
    assert only.rest.kept([576], only.select.kept([576])) == [64]
    assert only.rest.targets == StrideTargets(stride=10)  # type: ignore[attr-defined]
    shares = load_policy("visionzip", set=["keep=25%", "contextual=2"]).steps[0]
    assert shares.select is not None
    assert shares.rest is not None
    assert shares.rest.kept([16], shares.select.kept([16])) == [6]


# Sources --------------------------------------------------------------------------------------------------------------


def test_all_sources_of_one_policy_are_equal(tmp_path: pathlib.Path) -> None:
    text = load_policy("fastv").to_yaml()
    (tmp_path / "mine.yaml").write_text(text)
    data = load_policy("fastv").document.data
    from_all = [load_policy(s) for s in (text, tmp_path / "mine.yaml", str(tmp_path / "mine.yaml"), data)]
    assert all(p == load_policy("fastv") for p in from_all)
    assert load_policy(from_all[0]) == from_all[0]


def test_one_line_of_yaml_is_text() -> None:
    assert load_policy("{version: 1, steps: [{at: projector, select: {stride: 25%}}]}").steps[0].at == "projector"


def test_shorthands_mean_the_long_forms() -> None:
    short = "score: {attention: cls}\n    select: {top: 25%}\n    rest: drop"
    long = "score: [{attention: {of: cls}, weight: 1, normalize: none}]\n    select: {top: {keep: 25%}}"
    one, two = (load_policy(policy(step("language.2", text))) for text in (short, long))
    assert one == two
    assert one.digest() == two.digest()


def test_scores_take_weights_and_normalisation() -> None:
    text = "score: [{norm: {}, weight: -0.5}, {attention: last, normalize: minmax}]\n    select: {top: 2}"
    first, second = load_policy(policy(step("language.2", text))).steps[0].score
    assert (first.weight, first.normalize, second.weight, second.normalize) == (-0.5, "none", 1.0, "minmax")


def test_an_exit_on_a_threshold_holds_its_score() -> None:
    text = "exit: {when: {score: {attention: last}, reduce: sum, below: 0.1}}"
    (only,) = load_policy(policy(step("language.2", text))).steps
    assert only.exit is not None
    assert only.select is None
    assert only.exit.gate.model_dump() == {"reduce": "sum", "above": None, "below": 0.1}
    assert [s.primitive.key for s in only.exit.score] == ["attention"]
    assert [p.key for p in only.primitives()] == ["attention", "threshold"]


@pytest.mark.parametrize("text", ["vision.-2", "projector", "language.0", "language.25%", "vision.12"])
def test_sites_print_as_they_are_written(text: str) -> None:
    assert str(parse_site(text)) == text


@pytest.mark.parametrize("text", ["language", "projector.1", "language.", "language.1.2", "language.+1", "vision.100%"])
def test_other_sites_are_none(text: str) -> None:
    assert parse_site(text) is None


# Parameters, extends, settings ----------------------------------------------------------------------------------------


def test_parameters_keep_their_type_when_they_are_the_whole_value() -> None:
    head = "version: 1\nparameters: {k: 3, n: {average: 9}, s: 7}"
    body = 'score: {random: {seed: "{s}"}}\n    select: {top: {keep: "{n}"}}'
    (only,) = load_policy(policy(step('"language.{k}"', body), head=head)).steps
    assert only.at == "language.3"
    assert only.score[0].primitive.model_dump() == {"seed": 7}
    assert only.select.keep == Budget(average=9)  # type: ignore[union-attr]


def test_extends_merges_and_keeps_the_rest() -> None:
    child = load_policy("version: 1\nextends: fastv\nparameters: {before_layer: 3}\npositions: renumber\n")
    assert child.steps[0].at == "language.3"
    assert child.positions == "renumber"
    assert child.parameters == {"before_layer": 3, "keep": "50%"}
    assert child.about == load_policy("fastv").about
    assert child.name == "fastv-variant"
    assert load_policy(child.to_yaml()) == child


def test_extends_with_new_steps_drops_parameters_that_nothing_uses() -> None:
    child = load_policy(policy(step("language.4"), head="version: 1\nname: mine\nextends: fastv"))
    assert child.name == "mine"
    assert child.parameters == {}
    assert [s.at for s in child.steps] == ["language.4"]


def test_extends_a_file_beside_it(tmp_path: pathlib.Path) -> None:
    (tmp_path / "base.yaml").write_text("version: 1\nname: base\nextends: fastv\nparameters: {keep: 10%}\n")
    (tmp_path / "child.yaml").write_text("version: 1\nextends: base.yaml\nparameters: {before_layer: 5}\n")
    child = load_policy(tmp_path / "child.yaml")
    assert (child.steps[0].at, dict(child.parameters)) == ("language.5", {"before_layer": 5, "keep": "10%"})


@pytest.mark.parametrize(
    "settings",
    [["keep=25%", "before_layer=3"], {"keep": "25%", "before_layer": 3}, ["parameters.keep=25%", "before_layer=3"]],
)
def test_settings_replace_parameters(settings: Any) -> None:
    changed = load_policy("fastv", set=settings)
    assert changed == load_policy("fastv").with_settings(settings)
    assert changed.steps[0].at == "language.3"
    assert changed.steps[0].select.keep == Budget(permille=250)  # type: ignore[union-attr]
    assert load_policy(changed.to_yaml()) == changed


@pytest.mark.parametrize("key", ["steps.0.select.top.keep", "steps[0].select.top.keep"])
def test_settings_replace_any_place(key: str) -> None:
    changed = load_policy("fastv", set=[f"{key}=25%"])
    assert changed.steps[0].select.keep == Budget(permille=250)  # type: ignore[union-attr]
    assert changed.parameters == {"before_layer": 2}
    assert load_policy(changed.to_yaml()) == changed


def test_settings_may_add_a_key_and_a_mapping() -> None:
    changed = load_policy("fastv", set=["steps.0.scope=sequence", "steps.0.rest={merge: {targets: kept}}"])
    assert changed.steps[0].scope == "sequence"
    assert changed.steps[0].rest is not None
    assert changed.steps[0].rest.key == "merge"


def test_fractions_of_positions_need_no_step() -> None:
    alone = load_policy("version: 1\npositions: {stride: 64}")
    assert (alone.steps, alone.positions) == ((), Stride(64))
    assert load_policy("v2pe", set=["stride=32"]).positions == Stride(32)
    child = load_policy("version: 1\nextends: fastv\npositions: {stride: 128}\n")
    assert (len(child.steps), child.positions) == (1, Stride(128))
    assert child.digest() != load_policy("fastv").digest()


def test_what_decode_steps_attend_to_needs_no_step() -> None:
    text = 'version: 1\nparameters: {share: 30%}\nreselect: {at: language.3, keep: "{share}"}'
    alone = load_policy(text)
    assert alone.steps == ()
    assert alone.reselect is not None
    assert (alone.reselect.at, str(alone.reselect.keep), alone.reselect.alike) == ("language.3", "30%", 0.0)
    other = load_policy(text, set=["share=4", "reselect.unless_alike=0.5"]).reselect
    assert other is not None
    assert (other.keep.count, other.alike) == (4, 0.5)
    fastv = load_policy("fastv")
    child = load_policy("version: 1\nextends: fastv\nreselect: {at: language.3, keep: 30%}\n")
    assert child.steps == fastv.steps
    assert len({child.digest(), fastv.digest(), alone.digest()}) == 3
    spelled = load_policy("version: 1\nreselect: {at: language.3, layer: previous, keep: 30%, bug_compatible: false}")
    assert spelled.digest() == alone.digest()
    without = load_policy("version: 1\nextends: dycoke\nreselect:\n")
    assert without.reselect is None
    assert set(without.parameters) == {"keep", "window", "bug_compatible"}


def test_chunks_of_frames_need_no_step() -> None:
    alone = load_policy("version: 1\nparameters: {n: 4}\nattention: {chunks: {frames: '{n}'}}")
    assert (alone.steps, alone.attention) == ((), Chunks(frames=4, previous=0))
    assert load_policy(alone, set=["n=5", "attention.chunks.previous=2"]).attention == Chunks(frames=5, previous=2)
    child = load_policy("version: 1\nextends: fastv\nattention: {chunks: {frames: 4, previous: 0}}\n")
    assert (len(child.steps), child.attention) == (1, alone.attention)
    assert child.digest() != load_policy("fastv").digest()
    assert load_policy(child.to_yaml()) == child


def test_text_that_reads_unrotated_keys_needs_no_step() -> None:
    alone = load_policy("version: 1\nattention: {unrotated: visual}")
    assert (alone.steps, alone.attention) == ((), Unrotated(keys="visual"))
    assert load_policy("version: 1\nattention: {unrotated: {keys: visual}}").digest() == alone.digest()
    child = load_policy("version: 1\nextends: vista-unrotated\npositions: {stride: 64}\n")
    assert (child.attention, load_policy(child.to_yaml())) == (alone.attention, child)


def test_pooled_caches_need_no_step() -> None:
    alone = load_policy("version: 1\ncache: {pool: {tokens: 4, first: 1}}")
    assert (alone.steps, alone.cache) == ((), Pool(tokens=4, chunk=1, first=1, last=0, best=0))
    assert load_policy(alone, set=["cache.pool.best=2"]).digest() != alone.digest()
    assert load_policy("video-xl-2", set=["pooled=2"]).cache == Pool(tokens=2, chunk=4, first=1, last=1, best=4)


def test_rescaled_frequencies_need_no_step() -> None:
    alone = load_policy("version: 1\npositions: {rescale: {factor: 4}}")
    assert (alone.steps, alone.positions) == ((), Rescale(factor=4.0, window=None, fast=32, slow=1))
    assert load_policy(alone, set=["positions.rescale.window=4096"]).digest() != alone.digest()


def test_digest_is_of_the_meaning() -> None:
    fastv = load_policy("fastv")
    assert load_policy("fastv", set=["name=other", "about=words"]).digest() == fastv.digest()
    assert load_policy("fastv", set=["keep=49.9%"]).digest() != fastv.digest()
    assert load_policy("fastv", set=["positions=renumber"]).digest() != fastv.digest()


# Round trips ----------------------------------------------------------------------------------------------------------

budgets = st.one_of(
    st.integers(1, 999), st.integers(1, 100).map(lambda p: f"{p}%"), st.integers(1, 99).map(lambda n: {"average": n})
)
rows = st.sampled_from(["cls", "last", "text", "visual", "all"])
primitives = st.one_of(
    st.just("uniform"),
    st.builds(lambda s: {"random": {"seed": s}}, st.integers(0, 9)),
    st.builds(lambda o, h: {"attention": {"of": o, "heads": h}}, rows, st.sampled_from(["mean", "sum", "max"])),
    st.builds(lambda o: {"attention": {"of": o, "layer": "vision.-2"}}, st.lists(rows, min_size=1, max_size=3)),
    st.builds(lambda o: {"norm": {"of": o}}, st.sampled_from(["feature", "key"])),
)
weighted = st.builds(
    lambda p, w, n: {**(p if isinstance(p, dict) else {p: {}}), "weight": w, "normalize": n},
    primitives,
    st.floats(0.01, 10),
    st.sampled_from(["none", "minmax", "softmax", "sum"]),
)
scores = st.one_of(primitives, st.lists(weighted, min_size=1, max_size=3))
rests = st.one_of(
    st.just("drop"),
    st.builds(
        lambda t, r: {"merge": {"targets": t, "reduce": r}},
        st.one_of(st.just("kept"), st.builds(lambda n: {"stride": n}, st.integers(1, 20))),
        st.sampled_from(["mean", "target_mean", "size_weighted"]),
    ),
)
actions = st.one_of(
    st.builds(lambda s, k, r: {"score": s, "select": {"top": {"keep": k}}, "rest": r}, scores, budgets, rests),
    st.builds(lambda k, r: {"select": {"stride": {"keep": k}}, "rest": r}, budgets, rests),
    st.builds(lambda s, a: {"exit": {"when": {"score": s, "above": a}}}, scores, st.floats(-1, 1)),
)
SITES = ["vision.3", "vision.9", "projector", "language.0", "language.7", "language.21"]
texts = st.text(max_size=40)


@st.composite
def documents(draw: st.DrawFn) -> dict[str, Any]:
    places = draw(st.lists(st.sampled_from(SITES), min_size=1, max_size=4, unique=True))
    steps = [{"at": place, **draw(actions)} for place in sorted(places, key=SITES.index)]
    for made in steps:
        if made["at"].startswith("language.") and draw(st.booleans()):
            made["evict"] = draw(st.sampled_from(["earlier", "language.2", "language.-3", "language.7%"]))
    returning = not any("evict" in made for made in steps) and draw(st.booleans())
    for made in steps if returning else ():
        if made["at"].startswith("language.") and "select" in made and made.get("rest", "drop") == "drop":
            made["until"] = draw(st.sampled_from(["next", "never", "language.90%"]))
    document = {"version": 1, "name": draw(texts), "about": draw(texts), "steps": steps}
    if not returning and draw(st.booleans()):
        alike = draw(st.one_of(st.none(), st.floats(0.01, 1)))
        more = {"unless_alike": alike, "bug_compatible": draw(st.booleans())} if alike is not None else {}
        document["reselect"] = {"at": "language.-1", "keep": draw(st.sampled_from(["30%", 7])), **more}
    fractions = st.builds(lambda stride: {"stride": stride}, st.integers(1, 256))
    if not returning and draw(st.booleans()):
        chunks = {"frames": draw(st.integers(1, 9)), "previous": draw(st.integers(0, 9))}
        document["attention"] = draw(st.sampled_from([{"chunks": chunks}, {"unrotated": "visual"}]))
    if not returning and draw(st.booleans()):
        numbers = {name: draw(st.integers(0, 9)) for name in ("first", "last", "best")}
        document["cache"] = {"pool": {"tokens": draw(st.integers(2, 9)), "chunk": draw(st.integers(1, 9)), **numbers}}
    rescaled = st.builds(lambda factor: {"rescale": {"factor": factor, "window": 64}}, st.integers(2, 16))
    return {**document, "positions": draw(st.one_of(st.sampled_from(["keep", "renumber"]), fractions, rescaled))}


@given(documents())
def test_any_policy_writes_out_and_loads_back(data: dict[str, Any]) -> None:
    loaded = load_policy(data)
    again = load_policy(loaded.to_yaml())
    assert again == loaded
    assert again.document.data == loaded.document.data
    assert again.digest() == loaded.digest()


@given(documents())
def test_written_defaults_change_nothing(data: dict[str, Any]) -> None:
    loaded = load_policy(data)
    spelled = load_policy({**data, "steps": steps_data(loaded.steps)})
    assert spelled == loaded
    assert spelled.digest() == loaded.digest()


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(texts, plain, min_size=1, max_size=4))
def test_any_data_survives_yaml(data: dict[str, Any]) -> None:
    assert from_yaml(dump_yaml(data), "x").data == data


def test_every_value_knows_its_line() -> None:
    document = from_yaml("a: 1\nb:\n  - c: 2\n  - {d: 3}\n", "f")
    assert document.where(("a",)) == "f:1, a"
    assert document.where(("b", 0, "c")) == "f:3, b[0].c"
    assert document.where(("b", 1, "d")) == "f:4, b[1].d"
    assert document.where(("b", 1, "d", "unknown")) == "f:4, b[1].d.unknown"


# JSON Schema ----------------------------------------------------------------------------------------------------------


def _references(value: Any) -> list[str]:
    if isinstance(value, dict):
        here = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
        return here + [r for item in value.values() for r in _references(item)]
    return [r for item in value for r in _references(item)] if isinstance(value, list) else []


def test_json_schema_names_every_primitive_and_resolves() -> None:
    schema = json_schema()
    references = _references(schema)
    assert references
    for reference in references:
        assert reference.removeprefix("#/$defs/") in schema["$defs"], reference
    for name in ("score.attention", "select.top", "rest.merge", "when.always"):
        assert name in schema["$defs"]
        assert schema["$defs"][name]["additionalProperties"] is False


def test_policies_are_frozen() -> None:
    loaded: Any = load_policy("fastv")
    assert isinstance(loaded, Policy)
    with pytest.raises(AttributeError):
        loaded.name = "other"
