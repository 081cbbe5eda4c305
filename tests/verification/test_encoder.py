"""Which encoder tokens make which visual token, against what a nudge of one encoder token changes."""

from __future__ import annotations

import pytest
import torch

import support
from tvc.trace.layout import used_vision_blocks
from tvc.trace.observe import Observer, Seen, observed
from tvc.verification.encoder import EncoderTaps, flat_features, token_map


class Nudge(Observer):
    """Moves one encoder token in front of the last used block, whose tokens do not see each other."""

    silent = True

    def __init__(self, block: int, token: int | None):
        self.block, self.token = block, token

    def entering(self, component, index, block, arguments):
        if component == "vision" and index == self.block and self.token is not None:
            hidden = arguments["hidden_states"].clone(memory_format=torch.contiguous_format)
            hidden.view(-1, hidden.shape[-1])[self.token] += torch.linspace(-1, 2, hidden.shape[-1])
            arguments["hidden_states"] = hidden


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "llava_onevision", "smolvlm", "internvl", "gemma3"])
@torch.no_grad()
def test_a_token_moves_the_visual_token_it_belongs_to(family):
    model, inputs = support.build_model(family), support.inputs(family, 2)
    owner, block = token_map(model, inputs), used_vision_blocks(model) - 1

    def features(token):
        with observed(model, Nudge(block, token)):
            return flat_features(model, inputs)

    still = features(None)
    assert len(still) == int(support.visual_mask(family, inputs["input_ids"]).sum())
    assert owner.max() < len(still)
    for token in range(0, len(owner), 7):
        moved = ((features(token) - still).abs().amax(1) > 1e-5).nonzero().flatten().tolist()
        assert moved == [n for n in [int(owner[token])] if n >= 0], f"token {token}"


def test_every_visual_token_of_a_merger_has_its_four():
    owner = token_map(support.build_model("qwen2_5_vl"), support.inputs("qwen2_5_vl", 2))
    assert owner.bincount().unique().tolist() == [4]
    assert owner.tolist() != sorted(owner.tolist())  # the encoder works in windows


@pytest.mark.parametrize("score", ["all", "visual", "global"])
def test_images_that_one_mask_keeps_apart_are_scored_like_each_alone(score):
    """Three images in one row, of which the second lost two tokens; a row of the mask sees its own image at most."""
    torch.manual_seed(0)
    lengths, gone = [5, 7, 4], [6, 9]
    query, key = torch.randn(1, 2, 16, 3), torch.randn(1, 2, 16, 3)
    image = torch.arange(3).repeat_interleave(torch.tensor(lengths))
    alive = torch.ones(16, dtype=torch.bool)
    alive[gone] = False
    mask = ((image[:, None] == image) & alive)[None, None]
    taps = EncoderTaps(torch.arange(16), 16, lengths)

    def scored(taps, calls):
        return taps.of_global(calls, 1.05) if score == "global" else taps.attention(calls, score, "mean")

    got, start = scored(taps, [Seen(query, key, key, mask, 0.5)]), 0
    for number, length in enumerate(lengths):
        own = (image == number) & alive
        parts = Seen(query[:, :, own], key[:, :, own], key[:, :, own], None, 0.5)
        count = int(own.sum())
        wanted = scored(EncoderTaps(torch.arange(count), count, [count]), [parts])
        torch.testing.assert_close(got[own], wanted)
        torch.testing.assert_close(got[start : start + length].sum(), torch.tensor(1.0))
        start += length
