"""What attention and MLP of a decoder layer do to a token, seen in the untouched model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from tvc.errors import TraceError
from tvc.kernels.op import Tap
from tvc.trace.layout import blocks
from tvc.verification.steps import Sample

Ends = tuple[torch.Tensor, torch.Tensor]


def asked(taps: Iterable[Tap]) -> dict[int, list[Ends]]:
    """The decoder layers whose changes steps ask for, nothing seen of them yet."""
    return {int((tap.layer or "").removeprefix("language.")): [] for tap in taps if tap.kind == "transition"}


@contextlib.contextmanager
def watched(model: torch.nn.Module, seen: dict[int, list[Ends]]) -> Iterator[None]:
    """Calls of `model` inside the block leave (what enters, what comes out) of attention and MLP, per layer in `seen`.

    Raises:
        TraceError: a layer is not made of one attention and one MLP.
    """
    handles = []

    def hook(layer: int, place: int) -> Callable[..., None]:
        def after(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            entering = args[0] if args else kwargs["hidden_states"]
            leaving = output if isinstance(output, torch.Tensor) else output[0]
            seen[layer][place : place + 1] = [(entering, leaving)]

        return after

    for layer in seen:
        block = blocks(model)[0][layer]
        parts = [
            (name, part)
            for name, part in block.named_children()
            if any(isinstance(inner, torch.nn.Linear) for inner in part.modules())
        ]
        parts.sort(key=lambda named: "attn" not in named[0] and "attention" not in named[0])
        if len(parts) != 2:
            raise TraceError(
                f"language.{layer} is not made of one attention and one MLP",
                where="verification",
                got=", ".join(name for name, _ in parts),
                want="two modules with linear layers",
                fix="score by attention, or compile with verify=False",
                slug="no-branches",
            )
        for place, (_, part) in enumerate(parts):
            handles.append(part.register_forward_hook(hook(layer, place), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def changes(ends: list[Ends], sample: Sample, there: torch.Tensor) -> torch.Tensor:
    """[V] float32: for each sub-block the growth of a visual token times the softmax, over the tokens that are `there`,
    of one minus the cosine; summed over the sub-blocks."""
    total = torch.zeros(len(sample.slots), device=sample.slots.device)
    for entering, leaving in ends:
        before, after = entering[sample.row].float(), leaving[sample.row].float()
        growth = after.norm(dim=1) / before.norm(dim=1)
        turned = 1 - torch.nn.functional.cosine_similarity(before, after, dim=1)
        share = torch.zeros_like(turned)
        share[there] = turned[there].softmax(0)
        total += (growth * share)[sample.slots]
    return total
