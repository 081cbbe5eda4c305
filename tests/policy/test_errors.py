"""Each mistake raises its own class and renders exactly the five lines of its golden file."""

from __future__ import annotations

import pathlib
import re

import pytest
from policy_cases import READING, RESOLVING, layout, policy, step

from tvc.errors import PolicyError, SiteError, TvcError
from tvc.policy import load_policy, resolve

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "errors"
LINES = re.compile(r"error\[TVC\d{3}] [a-z0-9-]+: \S.*\n  where: \S.*\n  got:   \S.*\n  want:  \S.*\n  fix:   \S.*\n")


def _expected(name: str) -> str:
    return (GOLDEN / f"policy-{name}.txt").read_text("utf-8")


def test_every_golden_text_belongs_to_a_case() -> None:
    found = {path.stem.removeprefix("policy-") for path in GOLDEN.glob("policy-*.txt")}
    assert found == {*READING, *RESOLVING}


@pytest.mark.parametrize("name", READING)
def test_reading_refuses(name: str) -> None:
    source, settings = READING[name]
    with pytest.raises(PolicyError) as caught:
        load_policy(source, set=settings)  # type: ignore[arg-type]
    assert caught.value.exit_code == 2
    assert caught.value.render() + "\n" == _expected(name)


@pytest.mark.parametrize("name", RESOLVING)
def test_resolving_refuses(name: str) -> None:
    text, model = RESOLVING[name]
    loaded = load_policy(text)
    with pytest.raises(SiteError) as caught:
        resolve(loaded, model)
    assert caught.value.exit_code == 2
    assert caught.value.render() + "\n" == _expected(name)


@pytest.mark.parametrize("name", [*READING, *RESOLVING])
def test_golden_texts_have_five_lines_with_something_on_each(name: str) -> None:
    assert LINES.fullmatch(_expected(name))


def test_file_and_line_are_those_of_the_file(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(policy(step("language.2"), step("language.4", "selekt: {top: 3}")))
    with pytest.raises(PolicyError) as caught:
        load_policy(path)
    assert caught.value.where == f"{path}:7, steps[1].selekt"


def test_value_of_a_parameter_is_reported_where_it_is_written() -> None:
    text = policy(
        step("language.2", 'score: uniform\n    select: {top: {keep: "{n}"}}'), head="version: 1\nparameters:\n  n: 0.5"
    )
    with pytest.raises(PolicyError) as caught:
        load_policy(text)
    assert caught.value.where == "policy text:3, steps[0].select.top.keep"


def test_mistake_in_an_extended_file_names_that_file(tmp_path: pathlib.Path) -> None:
    (tmp_path / "base.yaml").write_text(policy(step("language.2", "select: {stride: 0}")))
    child = tmp_path / "child.yaml"
    child.write_text("version: 1\nextends: base.yaml\n")
    with pytest.raises(PolicyError) as caught:
        load_policy(child)
    assert caught.value.where == f"{tmp_path / 'base.yaml'}:4, steps[0].select.stride"


def test_policies_that_extend_each_other_are_refused(tmp_path: pathlib.Path) -> None:
    for one, other in (("a", "b"), ("b", "a")):
        (tmp_path / f"{one}.yaml").write_text(f"version: 1\nextends: {other}.yaml\n")
    with pytest.raises(PolicyError, match="extends-circle"):
        load_policy(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("content", "slug"), [(None, "unreadable-file"), (b"\xff\xfe\x00", "unreadable-file"), (b"", "empty")]
)
def test_files_that_cannot_be_read(tmp_path: pathlib.Path, content: bytes | None, slug: str) -> None:
    path = tmp_path / "policy.yaml"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(PolicyError) as caught:
        load_policy(path)
    assert caught.value.slug == slug


def test_a_tag_runs_no_code(tmp_path: pathlib.Path) -> None:
    witness = tmp_path / "ran"
    with pytest.raises(PolicyError, match="yaml-tag"):
        load_policy(f"version: 1\nname: !!python/object/apply:pathlib.Path.touch [{witness}]\n")
    assert not witness.exists()


def test_a_few_lines_of_anchors_do_not_explode() -> None:
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))
    with pytest.raises(PolicyError, match="yaml-anchor"):
        load_policy(bomb)


def test_a_site_without_meaning_gives_the_models_reason() -> None:
    reason = "a 2x2 merger joins neighbours of the full grid"
    with pytest.raises(TvcError) as caught:
        resolve(load_policy(policy(step("projector", "select: {stride: 3}"))), layout(refused={"projector": reason}))
    assert reason in caught.value.got
    assert caught.value.fix == "write at: language.0"
