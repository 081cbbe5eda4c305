"""attention_runs on Triton: the pads of each sample counted in one launch."""

from __future__ import annotations

import torch

from tvc.kernels.providers import YES, Support
from tvc.kernels.providers._triton import jit, tl


@jit
def _runs_kernel(p_positions, p_runs, B, N, s_b, s_n, BLOCK_N: tl.constexpr):
    i_b = tl.program_id(0)
    o_n = tl.arange(0, BLOCK_N)
    b_pads = tl.zeros([BLOCK_N], tl.int32)
    for i_n in range(0, N, BLOCK_N):
        p_n = p_positions + i_b.to(tl.int64) * s_b + (i_n + o_n).to(tl.int64) * s_n
        b_pads += (tl.load(p_n, mask=i_n + o_n < N, other=0) < 0).to(tl.int32)
    tl.store(p_runs + 2 * i_b, i_b * N)
    tl.store(p_runs + 2 * i_b + 1, i_b * N + tl.sum(b_pads, 0))
    tl.store(p_runs + 2 * B, B * N, mask=i_b == 0)


def supports(key_positions: torch.Tensor) -> Support:
    return YES


def launch(key_positions: torch.Tensor) -> torch.Tensor:
    """[2B + 1] int32: first slot of each sample's pads and of its tokens in the packed batch, and its end."""
    batch, length = key_positions.shape
    runs = torch.empty(2 * batch + 1, dtype=torch.int32, device=key_positions.device)
    if not batch:
        return runs.zero_()
    _runs_kernel[(batch,)](key_positions, runs, batch, length, *key_positions.stride(), BLOCK_N=1024, num_warps=4)
    return runs
