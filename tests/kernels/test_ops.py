"""Every op against its loop oracle over its cases and dtypes, and what holds for all ops alike."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from kernel_oracles import ORACLES

from tvc.kernels import OPS, blocks
from tvc.kernels.tolerances import TOLERANCES, tolerance

CASES = [
    pytest.param(name, arguments, id=f"{name}-{case}")
    for name, entry in sorted(OPS.items())
    for case, arguments in entry.cases()
]
FLOATS = list(TOLERANCES)


def convert(arguments: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    return tuple(a.to(dtype) if torch.is_tensor(a) and a.is_floating_point() else a for a in arguments)


def listed(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.tolist() if torch.is_tensor(a) else a for a in arguments)


def outputs(result: Any) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def check(name: str, got: torch.Tensor, want: torch.Tensor) -> None:
    """Floats within the table, everything else equal; NaN where NaN is wanted."""
    if got.is_floating_point():
        bar = tolerance(name, got.dtype)
        torch.testing.assert_close(got.double(), want.double(), rtol=bar.rtol, atol=bar.atol, equal_nan=True)
    else:
        assert got.tolist() == want.tolist()


def test_every_op_has_an_oracle() -> None:
    assert set(OPS) == set(ORACLES)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("name", "arguments"), CASES)
def test_op_equals_oracle(
    name: str, arguments: tuple[Any, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = convert(arguments, dtype)
    want = ORACLES[name](*listed(arguments))
    # Cases have few tokens: with small blocks their matrices have several, the last of them not full.
    for rows in (blocks.BLOCK, 2) if dtype == torch.float32 else (blocks.BLOCK,):
        monkeypatch.setattr(blocks, "BLOCK", rows)
        got = outputs(OPS[name].overload(*arguments))
        for value, expected in zip(got, want if len(got) > 1 else (want,), strict=True):
            wanted = torch.tensor(expected, dtype=torch.float64 if value.is_floating_point() else value.dtype)
            check(name, value, wanted.reshape(value.shape) if value.numel() == 0 else wanted)


@pytest.mark.parametrize(("name", "arguments"), CASES)
def test_op_leaves_its_arguments_alone(name: str, arguments: tuple[Any, ...]) -> None:
    before = [a.clone() if torch.is_tensor(a) else a for a in arguments]
    results = outputs(OPS[name].overload(*arguments))
    for was, now in zip(before, arguments, strict=True):
        if torch.is_tensor(now):
            torch.testing.assert_close(now, was, rtol=0, atol=0, equal_nan=True)
            storages = {out.untyped_storage().data_ptr() for out in results if out.numel()}
            assert now.untyped_storage().data_ptr() not in storages


@pytest.mark.parametrize("name", sorted(OPS))
def test_op_passes_opcheck(name: str) -> None:
    # Schema, fake tensors, autograd and dynamic shapes do not depend on the values: one case tells.
    _, arguments = next(iter(OPS[name].cases()))
    torch.library.opcheck(OPS[name].overload, arguments)


def sampled(name: str, arguments: tuple[Any, ...]) -> list[bool]:
    """Which arguments have one row a sample: all tensors but the weights of modules."""
    names = inspect.signature(OPS[name].reference).parameters
    return [torch.is_tensor(a) and not n.endswith(("weight", "bias")) for n, a in zip(names, arguments, strict=False)]


def single(name: str, arguments: tuple[Any, ...], b: int, batch: int) -> tuple[Any, ...]:
    rows = sampled(name, arguments)
    return tuple(a[b : b + 1] if has and a.shape[0] == batch else a for a, has in zip(arguments, rows, strict=True))


def _batched() -> Iterator[Any]:
    for case in CASES:
        name, arguments = case.values
        if "axes" in case.id:  # an argument whose first axis is no sample
            continue
        batch = max(a.shape[0] for a, has in zip(arguments, sampled(name, arguments), strict=True) if has)
        if batch > 1 and name not in ("attention_runs", "packed_attention"):  # one result for all samples
            yield pytest.param(name, arguments, batch, id=case.id)


@pytest.mark.parametrize(("name", "arguments", "batch"), list(_batched()))
def test_a_batch_equals_its_samples_one_by_one(name: str, arguments: tuple[Any, ...], batch: int) -> None:
    together = outputs(OPS[name].overload(*arguments))
    for b in range(batch):
        alone = outputs(OPS[name].overload(*single(name, arguments, b, batch)))
        for whole, part in zip(together, alone, strict=True):
            row = whole[b : b + 1]
            # A run-time size is the largest of the batch: the sample alone has fewer pads in front.
            surplus = row.shape[1] - part.shape[1] if row.dim() > 1 else 0
            if surplus > 0:
                assert (row[:, :surplus] == (0 if row.is_floating_point() else -1)).all()
                row = row[:, surplus:]
            check(name, part, row)
