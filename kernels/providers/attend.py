"""attend on CUDA: one query by split keys on Triton, a chunk without a past by PyTorch's flash attention over runs."""

from __future__ import annotations

import torch

from tvc.kernels.providers import YES, Support, no
from tvc.kernels.providers._decode import attend_once

WIDEST = 256  # widths of a head that flash attention has kernels for; they come in steps of 8


def supports(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
    runs: torch.Tensor | None,
    scale: float,
) -> Support:
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return no(f"tensors are {query.dtype}, not float32, float16 or bfloat16")
    if max(query.shape[3], value.shape[3]) > WIDEST:
        return no(f"heads are {max(query.shape[3], value.shape[3])} wide; there are kernels up to {WIDEST}")
    if query.shape[2] == 1:
        return YES
    if query.device.type != "cuda":
        return no("flash attention runs on CUDA alone")
    if query.dtype == torch.float32:
        return no("flash attention takes float16 and bfloat16, not float32")
    if runs is None or query.shape[2] != key.shape[2]:
        return no("flash attention takes runs, which a chunk on top of a past has not")
    if query.shape[3] % 8 or query.shape[3] != value.shape[3]:
        return no(f"flash attention takes one width of a head, in steps of 8; not {query.shape[3]}, {value.shape[3]}")
    return YES


def launch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
    runs: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """[B, H, Q, e]: each query over the keys that are not behind it."""
    if query.shape[2] == 1:
        return attend_once(query, key, value, query_positions, key_positions, scale)
    batch, heads, length, width = query.shape
    packed = [tensor.transpose(1, 2).reshape(batch * length, -1, width) for tensor in (query, key, value)]
    # Every run is at most as long as the chunk: a size the host knows, so that nothing waits for the device.
    made = torch.ops.aten._flash_attention_forward(*packed, runs, runs, length, length, 0.0, True, False, scale=scale)[
        0
    ]
    return made.view(batch, length, heads, width).transpose(1, 2)
