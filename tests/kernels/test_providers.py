"""Providers: their kernels on the CPU under Triton's interpreter, compiled for GPUs without one, and on a GPU.

Triton decides when it is imported whether kernels are interpreted, so these tests run in processes of their own.
"""

from __future__ import annotations

import ast
import inspect
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from kernel_provider_cases import EXTRA, one_scope, scopes

from tvc.compiler import kept
from tvc.kernels import OPS
from tvc.kernels.providers import PROVIDED, _table, provider, support
from tvc.kernels.tolerances import tolerance

HERE = pathlib.Path(__file__).parent
FOLDER = HERE.parent.parent / "kernels" / "providers"
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # bytes that a program may have, by compute capability


def _process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", **environment},
        cwd=HERE.parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )


def _interpreted(*arguments: str) -> None:
    file = str(HERE / "providers_interpreted.py")
    done = _process("-m", "pytest", file, "-q", "-p", "no:cacheprovider", *arguments, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_providers_equal_their_references_under_the_interpreter() -> None:
    _interpreted()


@pytest.mark.conformance
def test_providers_equal_their_references_at_larger_sizes() -> None:
    _interpreted("-m", "conformance")


@pytest.mark.conformance
@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_every_kernel_compiles_within_the_memory_of_a_gpu(capability: int) -> None:
    done = _process(str(HERE / "compile_kernels.py"), str(capability))
    assert done.returncode == 0, done.stderr[-6000:]
    made = [line.split() for line in done.stdout.splitlines()]
    kernels = {
        node.name
        for path in FOLDER.glob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    }
    assert {name for name, _, _ in made} == kernels
    assert max(int(shared) for _, shared, _ in made) <= SHARED_MEMORY[capability]


def test_importing_tvc_leaves_triton_alone() -> None:
    done = _process("-c", "import sys, tvc, tvc.kernels; print('triton' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr


def test_one_file_imports_triton() -> None:
    found = {
        path.name
        for path in FOLDER.parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "triton" for alias in node.names))
        or (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "triton")
    }
    assert found == {"_triton.py"}


def test_every_provider_belongs_to_an_op_and_has_cases() -> None:
    assert set(OPS) >= PROVIDED
    assert set(EXTRA) == PROVIDED


@pytest.mark.parametrize("name", sorted(PROVIDED))
def test_a_provider_has_the_signature_of_its_op(name: str) -> None:
    wanted = inspect.signature(OPS[name].reference)
    for function in (provider(name).supports, provider(name).launch):
        assert inspect.signature(function).parameters == wanted.parameters
    assert inspect.signature(provider(name).launch).return_annotation == wanted.return_annotation


def test_without_triton_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tvc.kernels.providers._installed", lambda: False)
    found = support("top_keep", torch.zeros(1, 2), *one_scope(1, 2), 500, 0, 1)
    assert (found.ok, found.reason) == (False, "triton is not installed")
    assert support("norm_score").reason == "the op has no provider"


def test_ops_with_kernels_stay_whole_in_pytorch_on_cuda_alone() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    assert kept("torch", cuda) == PROVIDED | {"restore", "evict", "pool_cache", "remember", "unrotated_keys"}
    assert kept("torch", cpu) == {"shorten", "restore", "evict", "pool_cache", "remember", "unrotated_keys"}
    for target in ("pt2", "torchscript", "ort"):
        assert not (kept(target, cpu) | kept(target, cuda)) & PROVIDED


def test_the_benchmark_says_that_it_needs_a_gpu() -> None:
    done = _process("benchmarks/kernels.py", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "benchmarks/kernels.py needs a CUDA device, and torch finds none."


def test_every_list_of_the_table_ends_in_a_class_for_all_sizes() -> None:
    for kernel, classes in _table.table().items():
        limits = [entry["up_to"] for entry in classes]
        assert limits[-1] is None, kernel
        assert limits[:-1] == sorted(limits[:-1]), kernel
        assert len({frozenset(entry) for entry in classes}) == 1, kernel
        for entry in classes:
            blocks = [value for name, value in entry.items() if name != "up_to"]
            assert all(value > 0 and value & (value - 1) == 0 for value in blocks), kernel


def test_the_table_holds_the_kernels_that_ask_for_it() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in FOLDER.glob("*.py"))
    asked = set(re.findall(r'setting\("([^"]+)"', text))
    assert asked == set(_table.table())


def test_the_first_class_that_is_large_enough_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    classes = [{"up_to": 64, "block": 16}, {"up_to": 512, "block": 64}, {"up_to": None, "block": 128}]
    monkeypatch.setattr(_table, "table", lambda: {"made-up": classes})
    assert [_table.setting("made-up", size)["block"] for size in (1, 64, 65, 512, 513)] == [16, 16, 64, 64, 128]


def _outputs(result: Any) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _moved(arguments: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    moved = (a.cuda() if torch.is_tensor(a) else a for a in arguments)
    return tuple(a.to(dtype) if torch.is_tensor(a) and a.is_floating_point() else a for a in moved)


def _compare_on_gpu(name: str, arguments: tuple[Any, ...]) -> None:
    found = support(name, *arguments)
    assert found.ok, found.reason
    got = _outputs(OPS[name].overload(*arguments))
    for value, expected in zip(got, _outputs(OPS[name].reference(*arguments)), strict=True):
        if value.is_floating_point():
            bar = tolerance(name, value.dtype)
            torch.testing.assert_close(value.double(), expected.double(), rtol=bar.rtol, atol=bar.atol, equal_nan=True)
        else:
            assert torch.equal(value, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", sorted(PROVIDED))
def test_provider_equals_reference_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    taken = [case for case in OPS[name].cases() if support(name, *case[1]).ok]
    for case, arguments in (*taken, *EXTRA[name]((1, 63, 500, 577))):
        if "far-off" in case and dtype != torch.float32:
            continue  # a half type has so few numbers there that distances are equal, and the last digit settles them
        _compare_on_gpu(name, _moved(arguments, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("name", sorted(PROVIDED))
def test_an_op_passes_opcheck_on_a_gpu(name: str) -> None:
    _, arguments = next(iter(OPS[name].cases()))
    torch.library.opcheck(OPS[name].overload, _moved(arguments, torch.float32))


def _long(name: str, visual: int) -> tuple[Any, ...]:
    """Arguments with `visual` tokens of two images."""
    segment, counts = scopes(1, visual, 2, seed=0)
    if name == "top_keep":
        return torch.randn(1, visual), segment, counts, 250, 0, visual // 4
    if name == "merge_nearest":
        chosen, score = torch.arange(0, visual, 100)[None], torch.randn(1, visual)
        feature, metric = torch.randn(1, visual, 256), torch.randint(0, 2, (1, visual, 16)) * 2.0 - 1.0
        return feature, metric, torch.ones(1, visual), segment, counts, chosen, score, "stride", 64, 128, "mean"
    rows = torch.arange(visual - 200, visual)[None] if name == "attention_score.columns" else torch.tensor([[visual]])
    query, key = torch.randn(1, 8, visual + 1, 64), torch.randn(1, 2, visual + 1, 64)
    return query, key, None, rows, torch.arange(visual)[None, :, None], 0.125, "mean"


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["top_keep", "merge_nearest", "attention_score.rows", "attention_score.columns"])
def test_provider_equals_reference_with_fifty_thousand_tokens(name: str) -> None:
    torch.manual_seed(0)
    _compare_on_gpu(name.split(".")[0], _moved(_long(name, 50_000), torch.float32))
