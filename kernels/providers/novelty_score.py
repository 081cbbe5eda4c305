"""novelty_score on Triton: tables of frames instead of tokens, which are read as they are and never made float32.

One launch leaves mean and variance of every frame, radix selection the channels that count, two more launches the mean
direction of every frame, and the last one compares each token with both of its frame's vectors.
"""

from __future__ import annotations

import torch

from tvc.kernels.frames import extent, first_of, lengths
from tvc.kernels.greedy import directions
from tvc.kernels.providers import YES, Support, no
from tvc.kernels.providers._directions import FLOATS
from tvc.kernels.providers._select import best
from tvc.kernels.providers._table import setting
from tvc.kernels.providers._triton import cdiv, jit, tl
from tvc.kernels.score_novelty import WIDTHS

SPREADS = tuple(2.0 * width for width in WIDTHS)


@jit
def _frame(p_begin, p_length, F):
    """(sample, row of a table, first token, number of tokens) of the frame of a program."""
    i_b = tl.program_id(2).to(tl.int64)
    row = i_b * F + tl.program_id(0)
    return i_b, row, tl.load(p_begin + row), tl.load(p_length + row)


@jit
def _moments_kernel(
    p_feature, p_begin, p_length, p_mean, p_varies,
    F, D, s_b, s_v, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Mean and variance of a stretch of channels over the tokens of a frame."""
    i_b, row, begin, length = _frame(p_begin, p_length, F)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    b_sum = tl.zeros([BLOCK_V, BLOCK_D], tl.float32)
    for i_v in range(0, length, BLOCK_V):
        o_v = i_v + tl.arange(0, BLOCK_V)
        m_x = (o_v < length)[:, None] & (o_d < D)[None, :]
        p_x = p_feature + i_b * s_b + (begin + o_v)[:, None] * s_v + o_d[None, :]
        b_sum += tl.load(p_x, mask=m_x, other=0.0).to(tl.float32)  # [BLOCK_V, BLOCK_D]
    b_mean = tl.sum(b_sum, 0) / tl.maximum(length, 1)
    b_sum = tl.zeros([BLOCK_V, BLOCK_D], tl.float32)
    for i_v in range(0, length, BLOCK_V):
        o_v = i_v + tl.arange(0, BLOCK_V)
        m_x = (o_v < length)[:, None] & (o_d < D)[None, :]
        p_x = p_feature + i_b * s_b + (begin + o_v)[:, None] * s_v + o_d[None, :]
        b_off = tl.load(p_x, mask=m_x, other=0.0).to(tl.float32) - b_mean[None, :]  # [BLOCK_V, BLOCK_D]
        b_sum += tl.where(m_x, b_off * b_off, 0.0)
    tl.store(p_mean + row * D + o_d, b_mean, mask=o_d < D)
    tl.store(p_varies + row * D + o_d, tl.sum(b_sum, 0) / tl.maximum(length, 1), mask=o_d < D)


@jit
def _row(p_feature, p_counted, i_b, o_v, b_frame, o_d, F, D, s_b, s_v):
    """[BLOCK_V, BLOCK_D] float32: the channels of tokens that count in their frames, 0 for the others."""
    m_x = (b_frame >= 0)[:, None] & (o_d < D)[None, :]
    b_x = tl.load(p_feature + i_b * s_b + o_v[:, None] * s_v + o_d[None, :], mask=m_x, other=0.0).to(tl.float32)
    p_own = p_counted + (i_b * F + tl.maximum(b_frame, 0))[:, None] * D + o_d[None, :]
    return b_x * tl.load(p_own, mask=m_x, other=0).to(tl.float32)


@jit
def _length_kernel(
    p_feature, p_counted, p_frame, p_inverse,
    V, F, D, s_b, s_v, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One over the length of each token in the channels that count; 0 where `directions` makes zeros of it."""
    i_b = tl.program_id(1).to(tl.int64)
    o_v = (tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)).to(tl.int64)
    b_frame = tl.load(p_frame + i_b * V + o_v, mask=o_v < V, other=-1)  # [BLOCK_V] int64
    b_square = tl.zeros([BLOCK_V, BLOCK_D], tl.float32)
    for i_d in range(0, D, BLOCK_D):
        o_d = i_d + tl.arange(0, BLOCK_D)
        b_x = _row(p_feature, p_counted, i_b, o_v, b_frame, o_d, F, D, s_b, s_v)
        b_square += b_x * b_x
    b_length = tl.sqrt(tl.sum(b_square, 1))
    b_inverse = tl.where(b_length < float("inf"), 1.0 / tl.maximum(b_length, 1e-12), 0.0)
    tl.store(p_inverse + i_b * V + o_v, b_inverse, mask=o_v < V)


@jit
def _middle_kernel(
    p_feature, p_inverse, p_counted, p_begin, p_length, p_middle,
    V, F, D, s_b, s_v, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The mean direction of the tokens of a frame, a stretch of channels."""
    i_b, row, begin, length = _frame(p_begin, p_length, F)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    b_sum = tl.zeros([BLOCK_V, BLOCK_D], tl.float32)
    for i_v in range(0, length, BLOCK_V):
        o_v = i_v + tl.arange(0, BLOCK_V)
        m_x = (o_v < length)[:, None] & (o_d < D)[None, :]
        p_x = p_feature + i_b * s_b + (begin + o_v)[:, None] * s_v + o_d[None, :]
        b_x = tl.load(p_x, mask=m_x, other=0.0).to(tl.float32)  # [BLOCK_V, BLOCK_D]
        b_scale = tl.load(p_inverse + i_b * V + begin + o_v, mask=o_v < length, other=0.0)[:, None]
        b_sum += tl.where(b_scale > 0, b_x * b_scale, 0.0)
    b_own = tl.load(p_counted + row * D + o_d, mask=o_d < D, other=0).to(tl.float32)
    tl.store(p_middle + row * D + o_d, tl.sum(b_sum, 0) * b_own / tl.maximum(length, 1), mask=o_d < D)


@jit
def _novelty_kernel(
    p_feature, p_inverse, p_counted, p_frame, p_middle, p_memory, p_score,
    V, F, D, s_b, s_v, SPREADS: tl.constexpr, NUMBER: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Minus how alike each token is to the two vectors of its frame."""
    i_b = tl.program_id(1).to(tl.int64)
    o_v = (tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)).to(tl.int64)
    b_frame = tl.load(p_frame + i_b * V + o_v, mask=o_v < V, other=-1)  # [BLOCK_V] int64
    b_scale = tl.load(p_inverse + i_b * V + o_v, mask=o_v < V, other=0.0)[:, None]
    b_middle = tl.zeros([BLOCK_V, BLOCK_D], tl.float32)
    b_memory = tl.zeros([BLOCK_V, BLOCK_D], tl.float32)
    for i_d in range(0, D, BLOCK_D):
        o_d = i_d + tl.arange(0, BLOCK_D)
        b_x = _row(p_feature, p_counted, i_b, o_v, b_frame, o_d, F, D, s_b, s_v)
        b_x = tl.where(b_scale > 0, b_x * b_scale, 0.0)
        o_f = (i_b * F + tl.maximum(b_frame, 0))[:, None] * D + o_d[None, :]
        b_off = b_x - tl.load(p_middle + o_f, mask=(o_d < D)[None, :], other=0.0)
        b_middle += b_off * b_off
        b_off = b_x - tl.load(p_memory + o_f, mask=(o_d < D)[None, :], other=0.0)
        b_memory += b_off * b_off
    b_middle, b_memory = tl.sum(b_middle, 1), tl.sum(b_memory, 1)
    b_score = tl.zeros([BLOCK_V], tl.float32)
    for i_w in tl.static_range(NUMBER):
        b_score -= tl.exp(-b_middle / SPREADS[i_w]) + tl.exp(-b_memory / SPREADS[i_w])
    tl.store(p_score + i_b * V + o_v, tl.where(b_frame >= 0, b_score, 0.0), mask=o_v < V)


def supports(
    feature: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    frame: torch.Tensor,
    total: torch.Tensor | None = None,
    frames: torch.Tensor | None = None,
) -> Support:
    if feature.dtype not in FLOATS:
        return no(f"the feature is {feature.dtype}, not float32, float16 or bfloat16")
    return YES


def launch(
    feature: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    frame: torch.Tensor,
    total: torch.Tensor | None = None,
    frames: torch.Tensor | None = None,
) -> torch.Tensor:
    """[B, V] float32: the higher, the less alike to its frame and to the frames so far."""
    batch, visual, width = feature.shape
    number = int(frame.max()) + 1 if frame.numel() else 0  # frames of a sample at most
    if number == 0:
        return torch.zeros(batch, visual, device=feature.device)
    feature, frame = feature if feature.stride(2) == 1 else feature.contiguous(), frame.contiguous()
    begin, length = (table[:, 1 : number + 1].contiguous() for table in (first_of(frame), lengths(frame)))
    chosen = setting("novelty_score", visual)
    blocks = {"BLOCK_V": chosen["block_v"], "BLOCK_D": chosen["block_d"], "num_warps": chosen["warps"]}
    rows = (number, cdiv(width, chosen["block_d"]), batch)
    tiles, steps = (cdiv(visual, chosen["block_v"]), batch), feature.stride()[:2]

    mean, varies, middle = torch.empty(3, batch, number, width, dtype=torch.float32, device=feature.device)
    _moments_kernel[rows](feature, begin, length, mean, varies, number, width, *steps, **blocks)
    every = torch.zeros(batch * number, width, dtype=torch.int64, device=feature.device)
    counted = best(-varies.view(-1, width), every, torch.full_like(every[:, :1], max(1, width // 2)))
    inverse = torch.empty(batch, visual, dtype=torch.float32, device=feature.device)
    _length_kernel[tiles](feature, counted, frame, inverse, visual, number, width, *steps, **blocks)
    _middle_kernel[rows](feature, inverse, counted, begin, length, middle, visual, number, width, *steps, **blocks)

    so_far = mean.cumsum(1)
    if total is None or frames is None:
        # Column 0 takes the pads.
        first = torch.where(frame >= 0, extent(frame, segment, counts)[0], 0)
        first = torch.zeros(batch, number + 1, dtype=torch.int64, device=frame.device).scatter(1, frame + 1, first)
        sums = torch.nn.functional.pad(so_far, (0, 0, 1, 0))
        so_far = so_far - sums.gather(1, first[:, 1:, None].expand(mean.shape))
    else:
        so_far = so_far + total.float()[:, None]
    memory = directions(so_far * counted.view(mean.shape))  # how many frames a sum is of shows in no direction
    score = torch.empty_like(inverse)
    _novelty_kernel[tiles](
        feature, inverse, counted, frame, middle, memory, score, visual, number, width, *steps,
        SPREADS=SPREADS, NUMBER=len(SPREADS), **blocks,
    )  # fmt: skip
    return score
