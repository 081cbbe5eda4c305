"""change_score on Triton: each token and the one it is compared with are read once, side by side."""

from __future__ import annotations

import torch

from tvc.kernels.providers import YES, Support, no
from tvc.kernels.providers._directions import FLOATS
from tvc.kernels.providers._table import setting
from tvc.kernels.providers._triton import cdiv, jit, tl
from tvc.kernels.score_change import NEW, earlier

FRESH = tl.constexpr(NEW)


@jit
def _change_kernel(
    p_feature, p_frame, p_index, p_there, p_score, V, D, s_b, s_v, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    i_b = tl.program_id(1).to(tl.int64)
    p_feature += i_b * s_b
    o_v = (tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)).to(tl.int64)
    m_v = o_v < V
    b_there = tl.load(p_there + i_b * V + o_v, mask=m_v, other=0)  # [BLOCK_V]
    b_index = tl.load(p_index + i_b * V + o_v, mask=m_v, other=0)  # [BLOCK_V] int64
    b_dot = tl.zeros([BLOCK_V, BLOCK_D], tl.float32)
    b_own = tl.zeros([BLOCK_V, BLOCK_D], tl.float32)
    b_its = tl.zeros([BLOCK_V, BLOCK_D], tl.float32)
    for i_d in range(0, D, BLOCK_D):
        o_d = i_d + tl.arange(0, BLOCK_D)
        m_tile = (b_there != 0)[:, None] & (o_d < D)[None, :]
        b_x = tl.load(p_feature + o_v[:, None] * s_v + o_d[None, :], mask=m_tile, other=0.0).to(tl.float32)
        b_y = tl.load(p_feature + b_index[:, None] * s_v + o_d[None, :], mask=m_tile, other=0.0).to(tl.float32)
        b_dot += b_x * b_y
        b_own += b_x * b_x
        b_its += b_y * b_y
    b_own, b_its = tl.sqrt(tl.sum(b_own, 1)), tl.sqrt(tl.sum(b_its, 1))
    # As `directions` has it: what is not finite has none.
    m_known = (b_own < float("inf")) & (b_its < float("inf"))
    b_cosine = tl.sum(b_dot, 1) / (tl.maximum(b_own, 1e-12) * tl.maximum(b_its, 1e-12))
    b_score = 1.0 - tl.where(m_known, b_cosine, 0.0)
    b_frame = tl.load(p_frame + i_b * V + o_v, mask=m_v, other=-1)
    b_score = tl.where(b_there != 0, b_score, tl.where(b_frame < 0, 0.0, FRESH))
    tl.store(p_score + i_b * V + o_v, b_score, mask=m_v)


def supports(
    feature: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    frame: torch.Tensor,
    place: torch.Tensor,
    window: int,
) -> Support:
    if feature.dtype not in FLOATS:
        return no(f"the feature is {feature.dtype}, not float32, float16 or bfloat16")
    return YES


def launch(
    feature: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    frame: torch.Tensor,
    place: torch.Tensor,
    window: int,
) -> torch.Tensor:
    """[B, V] float32: 1 - cosine with the token at the same place of an earlier frame of the segment."""
    batch, visual = segment.shape
    score = torch.empty(batch, visual, dtype=torch.float32, device=feature.device)
    if score.numel():
        index, there = earlier(segment, counts, frame, place, window)
        feature = feature if feature.stride(2) == 1 else feature.contiguous()
        chosen = setting("change_score", visual)
        _change_kernel[(cdiv(visual, chosen["block_v"]), batch)](
            feature, frame.contiguous(), index.contiguous(), there.contiguous().view(torch.uint8), score, visual,
            feature.shape[2], *feature.stride()[:2],
            BLOCK_V=chosen["block_v"], BLOCK_D=chosen["block_d"], num_warps=chosen["warps"],
        )  # fmt: skip
    return score
