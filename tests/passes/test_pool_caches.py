"""What pooled caches are made of, on plain tensors: entries of a stage behind a cut, and what chunks are ranked by."""

from __future__ import annotations

import torch

from tvc.passes.pool_caches import entries, relevance


def test_entries_of_a_stage_are_runs_of_what_a_cut_left() -> None:
    """Frames of 3 and 4 tokens, of which the second stays as it is; a padded sample with frames of 3 and 2."""
    frame = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [-1, -1, 0, 0, 0, 1, 1]])
    whole = torch.tensor([[False] * 3 + [True] * 4, [False] * 7])
    slots = torch.tensor([[0, 1, 3, 4, 6, 7, 8, 9], [-1, 1, 2, 3, 4, 6, 8, 9]])  # places in the sequence
    visual = torch.tensor([[1, 2, 3, 4, 5], [-1, 2, 3, 4, 5]])
    segment, origin = torch.tensor([[0] * 5, [-1] + [0] * 4]), torch.tensor([[0, 2, 3, 5, 6], [3, 2, 3, 4, 6]])
    entry, kept = entries((frame, torch.zeros_like(frame)), whole, slots, visual, segment, origin, 2)
    assert entry.tolist() == [[0, 1, 1, 2, 3, 4, 5, 6], [-1, 0, 1, 1, 2, 3, 4, 5]]
    assert kept.tolist() == [[0, 1, 3, 4, 5, 6, 7], [-1, 1, 2, 4, 5, 6, 7]]


def test_chunks_are_ranked_by_the_cosine_with_the_text_behind_them() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(2, 6, 5)
    visual, text = torch.tensor([[1, 2], [-1, 2]]), torch.tensor([[0, 3, 4, 5], [-1, 1, 3, 4]])
    made = relevance(hidden, visual, text)
    for row, behind in ((0, [3, 4, 5]), (1, [3, 4])):
        asked = hidden[row, behind].mean(0)
        for place, slot in enumerate(visual[row].tolist()):
            if slot >= 0:
                want = torch.nn.functional.cosine_similarity(hidden[row, slot], asked, dim=0)
                torch.testing.assert_close(made[row, place], want)
