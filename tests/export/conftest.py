"""The stand-in program, traced once for all tests of this folder."""

from __future__ import annotations

import importlib.util
import pathlib
import sys

import pytest

_HERE = pathlib.Path(__file__).parent
_SPEC = importlib.util.spec_from_file_location("stand_in", _HERE / "stand_in.py")
assert _SPEC is not None
assert _SPEC.loader is not None
stand_in = importlib.util.module_from_spec(_SPEC)
sys.modules["stand_in"] = stand_in
_SPEC.loader.exec_module(stand_in)


@pytest.fixture(scope="session")
def shape():
    return stand_in.Shape(layers=6)


@pytest.fixture(scope="session")
def program(shape):
    return stand_in.program(shape)


@pytest.fixture(scope="session")
def eager(program):
    return stand_in.eager(program)
