"""Weights of a primitive: a safetensors file that the policy names, and what of it the primitive takes.

A policy says `weights: scorer.safetensors`, a path beside the policy's own file; reading the policy does not open it,
and a plan needs none. Names and shapes are checked against the model when the policy is compiled, before anything is
traced. The tensors then enter the graph as constants of their own, so that every target stores them, and the oracle
reads the same ones.

A file may hold the modules of several sites: the names of each then begin with a prefix. Nothing but safetensors is
read, as the formats that pickle can run code.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
from typing import Any

import safetensors
import torch
from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from tvc.errors import WeightsError
from tvc.kernels.op import Primitive, Tap

SUFFIX = ".safetensors"
Shape = tuple[int | str, ...]  # a name stands for a size that the file decides, the same wherever the name is


class Weights:
    """A file of tensors: `name` as the policy writes it, relative to `folder`. Two are equal if their names are."""

    def __init__(self, name: str, folder: pathlib.Path | None = None):
        self.name, self.folder = name, folder or pathlib.Path()
        self._read: dict[str, dict[str, torch.Tensor]] = {}

    @property
    def path(self) -> pathlib.Path:
        return self.folder / self.name

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"Weights({self.name!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Weights) and self.name == other.name

    def __hash__(self) -> int:
        return hash(self.name)

    def digest(self) -> str:
        """The sha256 of the file; empty where there is none to read."""
        try:
            with self.path.open("rb") as stream:
                return hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError:
            return ""

    def header(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """(type, shape) of every tensor by its name; no tensor is read.

        Raises:
            WeightsError: there is no such file, or it is no safetensors file.
        """
        if not self.path.is_file():
            raise self._refused(
                "the weights that a step names are not there",
                "a directory" if self.path.is_dir() else "no such file",
                "missing-weights",
                "train them, or name a file that is there: a path relative to the policy's file",
            )
        try:
            with safetensors.safe_open(os.fspath(self.path), "pt") as opened:
                parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  it is no mapping
                return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()}
        except (safetensors.SafetensorError, OSError) as problem:
            raise self._refused(
                "the weights that a step names are in no safetensors file",
                str(problem).splitlines()[0],
                "not-safetensors",
                "write it with safetensors.torch.save_file(tensors, path)",
            ) from problem

    def tensors(self, prefix: str = "") -> dict[str, torch.Tensor]:
        """The tensors whose names begin with `prefix`, by what follows it; read once."""
        if prefix not in self._read:
            names = [name for name in self.header() if name.startswith(prefix)]
            with safetensors.safe_open(os.fspath(self.path), "pt") as opened:
                found = {name.removeprefix(prefix): opened.get_tensor(name) for name in names}
            for name, tensor in found.items():
                if not bool(torch.isfinite(tensor).all()):
                    raise self._refused(
                        "weights hold a number that is not finite",
                        f"{prefix}{name}: {int((~torch.isfinite(tensor)).sum())} of {tensor.numel()} numbers",
                        "weights-not-finite",
                        "train them again",
                    )
            self._read[prefix] = found
        return self._read[prefix]

    def _refused(self, summary: str, got: str, slug: str, fix: str) -> WeightsError:
        where = os.fspath(self.path)
        return WeightsError(summary, where=where, got=got, want="a safetensors file", fix=fix, slug=slug)

    @classmethod
    def _of(cls, value: Any) -> Weights:
        if isinstance(value, Weights):
            return value
        if not isinstance(value, str) or not value.endswith(SUFFIX) or "\0" in value:
            details = {
                "summary": "weights are named by a file that is no safetensors file",
                "got": str(value),
                "want": f"a path that ends in {SUFFIX}",
                "fix": "save the tensors with safetensors.torch.save_file, and name that file",
            }
            raise PydanticCustomError("bad-weights", "{summary}", details)
        return cls(value)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls._of, serialization=core_schema.plain_serializer_function_ser_schema(str, when_used="json")
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"type": "string", "format": "safetensors", "description": f"a path that ends in {SUFFIX}"}


class Trained(Primitive):
    """A primitive whose weights come from a file; it gets them as the argument `weights`, by name."""

    weights: Weights = Field(description="a safetensors file, relative to the policy's own")
    prefix: str = Field("", description="what its names in the file begin with; at a range of sites: each site's name")

    def shapes(self, width: int | str) -> dict[str, Shape]:
        """The shape of each weight, where visual tokens at the site are `width` wide."""
        raise NotImplementedError

    def tensors(self) -> dict[str, torch.Tensor]:
        """What `apply` gets; the compiler has compared it with `shapes`."""
        return self.weights.tensors(f"{self.prefix}." if self.prefix else "")

    def module(self) -> dict[str, Tap]:
        """The tap of the weights, for `taps`."""
        return {"weights": Tap("weights", tensors=self.tensors)}
