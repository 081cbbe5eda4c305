"""repeat: a loop whose number of rounds is a size or a tensor, as one node of a graph.

Greedy selectors take one token after another. Run eagerly that is a Python loop; while a graph is exported it becomes
one `while_loop` node, which ONNX writes as `Loop` and TorchScript as `while`, so that no graph grows with a budget.
"""

from __future__ import annotations

import types
from collections.abc import Callable

import torch
from torch._higher_order_ops.while_loop import while_loop
from torch.fx.experimental import _config

State = tuple[torch.Tensor, ...]


def _forget_loops() -> None:
    """Dynamo compares a loop with all that it has traced before, and fails where a size was fixed that is unknown now.

    All of them are traced by way of one small function of PyTorch's; only what was compiled of that one is forgotten.
    """
    from torch._dynamo.eval_frame import reset_code  # which imports triton: tracing does, importing tvc does not

    for code in while_loop.__code__.co_consts:
        if isinstance(code, types.CodeType):
            reset_code(code)


def repeat(
    body: Callable[..., State],
    state: State,
    rounds: torch.Tensor,
    unsettled: Callable[..., torch.Tensor] | None = None,
) -> State:
    """What `state` is after `rounds` times `state = body(number of the round, *state)`.

    Args:
        body: a pure function of an int64 scalar tensor and the state; it returns new tensors of the same shapes, dtypes
            and devices, none of them an argument itself. It may read tensors and sizes around it, but no size of a
            tensor that may be empty: graphs tell sizes from strides of the same number, which are 1 where those are 0.
        state: tensors, none of them a view of another or of what the body reads.
        rounds: int64 scalar tensor, at least 0. With 0 rounds the state comes back as it is.
        unsettled: a bool scalar tensor of the state; where it is False the loop ends early.
    """
    if not torch.compiler.is_exporting():
        for number in range(int(rounds)):
            if unsettled is not None and not bool(unsettled(*state)):
                break
            state = body(torch.tensor(number, device=state[0].device), *state)
        return state

    def going_on(number: torch.Tensor, *now: torch.Tensor) -> torch.Tensor:
        return number < rounds if unsettled is None else (number < rounds) & unsettled(*now)

    def once(number: torch.Tensor, *now: torch.Tensor) -> State:
        return number + 1, *body(number, *now)

    first = torch.zeros((), dtype=torch.int64, device=state[0].device)
    if torch.compiler.is_dynamo_compiling():  # the body of another loop
        return while_loop(going_on, once, (first, *state))[1:]
    _forget_loops()
    # A size of 1 is a size, which Dynamo would otherwise hold for that number whatever it is in a run.
    with _config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        last: State = while_loop(going_on, once, (first, *state))
    return last[1:]
