"""The words of a traced graph that TorchScript does not know are translated, sizes read from tensors included."""

from __future__ import annotations

import pytest
import stand_in
import torch

from tvc.errors import ExportError
from tvc.export import torchscript


class Vocabulary(torch.nn.Module):
    """Factories, symbolic arithmetic, a run-time size."""

    def forward(self, x: torch.Tensor, i: torch.Tensor) -> tuple[torch.Tensor, ...]:
        length = x.shape[1]
        kept = (x > 0).any(0).nonzero()[:, 0]
        count = i.sum().item()
        torch._check(count >= 0)
        longest = torch.sym_max(length, length * 250 // 1000 + 7)
        zeros = torch.zeros(x.shape[0], length, dtype=torch.long)
        return (
            x.index_select(1, kept),
            torch.arange(length)[None] + i + zeros,
            torch.arange(longest).float(),
            torch.arange(count),
            x.double(),
        )


def test_factories_sizes_and_run_time_sizes_survive():
    inputs = {
        "x": (torch.randn(3, 8), {0: stand_in.AUTO, 1: stand_in.AUTO}),
        "i": (torch.ones(1, 8, dtype=torch.long), {1: stand_in.AUTO}),
    }
    part = stand_in.component("words", Vocabulary(), inputs, ("a", "b", "c", "d", "e"))
    script, module = torch.jit.script(torchscript.plain_module(part)), part.exported.module(check_guards=False)
    assert "cpu" not in script.code  # not bound to the device that traced it
    for length in (8, 5, 13):
        arguments = (torch.randn(2, length), torch.ones(1, length, dtype=torch.long))
        for got, want in zip(script(*arguments), module(*arguments), strict=True):
            assert got.dtype == want.dtype
            assert torch.equal(got, want)


@torch.library.custom_op("stand_in::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@twice.register_fake
def _(x):
    return torch.empty_like(x)


class Custom(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (torch.ops.stand_in.twice(x),)


def test_a_custom_operator_is_refused_by_name():
    part = stand_in.component("custom", Custom(), {"x": (torch.randn(3), {})}, ("y",))
    with pytest.raises(ExportError, match=r"stand_in\.twice"):
        torchscript.plain_module(part)
