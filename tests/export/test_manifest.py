"""An artifact directory is whole or not there, and reading one trusts nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tvc.errors import ArgumentError, ArtifactError
from tvc.export import manifest

DESCRIPTION = {
    "format": manifest.FORMAT,
    "target": "ort",
    "stages": [],
    "components": {},
    "model": {},
    "policy": {},
    "versions": {},
}


def make(place: Path) -> Path:
    with manifest.writing(place) as (folder, seal):
        (folder / "decoder.onnx").write_bytes(b"graph" * 100)
        (folder / "sub").mkdir()
        (folder / "sub" / "config.json").write_text("{}")
        seal(DESCRIPTION)
    return place


def refusal(place: Path) -> ArtifactError:
    with pytest.raises(ArtifactError) as caught:
        manifest.read(place)
    lines = str(caught.value).splitlines()
    assert len(lines) == 5
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["where", "got", "want", "fix"]
    return caught.value


def test_what_was_written_is_read_back_and_further_files_do_no_harm(tmp_path):
    place = make(tmp_path / "out")
    (place / "notes.txt").write_text("mine")
    content = manifest.read(place)
    assert sorted(content["files"]) == ["decoder.onnx", "sub/config.json"]
    assert content["files"]["decoder.onnx"]["bytes"] == 500
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_missing_file_is_named(tmp_path):
    place = make(tmp_path / "out")
    (place / "sub" / "config.json").unlink()
    error = refusal(place)
    assert error.slug == "missing-file"
    assert error.where.endswith("config.json")


def test_a_truncated_file_is_named(tmp_path):
    place = make(tmp_path / "out")
    os.truncate(place / "decoder.onnx", 499)
    error = refusal(place)
    assert (error.slug, error.got, error.want) == ("truncated-file", "499 bytes", "500 bytes")


def test_a_changed_byte_is_found(tmp_path):
    place = make(tmp_path / "out")
    (place / "decoder.onnx").write_bytes(b"Graph" + b"graph" * 99)
    error = refusal(place)
    assert error.slug == "changed-file"
    assert error.where.endswith("decoder.onnx")
    assert manifest.read(place, only=["sub/config.json"])["target"] == "ort"


@pytest.mark.parametrize("name", ["/etc/passwd", "../other", "sub/../../other", "C:\\x", "..\\other", ""])
def test_a_path_that_leaves_the_directory_is_refused(tmp_path, name):
    place = make(tmp_path / "out")
    (tmp_path / "other").write_text("x")
    content = json.loads((place / manifest.FILE).read_text())
    content["files"][name] = {"bytes": 1, "sha256": "0"}
    (place / manifest.FILE).write_text(json.dumps(content))
    assert refusal(place).slug == "unsafe-path"


def test_a_link_that_leaves_the_directory_is_refused_and_one_that_stays_is_not(tmp_path):
    place = make(tmp_path / "out")
    graph = place / "decoder.onnx"
    graph.rename(place / "kept")
    graph.symlink_to("kept")
    manifest.read(place)
    (place / "kept").rename(tmp_path / "outside")
    graph.unlink()
    graph.symlink_to(tmp_path / "outside")
    assert refusal(place).slug == "unsafe-path"


@pytest.mark.parametrize(
    ("text", "slug"),
    [
        ('{"format": 1, "tar', "truncated-file"),
        ("[]", "unknown-format"),
        ('{"format": 99}', "unknown-format"),
        ('{"format": 1, "target": 3}', "bad-artifact"),
    ],
)
def test_a_broken_manifest_is_refused(tmp_path, text, slug):
    place = make(tmp_path / "out")
    (place / manifest.FILE).write_text(text)
    assert refusal(place).slug == slug


def test_a_directory_without_a_manifest_is_no_artifact(tmp_path):
    assert refusal(tmp_path).slug == "not-an-artifact"
    assert refusal(tmp_path / "nowhere").slug == "not-an-artifact"


def test_a_failed_compile_leaves_nothing(tmp_path):
    def fail() -> None:
        with manifest.writing(tmp_path / "out") as (folder, _):
            (folder / "half").write_text("x")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_block_that_never_seals_fails(tmp_path):
    with pytest.raises(ArtifactError, match="never sealed"), manifest.writing(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_an_existing_directory_is_not_overwritten_unasked(tmp_path):
    place = make(tmp_path / "out")
    with pytest.raises(ArgumentError, match="output-exists"), manifest.writing(place):
        pass
    with manifest.writing(place, overwrite=True) as (folder, seal):
        (folder / "new").write_text("x")
        seal(DESCRIPTION)
    assert list(manifest.read(place)["files"]) == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("x")
    with pytest.raises(ArgumentError, match="no artifact"), manifest.writing(foreign, overwrite=True):
        pass


KILLED = """
import sys, time
from pathlib import Path
from tvc.export import manifest
with manifest.writing(Path(sys.argv[1])) as (folder, seal):
    (folder / "decoder.onnx").write_bytes(b"half")
    print("writing", flush=True)
    time.sleep(60)
"""


def test_a_killed_compile_leaves_no_artifact_and_the_next_one_cleans_up(tmp_path):
    place = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(place)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    # A compile that still runs is left alone.
    assert manifest.clean(place) == []
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not place.exists()
    assert [path.name.startswith(".out.partial-") for path in tmp_path.iterdir()] == [True]
    assert refusal(place).slug == "not-an-artifact"
    start = time.monotonic()
    make(place)
    assert time.monotonic() - start < 30
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    manifest.read(place)
