"""Positions by hand: a prompt and what was generated behind it, in fractions, against numbers written out."""

from __future__ import annotations

import torch

from tvc.verification.numbering import all_in_fractions

MASK = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1], [1] * 8, [0, 0, 0, 1, 1, 1, 1, 1]]).bool()


def test_what_is_generated_behind_a_prompt_is_text() -> None:
    """It counts on in whole positions from the number above, also where an image ends the prompt."""
    image = torch.tensor([[-1, -1, 0, 0, -1], [0, 0, 1, -1, 1], [-1, -1, -1, -1, 4]])
    own = MASK.long().cumsum(1) - 1
    made = all_in_fractions(MASK, image, own + torch.tensor([[0], [1], [0]]), 64)
    assert made.dtype == torch.float32
    assert made.tolist() == [
        [0, 0, 0.25, 0.5, 2, 3, 4, 5],
        [0.25, 0.5, 1.25, 3, 3.25, 5, 6, 7],  # whose first token of text would stand at 1
        [0, 0, 0, 0, 0.25, 2, 3, 4],
    ]


def test_whole_strides_count_every_token() -> None:
    image = torch.where(torch.arange(5) % 3 > 0, 0, -1).expand(3, 5)
    own = (MASK.long().cumsum(1) - 1).clamp(min=0)
    assert all_in_fractions(MASK, image, own, 256).tolist() == own.tolist()
