"""coverage_keep on Triton: all rounds in one launch, whose programs share the tokens of a segment among them.

The matrix of coverings is read once a round, and no multiprocessor reads it alone fast enough. Each program reads the
columns of its own tokens, hands out how much each would add, waits for the others and finds the best of all.
"""

from __future__ import annotations

import functools

import torch

from tvc.kernels.greedy import directions
from tvc.kernels.providers import YES, Support, no
from tvc.kernels.providers._greedy import budget, first_best, nothing
from tvc.kernels.providers._pack import packed
from tvc.kernels.providers._table import setting
from tvc.kernels.providers._triton import INTERPRETED, cdiv, jit, power, tl
from tvc.kernels.select_coverage import coverings, text_coverings

MOST_TOKENS = 16384  # whose values one program compares at the end of a round
MOST_ALONE = 1536  # where programs are too few to share: above, the reference's launches read the matrix faster
LEAST = 16  # tokens of a program


@jit
def _wait(p_ready, goal):
    """Until `goal` programs have come here; what they wrote before may be read after, around the first-level cache."""
    tl.debug_barrier()
    ready = tl.atomic_add(p_ready, 1, sem="acq_rel") + 1
    while ready < goal:
        ready = tl.atomic_add(p_ready, 0, sem="acq_rel")
    tl.debug_barrier()


@jit
def _coverage_kernel(
    p_cover, p_covered, p_value, p_ready, p_segment, p_counts, p_flag,
    V, N, rows, first, last, permille, count,
    SHARED: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Turns `first` to `last`: each settles the round before and, where one is left, values the tokens for its own."""
    i_p, i_n, programs = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    i_b = tl.program_id(2).to(tl.int64)
    p_cover += i_b * rows * V
    p_covered += ((i_b * N + i_n) * programs + i_p) * rows
    p_value += (i_b * N + i_n) * 2 * V  # of this round and of the one before
    o_v = i_p * BLOCK_V + tl.arange(0, BLOCK_V)
    o_a = tl.arange(0, BLOCK_A)
    m_v = o_v < V
    b_mine = tl.load(p_segment + i_b * V + o_v, mask=m_v, other=-1) == i_n  # [BLOCK_V]
    b_free = b_mine & (tl.load(p_flag + i_b * V + o_v, mask=m_v, other=1) == 0)
    rounds = budget(p_counts, i_b, i_n, N, permille, count)
    picked = tl.full([], 0, tl.int32)
    for i_k in range(first, tl.minimum(last, rounds) + 1):
        if i_k > 0:
            p_before = p_value + (i_k - 1) % 2 * V
            b_all = tl.load(p_before + o_a, mask=o_a < V, other=float("-inf"), cache_modifier=".cg")  # [BLOCK_A]
            picked = first_best(b_all, b_all > float("-inf"), o_a, 0.0, BLOCK_A)
            tl.store(p_flag + i_b * V + o_v, 1, mask=b_free & (o_v == picked))
            b_free = b_free & (o_v != picked)
        if i_k < rounds:
            # Makes what the round before wrote to `covered` visible.
            tl.debug_barrier()
            b_value = tl.zeros([BLOCK_V], tl.float32)
            for i_r in range(0, rows, BLOCK_R):
                o_r = (i_r + tl.arange(0, BLOCK_R)).to(tl.int64)
                m_r = o_r < rows
                b_covered = tl.zeros([BLOCK_R], tl.float32)
                if i_k > 0:
                    b_covered = tl.load(p_cover + o_r * V + picked, mask=m_r, other=0.0)  # [BLOCK_R] by the last taken
                    if i_k > 1:
                        b_covered = tl.maximum(b_covered, tl.load(p_covered + o_r, mask=m_r, other=0.0))
                    tl.store(p_covered + o_r, b_covered, mask=m_r)
                p_tile = p_cover + o_r[:, None] * V + o_v[None, :]
                b_cover = tl.load(p_tile, mask=m_r[:, None] & b_mine[None, :], other=0.0)  # [BLOCK_R, BLOCK_V]
                b_value += tl.sum(tl.maximum(b_cover - b_covered[:, None], 0.0), 0)
            tl.store(p_value + i_k % 2 * V + o_v, tl.where(b_free, b_value, float("-inf")), mask=m_v)
            if SHARED:
                _wait(p_ready + i_b * N + i_n, (i_k + 1) * programs)
            else:
                tl.debug_barrier()


@functools.cache
def _processors(device: torch.device) -> int:
    """Programs that run at the same time for sure."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 64


def _programs(segment: torch.Tensor, counts: torch.Tensor) -> int:
    """Among how many programs the tokens of one segment are shared."""
    others = max(1, counts.shape[0] * counts.shape[1])
    return max(1, min(_processors(segment.device) // others, cdiv(segment.shape[1], LEAST)))


def supports(
    feature: torch.Tensor,
    text: torch.Tensor,
    valid: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    text_temperature: float,
    visual_temperature: float,
    visual: float,
    permille: int,
    count: int,
    slots: int,
) -> Support:
    tokens = segment.shape[1]
    if tokens > MOST_TOKENS:
        return no(f"there are {tokens} visual tokens; one program compares up to {MOST_TOKENS}")
    if tokens > MOST_ALONE and _programs(segment, counts) == 1:
        scopes = counts.shape[0] * counts.shape[1]
        return no(f"{scopes} segments leave one program for each, which is fast up to {MOST_ALONE} tokens")
    return YES


def launch(
    feature: torch.Tensor,
    text: torch.Tensor,
    valid: torch.Tensor,
    segment: torch.Tensor,
    counts: torch.Tensor,
    text_temperature: float,
    visual_temperature: float,
    visual: float,
    permille: int,
    count: int,
    slots: int,
) -> torch.Tensor:
    """[B, slots] int64: tokens of each segment that together stand for the text and the segment."""
    batch, tokens = segment.shape
    if tokens == 0 or counts.shape[1] == 0:
        return nothing(segment, slots)
    unit = directions(feature)
    told = text_coverings(unit, text, valid, segment, counts, text_temperature)
    cover = torch.cat([told, coverings(unit, segment, counts, visual_temperature, visual)], 1)
    segment, counts = segment.contiguous(), counts.contiguous()
    rows, number, programs = cover.shape[1], counts.shape[1], _programs(segment, counts)
    covered = cover.new_empty(batch, number, programs, rows)
    value = cover.new_empty(batch, number, 2, tokens)
    ready = torch.zeros(batch, number, dtype=torch.int32, device=cover.device)
    flag = torch.zeros(batch, tokens, dtype=torch.int8, device=cover.device)
    block_a, block_v = max(16, power(tokens)), max(LEAST, power(cdiv(tokens, programs)))
    programs = cdiv(tokens, block_v)
    setup = setting("coverage_keep", tokens)

    def turns(first: int, last: int, shared: bool, **options: bool) -> None:
        _coverage_kernel[(programs, number, batch)](
            cover, covered, value, ready, segment, counts, flag, tokens, number, rows, first, last, permille, count,
            SHARED=shared, BLOCK_A=block_a, BLOCK_V=block_v, BLOCK_R=max(1, min(setup["rows"], 8192 // block_v)),
            num_warps=setup["warps"], **options,
        )  # fmt: skip

    if INTERPRETED:  # its programs run one after the other: a launch a turn, so that none waits for another
        for turn in range(slots + 1):
            turns(turn, turn, shared=False)
    elif programs > 1:
        turns(0, slots, shared=True, launch_cooperative_grid=True)
    else:
        turns(0, slots, shared=False)
    return packed(flag, slots)
