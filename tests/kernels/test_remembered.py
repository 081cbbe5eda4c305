"""Scores that remember: frames that come in several calls are scored as if all of them had come in one."""

from __future__ import annotations

import pytest
import torch

from tvc.kernels.op import Scope
from tvc.kernels.score_novelty import NoveltyScore

WIDTH = 6
Frames = tuple[torch.Tensor, torch.Tensor]


def scope(tokens: int) -> Scope:
    return Scope(torch.zeros(1, tokens, dtype=torch.int64), torch.tensor([[tokens]]), 1)


def frames(lengths: list[int]) -> Frames:
    number = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.cat([torch.arange(length) for length in lengths])
    return number[None], place[None]


def nothing(score: NoveltyScore) -> dict[str, torch.Tensor]:
    (tap,) = (tap for tap in score.taps().values() if tap.states)
    sizes = {state: [WIDTH if size == "width" else size for size in state.sizes] for state in tap.states}
    return {state.name: torch.zeros(1, *sizes[state], dtype=state.dtype) for state in tap.states}


@pytest.mark.parametrize("cuts", [[1], [2], [4], [1, 2], [1, 2, 3, 4], [2, 2]])
def test_calls_score_what_one_call_scores(cuts: list[int]) -> None:
    """Frames of odd lengths; `cuts` are where calls begin, one of which may bring nothing."""
    torch.manual_seed(0)
    lengths, score = [3, 1, 5, 4, 2], NoveltyScore(memory="conversation")
    feature = torch.randn(1, sum(lengths), WIDTH)
    want = score.apply(scope(sum(lengths)), feature, frames(lengths), nothing(score))
    got, past = [], nothing(score)
    for start, stop in zip([0, *cuts], [*cuts, len(lengths)], strict=True):
        tokens = slice(sum(lengths[:start]), sum(lengths[:stop]))
        own, part = frames(lengths[start:stop]) if stop > start else (torch.zeros(1, 0).long(),) * 2, feature[:, tokens]
        got.append(score.apply(scope(part.shape[1]), part, own, past))
        past = score.remembered(part, own, past)
    torch.testing.assert_close(torch.cat(got, 1), want)
    torch.testing.assert_close(past, score.remembered(feature, frames(lengths), nothing(score)))
    assert past["frames"].tolist() == [5]


def test_a_memory_of_nothing_is_that_of_one_video() -> None:
    torch.manual_seed(0)
    feature, lengths = torch.randn(1, 9, WIDTH), [4, 3, 2]
    score = NoveltyScore(memory="conversation")
    got = score.apply(scope(9), feature, frames(lengths), nothing(score))
    torch.testing.assert_close(got, NoveltyScore().apply(scope(9), feature, frames(lengths)))
